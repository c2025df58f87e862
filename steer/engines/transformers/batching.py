"""Which form the running batch has: padded rows, or tokens packed end to end."""

from __future__ import annotations

import logging
from typing import Literal, get_args

from transformers.utils.import_utils import is_flash_attn_2_available

from steer.batch.tables import Tables
from steer.engines.transformers.batch import RollingBatch
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.sequences import Batch
from steer.errors import SteerError, Unsupported

Batching = Literal["auto", "rolling", "packed"]

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
    """The batch that `batching` names.

    `auto` packs on a GPU with a flash-attention package, where this model can be packed: without
    one, packed attention is a dense mask over all tokens, and padding is the faster form.

    Raises `Unsupported` where `packed` is asked for and this model, or this release of
    transformers, cannot be packed.
    """
    if batching not in get_args(Batching):
        raise SteerError(
            f"batching is {batching!r}: choose one of {', '.join(get_args(Batching))}",
            code="invalid_option",
        )
    fast = hooked.device.type == "cuda" and is_flash_attn_2_available()
    if batching == "packed" or (batching == "auto" and fast):
        try:
            return _packed(hooked, tables, rows, eos, prefill_tokens, cache_tokens)
        except Unsupported as error:
            if batching == "packed":
                raise
            _log.warning("batches are padded, not packed: %s", error)
    return RollingBatch(
        hooked, tables, rows=rows, eos=eos, prefill_tokens=prefill_tokens, chunk=chunk
    )


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
