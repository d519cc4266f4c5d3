"""A run that is killed again and again ends like one that was left alone, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 5
DRIVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from veneer.diffusion import AdapterOptions, DreamBooth, DreamBoothConfig

images, out, steps, *moments = sys.argv[1:]
steps = int(steps)
options = AdapterOptions(rank=2, learning_rate=1e-3, dropout=0.2)
config = DreamBoothConfig(
    instance_data_dir=images, instance_prompt="a photo of sks disc", output_dir=out, unet=options, text_encoder=options,
    max_train_steps=steps, checkpointing_steps=2, lr_scheduler="cosine", flip=True,
    sample_seeds=(0,), sample_steps=1, sample_every=0, device="cpu",
)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(moment):
    if moment == "save-4":  # the power goes while the checkpoint of step 4 is being written
        real = torch.save
        def half(state, path):
            if "step-000004" in str(path):
                path.write_bytes(b"half")
                die()
            real(state, path)
        torch.save = half
    for event in DreamBooth(config).run():
        told = f"{type(event).__name__.lower()}-{getattr(event, 'step', '')}"
        if told == moment:
            die()

for moment in moments:
    child = os.fork()
    if child == 0:
        run(moment)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    expected = 0 if moment == "never" else signal.SIGKILL
    assert status == expected, f"{moment}: {status}"
"""


def drive(folder: Path, images: Path, *moments: str) -> None:
    """One process that forks a child for each moment at which the run is killed: imports are paid for once."""
    script = folder / "driver.py"
    script.write_text(DRIVER)
    command = [sys.executable, str(script), str(images), str(folder / "run"), str(STEPS), *moments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path, images: Path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir(), killed.mkdir()
    drive(undisturbed, images, "never")
    drive(killed, images, "step-1", "step-3", "save-4", "step-5", f"checkpoint-{STEPS}", "never")
    for name in ("unet", "text_encoder"):
        one, other = (load_file(f / "run" / name / "adapter_model.safetensors") for f in (undisturbed, killed))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert metrics(undisturbed) == metrics(killed)
    assert pictures(undisturbed) == pictures(killed)
    assert not list((killed / "run").rglob(".incomplete-*"))


def metrics(folder: Path) -> list[dict]:
    """Without what the clock says."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [{key: value for key, value in line.items() if key not in ("seconds", "eta")} for line in lines]


def pictures(folder: Path) -> dict[str, bytes]:
    samples = folder / "run" / "samples"
    return {str(path.relative_to(samples)): path.read_bytes() for path in samples.rglob("*.png")}
