"""`c2i models add`: the real client of the Hub against a small server. SmolLM2 has its own session fixture."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from service.errors import InvalidInput, ModelNotFound, Unavailable, UnusableModel
from workers.catalogue import add_model, check_sha256

COMMIT = "c0ffee" + 34 * "0"
SAFE = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "model-00001-of-00001.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# Hello",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"weights again",
    "onnx/config.json": b"{}",
}
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "owner/safe": SAFE,
    "owner/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "owner/gated": SAFE,
}


class Hub(BaseHTTPRequestHandler):
    """The three endpoints that a snapshot download asks: model, tree and resolve."""

    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.requested.append(path)
        found = re.fullmatch(r"(?:/api/models)?/(\w+/\w+)(?:/(tree|resolve)/(\w+)(?:/(.+))?)?", path)
        files = REPOSITORIES.get(found[1]) if found else None
        if found is None or files is None:
            return self.answer(404, error="RepoNotFound")
        if found[2] is not None:
            assert found[3] == COMMIT, "files are asked for by commit, never by branch"
        if found[2] == "tree":
            tree = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        if found[2] == "resolve":
            if found[1] == "owner/gated":
                return self.answer(403, error="GatedRepo")
            return self.answer(200, files[found[4]])
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, json.dumps({"id": found[1], "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The Hub's client reads HF_ENDPOINT when it is imported, so its constant is set here."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    Hub.requested.clear()
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_pinned_to_its_commit_and_holds_nothing_that_runs(hub: type[Hub], tmp_path: Path) -> None:
    lines: list[str] = []
    folder = add_model("owner/safe", tmp_path, lines.append)
    assert folder == tmp_path / "models/owner/safe"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        ".revision",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    assert (folder / ".revision").read_text().strip() == COMMIT
    assert (folder / "config.json").read_bytes() == SAFE["config.json"]
    assert lines == [f"Downloading owner/safe at {COMMIT} ...", f"owner/safe is ready: {folder}"]


def test_a_model_that_is_there_is_not_asked_for_again(hub: type[Hub], tmp_path: Path) -> None:
    add_model("owner/safe", tmp_path)
    hub.requested.clear()
    lines: list[str] = []
    folder = add_model("owner/safe", tmp_path, lines.append)
    assert lines == [f"owner/safe is already there: {folder}"]
    assert hub.requested == []


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("owner/absent", ModelNotFound, "no model `owner/absent`"),
        ("owner/gated", UnusableModel, "HF_TOKEN"),
        ("owner/pickled", UnusableModel, "no safetensors"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_in_words_and_leaves_nothing(
    model: str, error: type[Exception], words: str, hub: type[Hub], tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        add_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_does_not_answer_is_an_error_worth_retrying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="does not answer") as caught:
        add_model("owner/safe", tmp_path)
    assert caught.value.retryable
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["../etc", "/etc", "https://example.org/model", "owner/../etc", "unknown"])
def test_an_id_that_is_no_model_never_reaches_the_network(model: str, hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        add_model(model, tmp_path)
    assert hub.requested == []


def test_a_file_with_another_checksum_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "carrier.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(UnusableModel, match=r"carrier\.whl has sha256 [0-9a-f]{64}"):
        check_sha256(wheel, 64 * "0")
