"""The package as a whole: what it lists, what it imports, what it ships."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import veneer

ROOT = Path(veneer.__file__).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_PACKAGED = {"benchmarks", "build", "dist", "docs", "examples", "tests"}
HEAVY = {"accelerate", "diffusers", "gradio", "peft", "torch", "transformers"}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_packages_in_pyproject_are_the_folders_with_code():
    inits = (path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py"))
    packaged = (path for path in inits if not path.parts or path.parts[0] not in NOT_PACKAGED)
    found = {".".join(("veneer", *path.parts)) for path in packaged if not any(p.startswith(".") for p in path.parts)}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import veneer"], ["-c", "import veneer.core.files"], ["-m", "veneer.cli", "--help"]],
    ids=["import", "files", "help"],
)
def test_import_and_help_load_no_model_library(arguments):
    """`-X importtime` names every module that the child process imports, on stderr."""
    command = [sys.executable, "-X", "importtime", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.sep)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in child.stderr.splitlines()}
    assert "veneer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", veneer.__all__)
def test_every_public_name_imports(name):
    assert getattr(veneer, name) is not None
    assert name in dir(veneer)


@pytest.mark.parametrize("folder", ["", "core", "diffusion", "text"])
def test_type_checkers_see_the_names_that_python_sees(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.name: "." * (node.level - 1) + (node.module or alias.name) for node in imports for alias in node.names
    }
    face = import_module(f"veneer.{folder}".rstrip("."))
    assert seen == face._HOME
    assert all(getattr(face, name) is not None for name in face._HOME)


def test_names_of_the_core_are_public_there():
    homes = {name for name, home in veneer._HOME.items() if home == "core" and name != "core"}
    assert homes <= set(import_module("veneer.core").__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LoraConfigg"):
        veneer.LoraConfigg  # noqa: B018


def test_layer_contract():
    lint = shutil.which("lint-imports", path=Path(sys.executable).parent)
    assert lint, "import-linter is in the dev extra"
    child = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


def test_peft_is_imported_by_tests_and_benchmarks_only():
    sources = [ROOT / "__init__.py", ROOT / "cli.py", *python_files("core", "diffusion", "text", "studio", "examples")]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert "peft" not in {name.partition(".")[0] for name in names}, path


def test_no_shipped_file_is_large():
    folders = ("core", "diffusion", "text", "studio")
    large = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.stat().st_size >= 17 * 2**20]
    assert not large
