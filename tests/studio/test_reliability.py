"""Killing things: whatever dies, and whenever, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from veneer.core.files import read_tensors
from veneer.studio.jobs import store
from veneer.studio.jobs.supervisor import ensure_worker
from veneer.studio.workspace import Workspace

from .serving import Studio, kill_worker, until, worker

KILLS = int(os.environ.get("VENEER_KILLS", "3"))
"""How often the worker is killed in one training, and the server in another; 20 takes five minutes."""


@pytest.fixture
def workers(ws, monkeypatch):
    """Workers for the workspace; none outlives the test."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield lambda: ensure_worker(ws, "cpu")
    kill_worker(ws)


def state(ws: Workspace, job: str) -> str:
    return store.load(ws, job).state


def made(out: Path) -> dict[str, bytes]:
    """What a finished run leaves that does not tell the time: every number of its adapter, and its samples."""
    numbers = {
        f"{path.relative_to(out)}:{name}": tensor.numpy().tobytes()
        for path in (*out.glob("*/adapter_model.safetensors"), *out.glob("*.safetensors"))
        for name, tensor in read_tensors(path).items()
    }
    return numbers | {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("samples/step-*/*.png")}


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def finish(ws: Workspace, job: str, seconds: float = 120) -> None:
    until(lambda: not store.load(ws, job).active, seconds, "the job has ended")
    assert state(ws, job) == "done", store.load(ws, job).message


def test_a_worker_that_is_killed_at_any_moment_loses_nothing(ws, workers, small_run):
    calm = small_run(ws, name="calm")
    workers()
    finish(ws, calm)
    chance = random.Random(KILLS)
    shaken = small_run(ws, name="shaken", max_train_steps=12)
    for _ in range(KILLS):
        workers()
        until(lambda: state(ws, shaken) not in ("queued", "starting", "interrupted"), 60, "it runs")
        time.sleep(chance.uniform(0, 2.0))
        kill_worker(ws)
        if state(ws, shaken) == "done":
            break
        died = time.monotonic()
        until(lambda: state(ws, shaken) == "interrupted", 15, "the death is noticed")
        assert time.monotonic() - died < 15
        store.resume(ws, "me", shaken)
    workers()
    finish(ws, shaken)
    first, second = (store.load(ws, job).out for job in (calm, shaken))
    assert steps(second) == steps(first) == list(range(1, 13))
    assert made(second) == made(first)
    assert not list(second.rglob(".incomplete-*"))


def test_a_training_outlives_the_server(tmp_path, small_run):
    studio = Studio(tmp_path / "studio")
    try:
        job = small_run(studio.ws, max_train_steps=40)
        for _ in range(KILLS):
            until(lambda: state(studio.ws, job) != "queued", 60, "it is begun")
            before = worker(studio.ws)
            studio.kill()
            studio.start()
            assert worker(studio.ws) == before
        finish(studio.ws, job)
        assert steps(store.load(studio.ws, job).out) == list(range(1, 41))
    finally:
        studio.close()


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
            finish(studio.ws, small_run(studio.ws, max_train_steps=2))
            probe = "import socket; s = socket.socket(); s.connect_ex(('127.0.0.1', 9))"
            subprocess.run([sys.executable, "-c", probe], env={"PYTHONPATH": path, "HEARD": str(heard)}, check=True)
        lines = heard.read_text().splitlines()
    finally:
        studio.close()
    assert any("'127.0.0.1', 9" in line for line in lines)  # the hook hears
    local = ("127.0.0.1", "localhost", "::1", "/")
    assert not [line for line in lines if not line.split(" ", 2)[2].lstrip("(b").strip("'\"").startswith(local)]


def test_the_web_process_never_imports_torch(tmp_path):
    """Not when it starts, and not when every public function and the page have been asked."""
    studio = Studio(tmp_path / "studio")
    try:
        with studio.client() as client:
            client.get("/")
            client.get("/gradio_api/info")
        maps = Path(f"/proc/{studio.process.pid}/maps").read_text()
    finally:
        studio.close()
    assert "libtorch" not in maps
