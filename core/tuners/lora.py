r"""LoRA (Hu et al. 2021, arXiv:2106.09685): $W' = W + \frac{\alpha}{r} B A$.

B (out, r) and A (r, cols) are the only trained tensors. With `use_rslora` the scale is $\alpha / \sqrt r$
(Kalajdzievski 2023, arXiv:2312.03732), which keeps the size of updates independent of the rank.

In a grouped convolution every group applies the same A to its own channels, so B A is a grouped kernel and merges.

Starts taken from the weight (`init/`) leave the weight alone: where training begins at $B_0 A_0 \ne 0$, the adapter is
$W' = W + s (B A - B_0 A_0)$, with the start as frozen factors.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Factor, Factored, Inner, kaiming_, method, plus
from ..config import PeftConfig, PeftType, RankedConfig
from ..init import Start, find_initialisation
from ..init.eva import EvaConfig
from ..init.loftq import LoftQConfig
from ..kept import Kept
from ..sites import Embedding, Site
from .dora import OptionalDora
from .parameters import ParameterLoRA, check_parameters


@dataclass
class LoraRuntimeConfig:
    """How to compute, which a file never says."""

    ephemeral_gpu_offload: bool = False
    """Initialise layers that wait in the CPU's memory on the accelerator, one at a time: the decompositions of starts
    taken from the weight, and the norms of DoRA."""


@dataclass
class LoraConfig(OptionalDora, RankedConfig):
    """Options of LoRA; names and defaults are PEFT's."""

    peft_type: PeftType | str | None = PeftType.LORA
    lora_alpha: float = 8
    """Numerator of the scale; alpha = r leaves the product B A as it is."""
    lora_dropout: float = 0.0
    """Probability of dropping an entry of the branch's input in training; not applied to embeddings."""
    fan_in_fan_out: bool = False
    """Kept for PEFT's files; the layer's class already tells how its weight is stored."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained along."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) rather than alpha / r."""
    init_lora_weights: bool | str = True
    """True: Kaiming-uniform A and zero B; "gaussian": normal A of deviation 1 / r and zero B; False: both random, so
    that the adapter starts as something else than the identity (for tests). Starts that look at the weight or at data:
    "pissa", "pissa_niter_[n]", "olora", "orthogonal", "loftq", "eva" (see `core/init/`)."""
    loftq_config: LoftQConfig | dict[str, int] = field(default_factory=dict)
    """Bits and rounds of "loftq"; needed there and refused elsewhere."""
    eva_config: EvaConfig | dict[str, Any] | None = None
    """Options of "eva"; None takes the defaults there."""
    layer_replication: list[tuple[int, int]] | None = None
    """Ranges [start, end) of the model's layers that make up a deeper one, as in [[0, 4], [2, 5]]; the repeated layers
    share the base weights and have adapters of their own (see `core/replicate.py`)."""
    alora_invocation_tokens: list[int] | None = None
    """Token ids from whose last occurrence in a row on the adapter is on (see `alora.py`); None for all tokens."""
    target_parameters: list[str] | None = None
    """Bare parameters to adapt, by dotted suffix ("experts.down_proj"): matrices, or stacks of them as experts have
    (see `parameters.py`). Without `target_modules` only these are."""
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    """How to compute, on this machine; never saved."""
    lora_bias: bool = False
    """Add a trained bias to B."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embeddings are trained along: ids for the input embedding, or by module name. What is tied to it
    stays tied (see `tokens.py`)."""

    alpha_field: ClassVar[str] = "lora_alpha"
    later: ClassVar[frozenset[str]] = frozenset(
        {
            "arrow_config", "corda_config", "ensure_weight_tying",
            "kasa_config", "lora_ga_config", "megatron_config",
            "monteclora_config", "use_bdlora", "use_qalora",
            "velora_config",
        }
    )  # fmt: skip
    why_not: ClassVar[dict[str, str]] = {
        "corda_config": "its start comes from data, and no file holds it: 'pissa' or 'eva' come near",
        "lora_ga_config": "its start comes from gradients, and no file holds it: 'pissa' or 'eva' come near",
        "megatron_config": "the parallel layers of Megatron are no layers that are known here",
        "use_qalora": "it is for GPTQ's layers, which are not known here",
    }
    ignored: ClassVar[frozenset[str]] = frozenset({"runtime_config", "megatron_core", "qalora_group_size"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias={self.bias!r} is unknown; expected 'none', 'all' or 'lora_only'")
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        find_initialisation(self.init_lora_weights)
        self._check_start("loftq", self.loftq_config)
        self._check_start("eva", self.eva_config)
        if self.init_lora_weights == "loftq":
            given = (
                self.loftq_config if isinstance(self.loftq_config, LoftQConfig) else LoftQConfig(**self.loftq_config)
            )
            self.loftq_config = asdict(given)
        if self.init_lora_weights == "eva":
            given = self.eva_config or EvaConfig()
            self.eva_config = given if isinstance(given, EvaConfig) else EvaConfig(**given)
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(f"lora_bias=True goes only with a plain start, not {self.init_lora_weights!r}")
        if self.alora_invocation_tokens is not None:
            self._check_invocation()
        if self.target_parameters:
            check_parameters(self)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} is not a probability below 1")

    def _check_invocation(self) -> None:
        if not self.alora_invocation_tokens:
            raise ValueError("alora_invocation_tokens is empty: give the token ids of the sequence, or None")
        others = {"use_dora": self.use_dora, "lora_bias": self.lora_bias, "init_lora_weights": self.needs_base}
        for name, given in others.items():
            if given:
                raise ValueError(f"alora_invocation_tokens does not go with {name}={getattr(self, name)!r}")

    def build(self, site: Site, path: str, device: torch.device, dtype: torch.dtype) -> Adapter:
        if self.alora_invocation_tokens is None:
            return super().build(site, path, device, dtype)
        if not site.pointwise:
            raise ValueError(f"{path}: an aLoRA is for linear layers, and this is a {type(site.module).__name__}")
        from .alora import ALoRA

        return ALoRA(self, site, path, device, dtype)

    def build_parameters(
        self, site: Site, path: str, names: list[str], device: torch.device, dtype: torch.dtype
    ) -> Adapter:
        """The adapter of a module's parameters `names`."""
        return ParameterLoRA(self, site, path, device, dtype, names)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["runtime_config"]
        return values

    @property
    def needs_base(self) -> bool:
        """Whether its factors mean something only beside the base weight that they started from."""
        start = find_initialisation(self.init_lora_weights)
        return start is not None and (start.subtracts or start.replaces_base)

    def _check_start(self, name: str, options: Any) -> None:
        if options and self.init_lora_weights != name:
            raise ValueError(f"{name}_config has an effect only with init_lora_weights={name!r}; set both or neither")


def lora_config(like: PeftConfig, ranks: dict[str, int]) -> LoraConfig:
    """A config for plain LoRA factors of scale 1, with these ranks by layer path, for the model of `like`."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    return LoraConfig(
        task_type=like.task_type,
        auto_mapping=like.auto_mapping,
        base_model_name_or_path=like.base_model_name_or_path,
        revision=like.revision,
        target_modules=set(ranks),
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
    )


@method(LoraConfig)
class LoRA(Factored):
    paddable = True
    views = (
        "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "scaling", "r", "lora_alpha", "lora_dropout",
    )  # fmt: skip

    def __init__(self, config: LoraConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        self.path = path
        self.r, self.lora_alpha = config.rank_and_alpha(path)
        self.scaling = self.lora_alpha / (sqrt(self.r) if config.use_rslora else self.r)
        self.initialisation = find_initialisation(config.init_lora_weights)
        self.subtracts = self.initialisation is not None and self.initialisation.subtracts
        self.replaced: Kept | None = None
        self.start_B: Tensor
        self.start_A: Tensor
        self.is_embedding = isinstance(site, Embedding)
        if self.is_embedding:
            if config.lora_bias:
                raise ValueError(f"lora_bias=True is not supported for {path}: an embedding has no bias")
            self.lora_embedding_A = self.new(self.r, site.cols)
            self.lora_embedding_B = self.new(site.out, self.r)
            return
        self.dropout = config.lora_dropout
        bias = self.new(site.out) if config.lora_bias else None
        self.lora_A = Factor(self.new(self.r, site.channels, *site.kernel))
        self.lora_B = Factor(self.new(site.out, self.r, *site.kernel_ones), bias)

    @property
    def lora_dropout(self) -> nn.Module:
        """The dropout of the branch, as a module for code that reads its `p`."""
        return nn.Dropout(self.dropout) if self.dropout else nn.Identity()

    def reset(self) -> None:
        init = self.config.init_lora_weights
        if self.initialisation is not None:
            start = self._start()
            for target, factor in zip(self.held_factors(), start[:2], strict=True):
                target.data.copy_(factor.reshape(target.shape))
        elif self.is_embedding:
            nn.init.normal_(self.lora_embedding_B)
            (nn.init.zeros_ if init else nn.init.normal_)(self.lora_embedding_A)
        else:
            if init == "gaussian":
                nn.init.normal_(self.lora_A.weight, std=1 / self.r)
            else:
                kaiming_(self.lora_A.weight)
            (torch.zero_ if init else kaiming_)(self.lora_B.weight)
            if self.config.lora_bias:
                (nn.init.zeros_ if init else nn.init.normal_)(self.lora_B.bias)

    def prepare(self) -> None:
        if self.subtracts or self.replaces_base:
            self._start()

    def _start(self) -> Start:
        """Compute the start, and keep of it what no file holds."""
        assert self.initialisation is not None
        start = self.initialisation(self, self.config.init_lora_weights)
        if self.subtracts:
            for name, factor in (("start_B", -start.b), ("start_A", start.a)):
                self.register_buffer(name, factor.to(self.site.device, self.dtype), persistent=False)
        if start.base is not None and self.replaced is None:
            old = self.site.module._parameters["weight"]
            self.replaced = Kept(old, "cpu")
            new = self.site.from_matrix(start.base).to(old.dtype)
            self.site.module._parameters["weight"] = nn.Parameter(new, requires_grad=False)
        return start

    @property
    def replaces_base(self) -> bool:
        return self.initialisation is not None and self.initialisation.replaces_base

    def release(self) -> None:
        if self.replaced is not None:
            parameters = self.site.module._parameters
            parameters["weight"] = self.replaced.restore(parameters["weight"])
            self.replaced = None

    def held_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The trained B and A, in the shapes of the file."""
        if self.is_embedding:
            return self.lora_embedding_B, self.lora_embedding_A
        return self.lora_B.weight, self.lora_A.weight

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.is_embedding:
            b, a = self.lora_embedding_B, self.lora_embedding_A
        else:
            b, a = self.lora_B.weight, self.lora_A.weight
            if b.ndim > 2:
                b, a = b.flatten(1), a.flatten(1)
        if self.subtracts:
            return torch.cat([b, self.start_B], 1), torch.cat([a, self.start_A])
        return b, a

    def set_factors(self, b: Tensor, a: Tensor, bias: Tensor | None = None) -> None:
        """Take B (out, r), A (r, cols) and, with `lora_bias`, a bias (out,) as its own, in the shapes of the layer's
        file."""
        values = [a, b]
        if self.config.lora_bias:
            values.append(b.new_zeros(self.site.out) if bias is None else bias)
        for (_, held, key), value in zip(self.slots(), values, strict=True):
            value = value.reshape(held[key].shape).to(self.site.device, self.dtype)
            held[key] = nn.Parameter(value.contiguous(), requires_grad=False)

    @property
    def only_factors(self) -> bool:
        return not self.config.lora_bias and type(self).forward is LoRA.forward

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        y = super().forward(x, inner)
        if self.config.lora_bias:
            y = plus(y, self.site.along_output(self.lora_B.bias.to(y.dtype)), self.gain)
        return y

    @property
    def moves_bias(self) -> bool:
        return self.config.lora_bias

    @property
    def by_rows(self) -> bool:
        return not self.moves_bias

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().fold(weight, bias)
        if self.config.lora_bias:
            extra = self.gain * self.lora_B.bias.to(weight.dtype)
            if bias is not None:
                bias = bias + extra
            elif extra.any():  # merged, zeros would give the layer a bias that its model does not know
                bias = extra
        return weight, bias
