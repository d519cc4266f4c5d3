"""What the structure costs, side by side with `peft` in one process: import, attach, load, switch, blend, merge.

    python benchmarks/structure.py [--layers 1000] [--rounds 5] [--only attach,load] [--json out.json]

Both libraries get the same models, weights and ranks, take turns, and the median of the rounds counts. The blends run
on the attention and feed-forward layers of a UNet with Stable Diffusion 1.5's shapes, three adapters of rank 16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
import veneer
from torch import nn

TARGETS = r"layers\.\d+"
GOALS = {"import": 10, "attach": 8, "load": 10, "switch": 50, "svd": 300, "merge fp32 4096": 4, "merge bf16 4096": 4}

Timing = tuple[float, float]
"""Seconds of peft and of veneer."""


class Stack(nn.Module):
    """Many linear layers: what matters when the work per layer is small."""

    def __init__(self, layers: int, width: int = 64, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(layers))


def sd15_like() -> nn.Module:
    """The attention and feed-forward layers of SD 1.5's UNet (160 linears), by shape."""
    shapes: list[tuple[int, int]] = []
    for width, blocks in ((320, 5), (640, 5), (1280, 6)):
        block = [(width, width)] * 4 + [(width, width), (768, width), (768, width), (width, width)]
        shapes += [*block, (width, 8 * width), (4 * width, width)] * blocks
    model = Stack(0)
    model.layers = nn.ModuleList(nn.Linear(i, o) for i, o in shapes)
    return model


def seconds(work: Callable[[], object]) -> float:
    """Those that the one thread worked: a machine that others use too delays it now and then."""
    start = time.process_time()
    work()
    return time.process_time() - start


def fresh_import(statement: str) -> float:
    """Seconds of `statement` in a new interpreter that has imported torch."""
    code = f"import torch, time; t = time.perf_counter()\n{statement}\nprint(time.perf_counter() - t)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def bench_import(args: argparse.Namespace) -> dict[str, Timing]:
    names = "LoraConfig, PeftModel, get_peft_model"
    return {"import": (fresh_import(f"from peft import {names}"), fresh_import(f"from veneer import {names}"))}


def bench_attach(args: argparse.Namespace) -> dict[str, Timing]:
    def attach(lib):
        model = Stack(args.layers)
        return seconds(lambda: lib.get_peft_model(model, lib.LoraConfig(r=8, target_modules=TARGETS)))

    return {"attach": (attach(peft), attach(veneer))}


def bench_load(args: argparse.Namespace) -> dict[str, Timing]:
    with tempfile.TemporaryDirectory() as directory:
        config = peft.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
        peft.get_peft_model(Stack(args.layers), config).save_pretrained(directory)

        def load(lib, **options):
            model = Stack(args.layers)
            first = seconds(lambda: lib.PeftModel.from_pretrained(model, directory, **options))
            model = lib.PeftModel.from_pretrained(Stack(args.layers), directory, **options)
            for i in range(2):
                model.load_adapter(directory, f"extra{i}", **options)
            return first, seconds(lambda: model.load_adapter(directory, "fourth", **options))

        theirs, ours = load(peft), load(veneer)
        return {"load": (theirs[0], ours[0]), "load, 4th": (theirs[1], ours[1])}


def bench_switch(args: argparse.Namespace) -> dict[str, Timing]:
    def prepare(lib, frozen):
        configs = [lib.LoraConfig(r=8, target_modules=TARGETS, inference_mode=frozen) for _ in range(2)]
        model = lib.get_peft_model(Stack(args.layers), configs[0], "a")
        model.add_adapter("b", configs[1])
        return model

    def switch(model):
        return seconds(lambda: (model.set_adapter("b"), model.set_adapter("a"))) / 2

    def delete(model):
        return seconds(lambda: model.delete_adapter("b"))

    frozen, models = [[prepare(lib, flag) for lib in (peft, veneer)] for flag in (True, False)]
    return {  # type: ignore[return-value]
        "switch": tuple(statistics.median(switch(m) for _ in range(5)) for m in frozen),
        "switch, trainable": tuple(statistics.median(switch(m) for _ in range(5)) for m in models),
        "delete": tuple(delete(m) for m in models),
    }


def bench_blend(args: argparse.Namespace) -> dict[str, Timing]:
    names, weights = ["a", "b", "c"], [0.7, 0.5, 0.3]

    def prepare(lib):
        torch.manual_seed(0)
        configs = [lib.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False) for _ in names]
        model = lib.get_peft_model(sd15_like(), configs[0], "a")
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        return model

    theirs, ours = prepare(peft), prepare(veneer)
    options = {"svd": {}, "linear": {}, "cat": {}, "ties": {"density": 0.5}}
    if args.slow:
        options["svd, reduced"] = {"svd_full_matrices": False}
    results = {}
    for kind, option in options.items():
        if kind.startswith("svd") and not args.slow:
            continue
        name = kind.split(",")[0]

        def blend(model, name=name, option=option):
            spent = seconds(lambda: model.add_weighted_adapter(names, weights, "new", combination_type=name, **option))
            model.delete_adapter("new")
            return spent

        # peft's dense svd takes minutes, so it runs once; a run of ours is over before the caches are warm
        results[kind] = (blend(theirs), statistics.median(blend(ours) for _ in range(3)))
    return results


def bench_merge(args: argparse.Namespace) -> dict[str, Timing]:
    results = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for width, layers in ((4096, 6), (2048, 24)):

            def prepare(lib, dtype=dtype, width=width, layers=layers):
                config = lib.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False)
                return lib.get_peft_model(Stack(layers, width, dtype), config)

            theirs, ours = prepare(peft), prepare(veneer)
            merged, size = seconds(theirs.merge_adapter), f"{label} {width}"
            results[f"merge {size}, kept"] = (merged, seconds(ours.merge_adapter))
            results[f"unmerge {size}"] = (seconds(theirs.unmerge_adapter), seconds(ours.unmerge_adapter))
            # peft keeps no original, so this is like for like
            results[f"merge {size}"] = (merged, seconds(lambda m=ours: m.merge_adapter(keep_original="none")))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="import,attach,load,switch,blend,merge")
    parser.add_argument("--slow", action="store_true", help="peft's svd blend too (minutes; one round)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds: dict[str, list[Timing]] = {}
    for name in args.only.split(","):
        for _ in range(1 if args.slow and name == "blend" else args.rounds):
            for label, timing in globals()[f"bench_{name}"](args).items():
                rounds.setdefault(label, []).append(timing)
    table = {}
    print(
        f"peft {peft.__version__}, torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread"
    )
    print(f"{'':22s}{'peft ms':>10s}{'veneer ms':>11s}{'ratio':>8s}   goal")
    for label, timings in rounds.items():
        theirs, ours = (statistics.median(t[i] for t in timings) for i in (0, 1))
        ratio = statistics.median(t[0] / t[1] for t in timings)
        table[label] = {"peft_s": theirs, "veneer_s": ours, "ratio": ratio}
        print(f"{label:22s}{theirs * 1e3:10.1f}{ours * 1e3:11.2f}{ratio:7.1f}x   {GOALS.get(label, '')}")
    if args.json:
        args.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
