"""The error tree: complete, as its docstring draws it, and what it says when the unforeseen happens."""

from __future__ import annotations

import errno
import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from redis.exceptions import BusyLoadingError, ConnectionError, ResponseError, TimeoutError
from starlette.exceptions import HTTPException

from service import errors
from service.client.asking import kinds
from service.errors import C2IError
from service.routes.dependencies import translate


def tree(kind: type[C2IError] = C2IError) -> list[type[C2IError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    drawn = {
        match[1]: (match[2], int(match[3]), match[4] == "yes")
        for line in (errors.__doc__ or "").splitlines()
        if (match := re.search(r"── (\w+)\s+(\w+)\s+(\d{3})\s*(yes)?", line))
    }
    actual = {kind.__name__: (kind.code, kind.status, kind.retryable) for kind in tree()[1:]}
    assert drawn == actual


def test_every_error_has_a_code_of_its_own_and_comes_back_as_itself_over_http() -> None:
    known = [kind for kind in tree() if kind is not C2IError]
    assert len({kind.code for kind in known}) == len(known)
    assert {kind.code: kind for kind in known} == kinds()


@pytest.mark.parametrize(
    ("foreign", "code"),
    [
        (ConnectionError("secret"), "unavailable"),
        (TimeoutError("secret"), "unavailable"),
        (BusyLoadingError("secret"), "unavailable"),
        (ResponseError("secret"), "unavailable"),
        (OSError(errno.ENOSPC, "secret"), "unavailable"),
        (OSError(errno.EACCES, "secret"), "internal_error"),
        (ValueError("secret"), "internal_error"),
        (RecursionError("secret"), "internal_error"),
        (MemoryError("secret"), "internal_error"),
    ],
)
def test_foreign_errors_are_translated_and_say_nothing_of_themselves(foreign: Exception, code: str) -> None:
    ours = translate(foreign)
    assert ours.code == code
    assert "secret" not in ours.message


def test_every_http_status_is_one_of_our_errors() -> None:
    same = {404, 405, 413, 415}
    for status in range(400, 600):
        expected = status if status in same else 422 if status < 500 else 500
        assert translate(HTTPException(status)).status == expected


def test_an_unforeseen_error_is_500_in_the_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.main import _respond

    app = FastAPI()
    app.add_exception_handler(Exception, _respond)

    @app.get("/")
    def fail() -> None:
        raise RuntimeError("secret")

    response = TestClient(app, raise_server_exceptions=False).get("/")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
