"""What a worker answers over `collective_rpc`: plain values and bytes, read by `messages.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from steer.engines.vllm.messages import pack, unpack
from steer.engines.vllm.worker.requests import WorkerRequests, receipt
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import NotFinite, SteerError
from steer.model import ModelInfo

_ROWS_AT_ONCE = 256


def info_answer(steering: WorkerSteering) -> dict[str, Any]:
    """The worker's model and limits, for `read_info`."""
    answer = dataclasses.asdict(steering.model)
    answer["sites"] = list(steering.model.sites)
    answer["absent"] = [list(one) for one in steering.model.absent]
    return {
        "model": answer,
        "compiled": steering.compiled,
        "static": steering.edits.static,
        "slots": steering.edits.tables.slots,
        "passes": steering.edits.tables.max_rules,
        "stages": steering.stages,
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
            answer[choice] = {"error": "this worker knows nothing of the request"}
            continue
        try:
            found = receipt(record, tokens)
            requests.check_cached(found)
            answer[choice] = found.as_json()
        except SteerError as error:
            requests.remember(record, error)
            answer[choice] = {"error": error.message, "code": error.code}
    return answer


def capture_answer(requests: WorkerRequests, key: str) -> dict[str, bytes]:
    """The captured states under a ticket's key: float32 bytes by hook point, and an entry
    `not_finite` where the prompt's numbers ran over."""
    records = requests.records(key)
    requests.forget(key)
    record = records.get(0)
    if record is None:
        return {}
    states = {str(point): pack(states) for point, states in record.request.states.items()}
    ran_over = record.ledger.runs_over(0, len(record.request.prompt))
    return {**states, NotFinite.code: b""} if ran_over else states


@torch.inference_mode()
def unembed_answer(
    unembed: Callable[[Tensor], Tensor | None] | None, data: bytes, info: ModelInfo
) -> bytes | None:
    """The logits of packed states, by the model's final norm and output matrix."""
    if unembed is None:
        return None
    states = unpack(data, info.d_model)
    logits = [unembed(part) for part in torch.split(states, _ROWS_AT_ONCE)]
    if any(part is None for part in logits):
        return None
    return pack(torch.cat([part.float().cpu() for part in logits if part is not None]))
