"""Finds the blocks of a model's text decoder, by what they are given and return.

Nothing is known of class names: the blocks are the longest list of modules inside the decoder that
hand one state on, each what the one before returned. So attention, convolution and recurrent blocks
are alike, and a vision tower, which token ids do not reach, is no candidate. A block that runs for
images alone (the cross-attention of Mllama) keeps its number in the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.transformers.structure.calls import Call
from steer.errors import Unsupported


def check_runs_here(model: nn.Module) -> None:
    """Raises `Unsupported` for a wrapper, and for weights that are not all in memory."""
    name = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise unsupported(name, "it spreads a batch over several copies: give the model in .module")
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise unsupported(name, "it is no PreTrainedModel of transformers")
    if config.is_encoder_decoder:
        raise unsupported(
            name, "it is an encoder-decoder model, and a spec's positions count one sequence"
        )
    away = next((path for path, p in model.named_parameters() if p.device.type == "meta"), None)
    if away is not None:
        raise unsupported(
            name,
            f"its weights are offloaded to the CPU or a disk ({away} is not in memory): load it "
            "without a device_map, or on a larger device",
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise unsupported(
            name,
            f"its weights lie on {', '.join(sorted(map(str, devices)))}: load it on one device, "
            "without a device_map",
        )


def unsupported(name: str, reason: str) -> Unsupported:
    """The refusal of a model by the name of its class."""
    return Unsupported(f"{name} is not supported: {reason}", code="unsupported_model")


def decoder_blocks(model: nn.Module, seen: Mapping[nn.Module, Call]) -> list[nn.Module]:
    """The text decoder's blocks, first to last, from `seen`, a plain pass of the whole model.

    Raises `Unsupported` where there are none.
    """
    decoder, fed = _text_decoder(model), seen[model].kwargs["input_ids"].shape
    blocks = max(_candidates(decoder, seen, fed), key=len, default=[])
    if not blocks and decoder is not model:
        blocks = max(_candidates(model, seen, fed), key=len, default=[])
    if not blocks:
        raise unsupported(
            type(model).__name__,
            "no list of blocks was found that hand one residual stream [batch, tokens, width] on, "
            "each once in a pass",
        )
    return blocks


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def _text_decoder(model: nn.Module) -> nn.Module:
    found = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return found if isinstance(found, nn.Module) else model


def _candidates(
    module: nn.Module, seen: Mapping[nn.Module, Call], fed: torch.Size
) -> Iterator[list[nn.Module]]:
    """The outermost lists below `module` whose members carry one stream through."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and _carries_a_stream(list(child), seen, fed):
            yield list(child)
        else:
            yield from _candidates(child, seen, fed)


def _carries_a_stream(
    blocks: list[nn.Module], seen: Mapping[nn.Module, Call], fed: torch.Size
) -> bool:
    """Whether those of `blocks` that run hand one state on, each what the one before returned."""
    calls = [seen[block] for block in blocks if block in seen]
    if not calls or any(call.times > 1 for call in calls):
        return False
    first = calls[0].input
    if first is None or first.shape[:-1] != fed or not first.is_floating_point():
        return False
    handed_on = (
        earlier.order < later.order and _equal(earlier.output, later.input)
        for earlier, later in pairwise(calls)
    )
    return _like(calls[-1].output, first) and all(handed_on)


def _equal(output: Tensor | None, given: Tensor | None) -> bool:
    return output is not None and given is not None and torch.equal(output, given)


def _like(output: Tensor | None, given: Tensor) -> bool:
    return output is not None and output.shape == given.shape
