"""Steering for notebooks: a context manager around any Hugging Face model.

with steer.attach(model, {"interventions": [{"kind": "add", "vector": "v"}]}, vectors={"v": v}):
    model.generate(...)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.artefacts.affine import AffineMap
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.lens import Lens
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.engines.base import Receipt
from steer.engines.token_rows import token_reader
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.passes.batch import AttachedBatch
from steer.engines.transformers.passes.watch import PassWatch
from steer.engines.transformers.passes.wrappers import modules_of_a_pass, wrapped_model
from steer.engines.transformers.structure.blocks import HookMap, find_hook_points
from steer.errors import EngineError
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import text_tokens, trigger_tokens
from steer.spec import KINDS, SteeringSpec, parse_spec

_maps: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], HookMap]] = (
    weakref.WeakKeyDictionary()
)
"""Hook points found so far, and the modules among which: finding them runs the model once."""


@dataclass
class Attachment:
    """A model being steered; `receipts` says what was applied to each row of the last batch."""

    plan: SteeringPlan
    _rows: AttachedBatch

    @property
    def receipts(self) -> list[Receipt]:
        return self._rows.receipts()


@contextmanager
def attach(
    model: nn.Module,
    spec: Mapping[str, Any] | SteeringSpec,
    *,
    vectors: Mapping[str, ControlVector] | None = None,
    saes: Mapping[str, SAE] | None = None,
    low_ranks: Mapping[str, LowRankAdapter] | None = None,
    maps: Mapping[str, AffineMap] | None = None,
    lenses: Mapping[str, Lens] | None = None,
    tokenizer: Any = None,
) -> Iterator[Attachment]:
    """Steers every forward pass of `model` inside the `with` block, then unhooks it.

    `model` is a decoder-only model of transformers, or anything that wraps one and runs it (PEFT,
    `torch.compile`, a module of one's own). A call of `generate` begins a new batch, and so does a
    pass without past key values or with those of another one; what that first pass feeds is the
    prompt, what follows is generated. Rows may be padded on the left. With beams or several
    sequences for a prompt, rows are what the model is fed. Compiled code runs uncompiled inside the
    block, where hooks reach it.

    Raises `SteerError` where the spec does not fit the model, where it is not clear at which
    position a pass feeds a token, and at the end of a block in which the model never ran.
    """
    # A graph that was compiled before runs without the hooks.
    with torch.compiler.set_stance("force_eager"):
        model = wrapped_model(model)
        hooked = HookedModel(model, _hook_map(model))
        library = MemoryLibrary(
            vectors or {}, saes or {}, low_ranks or {}, lenses=lenses or {}, maps=maps or {}
        )
        plan = _plans(hooked, library, tokenizer).plan(parse_spec(spec))
        batch = AttachedBatch(hooked, plan)
        block = hooked.map.targets[HookPoint(0, "resid_post")].module
        watch = PassWatch(
            modules_of_a_pass(model, block),
            {hooked.map.targets[point].module for point in plan.reached},
            batch,
        )
        try:
            with watch.installed():
                yield Attachment(plan, batch)
                if watch.generating or watch.passes == 0:
                    raise _not_steered(watch.generating)
        finally:
            hooked.remove()


def _hook_map(model: nn.Module) -> HookMap:
    """The hook points of `model`, found again where its modules are others than before."""
    modules = tuple(map(id, model.modules()))
    known = _maps.get(model)
    if known is None or known[0] != modules:
        training = {module: module.training for module in model.modules()}
        known = _maps[model] = modules, find_hook_points(model, type(model).__name__)
        for module, was in training.items():
            module.training = was
    return known[1]


def _plans(hooked: HookedModel, library: MemoryLibrary, tokenizer: Any) -> PlanCache:
    return PlanCache(
        library,
        hooked.info,
        Capabilities("transformers", KINDS, hooked.info.sites),
        tokenize=_tokenize(tokenizer),
        encode_text=_encode_text(hooked, tokenizer),
        read_token=token_reader(hooked, tokenizer),
    )


def _not_steered(generating: bool) -> EngineError:
    return EngineError(
        "the block ends while the model is still generating (in another thread?), and what follows "
        "would not be steered: wait for it inside the block"
        if generating
        else "no forward pass of the model ran inside the block, so nothing was steered: run the "
        "model that was attached to, in this process",
        code="not_steered",
    )


def _tokenize(tokenizer: Any) -> Callable[[str], list[int]] | None:
    if tokenizer is None:
        return None
    return partial(trigger_tokens, tokenizer)


def _encode_text(hooked: HookedModel, tokenizer: Any) -> Callable[[str, HookPoint], Tensor] | None:
    if tokenizer is None:
        return None

    @torch.inference_mode()
    def encode(text: str, point: HookPoint) -> Tensor:
        ids = torch.tensor([text_tokens(tokenizer, text)], device=hooked.device)
        _, states = hooked.forward(None, [point], input_ids=ids, use_cache=False)
        return states[point][0].float().cpu()

    return encode
