"""A plan as one file: compiled once, sent once to every process, named by the hash of its bytes.

The file is safetensors. One metadata key, `steer.plan`, holds everything that is not a tensor;
the tensors `t0`, `t1`, … are float32, and rows that occur several times are stored once. Two
things stay behind, because they are large and known elsewhere: the encoder of an SAE whose
features compete is named by the SAE's hash and made from the SAE, and the payload of an inline
vector in the spec is replaced by its digest. A loaded plan's `spec` therefore tells what was asked,
and where it held inline vectors cannot be compiled again; fingerprint, rules and hook points are
the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save as save_safetensors
from safetensors.torch import load as load_safetensors
from torch import Tensor

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.competing import MEASURES, Competing, competing
from steer.artefacts.sae.encoders import PursuitEncoder, TopKEncoder
from steer.edits import Block
from steer.errors import FileFormatError, IncompatibleArtefact, SpecError, TooLarge
from steer.formats.guards.safetensors import MAX_HEADER_BYTES
from steer.laws import COSINE, LAW_FIELDS, MEASURE, ONLY_ACTIVE
from steer.model import HookPoint, ModelInfo, forward_order
from steer.plan.checks import check_block, check_gate, check_model
from steer.plan.plan import Gate, Rule, SteeringPlan
from steer.plan.records import (
    VERSION,
    AutomatonRecord,
    BlockRecord,
    EditsRecord,
    EncoderRecord,
    GateRecord,
    PlanRecord,
    RuleRecord,
    checked,
    selection_of,
    selection_record,
    spec_to_json,
)
from steer.plan.selection import Selection
from steer.plan.texts.automaton import Moves, default_moves
from steer.spec import parse_spec

SAEOfHash: TypeAlias = Callable[[str], SAE]
"""An SAE's hash to the SAE."""

_KEY = "steer.plan"


def dump_plan(plan: SteeringPlan) -> bytes:
    """The file of `plan`: the same content gives the same bytes.

    Raises `SpecError` for an edit that is not finite in float32 and for positions or token ids
    outside 64 bits, `TooLarge` for more hook points and tokens than a header holds.
    """
    rows = _RowWriter()
    record = PlanRecord(
        version=VERSION,
        fingerprint=plan.fingerprint,
        artefacts=plan.artefacts,
        strengths=plan.strengths,
        summary=tuple(dict(entry) for entry in plan.summary),
        spec=spec_to_json(plan.spec),
        passes=tuple(_rule_record(one, rows) for one in plan.rules),
    )
    fields = record.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    # One metadata key: safetensors writes several in no fixed order, and the hash must not depend
    # on it.
    data = bytes(save_safetensors(rows.arrays, metadata={_KEY: text}))
    header = int.from_bytes(data[:8], "little")
    if header > MAX_HEADER_BYTES:
        raise TooLarge(
            f"the plan of this spec needs a header of {header} bytes; at most {MAX_HEADER_BYTES} "
            "are written: edit fewer hook points, or name fewer tokens in 'where'",
            code="plan_too_large",
            param="/interventions",
        )
    return data


def load_plan(data: bytes, sae: SAEOfHash, *, model: ModelInfo | None = None) -> SteeringPlan:
    """The plan in `data`; SAEs whose features compete come from `sae`, whose errors pass through.

    Raises `FileFormatError` for anything that `dump_plan` did not write and, where `model` is
    given, `IncompatibleArtefact` or `Unsupported` for a plan made for another model. Needs memory
    for twice the tensors and a header of at most 16 MiB.
    """
    content, tensors = _opened(data)
    if content.get("version") != VERSION:
        raise FileFormatError(
            f"this plan has format version {content.get('version')!r}; this version of Steer reads "
            f"{VERSION}: run the same version in every process",
            code="plan_version",
        )
    record = checked(PlanRecord, content)
    reader = _Reader(tensors, sae)
    rules = tuple(reader.read_rule(one) for one in record.passes)
    if reader.unused:
        raise _malformed(f"nothing refers to its tensors {sorted(reader.unused)[:5]}")
    if model is not None:
        check_model(rules, model)
    try:
        spec = parse_spec(record.spec)
    except SpecError as error:
        raise _malformed(f"its spec is wrong: {error.param}: {error}") from error
    return SteeringPlan(
        fingerprint=record.fingerprint,
        spec=spec,
        rules=rules,
        artefacts=record.artefacts,
        strengths=record.strengths,
        summary=record.summary,
    )


def load_selections(data: bytes) -> tuple[Selection, ...]:
    """The selections of the plan in `data`, one for each rule, and nothing else of it.

    Raises `FileFormatError` for anything that `dump_plan` did not write.
    """
    content, tensors = _opened(data)
    record = checked(PlanRecord, content)
    reader = _Reader(tensors, _no_sae)
    return tuple(reader.read_selection(one) for one in record.passes)


def _no_sae(sha256: str) -> SAE:
    raise AssertionError(f"a selection has no SAE, and asked for {sha256}")


