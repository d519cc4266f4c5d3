"""What the web process answers over plain HTTP: to nobody, to strangers, to other users, and to many at once."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image
from veneer.studio.jobs import store
from veneer.studio.services import datasets, library

from .serving import PASSWORD, Studio, answer, ask, upload


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Iterator[Studio]:
    """One studio for Ann and Bob."""
    made = Studio(tmp_path_factory.mktemp("http") / "studio", users=("ann", "bob"))
    yield made
    made.close()


@pytest.fixture
def ann(studio) -> Iterator[httpx.Client]:
    with studio.client("ann") as client:
        yield client


@pytest.fixture
def bob(studio) -> Iterator[httpx.Client]:
    with studio.client("bob") as client:
        yield client


@pytest.fixture
def nobody(studio) -> Iterator[httpx.Client]:
    with studio.client() as client:
        yield client


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- nobody and strangers


def test_without_login_there_is_the_login_page_and_nothing_else(nobody):
    front = nobody.get("/")
    assert (front.status_code, front.headers["location"]) == (303, "/login")
    assert nobody.get("/login").status_code == 200
    routes = [
        *("config", "gradio_api/info", "gradio_api/startup-events", "gradio_api/queue/data?session_hash=x"),
        *("files/datasets/0000000000000000/0001.png", "gradio_api/file=/etc/passwd", "docs", "openapi.json"),
        *("gradio_api/heartbeat/x", "assets/none.js", "theme.css", "monitoring", "gradio_api/proxy=http://x"),
    ]
    assert {route: nobody.get(f"/{route}").status_code for route in routes} == dict.fromkeys(routes, 401)
    posts = [
        *("gradio_api/upload", "gradio_api/queue/join", "gradio_api/cancel", "gradio_api/run/predict"),
        *("gradio_api/call/start", "gradio_api/reset", "gradio_api/component_server", "gradio_api/api/predict"),
    ]
    assert {route: nobody.post(f"/{route}", json={}).status_code for route in posts} == dict.fromkeys(posts, 401)


def test_every_answer_has_the_headers_that_keep_strangers_out(ann):
    for route in ("/", "/login", "/config", "/files/datasets/none/x.png", "/nothing"):
        headers = ann.get(route).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}],
    ids=lambda headers: next(iter(headers)),
)
def test_other_sites_cannot_ask_in_a_users_name(ann, headers):
    for route in ("/gradio_api/queue/join", "/gradio_api/upload", "/logout", "/gradio_api/call/start"):
        assert ann.post(route, json={}, headers=headers).status_code == 403


def test_a_name_that_resolves_to_this_machine_is_not_believed(tmp_path):
    """DNS rebinding: without users, only the machine's own names are answered."""
    studio = Studio(tmp_path / "studio")
    try:
        with studio.client() as client:
            assert client.get("/").status_code == 200
            assert client.get("/", headers={"host": f"evil.example:{studio.port}"}).status_code == 403
    finally:
        studio.close()


def test_guessing_is_throttled_and_told(tmp_path):
    studio = Studio(tmp_path / "studio", users=("ann",))
    try:
        with studio.client() as client:
            codes = [client.post("/login", data={"name": "ann", "password": "wrong"}).status_code for _ in range(30)]
            assert codes[:6] == [401] * 6
            assert set(codes[6:]) == {429}
            right = client.post("/login", data={"name": "ann", "password": PASSWORD})
            assert right.status_code == 429
            assert "Wait" in right.text
    finally:
        studio.close()


def test_a_session_is_a_cookie_that_no_script_reads_and_no_restart_ends(tmp_path):
    studio = Studio(tmp_path / "studio", users=("ann",))
    try:
        with studio.client() as client:
            cookie = client.post("/login", data={"name": "ann", "password": PASSWORD}).headers["set-cookie"].lower()
            assert "httponly" in cookie
            assert "samesite=lax" in cookie
            studio.kill()
            studio.start()
            assert client.get("/").status_code == 200
            forged = client.cookies["veneer_session"][:-1] + (
                "0" if client.cookies["veneer_session"][-1] != "0" else "1"
            )
            assert httpx.get(studio.url, cookies={"veneer_session": forged}).status_code == 303
    finally:
        studio.close()


# ---------------------------------------------------------------- other users


def test_nobody_gets_anothers_files(studio, ann, bob, nobody):
    made = datasets.copy_sample(studio.ws, "ann", "robot")
    card = library.list_adapters(studio.ws, "ann")[0]
    routes = [f"/files/datasets/{made.id}/0001.png", f"/files/adapters/{card.id}/preview.png"]
    for route in routes:
        assert ann.get(route).headers["content-type"] == "image/png"
        assert bob.get(route).status_code in (403, 404)
        assert nobody.get(route).status_code == 401
    for escape in (
        "../../../../../users/ann",
        "..%2f..%2f..%2fsecret",
        "%2e%2e/%2e%2e/x.png",
        "dataset.json/../0001.png",
    ):
        answer = bob.get(f"/files/datasets/{made.id}/{escape}")
        assert answer.status_code in (403, 404), escape
    for path in (studio.ws.secret, studio.users, made.folder / "0001.png", Path("/etc/passwd")):
        assert ann.get(f"/gradio_api/file={path}").status_code == 403


