"""A whole registry as one file, and back."""

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artefacts import random_detector
from crashes import observed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_writes import a_vector, archive, prepare, using

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, StorageError
from steer.registry.profiles import Profile
from steer.registry.registry import Registry


def exported(registry: Registry) -> bytes:
    target = io.BytesIO()
    registry.export_archive(target)
    return target.getvalue()


def imported(registry: Registry, data: bytes):
    return registry.import_archive(io.BytesIO(data))


def test_a_copy_is_the_same_in_everything(registry: Registry, tmp_path: Path) -> None:
    prepare(registry)
    registry.collect_garbage(grace_seconds=0)
    registry.remove("vector", "w")
    data = exported(registry)
    with Registry.open(tmp_path / "copy") as copy:
        done = imported(copy, data)
        assert (done.versions, done.profiles, done.aliases, done.kept) == (3, 1, 1, [])
        assert observed(copy) == observed(registry)
        assert exported(copy) == data
        assert copy.restore("vector", "w").sha256 == a_vector(3).sha256
        # Numbers that were used stay used.
        assert (
            copy.add("gone", a_vector(9))[0].version == registry.add("gone", a_vector(9))[0].version
        )
        before = observed(copy)
        again = imported(copy, data)
        assert (again.versions, again.profiles, again.aliases, again.tags) == (0, 0, 0, 0)
        assert observed(copy) == before


def test_a_profiles_detectors_come_with_it(registry: Registry, tmp_path: Path) -> None:
    registry.add("v", a_vector(1))
    registry.add("d", random_detector(4, 1))
    armed = {"name": "d", "action": "stop"}
    gated = {"interventions": [{"kind": "add", "vector": "v", "when": {"detector": "d"}}]}
    registry.put_profile(Profile(name="p", spec=gated, detectors=(armed,)))
    data = exported(registry)
    with Registry.open(tmp_path / "copy") as copy:
        assert imported(copy, data).profiles == 1
        assert copy.profile("p") == registry.profile("p")
        assert copy.detector("d").sha256 == registry.detector("d").sha256
        assert exported(copy) == data


def test_a_merge_adds_and_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    prepare(registry)
    registry.add("fresh", a_vector(10))  # the name of an alias there
    registry.put_profile(Profile(name="q", spec=using("w")))
    done = imported(registry, archive(tmp_path / "other"))
    assert done.versions == 3
    assert [e.version for e in registry.versions("vector", "v")] == [3, 2, 1]
    assert registry.vector("v").sha256 == a_vector(6).sha256
    assert registry.profile("q").spec.interventions[0].vector == "w"
    assert registry.tags("vector", ["new"]) == {"new": ("imported",)}
    assert done.kept == [
        "alias 'fresh': a vector has this name",
        "profile 'q': another one has this name",
    ]


def repacked(data: bytes, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> bytes:
    """The archive with members changed or left out."""
    target = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as source,
        tarfile.open(fileobj=target, mode="w") as result,
    ):
        for member in source:
            found = change(member.name, source.extractfile(member).read())
            if found is not None:
                info = tarfile.TarInfo(found[0])
                info.size = len(found[1])
                result.addfile(info, io.BytesIO(found[1]))
    return target.getvalue()


