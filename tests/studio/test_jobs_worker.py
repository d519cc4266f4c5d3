"""The worker process and its supervisor. The work is a stand-in that needs no torch; `test_runs` trains for real."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from veneer.studio.jobs import states, store, supervisor
from veneer.studio.jobs.processes import pid_of, runs
from veneer.studio.workspace import Workspace, read_json

WORKER = """
import sys, time
from veneer.core.runs.events import Progress
from veneer.studio.jobs import work, worker

def draw(task, warm):
    print("drawing", task.arguments)
    for step in range(task.arguments.get("steps", 0)):
        task.tell(Progress("Pictures", step + 1, task.arguments["steps"]))
        time.sleep(0.05)
        task.check()
    if "deaf" in task.arguments:  # a step that takes for ever, and holds on to life
        import signal
        task.tell(Progress("Deaf", 0, 1))
        if task.arguments["deaf"] == "to SIGTERM":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if "error" in task.arguments:
        raise {"value": ValueError, "bug": KeyError, "memory": MemoryError}[task.arguments["error"]]("the reason")

work.WORK["draw"] = draw
work.Warm.load_libraries = staticmethod(lambda: None)
worker.main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
"""


@pytest.fixture
def start(ws: Workspace, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start workers with the stand-in; whatever lives at the end is killed."""
    script, started = tmp_path / "worker.py", []
    script.write_text(WORKER)

    def start(idle: float = 600) -> subprocess.Popen:
        command = [sys.executable, str(script), str(ws.root), "cpu", str(idle)]
        started.append(subprocess.Popen(command, start_new_session=True))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.wait()


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.02)


def submit(ws, user="ann", **arguments) -> str:
    return store.submit(ws, user, "draw", arguments)


def wait(ws, job: str, *wanted: str) -> store.Job:
    until(lambda: store.load(ws, job).state in wanted)
    return store.load(ws, job)


def test_work_is_done_and_told(ws, start):
    job = submit(ws, steps=3)
    start()
    done = wait(ws, job, "done")
    assert (done.step, done.total) == (3, 3)
    told, _ = store.events(ws, "ann", job)
    assert told == [{"event": "Progress", "stage": "Pictures", "done": i, "total": 3} for i in (1, 2, 3)]
    assert "drawing" in store.log(ws, "ann", job)
    assert done.started <= done.ended


def test_owners_are_served_in_turns_by_one_process(ws, start):
    jobs = {submit(ws, user, number=n): user for n in range(3) for user in ("ann",)} | {
        submit(ws, "bob", number=n): "bob" for n in range(2)
    }
    start()
    start()  # the second finds the device taken and leaves
    for job in jobs:
        wait(ws, job, "done")
    order = sorted(jobs, key=lambda job: store.load(ws, job).started)
    assert [jobs[job] for job in order] == ["ann", "bob", "ann", "bob", "ann"]
    spans = sorted((store.load(ws, job).started, store.load(ws, job).ended) for job in jobs)
    assert all(ended <= began for (_, ended), (began, _) in pairwise(spans))


def test_a_second_worker_leaves_at_once(ws, start):
    first = start()
    until(lambda: supervisor.worker_lives(ws, "cpu"))
    assert start().wait(30) == 0
    assert first.poll() is None


def test_a_worker_without_work_ends(ws, start):
    submit(ws)
    assert start(idle=0.5).wait(30) == 0
    assert not supervisor.worker_lives(ws, "cpu")


def test_stop_ends_work_between_pieces_and_resume_does_it_anew(ws, start):
    job = submit(ws, steps=40)
    start()
    wait(ws, job, "running")
    store.request(ws, "ann", job, "stop")
    stopped = wait(ws, job, "stopped")
    assert stopped.message == "Stopped as asked."
    store.resume(ws, "ann", job)
    assert wait(ws, job, "done").step == 40


@pytest.mark.parametrize(
    ("error", "says", "goes_on"),
    [("value", "the reason", True), ("memory", "not enough memory", False), ("bug", "The log has the details", False)],
)
def test_failures_are_told_in_words_and_the_queue_goes_on(ws, start, error, says, goes_on):
    job = submit(ws, error=error)
    worker = start()
    failed = wait(ws, job, "failed")
    assert says in failed.message
    assert "Traceback" in store.log(ws, "ann", job)
    after = submit(ws, steps=1)
    if not goes_on:  # after what nobody expected, in a fresh process
        worker.wait(30)
        start()
    wait(ws, after, "done")