def selection_to_json(selection: Selection) -> dict[str, Any]:
    """`selection` as a small JSON object, without what has its default value.

    Raises `SpecError` for positions or token ids outside 64 bits.
    """
    return selection_record(selection).model_dump(mode="json", exclude_defaults=True)


def selection_from_json(value: Mapping[str, Any]) -> Selection:
    """The inverse of `selection_to_json`; raises `FileFormatError` for anything else."""
    return selection_of(value)


# Writing


class _RowWriter:
    """Tensors by content, named in the order in which they are first met."""

    def __init__(self) -> None:
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self._names: dict[tuple[tuple[int, ...], bytes], str] = {}

    def name(self, tensor: Tensor) -> str:
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        key = (array.shape, hashlib.sha256(array.tobytes()).digest())
        name = self._names.setdefault(key, f"t{len(self._names)}")
        self.arrays[name] = array
        return name

    def moves(self, moves: Moves) -> tuple[str, str]:
        """The names of what an automaton does; float32 holds every token's id."""
        tokens = np.stack([moves.tokens, moves.row_of], axis=1)
        each = (torch.from_numpy(one.astype(np.float32)) for one in (tokens, moves.rows))
        return self.name(next(each)), self.name(next(each))


def _rule_record(one: Rule, rows: _RowWriter) -> RuleRecord:
    blocks = []
    for point in sorted(one.blocks, key=forward_order):
        block = one.blocks[point]
        check_block(point, block, SpecError)
        blocks.append(_block_record(point, block, rows))
    return RuleRecord(
        selection=selection_record(one.selection, rows.moves),
        gate=None if one.gate is None else _gate_record(one.gate, rows),
        blocks=tuple(blocks),
    )


def _block_record(point: HookPoint, block: Block, rows: _RowWriter) -> BlockRecord:
    edits = None
    if block.read is not None and block.write is not None and block.laws is not None:
        edits = EditsRecord(
            read=rows.name(block.read),
            write=rows.name(block.write),
            laws=rows.name(_written_laws(block.laws)),
        )
    return BlockRecord(
        point=point,
        shift=None if block.shift is None else rows.name(block.shift),
        edits=edits,
        channels=None if block.channels is None else rows.name(block.channels),
        side=None if block.side is None else rows.name(block.side),
        competition=None if block.encoder is None else _encoder_record(block),
        reads_at=block.reads_at,
        replace=block.replace,
        preserve_norm=block.preserve_norm,
    )


def _encoder_record(block: Block) -> EncoderRecord:
    encoder = block.encoder
    assert encoder is not None
    sae = encoder.identity.partition("/")[0]
    if isinstance(encoder, TopKEncoder):
        return EncoderRecord(sae=sae, k=encoder.k, measure=encoder.rows.measure)
    k = encoder.k if isinstance(encoder, PursuitEncoder) else None
    return EncoderRecord(sae=sae, k=k, features=block.columns)


def _written_laws(laws: Tensor) -> Tensor:
    """Without the last columns where no law needs them, so that files keep the names they had
    before there were such. A column is never short of what it meant then."""
    measure = laws[:, MEASURE]
    if bool(laws[:, ONLY_ACTIVE].any()) or bool((measure > COSINE).any()):
        return laws
    return laws[:, : ONLY_ACTIVE if bool(measure.any()) else MEASURE]


def _read_laws(laws: Tensor) -> Tensor:
    if laws.ndim == 2 and MEASURE <= laws.shape[1] < LAW_FIELDS:
        rest = laws.new_zeros(len(laws), LAW_FIELDS - laws.shape[1])
        return torch.cat([laws, rest], dim=1)
    return laws


def _gate_record(gate: Gate, rows: _RowWriter) -> GateRecord:
    check_gate(gate, SpecError)
    # JSON has no infinity: a bound that does not bind is left out.
    return GateRecord(
        name=gate.name,
        point=gate.point,
        direction=rows.name(gate.direction),
        above=None if gate.above == -math.inf else gate.above,
        below=None if gate.below == math.inf else gate.below,
        cosine=gate.cosine,
        prompt_scope=gate.prompt_scope,
        onward=gate.onward,
        bias=gate.bias,
        pooling=gate.pooling,
        last=gate.last,
    )


# Reading


