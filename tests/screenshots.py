"""The screenshots of the documentation, from the real page and a real job.

    python -m tests.screenshots [--data DIR] [--out docs/screenshots]

A real model (SmolLM2-135M-Instruct, installed where it is not) learns the demo's task; a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, ViewportSize, expect

from service.settings import Settings
from tests.browser import Visit, chromium, launched
from tests.live import REPOSITORY, ServeProcess
from workers.catalogue import SMOLLM2, add_model
from workers.demo.task import build_task

WIDE = ViewportSize(width=1200, height=860)
RESULT = ViewportSize(width=1200, height=1400)
PHONE = ViewportSize(width=390, height=844)
SCHEMES: tuple[tuple[Literal["light", "dark"], str], ...] = (("light", "result.png"), ("dark", "result-dark.png"))
LONGEST_JOB_MILLISECONDS = 3_600_000


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description="The screenshots of the page.")
    parser.add_argument("--data", type=Path, help="data folder, ./data by default")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "screenshots")
    parser.add_argument("--passes", type=int, default=1)
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
    expect(page.locator(".estimate")).to_contain_text("once a worker takes it")
    page.screenshot(path=out / "submit.png", full_page=True)
    page.get_by_role("button", name="Adapt the model").click()
    expect(page.locator(".job .line")).to_have_text(re.compile("^Trying removals"), timeout=LONGEST_JOB_MILLISECONDS)
    page.get_by_text("What happened, step by step").click()
    page.screenshot(path=out / "running.png")
    expect(page.get_by_role("heading", name="Download")).to_be_visible(timeout=LONGEST_JOB_MILLISECONDS)
    take_result(page, out)


def take_result(page: Page, out: Path) -> None:
    """Of a job that has succeeded: the result in both schemes and on a phone, and a try."""
    page.set_viewport_size(RESULT)
    for scheme, name in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=out / name)
    page.emulate_media(color_scheme="light")
    # The prompt is one that came right.
    ask = page.get_by_role("button", name="Ask both")
    ask.click()
    expect(page.get_by_role("heading", name="Base model")).to_be_visible(timeout=LONGEST_JOB_MILLISECONDS)
    expect(ask).to_be_enabled(timeout=LONGEST_JOB_MILLISECONDS)
    page.locator("section[aria-labelledby=try]").screenshot(path=out / "try.png")
    page.set_viewport_size(PHONE)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=out / "phone.png")


if __name__ == "__main__":
    main()
