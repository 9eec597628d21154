"""The playground as a person uses it, in Chromium.

With PLAYGROUND_SCREENSHOT=1 the last test writes docs/images/playground.png.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compactor_vllm import LLMConfig
from compactor_vllm.server.keys import KeyRing
from compactor_vllm.server.settings import ServerSettings
from tests.server.conftest import Live, wait_until

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOT = Path(__file__).parents[2] / "docs" / "images" / "playground.png"
DOCUMENT = "The boat by the river is green. Nothing of note was entered on this day. " * 5
Page = Any

CONTRASTS = """() => {
  const channels = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number).slice(0, 3);
    return text.startsWith("color(") ? numbers : numbers.map((number) => number / 255);
  };
  const luminance = (text) => {
    const [r, g, b] = channels(text).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const found = { paper: luminance(paper) };
  for (const element of document.querySelectorAll("#tokens span, .help, dt, dd, h1, label, button:enabled")) {
    let behind = element;
    const clear = () => getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)";
    while (behind && clear()) behind = behind.parentElement;
    const pair = [element, behind ?? document.body].map((one, i) =>
      luminance(getComputedStyle(one)[i ? "backgroundColor" : "color"]));
    const name = element.id.startsWith("token") ? element.className : element.tagName;
    found[name] = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  }
  return found;
}"""
"""Contrast of each kind of text, and the luminance of the page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@pytest.fixture(scope="module")
def tiny(make_config: Callable[..., LLMConfig]) -> Iterator[Live]:
    live = Live(make_config(), ServerSettings(model_names=("tiny",)))
    yield live
    live.stop()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page that fails the test for whatever its console calls an error."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    yield opened
    opened.close()
    assert [error for error in errors if "Failed to load resource" not in error] == []


def open_page(page: Page, live: Live) -> None:
    page.goto(live.url)
    expect(page.locator("#model")).to_contain_text("tiny")


def fill(page: Page, document: str = DOCUMENT, ratio: int = 25, length: int = 12) -> None:
    page.get_by_label("Document", exact=True).fill(document)
    page.get_by_label("Question", exact=True).fill("What colour is the boat?")
    page.get_by_label("Kept:").fill(str(ratio))
    page.get_by_label("Longest answer").fill(str(length))


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#status")).to_have_text("Done.", timeout=120_000)


def shades(page: Page) -> list[int]:
    """For each token how many pairs kept it, as the page shows it."""
    counts: list[int] = page.evaluate("[...document.querySelectorAll('#tokens span')].map((s) => +s.dataset.count)")
    return counts


def test_two_answers_stream_with_their_numbers(page: Page, tiny: Live) -> None:
    open_page(page, tiny)
    fill(page, length=300)
    page.get_by_role("button", name="Ask").click()
    seen: dict[str, set[int]] = {"compressed": set(), "full": set()}
    while page.locator("#status").inner_text() != "Done.":
        for side, lengths in seen.items():
            lengths.add(len(page.locator(f"#{side} .answer").inner_text()))
    assert all(len(lengths) > 3 for lengths in seen.values()), seen
    for side, percent in (("compressed", range(20, 90)), ("full", range(100, 101))):
        part = page.locator(f"#{side}")
        assert "s" in part.locator(".ttft").inner_text() and "tokens/s" in part.locator(".speed").inner_text()
        assert "KiB of" in part.locator(".memory").inner_text()
        assert int(part.get_by_role("meter").get_attribute("aria-valuenow")) in percent
    assert "a next question" in page.locator("#compressed .ttft").inner_text()
    widths = [page.locator(f"#{side} .bar div").bounding_box()["width"] for side in seen]
    assert 0 < widths[0] < widths[1]
    tiny.wait_until_idle()


def test_the_shading_follows_retention_layer_and_head(page: Page, tiny: Live) -> None:
    open_page(page, tiny)
    fill(page, ratio=25)
    ask(page)
    few = shades(page)
    assert len(few) == 1 + len(DOCUMENT) and set(few) <= set(range(7)) and sum(few) < 0.4 * 6 * len(few)
    page.get_by_label("Layer").select_option("1")
    layer = shades(page)
    page.get_by_label("KV head").select_option("0")
    head = shades(page)
    assert max(layer) <= 2 and max(head) == 1 and all(h <= n <= f for h, n, f in zip(head, layer, few, strict=True))
    assert f"this head keeps {sum(head)}" in page.locator("#summary").inner_text()
    dropped, kept = head.index(0), head.index(1)
    assert "k0" in page.locator(f"#token-{dropped}").get_attribute("class")
    assert "k10" in page.locator(f"#token-{kept}").get_attribute("class")
    page.get_by_label("Layer").select_option("all")
    page.get_by_label("KV head").select_option("all")
    assert shades(page) == few
    page.get_by_label("Kept:").fill("75")
    ask(page)
    many = shades(page)
    assert sum(many) > 2 * sum(few) and page.locator("#tokens .k10").count() > few.count(6)


def test_pointing_at_a_token_tells_the_number(page: Page, tiny: Live) -> None:
    open_page(page, tiny)
    fill(page)
    ask(page)
    counts = shades(page)
    page.locator("#token-5").hover()
    expect(page.locator("#readout")).to_have_text(f"Token 5, “b”: kept by {counts[5]} of 6.")
    assert page.locator("#token-5").get_attribute("title").endswith(f"kept by {counts[5]} of 6")


def test_a_resting_pointer_does_not_disturb_the_keyboard(page: Page, tiny: Live) -> None:
    page.set_viewport_size({"width": 1200, "height": 600})
    open_page(page, tiny)
    fill(page, document="Nothing of note was entered.\n" * 60)
    ask(page)
    page.mouse.move(60, 300)
    page.locator("#tokens").focus()  # scrolls the page under the pointer, and End the text
    for key, token in (("End", 29 * 60), ("Home", 0), ("End", 29 * 60)):
        page.keyboard.press(key)
        page.wait_for_timeout(200)
        expect(page.locator("#tokens")).to_have_attribute("aria-activedescendant", f"token-{token}")


