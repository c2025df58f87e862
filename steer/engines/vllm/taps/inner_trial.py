"""Which sites inside attention and MLP a model has, and a trial pass that shows what lies there.

A family says where its sites are (`families.py`); whoever starts the engine says which of them are
to be tapped, because a tap is part of every pass, steered or not. Before the taps go in, one pass
over a few tokens must give each of these modules one row for each token, once, in one width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.vllm.options import KEY
from steer.engines.vllm.taps.arguments import rows_of
from steer.engines.vllm.taps.decoder import TextDecoder
from steer.engines.vllm.taps.inner_sites import InnerSite, input_of
from steer.engines.vllm.taps.streams import (
    TRIAL_TOKENS,
    TrialPass,
    ZeroedMemory,
    kinds,
    uncompiled,
)
from steer.errors import Unsupported
from steer.model import INNER_SITES
from steer.spec import Site

Absent = dict[Site, str]
"""Why sites are not served, each as the end of a sentence that begins with the site."""


@torch.inference_mode()
def open_inner_sites(
    decoder: TextDecoder,
    run: TrialPass,
    asked: Sequence[Site] | None,
    *,
    width: int,
    largest: int,
) -> tuple[tuple[InnerSite, ...], Absent]:
    """The sites of `asked` (None: all that there are), and why the others are not served.

    `width` is that of the stream. Raises `Unsupported` (`unsupported_site`) for a site that was
    asked for by name and that this model does not have.
    """
    paths, absent = _paths(decoder)
    wanted = [site for site in INNER_SITES if asked is None or site in asked]
    absent |= {site: _closed(site) for site in paths if site not in wanted}
    found: list[InnerSite] = []
    chosen = {site: paths[site] for site in wanted if site in paths}
    if chosen:
        given, rows = _watched_pass(decoder, chosen, run, min(largest, TRIAL_TOKENS))
        for site, path in chosen.items():
            one = _inner_site(decoder, site, path, given[site], rows, width)
            if isinstance(one, InnerSite):
                found.append(one)
            else:
                absent[site] = one
    for site in asked or ():
        if site in absent:
            raise Unsupported(
                f"the site {site!r} {absent[site]}: leave it out of additional_config"
                f"[{KEY!r}]['sites']",
                code="unsupported_site",
            )
    return tuple(found), absent


def _paths(decoder: TextDecoder) -> tuple[dict[Site, str], Absent]:
    """The modules that read the sites, and why other sites have none."""
    classes = kinds(decoder)
    if decoder.family is None:
        reason = f"is not known in layers of {classes}, which nobody has read for it"
        return {}, dict.fromkeys(INNER_SITES, reason)
    paths: dict[Site, str] = {}
    absent: Absent = {}
    for site in INNER_SITES:
        path = decoder.family.inside.get(site)
        lacking = [n for n, layer in decoder.layers if path is None or not _has(layer, path)]
        if path is None:
            absent[site] = f"is not in layers of {classes}"
        elif lacking:
            absent[site] = f"is not in every layer: layer {lacking[0]} has no module {path!r}"
        else:
            paths[site] = path
    return paths, absent


def _has(layer: nn.Module, path: str) -> bool:
    return path in dict(layer.named_modules())


def _closed(site: Site) -> str:
    option = json.dumps({KEY: {"sites": [site]}})
    return f"is not tapped on this server (--additional-config '{option}' does it at start)"


Given = Mapping[Site, Mapping[int, Sequence[Any]]]
"""What the modules of each site were given in a pass, by the number of their layer."""


def _watched_pass(
    decoder: TextDecoder, paths: Mapping[Site, str], run: TrialPass, tokens: int
) -> tuple[Given, int]:
    """What the modules of `paths` read in a pass, and how many tokens that had."""
    given: dict[Site, dict[int, list[Any]]] = {
        site: {number: [] for number, _ in decoder.layers} for site in paths
    }
    with ExitStack() as stack:
        stack.enter_context(uncompiled(decoder.model))
        stack.enter_context(ZeroedMemory())
        for site, path in paths.items():
            for number, layer in decoder.layers:
                stack.enter_context(_kept(layer.get_submodule(path), given[site][number]))
        return given, len(run(tokens))


@contextmanager
def _kept(module: nn.Module, seen: list[Any]) -> Iterator[None]:
    """Keeps in `seen` what `module` is called with."""
    states = input_of(module)
    handle = module.register_forward_pre_hook(
        lambda _, args, named: seen.append(states.of(args, named)), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _inner_site(
    decoder: TextDecoder,
    site: Site,
    path: str,
    given: Mapping[int, Sequence[Any]],
    rows: int,
    width: int,
) -> InnerSite | str:
    """The site as the modules `path` were given it; why it is none, where it is none."""
    widths = set()
    for number, layer in decoder.layers:
        if len(given[number]) != 1:
            return (
                f"is not in every layer: {path!r} of layer {number} runs {len(given[number])} "
                "times in a pass"
            )
        (x,) = given[number]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return f"is quantised before {path!r} of layer {number} reads it"
        flat = rows_of(x)
        if len(flat) != rows:
            return (
                f"is not whole: {path!r} of layer {number} is given {len(flat)} rows of "
                f"{rows} tokens"
            )
        widths.add((flat.shape[1], *_split(layer.get_submodule(path), flat.shape[1])))
    if len(widths) != 1:
        return f"has not one width in all layers but {sorted(one[1] for one in widths)}"
    ((_, whole, workers),) = widths
    if site in ("attn_in", "mlp_in") and whole != width:
        return f"has rows of {whole} and not of {width}, the width of the stream"
    return InnerSite(site, path, whole, workers)


def _split(module: nn.Module, seen: int) -> tuple[int, int]:
    """The width of whole rows of which `module` is given `seen`, and over how many workers these
    are split; told by vLLM's parallel layers themselves."""
    module = getattr(module, "base_layer", module)  # which adapters are wrapped around
    whole, own = (getattr(module, f"input_size{part}", seen) for part in ("", "_per_partition"))
    return (whole, whole // own) if seen == own else (seen, 1)
