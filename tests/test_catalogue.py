"""`c2i models add`: the real client of the Hub against a small server. SmolLM2 has its own session fixture."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from service import models
from service.errors import C2IError, Conflict, InvalidInput, ModelNotFound, Unavailable, UnusableModel
from tests.hub import COMMIT, OLD_COMMIT, TOKEN, Hub, repository, serving
from tests.live import REPOSITORY, wait_until
from workers.catalogue import add_model, check_sha256

WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tiny_models: Callable[..., Path]) -> Iterator[Hub]:
    """The Hub's client reads HF_ENDPOINT when it is imported, so its constants are set here."""
    usable = repository(
        tiny_models("llama"),
        **{
            "README.md": b"# Hello",
            "modeling_evil.py": b"raise SystemExit",
            "pytorch_model.bin": b"pickle",
            "consolidated.safetensors": b"weights again",
            "onnx/config.json": b"{}",
        },
    )
    served = Hub(
        repositories={
            "owner/tiny": usable,
            "owner/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
            "owner/coded": usable | {"config.json": b'{"model_type": "llama", "auto_map": {"AutoModel": "evil.Evil"}}'},
            "owner/gated": usable,
            "owner/private": usable,
        },
        gated={"owner/gated"},
        private={"owner/private"},
    )
    with serving(served) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served


@pytest.fixture(autouse=True)
def quiet_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warnings about retries are not this project's."""
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "disabled", True)


def is_usable(data: Path, model: str = "owner/tiny") -> bool:
    """Whether the model is installed whole and nothing is left beside it."""
    assert models.resolve(data / "models", model).revision == COMMIT
    return not list((data / ".adding").iterdir())


