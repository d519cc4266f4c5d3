"""`veneer studio`: check the settings, then serve. The web framework is imported after them, so that mistakes show at
once."""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import socket
import sys
from pathlib import Path

from .config import StudioConfig, is_loopback
from .errors import StudioError
from .users import Users, add_user
from .workspace import Workspace


def serve(config: StudioConfig) -> None:
    """Serve until interrupted, or add a user."""
    config.check()
    if config.add_user is not None:
        add_user(_users_file(config), config.add_user, _password(config.add_user))
        print(f"{config.add_user} may log in now; start with --users {config.users}")
        return
    users = None if config.users is None else Users(config.users)
    workspace = Workspace(config.data.resolve())
    prepare_environment(workspace)
    try:
        import uvicorn

        from .app import create_app
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in ("gradio", "fastapi", "uvicorn"):
            raise
        raise StudioError('The studio needs Gradio, which is not installed: pip install "veneer[studio]"') from None

    listening = _listen(config)
    app = create_app(workspace, users)
    host, port = ("localhost" if is_loopback(config.host) else config.host), listening.getsockname()[1]
    print(
        f"Veneer Studio: http://{host}:{port}  (data in {workspace.root}; Ctrl+C ends it, trainings go on)", flush=True
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False))
    logging.getLogger("uvicorn.error").addFilter(_is_worth_telling)
    server.run(sockets=[listening])


def prepare_environment(workspace: Workspace) -> None:
    """What the web framework reads from the environment, and reads at import."""
    workspace.temporary.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.temporary / "uploads")
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Not that pages were open when the studio ended."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _listen(config: StudioConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        raise OSError(
            f"cannot listen at {config.host} port {config.port} ({error.strerror}); give another --port"
        ) from None
    return listening


def _users_file(config: StudioConfig) -> Path:
    assert config.users is not None
    config.users.parent.mkdir(parents=True, exist_ok=True)
    return config.users


def _password(name: str) -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    return getpass.getpass(f"Password for {name}: ")
