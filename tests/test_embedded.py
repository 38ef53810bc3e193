"""The embedded Redis: what it acknowledged it keeps, one for a data folder, gone with its owner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from redis import Redis

from service import embedded
from service.connections import connect
from service.embedded import MAX_SOCKET_BYTES, EmbeddedRedis, find_server, socket_path
from service.errors import Conflict, Unavailable
from tests.live import REPOSITORY, is_gone, wait_until


def client(server: EmbeddedRedis) -> Redis:
    return connect(server.url)


def test_it_listens_on_no_port_and_syncs_every_write(redis: EmbeddedRedis) -> None:
    with client(redis) as found:
        settings = {name: found.config_get(name)[name] for name in ("port", "appendonly", "appendfsync", "save")}
        assert settings == {"port": "0", "appendonly": "yes", "appendfsync": "always", "save": ""}
        assert found.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
    path = Path(redis.url.removeprefix("unix://"))
    assert path.stat().st_mode & 0o777 == 0o700
    assert redis.pid is not None
    assert not psutil.Process(redis.pid).net_connections("inet")


def test_what_was_acknowledged_survives_a_kill_and_the_server_comes_back(redis: EmbeddedRedis) -> None:
    with client(redis) as found:
        for i in range(50):
            found.rpush("list", i)
        before = redis.pid
        assert before is not None
        psutil.Process(before).kill()
        assert found.llen("list") == 50
        assert redis.pid not in (None, before)


def test_what_was_stored_is_there_after_a_stop_and_a_start(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    with client(server) as found:
        found.set("a", "b")
    pid = server.pid
    server.stop()
    assert pid is not None
    assert not psutil.pid_exists(pid)
    again = EmbeddedRedis(tmp_path)
    again.start()
    with client(again) as found:
        assert found.get("a") == b"b"
    again.stop()


def test_a_data_folder_has_one_server(redis: EmbeddedRedis, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.1)
    with pytest.raises(Conflict, match="serves the data folder"):
        EmbeddedRedis(data).start()
    with client(redis) as found:
        assert found.ping()


def test_a_deep_data_folder_gets_a_short_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "/".join(["a" * 40] * 4)
    runtime = tmp_path / "run"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    server = EmbeddedRedis(deep)
    server.start()
    path = Path(server.url.removeprefix("unix://"))
    assert path == socket_path(deep)
    assert path.is_relative_to(runtime)
    assert len(str(path)) <= MAX_SOCKET_BYTES
    with client(server) as found:
        assert found.ping()
    server.stop()


def test_a_runtime_folder_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("a" * 120)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    folder = socket_path(deep).parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(Unavailable, match="written by others"):
        EmbeddedRedis(deep).start()


def test_without_a_server_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_server().name == "redis-server"  # the wheel's
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="apt-get install redis-server"):
        find_server()


def test_a_server_that_is_installed_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "valkey-server"
    installed.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == installed


def test_it_dies_with_its_owner_however_that_dies(tmp_path: Path) -> None:
    script = (
        "import sys, threading; from pathlib import Path; from service.embedded import EmbeddedRedis;"
        "server = EmbeddedRedis(Path(sys.argv[1])); server.start(); print(server.pid, flush=True);"
        "threading.Event().wait()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    process = psutil.Process(int(owner.stdout.readline()))
    assert not is_gone(process)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: is_gone(process), 5, "Redis is gone")
    # And its folder is free at once.
    server = EmbeddedRedis(tmp_path)
    server.start()
    server.stop()
