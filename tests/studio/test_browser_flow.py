"""The whole way in a browser, from an empty data folder: five pictures, a training that is stopped and resumed, the
library, a blend, a comparison, and out to kohya's format and in again. Jobs are real, on the embedded pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from veneer.studio.services import datasets, library, runs
from veneer.studio.workspace import ME

from .browsing import MARKS, SLOW, Locator, Page, box, chromium, expect, opened, pick, set_fields, tab, visit
from .serving import Studio

pytestmark = MARKS
STEPS = 400
"""More than are done before somebody can press Stop."""
QUICK = {"sample_every": 2, "checkpointing_steps": 2, "sample_steps": 1, "train_batch_size": 1, "class_prompt": "",
         "sample_prompts": "a photo of sks face", "unet.rank": 8, "unet.conv": False,
         "unet.feed_forward": False, "text_encoder.method": "none"}  # fmt: skip


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    made = Studio(tmp_path_factory.mktemp("flow") / "data")
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(studio) -> Iterator[Page]:
    told: list[str] = []
    with chromium() as browser, opened(browser, told) as made:
        yield made
    assert told == []


def pictures() -> list[Path]:
    robot = next(sample for sample in datasets.SAMPLES if sample.key == "robot")
    return sorted(robot.folder.glob("*.png"))[:5]


def badge(page: Page) -> Locator:
    return page.locator("#runs-detail .badge")


def test_from_five_pictures_to_a_comparison_and_back_from_kohya(page, studio, tmp_path):
    job = train(page, studio)
    stop_and_resume(page, studio, job)
    keep(page)
    blend(page, studio)
    compare(page)
    export_and_import(page, studio, tmp_path)


def train(page: Page, studio: Studio) -> str:
    visit(page, studio, "tab=train")
    page.locator("#train-files input[type=file]").set_input_files(pictures())
    expect(page.locator("#train-cards .card")).to_have_count(5)
    page.locator("#train-cards textarea").first.fill("a photo of sks face in front of white")
    page.locator("#train-preset").get_by_role("radio", name="Fast").check()
    box(page, "train-trigger").fill("sks face")
    box(page, "train-name").fill("my robot")
    page.locator("#train-advanced > button").click()
    set_fields(page, "#train-form", {**QUICK, "max_train_steps": STEPS})
    expect(page.locator("#train-review")).to_contain_text(re.compile(rf"Steps\s*{STEPS}"))
    page.locator("#train-start").click()
    expect(page.get_by_text("In the queue.").first).to_be_visible()
    expect(tab(page, "runs")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#runs-detail h3")).to_have_text("my robot")
    return page.evaluate("new URL(location).searchParams.get('job')")


def stop_and_resume(page: Page, studio: Studio, job: str) -> None:
    """Samples change as it learns; stopped it is saved, and resumed it goes on from there."""
    images = page.locator("#runs-samples img")
    expect(images.nth(2)).to_be_visible(timeout=SLOW)  # steps 0, 2 and 4
    page.reload()  # in the middle
    expect(images.nth(2)).to_be_visible()
    page.locator("#runs-detail").get_by_role("button", name="Stop and save").click()
    expect(badge(page)).to_have_text("stopped", timeout=SLOW)
    before = runs.progress(studio.ws, ME, job)
    drawn = [path.read_bytes() for path in before.samples[0].pictures if path]
    assert len(set(drawn)) == len(drawn) >= 3
    assert before.checkpoints[-1] == before.job.step < STEPS
    page.locator("#runs-detail").get_by_role("button", name="Resume").click()
    expect(images.nth(len(drawn))).to_be_visible(timeout=SLOW)
    page.locator("#runs-detail").get_by_role("button", name="Stop and save").click()
    expect(badge(page)).to_have_text("stopped", timeout=SLOW)
    after = runs.progress(studio.ws, ME, job)
    assert [point.step for point in after.points] == list(range(1, after.job.step + 1))
    assert after.job.step > before.job.step
    expect(page.locator("#runs-chart canvas, #runs-chart svg").first).to_be_visible()


def keep(page: Page) -> None:
    box(page, "runs-name").fill("kept robot")
    page.locator("#runs-keep").click()
    expect(tab(page, "library")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#library-detail h3")).to_have_text("kept robot")


def blend(page: Page, studio: Studio) -> None:
    """With the bundled style: a grid by svd, another by TIES, and the weights of a cell."""
    page.locator("#library-detail").get_by_role("button", name="Blend this").click()
    expect(tab(page, "blend")).to_have_attribute("aria-selected", "true")
    pick(page, "blend-adapters", "Ink")
    page.keyboard.press("Escape")
    box(page, "blend-rows").fill("0.4, 0.8")
    box(page, "blend-columns").fill("0.6")
    for kind in ("svd", "ties_svd"):
        expect(page.locator(f'#blend-kinds [value="{kind}"]')).to_be_enabled()
        page.locator(f'#blend-kinds [value="{kind}"]').check()
        expect(page.locator("#blend-kinds .fields")).to_contain_text("Density" if kind == "ties_svd" else "Rank")
        page.locator("#blend-grid").click()
        if kind == "ties_svd":  # the grid before this one is still shown until the new job is asked for
            expect(page.locator("#blend-table .pending").first).to_be_visible()
        expect(page.locator("#blend-table img")).to_have_count(5, timeout=SLOW)
    page.get_by_role("button", name="Adopt the weights 0.4, 0.6").click()
    expect(page.locator("#blend-weight-1 input[type=number]")).to_have_value("0.4")
    expect(page.locator("#blend-weight-2 input[type=number]")).to_have_value("0.6")
    box(page, "blend-name").fill("ink robot")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-made")).to_contain_text("ink robot is in the library", timeout=SLOW)
    made = library.list_adapters(studio.ws, ME, "ink robot")[0]
    assert made.recipe["combination_type"] == "ties_svd"
    assert list(made.recipe["blend"].values()) == [0.4, 0.6]
    page.locator("#blend-made").get_by_role("button", name="Show it").click()
    expect(page.locator("#library-detail h3")).to_have_text("ink robot")


def compare(page: Page) -> None:
    page.locator("#library-detail").get_by_role("button", name="Compare this").click()
    expect(page.locator("#compare-second input").first).to_have_value("ink robot")
    expect(box(page, "compare-prompt")).not_to_have_value("")
    page.locator("#compare-start").click()
    slider = page.get_by_role("slider", name=re.compile("From the bare model"))
    expect(slider).to_be_visible(timeout=SLOW)
    slider.press("ArrowRight")
    expect(page.locator(".slide")).to_have_attribute("style", re.compile("51%"))


def export_and_import(page: Page, studio: Studio, folder: Path) -> None:
    tab(page, "library").click()
    page.locator("#library-cards").get_by_role("button", name="kept robot").click()
    expect(page.locator("#library-detail h3")).to_have_text("kept robot")
    page.locator("#library-export").click()  # kohya is what stands there first
    with page.expect_download(timeout=SLOW) as download:
        page.locator("#library-export-result a").click(timeout=SLOW)
    file = folder / "from kohya.safetensors"
    download.value.save_as(file)
    page.locator("#library-import > button").click()
    page.locator("#library-files input[type=file]").set_input_files(file)
    expect(page.locator("#library-report")).to_contain_text("imported: kohya")
    first, again = (library.list_adapters(studio.ws, ME, name)[0] for name in ("kept robot", "from kohya"))
    assert (again.method, again.rank) == (first.method, first.rank)
    expect(page).to_have_url(re.compile(again.id))
