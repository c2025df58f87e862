"""What workers answer over `collective_rpc`, as front ends read it: plain values and bytes.

What is read here is written by `worker/answers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.engines.base import (
    Attention,
    GateReceipt,
    PointReceipt,
    RampReceipt,
    Receipt,
    SpeculationReceipt,
    TokenLogprob,
)
from steer.errors import EngineError, NotFinite, SteerError, Unsupported
from steer.model import HookPoint, ModelInfo

_NO_ATTENTION = "attention.error"

_RECEIPT, _READOUTS = "steer_receipt", "steer_readouts"
"""The entries of an output's `kv_transfer_params` that hold a receipt, and what was read."""


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
            GateReceipt(gate["name"], gate["fired"], gate["value"], gate["position"])
            for gate in answer["gates"]
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


def attention_entries(told: Iterable[tuple[int, Attention]], rank: int) -> dict[str, bytes]:
    """What the heads of a worker, one of tensor-parallel `rank`, attend to, among what it captured:
    for each layer the weights and the values of its heads."""
    found = {}
    for layer, one in told:
        found[_attention(layer, rank, "weights")] = pack(one.weights)
        found[_attention(layer, rank, "values")] = pack(one.values)
    return found


def attention_error(error: SteerError) -> dict[str, bytes]:
    """Why there is none, in its place."""
    return {_NO_ATTENTION: json.dumps([error.message, error.code]).encode()}


def read_attention(
    found: Mapping[str, bytes], layers: Sequence[int], tokens: int, positions: int, head_dim: int
) -> dict[int, Attention]:
    """What heads attend to at so many `positions` of a prompt of `tokens` tokens, those of all
    workers side by side in the order of their ranks. Raises `Unsupported` where a worker could not
    tell, and `EngineError` where none did."""
    if _NO_ATTENTION in found:
        message, code = json.loads(found[_NO_ATTENTION])
        raise (Unsupported if code == "no_attention" else EngineError)(message, code=code)
    read = {}
    for layer in layers:
        weights: list[Tensor] = []
        values: list[Tensor] = []
        while (name := _attention(layer, len(weights), "weights")) in found:
            weights.append(unpack(found[name], tokens).view(-1, positions, tokens))
            name = _attention(layer, len(values), "values")
            values.append(unpack(found[name], head_dim).view(-1, tokens, head_dim))
        if not weights:
            raise EngineError(f"no worker told what the heads of layer {layer} attend to")
        read[layer] = Attention(torch.cat(weights), torch.cat(values))
    return read


def _attention(layer: int, rank: int, part: str) -> str:
    return f"attention.{layer}.{rank}.{part}"


def put_on(output: Any, fed: int, answer: Mapping[str, Any]) -> None:
    """Puts a worker's answer about a request, which fed `fed` tokens, on the request's last
    `EngineCoreOutput`."""
    _put(output, _RECEIPT, {"fed": fed, "answer": dict(answer)})


def take_off(output: Any) -> tuple[int, Mapping[str, Any]] | None:
    """The tokens fed and the answer that came on a `RequestOutput`, which is vLLM's own again."""
    found = _taken(output, _RECEIPT)
    return None if found is None else (int(found["fed"]), found["answer"])


class Arrival(NamedTuple):
    """What the workers say (as `steer_readouts` does) of the read-outs of the request under a
    ticket's key, as far as it has fed `fed` tokens and nobody was told before."""

    key: str
    fed: int
    answers: list[Mapping[str, Any]]


def put_readouts_on(output: Any, arrival: Arrival) -> None:
    """Puts what was read on one of the request's `EngineCoreOutput`s."""
    _put(output, _READOUTS, list(arrival))


def take_readouts_off(output: Any) -> Arrival | None:
    """What was read that came on an `EngineCoreOutput`, which is vLLM's own again."""
    found = _taken(output, _READOUTS)
    return None if found is None else Arrival(*found)


def _put(output: Any, name: str, value: Any) -> None:
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), name: value}


def _taken(output: Any, name: str) -> Any:
    params = output.kv_transfer_params
    if not params or name not in params:
        return None
    output.kv_transfer_params = {key: one for key, one in params.items() if key != name} or None
    return params[name]


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
