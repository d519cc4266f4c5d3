"""Two processes learn what one does with twice the accumulation."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from veneer.diffusion import AdapterOptions, DreamBooth, DreamBoothConfig

images, out, accumulate = sys.argv[1:]
options = AdapterOptions(rank=2, learning_rate=1e-3, dropout=0.1)
config = DreamBoothConfig(
    instance_data_dir=images, instance_prompt="a photo of sks disc", output_dir=out, unet=options, text_encoder=options,
    max_train_steps=2, gradient_accumulation_steps=int(accumulate), sample_seeds=(), device="cpu",
)
print(sum(1 for _ in DreamBooth(config).run()), "events")
"""


def test_gradients_are_averaged_over_processes(tmp_path: Path, images: Path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    one, two = tmp_path / "one", tmp_path / "two"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in ([str(script), str(images), str(one), "2"], [*launch, str(script), str(images), str(two), "1"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "0 events" in done.stdout  # the second process tells nothing
    for name in ("unet", "text_encoder"):
        single, double = (load_file(run / name / "adapter_model.safetensors") for run in (one, two))
        for key, tensor in single.items():
            torch.testing.assert_close(tensor, double[key], rtol=1e-5, atol=1e-7)
