"""Which form the running batch has: padded rows, packed tokens, or each sequence alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from transformers.utils.import_utils import is_flash_attn_2_available

from steer.batch.tables import Tables
from steer.engines.transformers.alone.batch import AloneBatch
from steer.engines.transformers.alone.caches import OwnCaches
from steer.engines.transformers.cache import PLAIN
from steer.engines.transformers.decoding import Generated, difference, generated_alone
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.rolling.batch import RollingBatch
from steer.engines.transformers.room import CacheRoom
from steer.engines.transformers.sequences import Batch
from steer.engines.transformers.structure.decoder import unsupported
from steer.errors import SteerError, Unsupported

Batching = Literal["auto", "rolling", "packed", "alone"]

_log = logging.getLogger(__name__)


def make_batch(
    hooked: HookedModel,
    tables: Tables,
    batching: Batching,
    *,
    rows: int,
    eos: frozenset[int],
    prefill_tokens: int,
    chunk: int,
    cache_tokens: int | None,
) -> Batch:
    """The batch that `batching` names, proven to generate what the model's own `generate` does.

    `auto` packs on a GPU with a flash-attention package, where this model can be packed: without
    one, packed attention is a dense mask over all tokens, and padding is the faster form. Where
    padding is not exact for this model, each sequence is computed alone. `cache_tokens` is how many
    tokens the running sequences' keys and values may take together, padding included; None: what
    fits into a share of the memory that is free now.

    Raises `Unsupported` where the form that is asked for is not exact for this model, or this
    release of transformers has none such; with `auto`, where no form is.
    """
    if batching not in get_args(Batching):
        raise SteerError(
            f"batching is {batching!r}: choose one of {', '.join(get_args(Batching))}",
            code="invalid_option",
        )
    with _refusing(hooked, "it does not run with a cache"):
        caches = OwnCaches(hooked)
    wanted = generated_alone(hooked)
    room = _room(hooked, caches, cache_tokens, least=prefill_tokens)
    if batching != "alone":
        unshared = _why_unshared(hooked, tables, caches, wanted)
        if unshared is None:
            packed = _packed_where_asked(
                hooked, tables, batching, rows, eos, prefill_tokens, cache_tokens
            )
            sizes = {"prefill_tokens": prefill_tokens, "chunk": chunk}
            return packed or RollingBatch(hooked, tables, rows=rows, eos=eos, room=room, **sizes)
        if batching != "auto":
            raise unshared
        _log.warning("sequences are computed one by one: %s", unshared)
    with _refusing(hooked, "it does not decode"):
        alone = AloneBatch(hooked, tables, caches, rows=rows, eos=eos, room=room)
        reason = difference(alone, wanted)
    if reason is not None:
        raise unsupported(
            hooked.info.architecture, f"even one sequence alone is not decoded right: {reason}"
        )
    return alone


def _room(
    hooked: HookedModel, caches: OwnCaches, cache_tokens: int | None, *, least: int
) -> CacheRoom:
    if cache_tokens is None:
        return CacheRoom.on(hooked.device, caches.token_bytes, least=least)
    return CacheRoom(cache_tokens)


def _packed_where_asked(
    hooked: HookedModel,
    tables: Tables,
    batching: Batching,
    rows: int,
    eos: frozenset[int],
    batch_tokens: int,
    cache_tokens: int | None,
) -> Batch | None:
    """None where padding is asked for, or is the faster form, or `auto` finds that this model
    cannot be packed."""
    fast = hooked.device.type == "cuda" and is_flash_attn_2_available()
    if batching != "packed" and not (batching == "auto" and fast):
        return None
    try:
        # It has a proof of its own, at start.
        return _packed(hooked, tables, rows, eos, batch_tokens, cache_tokens)
    except Unsupported as error:
        if batching == "packed":
            raise
        _log.warning("batches are padded, not packed: %s", error)
        return None


def _why_unshared(
    hooked: HookedModel, tables: Tables, caches: OwnCaches, wanted: Sequence[Generated]
) -> Unsupported | None:
    """Why padded rows, or prompts in parts, are not exact for this model; None where they are.

    Captures are padded in packed batches too.
    """
    other = [kind for kind in caches.kinds if kind not in PLAIN]
    reason = f"rows of unlike length cannot share the {other[0]} of its cache" if other else None
    if reason is None:
        # Parts shorter than the prompts, so that both are seen.
        rolling = RollingBatch(hooked, tables, rows=len(wanted), eos=frozenset(), chunk=3)
        try:
            found = difference(rolling, wanted)
            reason = found and f"padded rows give {found}"
        except Exception as error:
            reason = f"padded rows do not run ({_told(error)})"
    if reason is None:
        return None
    return Unsupported(
        f"{hooked.info.architecture} cannot run in shared batches: {reason}; choose "
        "batching='alone'",
        code="shared_batches_unavailable",
    )


@contextmanager
def _refusing(hooked: HookedModel, reason: str) -> Iterator[None]:
    """Turns what the model raises into its refusal."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        raise unsupported(hooked.info.architecture, f"{reason} ({_told(error)})") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _packed(
    hooked: HookedModel,
    tables: Tables,
    rows: int,
    eos: frozenset[int],
    batch_tokens: int,
    cache_tokens: int | None,
) -> Batch:
    # Imported where it is used: an unknown transformers may lack what these modules import.
    try:
        from steer.engines.transformers.packed.batch import PackedBatch  # noqa: PLC0415
        from steer.engines.transformers.packed.model import PackedOptions  # noqa: PLC0415
    except (ImportError, AttributeError) as error:
        raise Unsupported(
            f"this transformers has no continuous batching that Steer knows ({error}): choose "
            "batching='rolling'",
            code="unsupported_transformers",
        ) from error
    options = PackedOptions(batch_tokens=batch_tokens, cache_tokens=cache_tokens)
    return PackedBatch(hooked, tables, rows=rows, eos=eos, options=options)
