"""GGUF files of the GLP kind: what they say of their operation is done, or the file is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.edits import apply
from steer.engines.fake.engine import FakeEngine
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.model import HookPoint
from steer.spec import parse_spec

WIDTH = 16
PLAIN = ImportOptions()
PROJECT: dict[str, Any] = {
    "spec_version": 1,
    "mode": "project",
    "rank": 1,
    "alpha_default": 4.0,
    "hook_point": "residual_stream_post_layer",
}


def basis(rank: int, seed: int = 0) -> torch.Tensor:
    """Orthonormal rows [rank, WIDTH] in float32."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0][:rank].float()


def written(
    folder: Path, about: Mapping[str, Any], rows: Mapping[int, torch.Tensor] | None = None
) -> Path:
    """A file with `glp.*` keys and, by layer, rows [rank, d], named as the format names them."""
    writer = GGUFWriter(folder / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    rows = {2: basis(1), 4: basis(1, seed=1)} if rows is None else rows
    writer.add_uint32("controlvector.layer_count", 6)
    for key, value in about.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_string)(f"glp.{key}", value)
    for layer, directions in rows.items():
        for place, row in enumerate(directions):
            name = f"direction.{layer}" + (f".{place}" if place else "")
            writer.add_tensor(name, np.ascontiguousarray(row.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "v.gguf"


def read(path: Path, options: ImportOptions = PLAIN) -> Any:
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


def refused(path: Path, options: ImportOptions = PLAIN) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read(path, options)
    assert 400 <= raised.value.status < 500
    return raised.value


def edited(adapter: LowRankAdapter, x: torch.Tensor, **more: Any) -> dict[HookPoint, torch.Tensor]:
    """What a request that names the adapter does to the states x at each hook point."""
    spec = parse_spec({"interventions": [{"kind": "low_rank", "adapter": "a", **more}]})
    plans = plans_of(FakeEngine(), MemoryLibrary(low_ranks={"a": adapter}))
    (rule,) = plans.plan(spec).rules
    return {point: apply(block, x) for point, block in rule.blocks.items()}


def projected(x: torch.Tensor, rows: torch.Tensor, alphas: list[float]) -> torch.Tensor:
    """h − Σ_j α_j (h·d_j) d_j in float64, as the format's page says."""
    out = x.double()
    for row, alpha in zip(rows.double(), alphas, strict=True):
        out = out - alpha * (x.double() @ row)[:, None] * row
    return out.float()


SITES = {
    "residual_stream_post_layer": "resid_post",
    "ffn_out_pre_residual": "mlp_out",
    "attn_out_pre_residual": "attn_out",
}


@pytest.mark.parametrize("hook", SITES)
def test_a_projection_is_done_where_and_as_strongly_as_the_file_says(
    tmp_path: Path, hook: str
) -> None:
    adapter = read(written(tmp_path, {**PROJECT, "hook_point": hook}))
    assert isinstance(adapter, LowRankAdapter)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))
    wanted = {2: basis(1), 4: basis(1, seed=1)}
    states = edited(adapter, x)
    assert states.keys() == {HookPoint(layer, SITES[hook]) for layer in wanted}
    for point, state in states.items():
        assert torch.allclose(state, projected(x, wanted[point.layer], [4.0]), atol=1e-5)
    for point, state in edited(adapter, x, strength=1.0).items():
        assert torch.allclose(state, projected(x, wanted[point.layer], [1.0]), atol=1e-5)
    assert adapter.card.provenance["glp_mode"] == "project"


def test_version_2_has_a_rank_and_scales_by_direction_and_layer(tmp_path: Path) -> None:
    about = {
        **PROJECT,
        "spec_version": 2,
        "rank": 3,
        "orthonormal": True,
        "dir_scales": "1.0, 0.5, 0",
        "layer_scales": "4:2.0",
        "alpha_default": 1.5,
    }
    rows = {2: basis(3), 4: basis(3, seed=1)}
    adapter = read(written(tmp_path, about, rows))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))
    alphas = {2: [1.5, 0.75, 0.0], 4: [3.0, 1.5, 0.0]}
    for point, state in edited(adapter, x).items():
        wanted = projected(x, rows[point.layer], alphas[point.layer])
        assert torch.allclose(state, wanted, atol=1e-5)


@pytest.mark.parametrize("about", [{"spec_version": 1}, {"mode": "add"}])
def test_what_is_to_be_added_is_a_vector_at_its_site(tmp_path: Path, about: dict) -> None:
    vector = read(written(tmp_path, {**about, "hook_point": "ffn_out_pre_residual"}))
    assert isinstance(vector, ControlVector)
    assert (vector.card.site, list(vector.directions)) == ("mlp_out", [2, 4])
    assert torch.equal(vector[2], basis(1)[0])


def test_an_addition_with_a_strength_is_asked_whether_the_rows_hold_it(tmp_path: Path) -> None:
    path = written(tmp_path, {"mode": "add", "alpha_default": 2.0})
    assert "'strength': 2" in refused(path).message
    assert read(path, ImportOptions(strength=2.0)).card.default_strength == 2.0


def test_the_sender_may_choose_the_strength_and_the_layers(tmp_path: Path) -> None:
    adapter = read(written(tmp_path, PROJECT), ImportOptions(strength=1.0, layers=(4,)))
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    ((point, state),) = edited(adapter, x).items()
    assert point.layer == 4
    assert torch.allclose(state, projected(x, basis(1, seed=1), [1.0]), atol=1e-5)


UNREAD: dict[str, tuple[dict[str, Any], dict[int, torch.Tensor] | None]] = {
    "unknown mode": ({**PROJECT, "mode": "rotate"}, None),
    "unknown hook": ({**PROJECT, "hook_point": "router_logits"}, None),
    "unknown version": ({**PROJECT, "spec_version": 3}, None),
    "unknown operation": ({**PROJECT, "apply_mode": "clip"}, None),
    "unknown scales": ({**PROJECT, "token_scales": "1,2"}, None),
    "rank in version 1": ({**PROJECT, "rank": 2}, {2: basis(2)}),
    "scales in version 1": ({**PROJECT, "dir_scales": "2"}, None),
    "rank without a basis": ({**PROJECT, "spec_version": 2, "rank": 2}, {2: basis(2)}),
    "fewer directions": (
        {**PROJECT, "spec_version": 2, "rank": 2, "orthonormal": True},
        {2: basis(1)},
    ),
    "more directions": (PROJECT, {2: basis(2)}),
    "not unit": (PROJECT, {2: 2 * basis(1)}),
    "not orthogonal": (
        {**PROJECT, "spec_version": 2, "rank": 2, "orthonormal": True},
        {2: basis(1).repeat(2, 1)},
    ),
    "a looped model": ({**PROJECT, "structure": "per-execution-step"}, None),
    "block 0": (PROJECT, {0: basis(1)}),
    "other layers": ({**PROJECT, "layer_ids_zero_based": "1,3"}, None),
    "no number": ({**PROJECT, "alpha_default": "strong"}, None),
    "not finite": ({**PROJECT, "alpha_default": float("inf")}, None),
    "an older name": ({"dspark.mode": "project"}, None),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_could_not_be_done_as_it_says_is_refused(tmp_path: Path, case: str) -> None:
    about, rows = UNREAD[case]
    refused(written(tmp_path, about, rows))


def test_the_file_itself_says_how_its_layers_count(tmp_path: Path) -> None:
    path = written(tmp_path, PROJECT)
    assert refused(path, ImportOptions(layer_offset=-1)).param == "/layer_offset"
    assert refused(path, ImportOptions(source="llama-cpp-generator")).param == "/layer_offset"
