"""Answer with an adapter on a base model that does not fit: the layers beyond `--fit` wait on disk.

python generate.py --base HuggingFaceTB/SmolLM2-135M-Instruct --adapter pirate --fit 300MB "What colour is a frog?"
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from typing import Any

import torch
import veneer
from accelerate import disk_offload, dispatch_model, infer_auto_device_map
from transformers import AutoModelForCausalLM, AutoTokenizer


def spread(model: Any, fit: str, folder: str) -> dict[str, Any]:
    """Put the model's blocks in memory until `fit` is full, and the rest on disk."""
    whole = model._no_split_modules
    places = infer_auto_device_map(model, max_memory={"cpu": fit}, no_split_module_classes=list(whole or ()))
    if set(places.values()) == {"disk"}:
        disk_offload(model, folder, execution_device="cpu")
    elif "disk" in places.values():
        dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="directory or hub id of the base model")
    parser.add_argument("--adapter", required=True, help="directory or hub id of an adapter of it")
    parser.add_argument("--fit", default="300MB", help="how much of the base stays in memory")
    parser.add_argument("prompt")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base).eval()
    with tempfile.TemporaryDirectory() as folder:
        places = spread(base, options.fit, folder)
        on_disk = [name for name, place in places.items() if place == "disk"]
        print(f"{len(on_disk)} of {len(places)} blocks are on disk: {', '.join(on_disk[:3])} ...")
        model = veneer.PeftModel.from_pretrained(base, options.adapter)
        tokens = tokenizer(options.prompt, return_tensors="pt")
        for name, context in (("base", model.disable_adapter), ("adapter", nullcontext)):
            with context(), torch.no_grad():
                out = model.generate(**tokens, max_new_tokens=16, do_sample=False)
            print(f"{name}: {tokenizer.decode(out[0, tokens['input_ids'].shape[1] :], skip_special_tokens=True)!r}")
        model.merge_adapter()
        with torch.no_grad():
            merged = model.generate(**tokens, max_new_tokens=16, do_sample=False)
        print(f"merged, layer by layer: {'the same' if torch.equal(merged, out) else 'other'} answer")


if __name__ == "__main__":
    main()
