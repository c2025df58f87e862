"""A blob's bytes are its name's, whoever reads them and wherever they lie; or nobody gets any."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from steer.errors import StorageError
from steer.registry.blobs.blob_cache import BlobCache
from steer.registry.blobs.blobs import BlobStore

DATA = bytes(range(256)) * 8

Read = Callable[[BlobStore, str], bytes]


def opened(store: BlobStore, sha256: str) -> bytes:
    with store.open(sha256) as stream:
        return stream.read()


READERS = [pytest.param(BlobStore.read, id="read"), pytest.param(opened, id="open")]


def published(store: BlobStore, folder: Path) -> str:
    sha256 = hashlib.sha256(DATA).hexdigest()
    (folder / "staged").write_bytes(DATA)
    store.publish(folder / "staged", sha256)
    return sha256


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("read", READERS)
def test_on_a_disk(tmp_path: Path, read: Read) -> None:
    store = BlobStore(tmp_path / "blobs")
    sha256 = published(store, tmp_path)
    assert read(store, sha256) == DATA
    path = store.local_path(sha256)
    assert path is not None
    flip(path)
    with pytest.raises(StorageError) as raised:
        read(store, sha256)
    assert raised.value.code == "damaged_blob"


@pytest.mark.parametrize("read", READERS)
def test_a_damaged_copy_of_a_remote_blob_is_fetched_again(tmp_path: Path, read: Read) -> None:
    cache = BlobCache(tmp_path / "cache")
    store = BlobStore(f"memory://{uuid.uuid4().hex}", cache=cache)
    sha256 = published(store, tmp_path)
    assert read(store, sha256) == DATA
    flip(cache.folder / sha256)
    assert read(store, sha256) == DATA
    assert (cache.folder / sha256).read_bytes() == DATA


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("read", READERS)
def test_a_damaged_remote_blob(tmp_path: Path, read: Read, cached: bool) -> None:
    cache = BlobCache(tmp_path / "cache") if cached else None
    place = f"memory://{uuid.uuid4().hex}"
    sha256 = published(BlobStore(place), tmp_path)
    store = BlobStore(place, cache=cache)
    name = f"{place}/{sha256[:2]}/{sha256}"
    with fsspec.open(name, "wb") as stream:
        stream.write(DATA[:-1] + b"\0")
    with pytest.raises(StorageError) as raised:
        read(store, sha256)
    assert raised.value.code == "damaged_blob"
