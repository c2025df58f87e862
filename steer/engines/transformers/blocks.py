"""Finds the hook points of a decoder-only model by what its modules compute, not by their names.

A short probe is run with every child of a decoder block observed. `attn_out` and `mlp_out` are
the two children's outputs that sum with the block's input to its output; `resid_mid` is the child
input that equals input + attn_out; `mlp_act` and `head_out` are the inputs of the projections that
produce those children's outputs. A site for which no module satisfies its identity is left out, so
parallel residuals, sandwich norms and mixtures of experts are described as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steer.errors import Unsupported
from steer.model import HookPoint, ModelInfo
from steer.spec import SITES, Site

Side = Literal["input", "output"]


@dataclass(frozen=True)
class HookTarget:
    """Where a hook point's tensor passes: a module's first input or its (first) output.

    `in_place` marks a stream that the block reads again beside this module: the edit must be
    written into the tensor itself.
    """

    module: nn.Module
    side: Side
    in_place: bool = False


@dataclass(frozen=True)
class HookMap:
    """Every hook point of a model, and the model's shape."""

    targets: dict[HookPoint, HookTarget]
    info: ModelInfo
    final_norm: nn.Module
    output: nn.Module


@dataclass
class _Seen:
    """What one module received and returned during the probe."""

    input: Tensor | None = None
    output: Tensor | None = None
    order: int = 0


def find_hook_points(model: nn.Module, name: str) -> HookMap:
    """The hook points of `model`.

    Raises `Unsupported` for a model whose decoder blocks cannot be found.
    """
    blocks = decoder_blocks(model)
    seen = _probe(model, blocks)
    first = _sites_of_block(blocks[0], seen)
    targets: dict[HookPoint, HookTarget] = {}
    sites = [site for site in SITES if site in first]
    for layer, block in enumerate(blocks):
        found = _sites_of_block(block, seen)
        sites = [site for site in sites if site in found]
        targets.update({HookPoint(layer, site): found[site] for site in found})
    targets = {point: target for point, target in targets.items() if point.site in sites}
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
    norm = _final_norm(model, blocks, seen)
    return HookMap(targets, info, norm, model.get_output_embeddings())  # type: ignore[operator]


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


def first_tensor(value: Any) -> Tensor:
    """The hidden state in what a module takes or returns: the tensor, or a tuple's first."""
    return value if isinstance(value, Tensor) else value[0]


def given_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden state among a module's arguments."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    value = kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


@torch.no_grad()
def _probe(model: nn.Module, blocks: list[nn.Module]) -> dict[nn.Module, _Seen]:
    """What the model's modules see on a five-token input."""
    seen: dict[nn.Module, _Seen] = {}

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = given_tensor(args, kwargs)
        returned = out[0] if isinstance(out, tuple | list) and out else out
        seen[module] = _Seen(
            None if given is None else given.detach().clone(),
            returned.detach().clone() if isinstance(returned, Tensor) else None,
            len(seen),
        )

    inside = {m for block in blocks for m in block.modules()}
    outside = {m for m in model.modules() if m not in inside and not isinstance(m, nn.ModuleList)}
    handles = [m.register_forward_hook(observe, with_kwargs=True) for m in inside | outside]
    device = next(model.parameters()).device
    ids = torch.arange(1, 6, device=device)[None]
    training = model.training
    try:
        model.eval()
        model(input_ids=ids, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


def _sites_of_block(block: nn.Module, seen: dict[nn.Module, _Seen]) -> dict[Site, HookTarget]:
    pre, post = seen[block].input, seen[block].output
    if pre is None or post is None:
        return {}
    sites: dict[Site, HookTarget] = {
        "resid_pre": HookTarget(block, "input"),
        "resid_post": HookTarget(block, "output"),
    }
    pair = _summands(block, seen, pre, post)
    if pair is None:
        return sites
    attention, mlp = pair
    sites["attn_out"] = HookTarget(attention, "output")
    sites["mlp_out"] = HookTarget(mlp, "output")
    middle = pre + _out(attention, seen)
    for child in block.children():
        given = seen[child].input if child in seen else None
        if given is not None and child is not mlp and _same(given, middle):
            sites["resid_mid"] = HookTarget(child, "input", in_place=True)
    for site, family in (("head_out", "attention"), ("mlp_act", "mlp")):
        projection = _projection(block, family, seen)
        if projection is not None:
            sites[site] = HookTarget(projection, "input")  # type: ignore[index]
    return sites


def _summands(
    block: nn.Module, seen: dict[nn.Module, _Seen], pre: Tensor, post: Tensor
) -> tuple[nn.Module, nn.Module] | None:
    """The children whose outputs, added to the block's input, give its output."""
    children = sorted(
        (c for c in block.children() if c in seen and _fits(seen[c].output, post)),
        key=lambda c: seen[c].order,
    )
    attention_at = next(
        (n for n, c in enumerate(children) if "attention" in type(c).__name__.lower()), 0
    )
    for first in children[attention_at:]:
        for second in children:
            if second is not first and _same(pre + _out(first, seen) + _out(second, seen), post):
                return first, second
    return None


def _projection(block: nn.Module, family: str, seen: dict[nn.Module, _Seen]) -> nn.Module | None:
    """The last weight matrix of the block's attention or MLP, where it alone makes the output."""
    for child in block.children():
        is_attention = "attention" in type(child).__name__.lower()
        if (family == "attention") != is_attention or not any(child.children()):
            continue
        for module in _leaves(child):
            same = module in seen and _same(seen[module].output, seen[child].output)
            if same and getattr(module, "weight", None) is not None and module.weight.ndim == 2:
                return module
    return None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in reversed(list(module.modules())) if not any(m.children()))


def _final_norm(
    model: nn.Module, blocks: list[nn.Module], seen: dict[nn.Module, _Seen]
) -> nn.Module:
    """The module that receives the last block's output, before the output matrix."""
    last = seen[blocks[-1]].output
    for module, record in seen.items():
        outside = not any(module is m for b in blocks for m in b.modules())
        if outside and record.order > seen[blocks[-1]].order and _same(record.input, last):
            return module
    raise Unsupported(
        f"no final norm was found after the last block of {type(model).__name__}",
        code="unsupported_model",
    )


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def _out(module: nn.Module, seen: dict[nn.Module, _Seen]) -> Tensor:
    output = seen[module].output
    if output is None:
        raise Unsupported(f"{type(module).__name__} returned no tensor", code="unsupported_model")
    return output


def _fits(value: Tensor | None, like: Tensor) -> bool:
    return value is not None and value.shape == like.shape


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
    return bool(torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance))


def _width(value: Tensor | None) -> int:
    return 0 if value is None else int(value.shape[-1])


def _observed_width(
    seen: dict[nn.Module, _Seen], sites: dict[Site, HookTarget], site: Site
) -> int | None:
    return _width(seen[sites[site].module].input) if site in sites else None


def _head_dim(
    seen: dict[nn.Module, _Seen], sites: dict[Site, HookTarget], n_heads: int
) -> int | None:
    width = _observed_width(seen, sites, "head_out")
    return None if width is None else width // n_heads
