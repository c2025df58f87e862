"""Folders of pyreft and EasySteer: LoReFT, DiReFT and biases, against their formulas in float64."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.edits import apply
from steer.engines.fake.engine import FakeEngine
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.model import HookPoint
from steer.spec import Where, parse_spec

WIDTH, RANK = 16, 3
PLAIN = ImportOptions()
LOREFT = "pyreft.interventions.LoreftIntervention"
DIREFT = "pyreft.interventions.DireftIntervention"
Tensors = dict[str, torch.Tensor]


def parts(seed: int = 0) -> Tensors:
    """As LoreftIntervention.state_dict holds them; rotate_layer has orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return {
        "weight": torch.randn(RANK, WIDTH, generator=generator),
        "bias": torch.randn(RANK, generator=generator),
        "rotate_layer": torch.linalg.qr(square)[0][:, :RANK].float(),
    }


def name(layer: int, component: str = "block_output", place: int = 0) -> str:
    return f"intkey_layer_{layer}_comp_{component}_unit_pos_nunit_1#{place}.bin"


def config(kind: str | None, *layers: int, **more: Any) -> dict[str, Any]:
    representations = [[layer, "block_output", "pos", 1, RANK, None] for layer in layers]
    types = [f"<class '{kind}'>"] * len(layers) if kind else None
    return {"representations": representations, "intervention_types": types, **more}


def folder(
    path: Path, files: Mapping[str, Mapping[str, torch.Tensor]], about: dict[str, Any] | None
) -> Path:
    path.mkdir()
    for file, tensors in files.items():
        torch.save(dict(tensors), path / file)
    if about is not None:
        (path / "config.json").write_text(json.dumps(about))
    return path


def read(path: Path, options: ImportOptions = PLAIN) -> Any:
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


def refused(path: Path, options: ImportOptions = PLAIN) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read(path, options)
    assert 400 <= raised.value.status < 500
    return raised.value


def edited(adapter: LowRankAdapter, x: torch.Tensor) -> dict[HookPoint, torch.Tensor]:
    spec = parse_spec({"interventions": [{"kind": "low_rank", "adapter": "a"}]})
    plans = plans_of(FakeEngine(), MemoryLibrary(low_ranks={"a": adapter}))
    (rule,) = plans.plan(spec).rules
    return {point: apply(block, x) for point, block in rule.blocks.items()}


def formula(x: torch.Tensor, held: Tensors, kind: str) -> torch.Tensor:
    """pyreft's own: x + (Wx + b − Rx)Rᵀ, without Rx for DiReFT; in float64."""
    x, weight, bias, rotate = (
        one.double() for one in (x, held["weight"], held["bias"], held["rotate_layer"])
    )
    inside = x @ weight.T + bias - (x @ rotate if kind == LOREFT else 0)
    return (x + inside @ rotate.T).float()


@pytest.mark.parametrize("prefix", ["", "learned_source."])
@pytest.mark.parametrize("kind", [LOREFT, DIREFT])
def test_every_layers_edit_is_that_of_its_kind(tmp_path: Path, kind: str, prefix: str) -> None:
    held = {1: parts(1), 4: parts(4)}
    files = {
        name(n): {(key if key == "rotate_layer" else prefix + key): one for key, one in p.items()}
        for n, p in held.items()
    }
    adapter = read(folder(tmp_path / "a", files, config(kind, 1, 4)))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
    states = edited(adapter, x)
    assert states.keys() == {HookPoint(1), HookPoint(4)}
    for point, state in states.items():
        assert torch.allclose(state, formula(x, held[point.layer], kind), atol=1e-5)


def test_half_precision_and_a_folder_within_an_archive(tmp_path: Path) -> None:
    halves = {key: one.to(torch.bfloat16) for key, one in parts().items()}
    path = folder(tmp_path / "reft", {name(2): halves}, config(LOREFT, 2))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for one in path.iterdir():
            file.write(one, f"out\\reft\\{one.name}")  # as some Windows programs write names
        file.writestr("__MACOSX/out/._config.json", b"x")
    adapter = read_artefact(
        tmp_path / "a.zip", PLAIN, scratch=tmp_path / "scratch", unpacked_limit=1 << 20
    )
    assert torch.equal(adapter.parts[2][0], halves["rotate_layer"].float().T)


@pytest.mark.parametrize(
    ("component", "site"),
    [("block_input", "resid_pre"), ("mlp_output", "mlp_out"), ("attention_output", "attn_out")],
)
def test_the_component_is_the_site(tmp_path: Path, component: str, site: str) -> None:
    files = {name(2, component): parts()}
    adapter = read(folder(tmp_path / "a", files, config(LOREFT, 2)))
    assert adapter.card.site == site


def test_a_bias_alone_is_a_vector(tmp_path: Path) -> None:
    rows = {n: torch.full((WIDTH,), float(n)) for n in (1, 3)}
    files = {name(n): {"bias": row} for n, row in rows.items()}
    vector = read(folder(tmp_path / "a", files, config("easysteer.BiasIntervention", 1, 3)))
    assert isinstance(vector, ControlVector)
    assert {n: row.tolist() for n, row in vector.directions.items()} == {
        n: row.tolist() for n, row in rows.items()
    }


def test_without_a_configuration_the_kind_is_asked_for(tmp_path: Path) -> None:
    held = parts()
    path = folder(tmp_path / "a", {name(2): held}, None)
    error = refused(path)
    assert (error.code, error.param) == ("unknown_layout", "/from")
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))
    for source, kind in (("loreft", LOREFT), ("direft", DIREFT)):
        assert source in error.message
        (state,) = edited(read(path, ImportOptions(source=source)), x).values()
        assert torch.allclose(state, formula(x, held, kind), atol=1e-5)


def test_the_tokens_that_easysteer_records_are_the_cards(tmp_path: Path) -> None:
    trained = {"apply": {"prompt": "last", "generation": "none"}}
    about = config(LOREFT, 2, easysteer_training=trained)
    adapter = read(folder(tmp_path / "a", {name(2): parts()}, about))
    assert adapter.card.default_where == Where(phases=("prompt",), positions=((-1, None),))


UNREAD: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    "another class": ([name(2)], config("pyreft.interventions.ConsreftIntervention", 2)),
    "an activation": ([name(2)], config(LOREFT, 2, act_fn="relu")),
    "EasySteer's activation": (
        [name(2)],
        config(LOREFT, 2, easysteer_training={"act_fn": "relu"}),
    ),
    "unknown tokens": (
        [name(2)],
        config(LOREFT, 2, easysteer_training={"apply": {"prompt": "f7"}}),
    ),
    "other layers": ([name(2)], config(LOREFT, 2, 3)),
    "two for a layer": ([name(2), name(2, place=1)], config(LOREFT, 2, 2)),
    "another component": ([name(2, "attention_value_output")], config(LOREFT, 2)),
    "heads": (["intkey_layer_2_comp_head_output_unit_h_nunit_1#0.bin"], config(LOREFT, 2)),
    "several units": (
        ["intkey_layer_2_comp_block_output_unit_pos_nunit_4#0.bin"],
        config(LOREFT, 2),
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_would_be_another_edit_is_refused(tmp_path: Path, case: str) -> None:
    files, about = UNREAD[case]
    refused(folder(tmp_path / "a", {file: parts() for file in files}, about))


def test_one_file_of_a_folder_says_to_send_the_folder(tmp_path: Path) -> None:
    torch.save(parts(), tmp_path / "file.bin")
    assert "send the folder" in refused(tmp_path / "file.bin").message
