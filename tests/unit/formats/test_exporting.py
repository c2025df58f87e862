"""Export: what comes back, how others see it, and what is said of what they will not know."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from safetensors.torch import load_file

from steer.artefacts.control_vector import ControlVector
from steer.errors import Unsupported
from steer.formats.exporting import ExportFormat, export_vector
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.spec import Where

PLAIN = ImportOptions()


def vector(**card: object) -> ControlVector:
    rows = {
        layer: torch.randn(8, generator=torch.Generator().manual_seed(layer)) for layer in (1, 5)
    }
    return ControlVector.of(rows, model="llama", **card)


def read(path: Path) -> ControlVector:
    return read_artefact(path, PLAIN, scratch=None, unpacked_limit=0)  # type: ignore[return-value]


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_what_is_exported_comes_back_exactly(tmp_path: Path, format: ExportFormat) -> None:
    whole = vector(
        default_where=Where(phases=("generation",)),
        default_layers=(5,),
        default_strength=0.5,
        provenance={"format": "gguf", "file_sha256": "0" * 64},
    )
    export_vector(whole, tmp_path / "v", format)
    back = read(tmp_path / "v")
    assert back.sha256 == whole.sha256
    assert back.card == whole.card


def test_plain_safetensors_have_the_rows_alone(tmp_path: Path) -> None:
    whole = vector()
    assert export_vector(whole, tmp_path / "v", "safetensors-plain") == ()
    found = load_file(tmp_path / "v")
    assert {key: row.tolist() for key, row in found.items()} == {
        f"layers.{n}": row.tolist() for n, row in whole.directions.items()
    }
    back = read(tmp_path / "v")
    assert all(torch.equal(back[n], whole[n]) for n in (1, 5))


def test_gguf_follows_the_rules_of_llama_cpp(tmp_path: Path) -> None:
    export_vector(vector(), tmp_path / "v", "gguf")
    reader = GGUFReader(tmp_path / "v")
    count = reader.fields["controlvector.layer_count"]
    assert (list(count.types), count.contents()) == ([GGUFValueType.INT32], 2)
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == "F32"
        assert tensor.shape.tolist() == [8]
    assert {tensor.name for tensor in reader.tensors} == {"direction.1", "direction.5"}


def test_what_others_will_not_know_is_said(tmp_path: Path) -> None:
    where = Where(phases=("generation",))
    whole = vector(default_where=where, default_layers=(5,), default_strength=0.5)
    for format in ("gguf", "safetensors-plain"):
        said = " ".join(export_vector(whole, tmp_path / "v", format))
        assert "generation" in said
        assert "not only 5" in said
        assert "strength 0.5" in said
    lost = export_vector(vector(site="mlp_out"), tmp_path / "v", "safetensors-plain")
    assert "mlp_out" in lost[0]
    assert export_vector(whole, tmp_path / "v", "safetensors") == ()


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="resid_post"):
        export_vector(vector(site="attn_out"), tmp_path / "v", "gguf")
    first = ControlVector.of({0: torch.ones(3), 1: torch.ones(3)})
    with pytest.raises(Unsupported, match="block 0"):
        export_vector(first, tmp_path / "v", "gguf")
