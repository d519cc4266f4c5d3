"""Debian's chromium on a studio: pages, and what tests do with them again and again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .serving import Studio

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect, Page, Locator = playwright.expect, playwright.Page, playwright.Locator
expect.set_options(timeout=60_000)  # of two cores that other work keeps busy
CHROMIUM = shutil.which("chromium")
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --disable-dev-shm-usage"
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore"),
]
TABS = ("train", "runs", "library", "blend", "compare", "system")
DESK = {"viewport": {"width": 1280, "height": 900}}
SLOW = 180_000
"""Milliseconds that a job may take on a busy machine."""


@contextmanager
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, told: list[str], **context: Any) -> Iterator[Page]:
    """A page of its own context; what it says on its console, or asks of other hosts, goes into `told`."""
    made = browser.new_context(**(DESK | context))
    made.set_default_timeout(60_000)
    page = made.new_page()
    page.on("console", lambda line: _note(told, line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: _note(told, str(error)))
    page.on("request", lambda asked: told.append(asked.url) if not _ours(asked.url) else None)
    yield page
    made.close()


def _note(told: list[str], text: str) -> None:
    """Not the end of a stream whose page was left."""
    left = ("abort", "failed to fetch", "network error", "errored out")
    if not any(words in text.lower() for words in left):
        told.append(text)


def _ours(url: str) -> bool:
    return re.match(r"(http://(127\.0\.0\.1|localhost):\d+/|data:|blob:)", url) is not None


def visit(page: Page, studio: Studio, query: str) -> None:
    """Open the studio, and wait until the asked tab shows what it holds."""
    page.goto(f"{studio.url}/?{query}")
    page.wait_for_function("window.veneerReady === true")
    asked = re.search(r"tab=(\w+)", query)
    expect(tab(page, asked[1] if asked else "train")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#train-review p, #train-review dl").first).to_be_attached()  # the form is as it was left


def tab(page: Page, name: str) -> Locator:
    return page.get_by_role("tab", name=name.title(), exact=True)


def box(page: Page, name: str) -> Locator:
    """The input of a text field."""
    return page.locator(f"#{name} textarea, #{name} input").first


def set_fields(page: Page, form: str, values: dict[str, Any]) -> None:
    """Fill in fields of a form that we draw ourselves."""
    for name, value in values.items():
        field = page.locator(f'{form} [data-field="{name}"]')
        if isinstance(value, bool):
            field.set_checked(value)
        elif field.evaluate("e => e.tagName") == "SELECT":
            field.select_option(str(value))
        else:
            field.fill(str(value))
            field.press("Tab")


def pick(page: Page, dropdown: str, name: str) -> None:
    """Choose an entry of a dropdown by what it shows."""
    entry = page.locator(f"#{dropdown} input").first
    entry.click()
    entry.fill(name)
    page.get_by_role("option", name=re.compile(name)).first.click()
