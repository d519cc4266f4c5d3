"""Fetches a base model, in a process of its own that may use the network and that can be ended at any moment:

    python -m veneer.studio.jobs.fetch hub OWNER/NAME
    python -m veneer.studio.jobs.fetch file CHECKPOINT.safetensors FOLDER

A hub repository goes into the machine's cache. A checkpoint in one file becomes a diffusers folder; tokenizer and
settings, which it lacks, are a few megabytes from the hub. It prints a line of JSON as it goes: `{"done", "total"}` in
megabytes, or `{"failed"}` in words.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..safety import MB, folder_size

EVERY = 1.0
"""Seconds between lines."""
_UNUSED = ("safety_checker",)
_ENDINGS = (".json", ".txt", ".model", ".safetensors")


def needed(names: Iterable[str]) -> list[str]:
    """The files of a repository that a pipeline is loaded from: no variants, no pickles, no single-file copies."""
    found = []
    for name in names:
        path = PurePosixPath(name)
        variant = path.suffix == ".safetensors" and any(f".{v}." in path.name for v in ("fp16", "non_ema", "bf16"))
        part = len(path.parts) == 2 and path.parts[0] not in _UNUSED and path.suffix in _ENDINGS and not variant
        if part or name == "model_index.json":
            found.append(name)
    return found


def download(repository: str) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    files = {
        file.rfilename: file.size or 0 for file in HfApi().model_info(repository, files_metadata=True).siblings or ()
    }
    wanted = needed(files)
    if "model_index.json" not in wanted:
        raise ValueError(f"{repository} holds no diffusers pipeline: there is no model_index.json in it")
    blobs = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs"
    total = sum(files[name] for name in wanted)
    with telling(lambda: min(folder_size(blobs), total) if blobs.is_dir() else 0, total):
        snapshot_download(repository, allow_patterns=wanted)


def convert(checkpoint: str, folder: str) -> None:
    from diffusers import StableDiffusionPipeline

    with telling(lambda: folder_size(Path(folder)) if Path(folder).is_dir() else 0, Path(checkpoint).stat().st_size):
        pipe = StableDiffusionPipeline.from_single_file(checkpoint, safety_checker=None)
        pipe.save_pretrained(folder)


@contextmanager
def telling(done: Callable[[], int], total: int):
    """Print how far the work inside has come, again and again."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(EVERY):
            say(done=done() // MB, total=max(1, total // MB))

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def say(**told: object) -> None:
    print(json.dumps(told), flush=True)


def main(what: str, *arguments: str) -> None:
    try:
        {"hub": download, "file": convert}[what](*arguments)
    except Exception as error:
        say(failed=" ".join(str(error).split())[:600])
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
