"""Vectors inside requests."""

import base64
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import save

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.errors import SpecError, SteerError
from steer.formats.inline import decode_inline
from steer.spec import InlineVector, parse_spec

ROW = torch.tensor([1.0, -2.0, 3.0])


def inline(data: bytes, layer: int | None = None) -> InlineVector:
    return InlineVector(data=base64.b64encode(data).decode(), layer=layer)


def refused(vector: InlineVector, max_bytes: int = 1 << 20) -> SteerError:
    with pytest.raises(SteerError) as raised:
        decode_inline(vector, max_bytes=max_bytes)
    assert 400 <= raised.value.status < 500
    return raised.value


def test_a_single_row_lies_on_the_given_layer() -> None:
    vector = decode_inline(inline(save({"v": ROW}), layer=5))
    assert list(vector.directions) == [5]
    assert torch.equal(vector[5], ROW)
    assert refused(inline(save({"v": ROW}))).code == "layer_required"


def test_rows_named_by_layer() -> None:
    data = save({"layers.1": ROW, "layers.4": -ROW})
    assert list(decode_inline(inline(data)).directions) == [1, 4]
    assert list(decode_inline(inline(data, layer=4)).directions) == [4]
    assert refused(inline(data, layer=2)).code in {"layer_not_in_vector"}


def test_a_canonical_file_keeps_its_card() -> None:
    vector = ControlVector.of({1: ROW, 2: ROW * 2}, description="d", site="attn_out")
    assert decode_inline(inline(vector.to_bytes())).card == vector.card
    one = decode_inline(inline(vector.to_bytes(), layer=2))
    assert (one.card.layers, one.card.site) == ((2,), "attn_out")


def test_numbers_are_a_row_at_a_layer() -> None:
    vector = decode_inline(InlineVector(values=tuple(ROW.tolist()), layer=5))
    assert vector.card.site == "resid_post"
    assert list(vector.directions) == [5]
    assert torch.equal(vector[5], ROW)
    assert refused(InlineVector(values=(1.0, 1e39), layer=5)).code == "not_finite"
    assert refused(InlineVector(values=(0.0, 0.0), layer=5)).code == "zero_vector"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "give one of them"),
        ({"layer": 3}, "give one of them"),
        ({"values": [1.0], "data": "AAAA", "layer": 3}, "give one of them"),
        ({"values": [1.0, 2.0]}, "'layer'"),
        ({"values": [], "layer": 3}, "at least 1"),
        ({"values": [1.0, "x"], "layer": 3}, "a number is needed"),
        ({"values": [1.0, float("nan")], "layer": 3}, "finite number"),
    ],
)
def test_what_is_not_clear_is_told_at_the_vector(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as raised:
        parse_spec({"interventions": [{"kind": "add", "vector": fields}]})
    problem = raised.value.problems[0]
    assert says in problem.message
    assert problem.param is not None
    assert problem.param.startswith("/interventions/0/vector")


def test_what_cannot_be_sent_inline() -> None:
    adapter = LowRankAdapter.of({0: (torch.ones(1, 3), torch.ones(1, 3), torch.ones(1))})
    assert refused(inline(adapter.to_bytes())).code == "wrong_kind"
    assert refused(InlineVector(data="not base64!")).code == "invalid_base64"
    assert refused(InlineVector(data="é")).code == "invalid_base64"
    assert refused(inline(pickle.dumps([1.0]))).code == "pickle_refused"
    assert refused(inline(b"GGUF" + bytes(100))).code == "invalid_file"
    assert refused(inline(save({"layers.0": ROW * float("nan")}))).code == "not_finite"
    too_large = refused(inline(bytes(5000)), max_bytes=4096)
    assert (too_large.code, too_large.status) == ("inline_too_large", 413)
