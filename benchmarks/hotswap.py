"""Swapping an adapter for another: side by side with `peft`, in one process.

    python benchmarks/hotswap.py [--layers 1000] [--rounds 5] [--device cuda]

Adapters of ranks 8 and 4 and other scales take turns in a stack of linear layers prepared for rank 16: from files, and
from tensors in memory. Processor time on the CPU; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
import veneer
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from torch import nn
from veneer.core import hotswap_adapter_from_state_dict as ours_from_state_dict


class Stack(nn.Module):
    def __init__(self, layers: int, width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    clock = time.process_time if args.device == "cpu" else time.perf_counter

    def seconds(work) -> float:
        start = clock()
        work()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    with tempfile.TemporaryDirectory() as directory:
        paths = [f"{directory}/{i}" for i in range(2)]
        for path, (rank, alpha) in zip(paths, [(8, 8), (4, 16)], strict=True):
            config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=r"layers\.\d+", init_lora_weights=False)
            peft.get_peft_model(Stack(args.layers), config).save_pretrained(path)
        theirs = peft.PeftModel.from_pretrained(Stack(args.layers).to(args.device), paths[0])
        ours = veneer.PeftModel.from_pretrained(Stack(args.layers).to(args.device), paths[0])
        prepare_model_for_compiled_hotswap(theirs, target_rank=16)
        veneer.prepare_model_for_compiled_hotswap(ours, target_rank=16)
        states = [
            {k.replace("weight", "default.weight"): v for k, v in peft.load_peft_weights(p, device=args.device).items()}
            for p in paths
        ]
        configs = [lib.PeftConfig.from_pretrained(p) for p in paths for lib in (peft, veneer)]
        found: dict[str, list[tuple[float, float]]] = {"from files": [], "from tensors": []}
        for turn in range(2 * args.rounds):
            i = 1 - turn % 2
            pair = (
                seconds(lambda i=i: hotswap_adapter(theirs, paths[i], "default", torch_device=args.device)),
                seconds(lambda i=i: veneer.hotswap_adapter(ours, paths[i], "default")),
            )
            found["from files"].append(pair)
        for turn in range(2 * args.rounds):
            i = 1 - turn % 2
            their_config, our_config = configs[2 * i : 2 * i + 2]
            pair = (
                seconds(lambda: hotswap_adapter_from_state_dict(theirs, states[i], "default", their_config)),  # noqa: B023
                seconds(lambda: ours_from_state_dict(ours, states[i], "default", our_config)),  # noqa: B023
            )
            found["from tensors"].append(pair)
    print(f"peft {peft.__version__}, torch {torch.__version__}, {args.device}, {args.layers} layers, one thread")
    for label, pairs in found.items():
        one, two = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        print(f"{label:14s} peft {one * 1e3:8.1f} ms   veneer {two * 1e3:8.1f} ms   {one / two:5.1f}x")


if __name__ == "__main__":
    main()
