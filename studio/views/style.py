"""How the studio looks: one accent on neutral grey, the system's own fonts, light and dark as the system is set."""

from __future__ import annotations

from pathlib import Path

from gradio.themes import Base, Default
from gradio.themes.utils import colors, sizes

CSS = Path(__file__).with_name("studio.css").read_text(encoding="utf-8")
HEAD = '<meta name="color-scheme" content="light dark"><meta name="referrer" content="same-origin">'
_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Base:
    made = Default(
        primary_hue=colors.teal,
        secondary_hue=colors.teal,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_lg,
        spacing_size=sizes.spacing_md,
        font=_SANS,
        font_mono=_MONO,
    )
    return made.set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#12161c",
        background_fill_primary_dark="#1a2029",
        background_fill_secondary_dark="#161b23",
        block_background_fill="white",
        block_background_fill_dark="#1a2029",
        block_border_color="#e1e5ea",
        block_border_color_dark="#2c3541",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_shadow="none",
        block_title_text_weight="600",
        border_color_primary="#e1e5ea",
        border_color_primary_dark="#2c3541",
        input_background_fill_dark="#12161c",
        input_border_color="#b6bfca",
        input_border_color_dark="#465160",
        body_text_color_subdued="#5b6675",
        body_text_color_subdued_dark="#a3adba",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#0d9488",
        button_primary_text_color="white",
        button_cancel_background_fill="#fff1f1",
        button_cancel_background_fill_dark="#3b1a1d",
        button_cancel_background_fill_hover="#ffdfdf",
        button_cancel_background_fill_hover_dark="#54242a",
        button_cancel_text_color="#a01b1b",
        button_cancel_text_color_dark="#fecaca",
    )
