"""A studio in a process of its own, asked over plain HTTP: as browsers and `gradio_client` do, without either."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from veneer.studio.jobs.processes import pid_of, runs
from veneer.studio.users import add_user
from veneer.studio.workspace import Workspace, read_json

PASSWORD = "correct horse"
T = TypeVar("T")


class Studio:
    """`veneer studio` on a free port; `users` may log in with `PASSWORD`."""

    def __init__(self, root: Path, users: tuple[str, ...] = (), port: int = 0, **environment: str):
        self.ws, self.port, self.environment = Workspace(root), port, environment
        self.users = root.parent / f"{root.name}-users.json" if users else None
        for user in users:
            add_user(self.users, user, PASSWORD)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "veneer.cli", "studio", "--data", str(self.ws.root), "--port", str(self.port)]
        command += ["--users", str(self.users)] if self.users else []
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | self.environment
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=os.sep)
        line = self.process.stdout.readline()
        self.port = int(line.partition("http://localhost:")[2].split()[0])
        self.url = f"http://127.0.0.1:{self.port}"
        until(lambda: _answers(self.url), 60, "the studio answers")

    def kill(self) -> None:
        """As a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self._buried()

    def close(self) -> None:
        self.process.terminate()
        self._buried()
        kill_worker(self.ws)

    def _buried(self) -> None:
        self.process.wait(20)
        self.process.stdout.close()

    @contextmanager
    def client(self, user: str | None = None) -> Iterator[httpx.Client]:
        """A browser's session, logged in if `user` is given."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            if user is not None:
                answer = client.post("/login", data={"name": user, "password": PASSWORD})
                assert answer.status_code == 303, answer.text
            yield client


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, name: str, *values: Any) -> list[Any]:
    """Call a public function of the studio; its outputs.

    Raises:
        AssertionError: the studio answers with an error.
    """
    kind, data = answer(client, name, *values)
    assert kind == "complete", data
    return data


def answer(client: httpx.Client, name: str, *values: Any) -> tuple[str, Any]:
    """What a public function comes to: ("complete", outputs) or ("error", what was said)."""
    begun = client.post(f"/gradio_api/call/{name}", json={"data": values})
    if begun.status_code != 200:
        return "error", f"{begun.status_code} {begun.text}"
    kind = ""
    with client.stream("GET", f"/gradio_api/call/{name}/{begun.json()['event_id']}") as lines:
        for line in lines.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: ") and kind in ("complete", "error"):
                return kind, json.loads(line.removeprefix("data: "))
    return "error", "the answer ended early"


def upload(client: httpx.Client, *files: tuple[str, bytes]) -> httpx.Response:
    """Put files into the upload store, as dropping them on the page does."""
    return client.post("/gradio_api/upload", files=[("files", file) for file in files])


def worker(ws: Workspace) -> str | None:
    """The identity of the living worker."""
    known = read_json(ws.workers / "cpu.json")
    return known["process"] if known and runs(known["process"]) else None


def kill_worker(ws: Workspace) -> None:
    process = worker(ws)
    if process is not None:
        os.kill(pid_of(process), signal.SIGKILL)
        until(lambda: not runs(process), 20, "the worker is dead")


def until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Wait for what is true of `condition`.

    Raises:
        AssertionError: it did not become true in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:g} s in vain until {what}")