def test_nobody_uses_anothers_upload(ann, bob):
    (path,) = upload(ann, ("a.png", png())).json()
    assert ann.get(f"/gradio_api/file={path}").content == png()
    assert bob.get(f"/gradio_api/file={path}").status_code == 403


def test_an_upload_that_is_too_large_is_refused(ann):
    assert upload(ann, ("a.png", bytes(21 * 10**6))).status_code == 413


def test_nobody_touches_anothers_job(studio, ann, bob):
    job = store.submit(studio.ws, "ann", "draw", {"model": "none"})
    for name, *more in (("status",), ("stop", True)):
        kind, said = answer(bob, name, job, *more)
        assert kind == "error"
        assert "somebody else" in said["error"]
    assert ask(ann, "status", job)


# ---------------------------------------------------------------- forged requests


@pytest.fixture
def dataset(studio) -> str:
    return datasets.copy_sample(studio.ws, "ann", "robot").id


FORGED = [
    {"goal": ["subject"]},
    {"goal": None},
    {"method": "pickle"},
    {"method": {"a": 1}},
    {"preset": ["fast"]},
    {"trigger": ""},
    {"trigger": "x" * 10_000},
    {"dataset": "../../../etc"},
    {"dataset": ["a"]},
    {"dataset": None},
    {"model": "/etc"},
    {"model": "http://169.254.169.254/"},
    {"advanced": {"seed": 10**400}},
    {"advanced": {"output_dir": "/tmp/x"}},
    {"advanced": {"max_train_steps": -1}},
    {"advanced": ["a"]},
]


@pytest.mark.parametrize("change", FORGED, ids=lambda change: str(change)[:40])
def test_forged_values_are_refused_in_words_and_start_nothing(studio, ann, dataset, change):
    asked = {"dataset": dataset, "goal": "subject", "trigger": "sks face", "method": "lora", "preset": "fast",
             "model": "embedded", "name": "x", "advanced": {}} | change  # fmt: skip
    before = len(store.everything(studio.ws))
    kind, said = answer(ann, "start", *asked.values())
    assert kind == "error", said
    assert len(store.everything(studio.ws)) == before
    assert "Traceback" not in str(said)


def functions(client: httpx.Client) -> list[int]:
    """Numbers of all functions behind the page, private ones too."""
    return [found["id"] for found in client.get("/config").json()["dependencies"]]


def test_every_function_bears_nonsense(studio, ann):
    """Raw calls of private functions with values that no form sends: an answer each, and the studio still stands."""
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda number: _nonsense(studio, ann.cookies, number), functions(ann)))
    assert max(codes) < 500
    assert ann.get("/").status_code == 200
    assert studio.process.poll() is None


def _nonsense(studio: Studio, cookies: httpx.Cookies, number: int) -> int:
    body = {"fn_index": number, "data": [["a"], None, 10**30, {"x": "../"}], "session_hash": "nonsense"}
    with httpx.Client(base_url=studio.url, cookies=cookies, timeout=30) as client:
        return client.post("/gradio_api/queue/join", json=body).status_code


def test_names_are_shown_as_text(studio, ann):
    card = library.list_adapters(studio.ws, "ann")[0]
    library.rename(studio.ws, "ann", card.id, "<script>alert(1)</script>")
    (found,) = ask(ann, "list_adapters", "alert")
    assert found[0]["name"] == "<script>alert(1)</script>"  # data: whoever shows it escapes it, as the page does
    assert "<script>alert" not in ann.get("/").text


# ---------------------------------------------------------------- many at once


def test_many_starts_at_once_are_all_queued_once(studio, dataset):
    """24 clients of one user: as many jobs as different runs, each with its own place, and a repetition is no new
    one."""

    def start(number: int) -> str:
        with studio.client("ann") as client:
            name = f"run {number % 12}"
            (job,) = ask(client, "start", dataset, "subject", "sks face", "lora", "fast", "embedded", name, {})
            return job

    with ThreadPoolExecutor(24) as pool:
        jobs = list(pool.map(start, range(24)))
    assert len(set(jobs)) == 12
    mine = [job for job in store.list_jobs(studio.ws, "ann") if job.id in jobs]
    places = [job.position for job in mine if job.position is not None]
    assert len(places) >= 11
    assert len(set(places)) == len(places)
    for job in set(jobs):
        store.request(studio.ws, "ann", job, "stop_now")


def test_a_bomb_of_a_picture_leaves_the_memory_alone(studio, ann):
    """13,000 by 13,000 pixels in some kilobytes, through the door that everybody uses."""
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", (13_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    bomb = head + _chunk(b"IDAT", zlib.compress(bytes(10**6))) + _chunk(b"IEND", b"")
    made = datasets.create(studio.ws, "ann", "Bomb")
    before = _memory(studio)
    (path,) = upload(ann, ("a.png", bomb)).json()
    (report,) = datasets.add_files(studio.ws, "ann", made.id, [path])
    assert "megapixels" in report.message
    assert _memory(studio) - before < 100e6


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def _memory(studio: Studio) -> int:
    return int(Path(f"/proc/{studio.process.pid}/statm").read_text().split()[1]) * 4096
