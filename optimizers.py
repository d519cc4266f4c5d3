"""Optimizers for adapters, where PEFT has them: `from veneer.optimizers import create_loraplus_optimizer`."""

from .core.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer"]
