"""Causal traces, against the same runs made by plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from steer.engines.base import Engine
from steer.errors import SteerError
from steer.inspection import TraceRequest, TraceResult, trace, trace_heat_map
from steer.inspection.tracing.noise import noise_of

TEXT = "the river runs"


def read(engine: Engine, **fields: Any) -> TraceResult:
    body = {"text": TEXT, "subject": "iver", "draws": 2, **fields}
    return trace(engine, TraceRequest.model_validate(body))


def by_hand(
    subject: Any, ids: tuple[int, ...], noise: dict[int, Tensor], back: dict[int, Tensor], at: int
) -> Tensor:
    """The last token's chances with `noise` by position on the embeddings, and the states of
    `back`, by layer, put at the position `at`."""

    def disturb(_module: Any, args: tuple[Any, ...]) -> Any:
        x = args[0].clone()
        for position, row in noise.items():
            x[:, position] += row
        return (x, *args[1:])

    def replace(state: Tensor) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            x = (out if isinstance(out, Tensor) else out[0]).clone()
            x[:, at] = state
            return x if isinstance(out, Tensor) else (x, *out[1:])

        return hook

    handles = [subject.blocks[0].register_forward_pre_hook(disturb)]
    handles += [subject.blocks[n].register_forward_hook(replace(x)) for n, x in back.items()]
    try:
        return subject.logits(ids)[-1].double().softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("window", [1, 2])
def test_every_run_is_what_it_is_by_hand(subject: Any, window: int) -> None:
    ids = tuple(subject.engine.tokenizer.encode(TEXT))
    places = [n for n, token in enumerate(subject.engine.tokenizer.convert_ids_to_tokens(ids))]
    result = read(subject.engine, token=17, window=window, noise=2.0, seed=5)
    positions = result.corrupted.positions
    assert "".join(result.tokens[n] for n in positions) == "iver"
    assert result.positions == tuple(places[positions[0] :])
    clean = subject.states(ids)
    width = subject.engine.info.d_model
    embeddings: list[Tensor] = []
    handle = subject.blocks[0].register_forward_pre_hook(lambda _m, a: embeddings.append(a[0][0]))
    subject.logits(ids)
    handle.remove()
    assert result.sigma == pytest.approx(float(embeddings[0].double().std(correction=0)), rel=1e-5)
    assert result.clean.probability == pytest.approx(
        float(subject.logits(ids)[-1].double().softmax(-1)[17]), rel=1e-4
    )
    for draw in range(2):
        rows = 2.0 * result.sigma * noise_of(5 + draw, len(positions), width)
        noise = dict(zip(positions, rows, strict=True))
        bare = by_hand(subject, ids, noise, {}, 0)[17]
        assert result.corrupted.draws[draw] == pytest.approx(float(bare), rel=1e-3)
        assert result.elsewhere is not None
        others = dict(zip(result.elsewhere.positions, rows, strict=True))
        control = by_hand(subject, ids, others, {}, 0)[17]
        assert result.elsewhere.draws[draw] == pytest.approx(float(control), rel=1e-3)
        for cell in result.cells:
            layers = range(cell.layer, min(cell.layer + window, len(subject.blocks)))
            back = {n: clean[n][cell.position] for n in layers}
            wanted = by_hand(subject, ids, noise, back, cell.position)[17]
            assert cell.draws[draw] == pytest.approx(float(wanted), rel=1e-3)
    for cell in result.cells:
        assert cell.restored == pytest.approx(sum(cell.draws) / 2)


def test_the_last_state_brings_everything_back_and_the_first_tokens_nothing(subject: Any) -> None:
    result = read(subject.engine, positions=[1, -1])
    first, last = result.row(2)
    assert last.restored == pytest.approx(result.clean.probability, rel=1e-4)
    assert first.restored == pytest.approx(result.corrupted.probability, rel=1e-4)
    assert result.known
    assert result.clean.probability > result.corrupted.probability


def test_noise_elsewhere_is_never_at_the_subject_or_the_first_token(subject: Any) -> None:
    for seed in range(5):
        result = read(subject.engine, seed=seed, layers=[0], positions=[-1])
        assert result.elsewhere is not None
        assert not {0, *result.corrupted.positions} & set(result.elsewhere.positions)
        assert len(result.elsewhere.positions) == len(result.corrupted.positions)


def test_the_same_request_gives_the_same_noise(subject: Any) -> None:
    one, same, other = (read(subject.engine, seed=seed, layers=[0]) for seed in (1, 1, 2))
    assert one == same
    # The second draw of one seed is the first of the next.
    assert one.corrupted.draws[1] == pytest.approx(other.corrupted.draws[0], rel=1e-5)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_parts_can_be_put_back(subject: Any, site: str) -> None:
    narrow = read(subject.engine, site=site, layers=[1], positions=["iver"])
    wide = read(subject.engine, site=site, layers=[1], positions=["iver"], window=3)
    assert narrow.cells[0].restored != pytest.approx(wide.cells[0].restored, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"subject": "moon"}, "/subject", "text_not_found"),
        ({"subject": [0, 99]}, "/subject/1", "position_out_of_range"),
        ({"subject": "the river"}, "/subject", "subject_too_long"),
        ({"token": "river"}, "/token", "not_one_token"),
        ({"draws": 64, "text": "river " * 12, "subject": [0]}, "/positions", "answer_too_large"),
    ],
)
def test_what_cannot_be_traced_is_refused(
    subject: Any, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        read(subject.engine, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_the_picture_frames_the_subject(subject: Any) -> None:
    result = read(subject.engine)
    heat = trace_heat_map(result)
    assert {column for _, column in heat.marked} == {0, 1, 2, 3}
    assert heat.png().startswith(b"\x89PNG")
