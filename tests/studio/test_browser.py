"""The studio as people use it: Debian's chromium, real jobs on the embedded pipeline."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from veneer.studio.workspace import ME

from .serving import Studio, until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect, Page = playwright.expect, playwright.Page
expect.set_options(timeout=30_000)  # of two busy cores
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore"),
]
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --disable-dev-shm-usage"
TABS = ("train", "runs", "library", "blend", "compare", "system")
SLOW = 120_000
"""Milliseconds that a job may take on a busy machine."""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    made = Studio(tmp_path_factory.mktemp("browser") / "data")
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())


@pytest.fixture
def page(browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of its own context; what it says on its console, or asks of other hosts, fails the test."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 900}}))
    context.set_default_timeout(20_000)
    opened, said = context.new_page(), []
    opened.on("console", lambda line: said.append(line.text) if line.type == "error" and not _left(line.text) else None)
    opened.on("pageerror", lambda error: said.append(str(error)) if not _left(str(error)) else None)
    opened.on("request", lambda asked: said.append(asked.url) if not _ours(asked.url) else None)
    yield opened
    context.close()
    assert said == []


def _left(text: str) -> bool:
    """Whether it is the end of a stream whose page was left."""
    return "abort" in text.lower() or "Failed to fetch" in text or "network error" in text or "errored out" in text


def _ours(url: str) -> bool:
    return re.match(r"(http://(127\.0\.0\.1|localhost):\d+/|data:|blob:)", url) is not None


def visit(page: Page, studio: Studio, query: str) -> None:
    page.goto(f"{studio.url}/?{query}")
    tab = re.search(r"tab=(\w+)", query)
    if tab:
        expect(page.get_by_role("tab", name=tab[1].title(), exact=True)).to_have_attribute("aria-selected", "true")
    expect(page.locator("#train-review p, #train-review dl").first).to_be_attached()  # the form is as it was left


def small_training(page: Page, studio: Studio, name: str, steps: int = 6) -> None:
    """Queue a training of the sample pictures; the page then shows its run."""
    visit(page, studio, "tab=train")
    page.locator("#train-samples").get_by_role("button", name="A robot face").click()
    expect(page.locator("#train-cards .card")).to_have_count(8)
    expect(page.locator("#train-trigger textarea, #train-trigger input")).to_have_value("sks face")
    page.locator("#train-preset").get_by_role("radio", name="Fast").check()
    page.locator("#train-name textarea, #train-name input").fill(name)
    page.locator("#train-advanced > button").click()
    for field, value in {"max_train_steps": steps, "sample_every": 3, "checkpointing_steps": 3, "sample_steps": 2,
                         "num_class_images": 1}.items():  # fmt: skip
        box = page.locator(f'#train-form [data-field="{field}"]')
        box.fill(str(value))
        box.press("Tab")
    expect(page.locator("#train-review")).to_contain_text(re.compile(rf"Steps\s*{steps}(?!\d)"))
    page.locator("#train-start").click()
    expect(page.get_by_role("tab", name="Runs", exact=True)).to_have_attribute("aria-selected", "true")
    expect(page.locator("#runs-detail h3")).to_have_text(name)


def test_train_to_library_to_blend_to_compare(page, studio):
    small_training(page, studio, "tiny robot")
    page.reload()  # in the middle
    expect(page.locator("#runs-detail h3")).to_have_text("tiny robot")
    expect(page.locator("#runs-detail .badge")).to_have_text("done", timeout=SLOW)
    expect(page.locator("#runs-samples img")).to_have_count(9)  # three prompts at steps 0, 3 and 6
    expect(page.locator("#runs-chart canvas, #runs-chart svg").first).to_be_visible()
    page.locator("#runs-name textarea, #runs-name input").fill("my robot")
    page.locator("#runs-keep").click()
    expect(page.locator("#library-detail h3")).to_have_text("my robot")

    visit(page, studio, "tab=blend")
    expect(page.locator("#blend-kinds .kinds label")).to_have_count(14)
    for name in ("my robot", "Ink"):
        page.locator("#blend-adapters input").click()
        page.locator("#blend-adapters input").fill(name)
        page.get_by_role("option", name=re.compile(name)).first.click()
    page.keyboard.press("Escape")
    expect(page.locator('#blend-kinds [value="svd"]')).to_be_enabled()
    page.locator('#blend-kinds [value="svd"]').check()
    page.locator("#blend-grid").click()
    cell = page.get_by_role("button", name="Adopt the weights 0.4, 0.8")
    expect(cell).to_be_visible(timeout=SLOW)
    cell.click()
    expect(page.locator("#blend-weight-1 input[type=number]")).to_have_value("0.4")
    page.locator("#blend-name textarea, #blend-name input").fill("ink robot")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-made")).to_contain_text("ink robot is in the library", timeout=SLOW)

    visit(page, studio, "tab=compare")
    page.locator("#compare-second input").click()
    page.get_by_role("option", name="ink robot").click()
    expect(page.locator("#compare-prompt textarea, #compare-prompt input")).not_to_have_value("")
    page.locator("#compare-start").click()
    slider = page.get_by_role("slider", name=re.compile("From the bare model"))
    expect(slider).to_be_visible(timeout=SLOW)
    slider.press("ArrowRight")
    expect(page.locator(".slide")).to_have_attribute("style", re.compile("51%"))


def test_what_is_typed_survives_a_reload(page, studio):
    visit(page, studio, "tab=train")
    trigger = page.locator("#train-trigger textarea, #train-trigger input")
    trigger.fill("zyx <b>thing</b>")
    draft = studio.ws.draft(ME, "train")
    until(lambda: draft.exists() and "zyx <b>thing</b>" in draft.read_text(), 20, "the draft is kept")
    page.reload()
    expect(trigger).to_have_value("zyx <b>thing</b>")


def test_a_mistake_is_told_in_plain_words(page, studio):
    visit(page, studio, "tab=system")
    page.locator("#system-source textarea, #system-source input").fill("no such model")
    page.locator("#system-add").click()
    expect(page.get_by_text("neither a folder on this machine nor a hub id").first).to_be_visible()
    expect(page.locator("#system-source textarea, #system-source input")).to_have_value("no such model")
    expect(page.get_by_text("Traceback")).to_have_count(0)


SCREENS = [
    {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    for width in (390, 1280)
    for scheme in ("light", "dark")
]


@pytest.mark.parametrize("page", SCREENS, indirect=True, ids=lambda s: f"{s['viewport']['width']}-{s['color_scheme']}")
def test_every_tab_fits_and_names_its_controls(page, studio):
    for tab in TABS:
        visit(page, studio, f"tab={tab}")
        panel = page.get_by_role("tabpanel").locator("visible=true").first
        expect(panel).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert page.evaluate(_NAMELESS) == []


_NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select')]
  .filter(e => e.checkVisibility() && e.type !== 'hidden' && e.type !== 'file')
  .filter(e => !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.title)
  .filter(e => !(e.labels && e.labels.length))
  .map(e => e.outerHTML.slice(0, 200))"""


def test_the_tabs_are_reached_by_keyboard(page, studio):
    visit(page, studio, "tab=train")
    page.get_by_role("tab", name="Train", exact=True).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("tab", name="Runs", exact=True)).to_have_attribute("aria-selected", "true")


def test_pictures_are_uploaded_and_the_bad_ones_told(page, studio, photos: list[Path], tmp_path: Path):
    bad = tmp_path / "text.png"
    bad.write_text("no picture")
    visit(page, studio, "tab=train")
    page.locator("#train-new").click()
    expect(page.locator("#train-dataset-name textarea, #train-dataset-name input")).to_have_value("New data set")
    page.locator("#train-files input[type=file]").set_input_files([*photos, bad])
    expect(page.locator("#train-cards .card")).to_have_count(3)
    expect(page.locator("#train-report")).to_contain_text("text.png")
    page.locator("#train-cards").get_by_role("button", name="Remove disc 0.png").click()
    expect(page.locator("#train-cards .card")).to_have_count(2)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#train-cards .card")).to_have_count(3)
