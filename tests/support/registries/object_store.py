"""An object store of the tests' own: moto's S3 server, in this process, on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import fsspec

BUCKET = "registry"


@dataclass
class ObjectStore:
    """A running store. Its endpoint and credentials are in the environment, from where s3fs takes
    them, in this process and in those it starts."""

    environment: dict[str, str]
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def url(self) -> str:
        """The URL of a new, empty place."""
        return f"s3://{BUCKET}/place-{next(self._numbers)}"

    def files(self, url: str) -> list[str]:
        """The names below `url`."""
        filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        filesystem.invalidate_cache()
        return sorted(name.removeprefix(root + "/") for name in filesystem.find(root))


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """Starts the store and makes its bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield ObjectStore(environment)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.stop()
