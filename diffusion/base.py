"""A base model as a folder of files: its modules from the headers, single weights on demand. Nothing else is loaded."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import AdapterFileError
from ..core.header import read_header
from .dialects.architectures import Table
from .dialects.names import COMPONENTS, Names, clip_path
from .families import EMBEDDED, EMBEDDED_PATH

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[str, str]
"""Component and module path."""


class BaseModel:
    """The diffusers pipeline in a folder.

    Arguments:
        model: the folder, or "embedded" for the pipeline in the box.

    Raises:
        AdapterFileError: no pipeline there, or a damaged one.
    """

    def __init__(self, model: str):
        self.model = model
        folder = EMBEDDED_PATH if model == EMBEDDED else Path(model).expanduser()
        self._found: dict[Place, dict[str, tuple[Path, str]]] = {}
        self._tables: dict[str, Table] = {}
        for component in COMPONENTS:
            # one file, or the shards of one; of variants such as `.fp16.` any will do
            for file in sorted((folder / component).glob("*.safetensors")):
                self._index(component, file)
        if not self._tables:
            raise AdapterFileError(f"{folder} is not a diffusers pipeline: no weights of {', '.join(COMPONENTS)} in it")

    def _index(self, component: str, file: Path) -> None:
        for key, info in read_header(file).tensors.items():
            stored, _, kind = key.rpartition(".")
            path = clip_path(stored, nested=True)
            self._found.setdefault((component, path), {})[kind] = file, key
            if kind == "weight":
                self._tables.setdefault(component, {})[path] = info.shape

    @cached_property
    def names(self) -> Names:
        """Its modules, and every name by which a file may call them."""
        return Names(self.model, self._tables)

    def weights(self, component: str, path: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one module, as stored."""
        from safetensors import safe_open

        tensors = {}
        for kind, (file, key) in self._found[component, path].items():
            with safe_open(file, framework="pt") as opened:
                tensors[kind] = opened.get_tensor(key)
        return tensors["weight"], tensors.get("bias")
