"""Files of every format on their way into the registry, and the folder of shipped artefacts."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from artefacts import EXAMPLES
from safetensors.torch import save_file

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.kinds import KINDS, KindRow
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.saelens import save_directory
from steer.errors import FileFormatError, StorageError, TooLarge, UnknownArtefact
from steer.formats.options import ImportOptions
from steer.formats.vectors.gguf import write_gguf
from steer.registry.blobs.blobs import BlobStore
from steer.registry.registry import Registry
from steer.registry.shipped import add_library

VECTOR = ControlVector.of({2: torch.tensor([1.0, 2.0]), 5: torch.tensor([3.0, 4.0])})


def an_sae(*, layer: int = 1) -> SAE:
    return SAE.of(
        "standard",
        W_enc=torch.eye(2, 3),
        b_enc=torch.zeros(3),
        W_dec=torch.ones(3, 2),
        b_dec=torch.zeros(2),
        layer=layer,
        model="demo",
    )


def send(registry: Registry, path: Path, name: str, **options: object):
    """As the server does: piece by piece into an upload, then the import."""
    data = path.read_bytes()
    with registry.upload() as upload:
        for start in range(0, len(data), 100):
            upload.write(data[start : start + 100])
        return registry.import_file(upload.path, name=name, options=ImportOptions(**options))


def test_vectors_by_upload(registry: Registry, tmp_path: Path) -> None:
    ours, foreign, gguf = (tmp_path / name for name in ("ours", "foreign", "gguf"))
    ours.write_bytes(VECTOR.to_bytes())
    save_file({"layer_2": VECTOR[2].clone(), "layer_5": VECTOR[5].clone()}, foreign)
    write_gguf(VECTOR, gguf)

    entry, created = send(registry, ours, "ours")
    assert (entry.sha256, created) == (VECTOR.sha256, True)
    assert send(registry, gguf, "ours") == (entry, False)  # the same vector, in another coat
    first, _ = send(registry, foreign, "foreign", strength=2.0)
    again, created = send(registry, foreign, "foreign", strength=2.0)
    assert (first, created) == (again, False)
    other, created = send(registry, foreign, "foreign", strength=3.0)
    assert (other.version, created) == (2, True)
    assert registry.vector("foreign").card.default_strength == 3.0
    assert torch.equal(registry.vector("foreign")[5], VECTOR[5])


def test_an_sae_by_upload(registry: Registry, tmp_path: Path) -> None:
    save_directory(an_sae(), tmp_path / "sae")
    with zipfile.ZipFile(tmp_path / "sae.zip", "w") as archive:
        for path in (tmp_path / "sae").iterdir():
            archive.write(path, path.name)
    entry, created = send(registry, tmp_path / "sae.zip", "features")
    assert (entry.kind, created) == ("sae", True)
    assert registry.sae("features").layer == 1
    assert registry.import_file(tmp_path / "sae", name="features") == (entry, False)


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    (tmp_path / "bad").write_bytes(VECTOR.to_bytes()[:-3])
    (tmp_path / "bomb.zip").touch()
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cfg.json", bytes(1 << 20))
    with Registry.open(root, max_upload_bytes=100_000) as registry:
        with pytest.raises(FileFormatError) as raised:
            send(registry, tmp_path / "bad", "v")
        assert raised.value.param == "/file"
        with pytest.raises(TooLarge):
            send(registry, tmp_path / "bomb.zip", "s")
        assert registry.entries() == []
        assert [path.name for path in root.rglob("staging/*/*")] == ["owner.lock"]
        assert list(root.rglob("blobs/*/*")) == []


def shipped_folder(root: Path) -> Path:
    for part in ("vectors", "low_ranks", "saes", "profiles"):
        (root / part).mkdir(parents=True)
    (root / "vectors" / "french.safetensors").write_bytes(VECTOR.to_bytes())
    adapter = LowRankAdapter.of({0: (torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))})
    (root / "low_ranks" / "tuned.safetensors").write_bytes(adapter.to_bytes())
    (root / "saes" / "resid-0.safetensors").write_bytes(an_sae(layer=0).to_bytes())
    save_directory(an_sae(), root / "saes" / "resid-1")
    spec = {"interventions": [{"kind": "add", "vector": "french"}]}
    profile = {"spec": spec, "description": "answers in French"}
    (root / "profiles" / "parlez.json").write_text(json.dumps(profile))
    return root


def test_a_shipped_library(registry: Registry, tmp_path: Path) -> None:
    folder = shipped_folder(tmp_path / "library")
    added = add_library(registry, folder)
    assert [(entry.kind, entry.name) for entry in added] == [
        ("vector", "french"),
        ("low_rank", "tuned"),
        ("sae", "resid-0"),
        ("sae", "resid-1"),
    ]
    assert registry.vector("french").sha256 == VECTOR.sha256
    assert registry.sae("resid-1").card.model == "demo"
    assert registry.profile("parlez").description == "answers in French"
    assert add_library(registry, folder) == []
    assert len(registry.versions("vector", "french")) == 1


@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)
def test_a_shipped_library_holds_every_kind(
    registry: Registry, tmp_path: Path, row: KindRow
) -> None:
    artefact = EXAMPLES[row.name]()
    (tmp_path / row.shelf).mkdir()
    (tmp_path / row.shelf / "one.safetensors").write_bytes(artefact.to_bytes())
    (entry,) = add_library(registry, tmp_path)
    assert (entry.kind, entry.name, entry.sha256) == (row.name, "one", artefact.sha256)


def test_a_shipped_lens_may_be_a_folder(registry: Registry, tmp_path: Path) -> None:
    """As the tuned-lens package saves it."""
    folder = tmp_path / "lenses" / "tuned"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"d_model": 2, "num_hidden_layers": 1}))
    torch.save({"0.weight": torch.eye(2), "0.bias": torch.ones(2)}, folder / "params.pt")
    (entry,) = add_library(registry, tmp_path)
    assert (entry.kind, entry.name) == ("lens", "tuned")
    assert torch.equal(registry.lens("tuned").translators[0][0], torch.eye(2))


def test_a_shipped_library_does_not_undo_what_users_did(registry: Registry, tmp_path: Path) -> None:
    folder = shipped_folder(tmp_path / "library")
    add_library(registry, folder)
    mine, _ = registry.add("french", VECTOR * 2)
    registry.remove("sae", "resid-1")
    changed = registry.profile("parlez").model_copy(update={"description": "mine"})
    registry.put_profile(changed)
    assert add_library(registry, folder) == []
    assert registry.entry("vector", "french") == mine
    assert registry.profile("parlez") == changed
    with pytest.raises(UnknownArtefact):
        registry.sae("resid-1")
    new = VECTOR * 3  # a new release brings another vector of that name
    (folder / "vectors" / "french.safetensors").write_bytes(new.to_bytes())
    assert [entry.sha256 for entry in add_library(registry, folder)] == [new.sha256]


def test_a_wrong_library_is_named(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="not a folder"):
        add_library(registry, tmp_path / "missing")
    folder = shipped_folder(tmp_path / "library")
    (folder / "profiles" / "bad.json").write_text("[]")
    with pytest.raises(FileFormatError, match=r"bad\.json"):
        add_library(registry, folder)


def test_blobs_need_nothing_of_a_disk(tmp_path: Path) -> None:
    """The store works on any file system that fsspec knows; here, one in memory."""
    store = BlobStore("memory://blobs-of-a-test")
    (tmp_path / "staged").write_bytes(VECTOR.to_bytes())
    store.publish(tmp_path / "staged", VECTOR.sha256)
    assert not (tmp_path / "staged").exists()
    assert store.read(VECTOR.sha256) == VECTOR.to_bytes()
    assert list(store.names()) == [VECTOR.sha256]
    store.remove(VECTOR.sha256)
    with pytest.raises(StorageError):
        store.read(VECTOR.sha256)
    assert list(store.names()) == []
