r"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): $W' = W + \frac{\alpha}{r_0} P \Lambda Q$, ranks found in training.

P (out, r), the diagonal of Λ (r, 1) and Q (r, cols), called lora_B, lora_E and lora_A in PEFT's files, are trained;
a penalty keeps P and Q near orthogonal. While training, the i-th triplet of each layer has an importance: the sum, over
its entries of Λ, P and Q (means for the latter two), of sensitivity times uncertainty, which are moving averages of
$I = |w \nabla_w L|$ and of $|I - \bar I|$. A budget of triplets over all layers falls along a cubic schedule from
`init_r` to `target_r` for each layer; the values Λ of the least important triplets are set to zero. From step
`total_step - tfinal` on the choice stands, and files hold the chosen triplets only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..adapter import Factored, Inner, method
from ..config import LayeredConfig, PeftType
from ..sites import Site


@dataclass
class AdaLoraConfig(LayeredConfig):
    """Options of AdaLoRA; names and defaults are PEFT's."""

    peft_type: PeftType | str | None = PeftType.ADALORA
    r: int = 8
    """Kept for PEFT's files, and not read: the ranks are `init_r` and `target_r`."""
    init_r: int = 12
    """Rank of every layer at the start: 1.5 times the target, as in the paper."""
    target_r: int = 8
    """Rank that is left for a layer at the end, on average."""
    tinit: int = 0
    """Steps at the start with the whole budget."""
    tfinal: int = 0
    """Steps at the end in which the ranks stand."""
    deltaT: int = 1  # noqa: N815
    """Steps from one allocation of the budget to the next."""
    beta1: float = 0.85
    """Decay of the average sensitivity, in (0, 1)."""
    beta2: float = 0.85
    """Decay of the average uncertainty, in (0, 1)."""
    orth_reg_weight: float = 0.5
    """Weight of the penalty, which is the mean over P and Q of all layers of |P' P - 1|."""
    total_step: int | None = None
    """Optimizer steps of the whole training; needed, since the schedule is laid over them."""
    lora_alpha: float = 8
    """Numerator of the scale alpha / init_r; 0 stands for init_r."""
    lora_dropout: float = 0.0
    """Probability of dropping an entry of the branch's input in training."""
    fan_in_fan_out: bool = False
    """Kept for PEFT's files; the layer's class already tells how its weight is stored."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained along."""
    init_lora_weights: bool = True
    """True: Λ is zero, P and Q are normal with deviation 0.02; False: all are normal, for tests."""
    rank_pattern: dict[str, list[bool]] | None = None
    """`path.lora_E` -> which of the first triplets are left. Written when the choice is made, and read from files."""

    later: ClassVar[frozenset[str]] = frozenset(
        {
            "alora_invocation_tokens", "alpha_pattern", "arrow_config", "corda_config", "ensure_weight_tying",
            "eva_config", "kasa_config", "layer_replication", "loftq_config", "lora_bias", "lora_ga_config",
            "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
            "use_dora", "use_qalora", "use_rslora", "velora_config",
        }
    )  # fmt: skip
    ignored: ClassVar[frozenset[str]] = frozenset({"runtime_config", "megatron_core", "qalora_group_size"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r != 8:
            raise ValueError(f"r={self.r} is not read by AdaLoRA: set init_r, the rank at the start, and target_r")
        if not self.total_step or self.total_step <= 0:
            raise ValueError("AdaLoRA needs total_step, the number of optimizer steps of the training")
        if not 0 <= self.target_r <= self.init_r or not self.init_r:
            raise ValueError(f"target_r={self.target_r} is not between 0 and init_r={self.init_r}")
        if self.tinit >= self.last:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} to "
                "reduce the budget in"
            )
        if self.deltaT < 1:
            raise ValueError(f"deltaT={self.deltaT} is not a number of steps")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not between 0 and 1")
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight={self.orth_reg_weight} would reward what it should punish")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} is not a probability below 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias={self.bias!r} is unknown; expected 'none', 'all' or 'lora_only'")

    @property
    def last(self) -> int:
        """The step at which the last choice is made."""
        return (self.total_step or 0) - self.tfinal

    def allocates(self, step: int) -> bool:
        """Whether the budget is allocated after this step."""
        return step == self.last or (self.tinit < step < self.last and step % self.deltaT == 0)

    def budget(self, step: int, layers: int, first: int) -> int:
        """How many triplets of all layers are left after `step`; `first` are there at the start."""
        target = self.target_r * layers
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((first - target) * left**3 + target)

    def filed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        filed = dict(tensors)
        for key, pattern in (self.rank_pattern or {}).items():
            kept = torch.tensor(pattern)
            for name, axis in _RANK_AXIS.items():
                name = key.removesuffix("lora_E") + name
                if name in filed and filed[name].shape[axis] == len(kept):
                    chosen = kept.nonzero().flatten().to(filed[name].device)
                    filed[name] = filed[name].index_select(axis, chosen)
        return filed


_RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}


