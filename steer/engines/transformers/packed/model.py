"""transformers' continuous batching, as far as packed batches use it.

Taken from transformers: which requests share a pass, the paged key-value cache, and the input
tensors of a pass. Not taken: its thread, its forward call and its token choice, so that every pass
runs through the hooks with its step, and tokens are chosen as in a rolling batch.

Everything here that is not public interface of transformers is named in `_SEAM` and checked before
it is used.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation import continuous_batching
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching import requests as cb_requests
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from steer.batch.step import Step
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.packed.containment import Containment
from steer.errors import EngineError, Unsupported
from steer.readouts.readings import Readings

KNOWN_SERIES = ("5.19", "5.20", "5.21", "5.22", "5.23")
"""The release series of transformers that packed batches were tested with."""

_SEAM: dict[str, tuple[str, ...]] = {
    "continuous_api.ContinuousBatchingManager.__init__": (
        "model",
        "generation_config",
        "continuous_batching_config",
        "workload_hints",
    ),
    "continuous_api.ContinuousBatchingManager._create_batch_processor": (),
    "continuous_api.ContinuousBatchProcessor.prepare_next_batch": (),
    "continuous_api.ContinuousBatchProcessor.update_batch": (),
    "continuous_api.ContinuousBatchProcessor.reset": (),
    "input_outputs.ContinuousBatchingIOs.get_model_kwargs": ("use_padding",),
    "input_outputs.ContinuousBatchingIOs.prepare_batch_update": (),
    "scheduler.FIFOScheduler.add_waiting_request": ("state",),
    "scheduler.FIFOScheduler.set_request_cancellation": ("request_id",),
    "scheduler.FIFOScheduler.clear_cancelled_requests": (),
    "cache.PagedAttentionCache.can_store_request_tokens": ("state", "request_len", "dry_run"),
    "requests.FutureRequestState.__init__": (
        "state",
        "has_new_token",
        "complete_blocks",
        "query_length",
    ),
}
"""Names below `continuous_batching`, and the parameters after `self`. Looked up when a packed batch
is made, so that a transformers which lacks one can still be refused by name."""


@dataclass(frozen=True)
class PackedOptions:
    """Sizes of the packed form.

    `batch_tokens` bounds one pass; longer prompts are computed in chunks. `cache_tokens` is the
    capacity of the key-value cache over all sequences; None takes `memory_share` of the free
    device memory on a GPU, and 16,384 tokens on a CPU. `page` is the cache's allocation unit in
    tokens; None: 256 on a GPU, as flash attention's paged kernels ask for, 16 on a CPU.
    """

    batch_tokens: int = 4096
    cache_tokens: int | None = None
    memory_share: float = 0.8
    page: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens `[start, start + length)` of one sequence in a pass; `final` where they end in a
    token whose logits choose the next one."""

    key: str
    start: int
    length: int
    final: bool


def check_transformers() -> None:
    """Raises `Unsupported` for a transformers whose continuous batching is not the one we know."""
    version = transformers.__version__
    series = ".".join(version.split(".")[:2])
    wrong = [] if series in KNOWN_SERIES else [f"the series {series}"]
    wrong += [name for name, parameters in _SEAM.items() if _parameters(name) != parameters]
    if wrong:
        raise Unsupported(
            f"packed batches do not know transformers {version} ({', '.join(wrong)}): install one "
            f"of {', '.join(KNOWN_SERIES)}, or choose batching='rolling'",
            code="unsupported_transformers",
        )


def _parameters(name: str) -> tuple[str, ...] | None:
    """The parameters after `self` of a method below `continuous_batching`; None if it is absent."""
    try:
        method = attrgetter(name)(continuous_batching)
    except AttributeError:
        return None
    return tuple(inspect.signature(method).parameters)[1:]