def tab_to(page: Page, name: str) -> None:
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == name:
            return
    raise AssertionError(f"Tab does not reach {name}")


def test_the_keyboard_is_enough(page: Page, tiny: Live) -> None:
    open_page(page, tiny)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    tab_to(page, "document")
    page.keyboard.insert_text(DOCUMENT)
    tab_to(page, "question")
    page.keyboard.type("What colour?")
    tab_to(page, "method")
    page.keyboard.type("snap")  # other tests may have registered methods that begin with "s"
    expect(page.get_by_label("Method")).to_have_value("snapkv")
    expect(page.locator("#method-help")).to_contain_text("last")
    tab_to(page, "ratio")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#ratio-value")).to_have_text("26 %")
    tab_to(page, "length")
    page.keyboard.press("Control+A")
    page.keyboard.type("5")
    tab_to(page, "ask")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Done.", timeout=60_000)
    tab_to(page, "layer")
    page.keyboard.press("2")
    expect(page.locator("#summary")).to_contain_text("2 (layer, KV head) pairs")
    tab_to(page, "tokens")
    listbox = page.get_by_role("listbox", name="Tokens of the document")
    for key, token in (("End", len(DOCUMENT)), ("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        expect(listbox).to_have_attribute("aria-activedescendant", f"token-{token}")
        expect(listbox.get_by_role("option", selected=True)).to_have_id(f"token-{token}")
    page.keyboard.press("ArrowDown")
    below = listbox.get_by_role("option", selected=True)
    assert below.bounding_box()["y"] > page.locator("#token-1").bounding_box()["y"]
    assert "kept by" in below.get_attribute("aria-label")
    page.keyboard.press("ArrowUp")
    expect(listbox).to_have_attribute("aria-activedescendant", "token-1")


def test_light_and_dark_can_be_read(page: Page, tiny: Live) -> None:
    open_page(page, tiny)
    fill(page, ratio=40)
    ask(page)
    for scheme, light in (("light", True), ("dark", False)):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate(CONTRASTS)
        paper = found.pop("paper")
        assert (paper > 0.8) if light else (paper < 0.05)
        assert len(found) > 8 and min(found.values()) >= 4.5, found


def test_it_fits_a_phone(page: Page, tiny: Live) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    open_page(page, tiny)
    fill(page)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    first, second = (page.locator(f"#{side}").bounding_box() for side in ("compressed", "full"))
    assert second["y"] >= first["y"] + first["height"] and first["x"] == second["x"]


def test_a_file_can_be_opened_and_a_question_stopped(page: Page, tiny: Live, tmp_path: Path) -> None:
    open_page(page, tiny)
    (tmp_path / "book.txt").write_text(DOCUMENT)
    page.get_by_label("Open a text file").set_input_files(tmp_path / "book.txt")
    expect(page.get_by_label("Document", exact=True)).to_have_value(DOCUMENT)
    page.get_by_label("Question", exact=True).fill("What colour?")
    page.get_by_label("Longest answer").fill("1500")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#compressed .answer")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    tiny.wait_until_idle()
    page.get_by_label("Longest answer").fill("5")
    ask(page)


def test_an_error_is_shown_and_read_out(page: Page, tiny: Live) -> None:
    open_page(page, tiny)
    fill(page, document="x" * 3000)
    with page.expect_response("**/playground/ask") as response:
        page.get_by_role("button", name="Ask").click()
    assert response.value.status == 400
    expect(page.get_by_role("alert")).to_contain_text("may have 2047 tokens here")


def test_it_asks_for_a_key_and_sends_it(page: Page, serve: Callable[..., Live]) -> None:
    live = serve(keys=KeyRing({"ada": "sk-one"}), public_metrics=True)
    page.goto(live.url)
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("sk-one")
    fill(page, length=3)
    ask(page)
    expect(page.locator("#model")).to_contain_text("tiny")
    assert page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])") == '[{},{},""]'


def test_the_sample_with_the_built_in_model(page: Page, tmp_path: Path) -> None:
    """Both caches know the answer, and the README shows it."""
    config = LLMConfig(
        model="smollm2-135m-instruct",
        max_model_len=4096,
        kvcache_page_size=32,
        kv_cache_memory_bytes=512 * 2**20,
        show_progress_bar=False,
        device="cpu",
    )
    live = Live(config, ServerSettings(model_names=("smollm2-135m-instruct",)), ready=False)
    try:
        wait_until(lambda: live.engine.is_ready or live.engine.failure is not None, 300)
        page.set_viewport_size({"width": 1000, "height": 800})
        page.goto(live.url)
        page.get_by_role("button", name="Use the sample").click()
        ask(page)
        for side in ("compressed", "full"):
            expect(page.locator(f"#{side} .answer")).to_contain_text("under the blue boat")
        assert 20 <= int(page.get_by_label("KV cache of the compressed").get_attribute("aria-valuenow")) <= 45
        page.locator("#tokens span", has_text=" boat").hover()
        picture = SCREENSHOT if os.environ.get("PLAYGROUND_SCREENSHOT") else tmp_path / "playground.png"
        picture.parent.mkdir(exist_ok=True)
        top = page.locator("#question").bounding_box()["y"] + page.evaluate("scrollY") - 40
        height = page.evaluate("document.documentElement.scrollHeight") - top
        page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": top, "width": 1000, "height": height})
        assert picture.stat().st_size < 300_000
    finally:
        live.stop()
