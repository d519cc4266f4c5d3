"""Optimizers made for LoRA: LoRA+ with its own rates, and LoRA-FA, which trains B alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .handle import handle_of
from .sites import Embedding
from .tuners.lora import LoRA

EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")
"""Optimizers of bitsandbytes that are too coarse for embeddings."""


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **options: Any,
) -> Optimizer:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns faster than A, in any optimizer.

    Arguments:
        model: one with adapters; what it trains is optimised.
        lr: rate of A, and of whatever else has two or more axes.
        loraplus_lr_ratio: what `lr` is multiplied by for B, biases and magnitudes; the paper suggests 16 and a smaller
            `lr` than usual.
        loraplus_lr_embedding: rate of adapters of embeddings.
        loraplus_weight_decay: of all but biases and layer norms.
        options: passed on to `optimizer_cls`. Embeddings stay in 32 bits in the 8-bit optimizers of bitsandbytes.
    """
    loras = list(_loras(model))
    embeddings = {id(p) for lora in loras if isinstance(lora.site, Embedding) for p in lora.held_factors()}
    fast = {id(lora.held_factors()[0]) for lora in loras} | {
        id(bias) for lora in loras if (bias := getattr(getattr(lora, "lora_B", None), "bias", None)) is not None
    }
    undecayed = {
        id(p) for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm) for p in m._parameters.values()
    }
    groups: dict[str, list[Tensor]] = {"A": [], "embedding": [], "B": [], "B, no decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            group = "embedding"
        elif id(parameter) in fast or parameter.ndim == 1:
            group = "B, no decay" if id(parameter) in undecayed or "bias" in name else "B"
        else:
            group = "A"
        groups[group].append(parameter)
    rates = {"A": lr, "embedding": loraplus_lr_embedding, "B": lr * loraplus_lr_ratio}
    optimizer = optimizer_cls(
        [
            {
                "params": parameters,
                "lr": rates[group.partition(",")[0]],
                "weight_decay": 0.0 if "no decay" in group else loraplus_weight_decay,
            }
            for group, parameters in groups.items()
        ],
        lr=lr,  # type: ignore[call-arg]
        **options,
    )
    if optimizer_cls.__name__ in EIGHT_BIT:
        import bitsandbytes  # type: ignore[import-not-found]

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """A LoRA-FA optimizer for the adapters that `model` trains; their A is frozen here.

    Arguments:
        r, lora_alpha, use_rslora: needed by nothing, since every layer knows its scale. Where code written for PEFT
            gives them, they have to be those of the adapters.

    Raises:
        ValueError: they are not, or there is no LoRA to train.
    """
    handle = handle_of(model)
    given = {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
    for name in handle.state.active:
        for option, value in given.items():
            own = getattr(handle.configs[name], option, None)
            if value is not None and own is not None and own != value:
                raise ValueError(f"{option}={value}, but adapter {name!r} has {own}: leave it out, the adapter knows")
    pairs: dict[nn.Parameter, tuple[Tensor, float]] = {}
    for lora in _loras(model):
        b, a = lora.held_factors()
        if b.requires_grad:
            a.requires_grad_(False)
            pairs[b] = a, float(lora.scaling)
    if not pairs:
        raise ValueError("no active adapter of this model is a LoRA in training: LoRA-FA has nothing to optimise")
    trained = [p for p in model.parameters() if p.requires_grad]
    return LoraFAOptimizer(trained, pairs, lr=lr, weight_decay=weight_decay)


class LoraFAOptimizer(Optimizer):
    r"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A stays as it started, so that no x needs to be kept for it.

    The gradient of B is projected to the one that moves the weight most like full training would,
    $g_B \leftarrow s^{-2}\, g_B (A A^T)^{-1}$ with the scale s, and Adam takes the step. What is no B learns by AdamW.

    Arguments:
        pairs: for each B its frozen A and the scale of their product.
        lr, betas, eps, weight_decay: Adam's, the decay taken after the step.
        correct_bias: divide the moments by what they lack in the first steps.
    """

    def __init__(
        self,
        params: Any,
        pairs: dict[nn.Parameter, tuple[Tensor, float]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr={lr} and eps={eps} have to be 0 or more, and betas={betas} in [0, 1)")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        )
        self.pairs = pairs

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._adam(parameter, self._projected(parameter), group)
        return loss

    def _projected(self, parameter: nn.Parameter) -> Tensor:
        gradient: Any = parameter.grad
        if parameter not in self.pairs:
            return gradient
        a, scale = self.pairs[parameter]
        a = a.flatten(1).float()  # (r, cols)
        inverse = torch.linalg.pinv(a @ a.T + 1e-8 * torch.eye(len(a), device=a.device))
        projected = gradient.flatten(1).float() @ inverse / scale**2
        return projected.view_as(gradient).to(gradient.dtype)

    def _adam(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        (beta1, beta2), lr = group["betas"], group["lr"]
        state["step"] += 1
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = lr
        if group["correct_bias"]:
            size *= (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])


def _loras(model: nn.Module) -> Iterator[LoRA]:
    """The LoRAs of all adapters, those that give a DoRA its direction included."""
    for layer in handle_of(model).layers.values():
        for adapter in layer.adapters.values():
            lora = getattr(adapter, "direction", adapter)
            if isinstance(lora, LoRA):
                yield lora
