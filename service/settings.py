"""Everything an operator can set, read once from the environment (`C2I_*`, and `REDIS_URL` under its plain name)."""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.jobs import invalid_input

MAX_BODY_BYTES = 16_000_000
KEYED_REQUESTS_PER_SECOND = 100.0


class Settings(BaseSettings):
    """One frozen object, made at a process's start and handed down."""

    model_config = SettingsConfigDict(env_prefix="C2I_", env_ignore_empty=True, frozen=True, validate_by_name=True)

    data: Path = Path("data")
    """Models, artifacts, caches and the embedded Redis live below."""
    host: str = "127.0.0.1"
    """Address to listen on; on any but loopback, API keys are asked for."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free one."""
    workers: Annotated[int, Field(ge=0, le=64)] = 1
    """Worker processes that `c2i serve` starts beside the API."""
    redis_url: Annotated[str | None, Field(validation_alias="REDIS_URL")] = None
    """An external Redis or Valkey, 6.2 or newer; without it an embedded one is started."""
    job_ttl_seconds: Annotated[int, Field(ge=1)] = 30 * 86_400
    """How long a finished job's record and artifacts are kept."""
    job_timeout_seconds: Annotated[int, Field(ge=1)] = 86_400
    """How long a job may run."""
    job_memory_bytes: Annotated[int | None, Field(ge=1)] = None
    """How much memory a job may take; without it, what the machine has."""
    job_disk_bytes: Annotated[int, Field(ge=1)] = 100_000_000_000
    """How much a job may write; checked before it begins, by its model's size, and while it runs."""
    grace_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long a worker that is told to stop (SIGTERM) lets its job run on before it hands it back."""
    max_requests_per_second: Annotated[float | None, Field(ge=0)] = None
    """Of each API key, in the long run; 0 for no limit. Without it 100, and no limit where no keys are in force."""
    max_waiting_jobs: Annotated[int | None, Field(ge=1)] = 10_000
    """Of each API key, in the queue."""
    max_running_jobs: Annotated[int | None, Field(ge=1)] = None
    """Of each API key, at the same time; without it, as many as there are workers."""
    max_tokens: Annotated[int, Field(ge=1)] = 2_000_000
    """Of a job: prompts and all answers of its three lists."""
    max_model_parameters: Annotated[int | None, Field(ge=1)] = None
    """Of a job's model; without it, whatever is installed."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Requests are logged on INFO, what failed on WARNING and ERROR."""
    webhooks: bool = False
    """Tell of a job's end by a signed POST to the https URL that its client gives (docs/webhooks.md)."""
    tries: bool | None = None
    """Answer prompts with a finished job's base and adapted model, in a process of its own beside the workers. Without
    it, where no API keys are in force: on loopback."""
    require_keys: bool = False
    """Ask for API keys on loopback too, behind a proxy say; on any other address they are always asked for."""

    @property
    def keys_in_force(self) -> bool:
        """Whether a request needs an API key."""
        return self.require_keys or not is_loopback(self.host)

    @property
    def tries_in_force(self) -> bool:
        """Whether prompts are answered."""
        return not self.keys_in_force if self.tries is None else self.tries

    @property
    def rate_in_force(self) -> float:
        """Requests a second of each caller; 0 for no limit."""
        if self.max_requests_per_second is not None:
            return self.max_requests_per_second
        return KEYED_REQUESTS_PER_SECOND if self.keys_in_force else 0.0

    @property
    def job_ttl(self) -> timedelta:
        """How long a finished job is kept."""
        return timedelta(seconds=self.job_ttl_seconds)

    @property
    def models(self) -> Path:
        """A folder a model: `models/NAME` or `models/OWNER/NAME`."""
        return self.data / "models"

    @property
    def artifacts(self) -> Path:
        """The artifact store."""
        return self.data / "artifacts"

    @property
    def cache(self) -> Path:
        """Decompositions of weights, shared by all jobs."""
        return self.data / "cache"

    @classmethod
    def load(cls, **given: object) -> Self:
        """The environment's settings with the command line's over them; None is not given.

        Raises:
            InvalidInput: naming the setting that is wrong.
        """
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        except ValidationError as error:
            raise invalid_input(error) from None

    @field_validator("data")
    @classmethod
    def _absolute(cls, data: Path) -> Path:
        return data.expanduser().absolute()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. A name other than `localhost` may lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
