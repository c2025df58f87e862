"""What was measured of features, beside their SAEs."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.errors import StorageError
from steer.registry.features.effect import OutputEffect
from steer.registry.features.findings import BesideFiles, FindingStore
from steer.registry.registry import Registry

SAE, OTHER = "ab" * 32, "cd" * 32


def effect(feature: int, strength: float = 1.0) -> OutputEffect:
    return OutputEffect(
        feature=feature,
        model="m",
        prompts=8,
        strength=strength,
        kl=0.2,
        reached=True,
        nulls=0,
        promoted=(),
        demoted=(),
        written=None,
        detected=None,
        verdict="unknown",
    )


@pytest.fixture
def store(tmp_path: Path) -> FindingStore:
    return FindingStore(BesideFiles(str(tmp_path / "registry")))


def test_the_newest_finding_of_a_feature_is_kept(store: FindingStore) -> None:
    assert store.find(SAE, OutputEffect, 10) is None
    assert store.features(SAE, OutputEffect) == ()
    for one in (effect(10), effect(9), effect(10, 2.0)):
        store.keep(SAE, one)
    assert store.find(SAE, OutputEffect, 10) == effect(10, 2.0)
    assert store.features(SAE, OutputEffect) == (9, 10)
    assert store.find(OTHER, OutputEffect, 10) is None


@pytest.mark.parametrize("data", [b"", b"{", b'{"feature": 10}', b"\xff\x00"])
def test_a_damaged_finding_says_what_to_do(store: FindingStore, data: bytes) -> None:
    store.files.write(data, SAE, "effect", "10.json")
    with pytest.raises(StorageError, match="steer sae effect") as raised:
        store.find(SAE, OutputEffect, 10)
    assert raised.value.code == "damaged_finding"


def test_a_registry_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    store = FindingStore(BesideFiles(str(tmp_path), read_only="it lies on a read-only disk"))
    with pytest.raises(StorageError) as raised:
        store.keep(SAE, effect(1))
    assert raised.value.code == "read_only"


def test_garbage_collection_takes_what_has_no_sae(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        registry.findings.keep(SAE, effect(1))
        registry.collect_garbage(dry_run=True)
        assert registry.findings.find(SAE, OutputEffect, 1) is not None
        registry.collect_garbage()
        assert registry.findings.find(SAE, OutputEffect, 1) is None


def test_garbage_collection_leaves_what_is_in_use(tmp_path: Path, store: FindingStore) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        registry.findings.keep(SAE, effect(1))
        registry.surveys.keep_checkpoint(f"{SAE}-0123-16", {}, tmp_path)
        assert registry.surveys.prune({SAE}) == 0
        assert registry.surveys.prune({OTHER}) == 2
