r"""LoRA of bare parameters (`target_parameters`): tensors that a module uses without calling a layer.

A stack of experts (E, out, in), or (E, in, out) where the module says `is_transposed`, gets factors of its own for
each expert, $W_e' = W_e + s B_e A_e$; a matrix (out, in) is a stack of one. In the file those of all experts lie in one
A (r E, in) and one B (out, r E).

The module is called with the changed tensors in the place of its own. Where it picks single experts, only those are
computed; PEFT builds the whole stack in every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Branch, Factor, Inner, Slot, kaiming_, wide
from ..config import PeftConfig
from ..sites import Site


class Stack(nn.Module):
    """The factors of one parameter."""

    def __init__(self, adapter: ParameterLoRA, name: str):
        super().__init__()
        config, module = adapter.config, adapter.site.module
        shape = module._parameters[name].shape
        self.experts = shape[0] if len(shape) == 3 else 1
        self.transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
        out, cols = shape[-2:] if not self.transposed else shape[:-3:-1]
        self.r, alpha = config.rank_and_alpha(f"{adapter.path}.{name}")
        self.scaling = alpha / (sqrt(self.r) if config.use_rslora else self.r)
        self.lora_A = Factor(adapter.new(self.r * self.experts, cols))
        self.lora_B = Factor(adapter.new(out, self.r * self.experts))

    def reset(self, init: bool | str) -> None:
        if init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        else:
            kaiming_(self.lora_A.weight)
        (torch.zero_ if init else kaiming_)(self.lora_B.weight)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Left (E, rows, r) and right (E, r, columns), whose products are laid out as the parameter is."""
        a, b = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        a = a.view(self.experts, self.r, -1)  # (E, r, in)
        b = b.view(len(b), self.r, self.experts).permute(2, 0, 1)  # (E, out, r)
        return (a.mT, b.mT) if self.transposed else (b, a)

    def changed(self, weight: Tensor, gain: float) -> Tensor:
        """The parameter with its change."""
        left, right = self.factors(weight.dtype)
        if weight.ndim == 2:
            return torch.addmm(weight, left[0], right[0], alpha=gain)
        return torch.baddbmm(weight, left, right, alpha=gain)


class Changed:
    """A changed stack that stands in for the tensor: single experts are computed when they are picked, and the whole
    when anything else is asked."""

    def __init__(self, weight: Any, stack: Stack, gain: float):
        self._weight, self._stack, self._gain = weight, stack, gain
        self._whole: Tensor | None = None

    def __getitem__(self, index: Any) -> Tensor:
        single = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if not single or self._whole is not None:
            return self.whole[index]
        weight = self._weight[index]
        left, right = self._stack.factors(weight.dtype)
        return torch.addmm(weight, left[index], right[index], alpha=self._gain)

    @property
    def whole(self) -> Tensor:
        if self._whole is None:
            weight = self._weight.whole if isinstance(self._weight, Changed) else self._weight
            self._whole = self._stack.changed(weight, self._gain)
        return self._whole

    @property
    def shape(self) -> torch.Size:
        return self._weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def __len__(self) -> int:
        return len(self._weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return value.whole if isinstance(value, Changed) else value

        args = [[plain(v) for v in a] if isinstance(a, (tuple, list)) else plain(a) for a in args]
        return function(*args, **{key: plain(value) for key, value in (kwargs or {}).items()})

    def __matmul__(self, other: Any) -> Tensor:
        return self.whole @ other

    def __rmatmul__(self, other: Any) -> Tensor:
        return other @ self.whole

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


class ParameterLoRA(Branch):
    """The adapter of one module, for all of its parameters that are targeted."""

    by_name = True

    def __init__(
        self,
        config: PeftConfig,
        site: Site,
        path: str,
        device: torch.device,
        dtype: torch.dtype,
        names: Sequence[str] = (),
    ):
        super().__init__(config, site, path, device, dtype)
        self.path = path
        for name in names:
            if site.module._parameters[name].ndim not in (2, 3):
                shape = tuple(site.module._parameters[name].shape)
                raise ValueError(f"{path}.{name} has shape {shape}: target_parameters are matrices or stacks of them")
        self.stacks = nn.ModuleDict({name: Stack(self, name) for name in names})

    def reset(self) -> None:
        with torch.no_grad():
            for stack in self._stacks().values():
                stack.reset(self.config.init_lora_weights)

    def _stacks(self) -> dict[str, Stack]:
        return dict(self.stacks.items())  # type: ignore[arg-type]

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        with self._in_place():
            return inner(x)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The module's attributes replaced: what is in an instance's dict comes before its parameters."""
        module = self.site.module
        held = vars(module)
        before = {name: held.get(name) for name in self.stacks}
        try:
            for name, stack in self._stacks().items():
                changed = Changed(getattr(module, name), stack, stack.scaling * self.strength)
                lazy = stack.experts > 1 and not torch.compiler.is_compiling()
                held[name] = changed if lazy else changed.whole
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    held.pop(name, None)
                else:
                    held[name] = value

    def fold_parameters(self, stored: dict[str, Any]) -> dict[str, Tensor]:
        return {
            name: stack.changed(wide(stored[name]), stack.scaling * self.strength)
            for name, stack in self._stacks().items()
        }

    def check_mergeable(self) -> None:
        """They always are."""

    def slots(self) -> Iterator[Slot]:
        """PEFT nests a wrapper for each parameter, the last one outermost."""
        for depth, stack in enumerate(reversed(self._stacks().values())):
            for key in ("lora_A", "lora_B"):
                yield f"{'base_layer.' * depth}{key}.weight", getattr(stack, key)._parameters, "weight"


def check_parameters(config: Any) -> None:
    """Raise for options that bare parameters cannot have."""
    if isinstance(config.target_parameters, str):
        raise TypeError("target_parameters is a list of parameter names, not a string")
    others = {
        "lora_dropout": config.lora_dropout,
        "lora_bias": config.lora_bias,
        "use_dora": config.use_dora,
        "alora_invocation_tokens": config.alora_invocation_tokens,
        "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian"),
    }
    for name, given in others.items():
        if given:
            raise ValueError(f"target_parameters does not go with {name}={getattr(config, name)!r}")
