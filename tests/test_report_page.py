"""`report.html` as a reader has it: a file, opened by a double click, in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from service.goals import Goal, Target
from service.report_page import render
from service.reports import CurvePoint, Report, Speed, Speeds
from tests import browser as browsers
from tests.adapted import KINDS, Adapted
from tests.browser import Visit

pytestmark = pytest.mark.usefixtures("one_thread")

PHONE_WIDTH = 360
SERIOUS = {"serious", "critical"}
METRICS = {"Accuracy over the choices": "accuracy", "Exact match": "exact_match", "Loss, nats": "loss"}
UNKNOWN = "\u2013"
HOSTILE = """</script><script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1"><!-- ' {}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsers.launched(browsers.chromium()) as launched:
        yield launched


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Visit]:
    visit = Visit(browser, (tmp_path / "report.html").as_uri())
    yield visit
    visit.end()


def report_of(out: Path) -> Report:
    return Report.model_validate_json((out / "report.json").read_text())


def show(visit: Visit, html: str) -> Page:
    Path(visit.url.removeprefix("file://")).write_text(html)
    page = visit.open(visit.url)
    page.wait_for_selector(".result .facts")
    return page


def number(value: float) -> str:
    return f"{value:.3f}".replace("-", "\u2212")


def rows(page: Page, caption: str) -> list[list[str]]:
    """The cells of a table, folded or not."""
    table = page.locator("table", has=page.locator(f"caption:text-is('{caption}')"))
    cells: list[list[str]] = table.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return cells


