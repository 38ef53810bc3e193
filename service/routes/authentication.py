"""Who asks, and whether they may. A route's first parameter says what it needs:

    def get_job(caller: Reader, ...)

Dependencies run in order, so a stranger is told 401 before anything else is looked at. Whose jobs a caller sees is
filtered in the store, where what belongs to another is as if it were not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from service.errors import Forbidden, TooManyRequests, Unauthenticated
from service.keys import Scope
from service.routes.dependencies import TheService, documented

BEARER = HTTPBearer(auto_error=False, scheme_name="key", description="An API key of `c2i keys create`.")


@dataclass(frozen=True)
class Caller:
    """Who asks: without keys in force, everybody is the same nameless caller."""

    owner: str
    """Signs the jobs that the caller submits: a key's ID; empty without keys."""
    sees: str | None
    """Whose jobs it may see; None for everybody's."""


def needs(scope: Scope) -> Any:
    """The dependency of a route for callers whose key has this scope."""

    async def authenticate(
        service: TheService,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
    ) -> Caller:
        if not service.settings.keys_in_force:
            service.rates.take("")
            return Caller(owner="", sees=None)
        if credentials is None:
            raise Unauthenticated("an API key is needed: `Authorization: Bearer KEY`")
        key = await run_in_threadpool(service.keys.authenticate, credentials.credentials)
        service.rates.take(key.id)
        key.check_scope(scope)
        return Caller(owner=key.id, sees=None if Scope.ADMIN in key.scopes else key.id)

    return Depends(authenticate)


Reader = Annotated[Caller, needs(Scope.READ)]
Submitter = Annotated[Caller, needs(Scope.SUBMIT)]
Admin = Annotated[Caller, needs(Scope.ADMIN)]


def document_keys(schema: dict[str, Any], *, in_force: bool) -> None:
    """Make an OpenAPI document say what is so: 429 where a caller is counted, 401 and 403 where a key is needed, and
    no keys where none are."""
    refused = documented(TooManyRequests, *((Unauthenticated, Forbidden) if in_force else ()))
    refusals = {
        str(status): {
            "description": response["description"],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
        }
        for status, response in refused.items()
        if int(status) < 500
    }
    for operations in schema["paths"].values():
        for operation in operations.values():
            if "security" in operation:
                operation["responses"] |= refusals
                if not in_force:
                    del operation["security"]
    if not in_force:
        schema["components"].pop("securitySchemes", None)
