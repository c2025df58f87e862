"""The one file form of an SAE: safetensors, whose single metadata key holds everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from steer.artefacts.control_vector import Card
from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import FileFormatError

REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")


class Config(BaseModel):
    """Everything about an SAE that is not a tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    k: int | None = None
    subtract_b_dec: bool
    normalize: str
    card: Card
    labels: dict[int, FeatureLabel] = {}


def write(tensors: Mapping[str, Tensor], config: Config) -> bytes:
    """The canonical bytes: the same SAE gives the same bytes."""
    # One metadata key: safetensors writes several in no fixed order, and the hash must not depend
    # on it.
    fields = config.model_dump(mode="json", by_alias=True, exclude={"card": {"name"}})
    text = json.dumps(fields, sort_keys=True)
    return bytes(save_safetensors(dict(tensors), metadata={"steer": text}))


def read(data: bytes) -> tuple[dict[str, Tensor], Config]:
    """Tensors and configuration; raises `FileFormatError` unless `write` made `data`."""
    try:
        tensors = load_safetensors(data)
        size = int.from_bytes(data[:8], "little")
        config = Config.model_validate_json(json.loads(data[8 : 8 + size])["__metadata__"]["steer"])
    except (SafetensorError, ValidationError, KeyError, ValueError) as error:
        raise FileFormatError(f"these bytes are not a canonical SAE file: {error}") from error
    missing = [name for name in REQUIRED if name not in tensors]
    if missing or config.card.kind != "sae" or len(config.card.layers) != 1:
        raise FileFormatError(
            f"these bytes are not a canonical SAE file: a {config.card.kind!r} on layers "
            f"{list(config.card.layers)}, without {missing or 'nothing'}"
        )
    return tensors, config
