"""A read-out plan as one file, for the processes that read: named by the hash of its bytes.

The file is safetensors. One metadata key, `steer.readouts`, holds a record of each reader;
directions and the rows of SAE features that are read by themselves are tensors, whole SAEs and
lenses are named by their hashes, and found where they are registered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from steer.artefacts.arming import ReadTokens
from steer.artefacts.lens import Lens
from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError
from steer.model import HookPoint
from steer.readouts.plan import ReadoutPlan
from steer.readouts.readers import (
    DetectorReader,
    FeatureReader,
    LensReader,
    NormReader,
    ProjectionReader,
    Reader,
    SizeReader,
    TopFeaturesReader,
)
from steer.spec import Index, Site

_KEY = "steer.readouts"

_Kind: TypeAlias = Literal[
    "norm", "size", "projections", "detector", "features", "top_features", "lens"
]


class Artefacts(Protocol):
    """Where whole SAEs and lenses are, by hash."""

    def sae(self, sha256: str) -> SAE: ...

    def lens(self, sha256: str) -> Lens: ...


class ReaderRecord(BaseModel):
    """One reader; what its kind has no use for is left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: _Kind
    point: tuple[Index, Site]
    tensor: StrictStr | None = None
    artefact: StrictStr | None = None
    names: tuple[StrictStr, ...] = ()
    features: tuple[Index, ...] = ()
    top: Index = 0


class ReadoutRecord(BaseModel):
    """A plan without its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Literal[1] = 1
    fields: tuple[StrictStr, ...]
    tokens: ReadTokens
    readers: tuple[ReaderRecord, ...] = Field(max_length=4096)


def dump_readouts(plan: ReadoutPlan) -> bytes:
    """The file of `plan`: the same content gives the same bytes."""
    tensors: dict[str, Tensor] = {}
    records = tuple(_record(reader, tensors) for reader in plan.readers)
    record = ReadoutRecord(fields=plan.fields, tokens=plan.tokens, readers=records)
    text = json.dumps(record.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    if not tensors:
        tensors["none"] = torch.zeros(0)  # safetensors keeps no metadata without tensors
    return save_safetensors(tensors, {_KEY: text})


def load_readouts(data: bytes, artefacts: Artefacts) -> ReadoutPlan:
    """The plan in `data`. Raises `FileFormatError` for anything else."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        record = ReadoutRecord.model_validate_json(header["__metadata__"][_KEY])
        tensors = load_safetensors(data)
        readers = tuple(_reader(one, tensors, artefacts) for one in record.readers)
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"these bytes are not read-outs that Steer wrote: {type(error).__name__}: {error}",
            code="invalid_plan",
        ) from error
    return ReadoutPlan(readers, record.fields, record.tokens)


def _record(reader: Reader, tensors: dict[str, Tensor]) -> ReaderRecord:
    def kept(tensor: Tensor) -> str:
        name = f"t{len(tensors)}"
        tensors[name] = tensor.contiguous()
        return name

    at: Any = (reader.point.layer, reader.point.site)
    match reader:
        case NormReader():
            return ReaderRecord(kind="norm", point=at)
        case SizeReader():
            return ReaderRecord(kind="size", point=at)
        case ProjectionReader():
            return ReaderRecord(
                kind="projections", point=at, tensor=kept(reader.units), names=reader.names
            )
        case DetectorReader():
            numbers = torch.cat([reader.weights, torch.tensor([reader.bias])])
            return ReaderRecord(
                kind="detector", point=at, tensor=kept(numbers), names=(reader.name,)
            )
        case FeatureReader(whole=True):
            return ReaderRecord(
                kind="features",
                point=at,
                artefact=reader.sae.sha256,
                features=reader.features,
                names=(reader.name,),
            )
        case FeatureReader():
            part = np.frombuffer(reader.sae.to_bytes(), dtype=np.uint8).copy()
            return ReaderRecord(
                kind="features",
                point=at,
                tensor=kept(torch.from_numpy(part)),
                features=reader.features,
                names=(reader.name,),
            )
        case TopFeaturesReader():
            return ReaderRecord(
                kind="top_features",
                point=at,
                artefact=reader.sae.sha256,
                top=reader.top,
                names=(reader.name,),
            )
        case LensReader():
            return ReaderRecord(
                kind="lens",
                point=at,
                top=reader.top,
                artefact=None if reader.lens is None else reader.lens.sha256,
                names=() if reader.name is None else (reader.name,),
            )


def _reader(record: ReaderRecord, tensors: Mapping[str, Tensor], artefacts: Artefacts) -> Reader:
    point = HookPoint(*record.point)
    name = record.names[0] if record.names else ""
    match record.kind:
        case "norm":
            return NormReader(point)
        case "size":
            return SizeReader(point)
        case "projections":
            return ProjectionReader(point, tensors[str(record.tensor)], record.names)
        case "detector":
            numbers = tensors[str(record.tensor)]
            return DetectorReader(point, numbers[:-1].clone(), float(numbers[-1]), name)
        case "features":
            whole = record.artefact is not None
            if whole:
                sae = artefacts.sae(str(record.artefact))
            else:
                sae = SAE.from_bytes(tensors[str(record.tensor)].numpy().tobytes())
            return FeatureReader(point, sae, record.features, name, whole)
        case "top_features":
            return TopFeaturesReader(point, artefacts.sae(str(record.artefact)), record.top, name)
        case "lens":
            lens = None if record.artefact is None else artefacts.lens(record.artefact)
            return LensReader(point, record.top, lens, name or None)
