"""The web application: Gradio's pages behind the gate, the studio's own files, and the worker's supervisor.

It imports no torch. Whatever needs one is a job, done by another process.
"""

from __future__ import annotations

from contextlib import asynccontextmanager

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from gradio.routes import App
from starlette.routing import Mount

from . import files
from .auth import Auth, load_secret
from .gate import Gate, Uploads
from .jobs.supervisor import Supervisor
from .sessions import keep_little
from .users import Users
from .views import style
from .views.page import Page, build
from .workspace import Workspace, new_id

MAX_UPLOAD = "20mb"
"""Of one file, pictures and adapters alike; larger adapters are put into the data folder's `import/`."""


def create_app(workspace: Workspace, users: Users | None = None) -> FastAPI:
    """The whole studio as an ASGI application."""
    workspace.root.mkdir(parents=True, exist_ok=True)
    auth, uploads = Auth(load_secret(workspace.secret), users), Uploads()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan(workspace))
    auth.add_routes(app)
    files.add_routes(app, workspace, auth)

    started = new_id()

    @app.get("/health")
    def health() -> Response:
        return JSONResponse({"ok": True, "started": started})  # open pages see by it that the server is another one

    blocks = build(Page(workspace, uploads, users))
    blocks.state_session_capacity = 1000  # open pages, and calls without one; each holds some ten kilobytes
    blocks.queue(api_open=False, max_size=64)
    app = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth_dependency=auth.owner,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=False,
        theme=style.theme(),
        css=style.CSS,
        head=style.HEAD,
    )
    mounts = (route.app for route in app.routes if isinstance(route, Mount))
    keep_little(blocks, next(mounted for mounted in mounts if isinstance(mounted, App)))
    app.add_middleware(Gate, auth=auth, uploads=uploads)
    return app


def _lifespan(workspace: Workspace):
    @asynccontextmanager
    async def lifespan(_: FastAPI):
        supervisor = Supervisor(workspace)
        supervisor.start()
        try:
            yield
        finally:
            supervisor.stop()

    return lifespan
