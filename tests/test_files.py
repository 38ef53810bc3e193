"""Downloads: ranges, entity tags, archives of an exact length, and nothing before a job has succeeded."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator

import httpx
import pytest

from service.errors import JobNotFound
from service.jobs import JobSpec
from service.records import new_job_id
from tests import stand_in
from tests.live import Api, spec


def finish(api: Api, do: str = "publish") -> str:
    """A job that has succeeded, put through the queue and the store as a worker does."""
    queue, store = api.service.queue, api.service.store
    job_id, parsed = new_job_id(), JobSpec.parse(spec(metadata={"do": do}))
    store.put_input(job_id, parsed)
    queue.create(job_id, parsed)
    attempt = queue.start(job_id)
    with store.workspace(job_id, attempt) as out:
        report = stand_in.adapt(parsed, out, out, cache=out, on_progress=lambda *_: None)
        store.publish(job_id, attempt, out)
    queue.succeed(job_id, attempt, report.brief())
    return job_id


@pytest.fixture(scope="module")
def job(shared_api: Api) -> Iterator[str]:
    job_id = finish(shared_api)
    yield job_id
    assert shared_api.http.delete(f"/v1/jobs/{job_id}").status_code == 204


@pytest.fixture
def http(shared_api: Api) -> httpx.Client:
    return shared_api.http


WEIGHTS = bytes(range(256)) * 4096
PATH = "adapter/adapter_model.safetensors"


def test_the_manifest_tells_the_truth(http: httpx.Client, job: str) -> None:
    for file in http.get(f"/v1/jobs/{job}/files").json()["data"]:
        response = http.get(file["url"])
        assert response.status_code == 200
        assert len(response.content) == file["bytes"] == int(response.headers["content-length"])
        assert hashlib.sha256(response.content).hexdigest() == file["sha256"]
        assert response.headers["etag"] == f'"{file["sha256"]}"'
        assert response.headers["x-content-type-options"] == "nosniff"


def test_head_is_get_without_the_body(http: httpx.Client, job: str) -> None:
    for path in (f"files/{PATH}", "report", "adapter.zip", "model.zip"):
        head = http.head(f"/v1/jobs/{job}/{path}")
        get = http.get(f"/v1/jobs/{job}/{path}")
        assert head.status_code == get.status_code == 200
        assert head.content == b""
        for name in ("etag", "content-length", "content-type"):
            assert head.headers[name] == get.headers[name]


def test_a_known_entity_is_not_sent_again(http: httpx.Client, job: str) -> None:
    for path in (f"files/{PATH}", "report", "adapter.zip"):
        etag = http.get(f"/v1/jobs/{job}/{path}").headers["etag"]
        for known in (etag, f'"x", {etag}', f"W/{etag}", "*"):
            again = http.get(f"/v1/jobs/{job}/{path}", headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert http.get(f"/v1/jobs/{job}/{path}", headers={"If-None-Match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("0-9", WEIGHTS[:10]), ("1000-1999", WEIGHTS[1000:2000]), ("1048570-", WEIGHTS[-6:]), ("-5", WEIGHTS[-5:])],
)
def test_ranges(http: httpx.Client, job: str, wanted: str, expected: bytes) -> None:
    response = http.get(f"/v1/jobs/{job}/files/{PATH}", headers={"Range": f"bytes={wanted}"})
    assert (response.status_code, response.content) == (206, expected)


def test_a_range_of_another_entity_is_the_whole_file(http: httpx.Client, job: str) -> None:
    url = f"/v1/jobs/{job}/files/{PATH}"
    etag = http.get(url).headers["etag"]
    assert http.get(url, headers={"Range": "bytes=0-9", "If-Range": '"other"'}).status_code == 200
    assert http.get(url, headers={"Range": "bytes=0-9", "If-Range": etag}).status_code == 206


def test_a_range_beyond_the_end_is_416(http: httpx.Client, job: str) -> None:
    response = http.get(f"/v1/jobs/{job}/files/{PATH}", headers={"Range": "bytes=9999999-"})
    assert response.status_code == 416


@pytest.mark.parametrize("folder", ["adapter", "model"])
def test_an_archive_is_the_manifest_to_the_byte(http: httpx.Client, job: str, folder: str) -> None:
    response = http.get(f"/v1/jobs/{job}/{folder}.zip")
    assert len(response.content) == int(response.headers["content-length"])
    assert f"{job}-{folder}.zip" in response.headers["content-disposition"]
    expected = {
        f"{job}-{folder}/{file['path']}": file["sha256"]
        for file in http.get(f"/v1/jobs/{job}/files").json()["data"]
        if file["path"].startswith((f"{folder}/", "report."))
    }
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        found = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    assert found == expected
    assert http.get(f"/v1/jobs/{job}/{folder}.zip").content == response.content


def test_the_report_is_the_published_file(http: httpx.Client, job: str) -> None:
    report = http.get(f"/v1/jobs/{job}/report")
    assert report.headers["content-type"] == "application/json"
    assert report.content == http.get(f"/v1/jobs/{job}/files/report.json").content
    assert json.loads(report.content)["verdict"] == "no significant improvement"


HTML, JSON = "text/html; charset=utf-8", "application/json"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", HTML),  # a browser's
        ("text/html", HTML),
        ("TEXT/HTML", HTML),
        ("text/*", HTML),
        ("application/json;q=0.5, text/html", HTML),
        ("*/*", JSON),  # curl's
        ("", JSON),
        ("application/json", JSON),
        ("application/json, text/html", JSON),
        ("text/html;q=0.5, application/json", JSON),
        ("text/html;q=0", JSON),
        ("text/html;q=x", JSON),
        ("image/png", JSON),
    ],
)
def test_a_browser_is_shown_the_report_and_a_program_gets_it(
    http: httpx.Client, job: str, accept: str, expected: str
) -> None:
    response = http.get(f"/v1/jobs/{job}/report", headers={"Accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, expected)
    assert response.headers["vary"] == "Accept"
    name = "report.html" if expected is HTML else "report.json"
    assert response.content == http.get(f"/v1/jobs/{job}/files/{name}").content
    etag = response.headers["etag"]
    again = http.get(f"/v1/jobs/{job}/report", headers={"Accept": accept, "If-None-Match": etag})
    assert (again.status_code, again.headers["vary"]) == (304, "Accept")
    if expected is HTML:
        assert response.headers["content-disposition"] == "inline"
        assert response.headers["content-security-policy"].startswith("sandbox allow-scripts")


@pytest.mark.parametrize("path", ["nothing", "adapter", "..%2f..%2finput.json", "%2fetc%2fpasswd", "adapter%00"])
def test_a_path_that_is_not_in_the_manifest_is_404(http: httpx.Client, job: str, path: str) -> None:
    response = http.get(f"/v1/jobs/{job}/files/{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_factors_are_there_where_a_job_made_some(http: httpx.Client, job: str, shared_api: Api) -> None:
    refused = http.get(f"/v1/jobs/{job}/factored.zip")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert "take model.zip" in refused.json()["error"]["message"]
    made = finish(shared_api, "factor")
    archive = zipfile.ZipFile(io.BytesIO(http.get(f"/v1/jobs/{made}/factored.zip").content))
    name = f"{made}-factored"
    assert sorted(archive.namelist()) == [
        f"{name}/{file}" for file in ("factored/load_factored.py", "report.html", "report.json")
    ]
    assert http.delete(f"/v1/jobs/{made}").status_code == 204


def test_there_are_no_artifacts_before_success(shared_api: Api) -> None:
    job_id = shared_api.submit()
    for path in ("report", "files", f"files/{PATH}", "adapter.zip", "model.zip"):
        response = shared_api.http.get(f"/v1/jobs/{job_id}/{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")


def test_what_two_jobs_share_stays_until_both_are_deleted(api: Api) -> None:
    first, second = finish(api), finish(api)
    files = api.http.get(f"/v1/jobs/{second}/files").json()["data"]
    assert api.http.delete(f"/v1/jobs/{first}").status_code == 204
    assert api.http.get(f"/v1/jobs/{first}").status_code == 404
    assert api.http.get(f"/v1/jobs/{first}/files").status_code == 404
    for file in files:
        assert hashlib.sha256(api.http.get(file["url"]).content).hexdigest() == file["sha256"]
    assert api.http.delete(f"/v1/jobs/{second}").status_code == 204
    artifacts = api.settings.artifacts
    assert not [path for path in artifacts.rglob("*") if path.is_file() and path.name != "lock"]
    with pytest.raises(JobNotFound):
        api.service.queue.get(second)
