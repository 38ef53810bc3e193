"""The screenshots of the documentation, from the real page and a real job.

    python -m tests.screenshots [--data DIR] [--out docs/screenshots]

A real model (SmolLM2-135M-Instruct, installed where it is not) learns the demo's task; a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, expect

from service.settings import Settings
from tests.browser import Visit, chromium, launched
from tests.live import REPOSITORY, ServeProcess
from workers.catalogue import SMOLLM2, add_model
from workers.demo.task import build_task

WIDE = ViewportSize(width=1200, height=860)
RESULT = ViewportSize(width=1200, height=1400)
PHONE = ViewportSize(width=390, height=844)
LONGEST_JOB_MILLISECONDS = 3_600_000


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description="The screenshots of the page.")
    parser.add_argument("--data", type=Path, help="data folder, ./data by default")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "screenshots")
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    data = Settings.load(data=arguments.data).data
    add_model(SMOLLM2, data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (data / "screenshots.log").open("wb") as log:
        server = ServeProcess(data, log=log)
    try:
        with launched(chromium()) as browser:
            visit = Visit(browser, server.url, viewport=WIDE)
            take(visit.open(), arguments.out, arguments.passes)
            visit.end()
    finally:
        server.stop()


def take(page: Page, out: Path, passes: int) -> None:
    """Send the demo's task as a visitor would, and look at each view on the way."""
    task = build_task()
    rows = [example.model_dump(exclude_none=True) for example in (*task.examples, *task.test)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    page.get_by_label("Model", exact=True).select_option(SMOLLM2)
    page.get_by_label("A file of examples").set_input_files(
        {"name": "cities.jsonl", "mimeType": "application/jsonl", "buffer": text}
    )
    page.get_by_label("Passes, at most").fill(str(passes))
    page.get_by_role("button", name="Adapt the model").click()
    expect(page.locator(".job .line")).to_have_text(re.compile("^Trying removals"), timeout=LONGEST_JOB_MILLISECONDS)
    page.get_by_text("What happened, step by step").click()
    page.screenshot(path=out / "running.png")
    expect(page.get_by_role("heading", name="Download")).to_be_visible(timeout=LONGEST_JOB_MILLISECONDS)
    page.get_by_text("What happened, step by step").click()
    page.set_viewport_size(RESULT)
    page.screenshot(path=out / "result.png")
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=out / "result-dark.png")
    page.emulate_media(color_scheme="light")
    try_out(page, task.test[0].prompt, out)
    page.set_viewport_size(PHONE)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=out / "phone.png")
    page.set_viewport_size(WIDE)
    page.get_by_role("link", name="All jobs").click()
    expect(page.locator(".jobs li").first).to_contain_text("done")
    expect(page.locator(".estimate")).to_contain_text("once a worker takes it")
    page.screenshot(path=out / "submit.png", full_page=True)


def try_out(page: Page, prompt: str, out: Path) -> None:
    """Ask both models, and take the panel alone."""
    page.get_by_label("Prompt").fill(prompt)
    ask = page.get_by_role("button", name="Ask both")
    ask.click()
    expect(page.get_by_role("heading", name="Base model")).to_be_visible(timeout=LONGEST_JOB_MILLISECONDS)
    expect(ask).to_be_enabled(timeout=LONGEST_JOB_MILLISECONDS)
    page.locator("section", has=page.get_by_role("heading", name="Try it")).last.screenshot(path=out / "try.png")


if __name__ == "__main__":
    main()