def test_a_killed_worker_leaves_its_job_interrupted_and_the_rest_waiting(ws, start):
    job, other = submit(ws, steps=600), submit(ws, "bob", steps=1)
    worker = start()
    until(lambda: store.load(ws, job).step > 2)
    worker.kill()  # and it stays a zombie, which is not alive
    wait(ws, job, "interrupted")
    assert store.load(ws, other).state == "queued"
    start()
    wait(ws, other, "done")
    assert store.load(ws, job).state == "interrupted"  # nobody begins again unasked what may have killed it


def test_a_line_cut_by_a_kill_does_not_spoil_the_next(ws, start):
    job = submit(ws, steps=2)
    (ws.job(job) / "events.jsonl").write_text('{"event": "Prog')
    start()
    wait(ws, job, "done")
    told, _ = store.events(ws, "ann", job)
    assert [event["done"] for event in told] == [1, 2]


@pytest.mark.parametrize("deaf", ["yes", "to SIGTERM"])
def test_stop_now_reaches_an_end_by_force(ws, start, deaf, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.4)
    monkeypatch.setattr(supervisor, "FORCE", 0.4)
    job = submit(ws, deaf=deaf)
    worker = start()
    until(lambda: store.load(ws, job).message.startswith("Deaf"))
    store.request(ws, "ann", job, "stop_now")
    assert store.load(ws, job).state == "stopping"
    watch = supervisor.Watch()
    until(lambda: watch.look(ws) or store.load(ws, job).state == "stopped")
    worker.wait(10)
    assert worker.returncode == (-signal.SIGTERM if deaf == "yes" else -signal.SIGKILL)
    store.resume(ws, "ann", job)
    assert store.load(ws, job).state == "queued"


def test_a_halted_worker_is_found_out_and_ended(ws, start, monkeypatch):
    monkeypatch.setattr(states, "FRESH", 2.0)
    monkeypatch.setattr(supervisor, "HUNG", 3 * supervisor.LOOK)
    job = submit(ws, steps=6000)
    worker = start()
    wait(ws, job, "running")
    os.kill(worker.pid, signal.SIGSTOP)
    wait(ws, job, "interrupted")
    watch = supervisor.Watch()
    until(lambda: watch.look(ws) or worker.poll() is not None)
    assert worker.returncode == -signal.SIGKILL
    store.resume(ws, "ann", job)
    assert store.load(ws, job).state == "queued"


def test_a_beating_heart_is_left_alone(ws, start, monkeypatch):
    monkeypatch.setattr(supervisor, "HUNG", 3 * supervisor.LOOK)
    job = submit(ws, steps=6000)
    worker, watch = start(), supervisor.Watch()
    wait(ws, job, "running")
    for _ in range(5):
        watch.look(ws)
        time.sleep(supervisor.LOOK)
    assert worker.poll() is None


def test_a_worker_outlives_whoever_started_it(ws):
    """Killed with its whole process group, as a closed terminal does it."""
    web = "import sys, time\nfrom pathlib import Path\nfrom veneer.studio.jobs import supervisor\n"
    web += "from veneer.studio.workspace import Workspace\n"
    web += (
        "supervisor.ensure_worker(Workspace(Path(sys.argv[1])), 'cpu')\nprint('started', flush=True)\ntime.sleep(600)\n"
    )
    ws.root.mkdir()
    ws.jobs.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", web, str(ws.root)], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    until(lambda: supervisor.worker_lives(ws, "cpu"))
    process = read_json(ws.workers / "cpu.json")["process"]
    try:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        time.sleep(0.5)
        assert runs(process)
    finally:
        os.killpg(pid_of(process), signal.SIGKILL)
        parent.stdout.close()


def test_the_supervisor_starts_a_worker_where_work_waits(ws, monkeypatch):
    started = []
    monkeypatch.setattr(supervisor, "ensure_worker", lambda _ws, on: started.append(on))
    monkeypatch.setattr(supervisor, "LOOK", 0.05)
    watch = supervisor.Supervisor(ws, "cpu")
    watch.start()
    time.sleep(0.3)
    assert started == []
    submit(ws)
    until(lambda: started)
    watch.stop()
    assert set(started) == {"cpu"}


def test_the_jobs_files_need_no_torch_and_no_web():
    """The web process imports all of these; the library names are looked for in a process of their own."""
    names = ["supervisor", "store", "states", "processes", "task", "worker", "work"]
    services = ["runs", "recipes", "estimates", "blending", "drawing", "models", "references"]
    modules = [f"veneer.studio.jobs.{name}" for name in names] + [f"veneer.studio.services.{name}" for name in services]
    code = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'diffusers', 'gradio') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == []
