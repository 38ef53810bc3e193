"""The artifact store: whole or not there at all, and a late attempt is never read."""

from __future__ import annotations

import fcntl
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from service.artifacts import ArtifactStore
from service.errors import NotFound
from service.jobs import JobSpec
from tests.live import spec


def publish(store: ArtifactStore, job_id: str, attempt: int, **files: str) -> None:
    with store.workspace(job_id, attempt) as out:
        for name, content in files.items():
            (out / name).write_text(content)
        store.put_input(job_id, JobSpec.parse(spec()))
        store.publish(job_id, attempt, out)


def contents(store: ArtifactStore, job_id: str, attempt: int) -> dict[str, str]:
    found = {}
    for file in store.files(job_id, attempt):
        with store.open(file) as stream:
            found[file.path] = stream.read().decode()
    return found


def test_what_is_published_is_read_and_its_workspace_gone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store, "job", 1, a="1", b="2")
    assert contents(store, "job", 1) == {"a": "1", "b": "2"}
    assert store.workspaces() == set()


def test_a_late_attempt_does_not_touch_a_newer_ones_files(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store, "job", 2, a="new")
    publish(store, "job", 1, a="late")
    assert contents(store, "job", 2) == {"a": "new"}
    store.withdraw("job", 1)
    store.sweep()
    assert contents(store, "job", 2) == {"a": "new"}
    with pytest.raises(NotFound):
        store.files("job", 1)
    assert len(list((tmp_path / "blobs").glob("*/*"))) == 1


def test_an_attempt_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(RuntimeError), store.workspace("job", 1) as out:
        (out / "half").write_text("half")
        raise RuntimeError
    assert store.workspaces() == set()
    with pytest.raises(NotFound):
        store.files("job", 1)


def test_a_killed_attempt_leaves_a_workspace_that_can_be_found_and_cleared(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (tmp_path / "work" / "job.3").mkdir()
    (tmp_path / "work" / "job.3" / "half").write_text("half")
    assert store.workspaces() == {("job", 3)}
    store.clear_workspace("job", 3)
    assert store.workspaces() == set()


def test_a_sweep_waits_for_what_is_being_published(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store, "job", 1, a="1")
    store.withdraw("job", 1)
    with (tmp_path / "lock").open("w") as publishing:
        fcntl.flock(publishing, fcntl.LOCK_SH)
        store.sweep()
        assert len(list((tmp_path / "blobs").glob("*/*"))) == 1
    store.sweep()
    assert list((tmp_path / "blobs").glob("*/*")) == []


def test_inputs_come_back_as_they_were(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    given = JobSpec.parse(spec(metadata={"a": "ü"}, passes=3))
    store.put_input("job", given)
    assert store.get_input("job") == given
    assert store.older_than(timedelta(0)) == ["job"]
    assert store.older_than(timedelta(hours=1)) == []
    store.delete("job")
    with pytest.raises(NotFound):
        store.get_input("job")


def test_jobs_that_are_deleted_at_once_are_no_trouble_to_each_other(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store, "kept", 1, a="kept")

    def come_and_go(name: str) -> None:
        for _ in range(25):
            store.put_input(name, JobSpec.parse(spec()))
            store.delete(name)  # and a sweep over the others' folders

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, map(str, range(8))))
    assert contents(store, "kept", 1) == {"a": "kept"}
    assert len(list((tmp_path / "blobs").glob("*/*"))) == 1
