"""Layers whose weights are stored in 4 or 8 bits by bitsandbytes.

They run by their own kernels; what reads W sees the dequantised matrix, in float32. A merge dequantises, folds and
quantises again, which rounds: `Rounding` says how much. What was stored before waits unchanged, so that unmerging
restores it bit for bit. The library is looked up only where one of its layers is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .errors import PeftWarning
from .sites import Linear, find, register


class Rounding(NamedTuple):
    """What quantising a merged weight again cost, as Frobenius norms."""

    weight: float
    """Error relative to the merged weight as it should be."""
    change: float
    """Error relative to what merging should change; above 1, more is lost than the adapters add."""

    @classmethod
    def of(cls, before: Tensor, after: Tensor, wanted: Tensor) -> Rounding:
        """Of a weight `before` the merge that should become `wanted` and became `after`."""
        error = (after - wanted).norm()
        return cls(*((error / scale.norm().clamp(min=1e-30)).item() for scale in (wanted, wanted - before)))


def warn_of_rounding(found: Mapping[str, Rounding | None]) -> dict[str, Rounding]:
    """The roundings that happened, by path, with one warning that states the worst."""
    roundings = {path: rounding for path, rounding in found.items() if rounding and rounding.weight}
    if roundings:
        path, worst = max(roundings.items(), key=lambda item: item[1].change)
        warnings.warn(
            f"merging rounded the weights of {len(roundings)} quantized layers anew: at worst, in {path}, the error is "
            f"{worst.weight:.2%} of the weight and {worst.change:.2f} times what the adapters change in it. To merge "
            "without it, dequantize the model first (`model.dequantize()` in transformers)",
            PeftWarning,
            stacklevel=4,
        )
    return roundings


class Quantized(Linear):
    """A linear layer that holds its weight packed, with statistics beside it."""

    coarse = True

    def __init__(self, module: Any):
        self.module = module
        self.out, self.cols = module.out_features, module.in_features
        self.settle()

    def settle(self) -> None:
        """Keep the module in a form that can be trained."""

    @property
    def packed(self) -> bool:
        """Whether the weight is quantized already; bitsandbytes does so when a layer moves to its device."""
        raise NotImplementedError

    def pack(self, matrix: Tensor, like: nn.Parameter) -> nn.Parameter:
        unchanged = torch.equal(matrix, self.to_matrix(like).to(matrix.dtype))
        return like if unchanged else self.quantize(matrix, like)

    def quantize(self, matrix: Tensor, like: Any) -> nn.Parameter:
        """`pack`, for a matrix that is not the one in `like`."""
        raise NotImplementedError


@register("bitsandbytes.nn.modules.Linear4bit")
class Linear4bit(Quantized):
    """QLoRA's layer (Dettmers et al. 2023, arXiv:2305.14314): nf4 or fp4, in blocks that share a scale."""

    @property
    def packed(self) -> bool:
        return self._state(self.module.weight) is not None

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        weight = self.module.weight
        return weight.device, (self._state(weight) or weight).dtype

    def settle(self) -> None:
        # On processors with AVX512-BF16 an evaluation repacks the weight in place. The repacked layer gives no
        # gradient in its forward pass and a wrong one in its backward pass, and what it saves is damaged.
        self.module.support_avx512bf16_for_cpu = False
        weight, state = self.module.weight, self._state(self.module.weight)
        if getattr(state, "packing_format_for_cpu", False):
            unpack(weight, state)
            warnings.warn(
                "bitsandbytes repacked 4-bit weights at an evaluation on this CPU, which rounded their scales to "
                "bfloat16; they are back in the format that can be trained. Attach adapters, or call "
                "prepare_model_for_kbit_training, before the first evaluation to keep the scales as they were",
                PeftWarning,
                stacklevel=6,
            )
        if state is not None and weight.device.type == "cpu" and self.cols % state.blocksize:
            warnings.warn(
                f"bitsandbytes misreads 4-bit weights on a CPU if their {self.cols} input features are no multiple of "
                f"the {state.blocksize} of a block: the layer computes with other weights than on a GPU",
                PeftWarning,
                stacklevel=6,
            )

    def store(self, name: str, parameter: nn.Parameter | None) -> None:
        super().store(name, parameter)
        if name == "weight":
            self.module.quant_state = getattr(parameter, "quant_state", None)

    def _state(self, weight: Any) -> Any:
        state = getattr(weight, "quant_state", None)
        return self.module.quant_state if state is None and weight is self.module.weight else state

    def to_matrix(self, weight: Tensor) -> Tensor:
        state = self._state(weight)
        return weight if state is None else dequantize_4bit(weight.data, state)

    def quantize(self, matrix: Tensor, like: Any) -> nn.Parameter:
        library, state = _bitsandbytes(), self._state(like)
        options = {k: getattr(like, k) for k in ("blocksize", "quant_type", "quant_storage")}
        rest = options | {"module": like.module}
        if state is None:
            matrix = matrix.to(like.dtype)
            return library.nn.Params4bit(matrix, compress_statistics=like.compress_statistics, **rest)
        data, new = library.functional.quantize_4bit(matrix.contiguous(), compress_statistics=state.nested, **options)
        new.dtype = state.dtype
        return library.nn.Params4bit(
            data, quant_state=new, bnb_quantized=True, compress_statistics=state.nested, **rest
        )


