"""The scripts of examples/ run, on tiny models that their flags ask for, and learn what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import veneer
import yaml
from veneer import PeftConfig

EXAMPLES = Path(veneer.__file__).parent / "examples"


def run(script: str, *arguments: str):
    """What the script's `main` returns."""
    return runpy.run_path(str(EXAMPLES / script))["main"]([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("script", "arguments", "holds"),
    [
        (
            "sequence_classification/compare_methods.py",
            ["--tiny", "--steps", 1],
            lambda found: len(found) == 6 and all(0 <= share <= 1 for share in found.values()),
        ),
        (
            "token_classification/train_layoutlm.py",
            ["--base-steps", 60, "--steps", 60],
            lambda scores: scores["after"] > scores["before"] + 0.3 > scores["after, boxes hidden"],
        ),
        (
            "conditional_generation/train_seq2seq.py",
            ["--base-steps", 3, "--steps", 3, "--output-dir", "adapter"],
            lambda scores: len(scores) == 4 and PeftConfig.from_pretrained("adapter").task_type == "SEQ_2_SEQ_LM",
        ),
        (
            "multi_adapter_inference/answer_mixed.py",
            ["--tiny", "--steps", 8, "--new-tokens", 8, "--repeats", 1],
            lambda found: found["mixed"] == found["alone"] and len(set(found["mixed"])) > 2,
        ),
    ],
    ids=lambda value: Path(value).stem if isinstance(value, str) else "",
)
def test_the_script_runs(script, arguments, holds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(script, *arguments)
    assert holds(result), result


def test_adapters_of_a_mixed_batch_may_come_from_directories(tmp_path, capsys):
    script, tiny = "multi_adapter_inference/answer_mixed.py", ["--tiny", "--new-tokens", 8, "--repeats", 1]
    made = run(script, *tiny, "--steps", 8, "--output", tmp_path)
    capsys.readouterr()
    directories = [f"{name}={tmp_path / name}" for name in ("pirate", "polite", "brief")]
    assert run(script, *tiny, "--adapters", *directories) == made
    assert "8 of 8 answers equal" in capsys.readouterr().out


def test_every_folder_says_what_it_shows():
    folders = {path.parent for path in EXAMPLES.rglob("*.py")}
    assert len(folders) >= 5
    assert not [folder for folder in folders if not (folder / "README.md").is_file()]


def test_the_config_for_accelerate_is_one():
    config = yaml.safe_load((EXAMPLES / "conditional_generation" / "ds_zero3_cpu.yaml").read_text())
    assert config["deepspeed_config"]["zero_stage"] == 3
