"""The pages of the studio in a browser: what they keep, what they show, how they are used without a mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from veneer.studio.jobs import store
from veneer.studio.services import datasets, drafts, library
from veneer.studio.workspace import ME

from .browsing import MARKS, TABS, Page, box, chromium, expect, opened, pick, set_fields, tab, visit
from .kills import queue_training
from .serving import Studio, until

pytestmark = MARKS


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    made = Studio(tmp_path_factory.mktemp("browser") / "data")
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with chromium() as made:
        yield made


@pytest.fixture
def told() -> list[str]:
    """What went wrong in the page; empty at the end, or the test fails."""
    return []


@pytest.fixture
def page(browser, told: list[str], request: pytest.FixtureRequest) -> Iterator[Page]:
    with opened(browser, told, **getattr(request, "param", {})) as made:
        yield made
    assert told == []


# ---------------------------------------------------------------- nothing is lost


def test_what_is_typed_survives_reload_and_restart(page, studio, told):
    """The server is killed and comes back: the open page finds it by itself, with what was typed."""
    visit(page, studio, "tab=train")
    box(page, "train-trigger").fill("zyx <b>thing</b>")
    draft = studio.ws.draft(ME, "train")
    until(lambda: draft.exists() and "zyx <b>thing</b>" in draft.read_text(), 60, "the draft is kept")
    page.reload()
    expect(box(page, "train-trigger")).to_have_value("zyx <b>thing</b>")
    page.wait_for_function("window.veneerReady === true")
    page.evaluate("window.before = true")
    studio.kill()
    studio.start()
    page.wait_for_function("window.before === undefined && window.veneerReady === true", timeout=60_000)
    expect(box(page, "train-trigger")).to_have_value("zyx <b>thing</b>")
    told.clear()  # of the connection that was lost


def test_a_late_answer_turns_no_page_back(page, studio):
    job = queue_training(studio.ws, "late")
    store.request(studio.ws, ME, job, "stop")
    until(lambda: not store.load(studio.ws, job).active, 120, "it has stopped")
    visit(page, studio, f"tab=runs&job={job}")
    held: list = []
    join = "**/gradio_api/queue/join*"
    page.route(join, lambda route: held.append(route))
    page.locator("#runs-detail").get_by_role("button", name="Duplicate").click()
    tab(page, "library").click()
    until(lambda: page.wait_for_timeout(50) or len(held) >= 2, 60, "both have been asked for")
    page.unroute(join)  # which lets go whatever is held
    expect(page.get_by_text("Its recipe is in the form.").first).to_be_visible()
    expect(page.locator("#library-cards .card").first).to_be_visible()
    expect(tab(page, "library")).to_have_attribute("aria-selected", "true")
    tab(page, "runs").click()
    page.wait_for_timeout(2000)  # what the tab shows is asked for anew, and would be exchanged under the click
    page.locator("#runs-detail").get_by_role("button", name="Duplicate").click()
    expect(tab(page, "train")).to_have_attribute("aria-selected", "true")


def test_a_tab_is_one_request(page, studio):
    """What a page asks the server for when it opens, and whenever a tab is turned to."""
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if "/gradio_api/" in r.url else None)
    visit(page, studio, "tab=train")
    assert len(asked) <= 8
    for name in TABS[1:]:
        asked.clear()
        tab(page, name).click()
        expect(tab(page, name)).to_have_attribute("aria-selected", "true")
        page.wait_for_timeout(500)  # nothing tells that no more requests come
        assert len(asked) <= 5, asked


# ---------------------------------------------------------------- the forms


def test_back_to_the_preset_undoes_what_was_typed(page, studio):
    drafts.forget(studio.ws, ME, "train")
    visit(page, studio, "tab=train")
    page.locator("#train-samples").get_by_role("button", name="A robot face").click()
    expect(page.locator("#train-cards .card")).to_have_count(8)
    page.locator("#train-advanced > button").click()
    steps = page.locator('#train-form [data-field="max_train_steps"]')
    usual = steps.input_value()
    for typed in ("7", "9"):
        set_fields(page, "#train-form", {"max_train_steps": typed})
        expect(page.locator("#train-review")).to_contain_text(re.compile(rf"Steps\s*{typed}(?!\d)"))
        page.locator("#train-form").get_by_role("button", name="Back to the preset").click()
        expect(steps).to_have_value(usual)
        expect(page.locator("#train-review")).to_contain_text(re.compile(rf"Steps\s*{usual}(?!\d)"))


def test_pictures_are_uploaded_and_the_bad_ones_told(page, studio, photos: list[Path], tmp_path: Path):
    bad = tmp_path / "text.png"
    bad.write_text("no picture")
    visit(page, studio, "tab=train")
    page.locator("#train-new").click()
    expect(box(page, "train-dataset-name")).to_have_value("New data set")
    page.locator("#train-files input[type=file]").set_input_files([*photos, bad])
    expect(page.locator("#train-cards .card")).to_have_count(3)
    expect(page.locator("#train-report")).to_contain_text("text.png")
    page.locator("#train-cards").get_by_role("button", name="Remove disc 0.png").click()
    expect(page.locator("#train-cards .card")).to_have_count(2)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#train-cards .card")).to_have_count(3)


def test_from_the_library_to_blend_and_compare(page, studio):
    robot, ink = (library.list_adapters(studio.ws, ME, name)[0].id for name in ("robot", "ink"))
    for adapter in (robot, ink):
        visit(page, studio, f"tab=library&adapter={adapter}")
        page.locator("#library-detail").get_by_role("button", name="Blend this").click()
        expect(tab(page, "blend")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#blend-adapters")).to_contain_text("Robot")
    expect(page.locator("#blend-adapters")).to_contain_text("Ink")
    expect(page.locator('#blend-kinds [value="svd"]')).to_be_enabled()
    pick(page, "blend-columns-of", "Seed")
    box(page, "blend-columns").fill("0, 1, x")
    page.locator("#blend-grid").click()
    expect(page.get_by_text("is no list of numbers").first).to_be_visible()
    visit(page, studio, f"tab=library&adapter={ink}")
    page.locator("#library-detail").get_by_role("button", name="Compare this").click()
    expect(page.locator("#compare-second input").first).to_have_value("Ink")
    expect(box(page, "compare-prompt")).not_to_have_value("")


def test_what_lies_in_the_import_folder_is_offered(page, studio):
    folder = studio.ws.root / "import" / ME
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "left here.safetensors").write_bytes((library.BUNDLED / "ink.safetensors").read_bytes())
    visit(page, studio, "tab=library")
    page.locator("#library-import > button").click()
    page.get_by_role("button", name="Import left here.safetensors").click()
    expect(page.locator("#library-report")).to_contain_text("imported")
    expect(page.locator("#library-detail h3")).to_be_visible()
    assert not list(folder.iterdir())


def test_a_mistake_is_told_in_plain_words(page, studio):
    visit(page, studio, "tab=system")
    box(page, "system-source").fill("no such model")
    page.locator("#system-add").click()
    expect(page.get_by_text("neither a folder").first).to_be_visible()
    expect(box(page, "system-source")).to_have_value("no such model")
    expect(page.get_by_text("Traceback")).to_have_count(0)


# ---------------------------------------------------------------- everybody can use it

SCREENS = [
    {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    for width in (390, 1280)
    for scheme in ("light", "dark")
]


@pytest.mark.parametrize("page", SCREENS, indirect=True, ids=lambda s: f"{s['viewport']['width']}-{s['color_scheme']}")
def test_every_tab_fits_and_names_its_controls(page, studio):
    if not datasets.list_datasets(studio.ws, ME):
        datasets.copy_sample(studio.ws, ME, "robot")
    visit(page, studio, "tab=train")
    for name in TABS:
        tab(page, name).click()
        expect(tab(page, name)).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("tabpanel").locator("visible=true").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert page.evaluate(_NAMELESS) == []


_NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select')]
  .filter(e => e.checkVisibility() && e.type !== 'hidden' && e.type !== 'file')
  .filter(e => !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.title)
  .filter(e => !(e.labels && e.labels.length))
  .map(e => e.outerHTML.slice(0, 200))"""


def test_the_tabs_are_reached_by_keyboard(page, studio):
    visit(page, studio, "tab=train")
    tab(page, "train").focus()
    for name in TABS[1:]:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(tab(page, name)).to_have_attribute("aria-selected", "true")
