"""`veneer demo` from beginning to end, with as few pictures and steps as it can have."""

import re
from dataclasses import replace

import pytest
from PIL import Image
from veneer import cli
from veneer.diffusion import demo, inspect_adapter


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(demo, "DRAW", replace(demo.DRAW, steps=1, batch_size=16))
    for name in ("SUBJECT_PROMPTS", "STYLE_PROMPTS", "BLEND_PROMPTS", "SUBJECT_CLASS", "STYLE_CLASS"):
        monkeypatch.setattr(demo, name, getattr(demo, name)[:2])


def run(out, *arguments: str) -> None:
    cli.main(["demo", "--out", str(out), "--subject-steps", "1", "--style-steps", "1", *arguments])


@pytest.mark.parametrize("method", ["loha", "lokr", "lora"])
def test_the_story_is_told(method, tmp_path, capsys):
    run(tmp_path, "--method", method)
    said = capsys.readouterr().out
    assert all(f"{chapter}/4" in said for chapter in (1, 2, 3, 4))
    for name in ("subject", "style", "blend", "demo"):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.width > 2 * 112

    learnt = [part for name in ("robot", "ink") for part in inspect_adapter(tmp_path / name).parts]
    assert {part.method.lower() for part in learnt} == {method}
    blended = {part.component: part.method for part in inspect_adapter(tmp_path / "ink-robot").parts}
    assert blended == {"unet": "LoRA", "text_encoder": "LoRA"}
    assert re.findall(r"--adapters (\S+)", said) == [str(tmp_path / "ink-robot")]


def test_a_second_call_resumes(tmp_path, capsys):
    """Nothing is trained, or drawn for training, again."""
    run(tmp_path)
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("class_images/*/*.png")}
    assert len(drawn) == 4
    assert "training" in capsys.readouterr().err
    run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    assert "training" not in capsys.readouterr().err
