"""The `veneer` command: a subcommand is one line of `COMMANDS`, and the package it names does the work.

This file imports neither torch nor a model library, so help and usage errors come at once.
"""

from __future__ import annotations

import io
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_type_hints

from . import __version__
from .core.errors import one_line


class Command(NamedTuple):
    """A subcommand: `module.function(module.config(...))`, and its line of help."""

    module: str
    config: str
    function: str
    help: str


COMMANDS = {
    "demo": Command("diffusion.demo", "DemoConfig", "demo", "learn a subject and a style, then blend them"),
    "dreambooth": Command("diffusion.dreambooth", "DreamBoothConfig", "main", "teach a model a subject or a style"),
    "generate": Command("diffusion.generate", "GenerateConfig", "generate", "draw prompts with weighted adapters"),
    "blend": Command("diffusion.blend", "BlendConfig", "blend", "make one adapter of several, with a preview"),
    "inspect": Command("diffusion.inspect", "InspectConfig", "inspect", "say what an adapter holds and who reads it"),
    "convert": Command("diffusion.convert", "ConvertConfig", "convert", "rewrite an adapter for another program"),
    "text train": Command("text.sft", "TextConfig", "main", "teach a language model from examples"),
    "text generate": Command("text.generate", "AnswerConfig", "main", "answer prompts with weighted adapters"),
    "text merge": Command("text.merge", "MergeConfig", "main", "fold adapters into a plain language model"),
    "studio": Command("studio.serve", "StudioConfig", "serve", "train, blend and compare in the browser"),
}

HELP = f"""usage: veneer COMMAND [OPTIONS]

Adapters for frozen models: train, draw, write, blend, inspect, convert.

commands:
{chr(10).join(f"  {name:<15}{command.help}" for name, command in COMMANDS.items())}

options of every command:
  --help          its options, with their defaults
  --config FILE   options from a YAML file; flags override it
  --print-config  show the options as YAML and stop
  --debug         on an error, show where it came from

examples:
  veneer demo --out demo
  veneer dreambooth --help
  veneer generate --prompts "a cat" "a photo of sks face" --adapters demo/robot=0.8 --out pictures
  veneer blend --adapters demo/robot=1.0 demo/ink=0.7 --combination-type svd --out ink-robot
  veneer inspect ink-robot
  veneer convert ink-robot ink-robot.safetensors --to kohya
  veneer text train --data chats.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --output-dir runs/pirate
  veneer text generate --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters runs/pirate=0.8 --prompts "Who are you?"
  veneer studio
"""


class UsageError(Exception):
    """The command line is wrong; exit code 2, as everywhere."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point. Exits 0, 1 (the work failed), 2 (the command line is wrong) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _take_flag(arguments, "--debug")
    try:
        _dispatch(arguments)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(_one_line(error), code=2 if isinstance(error, UsageError) else 1)


def _dispatch(arguments: list[str]) -> None:
    arguments = arguments or ["--help"]
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    group = [command for command in COMMANDS if command.startswith(f"{name} ")]
    if name in ("-h", "--help"):
        print(HELP, end="")
    elif name == "--version":
        print(f"veneer {__version__}")
    elif group and rest in ([], ["-h"], ["--help"]):
        print("\n".join(f"veneer {command:<15}{COMMANDS[command].help}" for command in group))
    elif name in COMMANDS:
        _run(name, rest)
    else:
        raise UsageError(f"unknown command {name!r}; commands: {', '.join(COMMANDS)}")


def _run(name: str, arguments: list[str]) -> None:
    command = COMMANDS[name]
    from_file = _take_value(arguments, "--config")
    print_only = _take_flag(arguments, "--print-config")
    module = import_module(f".{command.module}", __package__)
    config_class = getattr(module, command.config)
    if from_file is not None:
        arguments = [*flags(config_class, _read_yaml(Path(from_file))), *arguments]  # later flags win
    config = _parse(f"veneer {name}", config_class, arguments)
    if print_only:
        from .core.runs.settings import to_yaml

        print(to_yaml(config), end="")
    else:
        getattr(module, command.function)(config)


def _parse(program: str, config_class: type, arguments: list[str]) -> Any:
    """Flags to a config dataclass; the parser's boxed complaint becomes one line."""
    import tyro

    with redirect_stderr(io.StringIO()) as said:
        try:
            return tyro.cli(config_class, args=arguments, prog=program)
        except SystemExit as stop:
            if not stop.code:
                raise
    unboxed = re.sub(r"\x1b\[[\d;]*m|^╭.*╮$|[│╰╯─]", "", said.getvalue(), flags=re.MULTILINE)
    words = " ".join(unboxed.split()).partition(" For full helptext")[0]
    raise UsageError(f"{words} (see {program} --help)")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} must hold `option: value` lines, not {type(loaded).__name__}")
    return loaded


def flags(config_class: type, options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A config file as flags, so that one parser checks both and complains in the same words."""
    kinds = get_type_hints(config_class)
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, dict) and is_dataclass(kinds.get(name)):
            yield from flags(kinds[name], value, f"{prefix}{flag}.")
        elif isinstance(value, bool):
            yield f"--{prefix}{'' if value else 'no-'}{flag}"
        elif isinstance(value, (dict, list)):
            words = [word for item in value.items() for word in item] if isinstance(value, dict) else value
            yield from (f"--{prefix}{flag}", *map(str, words))
        else:
            yield f"--{prefix}{flag}={value}"


def _take_flag(arguments: list[str], flag: str) -> bool:
    found = flag in arguments
    if found:
        arguments.remove(flag)
    return found


def _take_value(arguments: list[str], flag: str) -> str | None:
    """Remove `--flag VALUE` or `--flag=VALUE` from `arguments` and return the value."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            given = [value] if equals else arguments[index + 1 : index + 2]
            if not given:
                raise UsageError(f"{flag} needs a file")
            del arguments[index : index + (1 if equals else 2)]
            return given[0]
    return None


def _one_line(error: Exception) -> str:
    """An error as one line; a bare `KeyError('x')` and its like say their class too."""
    words = one_line(str(error))
    plain = isinstance(error, (UsageError, ValueError, OSError, RuntimeError)) and words
    return words if plain else f"{type(error).__name__}: {words}"


def _fail(message: str, code: int) -> NoReturn:
    print(f"veneer: error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
