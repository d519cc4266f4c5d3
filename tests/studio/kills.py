"""Kills worker and server with signal 9 at random moments of real trainings, and looks whether anything is lost.

    python -m tests.studio.kills [--kills 20] [--seed 0] [--data DIR]

Each training is compared with one that nobody disturbs: every step once, every tensor of the adapter equal, every
sample equal, and no file that once was there ever changed. If kills are left when a training ends, another one begins.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from pathlib import Path

from veneer.core.files import read_tensors
from veneer.studio.jobs import store
from veneer.studio.services import datasets, runs
from veneer.studio.workspace import ME, Workspace

from .serving import Studio, kill_worker, until, worker

STEPS = 40
LONGEST = 6.0
"""Seconds until the next kill, at most: sometimes while the worker still starts, sometimes many steps later."""


def queue_training(ws: Workspace, name: str) -> str:
    """A training of some seconds on the bundled robot; the same for every name."""
    dataset = datasets.copy_sample(ws, ME, "robot")
    settings = runs.settings_of(ws, dataset, {"goal": "subject", "method": "lora", "trigger": "sks face"}) | {
        "max_train_steps": STEPS, "checkpointing_steps": 3, "sample_every": 20, "sample_steps": 2, "sample_seeds": [0],
        "sample_prompts": ["a photo of sks face"], "class_prompt": None, "train_batch_size": 1,
        "text_encoder": {"method": "none"},
    }  # fmt: skip
    arguments = {"dataset": dataset.id, "name": name, "recipe": {}, "config": settings}
    return store.submit(ws, ME, "train", arguments, lambda folder: datasets.snapshot(dataset, folder / "data"))


def shake(studio: Studio, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill `kills` times; how often each, and how many trainings it took.

    Raises:
        AssertionError: something was lost.
    """
    calm = finished(studio, queue_training(studio.ws, "calm"))
    told = {"worker": 0, "server": 0, "trainings": 0}
    while sum(told.values()) - told["trainings"] < kills:
        told["trainings"] += 1
        job, seen = queue_training(studio.ws, f"shaken {told['trainings']}"), {}
        while store.load(studio.ws, job).state != "done" and sum(told.values()) - told["trainings"] < kills:
            time.sleep(chance.uniform(0, LONGEST))
            seen = _unchanged(studio.ws.job(job) / "out", seen)
            victim = chance.choice(("worker", "server"))
            told[victim] += kill(studio, victim, job)
        _unchanged(studio.ws.job(job) / "out", seen)
        shaken = finished(studio, job)
        assert steps(shaken) == steps(calm) == list(range(1, STEPS + 1))
        assert made(shaken) == made(calm)
        assert not list(shaken.rglob(".incomplete-*"))
    return told


def kill(studio: Studio, victim: str, job: str) -> int:
    """Kill one of the two, and bring things back as a person would; 0 if there was nothing to kill."""
    if victim == "server":
        before = worker(studio.ws)
        studio.kill()
        assert worker(studio.ws) == before
        studio.start()
        return 1
    if worker(studio.ws) is None:
        return 0
    kill_worker(studio.ws)
    died = time.monotonic()
    until(lambda: store.load(studio.ws, job).state in ("queued", "interrupted", "done"), 15, "the death is noticed")
    assert time.monotonic() - died < 15
    if store.load(studio.ws, job).resumable:
        store.resume(studio.ws, ME, job)
    return 1


def finished(studio: Studio, job: str, seconds: float = 300) -> Path:
    """What a job has made, when it is done."""
    until(lambda: not store.load(studio.ws, job).active, seconds, "the job has ended")
    found = store.load(studio.ws, job)
    assert found.state == "done", f"{found.state}: {found.message}"
    return found.out


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def made(out: Path) -> dict[str, bytes]:
    """What a finished run leaves that does not tell the time: every number of its adapter, and its samples."""
    numbers = {
        f"{path.relative_to(out)}:{name}": tensor.numpy().tobytes()
        for path in (*out.glob("*/adapter_model.safetensors"), *out.glob("*.safetensors"))
        for name, tensor in read_tensors(path).items()
    }
    assert numbers
    return numbers | {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("samples/step-*/*.png")}


def _unchanged(out: Path, seen: dict[str, str]) -> dict[str, str]:
    """Check that no checkpoint or sample differs from what it was; those of now."""
    now: dict[str, str] = {}
    for path in (*out.glob("checkpoints/step-*/**/*.safetensors"), *out.glob("samples/step-*/*.png")):
        try:
            now[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:  # the oldest checkpoint has just been removed
            continue
    changed = [name for name in now.keys() & seen.keys() if now[name] != seen[name]]
    assert not changed, changed
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        studio = Studio((options.data or Path(folder) / "studio").resolve())
        began = time.monotonic()
        try:
            told: dict[str, object] = dict(shake(studio, options.kills, random.Random(options.seed)))
        finally:
            studio.close()
    told |= {"seconds": round(time.monotonic() - began), "load_average": round(os.getloadavg()[0], 1)}
    print(json.dumps(told | {"lost": 0}))


if __name__ == "__main__":
    main()
