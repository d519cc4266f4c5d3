"""Prompt learning: virtual tokens, trained, that enter a transformers model at its backbone and leave it there.

`config.py` holds what the methods' configs share, `prompt.py` the bases that the methods in `core/tuners/` subclass,
`layer.py` the layer that holds the prompts of a model, and `entry.py` what entering means for a call's arguments;
`blend.py` combines prompts.
"""
