r"""Trainable tokens: a few rows of an embedding are replaced by trained ones, and those of a head that is tied to it.

With T (tokens, dim) the embedding of token $t_i$ is $T_i$; all others stay what they are. A tied head sees the same T,
so what is generated and what is read remain one. The rows are values, not differences, so that files mean the same over
an embedding that was extended with random rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Folded, Inner, Slot, method
from ..config import PeftConfig, PeftType
from ..sites import Embedding, Linear, Site, TransposedLinear


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Options of trainable tokens; names and defaults are PEFT's. The default target is the input embedding."""

    peft_type: PeftType | str | None = PeftType.TRAINABLE_TOKENS
    token_indices: list[int] = field(default_factory=list)
    """Ids of the tokens that are trained. Many of them, and an embedding trained whole costs less."""
    init_weights: bool = True
    """True starts with the tokens' present embeddings; False with random ones, for tests."""

    on_embeddings: ClassVar[bool] = True


class Rows(nn.Module):
    """The trained rows (tokens, dim), held by all modules that are tied."""

    def __init__(self, rows: nn.Parameter):
        super().__init__()
        self.trainable_tokens_delta = rows


@method(TrainableTokensConfig)
class Tokens(Folded):
    """The tokens of one layer.

    Arguments (beyond the usual):
        tokens: their ids; None asks the config.
        prefix: what stands before the tensor's name in files.
    """

    views = ("trainable_tokens_delta", "token_indices")
    ids: Tensor
    order: Tensor

    def __init__(
        self,
        config: PeftConfig,
        site: Site,
        path: str,
        device: torch.device,
        dtype: torch.dtype,
        tokens: list[int] | None = None,
        prefix: str = "",
    ):
        super().__init__(config, site, path, device, dtype)
        self.token_indices: list[int] = list(self.config.token_indices if tokens is None else tokens)
        self.prefix, self.owner = prefix, True
        self.axis = 1 if isinstance(site, Embedding) else 0  # of the vocabulary in W (out, cols)
        self._check(path)
        self.rows = Rows(self.new(len(self.token_indices), site.out if self.axis else site.cols))
        order = sorted(range(len(self.token_indices)), key=self.token_indices.__getitem__)
        ids = torch.tensor([self.token_indices[i] for i in order], device=site.device)
        self.register_buffer("ids", ids, persistent=False)  # sorted, to be searched
        self.register_buffer("order", torch.tensor(order, device=site.device), persistent=False)

    def _check(self, path: str) -> None:
        kind = type(self.site.module).__name__
        if not isinstance(self.site, Linear) or self.site.kernel or type(self.site) is TransposedLinear:
            raise ValueError(f"{path}: a {kind} has no rows of tokens; target an embedding")
        if not self.token_indices:
            raise ValueError(f"{path}: token_indices is empty, so there is nothing to train")
        vocabulary = self.site.cols if self.axis else self.site.out
        wrong = sorted({t for t in self.token_indices if not 0 <= t < vocabulary})
        if wrong:
            raise ValueError(f"{path}: tokens {wrong[:5]} are not among the {vocabulary} of this {kind}")
        if len(set(self.token_indices)) < len(self.token_indices):
            twice = sorted({t for t in self.token_indices if self.token_indices.count(t) > 1})
            raise ValueError(f"{path}: tokens {twice[:5]} are named twice")

    def tie(self, owner: Tokens) -> None:
        """Take another adapter's rows for its own."""
        self.rows, self.owner = owner.rows, False

    @property
    def trainable_tokens_delta(self) -> nn.Parameter:
        return self.rows.trainable_tokens_delta

    def slots(self) -> Iterator[Slot]:
        if self.owner or not self.prefix:  # PEFT stores tied rows twice, but not those of a LoRA
            name = "trainable_tokens_delta"
            yield self.prefix + name, self.rows._parameters, name

    def reset(self) -> None:
        if not self.owner:
            return
        if not getattr(self.config, "init_weights", True):
            nn.init.normal_(self.trainable_tokens_delta)
            return
        indices = torch.tensor(self.token_indices, device=self.site.device)
        rows = self.site.read()[0].detach().index_select(self.axis, indices)
        self.trainable_tokens_delta.data.copy_(rows.T if self.axis else rows)

    def _sorted(self, dtype: torch.dtype) -> Tensor:
        """The rows in the order of `ids`."""
        return self.trainable_tokens_delta.to(self.ids.device, dtype).index_select(0, self.order)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = self._sorted(weight.dtype)
        return weight.index_copy(self.axis, self.ids, rows.T if self.axis else rows), bias

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        # Unlike `fold`, without a copy of the whole weight.
        y = inner(x)
        rows = self._sorted(y.dtype)
        if not self.axis:
            _, bias = inner.weights()
            logits = F.linear(x.to(y.dtype), rows, None if bias is None else bias.to(y.dtype).index_select(0, self.ids))
            return y.index_copy(-1, self.ids, logits)
        place = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)
        found = self.ids[place] == x
        padding = self.site.module.padding_idx
        if padding is not None:  # gets no gradient, as in the embedding
            rows = torch.where((self.ids == padding)[:, None], rows.detach(), rows)
        replaced = self.site._scaled(F.embedding(place, rows))  # type: ignore[attr-defined]
        return torch.where(found[..., None], replaced, y)
