"""LoReFT adapters (2404.03592) as safetensors: `layers.N.rotation`, `.weight`, `.bias`."""

from __future__ import annotations

from steer.artefacts.control_vector import LowRankAdapter
from steer.formats.canonical import complete_parts
from steer.formats.claims import check_claims
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash, shift


def is_loreft(file: SafetensorsFile) -> bool:
    return any(key.endswith(".rotation") for key in file.tensors)


def read_loreft(file: SafetensorsFile, options: ImportOptions) -> LowRankAdapter:
    """The adapter; the file says nothing about itself, so its card holds the options alone."""
    offset = options.offset("safetensors") or 0
    parts = shift(complete_parts(file), offset)
    provenance = {
        "format": "safetensors",
        "layer_offset": offset,
        "layer_names": {str(layer): f"layers.{layer - offset}" for layer in parts},
        "file_sha256": file_hash(file.path),
    }
    site = options.site or check_claims(file.metadata, options) or "resid_post"
    return LowRankAdapter.of(parts, site=site, provenance=provenance)
