"""Takes the pictures of `docs/studio.md`: a studio on a fresh folder with sample content, every tab in light and dark.

    python -m tests.studio.screenshots [--out docs/studio] [--data DIR]

Trains the bundled robot for real, so that it takes a few minutes. With `--data` the content is kept and used again.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from veneer.studio.jobs import store
from veneer.studio.services import datasets, library, runs
from veneer.studio.workspace import ME, Workspace

from .serving import Studio, until

TABS = ("train", "runs", "library", "blend", "compare", "system")
CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
TALLEST = 1600
"""Pixels of a picture's height at most: what matters is at the top."""


def fill(ws: Workspace) -> str:
    """A finished training in the library, and another one stopped half-way; the first one's id."""
    robot = datasets.copy_sample(ws, ME, "robot")
    recipe = {"goal": robot.goal, "trigger": robot.trigger, "method": "lora", "preset": "fast", "name": "Robot"}
    job = runs.start_training(ws, ME, robot.id, recipe)
    until(lambda: not store.load(ws, job).active, 600, "the training has ended")
    assert store.load(ws, job).state == "done", store.load(ws, job).message
    runs.add_to_library(ws, ME, job, name="Robot, trained here")
    library.set_tags(ws, ME, library.list_adapters(ws, ME, "ink")[0].id, ["style", "drawing"])
    return job


def newest(ws: Workspace) -> str:
    return next(job.id for job in store.list_jobs(ws, ME) if job.kind == "train")


def take(browser: Browser, url: str, tab: str, theme: str, job: str, out: Path) -> None:
    """One tab as people see it."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=theme)
    page.goto(f"{url}/?tab={tab}&job={job if tab == 'runs' else ''}&__theme={theme}")
    expect(page.get_by_role("tab", name=tab.capitalize(), exact=True)).to_have_attribute(
        "aria-selected", "true", timeout=30_000
    )
    page.wait_for_timeout(2500)  # pictures and charts have no common sign of being there
    save(page, out / f"{tab}-{theme}.png")
    page.close()


def save(page: Page, path: Path) -> None:
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image = image.crop((0, 0, image.width, min(image.height, TALLEST)))
    image.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/studio"))
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        studio = Studio((options.data or Path(folder) / "studio").resolve())
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            job = newest(studio.ws) if any(studio.ws.jobs.glob("*/spec.json")) else fill(studio.ws)
            for tab in TABS:
                for theme in ("light", "dark"):
                    take(browser, studio.url, tab, theme, job, options.out)
        finally:
            browser.close()
            studio.close()


if __name__ == "__main__":
    main()