def check_sight(page: Page) -> None:
    """No serious fault that axe knows, in both colour schemes; nothing is wider than a phone."""
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page).response["violations"]
        serious = [(fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in SERIOUS]
        assert not serious, (scheme, serious)
    page.set_viewport_size({"width": PHONE_WIDTH, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH, "it scrolls sideways"


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_on_the_screen_are_the_reports(kind: str, adapted: Adapted, visit: Visit) -> None:
    out = adapted(kind)
    report = report_of(out)
    html = (out / "report.html").read_text()
    assert len(html) < 800_000
    page = show(visit, html)
    assert report.verdict in page.inner_text(".verdict")
    assert ("Improved" in page.inner_text(".verdict h2")) == report.improved

    figures = {row[0]: row for row in rows(page, "Base and adapted model")}
    for name, metric in METRICS.items():
        before, after = getattr(report.base, metric), getattr(report.adapted, metric)
        assert (name in figures) == (before is not None)
        if before is not None:
            assert figures[name][1].split()[0] == number(before)
            assert figures[name][2].split()[0] == number(after)
            (difference,) = [found for found in report.differences if found.metric == metric]
            assert figures[name][3].split()[0].removeprefix("+") == number(difference.value)

    cells = page.locator(".chart [role='img'][tabindex]")
    assert cells.count() == (len(report.modules) if report.plan else 0)
    removed = [int(row[2].replace(",", "")) for row in rows(page, "Components removed from each weight")]
    assert sum(removed) == report.removed.components
    tried = [candidate for one in report.passes for candidate in one.candidates]
    shown = rows(page, "Candidates")
    assert [row[0] for row in shown] == [candidate.description for candidate in tried]
    assert [row[5] for row in shown] == [UNKNOWN if c.loss is None else number(c.loss) for c in tried]
    assert sum(row[-1] == "kept" for row in shown) == sum(one.accepted for one in report.passes)
    assert len(rows(page, "Passes")) == len(report.passes)

    cards = page.locator("article.card")
    assert cards.count() == len(report.changed)
    prompts = sorted(cards.locator("pre").all_text_contents())
    assert prompts == sorted(example.prompt for example in report.changed)
    check_sight(page)


def test_the_map_is_read_with_the_keyboard(adapted: Adapted, visit: Visit) -> None:
    report = report_of(adapted("choices"))
    page = show(visit, render(report))
    page.locator(".chart [tabindex='0'][role='img']").focus()
    first = page.inner_text(".readout")
    assert first.startswith("Layer 0, ")
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".readout").startswith(first.replace("Layer 0", "Layer 1").partition(":")[0])
    page.keyboard.press("ArrowRight")  # there is no layer 2
    assert "Layer 1, " in page.inner_text(".readout")
    assert page.locator(".chart [tabindex='0'][role='img']").count() == 1


def test_a_strangers_text_is_shown_and_never_runs(adapted: Adapted, visit: Visit) -> None:
    report = report_of(adapted("choices"))
    example = report.changed[0].model_copy(
        update=dict.fromkeys(("prompt", "completion", "base_answer", "adapted_answer"), HOSTILE)
    )
    confusion = {HOSTILE: {HOSTILE: 3, "b": 1}, "b": {"b": 2}}
    metrics = report.base.model_copy(update={"confusion": confusion})
    one_pass = report.passes[0]
    candidate = one_pass.candidates[0].model_copy(update={"description": HOSTILE})
    one_pass = one_pass.model_copy(update={"reason": HOSTILE, "candidates": [candidate]})
    changes = {"changed": [example], "base": metrics, "adapted": metrics, "verdict": HOSTILE, "passes": [one_pass]}
    page = show(visit, render(report.model_copy(update=changes)))
    assert page.evaluate("window.hacked") is None
    assert page.locator("article.card pre").text_content() == HOSTILE
    assert HOSTILE in page.inner_text(".verdict")
    assert rows(page, "Accuracy by label")[0][0] == HOSTILE
    assert rows(page, "Candidates")[0][0] == HOSTILE


def test_the_way_of_a_compressed_model_is_drawn_and_told(adapted: Adapted, visit: Visit) -> None:
    report = report_of(adapted("choices"))
    speed = Speed(
        bytes=1,
        peak_memory_bytes=1,
        prefill_tokens_per_second=9.0,
        decode_tokens_per_second=20.0,
        joules_per_token=None,
    )
    curve = [
        CurvePoint(
            number=k,
            parameters=1 - k / 10,
            bytes=1 - k / 20,
            removed=f"layer {k}",
            accuracy=0.5 + k / 10,
            exact_match=0.25,
            loss=None if k == 1 else 2.0,
            speed=speed,
            path="model" if k == 2 else "points/1/model",
        )
        for k in (1, 2)
    ]
    compressed = {
        "goal": Goal.COMPRESS,
        "target": Target(parameters=0.8),
        "curve": curve,
        "speed": Speeds(base=speed, model=speed),
        "verification": report.verification.model_copy(update={"adapter": None}),
        "cost": report.cost.model_copy(update={"adapter_bytes": 0}),
    }
    page = show(visit, render(report.model_copy(update=compressed)))
    assert rows(page, "Base and points")[1:] == [
        ["point 1", "90.0 %", "95.0 %", "0.600", "0.250", "\u2013", "20.0", "layer 1"],
        ["point 2", "80.0 %", "90.0 %", "0.700", "0.250", "2.000", "20.0", "layer 2"],
    ]
    assert rows(page, "Base and points")[0][:4] == ["base", "100.0 %", "100.0 %", number(report.base.accuracy or 0)]
    drawn = page.locator("section", has_text="Size against quality").locator("svg[role=img]")
    assert drawn.count() == 2  # against size and against speed
    assert "Smaller" in page.inner_text(".verdict h2")
    assert ["target", "parameters=0.8"] in rows(page, "Settings and splits")
    assert "undefined" not in page.inner_text(".result") and "null" not in page.inner_text(".result")
    check_sight(page)


def test_what_is_not_known_is_left_out(adapted: Adapted, visit: Visit) -> None:
    report = report_of(adapted("open"))
    candidates = [
        candidate.model_copy(update={"predicted_loss": None, "loss": None}) for candidate in report.passes[0].candidates
    ]
    one_pass = report.passes[0].model_copy(update={"candidates": candidates})
    drift = report.drift.model_copy(update={"value": None})
    html = render(report.model_copy(update={"passes": [one_pass], "drift": drift, "after_first_pass": None}))
    # As an older report, or a newer one, has other fields.
    html = html.replace('"modules":[{', '"unknown":[{').replace('"changed":[{', '"unheard":[{')
    page = show(visit, html)
    assert page.locator("article.card").count() == 0
    assert "no finite probabilities" in page.inner_text(".result")
    assert "NaN" not in page.inner_text(".result")
    assert "undefined" not in page.inner_text(".result")


def test_on_paper_it_is_light_and_what_is_short_is_unfolded(adapted: Adapted, visit: Visit) -> None:
    report = report_of(adapted("choices"))
    tried = [report.passes[0].model_copy(update={"candidates": report.passes[0].candidates[:1] * 30})]
    page = show(visit, render(report.model_copy(update={"passes": tried})))
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--text').trim()") == "#1a1f24"
    page.pdf()
    unfolded = page.locator("details[open] > summary").all_text_contents()
    assert {"Passes", "Settings and splits"} <= set(unfolded)
    assert "All 30 candidates" not in unfolded


def test_the_figures_are_read_without_a_script_too(adapted: Adapted, browser: Browser, visit: Visit) -> None:
    report = report_of(adapted("choices"))
    assert report.base.accuracy is not None
    assert report.adapted.accuracy is not None
    Path(visit.url.removeprefix("file://")).write_text(render(report))
    plain = Visit(browser, visit.url, java_script_enabled=False)
    text = plain.open(visit.url).inner_text("main")
    plain.end()
    for figure in (report.verdict, number(report.base.accuracy), number(report.adapted.accuracy), str(report.drift)):
        assert figure in text


def test_served_by_the_api_it_may_draw_itself_and_reach_nothing(adapted: Adapted, browser: Browser) -> None:
    from service.routes.files import SANDBOX

    visit = Visit(browser, "http://c2i.test/")
    visit.context.route(
        "**/*",
        lambda route: route.fulfill(
            body=(adapted("choices") / "report.html").read_text(),
            content_type="text/html; charset=utf-8",
            headers={"Content-Security-Policy": SANDBOX},
        ),
    )
    page = visit.open("http://c2i.test/v1/jobs/x/report")
    page.wait_for_selector(".result .facts")
    assert page.evaluate("self.origin") == "null"
    visit.end()
