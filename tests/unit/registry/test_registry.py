"""What a registry answers: names, versions, hashes, removal, search."""

from pathlib import Path

import pytest
import torch
from artefacts import random_detector

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.sae.base import SAE
from steer.errors import (
    Conflict,
    FileFormatError,
    SteerError,
    StorageError,
    UnknownArtefact,
    Unsupported,
)
from steer.registry.profiles import Profile
from steer.registry.registry import Registry


def a_vector(seed: int = 0, *, layers: tuple[int, ...] = (3, 4), **card: object) -> ControlVector:
    generator = torch.Generator().manual_seed(seed)
    rows = {layer: torch.randn(8, generator=generator) for layer in layers}
    return ControlVector.of(rows, **card)


def an_adapter() -> LowRankAdapter:
    generator = torch.Generator().manual_seed(1)
    parts = (torch.randn(2, 8, generator=generator), torch.randn(2, 8, generator=generator))
    return LowRankAdapter.of({1: (*parts, torch.randn(2, generator=generator))})


def an_sae() -> SAE:
    generator = torch.Generator().manual_seed(2)
    return SAE.of(
        "standard",
        W_enc=torch.randn(8, 16, generator=generator),
        b_enc=torch.randn(16, generator=generator),
        W_dec=torch.randn(16, 8, generator=generator),
        b_dec=torch.randn(8, generator=generator),
        layer=2,
    )


def test_what_was_added_comes_back_exactly(registry: Registry) -> None:
    vector, adapter, sae = a_vector(description="a test"), an_adapter(), an_sae()
    for name, artefact in {"v": vector, "a": adapter, "s": sae}.items():
        entry, created = registry.add(name, artefact)
        assert created
        assert entry.sha256 == artefact.sha256
        assert entry.size_bytes == len(artefact.to_bytes())
        assert entry.version == 1
        assert entry.id == f"{name}@{artefact.sha256[:12]}"
        assert entry.created_at.utcoffset() is not None

    loaded = registry.vector("v")
    assert loaded.card == vector.card.model_copy(update={"name": "v"})
    assert list(loaded.directions) == [3, 4]
    assert all(torch.equal(loaded[layer], vector[layer]) for layer in (3, 4))
    assert registry.low_rank("a").to_bytes() == adapter.to_bytes()
    assert registry.sae("s").to_bytes() == sae.to_bytes()
    assert {name: registry.stats().artefacts[name] for name in ("vector", "low_rank", "sae")} == {
        "vector": 1,
        "low_rank": 1,
        "sae": 1,
    }