def dequantize_4bit(data: Tensor, state: Any) -> Tensor:
    """The float32 matrix of a packed one. The state's dtype, often half precision, would round it."""
    _refuse_offloaded(data)
    ops, absmax = torch.ops.bitsandbytes, state.absmax
    if state.nested:
        second = state.state2
        absmax = ops.dequantize_blockwise(absmax, second.absmax, second.code, second.blocksize, torch.float32)
        absmax = absmax + state.offset
    return ops.dequantize_4bit(data, absmax.float(), state.blocksize, state.quant_type, state.shape, torch.float32)


def _refuse_offloaded(data: Tensor) -> None:
    if data.is_meta:
        raise NotImplementedError(
            "a quantized weight that is offloaded to memory or disk cannot be read or merged: keep these layers on a "
            "device (device_map), or use adapters that leave the weight alone, such as LoRA"
        )


def unpack(weight: Any, state: Any) -> None:
    """Undo bitsandbytes' repacking for CPUs, in place: tiles of 32 rows, and transposed bfloat16 scales."""
    rows, columns = state.shape
    tiles = weight.data.reshape(-1, 32)  # low nibbles are 16 rows x 2 columns, high nibbles the next 16 rows
    nibbles = torch.cat([tiles & 0xF, tiles >> 4], dim=1).view(rows // 32, columns // 2, 32, 2)
    nibbles = nibbles.transpose(1, 2).reshape(-1, 2)
    data = ((nibbles[:, 0] << 4) | nibbles[:, 1]).reshape(state.original_qshape)
    weight.data = data.view(getattr(state, "original_storage_type", torch.uint8))
    state.absmax = state.absmax.T.reshape(-1).float()
    state.dtype, state.state2, state.offset, state.nested = state.original_dtype, None, None, False
    state.packing_format_for_cpu = False


@register("bitsandbytes.nn.modules.Linear8bitLt")
class Linear8bit(Quantized):
    """LLM.int8()'s layer (Dettmers et al. 2022, arXiv:2208.07339): rows of int8 with a scale each.

    It quantises x too while it runs (on a CPU in evaluation only), so its output is only near W x.
    """

    @property
    def packed(self) -> bool:
        return self.module.weight.dtype == torch.int8

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        weight = self.module.weight
        return weight.device, torch.float32 if self.packed else weight.dtype

    def stored(self) -> Mapping[str, Any]:
        weight, state = self.module.weight, self.module.state
        if self.packed and weight.SCB is None:  # the first call has moved the scales to the state: move them back
            weight.CB, weight.SCB = weight.data, state.SCB
            state.reset_grads()
        return super().stored()

    def read(self) -> tuple[Tensor, Tensor | None]:
        return self.to_matrix(self.module.weight), self.module.bias

    def store(self, name: str, parameter: nn.Parameter | None) -> None:
        super().store(name, parameter)
        if name == "weight":
            self.module.state.reset_grads()

    def to_matrix(self, weight: Any) -> Tensor:
        if weight.dtype != torch.int8:
            return weight
        _refuse_offloaded(weight)
        scale = self.module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data * (scale.to(weight.device).float() / 127)[:, None]

    def quantize(self, matrix: Tensor, like: Any) -> nn.Parameter:
        make = _bitsandbytes().nn.Int8Params
        if like.dtype != torch.int8:
            data = matrix.to(like.dtype).contiguous()
            return make(data, requires_grad=like.requires_grad, has_fp16_weights=like.has_fp16_weights)
        scale = matrix.abs().amax(1)
        data = (matrix * (127 / scale.clamp(min=1e-30))[:, None]).round().to(torch.int8)
        return make(data, requires_grad=False, CB=data, SCB=scale)


def quantized_sites(modules: Iterable[nn.Module]) -> list[Quantized]:
    """The quantized layers among `modules`, settled by being looked at."""
    found = ((find(type(module)), module) for module in modules)
    return [site_class(m) for site_class, m in found if site_class and issubclass(site_class, Quantized)]


def _bitsandbytes() -> Any:
    """The library, which whoever made one of its layers has imported."""
    return import_module("bitsandbytes")


def moved(parameter: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A copy of a stored parameter on another device (and in another dtype), its statistics along with it."""
    if not hasattr(parameter, "quant_state"):
        if hasattr(parameter, "SCB"):
            return cast(nn.Parameter, parameter.to(device))
        return nn.Parameter(parameter.detach().to(device, dtype, copy=True), requires_grad=False)
    clone: Any = copy.copy(parameter)
    clone.quant_state = copy.deepcopy(clone.quant_state)  # bitsandbytes moves it in place
    return clone.to(device)


def plain(module: nn.Module) -> nn.Module:
    """`module` with ordinary linear layers in place of quantized ones, which cannot be trained."""
    for site in quantized_sites([module]):
        weight, bias = site.read()
        dtype = site.place[1]
        linear = nn.Linear(site.cols, site.out, bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(weight.detach().to(dtype, copy=True))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
        return linear.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, plain(child))
    return module
