"""Language models and their tokenizers, from a directory, the hub or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.runs.settings import ConfigError


def load_base(
    model: str, revision: str | None = None, *, dtype: Any, quantization: str = "none", device: Any = "cpu"
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer. A GGUF file's weights are unpacked to plain tensors.

    Arguments:
        model: a directory, a hub id, a .gguf file, or a directory that holds one and no config.json.
        dtype: of the weights, or of what they are computed in where they are quantized: to "4bit" or "8bit".
        device: where the model goes.

    Raises:
        ConfigError: it is none of these, or cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, found = _locate(model)
    if quantization != "none" and "gguf_file" in found:
        raise ConfigError(
            f"quantization={quantization} needs a directory or hub id; a GGUF file's weights are unpacked. Save the "
            "unpacked model once with its save_pretrained, and give that directory"
        )
    found |= {} if revision is None else {"revision": revision}
    options = {} if quantization == "none" else _quantized(quantization, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **found)
        language_model = AutoModelForCausalLM.from_pretrained(
            where, **found, dtype=dtype, device_map={"": device}, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model={model} cannot be loaded: {error}") from error
    quantizer = getattr(language_model, "hf_quantizer", None)
    if "gguf_file" in found and quantizer is not None:
        quantizer.remove_quantization_config(language_model)  # the weights are plain now, and can be saved as such
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model={model}: its tokenizer has no end token, so the model could not learn where to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return language_model, tokenizer


def _quantized(quantization: str, dtype: Any) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": four}


def _locate(model: str) -> tuple[str, dict[str, str]]:
    """What transformers calls the place, and the file in it where there is one."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model={model} is not a file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "no .gguf file either"
            raise ConfigError(f"model={model} has no config.json: it must hold one .gguf file, and has {names}")
        return str(path), {"gguf_file": files[0].name}
    return model, {}
