"""Quantized bases before training: making them, and readying them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from .quantized import quantized_sites
from .targets import matcher, walk

Model = TypeVar("Model", bound=nn.Module)

HALF = (torch.float16, torch.bfloat16)
UNTOUCHED = {"gptq", "aqlm", "eetq", "hqq", "torchao"}
"""Quantizations whose half-precision tensors belong to packed weights."""


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Model:
    """Ready a quantized model for training adapters on it: call it before `get_peft_model`.

    Everything is frozen; norms, embeddings and the head go from half precision to float32, which keeps losses stable;
    4-bit layers stay in the format that has right gradients (see `quantized`).

    Arguments:
        use_gradient_checkpointing: compute activations again in the backward pass instead of keeping them, where the
            model is quantized: much less memory for about a third more time.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint`. With {"use_reentrant": False} the inputs need no
            gradient; otherwise the embeddings' output gets one, or nothing would be trained.
        auto_clear_cache: give memory that the casts freed back to the accelerator.

    Raises:
        ValueError: checkpointing is asked for, and the model has none.
    """
    method = getattr(model, "quantization_method", None)
    quantized = quantized_sites(model.modules())
    packed = {id(site.module.weight) for site in quantized}
    model.requires_grad_(False)
    if method not in UNTOUCHED:
        for parameter in model.parameters():
            if parameter.dtype in HALF and id(parameter) not in packed:
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if use_gradient_checkpointing and (quantized or method):
        _checkpoint(model, gradient_checkpointing_kwargs or {})
    return model


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers 5 renames it
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is None:
        raise ValueError(
            f"{type(model).__name__} has no gradient_checkpointing_enable, which transformers' models have: pass "
            "use_gradient_checkpointing=False"
        )
    if options.get("use_reentrant", True):
        model.enable_input_require_grads()
    enable(options or None)


def quantize_model(
    model: Model,
    bits: Literal[4, 8] = 4,
    *,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = True,
    threshold: float = 6.0,
    skip_modules: Iterable[str] | None = None,
) -> Model:
    """Quantize the linear layers of a loaded model in place, with bitsandbytes.

    For models that transformers cannot quantize while it loads them (GGUF files) or does not know; it does the same
    itself with a `BitsAndBytesConfig`.

    Arguments:
        bits: 4 for QLoRA's blocks, 8 for LLM.int8().
        quant_type: of 4 bits: nf4 for weights that are normally distributed, as nearly all are, or fp4.
        double_quant: of 4 bits: quantize the blocks' scales too, which saves 0.37 bits a weight.
        threshold: of 8 bits: features of x beyond it are computed in full precision; 0 for none.
        skip_modules: dotted suffixes of layers that stay as they are; not given, the output head.

    Raises:
        ValueError: there is no layer to quantize.
    """
    import bitsandbytes

    head = getattr(model, "get_output_embeddings", lambda: None)()
    skipped = matcher(skip_modules or ())
    chosen = [
        place
        for path, place in walk(model).items()
        if type(place.module) is nn.Linear and not (skipped(path) if skip_modules is not None else place.module is head)
    ]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    for place in chosen:
        linear: Any = place.module
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        with torch.device("meta"):
            if bits == 4:
                layer: Any = bitsandbytes.nn.Linear4bit(*size, compress_statistics=double_quant, quant_type=quant_type)
            else:
                layer = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=threshold)
        device, options = linear.weight.device, {**vars(layer.weight)}
        options = {k: v for k, v in options.items() if k not in ("data", "CB", "SCB")}
        layer.weight = type(layer.weight)(linear.weight.data.cpu(), requires_grad=False, **options).to(device)
        layer.bias = linear.bias
        for parent, name in place.holders:
            setattr(parent, name, layer.train(linear.training))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model
