"""Finds the decoder blocks of a decoder-only model, and all its hook points.

What passes where inside a block is found in `structure.sites`, what follows the last block in
`structure.head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.transformers.structure.calls import Call, at_rest, watching
from steer.engines.transformers.structure.head import Head
from steer.engines.transformers.structure.sites import HookTarget, sites_of_block
from steer.errors import Unsupported
from steer.model import HookPoint, ModelInfo
from steer.spec import SITES, Site

_PROBE_LENGTH = 5


@dataclass(frozen=True)
class HookMap:
    """Every hook point of a model, the model's shape, and what follows its last block."""

    targets: dict[HookPoint, HookTarget]
    info: ModelInfo
    head: Head


def find_hook_points(model: nn.Module, name: str) -> HookMap:
    """The hook points of `model`.

    Raises `Unsupported` for a model whose decoder blocks cannot be found, or pass on something else
    than a row for each token.
    """
    blocks = decoder_blocks(model)
    with at_rest(model):
        seen = _probe(model)
        _check_stream(model, blocks, seen)
        found = [sites_of_block(block, seen) for block in blocks]
        head = Head(model, blocks, seen)
    sites = [site for site in SITES if _is_everywhere(site, found, seen)]
    targets = {
        HookPoint(layer, site): of_block[site]
        for layer, of_block in enumerate(found)
        for site in sites
    }
    first = found[0]
    config = _text_config(model)
    info = ModelInfo(
        name=name,
        architecture=type(model).__name__,
        n_layers=len(blocks),
        d_model=_width(seen[blocks[0]].output),
        vocab_size=int(config.vocab_size),
        max_length=int(getattr(config, "max_position_embeddings", 2048)),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        sites=tuple(sites),
        d_mlp=_observed_width(seen, first, "mlp_act"),
        n_heads=int(config.num_attention_heads),
        head_dim=_head_dim(seen, first, int(config.num_attention_heads)),
    )
    return HookMap(targets, info, head)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, first to last: the longest list of modules with attention inside."""
    best: list[nn.Module] = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) <= len(best):
            continue
        if all(any("attention" in type(m).__name__.lower() for m in b.children()) for b in module):
            best = list(module)
    if not best:
        raise Unsupported(
            f"no decoder blocks were found in {type(model).__name__}: Steer supports decoder-only "
            "models whose blocks lie in one ModuleList and contain an attention module",
            code="unsupported_model",
        )
    return best


def _probe(model: nn.Module) -> dict[nn.Module, Call]:
    """What the model's modules see on a short input."""
    ids = torch.arange(1, _PROBE_LENGTH + 1, device=next(model.parameters()).device)[None]
    with watching(model.modules()) as seen:
        model(input_ids=ids, use_cache=False)
    return seen


def _check_stream(model: nn.Module, blocks: list[nn.Module], seen: dict[nn.Module, Call]) -> None:
    for number, block in enumerate(blocks):
        output = seen[block].output if block in seen else None
        if output is None or output.shape[:-1] != (1, _PROBE_LENGTH):
            shape = "nothing" if output is None else list(output.shape)
            raise Unsupported(
                f"block {number} of {type(model).__name__} returns {shape} for {_PROBE_LENGTH} "
                f"tokens, where Steer edits a stream [1, {_PROBE_LENGTH}, d_model]",
                code="unsupported_model",
            )


def _is_everywhere(
    site: Site, found: list[dict[Site, HookTarget]], seen: dict[nn.Module, Call]
) -> bool:
    """Whether every block has `site`, as wide as in the others."""
    widths = {_observed_width(seen, of_block, site) for of_block in found}
    return len(widths) == 1 and None not in widths


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


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
    seen: dict[nn.Module, Call], sites: dict[Site, HookTarget], n_heads: int
) -> int | None:
    width = _observed_width(seen, sites, "head_out")
    return None if width is None else width // n_heads
