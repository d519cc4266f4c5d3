"""File formats of adapters: each reads and writes `{component: (config, tensors)}`."""