class _Reader:
    """Turns records into what they stand for; refuses names that are missing or of odd shape."""

    def __init__(self, tensors: Mapping[str, Tensor], sae: SAEOfHash) -> None:
        self._tensors, self._sae = tensors, sae
        self._rows: dict[str, Tensor] = {}

    @property
    def unused(self) -> set[str]:
        return set(self._tensors) - set(self._rows)

    def read_rule(self, record: RuleRecord) -> Rule:
        blocks: dict[HookPoint, Block] = {}
        for one in record.blocks:
            point = HookPoint(*one.point)
            if point in blocks:
                raise _malformed(f"one of its passes edits {point} twice")
            blocks[point] = self._block(one)
            check_block(point, blocks[point], FileFormatError)
        gate = None if record.gate is None else self._gate(record.gate)
        return Rule(self.read_selection(record), gate, blocks)

    def read_selection(self, record: RuleRecord) -> Selection:
        return selection_of(record.selection, self._moves)

    def _moves(self, record: AutomatonRecord) -> Moves:
        if record.tokens is None or record.rows is None:
            raise _malformed(f"what its text {record.opening!r} does to tokens is missing")
        pairs, rows = (
            self._row(name).to(torch.int64).numpy() for name in (record.tokens, record.rows)
        )
        default = default_moves(record.opening, record.closing)
        whole = pairs.ndim == rows.ndim == 2 and pairs.shape[1] == 2
        if not (whole and rows.shape[1] == len(default) and _within(rows, len(default))):
            raise _malformed(f"what its text {record.opening!r} does to tokens is of odd shape")
        if not _within(pairs[:, 1], len(rows)):
            raise _malformed(f"what its text {record.opening!r} does to tokens points nowhere")
        moves = Moves(pairs[:, 0], pairs[:, 1], rows, default)
        if moves.digest != record.digest:
            raise _malformed(f"what its text {record.opening!r} does to tokens is damaged")
        return moves

    def _block(self, record: BlockRecord) -> Block:
        edits = record.edits
        read = None if edits is None else self._row(edits.read)
        asked = None
        if record.competition is not None:
            asked = self._asked(record.competition, () if read is None else tuple(read.shape))
        return Block(
            shift=None if record.shift is None else self._row(record.shift),
            read=read,
            write=None if edits is None else self._row(edits.write),
            laws=None if edits is None else _read_laws(self._row(edits.laws)),
            channels=None if record.channels is None else self._row(record.channels),
            side=None if record.side is None else self._row(record.side),
            encoder=None if asked is None else asked.encoder,
            columns=None if asked is None else asked.columns,
            reads_at=None if record.reads_at is None else HookPoint(*record.reads_at),
            replace=record.replace,
            preserve_norm=record.preserve_norm,
        )

    def _asked(self, record: EncoderRecord, shape: tuple[int, ...]) -> Competing:
        """The encoder for edits whose read rows have `shape` `[K, d]`."""
        sae = self._sae(record.sae)
        ranked = sae.k is not None and not sae.grouped
        features = (0,) * (shape[0] if shape else 0) if ranked else record.features
        if features is None or (record.features is not None) is ranked:
            raise _malformed(f"it names the features of a {sae.architecture} SAE in no known way")
        if shape[1:] != (sae.d_in,) or (ranked and record.measure != MEASURES[sae.measure]):
            raise _malformed(
                f"its edits of read rows {list(shape)} compete in another way than features of the "
                f"SAE {record.sae[:12]}, which reads rows of width {sae.d_in}"
            )
        try:
            asked = competing(sae, features, None if record.k == sae.k else record.k)
        except IncompatibleArtefact as error:
            raise _malformed(str(error)) from error
        if asked is None:
            raise _malformed(f"the features of the SAE {record.sae[:12]} do not compete")
        return asked

    def _gate(self, record: GateRecord) -> Gate:
        gate = Gate(
            name=record.name,
            point=HookPoint(*record.point),
            direction=self._row(record.direction),
            above=-math.inf if record.above is None else record.above,
            below=math.inf if record.below is None else record.below,
            cosine=record.cosine,
            scope=record.scope,
            bias=record.bias,
            pooling=record.pooling,
            last=record.last,
        )
        check_gate(gate, FileFormatError)
        return gate

    def _row(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise _malformed(f"its tensor {name!r} is missing")
        if name not in self._rows:
            # Copied into memory of torch's own: aligned, as the compiler's tensors are, so that
            # products with it come out the same to the bit.
            self._rows[name] = self._tensors[name].clone(memory_format=torch.contiguous_format)
        return self._rows[name]


def _within(numbers: NDArray[np.int64], end: int) -> bool:
    return bool(((numbers >= 0) & (numbers < end)).all())


def _opened(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a plan's file, both still unchecked but for their types."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise FileFormatError(
            f"these {len(data)} bytes are not a plan, or only the beginning of one",
            code="truncated_file",
        )
    if size > MAX_HEADER_BYTES:
        raise FileFormatError(
            f"these bytes declare a header of {size} bytes; a plan's has at most "
            f"{MAX_HEADER_BYTES}",
            code="header_too_large",
        )
    try:
        header = json.loads(data[8 : 8 + size].decode())
        content = json.loads(header["__metadata__"][_KEY], parse_constant=_no_constant)
        tensors = load_safetensors(data)
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise _malformed(f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise _malformed(f"its metadata {_KEY!r} is not a JSON object")
    other = sorted(name for name, row in tensors.items() if row.dtype != torch.float32)
    if other:
        raise _malformed(f"its tensors {other[:5]} are not float32")
    return content, tensors


def _no_constant(name: str) -> float:
    raise ValueError(f"it contains the number {name}")


def _malformed(why: str) -> FileFormatError:
    return FileFormatError(
        f"these bytes are not a plan that Steer wrote: {why}", code="invalid_plan"
    )
