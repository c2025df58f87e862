"""What is left when a write fails at any of its steps, or its process is killed."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sqlalchemy import event

from steer.artefacts.control_vector import ControlVector
from steer.errors import StorageError, TooLarge, UnknownArtefact
from steer.registry.blobs.blobs import BlobStore
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.registry import Registry

OLD = ControlVector.of({0: torch.ones(4)})
NEW = ControlVector.of({0: torch.full((4,), 2.0)})


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def blobs_of(root: Path) -> set[str]:
    return {Path(name).name for name in files_under(root / "blobs")}


def assert_sound(root: Path, held: dict[str, ControlVector]) -> None:
    """After opening again: exactly `held`, its blobs alone, nothing in staging."""
    with Registry.open(root) as registry:
        assert {entry.name for entry in registry.entries()} == set(held)
        for name, vector in held.items():
            assert registry.vector(name).sha256 == vector.sha256
        assert blobs_of(root) == {vector.sha256 for vector in held.values()}
        assert [Path(name).name for name in files_under(root / "staging")] == ["owner.lock"]
    assert files_under(root / "staging") == []


def disk_full(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fails_after(real: Callable[..., object]) -> Callable[..., None]:
    def wrapped(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        disk_full()

    return wrapped


STEPS = [
    (os, "fsync", disk_full),
    (os, "fsync", fails_after(os.fsync)),
    (os, "replace", disk_full),
    (os, "replace", fails_after(os.replace)),
    (BlobStore, "publish", disk_full),
    (BlobStore, "publish", fails_after(BlobStore.publish)),
    (Catalogue, "insert", disk_full),
    (Catalogue, "insert", fails_after(Catalogue.insert)),
]


@pytest.mark.parametrize(("owner", "step", "failure"), STEPS)
def test_a_write_that_fails_at_any_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, step: str, failure: object
) -> None:
    with Registry.open(tmp_path) as registry:
        registry.add("old", OLD)
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, failure)
            with pytest.raises(StorageError, match="No space left") as raised:
                registry.add("new", NEW)
        assert raised.value.status == 500
        with pytest.raises(UnknownArtefact):
            registry.vector("new")
        assert [entry.name for entry in registry.entries()] == ["old"]
        assert [Path(name).name for name in files_under(tmp_path / "staging")] == ["owner.lock"]
        assert registry.vector("old").sha256 == OLD.sha256
    assert_sound(tmp_path, {"old": OLD})
    with Registry.open(tmp_path) as registry:  # and the same write succeeds afterwards
        registry.add("new", NEW)
    assert_sound(tmp_path, {"old": OLD, "new": NEW})


def test_a_commit_that_fails_changes_nothing(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry:
        registry.add("old", OLD)
        engine = registry._catalogue.engine
        event.listen(engine, "commit", disk_full)
        with pytest.raises(StorageError, match="No space left"):
            registry.add("new", NEW)
        event.remove(engine, "commit", disk_full)
        with pytest.raises(UnknownArtefact):
            registry.vector("new")
    assert_sound(tmp_path, {"old": OLD})


def test_a_collection_that_fails_leaves_nothing_that_cannot_be_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.open(tmp_path) as registry:
        registry.add("old", OLD)
        registry.add("new", NEW)
        registry.remove("vector", "new")
        with monkeypatch.context() as patch:
            patch.setattr(BlobStore, "remove", disk_full)
            with pytest.raises(StorageError):
                registry.collect_garbage(grace_seconds=0)
        with pytest.raises(UnknownArtefact):  # the row went first: no name without a blob
            registry.vector("new")
        with pytest.raises(UnknownArtefact, match="has been collected"):
            registry.restore("vector", "new")
    assert_sound(tmp_path, {"old": OLD})


def test_an_upload_over_the_limit_leaves_nothing(tmp_path: Path) -> None:
    with Registry.open(tmp_path, max_upload_bytes=1000) as registry:
        with registry.upload() as upload:
            upload.write(b"x" * 1000)
            with pytest.raises(TooLarge) as raised:
                upload.write(b"x")
            assert (upload.size, upload.path.stat().st_size) == (1000, 1000)
        assert (raised.value.code, raised.value.status) == ("upload_too_large", 413)
        assert [Path(name).name for name in files_under(tmp_path / "staging")] == ["owner.lock"]


def interrupted_upload(registry: Registry) -> None:
    with registry.upload() as upload:
        upload.write(NEW.to_bytes()[:100])
        raise ConnectionError("the client went away")


def test_an_interrupted_upload_leaves_nothing(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry:
        with pytest.raises(ConnectionError):
            interrupted_upload(registry)
        assert [Path(name).name for name in files_under(tmp_path / "staging")] == ["owner.lock"]
    assert_sound(tmp_path, {})


def test_a_full_disk_during_an_upload_is_reported(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry, registry.upload() as upload:
        upload._stream.close()
        with open("/dev/full", "wb", buffering=0) as full:  # the kernel's own full disk
            upload._stream = full
            with pytest.raises(StorageError, match="No space left"):
                upload.write(b"x" * 100)


CRASHING = """
import os, sys, torch
from steer.artefacts.control_vector import ControlVector
from steer.registry.blobs.blobs import BlobStore
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.registry import Registry
from steer.registry.blobs.staging import Staging