def test_survives_being_closed(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as first:
        entry, _ = first.add("v", a_vector())
    with Registry.open(f"file://{tmp_path}") as second:
        assert second.entry("vector", "v") == entry
        assert second.vector("v").sha256 == entry.sha256


def test_same_content_again_is_not_new(registry: Registry) -> None:
    first, _ = registry.add("v", a_vector())
    again, created = registry.add("v", a_vector())
    assert not created
    assert again == first
    other, created = registry.add("w", a_vector())
    assert created
    assert other.sha256 == first.sha256
    assert registry.stats().blob_bytes == first.size_bytes  # one blob for both names


def test_versions(registry: Registry) -> None:
    one, _ = registry.add("v", a_vector(1))
    two, _ = registry.add("v", a_vector(2))
    assert [one.version, two.version] == [1, 2]
    assert registry.entry("vector", "v") == two
    assert registry.entry("vector", one.id) == one
    assert registry.entry("vector", f"v@{one.sha256[:6]}") == one
    assert registry.entry("vector", f"v@{one.sha256}") == one
    assert registry.versions("vector", "v") == [two, one]
    assert torch.equal(registry.vector(one.id)[3], a_vector(1)[3])

    back, created = registry.add("v", a_vector(1))
    assert created
    assert back.version == 3  # sending old content makes it the newest again
    assert registry.entry("vector", "v").sha256 == one.sha256


def test_an_unknown_name_suggests_near_ones(registry: Registry) -> None:
    with pytest.raises(UnknownArtefact, match="none is registered") as raised:
        registry.vector("french")
    assert (raised.value.code, raised.value.status) == ("unknown_vector", 404)
    registry.add("french", a_vector())
    with pytest.raises(UnknownArtefact, match="did you mean 'french'"):
        registry.vector("frnch")
    with pytest.raises(UnknownArtefact, match="no version with the hash") as raised:
        registry.vector("french@000000")
    assert registry.entry("vector", "french").id in str(raised.value)
    for kind in ("sae", "low_rank"):
        with pytest.raises(UnknownArtefact) as raised:
            registry.entry(kind, "french")
        assert raised.value.code == f"unknown_{kind}"


@pytest.mark.parametrize("ref", ["", "a/b", "../x", "v@12345", "v@XYZXYZ", "v@", "é", "a" * 129])
def test_what_is_no_reference_is_unknown(registry: Registry, ref: str) -> None:
    registry.add("v", a_vector())
    with pytest.raises(UnknownArtefact):
        registry.vector(ref)
    with pytest.raises(UnknownArtefact):
        registry.remove("vector", ref)


@pytest.mark.parametrize("name", ["", "a/b", "..", "v@abcdef", "a b", "a\n", "a" * 129])
def test_names_that_cannot_be_registered(registry: Registry, name: str) -> None:
    with pytest.raises(SteerError) as raised:
        registry.add(name, a_vector())
    assert (raised.value.code, raised.value.param) == ("invalid_name", "/name")
    assert registry.entries() == []


def test_removing_a_name_removes_its_versions(registry: Registry) -> None:
    registry.add("v", a_vector(1))
    two, _ = registry.add("v", a_vector(2))
    registry.add("w", a_vector(2))
    registry.vector("v")
    assert registry.remove("vector", "v") == two
    with pytest.raises(UnknownArtefact):
        registry.vector("v")
    assert registry.vector("w").sha256 == two.sha256  # the shared blob stays
    assert registry.stats().blob_bytes == two.size_bytes
    registry.remove("vector", "w")
    assert registry.stats().blob_bytes == 0
    again, created = registry.add("v", a_vector(1))
    assert created
    assert again.version == 3  # numbers are never given out twice
    assert registry.vector("v").sha256 == again.sha256


def test_removing_one_version(registry: Registry) -> None:
    one, _ = registry.add("v", a_vector(1))
    two, _ = registry.add("v", a_vector(2))
    assert registry.remove("vector", two.id) == two
    assert registry.entry("vector", "v") == one
    with pytest.raises(UnknownArtefact, match="no version"):
        registry.remove("vector", two.id)


def test_entries_are_found_by_name_and_description(registry: Registry) -> None:
    registry.add("french", a_vector(1, description="speaks like Molière"))
    registry.add("german", a_vector(2))
    registry.add("german", a_vector(3, description="100% of it"))
    registry.add("s", an_sae())
    names = [(entry.kind, entry.name, entry.version) for entry in registry.entries()]
    assert names == [("sae", "s", 1), ("vector", "french", 1), ("vector", "german", 2)]
    assert [entry.name for entry in registry.entries("vector", query="moli")] == ["french"]
    assert [entry.name for entry in registry.entries(query="0% o")] == ["german"]
    assert registry.entries(query="%%%") == []
    assert registry.entries(query="_") == []
    assert [entry.name for entry in registry.entries("vector", limit=1, offset=1)] == ["german"]


def test_content_is_the_canonical_file(registry: Registry) -> None:
    registry.add("v", a_vector())
    with registry.content("vector", "v") as stream:
        assert stream.read() == a_vector().to_bytes()


def test_profiles(registry: Registry) -> None:
    spec = {"interventions": [{"kind": "add", "vector": "v"}]}
    profile = Profile(name="calm", spec=spec, description="calm answers")
    with pytest.raises(UnknownArtefact) as raised:
        registry.put_profile(profile)
    assert raised.value.param == "/spec/interventions/0/vector"
    assert registry.profiles() == []
    registry.add("v", a_vector())
    assert registry.put_profile(profile) == profile
    assert registry.profile("calm") == profile
    changed = Profile(name="calm", spec=spec, description="calmer")
    registry.put_profile(changed)
    assert registry.profile("calm") == changed
    assert registry.profiles() == [changed]
    assert registry.stats().profiles == 1
    with pytest.raises(UnknownArtefact, match="did you mean 'calm'") as raised:
        registry.profile("clam")
    assert raised.value.code == "unknown_profile"
    registry.remove_profile("calm")
    with pytest.raises(UnknownArtefact):
        registry.profile("calm")
    with pytest.raises(UnknownArtefact):
        registry.remove_profile("calm")


@pytest.mark.parametrize(
    "spec",
    [
        {"interventions": [{"kind": "add", "vector": "v"}]},
        {"interventions": [{"kind": "swap", "remove": "w", "add": "v"}]},
        {"interventions": [{"kind": "rotate", "vector": "w", "toward": "v", "degrees": 9.0}]},
        {"interventions": [{"kind": "read_write", "read": "w", "write": "v"}]},
        {"interventions": [{"kind": "add", "vector": "w"}], "when": {"vector": "v", "above": 0.1}},
        {
            "interventions": [
                {"kind": "add", "vector": "w", "when": {"vector": "v", "above": 0.1}},
            ]
        },
    ],
)
def test_what_a_profile_uses_cannot_be_removed(registry: Registry, spec: dict) -> None:
    one, _ = registry.add("v", a_vector(1))
    two, _ = registry.add("v", a_vector(2))
    registry.add("w", a_vector(3))
    registry.put_profile(Profile(name="p", spec=spec))
    with pytest.raises(Conflict, match="profiles p") as raised:
        registry.remove("vector", "v")
    assert raised.value.code == "in_use"
    assert registry.entry("vector", "v") == two
    registry.remove("vector", two.id)  # a version is left for the profile
    with pytest.raises(Conflict):
        registry.remove("vector", one.id)
    registry.remove_profile("p")
    registry.remove("vector", "v")


def test_a_profile_pins_the_version_it_names(registry: Registry) -> None:
    one, _ = registry.add("v", a_vector(1))
    two, _ = registry.add("v", a_vector(2))
    spec = {"interventions": [{"kind": "add", "vector": one.id}]}
    registry.put_profile(Profile(name="p", spec=spec))
    registry.remove("vector", two.id)
    with pytest.raises(Conflict):
        registry.remove("vector", one.id)


def test_the_detectors_of_a_profile_are_its_artefacts(registry: Registry) -> None:
    one, _ = registry.add("d", random_detector(4, 1))
    spec = {"interventions": [{"kind": "add", "vector": "v"}]}
    registry.add("v", a_vector())
    missing = Profile(name="p", spec=spec, detectors=({"name": "d"}, {"name": "e"}))
    with pytest.raises(UnknownArtefact, match="registered are 'd'") as raised:
        registry.put_profile(missing)
    assert (raised.value.code, raised.value.param) == ("unknown_detector", "/detectors/1/name")
    armed = {"name": "d", "action": "stop", "tokens": "all", "threshold": 2.5}
    profile = Profile(name="p", spec=spec, detectors=(armed,))
    assert registry.put_profile(profile) == profile == registry.profile("p")
    pinned = registry.put_profile(profile, pin=True)
    assert [item.name for item in pinned.detectors] == [one.id]
    with pytest.raises(Conflict, match="profiles p"):
        registry.remove("detector", "d")
    registry.put_profile(Profile(name="p", spec=spec))
    registry.remove("detector", "d")


def test_a_profile_without_detectors_is_written_as_before() -> None:
    profile = Profile(name="p", spec={"interventions": [{"kind": "add", "vector": "v"}]})
    assert "detectors" not in profile.model_dump_json(exclude_none=True)


def test_whatever_a_profile_names_cannot_be_removed(registry: Registry) -> None:
    registry.add("s", an_sae())
    registry.add("a", an_adapter())
    registry.add("d", random_detector(4, 1))
    clamp = {"kind": "clamp", "sae": "s", "features": [1], "value": 2.0}
    gated = {"kind": "low_rank", "adapter": "a", "when": {"detector": "d"}}
    spec = {"interventions": [clamp, gated]}
    registry.put_profile(Profile(name="p", spec=spec))
    for kind, name in (("sae", "s"), ("low_rank", "a"), ("detector", "d")):
        with pytest.raises(Conflict):
            registry.remove(kind, name)


def test_a_damaged_blob_is_noticed_and_repaired_by_sending_it_again(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry:
        entry, _ = registry.add("v", a_vector())
        blob = tmp_path / "blobs" / entry.sha256[:2] / entry.sha256
        whole = blob.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            blob.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            for read in (registry.vector, lambda ref: registry.content("vector", ref)):
                with pytest.raises(StorageError, match="damaged") as raised:
                    read("v")
                assert (raised.value.status, raised.value.code) == (500, "damaged_blob")
        _, created = registry.add("v", a_vector())
        assert not created
        assert registry.vector("v").sha256 == entry.sha256
        with registry.content("vector", "v") as stream:
            assert stream.read() == whole


def test_a_folder_without_its_catalogue_is_not_emptied(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry:
        entry, _ = registry.add("v", a_vector())
    for file in tmp_path.glob("catalogue.sqlite*"):
        file.rename(file.with_name("saved-" + file.name))
    with pytest.raises(StorageError, match=r"no catalogue\.sqlite"):
        Registry.open(tmp_path)
    for file in tmp_path.glob("saved-*"):
        file.rename(file.with_name(file.name.removeprefix("saved-")))
    with Registry.open(tmp_path) as registry:
        assert registry.vector("v").sha256 == entry.sha256


def test_places_that_cannot_hold_a_registry(tmp_path: Path) -> None:
    with pytest.raises(Unsupported):
        Registry.open("s3://bucket/registry")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        Registry.open(tmp_path / "file")


def test_import_needs_a_file_and_the_right_kind(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no file"):
        registry.import_file(tmp_path / "missing.safetensors")
    path = tmp_path / "french.safetensors"
    path.write_bytes(a_vector().to_bytes())
    with pytest.raises(FileFormatError) as raised:
        registry.import_file(path, kind="sae")
    assert raised.value.code == "wrong_kind"
    entry, created = registry.import_file(path, kind="vector")
    assert (entry.name, created) == ("french", True)
    assert registry.import_file(path) == (entry, False)


def test_loaded_objects_are_shared_until_something_changes(registry: Registry) -> None:
    registry.add("v", a_vector(1))
    first = registry.vector("v")
    assert registry.vector("v") is first
    registry.add("v", a_vector(2))
    assert registry.vector("v") is not first
    assert registry.stats().operations["load"] == 2


def test_the_cache_of_loaded_objects_is_bounded(tmp_path: Path) -> None:
    size = len(a_vector().to_bytes())
    with Registry.open(tmp_path, cache_bytes=2 * size) as registry:
        for seed in range(4):
            registry.add(f"v{seed}", a_vector(seed))
        for seed in (0, 1, 0, 2, 0, 3, 0):  # v0 is used again and again, the others once
            registry.vector(f"v{seed}")
        assert registry.stats().operations["load"] == 4
        registry.vector("v1")
        assert registry.stats().operations["load"] == 5
