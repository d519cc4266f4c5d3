"""Sites: a layer seen as ``y = op(x; W, b)``, with ``W`` always a matrix of shape (out, cols).

One class per *layer kind*, none per method. ``cols`` is input features times kernel size, so a convolution, an
embedding and GPT-2's transposed linear all look like one matrix to the methods. Sites are looked up by the qualified
class name over the MRO, so that a kind of an optional library needs no import of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import execution_device, fetch, offloading, put

_SITES: dict[str, type[Site]] = {}
_FOUND: dict[type[nn.Module], type[Site] | None] = {}
_REFUSED = {
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": "nn.MultiheadAttention reads this layer's weight "
    "without calling it, so an adapter here would never run",
    **dict.fromkeys(
        ("bitsandbytes.nn.modules.Embedding4bit", "bitsandbytes.nn.modules.Embedding8bit"),
        "bitsandbytes' quantized embeddings can be run, but neither trained nor saved",
    ),
    "bitsandbytes.nn.modules.OutlierAwareLinear": "it quantizes its weight while it runs",
}


def register(*class_names: str) -> Callable[[type[Site]], type[Site]]:
    """Class decorator: this site describes modules of these qualified class names (and of their subclasses)."""

    def add(cls: type[Site]) -> type[Site]:
        _SITES.update(dict.fromkeys(class_names, cls))
        _FOUND.clear()
        return cls

    return add


def find(module_type: type[nn.Module]) -> type[Site] | None:
    """The site class for a module class, or None if its kind is not adaptable."""
    if module_type not in _FOUND:
        names = [f"{cls.__module__}.{cls.__qualname__}" for cls in module_type.__mro__]
        first = next((n for n in names if n in _SITES or n in _REFUSED), "")
        is_norm = "Norm" in module_type.__name__ and not first  # each model of transformers has classes of its own
        _FOUND[module_type] = AnyNorm if is_norm else _SITES.get(first)
    return _FOUND[module_type]


def why_not(module: nn.Module) -> str:
    """One sentence on why `module` cannot be adapted."""
    for cls in type(module).__mro__:
        if reason := _REFUSED.get(f"{cls.__module__}.{cls.__qualname__}"):
            return reason
    return f"supported kinds are {sorted({s.__name__ for s in _SITES.values() if not s.elementwise})}"


class Site:
    """Any module: it can be called and copied, but its weight cannot be read. Base class of the real sites."""

    pointwise = False
    """Whether ``y[..., j] = sum_i W[j, i] x[..., i]``: then a map of W's columns is a map of x."""
    elementwise = False
    """Whether the weight is one number for each feature, as a norm's: cols is 1 then, and few methods apply."""
    channel = -1
    """Axis of the output features in y."""
    groups = 1
    """Output features of different groups see different inputs."""
    kernel: tuple[int, ...] = ()
    """Kernel size of a convolution."""
    all_linear = False
    """Whether `target_modules="all-linear"` means this kind."""
    coarse = False
    """Whether the stored weight has so few bits that folding something in rounds it anew, measurably."""
    out = cols = 0

    def __init__(self, module: nn.Module):
        self.module: Any = module

    def stored(self) -> Mapping[str, Any]:
        """The module's own parameters, each complete in itself: not to be written to."""
        hook = self._offloading
        return self.module._parameters if hook is None else fetch(self.module, hook)

    def store(self, name: str, parameter: nn.Parameter | None) -> None:
        """Have the module run with `parameter`, whose statistics are its own."""
        hook = self._offloading
        if hook is None:
            self.module._parameters[name] = parameter
        else:
            put(self.module, hook, name, parameter)

    @property
    def _offloading(self) -> Any:
        """The hook that brings the weights when the module runs, if they are elsewhere until then."""
        return offloading(self.module) if "_hf_hook" in self.module.__dict__ else None

    def pack(self, matrix: Tensor, like: nn.Parameter) -> nn.Parameter:
        """W (out, cols) as a parameter of the kind and dtype of `like`."""
        return nn.Parameter(self.from_matrix(matrix.to(like.dtype)), requires_grad=like.requires_grad)

    def read(self) -> tuple[Tensor, Tensor | None]:
        """W (out, cols) and b (out,) or None: views of the stored tensors where possible, not to be written to."""
        stored = self.stored()
        weight: Any = stored.get("weight")
        if weight is None:  # computed, by a parametrization for example
            weight = getattr(self.module, "weight", None)
        return self.to_matrix(weight), stored.get("bias")

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Stored weight -> (out, cols)."""
        raise self._unreadable()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """(out, cols) -> the stored layout, contiguous as safetensors wants it."""
        raise self._unreadable()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's operation with another weight (out, cols)."""
        raise self._unreadable()

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        """First half of a factored weight ``W = B A``: x times A (r, cols)."""
        raise self._unreadable()

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        """Second half: h, which `reduce` made, times B (out, r)."""
        raise self._unreadable()

    def accumulate(self, y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
        """y + scale * expand(h, b), in as few kernels as can be."""
        return torch.add(y, self.expand(h, b), alpha=scale)

    def along_output(self, vector: Tensor) -> Tensor:
        """A vector (out,) shaped to broadcast over y."""
        return vector

    def _unreadable(self) -> TypeError:
        return TypeError(f"{type(self.module).__name__} has no weight that can be read: {why_not(self.module)}")

    @property
    def kernel_ones(self) -> tuple[int, ...]:
        """The shape of a 1x1 kernel: what an (out,) or (out, r) tensor needs to become one."""
        return (1,) * len(self.kernel)

    @property
    def channels(self) -> int:
        """Input features that one output feature sees."""
        return self.cols // prod(self.kernel)

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the weight."""
        weight = self.module._parameters.get("weight")
        if weight is None:
            weight = next(self.module.parameters())
        hook = self._offloading
        return weight.device if hook is None else execution_device(hook), weight.dtype

    @property
    def device(self) -> torch.device:
        return self.place[0]


@register("torch.nn.modules.linear.Linear")
class Linear(Site):
    """``y = x W^T + b`` over the last axis."""

    pointwise = True
    all_linear = True

    def __init__(self, module: Any):
        super().__init__(module)
        self.out, self.cols = self.to_matrix(module.weight).shape

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.contiguous()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b)

    def accumulate(self, y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
        if y.ndim == 1:
            return super().accumulate(y, h, b, scale)
        rows = torch.addmm(y.reshape(-1, self.out), h.reshape(-1, b.shape[1]), b.T, alpha=scale)
        return rows.view(y.shape)


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinear(Linear):
    """GPT-2's linear layer, which stores its weight as (in, out)."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()


@register("torch.nn.modules.sparse.Embedding")
class Embedding(TransposedLinear):
    """A look-up is a product with one-hot rows: out = embedding_dim, cols = num_embeddings."""

    pointwise = False
    all_linear = False

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._scaled(F.embedding(x, weight.T, self.module.padding_idx))

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        return self._scaled(F.embedding(x, a.T, self.module.padding_idx))  # padding gets no gradient here either

    def _scaled(self, y: Tensor) -> Tensor:
        # Some transformers models (Bart, Gemma) multiply what they look up.
        scale = getattr(self.module, "embed_scale", None)
        return y if scale is None else y * scale


@register(*(f"torch.nn.modules.conv.Conv{d}d" for d in (1, 2, 3)))
class Conv(Linear):
    """Convolutions of one to three dimensions: cols = in_channels / groups * prod(kernel)."""

    pointwise = False
    all_linear = False
    channel = 1

    def __init__(self, module: Any):
        super().__init__(module)
        self.groups: int = module.groups
        self.kernel = tuple(module.kernel_size)
        self.op = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return self.to_kernel(matrix).contiguous()

    def to_kernel(self, matrix: Tensor) -> Tensor:
        """(rows, channels * prod(kernel)) -> (rows, channels, *kernel)."""
        return matrix.reshape(matrix.shape[0], -1, *self.kernel)

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """The module's stride, padding, padding mode and dilation with another kernel."""
        m, padding = self.module, self.module.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0
        return self.op(x, kernel, bias, m.stride, padding, m.dilation, groups)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.convolve(x, self.to_kernel(weight), bias, self.groups)

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        # Every group applies the same (r, cols) kernel to its own channels, so B A stays a grouped weight.
        return self.convolve(x, self.to_kernel(a.repeat(self.groups, 1) if self.groups > 1 else a), None, self.groups)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        return self.op(h, b.reshape(*b.shape, *self.kernel_ones), groups=self.groups)

    def accumulate(self, y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
        return Site.accumulate(self, y, h, b, scale)

    def along_output(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *self.kernel_ones)


@register("torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.normalization.RMSNorm")
class Norm(Site):
    """``y = w * normalised(x) + b`` by features: W is (features, 1)."""

    elementwise = True

    def __init__(self, module: Any):
        super().__init__(module)
        if module.weight is None:
            raise ValueError(f"a {type(module).__name__} without weights has nothing to adapt")
        self.out, self.cols = module.weight.numel(), 1

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.module.weight.shape)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        m, weight = self.module, self.from_matrix(weight)
        if isinstance(m, nn.LayerNorm):
            return F.layer_norm(x, m.normalized_shape, weight, bias, m.eps)
        y = F.rms_norm(x, m.normalized_shape, weight, m.eps)
        return y if bias is None else y + bias


@register("torch.nn.modules.normalization.GroupNorm")
class GroupNorm(Norm):
    """The features are channels, the second axis."""

    channel = 1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.group_norm(x, self.module.num_groups, weight.flatten(), bias, self.module.eps)


class AnyNorm(Norm):
    """A norm of some library, called with other weights rather than known by its formula."""

    def __init__(self, module: Any):
        if not isinstance(module._parameters.get("weight"), Tensor) or module.weight.ndim != 1:
            raise ValueError(f"a {type(module).__name__} has no weight for each feature, so it cannot be adapted")
        super().__init__(module)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        tensors = {"weight": self.from_matrix(weight)} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(self.module, tensors, (x,))
