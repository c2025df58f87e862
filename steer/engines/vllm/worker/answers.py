"""What a worker answers over `collective_rpc`: plain values and bytes, read by `messages.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.engines.base import TokenLogprob
from steer.engines.logprobs import following
from steer.engines.vllm.inside.alone import LayersAlone
from steer.engines.vllm.inside.carried import BlockStates
from steer.engines.vllm.inside.projections import Projections
from steer.engines.vllm.inside.queries import queries_and_keys
from steer.engines.vllm.internals import ADAPTERS
from steer.engines.vllm.messages import attention_entries, attention_error, pack, unpack
from steer.engines.vllm.pipeline import unknown_answer
from steer.engines.vllm.seams import check
from steer.engines.vllm.taps.layouts import Unembed
from steer.engines.vllm.taps.token_rows import HeadRows
from steer.engines.vllm.worker.requests import WorkerRequest, WorkerRequests, receipt
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import EngineError, NotFinite, SteerError
from steer.model import HookPoint, ModelInfo
from steer.readouts.twins import chosen_at, divergences
from steer.spec import Site

_ROWS_AT_ONCE = 256


def info_answer(
    steering: WorkerSteering, projections: Projections, alone: LayersAlone
) -> dict[str, Any]:
    """The worker's model and limits, for `read_info`."""
    answer = dataclasses.asdict(steering.model)
    answer["sites"] = list(steering.model.sites)
    answer["absent"] = [list(one) for one in steering.model.absent]
    return {
        "model": answer,
        "compiled": steering.compiled,
        "static": steering.edits.static,
        "projections": list(projections.sites),
        "slots": steering.edits.tables.slots,
        "lens": steering.reads_lenses,
        "attention": alone.attention.complete,
        "carries": alone.complete,
        "passes": steering.edits.tables.max_rules,
    }


@torch.inference_mode()
def receipt_answer(requests: WorkerRequests, key: str, fed: Mapping[int, int]) -> dict[int, Any]:
    """Receipts of the choices in `fed` (tokens fed by each) under a ticket's key."""
    records = requests.records(key)
    requests.forget(key)
    answer: dict[int, Any] = {}
    for choice, tokens in fed.items():
        record = records.get(choice)
        if record is None:
            answer[choice] = unknown_answer()
            continue
        try:
            found = receipt(record, tokens)
            requests.check_cached(found)
            answer[choice] = found.as_json()
        except SteerError as error:
            requests.remember(record, error)
            answer[choice] = {"error": error.message, "code": error.code}
    return answer


def readout_answer(
    requests: WorkerRequests, key: str, fed: Mapping[int, int], *, last: bool
) -> dict[int, Any]:
    """What was read of the tokens that the choices in `fed` have fed since they were last asked
    for: positions, and a float32 matrix with a row for each. After the `last` call, or
    an error, they are dropped; a `last` call without choices also drops what was kept for twins. A
    choice that this worker never ran is left out."""
    answer: dict[int, Any] = {}
    found = requests.read(key)
    for choice, tokens in fed.items():
        readouts = found.get(choice)
        if readouts is None:
            continue
        try:
            if isinstance(readouts, str):
                raise EngineError(readouts, code="readouts_missed")
            rows = readouts.take(tokens)
            answer[choice] = {
                "positions": [position for position, _ in rows],
                "numbers": b"".join(row.tobytes() for _, row in rows),
            }
        except SteerError as error:
            answer[choice] = {"error": error.message, "code": error.code}
            last = True  # nobody asks again after an error
    if last:
        requests.forget_readouts(key)
    if last and not fed:
        requests.forget_kept(key)
    return answer


@torch.inference_mode()
def divergence_answer(
    steering: WorkerSteering, key: str, choice: int, fed: int, twin: str
) -> dict[str, Any] | None:
    """How far each token of a choice, which fed `fed` tokens, was chosen from what its twin, the
    capture under the ticket's key `twin`, would have chosen it from; both are then dropped. None
    on a worker that never ran it, or gets no logits."""
    requests = steering.requests
    kept = requests.take_kept(key, choice)
    record = requests.records(twin).get(0)
    requests.forget(twin)
    if kept is None:
        return None
    try:
        if isinstance(kept, str):
            raise EngineError(kept, code="readouts_missed")
        if record is None:
            raise EngineError(
                "the twin ran elsewhere, so its answer is withheld", code="readouts_missed"
            )
        plain = record.request.states[chosen_at(steering.model)]
        if torch.isneginf(plain).all(-1).any():
            raise EngineError(
                "not every token of the twin was computed, so the answer is withheld",
                code="readouts_missed",
            )
        found = divergences(kept.take(fed), plain, steering.instruments)
    except SteerError as error:
        return {"error": error.message, "code": error.code}
    return None if found is None else {"kl": found}


@torch.inference_mode()
def capture_answer(steering: WorkerSteering, key: str) -> dict[str, bytes]:
    """The captured states under a ticket's key: float32 bytes by hook point, an entry `not_finite`
    where the prompt's numbers ran over, and what heads attend to (`messages.attention_entries`)."""
    requests = steering.requests
    records = requests.records(key)
    requests.forget(key)
    record = records.get(0)
    if record is None:
        return {}
    states = {str(point): pack(states) for point, states in record.request.states.items()}
    ran_over = record.ledger.runs_over(0, len(record.request.prompt))
    if ran_over:
        return {**states, NotFinite.code: b""}
    return states | _attention_answer(steering, record.request)