def test_a_model_is_pinned_to_its_commit_and_holds_nothing_that_runs(hub: Hub, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = add_model("owner/tiny", tmp_path, lines.append)
    assert folder == tmp_path / "models/owner/tiny"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {".revision", "config.json", "tokenizer.json", "README.md", WEIGHTS} <= found
    assert not {name for name in found if name.endswith((".py", ".bin"))}
    assert "consolidated.safetensors" not in found and not any("onnx" in name for name in found)
    assert (folder / WEIGHTS).read_bytes() == hub.repositories["owner/tiny"][WEIGHTS]
    assert lines == [f"Downloading owner/tiny at {COMMIT} ...", f"owner/tiny is ready: {folder}"]
    assert is_usable(tmp_path)
    # By commit, never by branch: what a branch means may change between two files.
    assert all(f"/resolve/{COMMIT}/" in one.path for one in hub.requests if "/resolve/" in one.path)
    assert not [one for one in hub.requests if one.path.endswith((".py", ".bin", "consolidated.safetensors"))]


def test_a_revision_is_resolved_and_another_one_does_not_replace_it(hub: Hub, tmp_path: Path) -> None:
    add_model("owner/tiny", tmp_path, revision="v1")
    assert (tmp_path / "models/owner/tiny/.revision").read_text() == f"{OLD_COMMIT}\n"
    with pytest.raises(Conflict, match=OLD_COMMIT) as caught:
        add_model("owner/tiny", tmp_path, revision="v2")
    assert caught.value.param == "revision"
    with pytest.raises(ModelNotFound, match="no revision `nightly`") as missing:
        add_model("owner/coded", tmp_path, revision="nightly")
    assert missing.value.param == "revision"


def test_a_model_that_is_there_is_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    add_model("owner/tiny", tmp_path)
    hub.requests.clear()
    lines: list[str] = []
    folder = add_model("owner/tiny", tmp_path, lines.append)
    assert lines == [f"owner/tiny is already there: {folder}"]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("owner/absent", ModelNotFound, "no model `owner/absent`"),
        ("owner/private", ModelNotFound, "open to your HF_TOKEN"),
        ("owner/gated", UnusableModel, "HF_TOKEN"),
        ("owner/pickled", UnusableModel, "no safetensors"),
        ("owner/coded", UnusableModel, "auto_map"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_in_words_and_installs_nothing(
    model: str, error: type[C2IError], words: str, hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        add_model(model, tmp_path)
    assert not (tmp_path / "models").exists()
    assert not [path for path in tmp_path.rglob("*.safetensors") if model != "owner/gated"]


def test_a_token_opens_a_private_model_and_never_reaches_the_store_of_large_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    add_model("owner/private", tmp_path)
    stored = hub.asked("/store/")
    assert [one.path.rsplit("/", 1)[1] for one in stored] == [WEIGHTS]
    assert [one.authorization for one in stored] == [None]
    assert {one.authorization for one in hub.asked("/resolve/") + hub.asked("/api/")} == {f"Bearer {TOKEN}"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_token_that_is_refused_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.statuses = [(401, {"X-Error-Message": "Invalid credentials in Authorization header"})]
    with pytest.raises(InvalidInput, match="refuses the token") as caught:
        add_model("owner/tiny", tmp_path)
    assert caught.value.param == "HF_TOKEN"


def test_a_connection_that_breaks_within_a_file_goes_on_from_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.broken = [30_000, 30_000]
    add_model("owner/tiny", tmp_path)
    assert [one.range for one in hub.asked("/store/")] == [None, "bytes=30000-", "bytes=60000-"]
    assert is_usable(tmp_path)


def test_a_server_that_fails_for_a_moment_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.file_statuses = [(429, {"Retry-After": "0"})]
    add_model("owner/tiny", tmp_path)
    assert is_usable(tmp_path)


@pytest.mark.parametrize("headers", [{"Retry-After": "3600"}, {"RateLimit": '"api";r=0;t=3600'}])
def test_a_server_that_asks_for_an_hours_patience_is_not_waited_for(
    headers: dict[str, str], hub: Hub, tmp_path: Path
) -> None:
    hub.file_statuses = 9 * [(429, headers)]
    with pytest.raises(Unavailable, match="asks to wait 3600 s"):
        add_model("owner/tiny", tmp_path)
    assert not (tmp_path / "models").exists()
    hub.file_statuses.clear()
    add_model("owner/tiny", tmp_path)
    assert is_usable(tmp_path)


def test_a_damaged_file_is_fetched_again_and_refused_if_it_stays_so(hub: Hub, tmp_path: Path) -> None:
    hub.damaged = [WEIGHTS, "config.json"]
    add_model("owner/tiny", tmp_path)
    assert len(hub.asked("/store/")) == 2
    assert is_usable(tmp_path)
    shutil.rmtree(tmp_path / "models")
    hub.damaged = 9 * [WEIGHTS]
    with pytest.raises(Unavailable, match=r"model\.safetensors of owner/tiny arrived damaged twice"):
        add_model("owner/tiny", tmp_path)
    assert not list(tmp_path.glob("models/*/*"))


def test_a_killed_download_goes_on_with_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    # Weights come last here, and hang: everything else has arrived when the process is killed.
    hub.repositories["owner/tiny"] = {**hub.repositories["owner/tiny"]}
    weights = hub.repositories["owner/tiny"][WEIGHTS]
    hub.file_statuses = []
    hub.broken = 99 * [len(weights) // 2]
    code = (
        "import sys; from pathlib import Path; from huggingface_hub import constants\n"
        f"constants.ENDPOINT = {hub.url!r}\n"
        f"constants.HUGGINGFACE_CO_URL_TEMPLATE = {hub.url!r} + '/{{repo_id}}/resolve/{{revision}}/{{filename}}'\n"
        "from workers.catalogue import add_model; add_model('owner/tiny', Path(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(hub.asked("/store/")) >= 2 and hub.asked("tokenizer.json"), 60, "the weights have begun")
    wait_until(
        lambda: list(tmp_path.glob(".adding/*/models/owner/tiny/tokenizer.json")), 30, "the small files have arrived"
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "models").exists()
    hub.broken.clear()
    hub.requests.clear()
    add_model("owner/tiny", tmp_path)
    assert hub.asked("/store/")
    assert not hub.asked("tokenizer.json")
    assert is_usable(tmp_path)


def test_a_hub_that_does_not_answer_is_an_error_worth_retrying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="does not answer") as caught:
        add_model("owner/tiny", tmp_path)
    assert caught.value.retryable


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE is set"):
        add_model("owner/tiny", tmp_path)
    assert hub.requests == []


def test_a_disk_too_small_is_noticed_before_the_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(Unavailable, match=r"needs .* GB on the data folder's disk, which has 0\.0 GB free"):
        add_model("owner/tiny", tmp_path)
    assert not hub.asked("/resolve/")


@pytest.mark.parametrize("model", ["../etc", "/etc", "https://example.org/model", "owner/../etc", "unknown"])
def test_an_id_that_is_no_model_never_reaches_the_network(model: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        add_model(model, tmp_path)
    assert hub.requests == []


def test_a_file_with_another_checksum_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "carrier.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(UnusableModel, match=r"carrier\.whl has sha256 [0-9a-f]{64}"):
        check_sha256(wheel, 64 * "0")
