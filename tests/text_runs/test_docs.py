"""The guide's code runs as it stands, in order and in one folder, on a tiny model; its commands are understood."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import veneer
from veneer import cli

from .conftest import chat

GUIDE = (Path(veneer.__file__).parent / "docs" / "text.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_runs(model_dir, tmp_path, write):
    write(*[chat(f"question {i}", "aye") for i in range(8)], name="chats.jsonl")
    shutil.copytree(model_dir, tmp_path / "model")
    code = "\n".join(blocks("python"))
    short = code.replace("max_train_steps=40", "max_train_steps=2")
    assert short != code
    child = subprocess.run([sys.executable, "-c", short], cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "Evaluation(step=2" in child.stdout
    assert (tmp_path / "pirate" / "config.json").exists()


def test_every_command_is_understood(capsys):
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("veneer ")]
    assert [words[2] for words in commands] == ["train", "generate", "merge"]
    for words in commands:
        cli.main([*words[1:], "--print-config"])
        assert capsys.readouterr().out


def test_every_example_is_one(write):
    from veneer.text.data import read_examples

    assert read_examples(write(*blocks("json")))[0].kind == "messages"
