"""Jobs on the disk: what is stored, what is derived from it, and whose turn it is. No worker takes part."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from veneer.studio.errors import NotFound, PermissionDenied, StudioError
from veneer.studio.jobs import states, store
from veneer.studio.jobs.processes import identity, runs
from veneer.studio.jobs.states import Record
from veneer.studio.jobs.store import Job


def submit(ws, user="ann", number=0, kind="draw") -> str:
    return store.submit(ws, user, kind, {"number": number})


def work_on(ws, job: str, state="running", process: str | None = None) -> None:
    """As a worker would: by default this very process."""
    folder = ws.job(job)
    record = Record.read(folder)
    replace(record, state=state, started=time.time(), process=process or identity(os.getpid())).write(folder)
    states.beat(folder)


def state(ws, job: str) -> str:
    return store.load(ws, job).state


# ---------------------------------------------------------------- processes


def test_a_process_is_known_by_its_start_and_not_by_its_number():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = identity(child.pid)
    assert known is not None
    assert runs(known)
    assert not runs(known.replace(known.split()[1], "1"))  # the same number, used again
    child.kill()
    deadline = time.monotonic() + 10
    while identity(child.pid) is not None:  # a zombie, since nobody has waited for it
        assert time.monotonic() < deadline
    assert not runs(known)
    child.communicate()


# ---------------------------------------------------------------- submit


def test_a_job_waits_in_its_own_folder(ws):
    job = store.load(ws, submit(ws, number=3))
    assert (job.state, job.position, job.arguments, job.owner) == ("queued", 1, {"number": 3}, "ann")
    assert job.out.is_dir()
    assert not list(ws.jobs.glob(".incomplete-*"))


def test_the_same_work_submitted_twice_is_one_job(ws):
    first = submit(ws)
    assert submit(ws) == first
    assert submit(ws, number=1) != first
    assert submit(ws, "bob") != first


def test_a_double_click_is_one_job(ws):
    found = []
    threads = [threading.Thread(target=lambda: found.append(submit(ws))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_work_that_has_ended_can_be_asked_for_again(ws):
    first = submit(ws)
    store.request(ws, "ann", first, "stop")
    assert submit(ws) != first


def test_what_the_work_needs_is_there_when_the_job_appears(ws):
    job = store.submit(ws, "ann", "draw", {}, lambda folder: (folder / "data").mkdir())
    assert (ws.job(job) / "data").is_dir()
    with pytest.raises(OSError, match="broken"):
        store.submit(ws, "ann", "draw", {"other": 1}, _broken)
    assert [found.id for found in store.everything(ws)] == [job]


def _broken(_folder):
    raise OSError("broken")


def test_unknown_kinds_users_and_too_many_are_refused(ws, monkeypatch):
    monkeypatch.setattr(store, "MAX_QUEUED", 2)
    with pytest.raises(StudioError, match="no kind of job"):
        store.submit(ws, "ann", "mine", {})
    with pytest.raises(StudioError, match="name"):
        store.submit(ws, "../ann", "draw", {})
    submit(ws, number=0), submit(ws, number=1)
    with pytest.raises(StudioError, match="waiting"):
        submit(ws, number=2)


# ---------------------------------------------------------------- whose turn it is


def test_owners_take_turns(ws):
    for number in range(3):
        submit(ws, "ann", number)
    submit(ws, "bob", 0), submit(ws, "bob", 1)
    order = [(job.owner, job.arguments["number"]) for job in store.queue(store.everything(ws))]
    assert order == [("ann", 0), ("bob", 0), ("ann", 1), ("bob", 1), ("ann", 2)]


def test_who_is_being_served_comes_last(ws):
    work_on(ws, submit(ws, "ann", 0))
    submit(ws, "ann", 1), submit(ws, "bob", 0)
    assert [job.owner for job in store.queue(store.everything(ws))] == ["bob", "ann"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_every_job_has_one_place_and_no_owner_waits_for_two_of_another(owners):
    jobs = [Job(f"{i}", "draw", owner, "queued", i, i) for i, owner in enumerate(owners)]
    order = store.queue(jobs)
    assert sorted(job.id for job in order) == sorted(job.id for job in jobs)
    for owner in set(owners):
        own = [job.queued for job in order if job.owner == owner]
        assert own == sorted(own)
    for first, second in pairwise(order):
        if first.owner == second.owner:  # nobody else is left
            after = order[order.index(first) :]
            assert {job.owner for job in after} == {first.owner}


# ---------------------------------------------------------------- whose it is


def test_others_see_kind_and_place_and_no_more(ws):
    job = submit(ws, "ann")
    (seen,) = store.list_jobs(ws, "bob")
    assert (seen.kind, seen.position, seen.state) == ("draw", 1, "queued")
    assert (seen.id, seen.owner, seen.arguments, seen.message) == ("", "", {}, "")
    store.request(ws, "ann", job, "stop")
    assert store.list_jobs(ws, "bob") == []  # what has ended is nobody else's business
    assert [found.id for found in store.list_jobs(ws, "ann")] == [job]


@pytest.mark.parametrize(
    "act",
    [
        lambda ws, job: store.request(ws, "bob", job, "stop"),
        lambda ws, job: store.resume(ws, "bob", job),
        lambda ws, job: store.duplicate(ws, "bob", job),
        lambda ws, job: store.delete(ws, "bob", job),
        lambda ws, job: store.events(ws, "bob", job),
        lambda ws, job: store.log(ws, "bob", job),
    ],
)
def test_nobody_touches_what_is_not_theirs(ws, act):
    job = submit(ws, "ann")
    with pytest.raises(PermissionDenied, match="somebody else"):
        act(ws, job)
    assert state(ws, job) == "queued"


@pytest.mark.parametrize("name", ["../../etc", "", None, 3, "0123456789abcdef", ["a"], "0123456789ABCDEF"])
def test_ids_that_are_none(ws, name):
    with pytest.raises(NotFound):
        store.load(ws, name)


# ---------------------------------------------------------------- derived states


@pytest.mark.parametrize("now", ["starting", "running"])
def test_it_runs_while_its_worker_lives_and_its_heart_beats(ws, now, monkeypatch):
    job = submit(ws)
    work_on(ws, job, now)
    assert state(ws, job) == now
    later = time.monotonic() + states.FRESH + 1
    monkeypatch.setattr(states.time, "monotonic", lambda: later)
    assert state(ws, job) == "interrupted"


@pytest.mark.parametrize("now", ["starting", "running"])
def test_it_is_interrupted_when_its_worker_has_died(ws, now):
    job = submit(ws)
    work_on(ws, job, now, process="1 0 another boot")
    found = store.load(ws, job)
    assert found.state == "interrupted"
    assert found.resumable
    assert "Resume" in found.message


@pytest.mark.parametrize("flag", ["stop", "stop_now"])
@pytest.mark.parametrize("now", ["starting", "running"])
def test_stop_ends_in_stopped_whatever_becomes_of_the_worker(ws, flag, now):
    job = submit(ws)
    work_on(ws, job, now)
    store.request(ws, "ann", job, flag)
    assert state(ws, job) == "stopping"
    work_on(ws, job, now, process="1 0 another boot")
    assert state(ws, job) == "stopped"


@pytest.mark.parametrize("flag", ["stop", "stop_now"])
def test_what_waits_is_stopped_at_once_and_can_go_back(ws, flag):
    job = submit(ws)
    store.request(ws, "ann", job, flag)
    assert state(ws, job) == "stopped"
    store.request(ws, "ann", job, flag)  # again changes nothing
    store.resume(ws, "ann", job)
    assert state(ws, job) == "queued"
    store.resume(ws, "ann", job)
    assert store.load(ws, job).position == 1


@pytest.mark.parametrize("ended", ["stopped", "failed", "interrupted"])
def test_resume_forgets_what_was_asked_before(ws, ended):
    job = submit(ws)
    states.mark(states.flag_path(ws.job(job), "stop"))
    replace(Record.read(ws.job(job)), state=ended, step=7, total=9).write(ws.job(job))
    store.resume(ws, "ann", job)
    work_on(ws, job)
    assert state(ws, job) == "running"


def test_what_is_done_is_done(ws):
    job = submit(ws)
    replace(Record.read(ws.job(job)), state="done").write(ws.job(job))
    with pytest.raises(StudioError, match="Duplicate"):
        store.resume(ws, "ann", job)
    store.request(ws, "ann", job, "stop")
    assert state(ws, job) == "done"


def test_only_what_trains_can_sample_and_save(ws):
    job = submit(ws)
    work_on(ws, job)
    for flag in ("sample_now", "save_now"):
        with pytest.raises(StudioError, match="training"):
            store.request(ws, "ann", job, flag)
    with pytest.raises(StudioError, match="cannot be asked"):
        store.request(ws, "ann", job, "../stop")


def test_a_job_whose_worker_hangs_cannot_be_resumed_or_deleted(ws, monkeypatch):
    job = submit(ws)
    work_on(ws, job)
    monkeypatch.setattr(store, "derived", lambda folder, record: "interrupted")
    with pytest.raises(StudioError, match="hangs"):
        store.resume(ws, "ann", job)
    with pytest.raises(StudioError, match="Stop it"):
        store.delete(ws, "ann", job)


def test_delete_removes_what_has_ended(ws):
    job = submit(ws)
    with pytest.raises(StudioError, match="Stop it"):
        store.delete(ws, "ann", job)
    store.request(ws, "ann", job, "stop")
    store.delete(ws, "ann", job)
    with pytest.raises(NotFound):
        store.load(ws, job)
    assert store.list_jobs(ws, "ann") == []


# ---------------------------------------------------------------- events


def test_events_are_told_once_and_whole(ws):
    job = submit(ws)
    path = ws.job(job) / "events.jsonl"
    assert store.events(ws, "ann", job) == ([], 0)
    path.write_text('{"event": "Notice", "message": "one"}\n{"event": "Not')
    told, position = store.events(ws, "ann", job)
    assert [event["message"] for event in told] == ["one"]
    with path.open("a") as file:
        file.write("\n" + json.dumps({"event": "Notice", "message": "two"}) + "\n")  # after a kill in mid-line
    told, end = store.events(ws, "ann", job, position)
    assert [event["message"] for event in told] == ["two"]
    assert store.events(ws, "ann", job, end) == ([], end)
    assert store.events(ws, "ann", job, end + 1000) == ([], end + 1000)
