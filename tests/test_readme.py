"""The README's code runs: Python blocks as they stand, in order and in one folder, the cheap commands too.

Only the number of training steps is made smaller.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import veneer
from veneer import cli

ROOT = Path(veneer.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split("&&") if part.strip().startswith("veneer ")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like a clone to relative paths, and can be written to."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "diffusion").symlink_to(ROOT / "diffusion")
    return folder


def test_every_python_block_runs(clone):
    code = "\n".join(blocks("python"))
    short = re.sub(r"max_train_steps=\d+", "max_train_steps=2", code)
    assert short != code
    child = subprocess.run([sys.executable, "-c", short], cwd=clone, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "trainable params" in child.stdout


def test_every_command_is_understood(capsys):
    """Flags and values are parsed for real; nothing runs."""
    assert {words[1] for words in commands()} >= {"demo", "dreambooth", "blend", "generate", "inspect"}
    for words in commands():
        cli.main([*words[1:], "--print-config"])
        assert capsys.readouterr().out


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`((?:examples|diffusion)/[^`]+)`", README)
    assert "docs/images/demo.png" in targets
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_the_picture_is_small():
    assert (ROOT / "docs/images/demo.png").stat().st_size < 400_000
