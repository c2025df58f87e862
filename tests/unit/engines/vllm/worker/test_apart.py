"""A drafter may share modules with the model that is steered, but none that has taps."""

from __future__ import annotations

import pytest
from torch import nn

from steer.engines.vllm.taps.layer_streams import FusedAdd
from steer.engines.vllm.taps.taps import DecoderStack
from steer.engines.vllm.worker.worker import check_apart
from steer.errors import Unsupported


def test_layers_with_taps_are_not_drafted_with() -> None:
    shared, layer = nn.Linear(2, 2), nn.Module()
    layer.part, layer.tapped = shared, nn.LayerNorm(2)
    layer.tapped.forward = layer.tapped.forward  # as taps are put in
    stack = DecoderStack([(0, layer)], FusedAdd(None), 1)
    check_apart(stack, None)
    check_apart(stack, nn.Sequential(shared, nn.Embedding(3, 2)))
    with pytest.raises(Unsupported, match="Sequential drafts tokens with a LayerNorm"):
        check_apart(stack, nn.Sequential(shared, layer.tapped))