@method(AdaLoraConfig)
class AdaLora(Factored):
    views = ("lora_A", "lora_B", "lora_E", "ranknum", "scaling", "r", "lora_alpha")

    def __init__(self, config: AdaLoraConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        self.key, self.lora_alpha = f"{path}.lora_E", config.lora_alpha
        pattern = (config.rank_pattern or {}).get(self.key)
        rank = config.init_r if pattern is None else sum(pattern)
        self.ranknum = float(config.init_r)
        self.scaling = (config.lora_alpha or config.init_r) / (config.init_r + 1e-5)  # PEFT's, so that files agree
        self.dropout = config.lora_dropout
        self.lora_A = self.new(rank, site.cols)
        self.lora_E = self.new(rank, 1)
        self.lora_B = self.new(site.out, rank)
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}
        """Sensitivity and uncertainty of every entry, by parameter."""
        self.kept: Tensor | None = None
        """Which triplets are left (r,), once that is decided."""

    @property
    def r(self) -> int:
        """How many triplets it holds, zero ones included."""
        return len(self.lora_E)

    def reset(self) -> None:
        init = self.config.init_lora_weights
        for parameter in (self.lora_A, self.lora_B, self.lora_E):
            nn.init.normal_(parameter, std=0.02 if init else 1.0)
        if init:
            nn.init.zeros_(self.lora_E)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B, self.lora_A * self.lora_E

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        return super().forward(x, inner) if self.r else inner(x)  # convolutions have no kernel of rank 0

    def fit(self, key: str, tensor: Tensor) -> Tensor:
        """Files of a finished choice have fewer triplets: the others are zeros."""
        missing = self.r - tensor.shape[_RANK_AXIS[key]] if tensor.ndim == 2 else 0
        if missing <= 0:
            return tensor
        return nn.functional.pad(tensor, (0, missing) if _RANK_AXIS[key] else (0, 0, 0, missing))

    # ---------------------------------------------------------------- training

    @classmethod
    def penalty(cls, adapters: Mapping[str, Self]) -> Tensor | None:
        config: AdaLoraConfig = _config(adapters)
        if config.orth_reg_weight == 0:
            return None
        grams = [gram for a in adapters.values() for gram in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
        norms = [torch.linalg.norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return config.orth_reg_weight * torch.stack([n.to(norms[0]) for n in norms]).mean()

    @classmethod
    def after_step(cls, adapters: Mapping[str, Self], step: int) -> None:
        config: AdaLoraConfig = _config(adapters)
        if step < config.last:
            if not any(p.grad is not None for a in adapters.values() for p in a.parameters()):
                raise ValueError("AdaLoRA found no gradients: call after_step before they are cleared")
            for adapter in adapters.values():
                adapter.observe()
        if config.allocates(step):
            first = sum(adapter.r for adapter in adapters.values())
            allocate(adapters, config.budget(step, len(adapters), first))
        if step == config.last:
            config.rank_pattern = {a.key: a.pattern() for a in adapters.values()}
            for adapter in adapters.values():
                adapter.averages = {}
        elif step > config.last:
            if not config.rank_pattern:
                raise ValueError(_UNSEEN.format(config.last))
            for adapter in adapters.values():
                adapter.mask()

    @torch.no_grad()
    def observe(self) -> None:
        """Move the averages on by the gradients that are there."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name in _RANK_AXIS:
            parameter = getattr(self, name)
            mean, spread = self.averages.get(name, (torch.zeros_like(parameter), torch.zeros_like(parameter)))
            found = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            mean = torch.lerp(found, mean.to(found), beta1)
            self.averages[name] = mean, torch.lerp((found - mean).abs(), spread.to(found), beta2)

    def importance(self) -> Tensor:
        """Of every triplet, (r,)."""
        a, b, e = (mean * spread for mean, spread in (self.averages[name] for name in _RANK_AXIS))
        return e.flatten() + a.mean(1) + b.mean(0)

    @torch.no_grad()
    def mask(self) -> None:
        """Set the values of the triplets that are not kept to zero."""
        if self.kept is not None:
            self.lora_E[~self.kept.to(self.lora_E.device)] = 0

    def pattern(self) -> list[bool]:
        """What files say of the choice: that of an earlier training stays, and zeros do the rest."""
        old = (self.config.rank_pattern or {}).get(self.key)
        assert self.kept is not None
        return self.kept.tolist() if old is None or len(old) == self.r else old

    def training_state(self) -> dict[str, Tensor]:
        state = {name: getattr(self, name).detach() for name in _RANK_AXIS}  # files hold what is kept only
        for name, (mean, spread) in self.averages.items():
            state |= {f"{name}.sensitivity": mean, f"{name}.uncertainty": spread}
        return state if self.kept is None else state | {"kept": self.kept}

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Tensor]) -> None:
        for name in _RANK_AXIS:
            parameter = getattr(self, name)
            parameter.data = state[name].to(parameter, copy=True)
        self.averages = {
            name: (state[f"{name}.sensitivity"], state[f"{name}.uncertainty"])
            for name in _RANK_AXIS
            if f"{name}.sensitivity" in state
        }
        self.kept = state.get("kept")
        if self.kept is not None and not self.averages:
            self.config.rank_pattern = (self.config.rank_pattern or {}) | {self.key: self.pattern()}


_UNSEEN = (
    "AdaLoRA chooses its ranks after step {} by what it saw before, and it saw nothing: call after_step after every "
    "step, and load_training_state when a run is resumed"
)


def _config(adapters: Mapping[str, Any]) -> Any:
    return next(iter(adapters.values())).config


@torch.no_grad()
def allocate(adapters: Mapping[str, AdaLora], budget: int) -> None:
    """Leave the `budget` most important triplets of all layers."""
    if not all(adapter.averages for adapter in adapters.values()):
        raise ValueError(_UNSEEN.format(_config(adapters).last))
    scores = {path: adapter.importance() for path, adapter in adapters.items()}
    every = torch.cat([score.cpu() for score in scores.values()])
    dropped = len(every) - budget
    threshold = every.kthvalue(dropped).values.item() if dropped > 0 else -1.0
    for path, adapter in adapters.items():
        adapter.kept = scores[path] > threshold
        adapter.mask()
