"""A local HTTP server that speaks the file routes of the hub: what `huggingface_hub` asks for to read and to push."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

TOKEN = "hf_secret"
Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its files by revision."""

    revisions: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    private: bool = False

    def sha(self, revision: str) -> str:
        listing = json.dumps({k: hashlib.sha1(v).hexdigest() for k, v in sorted(self.revisions[revision].items())})
        return hashlib.sha1(listing.encode()).hexdigest()

    def resolve(self, revision: str) -> str | None:
        """The branch that a revision means: its name or its commit."""
        return next((name for name in self.revisions if revision in (name, self.sha(name))), None)


class Hub(ThreadingHTTPServer):
    """Listens on a free port until `close`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: Files = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def publish(self, repo_id: str, directory: Path, revision: str = "main", private: bool = False) -> None:
        repo = self.repos.setdefault(repo_id, Repo(private=private))
        paths = (p for p in directory.rglob("*") if p.is_file())
        repo.revisions[revision] = {str(p.relative_to(directory)): p.read_bytes() for p in paths}

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Requests are in `asked`, not on stderr."""

    def do_HEAD(self) -> None:
        self.answer_get()

    def do_GET(self) -> None:
        self.answer_get()

    def answer_get(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if len(parts) > 4 and parts[2] == "resolve":
            self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif path.startswith("/api/models/"):
            self.send_info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main", tree="tree" in parts)
        else:
            self.send(404, {"error": "no such route"})

    def find(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        """Repository and branch, or None after an answer that says what is wrong, as the hub says it."""
        repo = self.server.repos.get(repo_id)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            self.send(404 if allowed else 401, {"error": "Repository not found"}, error="RepoNotFound")
            return None
        branch = repo.resolve(revision)
        if branch is None:
            self.send(404, {"error": f"Invalid rev id: {revision}"}, error="RevisionNotFound")
            return None
        return repo, branch

    def send_file(self, repo_id: str, revision: str, path: str) -> None:
        found = self.find(repo_id, revision)
        if found is None:
            return
        repo, branch = found
        commit = {"X-Repo-Commit": repo.sha(branch)}
        data = repo.revisions[branch].get(path)
        if data is None:
            self.send(404, {"error": "Entry not found"}, error="EntryNotFound", headers=commit)
        else:
            self.send(200, data, headers=commit | {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def send_info(self, repo_id: str, revision: str, tree: bool) -> None:
        found = self.find(repo_id, revision)
        if found is None:
            return
        repo, branch = found
        files = repo.revisions[branch]
        if tree:
            listing = [
                {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                for k, v in files.items()
            ]
            self.send(200, listing)
        else:
            siblings = [{"rfilename": name} for name in files]
            self.send(200, {"id": repo_id, "sha": repo.sha(branch), "private": repo.private, "siblings": siblings})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.send(200, {})

    def do_POST(self) -> None:
        path, body = unquote(self.path.partition("?")[0]), self.body()
        self.server.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self.accept_objects(json.loads(body))
        else:
            _, _, _, space, name, action, *rest = path.split("/")
            self.change(f"{space}/{name}", action, "/".join(rest), body)

    def create(self, asked: dict) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        answer = {"url": f"{self.server.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in self.server.repos:
            self.send(409, {"error": "You already created this model repo"} | answer)
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repos[repo_id] = Repo(private=bool(private))
            self.send(200, answer)

    def accept_objects(self, asked: dict) -> None:
        href = f"{self.server.url}/lfs/"
        objects = [o | {"actions": {"upload": {"href": href + o["oid"]}}} for o in asked["objects"]]
        self.send(200, {"transfer": "basic", "objects": objects})

    def change(self, repo_id: str, action: str, revision: str, body: bytes) -> None:
        repo = self.server.repos[repo_id]
        if action == "branch":
            exists = revision in repo.revisions
            repo.revisions.setdefault(revision, dict(repo.revisions["main"]))
            self.send(409 if exists else 200, {"error": "Reference already exists"} if exists else {})
        elif action == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            self.send(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        else:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo.revisions[revision][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo.revisions[revision][value["path"]] = self.server.objects[value["oid"]]
            sha = repo.sha(revision)
            self.send(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(
        self, status: int, content: bytes | dict | list, error: str = "", headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (({"X-Error-Code": error} if error else {}) | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
