"""A long run of schemathesis against a server: every corner of each schema, and many examples.

    python tests/support/fuzz_http.py [--url URL] [--examples 300] [--seed 1]

Without a URL the server is one over the fake engine, in this process. Steer's routes are examined;
of vLLM's server not vLLM's own. Prints schemathesis' report, and ends as it does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from liveness import LIVENESS_SECONDS

from steer.engines.fake.engine import FakeEngine
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.serve import Server
from steer_server.settings import ServerSettings

REPLACED = "positive_data_acceptance,negative_data_rejection"
"""Checks that tests/support/http_contract.py makes in another form."""

OURS = "^/(health|metrics|v1/(steering|inspect|jobs|models|chat|completions))"


@contextmanager
def fake_server() -> Iterator[str]:
    """The URL of a server over the fake engine, in a thread."""
    settings = ServerSettings(port=0, measured_share=0, job_queue=1_000_000)
    with tempfile.TemporaryDirectory() as folder, Registry.open(folder) as registry:
        server = Server(create_app(FakeEngine(), registry, settings), settings)
        listening = threading.Event()
        startup = server.startup

        async def observed(*args: Any, **named: Any) -> None:
            await startup(*args, **named)
            listening.set()

        server.startup = observed  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        if not listening.wait(LIVENESS_SECONDS):
            raise RuntimeError("the server did not start")
        yield server.url
        server.should_exit = True
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server; by default one over the fake engine")
    parser.add_argument("--only", default=OURS, help="an expression for the paths")
    parser.add_argument("--phases", default="coverage,fuzzing,stateful")
    parser.add_argument("--examples", type=int, default=300, help="for each operation")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with nullcontext(options.url) if options.url else fake_server() as url:
        command = [
            str(Path(sys.executable).with_name("st")),
            *("run", f"{url}/openapi.json", "--checks", "all", "--exclude-checks", REPLACED),
            *("--phases", options.phases, "--max-examples", str(options.examples)),
            *("--seed", str(options.seed), "--continue-on-failure", "--no-shrink"),
            *("--include-path-regex", options.only, "--output-sanitize", "false"),
        ]
        support = str(Path(__file__).parent)
        environment = {
            **os.environ,
            "SCHEMATHESIS_HOOKS": "http_contract",
            "PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")]),
        }
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
