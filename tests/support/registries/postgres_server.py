"""A PostgreSQL server of the tests' own: loopback only, in a temporary folder, gone at the end."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg

MISSING = (
    "PostgreSQL's server programs are not on this machine: run deploy/postgres-for-tests.sh, "
    "which installs them"
)


def server_programs() -> Path:
    """The folder with initdb and pg_ctl. Raises `FileNotFoundError` that says what to run."""
    named = os.environ.get("POSTGRES_BIN")
    on_path = shutil.which("initdb")
    versions = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
    )
    candidates = [
        *([Path(named)] if named else []),
        *([Path(on_path).resolve().parent] if on_path else []),
        *reversed(versions),
    ]
    for folder in candidates:
        if (folder / "initdb").exists():
            return folder
    raise FileNotFoundError(MISSING)


@dataclass
class PostgresServer:
    """A running server; each `url` is a schema of its own in one database."""

    port: int
    password: str
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def url(self) -> str:
        """The SQLAlchemy URL of a new, empty schema."""
        name = f"test_{next(self._numbers)}"
        with self.connect() as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        place = f"steer:{self.password}@127.0.0.1:{self.port}/postgres"
        return f"postgresql+psycopg://{place}?options=-csearch_path%3D{name}"

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="steer",
            password=self.password,
            dbname="postgres",
            autocommit=True,
        )


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Makes a cluster and starts it. Raises `FileNotFoundError` where the programs are missing."""
    programs = server_programs()
    folder = Path(tempfile.mkdtemp(prefix="steer-postgres-"))
    password = secrets.token_hex(16)
    try:
        (folder / "password").write_text(password)
        as_user = _unprivileged(folder)

        def run(*command: str | Path) -> None:
            done = subprocess.run(
                [*as_user, *map(str, command)],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                log = folder / "log"
                told = log.read_text() if log.exists() else ""
                raise RuntimeError(f"{command[0]} failed: {done.stdout}{done.stderr}{told}")

        run(
            programs / "initdb",
            *("--pgdata", folder / "data", "--username", "steer", "--pwfile", folder / "password"),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"),
        )
        port = _free_port()
        settings = {
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": folder,
            "fsync": "off",  # nobody pulls the plug here
            "max_connections": 200,
        }
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        control = (programs / "pg_ctl", "--pgdata", folder / "data", "--wait")
        run(*control, "--log", folder / "log", "--options", options, "start")
        try:
            yield PostgresServer(port, password)
        finally:
            run(*control, "--mode", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _unprivileged(folder: Path) -> list[str]:
    """How to run as somebody else than root, whom the server refuses; `folder` becomes theirs."""
    if os.getuid() != 0:
        return []
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = known.get("postgres") or known["nobody"]
    for path in (folder, folder / "password"):
        os.chown(path, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
