"""Blends of adapters, side by side with `peft` in one process: time, peak memory and error of every combination.

    python benchmarks/blend.py [--models sd15,llama] [--kinds "svd;ties"] [--rounds 3] [--device cuda] [--json out.json]

Three LoRA adapters of rank 16 on all attention and feed-forward layers of Stable Diffusion 1.5's UNet, and on all
linear layers of a Llama of a billion parameters. Both libraries get the same tensors and take turns; medians. A
combination never reads the base weights, so they are zeros that take no memory.

Kinds that end in a dense SVD take minutes: where one layer of each shape, times the number of layers of that shape,
comes to more than ten seconds, that is the figure (marked *). `peft` runs with reduced matrices there, which is in its
favour. On a processor the time is the thread's own. Memory is the peak of the tensors made by the call that are alive
together (on a GPU, of the allocator). Errors are relative to the same combination by `peft` in float64 with the same
random draws, on one layer of each shape up to 2^21 entries; for kinds that `peft` has not, or computes in float32
always, by ourselves in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from math import sqrt
from pathlib import Path
from typing import Any
from zlib import crc32

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
import veneer
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from veneer.core.convert import convert_to_lora

ALPHAS = {"one": 16, "two": 8, "three": 32}
WEIGHTS = {"one": 0.7, "two": 0.5, "three": -0.3}
LARGEST_CHECKED = 2**21
LONG = 10.0
"""Seconds from which one layer of each shape stands for the model."""

Shape = tuple[int, int]
Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Kind:
    """One way to combine, or to convert."""

    options: dict[str, Any] = field(default_factory=dict)
    dense: bool = False
    """Whether it decomposes matrices of the size of a weight, in `peft` at least."""
    adapters: int = 3
    config: str = "LoraConfig"
    in_peft: bool = True
    exact: Any = peft
    """The library that gives the reference in float64."""


REDUCED = {"svd_full_matrices": False}
KINDS = {
    "cat": Kind(),
    "linear": Kind(),
    "ties": Kind({"density": 0.5}),
    "dare_linear": Kind({"density": 0.5}),
    "dare_ties": Kind({"density": 0.5}),
    "magnitude_prune": Kind({"density": 0.5}),
    "svd": Kind(REDUCED, dense=True),
    "svd, full matrices": Kind(dense=True),  # `peft`'s default
    "ties_svd": Kind(REDUCED | {"density": 0.5}, dense=True),
    "dare_linear_svd": Kind(REDUCED | {"density": 0.5}, dense=True),
    "dare_ties_svd": Kind(REDUCED | {"density": 0.5}, dense=True),
    "magnitude_prune_svd": Kind(REDUCED | {"density": 0.5}, dense=True),
    "slerp": Kind(adapters=2, dense=True, in_peft=False, exact=veneer),
    "della": Kind({"density": 0.5, "epsilon": 0.2}, dense=True, in_peft=False, exact=veneer),
    "breadcrumbs": Kind({"density": 0.5, "gamma": 0.01}, dense=True, in_peft=False, exact=veneer),
    "convert LoHa": Kind(adapters=1, dense=True, config="LoHaConfig", exact=veneer),
    "convert LoKr": Kind(adapters=1, dense=True, config="LoKrConfig", exact=veneer),
}

# ---------------------------------------------------------------- models


def sd15(quick: bool) -> tuple[nn.Module, list[str]]:
    tiny = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    tiny |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, **(tiny if quick else {}))
    return unet, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def llama(quick: bool) -> tuple[nn.Module, list[str]]:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=2 if quick else 8, **(tiny if quick else sizes))
    attention, feed_forward = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    return LlamaForCausalLM(config), attention + feed_forward


MODELS = {"sd15": sd15, "llama": llama}


def hollow(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with zeros for weights that share one number."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), device=device).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    return model


def single(shape: Shape, device: torch.device) -> nn.Module:
    """One layer of a shape (out, in), under a target's name."""
    with torch.device("meta"):
        layer = nn.Linear(shape[1], shape[0], bias=False)
    return hollow(nn.ModuleDict({"layer": layer}), device)


