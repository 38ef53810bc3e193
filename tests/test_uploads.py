"""Uploaded files on disk: whole or not there, their owners' own, bounded, and gone when their time is over."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from service import uploads
from service.artifacts import ArtifactStore
from service.errors import Conflict, NotFound
from service.uploads import LEFTOVER, Upload, Uploads

DAY = timedelta(days=1)


@pytest.fixture
def files(tmp_path: Path) -> Uploads:
    return Uploads(ArtifactStore(tmp_path))


def on_disk(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "uploads").rglob("*") if path.is_file())


def age(path: Path, by: timedelta) -> None:
    then = time.time() - by.total_seconds()
    os.utime(path, (then, then))


def test_a_file_belongs_to_its_owner_and_none_owns_all(files: Uploads) -> None:
    mine, theirs, nobodys = (files.put(owner, "a.jsonl", owner.encode(), DAY) for owner in ("key_a", "key_b", ""))
    assert files.list_files("key_a") == [mine]
    assert files.list_files(None) == sorted([mine, theirs, nobodys], key=lambda one: one.id)
    with files.open(theirs.id, "key_b") as stream:
        assert stream.read() == b"key_b"
    for ask in (files.get, files.open, files.delete):
        for owner in ("key_a", "", "key_"):
            with pytest.raises(NotFound):
                ask(theirs.id, owner)
    files.delete(theirs.id, None)
    assert files.list_files("key_b") == []


@pytest.mark.parametrize("file_id", ["", "file-", "../jobs/x", "file-00000000000000000000/..", "file-" + "é" * 20])
def test_what_is_no_files_id_never_becomes_a_path(files: Uploads, file_id: str) -> None:
    files.put("", "a.jsonl", b"x", DAY)
    for owner in (None, ""):
        with pytest.raises(NotFound):
            files.get(file_id, owner)


def test_a_file_whose_record_was_not_written_is_not_there_and_is_cleared_later(files: Uploads, tmp_path: Path) -> None:
    cut, whole = (files.put("", "a.jsonl", b"x", DAY) for _ in range(2))
    folder = tmp_path / "uploads" / "_"
    (folder / f"{cut.id}.json").rename(folder / f".{cut.id}.json.123")  # as a process that was killed leaves it
    assert files.list_files("") == [whole]
    with pytest.raises(NotFound):
        files.open(cut.id, None)
    files.expire()
    assert len(on_disk(tmp_path)) == 4  # the request may still go on
    for path in folder.iterdir():
        age(path, LEFTOVER + DAY)
    files.expire()
    assert on_disk(tmp_path) == sorted([f"{whole.id}.json", f"{whole.id}.jsonl"])


def test_a_file_ends_with_its_time(files: Uploads, tmp_path: Path) -> None:
    kept, over = files.put("", "a.jsonl", b"x", DAY), files.put("", "b.jsonl", b"x", timedelta(0))
    assert over.expires_at == over.created_at
    assert files.list_files(None) == [kept]
    with pytest.raises(NotFound):
        files.get(over.id, "")
    files.expire()
    assert on_disk(tmp_path) == sorted([f"{kept.id}.json", f"{kept.id}.jsonl"])


def test_what_one_owner_may_keep_is_bounded(files: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_FILES", 2)
    monkeypatch.setattr(uploads, "MAX_BYTES", 10)
    first: Upload = files.put("key_a", "a.jsonl", b"x" * 8, DAY)
    for content in (b"x" * 3, b"x" * 11):
        with pytest.raises(Conflict, match="delete some"):
            files.put("key_a", "a.jsonl", content, DAY)
    files.put("key_a", "a.jsonl", b"x", DAY)
    with pytest.raises(Conflict):
        files.put("key_a", "a.jsonl", b"", DAY)
    files.put("key_b", "a.jsonl", b"x" * 8, DAY)
    files.delete(first.id, "key_a")
    files.put("key_a", "a.jsonl", b"x" * 3, DAY)