class PackedModel:
    """A model that computes the sequences added to it, packed as `[1, T]`.

    Assumes: one thread; `next`, `forward` and `accept` are called in this order.
    Guarantees: no key-value block is shared between sequences; between `lend` and `next` the model
    attends as it was given to us.
    """

    def __init__(self, hooked: HookedModel, *, rows: int, options: PackedOptions) -> None:
        check_transformers()
        self.hooked = hooked
        self._model: Any = hooked.model
        self._plain_attention = str(self._config._attn_implementation)
        self._packed_attention, self._packed = self._plain_attention, True
        try:
            self._processor = self._build(rows, options)
        finally:
            self._packed_attention = str(self._config._attn_implementation)
            self.lend()
        self._io, self._scheduler = self._processor.inputs_and_outputs, self._processor.scheduler
        self.capacity = _longest(self._processor.cache)
        """Tokens of the longest sequence that the cache can hold when it is alone."""
        self.batch_tokens = int(self._processor.max_batch_tokens)
        dense = "flash" not in self._packed_attention
        self._containment = Containment(self._processor.cache) if dense else None

    def add(self, key: str, tokens: Sequence[int]) -> None:
        """Queues a sequence; its key-value states are computed as the cache has room."""
        self._scheduler.add_waiting_request(
            cb_requests.RequestState(
                request_id=key, initial_tokens=list(tokens), max_new_tokens=None
            )
        )

    def remove(self, key: str) -> None:
        """Drops a sequence, wherever it stands, and frees its cache."""
        self._scheduler.set_request_cancellation(key)
        self._scheduler.clear_cancelled_requests()
        if self._containment is not None:
            self._containment.forget(key)
        # Set by a preemption, until something leaves.
        self._scheduler.block_new_requests = False

    def next(self) -> list[Chunk]:
        """Plans the next pass; its chunks, in the order in which they are packed."""
        self._attend(packed=True)
        if not self._processor.prepare_next_batch():
            raise EngineError("no sequence could be scheduled: the key-value cache is too small")
        return [
            Chunk(
                entry.state.request_id,
                entry.state.position_offset - entry.query_length,
                entry.query_length,
                entry.has_new_token,
            )
            for entry in self._io.requests_in_batch
        ]

    def forward(
        self, chunks: Sequence[Chunk], step: Step | None, readings: Readings | None = None
    ) -> Tensor:
        """The pass that `next` planned; float32 logits `[final chunks, vocab]`."""
        inputs = dict(self._io.get_model_kwargs(use_padding=False))
        tokens = sum(chunk.length for chunk in chunks)
        if inputs["input_ids"].shape != (1, tokens):
            raise EngineError(
                f"transformers packed {tuple(inputs['input_ids'].shape)} tokens, but planned "
                f"{tokens}: the pass is withheld, because edits would fall on other tokens"
            )
        wanted = inputs["logits_indices"][: sum(chunk.final for chunk in chunks)].long()
        sliced = bool(self._model._supports_logits_to_keep())
        if sliced:
            inputs["logits_to_keep"] = wanted
        if self._containment is not None:
            self._containment.begin()
        outputs, _ = self.hooked.forward(step, readings=readings, **inputs)
        logits: Tensor = (outputs.logits[0] if sliced else outputs.logits[0, wanted]).float()
        if self._containment is None:
            return logits
        self._containment.end([chunk.key for chunk in chunks], [chunk.length for chunk in chunks])
        return self._containment.shown(logits, [chunk.key for chunk in chunks if chunk.final])

    def accept(self, tokens: Sequence[int]) -> None:
        """The tokens chosen for the final chunks, in their order: they are computed next."""
        self._io.output_ids[0, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self._processor.update_batch()

    def reset(self) -> None:
        """Forgets every sequence."""
        self._processor.reset()
        if self._containment is not None:
            self._containment.reset()

    def lend(self) -> None:
        """Gives the model its own attention back, for passes that are not packed."""
        self._attend(packed=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return next(self._model.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def _config(self) -> Any:
        return self._model.config

    def _attend(self, *, packed: bool) -> None:
        if packed == self._packed:
            return
        self._packed = packed
        wanted = self._packed_attention if packed else self._plain_attention
        if wanted != self._config._attn_implementation:
            self._model.set_attn_implementation(wanted)

    def _build(self, rows: int, options: PackedOptions) -> Any:
        device = self.hooked.device
        on_gpu = device.type == "cuda"
        page = options.page or (256 if on_gpu else 16)
        capacity = options.cache_tokens or (None if on_gpu else 16_384)
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=None if capacity is None else math.ceil(capacity / page),
            # The start-up proof packs two short prompts.
            max_batch_tokens=max(options.batch_tokens, rows, 16),
            max_requests_per_batch=max(rows, 2),
            max_memory_percent=options.memory_share,
            # A shared block would hand one request's steered states to another.
            allow_block_sharing=False,
            # A graph would replay the first batch's slots; an overlapped batch would be planned
            # before its tokens are known.
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=_has_flash_attention(self._model),
            cpu_offload_space=0.0,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)  # type: ignore[no-untyped-call]
        try:
            # transformers seeds the global generator here; ours are the requests' own.
            with torch.random.fork_rng(devices=[device] if on_gpu else []):
                processor = continuous_api.ContinuousBatchingManager(
                    self._model, generation, config
                )._create_batch_processor()
        except (ValueError, TypeError, AttributeError, MemoryError, RuntimeError) as error:
            raise Unsupported(
                f"{self.hooked.info.architecture} cannot run in packed batches: {error}; choose "
                "batching='rolling', or another cache_tokens",
                code="packed_batches_unavailable",
            ) from error
        _check_plain(processor)
        return processor


def _check_plain(processor: Any) -> None:
    """Raises if transformers resolved to a mode in which edits could miss their tokens."""
    forbidden = {
        "prefix sharing": processor.cache.use_prefix_sharing,
        "overlapped batches": processor.use_async_batching,
        "padded batches": processor.model_runner.pad_inputs,
        "offloading": processor.offloading_manager._cpu_pool is not None,
    }
    used = [name for name, on in forbidden.items() if on]
    if used:
        raise Unsupported(
            f"transformers {transformers.__version__} would use {', '.join(used)}, with which "
            "steering is not exact: choose batching='rolling'",
            code="unsupported_transformers",
        )


def _longest(paged: Any) -> int:
    """Tokens of the longest sequence that fits into an empty cache."""
    alone = cb_requests.RequestState(request_id="", initial_tokens=[])
    low, high = 0, int(paged.max_tokens_read)
    while low < high:
        middle = (low + high + 1) // 2
        if paged.can_store_request_tokens(alone, middle, dry_run=True):
            low = middle
        else:
            high = middle - 1
    return low


def _has_flash_attention(model: Any) -> bool:
    """Whether an installed flash attention can serve `model`; nothing is downloaded for it."""
    half = model.dtype in (torch.float16, torch.bfloat16)
    return half and (is_flash_attn_3_available() or is_flash_attn_2_available())
