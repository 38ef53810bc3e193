"""The page in a real Chromium, over a real service with a real worker: from a submission to its download."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect

from service.embedded import EmbeddedRedis
from service.jobs import JobStatus, Objective, Stage
from service.keys import Scope
from service.strategies import Strategy
from tests import browser as browsers
from tests import tiny
from tests.browser import Visit
from tests.live import REPOSITORY, Api, ServeProcess, install, redis, spec, wait_until

SERIOUS = {"serious", "critical"}
LIGHT_AND_DARK: tuple[Literal["light", "dark"], ...] = ("light", "dark")
PHONE_WIDTH = 360


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browsers.launched(browsers.chromium()) as browser:
        yield browser


@pytest.fixture(scope="module")
def data(
    chrome: Browser, tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[..., Path]
) -> Path:  # the browser first: without one nothing is started
    folder = tmp_path_factory.mktemp("paged")
    install(tiny_models("llama"), folder)
    install(tiny_models("gpt2"), folder, "tiny-gpt2")
    install(tiny_models("llama"), folder, "without-template")
    (folder / "models" / "without-template" / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def server(data: Path) -> Iterator[ServeProcess]:
    running = ServeProcess(data)
    yield running
    assert running.stop() == 0


@pytest.fixture
def visit(chrome: Browser, server: ServeProcess) -> Iterator[Visit]:
    visitor = Visit(chrome, server.url)
    yield visitor
    visitor.end()


@pytest.fixture(scope="module")
def finished(server: ServeProcess) -> str:
    """A job that has succeeded."""
    job_id = submit(server)
    assert server.http.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()["status"] == "succeeded"
    return job_id


def submit(server: ServeProcess, **changes: Any) -> str:
    response = server.http.post("/v1/jobs", json=spec(**changes))
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def long_job(server: ServeProcess) -> str:
    """A job that is at work and will be for a while."""
    job_id = submit(server, model="tiny-gpt2", examples=tiny.learnable_examples(3000), passes=8)
    wait_until(lambda: server.http.get(f"/v1/jobs/{job_id}").json()["progress"]["stage"], 30, "the job is at work")
    return job_id


def lines(examples: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(example) for example in examples)


def check_accessible(page: Page) -> None:
    """No serious fault that axe knows, in both colour schemes; nothing is wider than a phone."""
    for scheme in LIGHT_AND_DARK:
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page).response["violations"]
        serious = [
            (fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found if fault["impact"] in SERIOUS
        ]
        assert not serious, (scheme, page.url, serious)
    page.set_viewport_size({"width": PHONE_WIDTH, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH, "it scrolls sideways"
    page.set_viewport_size({"width": 1280, "height": 740})


def test_from_a_submission_to_the_download(visit: Visit) -> None:
    page = visit.open()
    page.get_by_label("Model", exact=True).select_option("tiny-llama")
    page.get_by_role("button", name="Fill in an example task").click()
    expect(page.get_by_text("120 examples with 4 choices.")).to_be_visible()
    filled_in = page.get_by_label("Examples", exact=True).input_value()
    assert filled_in.strip() == (REPOSITORY / "docs" / "examples" / "task.jsonl").read_text().strip()
    expect(page.locator(".estimate")).to_contain_text("once a worker takes it")
    page.get_by_role("button", name="Adapt the model").click()
    expect(page).to_have_url(re.compile("#/jobs/job_"))
    expect(page.get_by_role("heading", level=1)).to_have_text("tiny-llama")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page.get_by_role("heading", name="Download")).to_be_visible(timeout=60_000)
    with page.expect_download() as download:
        page.get_by_role("link", name="Adapter", exact=True).click()
    with zipfile.ZipFile(download.value.path()) as archive:
        names = archive.namelist()
    assert any(name.endswith("adapter/adapter_model.safetensors") for name in names)
    page.get_by_role("link", name="All jobs").click()
    expect(page.locator(".jobs li").first).to_contain_text("done")
    expect(page.get_by_text("120 examples with 4 choices.")).to_be_visible()  # what was filled in is still there


def test_what_is_wrong_with_an_example_stands_on_its_line_before_it_is_sent(visit: Visit) -> None:
    page = visit.open()
    examples = tiny.learnable_examples(12)
    examples[3]["completion"] = " blue"
    examples[0]["turns"] = [{"role": "system", "content": "Be short."}]  # as it should be
    examples[7]["turns"] = [{"role": "robot", "content": "Be short."}]
    text = lines(examples).replace("\n", "\n\n", 1) + '\n{"prompt": "no end'
    page.get_by_label("Examples", exact=True).fill(text)
    expect(page.get_by_text("3 of 13 lines cannot be sent; the first is line 5.")).to_be_visible()
    expect(page.get_by_text("Line 5, completion: not one of the choices")).to_be_visible()
    expect(page.get_by_text("Line 9, turns: each has a role")).to_be_visible()
    expect(page.get_by_text(re.compile("Line 14, not JSON"))).to_be_visible()
    expect(page.get_by_role("button", name="Adapt the model")).to_be_disabled()
    check_accessible(page)


def test_what_only_the_server_knows_stands_on_its_line_too(visit: Visit) -> None:
    examples = tiny.learnable_examples(12)
    examples[5]["prompt"] = "far too long " * tiny.CONTEXT
    page = visit.open()
    page.get_by_label("Model", exact=True).select_option("tiny-llama")
    page.get_by_label("Examples", exact=True).fill(lines(examples))
    problem = page.locator("tr.problem")
    expect(problem).to_contain_text(re.compile(r"Line 6, prompt: .*the model's context is 256"))
    expect(page.get_by_role("alert")).to_contain_text("Line 6, prompt")
    visit.errors = [error for error in visit.errors if "422" not in error]  # the browser's own word for a refusal


def test_a_field_that_is_refused_is_marked(visit: Visit) -> None:
    page = visit.open()
    page.get_by_role("button", name="Fill in an example task").click()
    page.get_by_label("Passes, at most").fill("9")
    expect(page.get_by_role("alert")).to_contain_text("passes: Input should be less than or equal to 8")
    expect(page.get_by_label("Passes, at most")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Passes, at most").fill("2")
    expect(page.locator(".estimate")).to_contain_text("About")
    visit.errors = [error for error in visit.errors if "422" not in error]


def test_every_strategy_objective_stage_and_status_has_words(visit: Visit) -> None:
    page = visit.open()
    expect(page.get_by_label("Model", exact=True)).to_be_visible()
    radios = page.locator("input[name=strategy]").all()
    assert [radio.get_attribute("value") for radio in radios] == list(Strategy)
    assert [option.get_attribute("value") for option in page.locator("#objective option").all()] == list(Objective)
    assert page.evaluate("import('/format.js').then((words) => Object.keys(words.STAGES))") == list(Stage)
    assert page.evaluate("import('/jobs.js').then((words) => Object.keys(words.STATUSES))") == list(JobStatus)


def test_csv_is_mapped_by_column_and_sent_as_it_is_shown(visit: Visit, server: ServeProcess) -> None:
    rows = [("id", "review", "label"), *((i, f'Good, "really"\nnumber {i}', ("good", "bad")[i % 2]) for i in range(12))]
    sheet = io.StringIO()
    csv.writer(sheet).writerows(rows)
    page = visit.open()
    page.get_by_label("A file of examples").set_input_files(
        {"name": "reviews.csv", "mimeType": "text/csv", "buffer": sheet.getvalue().encode()}
    )
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("1")
    expect(page.get_by_label("Completion", exact=True)).to_have_value("2")
    expect(page.get_by_label("Choices", exact=True)).to_have_value("distinct")
    page.get_by_label("Wording of a prompt").fill("Review: {}\nVerdict:")
    expect(page.get_by_text("12 examples with 2 choices.")).to_be_visible()
    # A record takes two lines of the file.
    expect(page.locator(".examples tbody th").nth(1)).to_have_text("4")
    check_accessible(page)
    page.get_by_label("Model", exact=True).select_option("tiny-llama")
    with page.expect_request(lambda request: request.method == "POST" and request.url.endswith("/v1/jobs")) as sent:
        page.get_by_role("button", name="Adapt the model").click()
    first = json.loads(sent.value.post_data or "")["examples"][0]
    assert first == {
        "prompt": 'Review: Good, "really"\nnumber 0\nVerdict:',
        "completion": " good",
        "choices": [" bad", " good"],
    }
    expect(page.get_by_role("heading", level=1)).to_have_text("tiny-llama")


def test_a_file_may_be_dropped(visit: Visit) -> None:
    page = visit.open()
    expect(page.get_by_label("Model", exact=True)).to_be_visible()
    carried = page.evaluate_handle(
        """(text) => {
            const carried = new DataTransfer();
            carried.items.add(new File([text], "task.jsonl"));
            return carried;
        }""",
        lines(tiny.learnable_examples(9)),
    )
    page.get_by_label("Examples", exact=True).dispatch_event("drop", {"dataTransfer": carried})
    expect(page.get_by_text("9 examples with 3 choices.")).to_be_visible()
    expect(page.get_by_text("task.jsonl")).to_be_visible()


def test_a_running_job_survives_a_reload_and_is_cancelled_after_a_question(visit: Visit, server: ServeProcess) -> None:
    job_id = long_job(server)
    page = visit.open(f"/#/jobs/{job_id}")
    badge = page.locator("main .badge")
    expect(badge).to_have_text("running")
    check_accessible(page)
    page.reload()
    expect(badge).to_have_text("running")
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.get_by_role("button", name="Cancel the job").click()
    page.get_by_role("button", name="No").click()
    expect(badge).to_have_text("running")
    page.get_by_role("button", name="Cancel the job").click()
    page.get_by_role("button", name="Yes, stop it").click()
    expect(badge).to_have_text("cancelled")
    assert server.http.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"
    page.get_by_role("button", name="Delete the job").click()
    page.get_by_role("button", name="Yes, delete").click()
    expect(page).to_have_url(f"{server.url}/#/")
    assert server.http.get(f"/v1/jobs/{job_id}").status_code == 404


def test_the_list_is_live_and_tells_a_place_in_the_queue(visit: Visit, server: ServeProcess) -> None:
    page = visit.open()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    first, second = long_job(server), submit(server, model="tiny-gpt2")
    item = page.locator(".jobs li", has=page.locator(f"a[href='#/jobs/{second}']"))
    expect(item).to_contain_text("Next in the queue")
    expect(page.locator(".jobs li", has=page.locator(f"a[href='#/jobs/{first}']"))).to_contain_text("%")
    server.http.post(f"/v1/jobs/{first}/cancel")
    expect(item).to_contain_text("done", timeout=30_000)


def test_a_job_that_ended_while_the_browser_was_closed_shows_its_result(chrome: Browser, server: ServeProcess) -> None:
    job_id = submit(server)
    before = Visit(chrome, server.url)
    expect(before.open(f"/#/jobs/{job_id}").get_by_role("heading", level=1)).to_have_text("tiny-llama")
    before.end()
    assert server.http.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()["status"] == "succeeded"
    after = Visit(chrome, server.url)
    page = after.open(f"/#/jobs/{job_id}")
    expect(page.get_by_role("heading", name="Download")).to_be_visible()
    page.get_by_text("What happened, step by step").click()
    expect(page.locator(".history")).to_contain_text("queued")
    after.end()


def test_a_job_is_followed_where_streams_do_not_get_through(chrome: Browser, server: ServeProcess) -> None:
    visitor = Visit(chrome, server.url)
    visitor.page.route("**/events", lambda route: route.abort() if is_stream(route) else route.continue_())
    page = visitor.open(f"/#/jobs/{submit(server)}")
    expect(page.get_by_role("heading", name="Download")).to_be_visible()
    visitor.end(expected_errors=True)


def test_a_stream_that_was_cut_off_goes_on_behind_its_last_event(visit: Visit, server: ServeProcess) -> None:
    job_id = submit(server)
    server.http.get(f"/v1/jobs/{job_id}", params={"wait": 60})
    first, *more = server.http.get(f"/v1/jobs/{job_id}/events").json()["data"]
    asked_behind = []

    def cut(route: Route) -> None:
        asked_behind.append(route.request.headers.get("last-event-id"))
        if asked_behind == [None]:
            body = f"event: status\nid: {first['id']}\ndata: {json.dumps(first)}\n\nevent: status\nid: 9-9\nda"
            route.fulfill(content_type="text/event-stream", body=body)
        else:
            route.continue_()

    visit.page.route("**/events", cut)
    # As the record is while the job runs, so that its end is waited for.
    running = server.http.get(f"/v1/jobs/{job_id}").json() | {"status": "running", "finished_at": None}
    visit.page.route(f"**/v1/jobs/{job_id}", lambda route: route.fulfill(json=running), times=1)
    page = visit.open(f"/#/jobs/{job_id}")
    expect(page.get_by_role("heading", name="Download")).to_be_visible()
    expect(page.locator(".history li")).to_have_count(1 + len(more))
    assert asked_behind[:2] == [None, first["id"]]


def test_a_service_that_is_away_for_a_moment_is_asked_again(chrome: Browser, server: ServeProcess) -> None:
    visitor = Visit(chrome, server.url)
    job_id = long_job(server)
    page = visitor.open(f"/#/jobs/{job_id}")
    expect(page.locator("main .badge")).to_have_text("running")
    visitor.context.set_offline(True)
    server.http.post(f"/v1/jobs/{job_id}/cancel")
    page.get_by_role("button", name="Cancel the job").click()
    page.get_by_role("button", name="Yes, stop it").click()
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    visitor.context.set_offline(False)
    expect(page.locator("main .badge")).to_have_text("cancelled")
    visitor.end(expected_errors=True)


def is_stream(route: Route) -> bool:
    return "event-stream" in route.request.headers["accept"]


def test_an_adapted_model_is_tried_beside_its_base(visit: Visit, finished: str) -> None:
    page = visit.open(f"/#/jobs/{finished}")
    page.get_by_label("Prompt").fill("Item 3: answer")
    page.get_by_role("button", name="Ask both").click()
    # The process that answers imports torch before its first answer.
    expect(page.get_by_role("heading", name="Base model")).to_be_visible(timeout=120_000)
    expect(page.get_by_role("button", name="Ask both")).to_be_enabled()
    assert "…" not in page.locator(".said").all_inner_texts()
    check_accessible(page)


def test_a_failed_job_says_why(visit: Visit, server: ServeProcess) -> None:
    page = visit.open(f"/#/jobs/{submit(server, model='without-template', prompt_format='chat')}")
    expect(page.locator("main .badge")).to_have_text("failed", timeout=30_000)
    expect(page.locator(".line")).to_contain_text("chat template")
    check_accessible(page)


def test_every_view_is_accessible_in_both_schemes_and_fits_a_phone(visit: Visit, finished: str) -> None:
    page = visit.open()
    page.get_by_role("button", name="Fill in an example task").click()
    expect(page.locator(".jobs li").first).to_be_visible()
    page.get_by_text("More settings").click()
    check_accessible(page)
    page = visit.open(f"/#/jobs/{finished}")
    expect(page.get_by_role("heading", name="Download")).to_be_visible()
    check_accessible(page)


def test_the_documentation_has_every_route_and_loads_nothing_from_elsewhere(visit: Visit, server: ServeProcess) -> None:
    page = visit.open("/docs")
    paths = server.http.get("/openapi.json").json()["paths"]
    expect(page.get_by_role("heading", name="Bodies")).to_be_visible()
    shown = {code.partition("\n")[0] for code in page.locator("summary > code").all_inner_texts()}
    assert {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations} <= shown
    page.locator("summary", has_text="Queue an adaptation.").click()
    page.get_by_role("link", name="JobSpec").click()
    expect(page.locator("#schema-JobSpec")).to_contain_text("strategy_options")
    check_accessible(page)


def test_dark_is_dark(chrome: Browser, server: ServeProcess) -> None:
    visitor = Visit(chrome, server.url, color_scheme="dark")
    page = visitor.open()
    expect(page.locator("body")).to_have_css("background-color", "rgb(16, 20, 24)")
    visitor.end()


def test_the_whole_form_is_reached_and_sent_by_keyboard(visit: Visit) -> None:
    page = visit.open()
    expect(page.get_by_label("Model", exact=True)).to_be_visible()
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.innerText || document.activeElement.id"))
        if reached[-1] == "Fill in an example task":
            page.keyboard.press("Enter")
            expect(page.get_by_text("120 examples")).to_be_visible()
        if reached[-1] == "Adapt the model":
            break
    assert reached[:4] == ["To the content", "Compress to Impress", "Jobs", "API"]
    assert reached[-1] == "Adapt the model"
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#/jobs/job_"))


def test_a_service_with_keys_asks_for_one_and_says_what_is_wrong_with_it(
    chrome: Browser, data: Path, finished: str
) -> None:
    locked = Api(data, EmbeddedRedis(data).url, require_keys=True)
    visitor = Visit(chrome, locked.url)
    try:
        admin, _ = locked.service.keys.create("admin", frozenset({Scope.ADMIN}))
        reader, _ = locked.service.keys.create("reader", frozenset({Scope.READ}))
        page = visitor.open(f"/#/jobs/{finished}")
        expect(page.get_by_role("heading", level=1)).to_have_text("API key")
        check_accessible(page)
        use_key(page, f"c2i_{'x' * 43}")
        expect(page.get_by_role("alert")).to_contain_text("key")
        use_key(page, admin)
        expect(page.get_by_role("heading", name="Download")).to_be_visible()
        expect(page.get_by_role("heading", name="Try it")).to_have_count(0)  # off where keys are in force
        with page.expect_download() as download:
            page.get_by_role("button", name="Report as JSON").click()
        assert json.loads(Path(download.value.path()).read_text())["model"]["id"] == "tiny-llama"
        page.get_by_text("From a terminal").click()
        expect(page.locator("section[aria-labelledby=downloads] pre")).to_contain_text("Authorization: Bearer $C2I_KEY")
        assert admin not in page.content()
        page.get_by_role("button", name="Forget the key").click()
        use_key(page, reader)
        expect(page.get_by_role("heading", level=1)).to_have_text("No such job")
        page.goto("/#/")
        page.get_by_role("button", name="Fill in an example task").click()
        expect(page.get_by_role("alert")).to_contain_text("This key may not do that")
    finally:
        visitor.end(expected_errors=True)
        locked.stop()


def use_key(page: Page, key: str) -> None:
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_a_service_without_models_tells_the_command_that_installs_one(
    chrome: Browser, tmp_path: Path, data: Path
) -> None:
    empty = Api(tmp_path, EmbeddedRedis(data).url)
    visitor = Visit(chrome, empty.url)
    try:
        expect(visitor.open().locator("pre")).to_have_text("c2i models add smollm2-135m-instruct")
    finally:
        visitor.end()
        empty.stop()


@pytest.fixture
def alone(tmp_path: Path, tiny_models: Callable[..., Path]) -> Iterator[Callable[..., Api]]:
    """An API without workers, over a Redis of its own; with changed settings."""
    install(tiny_models("llama"), tmp_path)
    queue = redis(tmp_path)
    started: list[Api] = []

    def start(**changes: Any) -> Api:
        started.append(Api(tmp_path, queue.url, **changes))
        return started[-1]

    yield start
    for api in started:
        api.stop()
    queue.stop()


def test_a_full_queue_is_told_in_words(chrome: Browser, alone: Callable[..., Api]) -> None:
    visitor = Visit(chrome, alone(max_waiting_jobs=1).url)
    page = visitor.open()
    page.get_by_role("button", name="Fill in an example task").click()
    page.get_by_role("button", name="Adapt the model").click()
    expect(page.locator(".job .line")).to_have_text("Next in the queue")
    page.get_by_role("link", name="All jobs").click()
    expect(page.locator(".jobs .line")).to_have_text("Next in the queue")
    page.get_by_role("button", name="Adapt the model").click()
    expect(page.get_by_role("alert")).to_contain_text(re.compile("of your jobs wait already.*Try again in"))
    visitor.end(expected_errors=True)


def test_a_service_that_says_when_to_come_again_is_asked_again(chrome: Browser, alone: Callable[..., Api]) -> None:
    visitor = Visit(chrome, alone(max_requests_per_second=0.5).url)
    page = visitor.open()
    expect(page.get_by_label("Model", exact=True)).to_be_visible()
    expect(page.get_by_text("None yet. A job that you send appears here.")).to_be_visible()
    assert any("429" in error for error in visitor.errors)
    visitor.end(expected_errors=True)
