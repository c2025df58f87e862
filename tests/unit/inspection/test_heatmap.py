from __future__ import annotations

import io
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.fake.engine import FakeEngine
from steer.errors import SteerError
from steer.inspection.activations import (
    ActivationsRequest,
    activations,
    activations_heat_map,
)
from steer.inspection.heatmap import HeatMap
from steer.inspection.logit_lens import LogitLensRequest, lens_heat_map, logit_lens
from steer.inspection.patchscopes.method import PatchscopeRequest, patchscope, patchscope_heat_map


def picture(data: bytes) -> Any:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(io.BytesIO(data), format="png")


def row(seed: int) -> torch.Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(seed))


def table(rows: int, columns: int, **fields: Any) -> HeatMap:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "title": "Title",
        "subtitle": "what $it$ shows",
        "row_label": "layer",
        "column_label": "token",
        "rows": [str(n) for n in range(rows)],
        "columns": [f"t{n}" for n in range(columns)],
        "values": rng.random((rows, columns)).tolist(),
        "texts": [["tok"] * columns] * rows,
        "scale": "probability",
    }
    return HeatMap(**{**given, **fields})


def lens(text: str = "Paris", **fields: Any) -> Any:
    request = LogitLensRequest.model_validate({"text": text, **fields})
    return logit_lens(FakeEngine(), request)


def scope(**fields: Any) -> Any:
    body = {"source": {"text": "Paris"}, "max_tokens": 0, **fields}
    return patchscope(FakeEngine(), PatchscopeRequest.model_validate(body))


def test_the_same_input_gives_the_same_bytes() -> None:
    heat = lens_heat_map(lens())
    assert heat.png() == heat.png()


def test_colour_follows_the_value() -> None:
    image = picture(table(1, 2, values=[[0.0, 1.0]], texts=[["", ""]]).png())
    # The cells lie left of the scale, in the upper part; the darkest pixel is the right cell's.
    middle = image[int(image.shape[0] * 0.45), :, :3].mean(-1)
    dark = np.flatnonzero(middle[: int(len(middle) * 0.6)] < 0.3)
    assert len(dark) > 20
    light = np.flatnonzero((middle > 0.94) & (middle < 0.999))
    assert light.min() < dark.min()


def test_marks_change_the_picture() -> None:
    plain, marked = table(2, 2), table(2, 2, marked=frozenset({(1, 0)}))
    assert (picture(plain.png()) != picture(marked.png())).any()


def test_wide_tables_are_folded() -> None:
    narrow, wide = picture(table(4, 16).png()), picture(table(4, 64).png())
    assert wide.shape[1] == narrow.shape[1]
    assert wide.shape[0] > 3 * narrow.shape[0]


@pytest.mark.filterwarnings("error")
def test_any_token_can_be_drawn() -> None:
    tokens = ["$x_1$", "\n", "\t", "  ", "", "naïve", "a" * 60, "\\frac{", "日本", "🙂", "\x00"]
    assert picture(table(1, 11, texts=[tokens], title="$x", subtitle="_{").png()).any()


def test_a_lens_is_layers_by_positions() -> None:
    result = lens(layers=[4, 1], positions=[0, 2, -1])
    heat = lens_heat_map(result)
    assert heat.rows == ["4", "1"]
    assert heat.columns == ["<|bos|>\n0", "a\n2", "s\n5"]
    assert heat.values[1][2] == result.row(1)[2].top[0].probability
    assert heat.texts[1][2] == result.row(1)[2].top[0].token


def test_a_patchscope_is_layers_by_positions_or_by_target_layers() -> None:
    by_position = scope(positions=[1, 3], layers=[0, 2, 5], expect="next_token")
    heat = patchscope_heat_map(by_position)
    assert (len(heat.rows), len(heat.columns)) == (3, 2)
    for cell in by_position.cells:
        row = by_position.layers.index(cell.layer)
        column = by_position.positions.index(cell.position)
        assert heat.values[row][column] == cell.top[0].probability
        assert ((row, column) in heat.marked) == bool(cell.hit)
    by_layer = scope(layers=[0, 2], target_layers=[1, 3, 5])
    heat = patchscope_heat_map(by_layer)
    assert (heat.rows, heat.columns) == (["0", "2"], ["1", "3", "5"])
    for cell in by_layer.cells:
        row = by_layer.layers.index(cell.layer)
        column = (1, 3, 5).index(cell.target_layer)
        assert heat.values[row][column] == cell.top[0].probability
    with pytest.raises(SteerError, match="three dimensions"):
        patchscope_heat_map(scope(positions=[1, 2], target_layers="all"))


def test_activations_show_the_first_vector() -> None:
    rows = ControlVector.of({2: row(1), 3: row(2)}, name="joy")
    library = MemoryLibrary({"joy": rows})
    request = ActivationsRequest(text="Paris", vectors=("joy",))
    result = activations(FakeEngine(), request, library=library)
    heat = activations_heat_map(result)
    assert heat.rows == ["2", "3"]
    assert heat.values[1] == result.vectors[1].cosines
    assert picture(heat.png()).any()
    with pytest.raises(SteerError, match="name one in 'vectors'"):
        activations_heat_map(activations(FakeEngine(), ActivationsRequest(text="Paris")))


def test_a_picture_has_a_limit() -> None:
    with pytest.raises(SteerError, match="not readable"):
        table(80, 80).png()
