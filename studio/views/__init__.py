"""The tabs. A handler calls a service and shows what it says; nothing here computes."""
