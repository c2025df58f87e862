"""What holds for the tensors of every plan, whether it is written to a file or read from one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steer.edits import CHANNEL_ROWS, GAIN, OFFSET, Block
from steer.errors import IncompatibleArtefact, NotFinite, SteerError
from steer.laws import BIAS, INTERCEPT, LAW_FIELDS, MEASURE, MEASURES, RELATIONS, RELATIVE, SLOPE
from steer.model import HookPoint, ModelInfo, forward_order
from steer.plan.plan import Gate, Rule

LONGEST_EDIT = 2.0**50
"""The longest row that may be added: about 1.1e15, where the states of models have norms up to
about 1e6. However many edits add up, float32 then holds the square of the norm, which every model
computes; one that overflows would make zeros of the state."""


def check_block(point: HookPoint, block: Block, error: type[SteerError]) -> None:
    """Raises `error` for a block whose tensors disagree in shape or are not finite."""
    fault = _shape_fault(block) or _value_fault(block) or _order_fault(point, block)
    if fault is not None:
        raise error(f"the edit at {point} {fault}", code="invalid_edit")


def check_size(blocks: Mapping[HookPoint, Block], model: ModelInfo) -> None:
    """Raises `NotFinite` for edits that would overflow, whatever the state they meet."""
    largest = torch.finfo(getattr(torch, model.dtype)).max
    for point, block in blocks.items():
        fault = _value_fault(block) or _size_fault(block, largest, model.dtype)
        if fault is not None:
            raise NotFinite(f"the edit at {point} {fault}")


def check_gate(gate: Gate, error: type[SteerError]) -> None:
    """Raises `error` for a gate whose direction is not one finite row."""
    direction = gate.direction
    if direction.ndim != 1 or not len(direction) or not bool(direction.isfinite().all()):
        raise error(
            f"the direction of the gate {gate.name!r} is not one finite row [d]; its shape is "
            f"{list(direction.shape)}",
            code="invalid_gate",
        )


def check_model(rules: tuple[Rule, ...], model: ModelInfo) -> None:
    """Raises for rules whose hook points or widths are not those of `model`."""
    for one in rules:
        widths = [(point, _width(block)) for point, block in one.blocks.items()]
        blocks = one.blocks.values()
        widths += [(block.reads_at, _width(block)) for block in blocks if block.reads_at]
        if one.gate is not None:
            widths.append((one.gate.point, len(one.gate.direction)))
        for point, width in widths:
            model.check_point(point)
            if width != model.width(point.site):
                raise IncompatibleArtefact(
                    f"the plan has rows of width {width} at {point}; there {model.name!r} has "
                    f"width {model.width(point.site)}: it was compiled for another model",
                    code="wrong_width",
                )


def _shape_fault(block: Block) -> str | None:
    for name, row in (("shift", block.shift), ("side", block.side)):
        if row is not None and (row.ndim != 1 or not len(row)):
            return f"has a {name} of shape {list(row.shape)}; it is one row [d]"
    channels = block.channels
    if channels is not None and (channels.ndim != 2 or len(channels) != len(CHANNEL_ROWS)):
        return f"has channels {list(channels.shape)}; they are [{len(CHANNEL_ROWS)}, d]"
    parts = (block.shift, block.side, channels, block.read)
    widths = sorted({part.shape[-1] for part in parts if part is not None})
    if len(widths) > 1:
        return f"has rows of widths {widths}"
    if block.read is None or block.write is None or block.laws is None:
        asks = block.encoder is not None or block.reads_at is not None
        if asks or (block.shift is None and channels is None):
            return "neither adds a row nor reads one"
        return None
    shape = block.read.shape
    if block.read.ndim != 2 or 0 in shape or block.write.shape != shape:
        return f"reads {list(shape)} and writes {list(block.write.shape)}; both are [K, d]"
    if block.laws.shape != (shape[0], LAW_FIELDS):
        return f"has laws {list(block.laws.shape)}; {shape[0]} edits have {[shape[0], LAW_FIELDS]}"
    if block.encoder is not None and len(block.columns or ()) != shape[0]:
        return f"asks for {len(block.columns or ())} columns of an encoder with {shape[0]} edits"
    return None


def _order_fault(point: HookPoint, block: Block) -> str | None:
    reads = block.reads_at
    if reads is None:
        return None
    earlier = reads.layer == point.layer and forward_order(reads) < forward_order(point)
    return None if earlier else f"reads {reads}, which is no earlier point of its layer"


def _value_fault(block: Block) -> str | None:
    named = (block.shift, block.side, block.read, block.write)
    rows = [row for row in named if row is not None]
    # Threshold, floor and ceiling may be infinite, and the bounds of channels: they do not bind.
    if block.laws is not None:
        rows.append(block.laws[:, [BIAS, INTERCEPT, SLOPE, RELATIVE, MEASURE]])
    if block.channels is not None:
        rows.append(block.channels[[GAIN, OFFSET]])
    if any(bool(rows.isnan().any()) for rows in (block.laws, block.channels) if rows is not None):
        return "contains NaN"
    if block.laws is not None and not _known(block.laws):
        return "has a law that measures in no known way"
    if not all(bool(row.isfinite().all()) for row in rows):
        return "is not finite in float32: use a smaller strength or value"
    return None


def _known(laws: Tensor) -> bool:
    """Whether what laws read and what they are relative to is something that there is."""
    measures, relations = laws.new_tensor(MEASURES), laws.new_tensor((0.0, *RELATIONS))
    known = torch.isin(laws[:, MEASURE], measures) & torch.isin(laws[:, RELATIVE], relations)
    return bool(known.all())


def _size_fault(block: Block, largest: float, dtype: str) -> str | None:
    """What is wrong with the rows that a block adds or, in place of others, writes."""
    constants = [row for row in (block.shift, _offset(block)) if row is not None]
    if constants:
        fault = _row_fault(torch.stack(constants), largest, dtype)
        if fault is not None:
            return fault
    if block.write is None or block.laws is None:
        return None
    written = block.laws[:, INTERCEPT, None] * block.write
    # What a relative law adds depends on the state.
    absolute = written[block.laws[:, RELATIVE] == 0]
    return _row_fault(written, torch.inf, dtype) or _row_fault(absolute, largest, dtype)


def _offset(block: Block) -> Tensor | None:
    return None if block.channels is None else block.channels[OFFSET]


def _row_fault(rows: Tensor, largest: float, dtype: str) -> str | None:
    number = float(rows.abs().max()) if rows.numel() else 0.0
    if number > largest:
        return (
            f"adds {number:.3g} to a coordinate, and {dtype} ends at {largest:.3g}: use a smaller "
            "strength or value, or load the model in a wider dtype"
        )
    length = float(rows.double().norm(dim=-1).max()) if rows.numel() else 0.0
    if length > LONGEST_EDIT:
        return (
            f"has a length of {length:.3g}, and models cannot compute with more than "
            f"{LONGEST_EDIT:.3g}: use a smaller strength or value"
        )
    return None


def _width(block: Block) -> int:
    parts = (block.read, block.channels, block.shift)
    return next((part.shape[-1] for part in parts if part is not None), 0)
