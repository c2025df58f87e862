"""What workers and front ends tell one another over `collective_rpc`: plain values and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.engines.base import GateReceipt, PointReceipt, Receipt
from steer.engines.vllm.worker.requests import Seats, receipt
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import EngineError, SteerError
from steer.model import HookPoint, ModelInfo

_ROWS_AT_ONCE = 256


def info_answer(steering: WorkerSteering) -> dict[str, Any]:
    """The worker's model and limits, for `read_info`."""
    answer = dataclasses.asdict(steering.model)
    answer["sites"] = list(steering.model.sites)
    return {
        "model": answer,
        "compiled": steering.shifts is not None,
        "static": steering.form is not None,
        "slots": steering.tables.slots,
        "passes": steering.tables.max_passes,
        "stages": steering.stages,
    }


def read_info(answer: Mapping[str, Any]) -> ModelInfo:
    """The model in a worker's answer."""
    model = dict(answer["model"])
    return ModelInfo(**{**model, "sites": tuple(model["sites"])})


def receipt_answer(seats: Seats, key: str, fed: Mapping[int, int]) -> dict[int, Any]:
    """Receipts of the choices in `fed` (tokens fed by each) under a ticket's key."""
    records = seats.records(key)
    seats.forget(key)
    answer: dict[int, Any] = {}
    for choice, tokens in fed.items():
        record = records.get(choice)
        if record is None:
            answer[choice] = {"error": "this worker knows nothing of the request"}
            continue
        try:
            answer[choice] = receipt(record, tokens).as_json()
        except SteerError as error:
            answer[choice] = {"error": error.message, "code": error.code}
    return answer


def read_receipt(answer: Mapping[str, Any]) -> Receipt:
    """The receipt in a worker's answer. Raises `EngineError` where there is none."""
    if "error" in answer:
        raise EngineError(str(answer["error"]), code=str(answer.get("code", "not_steered")))
    return Receipt(
        fingerprint=answer["fingerprint"],
        tokens_steered=answer["tokens_steered"],
        tokens_skipped=answer["tokens_skipped"],
        tokens_cached=answer["tokens_cached"],
        hook_points=tuple(
            PointReceipt(
                HookPoint(point["layer"], point["site"]),
                point["tokens"],
                point.get("relative_size"),
            )
            for point in answer["hook_points"]
        ),
        gates=tuple(
            GateReceipt(gate["name"], gate["fired"], gate["value"]) for gate in answer["gates"]
        ),
        strengths=tuple(answer.get("strengths", ())),
    )


def capture_answer(seats: Seats, key: str) -> dict[str, bytes]:
    """The captured states under a ticket's key: float32 bytes by hook point."""
    records = seats.records(key)
    seats.forget(key)
    record = records.get(0)
    if record is None:
        return {}
    return {str(point): pack(states) for point, states in record.live.states.items()}


def pack(x: Tensor) -> bytes:
    """A float32 matrix as bytes; its width is known on both sides."""
    return x.detach().float().cpu().contiguous().numpy().tobytes()


def unpack(data: bytes, width: int) -> Tensor:
    """The matrix `[rows, width]` in `data`."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(-1, width).copy())


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
