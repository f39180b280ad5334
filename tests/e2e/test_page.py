"""The page at /ui in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
expect.set_options(timeout=60_000)  # five seconds are few where cores are shared
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, bundled_url: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1100, "height": 860})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda request: problems.append(request.url) if not request.url.startswith(bundled_url) else None
    )
    page.goto(f"{bundled_url}/ui")
    yield page
    page.close()
    assert [problem for problem in problems if not problem.startswith("data:") and "status of 422" not in problem] == []


def number(page: Page, name: str) -> int:
    return int(page.locator(f"#{name}").inner_text())


def test_a_text_is_written_token_by_token(page: Page) -> None:
    expect(page.locator("#model")).to_contain_text("aft-conv-stories: AFT-conv, 3.8 M parameters")
    page.locator("#prompt").fill("Once upon a time, a fox")
    page.get_by_label("Tokens at most").fill("60")
    page.get_by_label("Seed").fill("4")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile("Reached the number of tokens|The text has ended"))
    assert number(page, "new-tokens") in range(20, 61)
    assert page.locator("#output").inner_text().startswith("Once upon a time, a fox")
    assert page.locator("#seed").inner_text() == "4"
    assert "184.4 KiB, always" in page.locator("#state").inner_text()
    n_tokens = number(page, "prompt-tokens") + number(page, "new-tokens")
    assert f"after {n_tokens} tokens" in page.locator("#cache").inner_text()
    page.locator("#output .token").nth(3).hover()
    assert page.locator("#likely tr").count() >= 5
    assert page.locator("#likely .chosen").count() == 1

    page.locator("#output .token").first.focus()
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("[...document.querySelectorAll('.token')].indexOf(document.activeElement)")
    assert focused == 1

    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#status")).not_to_be_empty()
    assert number(page, "reused") >= n_tokens - 1  # the first text is the second's prompt


def test_stop_and_a_changed_parameter(page: Page) -> None:
    page.get_by_label("Tokens at most").fill("100000")
    page.get_by_label("Temperature").fill("2")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#output .token").nth(2)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text(re.compile("Stopped.|The text has ended."))

    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens at most").fill("12")
    texts = []
    for _ in range(2):
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#status")).to_have_text("Reached the number of tokens.")
        texts.append(page.locator("#output").inner_text())
    assert texts[0] == texts[1]  # greedy
    assert page.locator("#seed").inner_text() == "none (greedy)"


def test_a_refusal_is_shown(page: Page) -> None:
    page.locator("#prompt").fill("")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#error")).to_contain_text("inputs must not be empty")


def test_the_reference_needs_nothing_from_elsewhere(page: Page, bundled_url: str) -> None:
    page.goto(f"{bundled_url}/docs")
    expect(page.locator(".opblock-summary-path", has_text="/v1/chat/completions")).to_be_visible()
    page.locator("#operations-operations-ready_ready_get").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("200")


@pytest.mark.skipif("SCREENSHOT" not in os.environ, reason="SCREENSHOT=FILE draws the picture of the README")
def test_screenshot(page: Page) -> None:
    page.get_by_label("Seed").fill("2")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).not_to_be_empty()
    page.locator("#output .token").nth(12).hover()
    page.screenshot(path=Path(os.environ["SCREENSHOT"]), full_page=True)
