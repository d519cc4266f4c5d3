"""How the studio's web process bears many people at once: 50 clients over plain HTTP for a minute.

    python benchmarks/studio_load.py [--clients 50] [--seconds 60] [--json out.json]

The studio runs in a process of its own on an empty data folder, with ten users. Each client logs in and then does, at
random, what a page does: asks how a job stands, lists adapters, uploads a picture, loads the page. Between
requests it waits for a second, as a page's timer does. Reported are the times of answers, whatever was no success,
and the memory of the web process before and after.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from PIL import Image
from veneer.studio.jobs import store
from veneer.studio.users import add_user
from veneer.studio.workspace import Workspace

PASSWORD = "correct horse"
USERS = 10
THINK = 1.0
"""Seconds between a client's requests, on average."""
CLIENT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from studio_load import main_client
main_client(*sys.argv[1:])
"""


@dataclass
class Seen:
    """What a group of clients saw."""

    times: dict[str, list[float]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, action: str, seconds: float, failure: str | None) -> None:
        self.times.setdefault(action, []).append(seconds)
        if failure:
            self.failures[f"{action}: {failure}"] += 1


def call(client: httpx.Client, name: str, *values: object) -> str | None:
    """Ask a public function and wait for its answer; None, or what went wrong."""
    begun = client.post(f"/gradio_api/call/{name}", json={"data": values, "session_hash": str(id(client))})
    if begun.status_code != 200:
        return str(begun.status_code)
    with client.stream("GET", f"/gradio_api/call/{name}/{begun.json()['event_id']}") as answer:
        for line in answer.iter_lines():
            if line == "event: complete":
                return None
            if line == "event: error":
                return "error"
    return "no answer"


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((256, 256), 20 + seed % 80).save(file, "PNG")
    return file.getvalue()


def one(client: httpx.Client, action: str, content: bytes, job: str) -> str | None:
    if action == "page":
        answer = client.get("/")
    elif action == "upload":
        answer = client.post("/gradio_api/upload", files={"files": ("a.png", content)})
    else:
        return call(client, action, job if action == "status" else "")
    return None if answer.status_code == 200 else str(answer.status_code)


ACTIONS = {"status": 6, "list_adapters": 2, "upload": 1, "page": 1}
"""How often each is done, relative to the others."""


def visit(url: str, number: int, until: float, jobs: list[str], seen: Seen) -> None:
    """One client's minute."""
    chance, content = random.Random(number), picture(number)
    with httpx.Client(base_url=url, timeout=30) as client:
        while (answer := client.post("/login", data=_login(number))).status_code == 429:
            time.sleep(1)
        assert answer.status_code == 303, answer.text
        while time.time() < until:
            (action,) = chance.choices(list(ACTIONS), list(ACTIONS.values()))
            began = time.perf_counter()
            try:
                failure = one(client, action, content, jobs[number % USERS])
            except httpx.HTTPError as error:
                failure = type(error).__name__
            seen.add(action, time.perf_counter() - began, failure)
            time.sleep(chance.uniform(0.5, 1.5) * THINK)


def _login(number: int) -> dict[str, str]:
    return {"name": f"user{number % USERS}", "password": PASSWORD}


def main_client(url: str, first: str, count: str, until: str, *jobs: str) -> None:
    """A process of clients; what it saw as JSON."""
    seen = Seen()
    threads = [
        threading.Thread(target=visit, args=(url, int(first) + number, float(until), list(jobs), seen))
        for number in range(int(count))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"times": seen.times, "failures": seen.failures}))


def memory(pid: int) -> float:
    """MB of resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(clients: int, seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        users, data = Path(folder) / "users.json", Path(folder) / "data"
        for number in range(USERS):
            add_user(users, f"user{number}", PASSWORD)
        jobs = [ended_job(Workspace(data), f"user{number}") for number in range(USERS)]
        command = [sys.executable, "-m", "veneer.cli", "studio", "--port", "0", "--data", data, "--users", users]
        studio = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        try:
            url = "http://127.0.0.1:" + studio.stdout.readline().partition("localhost:")[2].split()[0]
            warm_up(url, jobs)
            before = memory(studio.pid)
            found = rush(url, clients, seconds, jobs)
            found["memory_mb"] = {"before": round(before), "after": round(memory(studio.pid))}
            return found
        finally:
            studio.terminate()
            studio.wait()


def ended_job(ws: Workspace, user: str) -> str:
    """A job to ask about, which no worker takes up."""
    job = store.submit(ws, user, "draw", {"cells": []})
    store.request(ws, user, job, "stop")
    return job


def warm_up(url: str, jobs: list[str]) -> None:
    """Every action once by every user, so that libraries are welcomed and caches filled before the clock starts."""
    for number in range(USERS):
        with httpx.Client(base_url=url, timeout=60) as client:
            client.post("/login", data=_login(number))
            for action in ACTIONS:
                one(client, action, picture(number), jobs[number])


def rush(url: str, clients: int, seconds: float, jobs: list[str], processes: int = 2) -> dict[str, object]:
    until, share = time.time() + seconds, clients // processes
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, url, str(index * share), str(share), str(until), *jobs],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    told = [json.loads(child.communicate()[0]) for child in children]
    times = {action: [t for one in told for t in one["times"].get(action, [])] for action in ACTIONS}
    everything = [t for found in times.values() for t in found]
    return {
        "requests": len(everything),
        "requests_per_s": round(len(everything) / seconds, 1),
        "p50_s": round(statistics.median(everything), 3),
        "p95_s": round(statistics.quantiles(everything, n=20)[-1], 3),
        "max_s": round(max(everything), 3),
        "p95_s_by_action": {
            action: round(statistics.quantiles(found, n=20)[-1], 3) for action, found in times.items() if len(found) > 1
        },
        "failures": dict(sum((Counter(one["failures"]) for one in told), Counter())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    found = measure(options.clients, options.seconds)
    found["load_average"] = {"before": round(busy, 1), "after": round(os.getloadavg()[0], 1)}
    found["device"] = f"{platform.machine()}, {os.cpu_count()} CPU cores, clients on the same ones"
    found["date"] = time.strftime("%Y-%m-%d")
    found["clients"], found["seconds"] = options.clients, options.seconds
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
