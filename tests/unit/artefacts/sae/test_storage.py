"""Rows stay in their file: what is read of it, what sits in memory, and the file of old."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path

import pytest
import torch
from fuzz import _memory, _reset_peak
from safetensors.torch import save, save_file

from steer.artefacts.sae import SAE, SUPPORTED
from steer.artefacts.sae.storage import canonical, rows
from steer.artefacts.sae.storage.file_arrays import FileArray, HeldBytes, OpenedFile
from steer.artefacts.sae.storage.rows import FeatureRows
from steer.errors import FileFormatError
from steer.registry.registry import Registry

D, F = 12, 40


class Counting(HeldBytes):
    """Counts the bytes that are read of it."""

    read = 0

    def read_into(self, target: memoryview, offset: int) -> int:
        self.read += len(target)
        return super().read_into(target, offset)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def in_file(monkeypatch):
    """Every SAE stays in its file, and is gone through a few rows at a time."""
    monkeypatch.setattr(canonical, "HELD_BYTES", 0)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4 * D * 7)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_an_sae_in_its_file_is_the_same_as_one_in_memory(make_sae, tmp_path, in_file, architecture):
    sae = make_sae(architecture)
    (tmp_path / "sae").write_bytes(sae.to_bytes())
    with (tmp_path / "sae").open("rb") as stream:
        stored = SAE.from_file(stream)
    (tmp_path / "sae").unlink()  # what is open stays readable

    x = draw(5, D)
    assert not stored.decoder.held
    torch.testing.assert_close(stored.encode(x), sae.encode(x))
    torch.testing.assert_close(stored.decode(stored.encode(x)), sae.decode(sae.encode(x)))
    assert torch.equal(stored.reads([7, 3]).read, sae.reads([7, 3]).read)
    assert torch.equal(stored.writes([7, 3]), sae.writes([7, 3]))
    assert stored.sha256 == sae.sha256
    assert stored.to_bytes() == sae.to_bytes()


def test_a_clamp_reads_the_rows_of_its_features_alone():
    matrix = draw(F, D)
    source = Counting(matrix.numpy().tobytes())
    stored = FeatureRows(FileArray.plain(source, torch.float32, 0, (F, D)))
    assert torch.equal(stored.take([5, 31]), matrix[[5, 31]])
    assert source.read == 2 * D * 4


def test_cosines_are_those_of_whole_rows_and_0_with_a_zero_row(in_file):
    matrix = draw(F, D)
    matrix[4] = 0
    source = Counting(matrix.numpy().tobytes())
    stored = FeatureRows(FileArray.plain(source, torch.float32, 0, (F, D)))
    blocks = list(stored.cosines(matrix[[2, 4]]))
    assert [start for start, _ in blocks] == list(range(0, F, 7))
    found = torch.cat([block for _, block in blocks])
    wanted = torch.nn.functional.cosine_similarity(matrix[:, None], matrix[None, [2, 4]], dim=-1)
    torch.testing.assert_close(found, wanted)
    assert float(found[2, 0]) == pytest.approx(1.0)
    assert not found[4].any()
    assert not found[:, 1].any()


def test_a_reconstruction_reads_the_rows_of_active_features_alone():
    matrix, z = draw(F, D), torch.zeros(3, F)
    z[0, 4], z[2, 9] = 1.5, -2.0
    source = Counting(matrix.numpy().tobytes())
    stored = FeatureRows(FileArray.plain(source, torch.float32, 0, (F, D)))
    torch.testing.assert_close(stored.combined(z), z @ matrix)
    assert source.read == 2 * D * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_by_columns_of_every_type_are_the_rows(in_file, dtype, scaled):
    matrix = draw(F, D).to(dtype)
    data = matrix.T.contiguous().view(torch.uint8).numpy().tobytes()
    array = FileArray.plain(HeldBytes(data), dtype, 0, (D, F)).turned
    scale = draw(F) if scaled else None
    wanted = matrix.float() if scale is None else matrix.float() * scale[:, None]
    stored, x = FeatureRows(array, scale), draw(4, D)
    assert torch.equal(stored.take(None), wanted)
    assert torch.equal(stored.take([3, 3, 0]), wanted[[3, 3, 0]])
    torch.testing.assert_close(stored.along(x), x @ wanted.T)
    assert torch.equal(stored.in_memory().take(None), wanted)


def test_a_strange_stride_is_refused():
    array = FileArray(HeldBytes(bytes(4000)), torch.float32, 0, (5, 5), (7, 2))
    with pytest.raises(FileFormatError, match="neither by rows nor by columns"):
        array.rows(0, 5)


def test_a_file_that_has_become_shorter_is_refused(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(draw(F, D).numpy().tobytes())
    array = FileArray.plain(OpenedFile.at(path), torch.float32, 0, (F, D))
    with path.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(FileFormatError, match="truncated"):
        array.take([F - 1])


def test_half_precision_stays_as_it_came(make_sae):
    plain = make_sae()
    fields = {name: getattr(plain, name) for name in ("b_enc", "b_dec")}
    half = SAE.of(
        "standard", W_enc=plain.W_enc.bfloat16(), W_dec=plain.W_dec.bfloat16(), layer=2, **fields
    )
    assert len(half.to_bytes()) < len(plain.to_bytes()) - 2 * D * F
    again = SAE.from_bytes(half.to_bytes())
    assert again.decoder.stored_dtype == torch.bfloat16
    assert torch.equal(again.W_enc, plain.W_enc.bfloat16().float())
    assert again.encode(draw(2, D)).dtype == torch.float32


def old_file(sae: SAE) -> bytes:
    """As it was written before layout 2."""
    about = {
        "architecture": sae.architecture,
        "k": sae.k,
        "subtract_b_dec": sae.subtract_b_dec,
        "normalize": sae.normalize,
        "card": sae.card.model_dump(mode="json", by_alias=True, exclude={"name"}),
        "labels": {},
    }
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    return bytes(save(tensors, metadata={"steer": json.dumps(about, sort_keys=True)}))


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_a_file_of_layout_1_is_read_and_keeps_its_hash(make_sae, tmp_path, architecture):
    sae = make_sae(architecture)
    data = old_file(sae)
    x = draw(5, D)
    again = SAE.from_bytes(data)
    assert again.sha256 == hashlib.sha256(data).hexdigest() != sae.sha256
    torch.testing.assert_close(again.encode(x), sae.encode(x))
    with Registry.open(tmp_path / "registry") as registry:
        entry, _ = registry.add("old", again)
        assert entry.sha256 == again.sha256
        torch.testing.assert_close(registry.sae("old").encode(x), sae.encode(x))


def test_a_registry_counts_what_sits_in_memory(tmp_path, in_file, make_sae):
    with Registry.open(tmp_path / "registry") as registry:
        entry, _ = registry.add("one", make_sae())
        assert 0 < registry.sae("one").resident_bytes() < entry.size_bytes / 2
    assert make_sae().resident_bytes() == 4 * (2 * D * F + D + F)


def test_importing_takes_a_small_part_of_the_files_size(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 2 << 20)
    monkeypatch.setattr(canonical, "HELD_BYTES", 1 << 20)
    d, f = 256, 65_536
    matrix = draw(1024, d).repeat(f // 1024, 1).bfloat16()
    arrays = {"W_enc": matrix.T.contiguous(), "W_dec": matrix}
    save_file(
        arrays | {"b_enc": torch.zeros(f), "b_dec": torch.zeros(d)},
        tmp_path / "sae_weights.safetensors",
    )
    hook = {"hook_name": "blocks.1.hook_resid_post"}
    cfg = {"architecture": "standard", "metadata": hook}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    size = (tmp_path / "sae_weights.safetensors").stat().st_size
    del matrix, arrays
    gc.collect()
    with Registry.open(tmp_path / "registry") as registry:
        before = _reset_peak()
        registry.import_file(tmp_path, name="large")
        reads = registry.sae("large").reads([3, f - 1])
        peak = _memory("VmHWM") - before
    assert size > 64 << 20
    assert reads.read.shape == (2, d)
    assert peak < size / 2, (peak, size)
