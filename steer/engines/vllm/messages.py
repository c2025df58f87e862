"""What workers answer over `collective_rpc`, as front ends read it: plain values and bytes.

What is read here is written by `worker/answers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.engines.base import (
    GateReceipt,
    PointReceipt,
    RampReceipt,
    Receipt,
    SpeculationReceipt,
    TokenLogprob,
)
from steer.errors import EngineError, NotFinite, SteerError
from steer.model import HookPoint, ModelInfo

_ATTACHED = "steer_receipt"
"""The entry of an output's `kv_transfer_params` that holds a receipt."""


def read_info(answer: Mapping[str, Any]) -> ModelInfo:
    """The model in a worker's answer."""
    model = dict(answer["model"])
    pairs = tuple((site, reason) for site, reason in model["absent"])
    return ModelInfo(**{**model, "sites": tuple(model["sites"]), "absent": pairs})


def read_receipt(answer: Mapping[str, Any]) -> Receipt:
    """The receipt in a worker's answer. Raises `EngineError` where there is none, and `NotFinite`
    where the request's own steering is the reason."""
    if "error" in answer:
        message, code = str(answer["error"]), str(answer.get("code", "not_steered"))
        if code == NotFinite.code:
            raise NotFinite(message)
        raise EngineError(message, code=code)
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
        concepts=tuple(answer.get("concepts", ())),
        speculation=SpeculationReceipt(**answer["speculation"])
        if "speculation" in answer
        else None,
        ramps=tuple(
            RampReceipt(
                tuple((token, factor) for token, factor in ramp["points"]),
                ramp["tokens"],
                ramp["mean"],
            )
            for ramp in answer.get("ramps", ())
        ),
    )


def read_logprobs(answer: Mapping[str, Any]) -> list[TokenLogprob]:
    """The log-probabilities in a worker's answer. Raises `SteerError` (`not_finite`) where the
    logits hold NaN or infinity."""
    if "error" in answer:
        raise SteerError(str(answer["error"]), code=str(answer["code"]))
    return [
        TokenLogprob(logprob, tuple((token, value) for token, value in top))
        for logprob, top in answer["logprobs"]
    ]


def read_readouts(
    answers: Iterable[Mapping[str, Any]], width: int
) -> list[tuple[int, tuple[float, ...]]]:
    """The rows of one request by position, from what each worker that ran it says: a number that
    one has not got, because its layers lie elsewhere, another has. Raises `EngineError`."""
    rows: dict[int, NDArray[np.float32]] = {}
    for answer in answers:
        if "error" in answer:
            raise EngineError(str(answer["error"]), code=str(answer.get("code", "readouts_missed")))
        numbers = np.frombuffer(answer["numbers"], dtype=np.float32).reshape(-1, width)
        for position, row in zip(answer["positions"], numbers, strict=True):
            known = rows.get(position)
            rows[position] = row if known is None else np.where(np.isnan(known), row, known)
    return [(position, tuple(rows[position].tolist())) for position in sorted(rows)]


def put_on(output: Any, fed: int, answer: Mapping[str, Any]) -> None:
    """Puts a worker's answer about a request, which fed `fed` tokens, on the request's last
    `EngineCoreOutput`."""
    mine = {_ATTACHED: {"fed": fed, "answer": dict(answer)}}
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), **mine}


def take_off(output: Any) -> tuple[int, Mapping[str, Any]] | None:
    """The tokens fed and the answer that came on a `RequestOutput`, which is vLLM's own again."""
    found = (output.kv_transfer_params or {}).get(_ATTACHED)
    if found is None:
        return None
    rest = {name: one for name, one in output.kv_transfer_params.items() if name != _ATTACHED}
    output.kv_transfer_params = rest or None
    return int(found["fed"]), found["answer"]


def leaves_unsteered(answer: Mapping[str, Any]) -> bool:
    """Whether states of a request that was not steered may lie in the prefix cache under its plan's
    name. What ran over was steered: its states are what whoever asks for them again must get."""
    return "error" in answer and answer.get("code") != NotFinite.code


def pack(x: Tensor) -> bytes:
    """A float32 matrix as bytes; its width is known on both sides."""
    return x.detach().float().cpu().contiguous().numpy().tobytes()


def unpack(data: bytes, width: int) -> Tensor:
    """The matrix `[rows, width]` in `data`."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(-1, width).copy())
