"""One batch, many adapters: forward passes side by side with `peft`, in one process.

    python benchmarks/mixed_batch.py [--device cuda --dtype bfloat16] [--case 64,16,32,8] [--rounds 7] [--json out.json]

A case is width, tokens a row, rows, adapters: a stack of linear layers, each with that many LoRAs of rank 16, in eval
mode without gradients, rows assigned in turn. The libraries take turns; medians count. "one adapter" is veneer with one
for all rows, "plain" its general path (one adapter after the other), "train" forward and backward of a mixed batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
import veneer
from torch import Tensor, nn
from veneer.core.kernels import GroupedFactors

CASES = ["64,1,32,32", "64,16,32,8", "64,16,32,32", "512,1,32,32", "512,16,32,2", "512,16,32,32", "2048,1,32,32"]


class Stack(nn.Module):
    """Linear layers, one after the other."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def prepare(lib, layers: int, width: int, names: list[str], device: str, dtype: torch.dtype):
    torch.manual_seed(0)

    def config():
        return lib.LoraConfig(r=16, target_modules=r"layers\.\d+", init_lora_weights=False)

    model = lib.get_peft_model(Stack(layers, width).to(device, dtype), config(), names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, config())
    return model.to(device, dtype).eval()


def seconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """Of one run, the best of a few batches of runs that last long enough to be timed."""

    def several(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = max(1, int(0.05 / several(1)))
    return several(times) / times


def measure(case: str, args: argparse.Namespace) -> dict[str, float]:
    width, tokens, count, adapters = map(int, case.split(","))
    names = [f"a{i}" for i in range(adapters)]
    rows = [names[i % adapters] for i in range(count)]
    dtype = getattr(torch, args.dtype)
    theirs, ours = (prepare(lib, args.layers, width, names, args.device, dtype) for lib in (peft, veneer))
    base = Stack(args.layers, width).to(args.device, dtype)
    x = torch.randn(count, tokens, width, device=args.device, dtype=dtype)

    def plain():
        with mock.patch.object(GroupedFactors, "dropout", return_value=None):
            ours(x, adapter_names=rows)

    def train():
        ours.base_model.activate(*names)
        with torch.enable_grad():
            ours(x, adapter_names=rows).float().sum().backward()

    works = {
        "base": lambda: base(x),
        "peft": lambda: theirs(x, adapter_names=rows),
        "mixed": lambda: ours(x, adapter_names=rows),
        "one adapter": lambda: ours(x, adapter_names=[names[0]] * count),
        "plain": plain,
        "train": train,
    }
    with torch.no_grad():
        for work in works.values():
            work()
        found = {label: [] for label in works}
        for _ in range(args.rounds):
            for label, work in works.items():
                found[label].append(seconds(work, args.device, args.rounds))
    return {label: statistics.median(times) for label, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", help="width,tokens,rows,adapters (repeatable)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread"
    print(f"peft {peft.__version__}, torch {torch.__version__}, {device}, {args.dtype}, {args.layers} layers; ms")
    labels = ["base", "one adapter", "mixed", "plain", "peft", "train"]
    print(
        f"{'width,tokens,rows,adapters':28s}" + "".join(f"{label:>12s}" for label in labels) + "  peft/mixed  one/mixed"
    )
    table = {}
    for case in args.case or CASES:
        times = table[case] = measure(case, args)
        ratios = f"{times['peft'] / times['mixed']:10.1f}x {times['one adapter'] / times['mixed']:9.2f}x"
        print(f"{case:28s}" + "".join(f"{times[label] * 1e3:12.2f}" for label in labels) + ratios, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": device, "dtype": args.dtype, "seconds": table}, indent=2))


if __name__ == "__main__":
    main()