def _attention_answer(steering: WorkerSteering, request: WorkerRequest) -> dict[str, bytes]:
    notes, order = request.attention, request.ticket.capture
    if notes is None or order is None:
        return {}
    positions, here = order.positions[: order.attended], steering.attention
    try:
        return attention_entries(here.told(notes, positions), here.rank)
    except SteerError as error:
        return attention_error(error)


def project_answer(
    projections: Projections, layer: int, site: Site, data: bytes, info: ModelInfo
) -> dict[str, Any] | None:
    """What the output projection behind a hook point makes of packed states, or what is wrong; None
    on a worker without the layer."""
    try:
        made = projections(HookPoint(layer, site), unpack(data, info.width(site)))
    except SteerError as error:
        return {"error": error.message, "code": error.code}
    return None if made is None else {"made": pack(made)}


def queries_answer(
    steering: WorkerSteering, alone: LayersAlone, layer: int, data: bytes
) -> dict[str, Any] | None:
    """What the heads of this worker look with and are found by, of packed states, or what is wrong;
    None on a worker without the layer."""
    steering.pause()
    try:
        found = queries_and_keys(alone, layer, unpack(data, steering.model.d_model))
    except SteerError as error:
        return {"error": error.message, "code": error.code}
    if found is None:
        return None
    return {
        "rank": steering.attention.rank,
        "heads": found.queries.shape[1],
        "queries": pack(found.queries),
        "keys": pack(found.keys),
    }


def carry_answer(
    blocks: BlockStates, source: HookPoint, target: HookPoint, data: bytes, channels: slice
) -> dict[str, Any] | None:
    """The `channels` of what a block makes at `target` of packed states at `source`, or what is
    wrong; None on a worker without the layer."""
    try:
        made = blocks(source, target, unpack(data, blocks.model.width(source.site)))
    except SteerError as error:
        return {"error": error.message, "code": error.code}
    return None if made is None else {"made": pack(made[:, channels])}


@torch.inference_mode()
def unembed_answer(unembed: Unembed | None, data: bytes, info: ModelInfo) -> bytes | None:
    """The logits of packed states, by the model's final norm and output matrix; None on a worker
    that has not got them."""
    parts = list(_logits(unembed, data, info))
    return pack(torch.cat(parts)) if parts else None


def token_rows_answer(
    rows: HeadRows | None, unembed: Unembed | None, tokens: Sequence[int], info: ModelInfo
) -> dict[str, Any]:
    """The packed row of each of `tokens` that this worker has, under `rows`, or what is wrong."""
    if rows is None or unembed is None:
        return {"rows": {}}
    try:
        found = rows(tokens, info.d_model, unembed)
    except SteerError as error:
        return {"error": error.message, "code": error.code}
    return {"rows": {token: pack(row) for token, row in found.items()}}


@torch.inference_mode()
def logprobs_answer(
    unembed: Unembed | None,
    data: bytes,
    tokens: Sequence[int],
    count: int,
    info: ModelInfo,
) -> dict[str, Any] | None:
    """The log-probability of each of `tokens`, and the best `count`, under the logits of the packed
    state in its place; None on a worker that makes no logits."""
    found: list[TokenLogprob] = []
    failed: SteerError | None = None
    read = 0
    for logits in _logits(unembed, data, info):
        said, read = tokens[read : read + len(logits)], read + len(logits)
        try:
            found += following(logits, said, count)
        except SteerError as error:
            failed = error  # and on to the end, where the other ranks go
    if failed is not None:
        return {"error": failed.message, "code": failed.code}
    return {"logprobs": [(one.logprob, one.top) for one in found]} if read else None


def _logits(unembed: Unembed | None, data: bytes, info: ModelInfo) -> Iterator[Tensor]:
    """The logits of packed states, some rows at a time; nothing on a worker that makes none. All
    tensor-parallel ranks take part."""
    if unembed is None:
        return
    for part in torch.split(unpack(data, info.d_model), _ROWS_AT_ONCE):
        logits = unembed(part)
        if logits is not None:
            yield logits.float().cpu()


def without_adapters(runner: Any, unembed: Unembed) -> Unembed:
    """`unembed` of the model that the adapters of `runner`, a model runner of vLLM's, go with.

    With adapters vLLM's logits are those of the batch that ran last: row i by the adapter of its
    request i. So rows that belong to no batch are said to belong to none.
    """
    if runner.lora_config is None:
        return unembed
    most = runner.vllm_config.scheduler_config.max_num_seqs
    nobody = rows_of_nobody(runner)

    def plain(states: Tensor) -> Tensor | None:
        found = []
        for rows in torch.split(states, most):
            nobody(len(rows))
            found.append(unembed(rows))
        whole = [one for one in found if one is not None]
        return torch.cat(whole) if len(whole) == len(found) else None

    return plain


def rows_of_nobody(runner: Any) -> Callable[[int], None]:
    """What says of so many rows that come next through the modules of `runner` that no adapter is
    asked for; nothing where it has none."""
    if runner.lora_config is None:
        return lambda _: None
    check(*ADAPTERS)
    most = runner.vllm_config.scheduler_config.max_num_seqs

    def say(rows: int) -> None:
        # Requests are what logits are by, and no more than these.
        runner._set_active_loras((0,) * min(rows, most), (0,) * rows, set())

    return say