BLOB = f"blobs/{a_vector(1).sha256}"
DAMAGE: dict[str, tuple[Callable[[str, bytes], tuple[str, bytes] | None], str]] = {
    "a blob": (
        lambda name, data: (name, b"\0" * len(data) if name == BLOB else data),
        f"blob {a_vector(1).sha256[:12]} does not match",
    ),
    "a blob left out": (lambda name, data: None if name == BLOB else (name, data), "ends after"),
    "the rows": (
        lambda name, data: (name, data.replace(b'"v"', b'"x"')),
        "catalogue.jsonl does not match",
    ),
    "the manifest": (
        lambda name, data: (name, data[:-2] if name == "manifest.json" else data),
        "manifest.json cannot be read",
    ),
    "a path": (lambda name, data: (name.replace("blobs/", "../"), data), "is not known"),
    "no rows": (lambda name, data: None if "jsonl" in name else (name, data), "second member"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_named_and_nothing_is_taken(
    registry: Registry, tmp_path: Path, what: str
) -> None:
    prepare(registry)
    change, says = DAMAGE[what]
    data = repacked(exported(registry), change)
    with Registry.open(tmp_path / "copy") as copy:
        with pytest.raises(FileFormatError, match=says) as raised:
            imported(copy, data)
        assert raised.value.code == "damaged_archive"
        assert observed(copy)["live"] == []


def test_rows_that_need_a_blob_that_is_not_there(registry: Registry, tmp_path: Path) -> None:
    """A manifest that is sound in itself, and lies."""
    prepare(registry)

    def without(name: str, data: bytes) -> tuple[str, bytes] | None:
        if name == "manifest.json":
            manifest = json.loads(data)
            return name, json.dumps({**manifest, "blobs": manifest["blobs"] - 1}).encode()
        return None if name == BLOB else (name, data)

    with Registry.open(tmp_path / "copy") as copy:
        with pytest.raises(FileFormatError, match=f"blob of v@{a_vector(1).sha256[:12]} is not in"):
            imported(copy, repacked(exported(registry), without))
        assert observed(copy)["live"] == []


def test_what_is_no_archive_or_a_newer_one(registry: Registry, tmp_path: Path) -> None:
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w") as result:
        result.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    newer = repacked(
        exported(registry),
        lambda name, data: (name, data.replace(b'"version": 2', b'"version": 3')),
    )
    for data, code in (
        (b"", "damaged_archive"),
        (b"not a tar file at all" * 100, "damaged_archive"),
        (other.getvalue(), "not_an_archive"),
        (newer, "unknown_archive_version"),
    ):
        with pytest.raises(FileFormatError) as raised:
            imported(registry, data)
        assert raised.value.code == code


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return archive(tmp_path_factory.mktemp("sound"))


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(cut=st.integers(0, 1 << 20))
def test_an_archive_that_ends_early_is_refused(sound: bytes, registry: Registry, cut: int) -> None:
    # Without its end marker, two empty blocks, everything is there.
    end = len(sound.rstrip(b"\0")) // 512 * 512
    with pytest.raises(FileFormatError):
        imported(registry, sound[: cut % end])
    assert registry.entries() == []


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(
    sound: bytes, registry: Registry, place: int, bit: int
) -> None:
    data = bytearray(sound)
    data[place % len(data)] ^= 1 << bit
    try:
        imported(registry, bytes(data))
    except FileFormatError:
        return
    for entry in registry.entries():  # such as in the padding of the tar file
        assert entry.name in ("v", "new")
    assert exported(registry)[2048:4096]


def test_memory_does_not_grow_with_the_blobs(registry: Registry, tmp_path: Path) -> None:
    rows = 1 << 20
    for name in "abcd":
        registry.add(name, ControlVector.of({0: torch.full((rows,), float(ord(name)))}))
    file = tmp_path / "archive.tar"
    tracemalloc.start()
    try:
        with file.open("wb") as target:
            registry.export_archive(target)
        with Registry.open(tmp_path / "copy") as copy, file.open("rb") as source:
            copy.import_archive(source)
            peak = tracemalloc.get_traced_memory()[1]
            assert {e.name for e in copy.entries()} == set("abcd")
    finally:
        tracemalloc.stop()
    assert file.stat().st_size > 4 * 4 * rows
    assert peak < 4 * rows * 2  # blocks of a MiB, not one blob of four


def test_a_damaged_blob_is_not_exported(registry: Registry) -> None:
    entry, _ = registry.add("v", a_vector(1))
    path = registry._blobs.local_path(entry.sha256)
    path.write_bytes(b"\0" * entry.size_bytes)
    with pytest.raises(StorageError, match=f"{entry.sha256[:12]} is damaged"):
        exported(registry)
