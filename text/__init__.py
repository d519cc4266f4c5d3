"""Adapters for language models. Empty so far: `veneer.get_peft_model` adapts a transformers model today."""
