"""How the page's files are served, and what it is told of the service."""

from __future__ import annotations

import re

import pytest

from service.routes.page import WEB, page_files
from service.settings import MAX_BODY_BYTES
from tests.live import Api

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@pytest.mark.parametrize("path", page_files())
def test_a_file_of_the_page_has_its_type_and_may_run_nothing_from_elsewhere(shared_api: Api, path: str) -> None:
    response = shared_api.http.get(path)
    file = page_files()[path]
    assert (response.status_code, response.content) == (200, file.read_bytes())
    assert response.headers["content-type"].partition(";")[0] == TYPES[file.suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    again = shared_api.http.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert shared_api.http.head(path).headers["content-length"] == str(len(response.content))


def test_the_page_names_no_other_host_to_load_from() -> None:
    for file in page_files().values():
        if file.suffix in (".html", ".css") and "vendor" not in file.parts:
            loads = re.findall(r"""(?:src|href|url|import)[=(\s]+["']?((?:https?:)?//[^"')\s]+)""", file.read_text())
            assert not loads, f"{file.relative_to(WEB)} loads {loads}"


def test_what_is_no_file_of_the_page_is_not_found(shared_api: Api) -> None:
    for path in ("/nothing.js", "/vendor/", "/vendor/README.md", "/../main.py", "/%2e%2e/main.py", "/web/index.html"):
        response = shared_api.http.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_the_service_tells_what_it_offers_and_asks_for(shared_api: Api) -> None:
    info = shared_api.http.get("/v1/service").json()
    assert info["keys_required"] is shared_api.settings.keys_in_force is False
    assert (info["min_examples"], info["max_examples"]) == (8, 10_000)
    assert info["max_body_bytes"] == MAX_BODY_BYTES
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
