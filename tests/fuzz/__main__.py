"""`python -m tests.fuzz`: a real service is sent random bodies, and schemathesis goes through its OpenAPI document.

Nothing may end in a fault of the service's, nor in an answer that its document does not name.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from tests import tiny
from tests.fuzz.bodies import bodies
from tests.live import REPOSITORY, ServeProcess, install, spec

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance"
)
EXPECTED = {202, 404, 413, 422}


def schemathesis(
    url: str, key: str | None, max_examples: int, seed: int, folder: Path, job_ids: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Try every operation of the document at `url` with valid and invalid requests.

    What waits waits a moment only: no job ends here, and a stream of events would never. Lists and texts at their full
    lengths, which take minutes to generate, are `tests.fuzz.bodies`' to try.
    """
    document = httpx.get(f"{url}/openapi.json").json()
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].get("200", {}).get("content", {}).pop("text/event-stream", None)
            operation["parameters"] = [one for one in operation.get("parameters", ()) if one["name"] != "stream"]
            for parameter in operation["parameters"]:
                if parameter["name"] == "wait":
                    parameter["schema"]["maximum"] = 0.05
                if parameter["name"] == "job_id" and job_ids:
                    parameter["schema"]["enum"] = list(job_ids)
    (folder / "openapi.json").write_text(json.dumps(_shortened(document)))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(folder / "openapi.json"), "--url", url]
    command += ["--checks", CHECKS, "--max-examples", str(max_examples), "--seed", str(seed)]
    command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "70", "--no-color"]
    if key:
        command += ["--header", f"Authorization: Bearer {key}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def _shortened(value: Any) -> Any:
    """A schema with shorter limits."""
    most = {"maxItems": 12, "maxLength": 300, "maxProperties": 17}
    if isinstance(value, dict):
        return {key: min(inner, most[key]) if key in most else _shortened(inner) for key, inner in value.items()}
    return [_shortened(inner) for inner in value] if isinstance(value, list) else value


def send(server: ServeProcess, count: int, seed: int) -> dict[str, Counter[str]]:
    """Statuses by kind of body; a fault ends the run."""
    found: dict[str, Counter[str]] = {}
    for number, (kind, body) in enumerate(bodies(count, seed)):
        response = server.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        found.setdefault(kind, Counter())[str(response.status_code)] += 1
        error = response.json().get("error")
        if response.status_code not in EXPECTED or (error is None) != (response.status_code == 202):
            sys.exit(f"body {number} of seed {seed} ({kind}) is answered {response.status_code}: {response.text[:300]}")
        if number % 1000 == 999:
            print(f"{number + 1:,} bodies", flush=True)
    return found


def submit(server: ServeProcess, key: str | None) -> str:
    """A job that waits."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return str(server.http.post("/v1/jobs", json=spec(), headers=headers).raise_for_status().json()["id"])


def new_key(data: Path) -> str:
    """A key for everything."""
    command = [sys.executable, "-m", "service.cli", "keys", "create", "--name", "fuzz", "--json", "--data", str(data)]
    command += ["--scopes", "submit,read,admin"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return str(json.loads(made.stdout)["key"])


def main(
    count: Annotated[int, typer.Option(help="Random bodies.")] = 10_000,
    max_examples: Annotated[int, typer.Option(help="Requests of schemathesis for each operation and phase.")] = 100,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write what was found as JSON.")] = None,
) -> None:
    """Send random bodies and requests; exit code 1 if anything is answered as it should not be."""
    report: dict[str, Any] = {"count": count, "seed": seed, "max_examples": max_examples}
    failed = False
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        install(tiny.build("llama", data / "built", "float32", 0), data)
        for keyed in (False, True):
            key = new_key(data) if keyed else None
            limits = {"C2I_MAX_REQUESTS_PER_SECOND": "0", "C2I_MAX_WAITING_JOBS": "1000000"}
            more = {"C2I_REQUIRE_KEYS": "1"} if keyed else {}
            with (data / "log").open("wb") as log:
                server = ServeProcess(data, "--workers", "0", env=limits | more, log=log)
            began = time.monotonic()
            try:
                if not keyed:
                    report["bodies"] = send(server, count, seed)
                    report["seconds"] = round(time.monotonic() - began)
                    report["faults"] = 0
                callers = {"with a key": key, "without": None} if keyed else {"no keys in force": None}
                for label, given in callers.items():
                    jobs = [submit(server, key) for _ in range(20)]
                    done = schemathesis(server.url, given, max_examples, seed, data, jobs)
                    failed |= done.returncode != 0
                    report[f"schemathesis, {label}"] = done.stdout.strip().splitlines()[-12:]
                    print(done.stdout if done.returncode else "\n".join(done.stdout.splitlines()[-6:]), flush=True)
            finally:
                server.stop()
    print(json.dumps(report, indent=1))
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    typer.run(main)
