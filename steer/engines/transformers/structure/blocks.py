"""Finds all hook points of a model's text decoder.

Its blocks are found in `structure.decoder`, what passes where inside a block in `structure.sites`,
what follows the last block in `structure.head`, what is computed apart in `structure.stem`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.transformers.structure.calls import Call, at_rest, watching
from steer.engines.transformers.structure.decoder import (
    check_runs_here,
    decoder_blocks,
    text_config,
    unsupported,
)
from steer.engines.transformers.structure.head import Head
from steer.engines.transformers.structure.sites import HookTarget, sites_of_block
from steer.engines.transformers.structure.stem import Stem
from steer.model import HookPoint, ModelInfo
from steer.spec import SITES, Site

_LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length", "max_sequence_length")
"""How configurations call the context."""


@dataclass(frozen=True)
class HookMap:
    """Every hook point of a model, its shape, its first blocks, and what follows its last."""

    targets: dict[HookPoint, HookTarget]
    info: ModelInfo
    stem: Stem
    head: Head


def find_hook_points(model: nn.Module, name: str) -> HookMap:
    """The hook points of `model`.

    Raises `Unsupported` (`unsupported_model`) for a model that cannot be run as it is, or whose
    decoder blocks cannot be found.
    """
    check_runs_here(model)
    with at_rest(model):
        seen = _probe(model)
        blocks = decoder_blocks(model, seen)
        running = {n: block for n, block in enumerate(blocks) if block in seen}
        found = {n: sites_of_block(block, seen) for n, block in running.items()}
        for layer in range(len(blocks)):
            if layer not in found:
                found[layer] = _around(layer, running)
        stem, head = Stem(running, seen), Head(model, list(running.values()), seen)
    sites = [site for site in SITES if _everywhere_alike(site, found.values(), seen)]
    targets = {
        HookPoint(layer, site): of_block[site]
        for layer, of_block in found.items()
        for site in sites
    }
    first = found[min(running)]
    config = text_config(model)
    heads = getattr(config, "num_attention_heads", None)
    info = ModelInfo(
        name=name,
        architecture=type(model).__name__,
        n_layers=len(blocks),
        d_model=_width(next(seen[block].output for block in running.values())),
        vocab_size=int(config.vocab_size),
        max_length=_longest(config),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        sites=tuple(sites),
        d_mlp=_observed_width(seen, first, "mlp_act") if "mlp_act" in sites else None,
        n_heads=heads,
        head_dim=_head_dim(seen, first, heads) if "head_out" in sites else None,
    )
    return HookMap(targets, info, stem, head)


def _probe(model: nn.Module) -> dict[nn.Module, Call]:
    """What the model's modules see on a five-token input."""
    ids = torch.arange(1, 6, device=next(model.parameters()).device)[None]
    try:
        with watching(model.modules()) as seen:
            model(input_ids=ids, use_cache=False)
    except Exception as error:
        raise unsupported(
            type(model).__name__,
            f"it does not run on token ids alone ({type(error).__name__}: {error})",
        ) from error
    return seen


def _everywhere_alike(
    site: Site, found: Collection[dict[Site, HookTarget]], seen: dict[nn.Module, Call]
) -> bool:
    """Whether every block has `site`, and in one width: a model's sites are of one width each."""
    if not all(site in of_block for of_block in found):
        return False
    return len({_observed_width(seen, of_block, site) for of_block in found}) == 1


def _around(layer: int, running: dict[int, nn.Module]) -> dict[Site, HookTarget]:
    """The sites of a block that does not run on text: the stream between its neighbours."""
    before, after = (n for n in running if n < layer), (n for n in running if n > layer)
    last, following = max(before, default=None), min(after, default=None)
    places: list[HookTarget] = []
    if last is not None:
        places.append(HookTarget(running[last], "output"))
    if following is not None:
        places.append(HookTarget(running[following], "input"))
    return {"resid_pre": places[0], "resid_post": places[-1]}


def _longest(config: Any) -> int:
    """The context in tokens, by whichever name; what states no limit gets the usual one."""
    limits = (getattr(config, name, None) for name in _LIMITS)
    return next((int(limit) for limit in limits if isinstance(limit, int) and limit > 0), 2048)


def _width(value: Tensor | None) -> int:
    return 0 if value is None else int(value.shape[-1])


def _observed_width(
    seen: dict[nn.Module, Call], sites: dict[Site, HookTarget], site: Site
) -> int | None:
    if site not in sites:
        return None
    call = seen[sites[site].module]
    return _width(call.input if sites[site].side == "input" else call.output)


def _head_dim(
    seen: dict[nn.Module, Call], sites: dict[Site, HookTarget], n_heads: int | None
) -> int | None:
    width = _observed_width(seen, sites, "head_out")
    return None if width is None or not n_heads else width // n_heads
