"""Without the sites inside attention and MLP: whole parts, and refusals that name the option."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_engine
from vllm_inspection import FACT, refusal

from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import Unsupported
from steer.inspection import FLOW, AttributionRequest, FlowRequest, attribution, flow
from steer.spec import Site


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    with vllm_engine.start_engine(registry, max_num_seqs=8) as running:
        yield running


def test_whole_attentions_and_mlps_have_their_shares(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    request = AttributionRequest.model_validate({**FACT, "token": " Paris"})
    mine, other = attribution(engine, request), attribution(reference, request)
    assert mine.unexplained == pytest.approx(0.0, abs=1e-4)
    for one, wanted in zip(mine.layers, other.layers, strict=True):
        assert one.attention == pytest.approx(wanted.attention, abs=1e-4)
        assert one.mlp == pytest.approx(wanted.mlp, abs=1e-4)


@pytest.mark.parametrize(("site", "param"), [("head_out", "/heads"), ("mlp_act", "/neurons")])
def test_heads_and_neurons_are_refused_with_the_option(
    engine: VllmEngine, site: Site, param: str
) -> None:
    error = refusal(engine, site)
    assert (error.param, error.code) == (param, "unsupported_site")
    assert f'--additional-config \'{{"steer": {{"sites": ["{site}"]}}}}\'' in error.message


def test_a_flow_is_refused_with_the_option(engine: VllmEngine) -> None:
    assert not FLOW.possible(engine.capabilities)
    with pytest.raises(Unsupported, match="additional-config") as caught:
        flow(engine, FlowRequest.model_validate(FACT))
    assert caught.value.code == "unsupported_inspection"
    assert "'head_out' is not tapped on this server" in caught.value.message
