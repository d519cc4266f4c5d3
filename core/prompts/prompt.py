"""Prompts: adapters of the input rather than of a layer. A method subclasses one of two bases and writes one function.

SoftPrompt.tokens    embeddings put before those of the text
Prefix.tokens        the same for the keys and values of every layer
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Factor, Slot
from ..errors import NotMergeableError

if TYPE_CHECKING:
    from .config import PromptLearningConfig
    from .site import PromptSite

KEY = "prompt_embeddings"
"""PEFT's name for the tokens in files."""
NETWORK = "prompt_encoder."
"""What our files put before the tensors of the network that makes the tokens; PEFT's readers pass over them."""


class Prompt(Adapter):
    """Base of all prompts: `embedding.weight` holds the tokens, under PEFT's name in files.

    Arguments:
        config, path, device, dtype: as of every adapter.
        site: the backbone.
    """

    site: PromptSite  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, config: PromptLearningConfig, site: PromptSite, path: str, device: torch.device, dtype: torch.dtype
    ):
        # tokens are few: on their final device at once, since an LSTM does not survive a stay on the meta device
        super().__init__(config, site, path, site.device if device.type == "meta" else device, dtype)
        self.count: int = config.num_virtual_tokens or 0
        """Virtual tokens before one text."""
        self.embedding = Factor(self.new(self.rows, self.width))

    @property
    def rows(self) -> int:
        """Tokens of all submodules together."""
        return self.config.total_virtual_tokens

    @property
    def width(self) -> int:
        """Numbers in one row of the tokens."""
        return self.config.token_dim

    def reset(self) -> None:
        """Random tokens: unit normal, as PEFT's."""
        nn.init.normal_(self.embedding.weight)

    def tokens(self, task_ids: Tensor | None) -> Tensor:
        """The virtual tokens: (total, width), or (batch, total, width) where they differ by row."""
        return self.embedding.weight

    def enters(self, decoder: bool, prefixes: bool) -> bool:
        """Whether it enters there: at a decoder after an encoder, or a backbone that takes prefixes."""
        raise NotImplementedError

    def slots(self) -> Iterator[Slot]:
        for name, held, key in super().slots():
            yield KEY if name == "embedding.weight" else name, held, key

    def file_key(self, path: str, key: str) -> str:
        return key

    @property
    def strength(self) -> float:  # type: ignore[override]
        return 1.0

    @strength.setter
    def strength(self, value: float) -> None:
        if value != 1.0:
            raise ValueError(f"strength {value}: a prompt is there or not, it has no strength to change")

    def check_mergeable(self) -> None:
        raise NotMergeableError(
            f"{self.config.peft_type} is virtual tokens before the text, which no change of weights can stand for"
        )

    def forward(self, x: Any, inner: Any) -> Any:
        raise TypeError("a prompt is not called: it enters at the backbone")


class SoftPrompt(Prompt):
    """Tokens before those of the text; before the decoder's too, where `parts` is 2."""

    parts: int = 1

    def enters(self, decoder: bool, prefixes: bool) -> bool:
        return not decoder or self.parts == 2

    def entering(self, decoder: bool, task_ids: Tensor | None) -> Tensor | None:
        """What enters the backbone, or None: (count, width) or (batch, count, width)."""
        if decoder and self.parts < 2:
            return None
        start = self.count if decoder else 0
        return self.tokens(task_ids)[..., start : start + self.count, :]


class Prefix(Prompt):
    """Keys and values before those of the text, in every layer of a decoder."""

    def enters(self, decoder: bool, prefixes: bool) -> bool:
        return prefixes

    @property
    def rows(self) -> int:
        return self.count

    @property
    def width(self) -> int:
        return self.config.num_layers * 2 * self.config.token_dim

    def keys_and_values(self, task_ids: Tensor | None) -> Tensor:
        """(layers, 2, heads, count, head_dim)"""
        config = self.config
        heads = config.num_attention_heads
        flat = self.tokens(task_ids)  # (count, layers * 2 * token_dim)
        pairs = flat.view(self.count, config.num_layers, 2, heads, config.token_dim // heads).permute(1, 2, 3, 0, 4)
        if config.num_transformer_submodules == 2:  # PEFT's layout: every other layer's, twice over
            pairs = pairs[[2 * i % config.num_layers for i in range(config.num_layers)]]
        return pairs


class Reparameterised(Prompt):
    """Mixin for tokens that a network makes while they are trained. It is saved beside them, so that training goes on
    where it was; an adapter from a file without it is its tokens, which are then trained themselves."""

    network = True
    """Whether there still is one."""
    made: Tensor

    def keep_network(self, rows: int, inputs: int, **modules: nn.Module) -> None:
        """Hold a network: its input embeddings (rows, inputs), and its modules."""
        device, dtype = self._place
        self.register_buffer("made", torch.empty_like(self.embedding.weight), persistent=True)
        self.embedding = Factor(self.new(rows, inputs))
        for name, module in modules.items():
            setattr(self, name, module.to(device, dtype).requires_grad_(False))

    def reset(self) -> None:
        super().reset()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LSTM)):
                module.reset_parameters()

    def run_network(self) -> Tensor:
        """The tokens (total, width)."""
        raise NotImplementedError

    def tokens(self, task_ids: Tensor | None) -> Tensor:
        return self.run_network() if self.network else self.embedding.weight

    def settle(self, names: set[str]) -> None:
        if self.network and KEY in names and not any(n.startswith(NETWORK) for n in names):
            self.network = False
            for name in [n for n, m in self._modules.items() if m is not None and n != "embedding"]:
                for module in self._modules[name].modules():  # type: ignore[union-attr]
                    module._parameters.clear()  # whose dicts are known to whoever sets requires_grad
                delattr(self, name)
            del self._buffers["made"]
            self.embedding.weight = self.new(self.rows, self.width)

    def slots(self) -> Iterator[Slot]:
        if not self.network:
            yield from super().slots()
            return
        with torch.no_grad():
            self.made.copy_(self.run_network())
        for name, held, key in Adapter.slots(self):
            yield KEY if name == "made" else NETWORK + name, held, key
