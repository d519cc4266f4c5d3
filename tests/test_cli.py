"""The `veneer` command: help, versions, configs in and out, and errors as one line."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import veneer
import yaml
from veneer import cli


@dataclass(frozen=True)
class Part:
    """A nested group of options."""

    rank: int = 8
    """Columns."""
    train: bool = True
    """Whether to."""
    pattern: dict[str, int] = field(default_factory=dict)
    """Free names."""


@dataclass(frozen=True)
class TryConfig:
    """A command for tests."""

    name: str
    """Required."""
    prompts: tuple[str, ...] = ("a cat",)
    """Several."""
    out: Path = Path("out")
    """Where."""
    limit: int | None = None
    """Optional."""
    part: Part = field(default_factory=Part)
    """Nested."""


@pytest.fixture
def seen(monkeypatch):
    """The configs that the command `try` received; a config named `boom` raises."""
    received = []

    def run(config):
        if config.name == "boom":
            raise KeyError("no\nsuch key")
        received.append(config)

    module = ModuleType("veneer.a_command_for_tests")
    module.TryConfig, module.run = TryConfig, run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("a_command_for_tests", "TryConfig", "run", "try it"))
    return received


def fails(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert said.startswith("veneer: error: ")
    assert said.count("\n") == 1
    return stop.value.code, said


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_command(capsys, arguments):
    cli.main(arguments)
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"veneer {veneer.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"veneer {name}" in capsys.readouterr().out


def test_flags_reach_the_config(seen):
    cli.main(["try", "--name", "x", "--prompts", "a dog", "a car", "--part.rank", "2", "--part.no-train"])
    assert seen == [TryConfig("x", prompts=("a dog", "a car"), part=Part(2, False))]


@pytest.mark.parametrize("as_flag", [("--config", "{}"), ("--config={}",)], ids=["two words", "equals"])
def test_yaml_gives_options_and_flags_override_them(seen, tmp_path, as_flag):
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: -x\nprompts: [a dog, a car]\nlimit: null\npart: {rank: 2, train: false, pattern: {to_q: 4}}\n"
    )
    cli.main(["try", *(part.format(file) for part in as_flag), "--part.rank=3", "--limit", "5"])
    assert seen == [TryConfig("-x", ("a dog", "a car"), limit=5, part=Part(3, False, {"to_q": 4}))]


def test_printed_config_reads_back_the_same(seen, capsys, tmp_path):
    file = tmp_path / "run.yaml"
    cli.main(["try", "--name", "é: #1", "--prompts", "a 'b' c", "--out", "there", "--print-config"])
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert not seen
    cli.main(["try", "--config", str(file)])
    assert seen == [TryConfig("é: #1", ("a 'b' c",), Path("there"))]
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["limit"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tri"], 2, "unknown command 'tri'; commands: demo"),
        (["try"], 2, "--name"),
        (["try", "--name", "x", "--out"], 2, "--out"),
        (["try", "--name", "x", "--part.rank", "many"], 2, "many"),
        (["try", "--name", "x", "--promts", "y"], 2, "--prompts"),
        (["try", "--config"], 2, "--config needs a file"),
        (["try", "--config", "nowhere.yaml"], 1, "nowhere.yaml"),
        (["try", "--name", "boom"], 1, "KeyError: 'no\\nsuch key'"),
    ],
)
def test_an_error_is_one_line(seen, capsys, arguments, code, words):
    got, said = fails(capsys, *arguments)
    assert got == code
    assert words in said
    assert not seen


@pytest.mark.parametrize(("text", "words"), [("a: [", "is not YAML"), ("- a", "not list"), ("nme: x", "--nme")])
def test_a_bad_config_file_is_named(seen, capsys, tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    code, said = fails(capsys, "try", "--config", str(file))
    assert code == 2
    assert words in said


def test_debug_shows_where_an_error_came_from(seen, capsys):
    with pytest.raises(SystemExit):
        cli.main(["try", "--name", "boom", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_the_installed_command_fails_with_a_code():
    command = [Path(sys.executable).parent / "veneer", "inspect", "nowhere"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=os.sep)
    assert child.returncode == 1
    assert child.stderr == "veneer: error: nowhere does not exist\n"
