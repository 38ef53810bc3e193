"""The blocks of code in a page, and a sandbox in which they run as a reader would run them.

A block is shell (`sh`), Python, JSON or text. What it says of itself behind its fence is believed; of an indented one
it is found out. Shell runs command by command and keeps directory, variables and functions within a page; Python runs
in this process, with one namespace a page. `JOB` is the ID of a job, the service's usual address that of a real one. A
Python block whose first line names a file, and a diff, change a copy of the source, which shell commands then run from.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from service.embedded import find_server
from tests.live import REPOSITORY

USUAL_URL = "http://127.0.0.1:8000"
# What a shell block that does not say so begins with.
SHELL = {"c2i", "curl", "docker", "export", "make", "pip", "python", "redis-cli", "apt-get", "cp", "mkdir"}
STATUS = re.compile(r"#\s*(\d{3})\s*$")
JOB = re.compile(r"\bJOB\b")
# Fails where the service refuses, and keeps the answer's head for the test.
CURL = f'exec {shutil.which("curl")} --fail-with-body --dump-header "$SANDBOX/.head" "$@"'
PROGRAMS = {"curl": CURL, "c2i": f'exec {sys.executable} -m service.cli "$@"', "python": f'exec {sys.executable} "$@"'}


@dataclass(frozen=True)
class Block:
    """A block of code: where it stands and what it is."""

    page: Path
    line: int
    language: str
    """`sh`, `python`, `json`, `diff`, `nginx` or `text`; `unknown` where it does not say."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[str]:
        """The commands of a shell block, comments and empty lines left out."""
        return _commands(self.text) if self.language == "sh" else []


@lru_cache(maxsize=1_000)
def _commands(text: str) -> list[str]:
    found, pending = [], ""
    for line in text.splitlines():
        pending += f"{line}\n"
        if not pending.strip() or re.fullmatch(r"\s*#.*\n", pending):
            pending = ""
        elif not line.endswith("\\") and _is_whole(pending):
            found.append(pending.strip())
            pending = ""
    return [*found, pending.strip()] if pending else found


def _is_whole(commands: str) -> bool:
    """Whether bash wants no more lines."""
    checked = subprocess.run(["bash", "-n"], input=commands, capture_output=True, text=True, check=False)
    return checked.returncode == 0 and not checked.stderr  # of an open here-document it only warns


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.strip() else _guess(token.content)
            found.append(Block(page, (token.map or [0])[0] + 1, language, token.content))
    return found


def _guess(text: str) -> str:
    code = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if code and code[0].split()[0] in SHELL:
        return "sh"
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return "unknown"
    return "python" if any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body) else "unknown"


@dataclass
class Sandbox:
    """A folder with a service behind it."""

    folder: Path
    url: str
    env: dict[str, str]
    job_for: Callable[[str], str]
    """The ID that `JOB` stands for in a command or a snippet."""
    stands_for: dict[str, str] = field(default_factory=dict)
    """Other texts of a page, ports say, and what takes their place."""
    names: dict[str, Any] = field(default_factory=dict)
    """What Python blocks have defined."""

    def __post_init__(self) -> None:
        (self.folder / ".state").touch()
        programs = self.folder / ".bin"
        programs.mkdir()
        for name, script in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        for name in ("redis-server", "redis-cli"):
            (programs / name).symlink_to(shutil.which(name) or find_server().with_name(name))
        self.env = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SANDBOX": str(self.folder),
            "C2I_URL": self.url,
            "NO_COLOR": "1",
            "COLUMNS": "200",
            **self.env,
        }

    def shell(self, block: Block, command: str) -> None:
        """Run a command; it must succeed, and get the status that stands behind it."""
        state, head = self.folder / ".state", self.folder / ".head"
        head.unlink(missing_ok=True)
        keep = f"""trap '{{ export -p; declare -fp; printf "cd %q\\n" "$PWD"; }} > {state}' EXIT"""
        script = f"source {state}\n{keep}\nset -aeo pipefail\n{self._filled(command)}"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        told = f"{block}: {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert done.returncode == 0, told
        if wanted := STATUS.search(command):
            statuses = re.findall(r"^HTTP/\S+ (\d+)", head.read_text() if head.exists() else "", re.MULTILINE)
            assert statuses[-1:] == [wanted[1]], told

    def python(self, block: Block) -> None:
        """Run a block here, in the page's namespace; or make it the file that it says it is."""
        if file := re.match(r"# (\w+/[\w/]+\.py)\n", block.text):
            (self.source() / file[1]).write_text(block.text)
            return
        code = compile(self._filled(block.text), str(block), "exec", dont_inherit=True)
        with chdir(self.folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that a reader uses, too
            exec(code, self.names)

    def diff(self, block: Block) -> None:
        """Change the copy of the source as the block says."""
        apply = ["git", "apply", "--recount", "--unidiff-zero", "-"]
        done = subprocess.run(apply, input=block.text, cwd=self.source(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block} does not fit the source any more: {done.stderr}"

    def source(self) -> Path:
        """A copy of the packages, which commands run from once there is one."""
        copy = self.folder / ".source"
        if not copy.exists():
            for package in ("service", "workers"):
                shutil.copytree(REPOSITORY / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
            self.env["PYTHONPATH"] = str(copy)
        return copy

    def _filled(self, text: str) -> str:
        for usual, real in {USUAL_URL: self.url, **self.stands_for}.items():
            text = text.replace(usual, real)
        return JOB.sub(self.job_for(text), text) if JOB.search(text) else text
