"""Killing things: whatever dies, and whenever, nothing is lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .kills import finished, shake
from .serving import Studio

KILLS = 3
"""`python -m tests.studio.kills --kills 20` does the same more often."""


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    made = Studio(tmp_path / "studio")
    yield made
    made.close()


def test_worker_and_server_may_be_killed_at_any_moment(studio):
    """Nothing is lost: each step once, tensors and samples as of a training that nobody disturbed."""
    told = shake(studio, KILLS, random.Random(3))
    assert told["worker"] + told["server"] == KILLS


AUDIT = """
import os, socket, sys
def heard(event, values):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        address = values[1] if event != "socket.getaddrinfo" else values[0]
        with open(os.environ["HEARD"], "a") as file:
            file.write(f"{os.getpid()} {event} {address!r}\\n")
sys.addaudithook(heard)
"""


def test_nothing_leaves_the_machine(tmp_path, small_run):
    """From the start of the server to a finished training, with hooks in both processes."""
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(AUDIT)
    path = os.pathsep.join([str(tmp_path / "hooks"), os.environ.get("PYTHONPATH", "")])
    heard = tmp_path / "heard"
    studio = Studio(tmp_path / "studio", PYTHONPATH=path, HEARD=str(heard))
    try:
        with studio.client() as client:
            assert client.get("/").status_code == 200
            finished(studio, small_run(studio.ws, max_train_steps=2))
            probe = "import socket; s = socket.socket(); s.connect_ex(('127.0.0.1', 9))"
            subprocess.run([sys.executable, "-c", probe], env={"PYTHONPATH": path, "HEARD": str(heard)}, check=True)
        lines = heard.read_text().splitlines()
    finally:
        studio.close()
    assert any("'127.0.0.1', 9" in line for line in lines)  # the hook hears
    local = ("127.0.0.1", "localhost", "::1", "/")
    assert not [line for line in lines if not line.split(" ", 2)[2].lstrip("(b").strip("'\"").startswith(local)]


def test_the_web_process_never_imports_torch(studio):
    """Not when it starts, and not when the page and the public functions' descriptions have been asked for."""
    with studio.client() as client:
        client.get("/")
        client.get("/gradio_api/info")
    assert "libtorch" not in Path(f"/proc/{studio.process.pid}/maps").read_text()
