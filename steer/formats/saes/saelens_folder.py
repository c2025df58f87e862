"""SAELens folders: `cfg.json`, `sae_weights.safetensors`, and more.

What the files mean is known to `steer.artefacts.sae.saelens`; this module finds them and checks
that they may be opened.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.saelens import CARD, CONFIG, WEIGHTS, load_directory
from steer.errors import FileFormatError
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash

MAX_JSON_BYTES = 32 << 20


def read_saelens(folder: Path, options: ImportOptions) -> SAE:
    """The SAE in a SAELens folder."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileFormatError(f"there is no {WEIGHTS} beside {CONFIG}", code="unknown_layout")
    SafetensorsFile.open(weights)
    for path in folder.glob("*.json"):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        sae = load_directory(folder, site=options.site)
    except FileFormatError as error:
        # The sender knows nothing of the folder it was unpacked to.
        error.message = error.message.replace(f"{folder}/", "").replace(str(folder), "the folder")
        error.args = (error.message,)
        raise
    if (folder / CARD).exists():
        return sae  # its card came with it, and knows its origin
    provenance = {**sae.card.provenance, "file_sha256": file_hash(weights)}
    return replace(sae, card=sae.card.model_copy(update={"provenance": provenance}))
