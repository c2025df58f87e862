"""A registry on a disk that cannot be written can be read, and says why it cannot be changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.errors import StorageError
from steer.registry import read_only
from steer.registry.registry import Registry

VECTOR = ControlVector.of({1: torch.arange(1.0, 5.0)}, description="kept")


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry with one vector, in a folder that says it cannot be written.

    The tests may run as a user who can write everywhere, so the folder's word is what counts.
    """
    folder = tmp_path / "registry"
    with Registry.open(folder) as registry:
        registry.add("calm", VECTOR)
    real = os.access
    monkeypatch.setattr(
        read_only.os,
        "access",
        lambda path, mode: False if Path(path) == folder else real(path, mode),
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_it_is_read_and_nothing_in_it_changes(frozen: Path) -> None:
    before = contents(frozen)
    with Registry.open(frozen) as registry:
        assert registry.read_only
        assert [entry.name for entry in registry.entries("vector")] == ["calm"]
        assert torch.equal(registry.vector("calm")[1], VECTOR[1])
        assert registry.profiles() == []
    assert contents(frozen) == before


def test_its_copy_is_removed(frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(read_only.tempfile, "tempdir", str(place))
    with Registry.open(frozen):
        assert list(place.iterdir())
    assert not list(place.iterdir())


def test_what_has_not_reached_the_main_file_yet_is_seen(
    frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as writable:
        writable.setattr(read_only, "is_read_only", lambda _: False)
        writable.setattr("steer.registry.registry.is_read_only", lambda _: False)
        live = Registry.open(frozen)
        live.add("joy", VECTOR)
    try:
        assert (frozen / "catalogue.sqlite-wal").stat().st_size
        with Registry.open(frozen) as registry:
            assert {entry.name for entry in registry.entries("vector")} == {"calm", "joy"}
    finally:
        live.close()


def test_every_change_is_refused_by_name(frozen: Path) -> None:
    with Registry.open(frozen) as registry:
        changes = (
            lambda: registry.add("new", VECTOR),
            lambda: registry.remove("vector", "calm"),
            lambda: registry.set_alias("vector", "quiet", "calm"),
        )
        for change in changes:
            with pytest.raises(StorageError, match="cannot be written") as refused:
                change()
            assert refused.value.code == "read_only"


def test_a_new_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError):
        Registry.open(blocked / "registry")
