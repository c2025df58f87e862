"""The files of assistant-axis: row k is the output of block k, and caps are caps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.edits import apply
from steer.engines.fake.engine import FakeEngine
from steer.engines.plans import plans_of
from steer.errors import SpecError, SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.model import HookPoint
from steer.spec import parse_spec

LAYERS, WIDTH = 4, 16
PLAIN = ImportOptions()


def marked(first: float = 1.0) -> torch.Tensor:
    return (torch.arange(LAYERS) + float(first))[:, None].expand(LAYERS, WIDTH).contiguous()


def saved(folder: Path, value: Any) -> Path:
    torch.save(value, folder / "file.pt")
    return folder / "file.pt"


def read(path: Path, options: ImportOptions = PLAIN) -> Any:
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


def refused(path: Path, options: ImportOptions = PLAIN) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read(path, options)
    assert 400 <= raised.value.status < 500
    return raised.value


MEASURED = {
    "an axis": {
        "axis": marked(),
        "default_mean": marked(5),
        "role_mean": marked(4),
        "n_default": 1,
        "n_roles": 275,
    },
    "an axis alone": {"axis": marked().to(torch.bfloat16)},
    "a role": {"vector": marked(), "type": "pos_3", "role": "pirate"},
}


@pytest.mark.parametrize("case", MEASURED)
def test_row_k_is_the_output_of_block_k(tmp_path: Path, case: str) -> None:
    vector = read(saved(tmp_path, MEASURED[case]))
    assert {n: float(row[0]) for n, row in vector.directions.items()} == {0: 1, 1: 2, 2: 3, 3: 4}
    assert vector.card.site == "resid_post"
    assert vector.card.provenance["tool"] == "assistant-axis"


@pytest.mark.parametrize("case", MEASURED)
def test_what_changes_their_meaning_is_refused(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path, {**MEASURED[case], "scale": 2.0})
    assert refused(path).code == "unhonoured_metadata"


@pytest.mark.parametrize("more", [{"operation": "floor"}, {"experiments": None}])
def test_what_changes_a_caps_meaning_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    held = capping()
    if "experiments" in more:
        more = {"experiments": [{**held["experiments"][0], "mode": "floor"}]}
    refused(saved(tmp_path, {**held, **more}), ImportOptions(experiment="layers_1:4-p0.25"))


def test_a_bare_axis_is_asked_about_and_its_writer_answers(tmp_path: Path) -> None:
    path = saved(tmp_path, marked())
    assert refused(path).code == "layer_offset_required"
    assert list(read(path, ImportOptions(source="assistant-axis")).directions) == [0, 1, 2, 3]


def capping(**more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    vectors = {
        f"axis_layer_{n}": {"layer": n, "vector": 3 * torch.randn(WIDTH, generator=generator)}
        for n in range(LAYERS)
    }
    experiments = [
        {
            "id": f"layers_{start}:{LAYERS}-p0.25",
            "interventions": [
                {"vector": f"axis_layer_{n}", "cap": n - 1.5} for n in range(start, LAYERS)
            ],
        }
        for start in (1, 2)
    ]
    return {"vectors": vectors, "experiments": experiments, **more}


def test_an_experiment_caps_projections_as_the_package_does(tmp_path: Path) -> None:
    held = capping()
    vector = read(saved(tmp_path, held), ImportOptions(experiment="layers_2:4-p0.25"))
    assert isinstance(vector, ControlVector)
    assert list(vector.directions) == [2, 3]
    spec = parse_spec(
        {"interventions": [{"kind": "project", "vector": "a", "value": "cap", "mode": "at_most"}]}
    )
    plans = plans_of(FakeEngine(), MemoryLibrary(vectors={"a": vector}))
    (rule,) = plans.plan(spec).rules
    x = 4 * torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    assert rule.blocks.keys() == {HookPoint(2), HookPoint(3)}
    for point, block in rule.blocks.items():
        row = held["vectors"][f"axis_layer_{point.layer}"]["vector"].double()
        unit = row / row.norm()
        excess = (x.double() @ unit - (point.layer - 1.5)).clamp(min=0)
        assert 0 < int((excess > 0).sum()) < len(x)  # some states are above the cap, some below
        wanted = x.double() - excess[:, None] * unit
        assert torch.allclose(apply(block, x).double(), wanted, atol=1e-5)


def test_a_single_experiment_needs_no_choice_and_several_are_listed(tmp_path: Path) -> None:
    held = capping()
    error = refused(saved(tmp_path, held))
    assert (error.code, error.param) == ("experiment_required", "/experiment")
    assert "layers_1:4-p0.25, layers_2:4-p0.25" in error.message
    wrong = refused(saved(tmp_path, held), ImportOptions(experiment="p0.5"))
    assert wrong.code == "experiment_required"
    assert "'p0.5'" in wrong.message
    held["experiments"] = held["experiments"][:1]
    assert list(read(saved(tmp_path, held)).directions) == [1, 2, 3]


UNREAD: dict[str, list[dict[str, Any]]] = {
    "no cap": [{"vector": "axis_layer_1", "coefficient": 2.0}],
    "more than a cap": [{"vector": "axis_layer_1", "cap": 1.0, "type": "floor"}],
    "an unknown vector": [{"vector": "axis_layer_9", "cap": 1.0}],
    "two for a layer": [
        {"vector": "axis_layer_1", "cap": 1.0},
        {"vector": "axis_layer_1", "cap": 2.0},
    ],
    "not finite": [{"vector": "axis_layer_1", "cap": float("nan")}],
    "nothing": [],
}


@pytest.mark.parametrize("case", UNREAD)
def test_an_experiment_that_is_no_cap_for_each_layer_is_refused(tmp_path: Path, case: str) -> None:
    refused(saved(tmp_path, capping(experiments=[{"id": "x", "interventions": UNREAD[case]}])))


def test_a_cap_bounds_from_above_only() -> None:
    with pytest.raises(SpecError, match="at_most"):
        parse_spec({"interventions": [{"kind": "project", "vector": "a", "value": "cap"}]})
