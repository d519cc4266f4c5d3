"""`veneer demo` from beginning to end, with as few steps as it can have."""

import re
from dataclasses import replace

import pytest
from PIL import Image
from veneer import cli
from veneer.diffusion import demo
from veneer.diffusion.inspect import inspect_path


@pytest.mark.parametrize("method", ["loha", "lokr", "lora"])
def test_the_story_is_told(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "DRAW", replace(demo.DRAW, steps=1, batch_size=16))
    out = tmp_path / "story"
    arguments = ["demo", "--method", method, "--out", str(out), "--subject-steps", "1", "--style-steps", "1"]
    cli.main(arguments)
    said = capsys.readouterr().out
    assert [f"{number}/4" in said for number in (1, 2, 3, 4)] == [True] * 4
    for name in ("subject", "style", "blend", "demo"):
        with Image.open(out / f"{name}.png") as sheet:
            assert sheet.width > 600

    methods = {
        part.method.lower() for name in ("robot", "ink") for report in inspect_path(out / name) for part in report.parts
    }
    assert methods == {method}
    blended = {part.component: part.method for report in inspect_path(out / "ink-robot") for part in report.parts}
    assert blended == {"unet": "LoRA", "text_encoder": "LoRA"}
    assert str(out / "ink-robot") in re.findall(r"--adapters (\S+)", said)


def test_a_second_call_resumes(tmp_path, capsys, monkeypatch):
    """Nothing is trained, or drawn for training, again."""
    monkeypatch.setattr(demo, "DRAW", replace(demo.DRAW, steps=1, batch_size=16))
    arguments = ["demo", "--out", str(tmp_path), "--subject-steps", "1", "--style-steps", "1"]
    cli.main(arguments)
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("class_images/*/*.png")}
    assert "training" in capsys.readouterr().err
    cli.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("class_images/*/*.png")} == drawn
    assert "training" not in capsys.readouterr().err
