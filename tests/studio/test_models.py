"""Base models: what may be added, and by whom."""

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from safetensors.numpy import save_file
from veneer.diffusion.demo import MATERIAL
from veneer.studio.errors import NotFound, PermissionDenied, StudioError
from veneer.studio.jobs import store
from veneer.studio.jobs.fetch import needed
from veneer.studio.jobs.states import Record
from veneer.studio.jobs.task import Task
from veneer.studio.jobs.work import WORK, Warm
from veneer.studio.services import models
from veneer.studio.workspace import ME, Workspace


@pytest.fixture
def ws(tmp_path):
    return Workspace(tmp_path / "data")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MATERIAL / "pipeline", tmp_path / "mine")


def test_a_folder_is_added_and_taken_off(ws, folder):
    assert [model.name for model in models.list_models(ws)] == ["embedded"]
    model = models.add(ws, ME, str(folder), "Mine")
    assert models.source_of(ws, model.name) == str(folder)
    with pytest.raises(StudioError, match="already"):
        models.add(ws, ME, str(folder), "Mine")
    models.remove(ws, ME, model.name)
    with pytest.raises(NotFound):
        models.source_of(ws, model.name)
    assert (folder / "model_index.json").exists()


def test_who_logged_in_names_no_folders_of_the_machine(ws, folder):
    with pytest.raises(PermissionDenied, match="whoever runs the studio"):
        models.add(ws, "ann", str(folder))
    with pytest.raises(PermissionDenied):
        models.remove(ws, "ann", "embedded")


@pytest.mark.parametrize("source", ["no/such/folder/here", "", "/"])
def test_what_is_no_model_is_refused_with_a_next_step(ws, source):
    with pytest.raises(StudioError):
        models.add(ws, ME, source)
    assert len(models.list_models(ws)) == 1


# ---------------------------------------------------------------- what has to be fetched first


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that holds the embedded pipeline as `owner/tiny`, and whose cache is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


class Hub(BaseHTTPRequestHandler):
    commit = "0123456789012345678901234567890123456789"

    def do_GET(self):
        if self.path.startswith("/api/models/owner/tiny"):
            files = [path for path in (MATERIAL / "pipeline").rglob("*") if path.is_file()]
            siblings = [
                {"rfilename": path.relative_to(MATERIAL / "pipeline").as_posix(), "size": path.stat().st_size}
                for path in files
            ]
            told = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": self.commit, "siblings": siblings}
            tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": ""} for s in siblings]
            self.answer(json.dumps(tree if "/tree/" in self.path else told).encode())
        else:
            self.do_HEAD()

    def do_HEAD(self):
        _, _, name = self.path.partition("/resolve/")
        path = MATERIAL / "pipeline" / name.partition("/")[2]
        if name and path.is_file():
            self.answer(path.read_bytes())
        else:
            self.send_error(404)

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Nothing on the tests' own output."""


def test_a_hub_id_is_downloaded_by_a_job(ws, hub, monkeypatch):
    """With the network shut for everything but the child that downloads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job = models.begin(ws, ME, "owner/tiny", "Tiny")
    folder = store.load(ws, job).folder
    record = Record.read(folder)
    assert record is not None
    task = Task(ws, store.load(ws, job), "cpu", record)
    with task:
        WORK["fetch"](task, Warm("cpu"))
    told = [event for event in store.events(ws, ME, job)[0] if event["event"] == "Progress"]
    assert told
    assert [model.name for model in models.list_models(ws)] == ["embedded", "Tiny"]


def test_one_file_must_be_a_checkpoint_in_safetensors(ws, tmp_path):
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"\x80\x02")
    with pytest.raises(StudioError, match="can run code"):
        models.begin(ws, ME, str(pickled))
    adapter = MATERIAL / "adapters" / "ink.safetensors"
    with pytest.raises(StudioError, match="imported under Library"):
        models.begin(ws, ME, str(adapter))
    checkpoint = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.x": np.zeros(2, np.float32)}, checkpoint)
    job = store.load(ws, models.begin(ws, ME, str(checkpoint)))
    assert (job.kind, job.arguments["what"], job.arguments["name"]) == ("fetch", "file", "model")


def test_what_a_download_leaves_out():
    names = ["model_index.json", "unet/config.json", "unet/x.safetensors", "unet/x.fp16.safetensors", "unet/x.bin",
             "safety_checker/x.safetensors", "v1.safetensors", "tokenizer/vocab.json", "README.md"]  # fmt: skip
    assert needed(names) == ["model_index.json", "unet/config.json", "unet/x.safetensors", "tokenizer/vocab.json"]
