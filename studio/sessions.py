"""What the web framework remembers of each open page: only what its handlers keep.

Gradio copies the whole page's configuration for every session, a megabyte each, so that it could make links to a
page's state. The studio's links name things instead, and its drafts keep what is typed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from gradio import Blocks
from gradio.routes import App
from gradio.state_holder import SessionState, StateHolder


class Session(SessionState):
    """One page's state, without the copy."""

    def __init__(self, blocks: Blocks):
        nothing: Any = SimpleNamespace(default_config=blocks.default_config, blocks={})
        super().__init__(nothing)

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        self.config_values.clear()

    def _update_config(self, key: int) -> None:
        """Nothing is kept that would have to follow."""

    def _update_value_in_config(self, key: int, value: Any) -> None:
        """As above."""


class Sessions(StateHolder):
    def __getitem__(self, session_id: str) -> SessionState:
        if session_id not in self.session_data:
            self.session_data[session_id] = Session(self.blocks)
        return super().__getitem__(session_id)


def keep_little(blocks: Blocks, app: App) -> None:
    """Let `app` remember its pages so."""
    app.state_holder = Sessions()
    app.state_holder.set_blocks(blocks)
