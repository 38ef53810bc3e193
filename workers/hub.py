"""A base model from the Hugging Face Hub, by the Hub's own client: whole, verified, or not at all.

The revision that was asked for is resolved to a commit, and every file is asked for by it. Safetensors, JSON and
tokenizer files alone are fetched: no pickle weights, no Python. Files arrive in a folder named by the commit that
outlives a failure or a kill, so that the next try fetches only what is missing; within a file the client goes on where
a connection broke. Each file is held against the checksum that the Hub names for it, which the client does not do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError: its HTTP client's, re-exported
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils._paths import filter_repo_objects
from huggingface_hub.utils.tqdm import disable_progress_bars

from service import models
from service.artifacts import disk_is_full
from service.errors import C2IError, InvalidInput, ModelNotFound, Unavailable, UnusableModel

# Top level of a repository only: variants in other formats stand in subfolders, and `consolidated.safetensors` would
# be the same weights a second time. The card names the licence.
FILES = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt", "LICENSE*", "README.md"]
IGNORED = ["*/*"]
# A server that is silent for so long is gone; one that asks to wait longer is not waited for.
TIMEOUT_SECONDS = 30.0
PATIENCE_SECONDS = 60.0
# What is left of a download that nobody went on with.
ABANDONED_SECONDS = 7 * 86_400.0

Say = Callable[[str], None]


@contextlib.contextmanager
def downloaded(model: str, revision: str | None, data: Path, say: Say) -> Iterator[Path | None]:
    """The model's folder, complete and checked, on the disk of `data`, to be renamed to its place; None if another
    process has put it there meanwhile.

    Raises:
        C2IError: the model or revision is unknown, gated, unusable or damaged, or the Hub or the disk fails.
    """
    disable_progress_bars()
    set_client_factory(_client)
    api = HfApi()
    with _explained(model, revision):
        info = api.model_info(model, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        siblings = info.siblings or []
        wanted = list(
            filter_repo_objects(
                siblings, allow_patterns=FILES, ignore_patterns=IGNORED, key=lambda sibling: sibling.rfilename
            )
        )
        if not any(Path(file.rfilename).match("model*.safetensors") for file in wanted):
            raise UnusableModel(f"{model} has no safetensors weights; other formats are not loaded", param="model")
        commit = str(info.sha)
        with _staging(data, f"{model.replace('/', '--')}@{commit}", say) as root:
            folder = root / "models" / model
            if (data / "models" / model).is_dir():
                yield None
                return
            _check_room(model, wanted, folder)
            say(f"Downloading {model} at {commit} ...")
            _fetch(api, model, commit, wanted, folder)
            shutil.rmtree(folder / ".cache", ignore_errors=True)
            (folder / models.REVISION_FILE).write_text(f"{commit}\n")
            models.resolve(root / "models", model)
            yield folder


def _client() -> Any:
    """The Hub client's own, with a limit to its patience: it would sleep for as long as a server says."""
    client = default_client_factory()
    client.timeout = TIMEOUT_SECONDS
    client.event_hooks = {**client.event_hooks, "response": [_refuse_long_waits]}
    return client


def _refuse_long_waits(response: Any) -> None:
    asked = response.headers.get("Retry-After", "")
    reset = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    seconds = float(reset[1]) if reset else float(asked) if asked.isdecimal() else 0.0
    if response.status_code in (429, 503) and seconds > PATIENCE_SECONDS:
        raise Unavailable(
            f"the Hub asks to wait {seconds:.0f} s before the next request; try again then, or set HF_TOKEN for a "
            "higher limit. What has arrived is kept."
        )


@contextlib.contextmanager
def _staging(data: Path, name: str, say: Say) -> Iterator[Path]:
    """The folder of one commit's download, this process's alone. It stays where the download ends early, unless the
    model can never be used."""
    parent = data / ".adding"
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if old.is_dir() and time.time() - old.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    lock = parent / f"{name}.lock"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another process is downloading it; waiting ...")
            fcntl.flock(held, fcntl.LOCK_EX)
        root = parent / name
        root.mkdir(exist_ok=True)
        try:
            yield root
        except UnusableModel:
            shutil.rmtree(root)
            raise
        shutil.rmtree(root)
        lock.unlink(missing_ok=True)


def _check_room(model: str, wanted: list[Any], folder: Path) -> None:
    needed = sum(file.size or 0 for file in wanted if not (folder / file.rfilename).is_file())
    free = shutil.disk_usage(folder.parents[2]).free
    if needed > free:
        raise Unavailable(
            f"{model} needs {needed / 1e9:.1f} GB on the data folder's disk, which has {free / 1e9:.1f} GB free"
        )


def _fetch(api: HfApi, model: str, commit: str, wanted: list[Any], folder: Path) -> None:
    """Download what is missing and check all; what is damaged is fetched once more."""
    for last in (False, True):
        api.snapshot_download(
            model, revision=commit, local_dir=folder, allow_patterns=FILES, ignore_patterns=IGNORED, max_workers=4
        )
        damaged = [file.rfilename for file in wanted if not _is_whole(folder / file.rfilename, file)]
        if not damaged:
            return
        for name in damaged:
            (folder / name).unlink(missing_ok=True)
            (folder / ".cache/huggingface/download" / f"{name}.metadata").unlink(missing_ok=True)
        if last:
            raise Unavailable(f"{damaged[0]} of {model} arrived damaged twice: its checksum is not the Hub's")


def _is_whole(path: Path, file: Any) -> bool:
    """Whether a file is what the Hub says it holds: sha256 of a large file, git's sha1 of another."""
    if not path.is_file():
        return False
    with path.open("rb") as opened:
        if file.lfs is not None:
            return bool(hashlib.file_digest(opened, "sha256").hexdigest() == file.lfs.sha256)
        content = opened.read()
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(digest.hexdigest() == file.blob_id)


@contextlib.contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """The client's errors in words for the operator."""
    try:
        yield
    except C2IError:
        raise
    except GatedRepoError:
        raise UnusableModel(
            f"{model} is gated: accept its terms on its page, then set HF_TOKEN and try again", param="model"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{model} has no revision `{revision}`", param="revision") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"the Hub has no model `{model}` that is public or open to your HF_TOKEN", param="model"
        ) from None
    except OfflineModeIsEnabled:
        raise Unavailable(f"HF_HUB_OFFLINE is set; unset it to download {model}") from None
    except HfHubHTTPError as error:
        raise _refused(model, error.response.status_code) from None
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise Unavailable(
            f"the Hub does not answer ({type(error).__name__}); what of {model} has arrived is kept for the next try"
        ) from error
    except OSError as error:
        if disk_is_full(error):
            raise Unavailable(f"the data folder's disk is full; {model} was not downloaded") from None
        raise


def _refused(model: str, status: int) -> C2IError:
    if status == 401:
        return InvalidInput("the Hub refuses the token in HF_TOKEN; make a new one, or unset it", param="HF_TOKEN")
    if status == 429:
        return Unavailable("the Hub's rate limit is reached; try again later, or set HF_TOKEN for a higher one")
    return Unavailable(f"the Hub answers with status {status}; what of {model} has arrived is kept for the next try")