def adapted(lib: Any, kind: Kind, model: nn.Module, targets: list[str]) -> nn.Module:
    """The model with adapters that hold the same tensors in both libraries."""
    rank = min(16, *(min(m.weight.shape) for n, m in model.named_modules() if n.endswith(tuple(targets))))
    wrapped = None
    for name, alpha in list(ALPHAS.items())[: kind.adapters]:
        options = {"lora_alpha" if kind.config == "LoraConfig" else "alpha": alpha}
        config = getattr(lib, kind.config)(r=rank, target_modules=targets, **options)
        if wrapped is None:
            wrapped = lib.get_peft_model(model, config, name)
        else:
            wrapped.add_adapter(name, config)
        state = lib.get_peft_model_state_dict(wrapped, adapter_name=name)
        for key, tensor in state.items():
            random = torch.Generator().manual_seed(crc32(f"{name} {key}".encode()))
            state[key] = torch.randn(tensor.shape, generator=random).to(tensor) * tensor.shape[-1] ** -0.5
        lib.set_peft_model_state_dict(wrapped, state, adapter_name=name)
    assert wrapped is not None
    return wrapped


# ---------------------------------------------------------------- what is measured


class Peak(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are alive, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference not in given:
                self.alive[reference] = tensor.untyped_storage().nbytes()
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """On a processor, those that the one thread worked: a machine that others use too delays it now and then."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    synchronise(device)
    start = clock()
    work()
    synchronise(device)
    return clock() - start


def with_peak(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds and bytes of one call."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return seconds(work, device), torch.cuda.max_memory_allocated() - before
    with Peak() as peak:
        return seconds(work, device), peak.bytes


@contextmanager
def same_draws() -> Iterator[None]:
    """Random masks are those of one seed, whatever else was drawn before and in which dtype."""
    original, random = torch.bernoulli, torch.Generator().manual_seed(0)

    def bernoulli(chance: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return original(chance.float().cpu(), generator=random).to(chance)

    torch.bernoulli = bernoulli
    try:
        yield
    finally:
        torch.bernoulli = original


class Combining:
    """One library's model, and a kind of combination of its adapters."""

    def __init__(self, lib: Any, name: str, model: nn.Module, targets: list[str]):
        self.lib, self.name, self.kind = lib, name, KINDS[name]
        self.model = adapted(lib, self.kind, model, targets)
        self.result: Any = None

    def __call__(self) -> None:
        """Combine; what comes out stays until `clear`."""
        torch.manual_seed(0)
        if self.name.startswith("convert"):
            convert = peft.convert_to_lora if self.lib is peft else convert_to_lora
            self.result = convert(self.model, rank=16, adapter_name="one")
            return
        names = list(WEIGHTS)[: self.kind.adapters]
        weights = [abs(WEIGHTS[n]) if self.name == "slerp" else WEIGHTS[n] for n in names]
        self.model.add_weighted_adapter(names, weights, "new", self.name.split(",")[0], **self.kind.options)

    def timed(self, device: torch.device) -> float:
        spent = seconds(self, device)
        self.clear()
        return spent

    def clear(self) -> None:
        if self.result is None:
            self.model.delete_adapter("new")
        self.result = None

    def delta(self) -> Tensor:
        """What the combination adds to the weight of a single layer, in float64."""
        with same_draws():
            self()
        if self.result is None:
            config, state = self.model.peft_config["new"], self.lib.get_peft_model_state_dict(self.model, None, "new")
        else:
            config, state = self.result
        a, b = (next(t for k, t in state.items() if f"lora_{x}" in k).double() for x in "AB")
        self.clear()
        return config.lora_alpha / config.r * b @ a


def libraries(name: str) -> list[Any]:
    return [peft, veneer] if KINDS[name].in_peft else [veneer]


def measure(name: str, make: Make, targets: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a combination over the whole model, or as its shapes tell."""
    libs, shapes = libraries(name), shapes_of(make(), targets)
    row = by_shape(name, libs, shapes, args) if KINDS[name].dense else {}
    whole = [lib for lib in libs if row.get(f"{lib.__name__}_s", 0) < LONG]
    works = {lib.__name__: Combining(lib, name, hollow(make(), args.device), targets) for lib in whole}
    for who, work in works.items():
        row[f"{who}_gb"] = with_peak(work, args.device)[1] / 1e9
        work.clear()
    spent: dict[str, list[float]] = {who: [] for who in works}
    for _ in range(args.rounds):
        for who, work in works.items():
            spent[who].append(work.timed(args.device))
    row |= {f"{who}_s": statistics.median(times) for who, times in spent.items()}
    return row | {"by_shape": [lib.__name__ for lib in libs if lib not in whole]}


def by_shape(name: str, libs: list[Any], shapes: Counter[Shape], args: argparse.Namespace) -> dict[str, Any]:
    """Time of one layer of each shape, times their number; memory of the largest."""
    row: dict[str, Any] = {f"{lib.__name__}_{what}": 0.0 for lib in libs for what in ("s", "gb")}
    for shape, count in shapes.items():
        for lib in libs:
            who = lib.__name__
            work = Combining(lib, name, single(shape, args.device), ["layer"])
            spent, size = with_peak(work, args.device)
            work.clear()
            if spent < 5:  # else the counting of memory takes no share of it
                spent = work.timed(args.device)
            row[f"{who}_s"] += count * spent
            row[f"{who}_gb"] = max(row[f"{who}_gb"], size / 1e9)
    return row


def measure_errors(name: str, shapes: Counter[Shape], args: argparse.Namespace) -> dict[str, float]:
    """Relative error of each library over one layer of each shape."""
    libs = libraries(name)
    off, total = dict.fromkeys(libs, 0.0), 0.0
    for shape in (s for s in shapes if s[0] * s[1] <= LARGEST_CHECKED):
        reference = Combining(KINDS[name].exact, name, single(shape, args.device), ["layer"])
        reference.model.double()
        target = reference.delta()
        total += target.square().sum().item()
        for lib in libs:
            found = Combining(lib, name, single(shape, args.device), ["layer"]).delta()
            off[lib] += (found - target).square().sum().item()
    return {f"{lib.__name__}_error": sqrt(square / total) for lib, square in off.items()}


def shapes_of(model: nn.Module, targets: list[str]) -> Counter[Shape]:
    found = (m.weight.shape for n, m in model.named_modules() if n.endswith(tuple(f".{t}" for t in targets)))
    return Counter((int(out), int(inner)) for out, inner in found)


# ---------------------------------------------------------------- the table


def show(kind: str, row: dict[str, Any]) -> None:
    def cells(who: str) -> str:
        if f"{who}_s" not in row:
            return f"{'':32s}"
        mark = "*" if who in row["by_shape"] else " "
        return f"{row[f'{who}_s'] * 1e3:13.1f}{mark}{row[f'{who}_gb'] * 1e3:9.1f}{row[f'{who}_error']:9.0e}"

    gain = f"{row['peft_s'] / row['veneer_s']:8.1f}x" if "peft_s" in row else ""
    print(f"{kind:22s}{cells('peft')}{cells('veneer')}{gain}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--kinds", default=";".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor() or platform.machine()
    versions = f"peft {peft.__version__}, torch {torch.__version__}"
    about = {"device": device, "date": date.today().isoformat(), "versions": versions}
    print(f"{versions}, {device}, one thread")
    tables: dict[str, dict[str, Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for label in args.models.split(","):

            def make(label: str = label) -> nn.Module:
                with torch.device("meta"):
                    return MODELS[label](args.quick)[0]

            targets = MODELS[label](True)[1]
            shapes = shapes_of(make(), targets)
            print(f"\n{label}: {shapes.total()} layers of {len(shapes)} shapes")
            head = [f"{who + ' ms':>13s} {'MB':>9s}{'error':>9s}" for who in ("peft", "veneer")]
            print(f"{'':22s}{head[0]}{head[1]}{'gain':>9s}")
            tables[label] = {}
            for kind in args.kinds.split(";"):
                row = measure(kind, make, targets, args)
                tables[label][kind] = row | measure_errors(kind, shapes, args)
                show(kind, tables[label][kind])
                if args.json:
                    args.json.write_text(json.dumps(about | {"tables": tables}, indent=1))


if __name__ == "__main__":
    main()