root, step = sys.argv[1:]
registry = Registry.open(root)

def crash(*args, **kwargs):
    os.kill(os.getpid(), 9)

def crash_after(real):
    def wrapped(*args, **kwargs):
        real(*args, **kwargs)
        crash()
    return wrapped

if step == "publishing":
    BlobStore.publish = crash
elif step == "published":
    BlobStore.publish = crash_after(BlobStore.publish)
elif step == "inserted":
    Catalogue.insert = crash_after(Catalogue.insert)
registry.add("new", ControlVector.of({0: torch.full((4,), 2.0)}))
crash()
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["publishing", "published", "inserted", "done"])
def test_killed_at_any_step_of_a_write(tmp_path: Path, step: str) -> None:
    with Registry.open(tmp_path) as registry:
        registry.add("old", OLD)
    done = subprocess.run([sys.executable, "-c", CRASHING, str(tmp_path), step], check=False)
    assert done.returncode == -signal.SIGKILL
    assert files_under(tmp_path / "staging") != []
    assert_sound(tmp_path, {"old": OLD, "new": NEW} if step == "done" else {"old": OLD})


UPLOADING = """
import sys
from steer.registry.registry import Registry

registry = Registry.open(sys.argv[1])
with registry.upload() as upload:
    while True:
        upload.write(b"x" * 65536)
        upload.path
        print(upload.size, flush=True)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry:
        registry.add("old", OLD)
    with subprocess.Popen(
        [sys.executable, "-c", UPLOADING, str(tmp_path)], stdout=subprocess.PIPE
    ) as uploading:
        for _ in range(20):
            assert uploading.stdout.readline().strip().isdigit()
        uploading.kill()
    assert len(files_under(tmp_path / "staging")) == 2  # the lock and the half upload
    assert_sound(tmp_path, {"old": OLD})


ADDING = """
import sys, torch
from steer.artefacts.control_vector import ControlVector
from steer.registry.registry import Registry

registry = Registry.open(sys.argv[1])
number = 0
while True:
    vector = ControlVector.of({0: torch.full((4,), float(number + 1))})
    registry.add(f"v{number}", vector)
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
def test_killed_while_adding_keeps_all_that_was_acknowledged(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ADDING, str(tmp_path)], stdout=subprocess.PIPE
    ) as adding:
        acknowledged = [int(adding.stdout.readline()) for _ in range(40)]
        adding.kill()
        acknowledged += [int(line) for line in adding.stdout.read().split()]
    assert acknowledged == list(range(len(acknowledged)))
    with Registry.open(tmp_path) as registry:
        entries = registry.entries(limit=10_000)
        # The one after the last acknowledged may have been written, and is whole then.
        assert len(acknowledged) <= len(entries) <= len(acknowledged) + 1
        for number in range(len(entries)):
            expected = ControlVector.of({0: torch.full((4,), float(number + 1))})
            assert registry.vector(f"v{number}").sha256 == expected.sha256
        assert blobs_of(tmp_path) == {entry.sha256 for entry in entries}
