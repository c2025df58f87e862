"""A GGUF model as a folder that transformers and vLLM load: weights dequantised, nothing else lost.

transformers reads the file's architecture and unpacks its matrices. Afterwards it is checked that
every number of the file went into the model, and that the configuration says what the file says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from steer.engines.transformers.checkpoints.gguf.configuration import (
    ROPE_FREQUENCIES,
    check_configuration,
    complete_configuration,
)
from steer.engines.transformers.checkpoints.gguf.header import (
    INSTEAD,
    GGUFHeader,
    not_converted,
)
from steer.engines.transformers.checkpoints.gguf.tokenizer import end_ids, read_tokenizer
from steer.engines.transformers.checkpoints.loading import auto_class
from steer.errors import SteerError, Unsupported

VERSION = 1
"""Of what is made of a file here: counted on, folders made before are not used any more."""

_SOURCE = "steer-source.json"
"""What a folder was made from: the file's name and SHA-256."""


_UNREAD = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError)
"""What transformers raises for a file that it cannot read."""


def convert(header: GGUFHeader, folder: Path, sha256: str) -> None:
    """Writes the model in a file, whose content has that hash, into `folder`.

    Weights are float32, which holds every quantised number exactly. The whole model is in memory at
    once. Raises `SteerError` (`model_not_loaded`) for what cannot be converted exactly.
    """
    config = _configuration(header)
    tokenizer = read_tokenizer(header)
    model = _dequantised(header, config)
    ends = end_ids(header)
    model.config.eos_token_id = model.generation_config.eos_token_id = ends or None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = {"file": header.path.name, "sha256": sha256, "version": VERSION}
    (folder / _SOURCE).write_text(json.dumps(source))


def source_sha256(folder: Path) -> str | None:
    """The SHA-256 of the file that `folder` was made from by `convert`; None for any other."""
    try:
        return str(json.loads((folder / _SOURCE).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _configuration(header: GGUFHeader) -> Any:
    """The configuration that transformers makes of the file."""
    from transformers import AutoConfig  # noqa: PLC0415 (slow import)

    path = header.path
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except _UNREAD as error:
        raise _not_read(header, error) from error


def _dequantised(header: GGUFHeader, config: Any) -> Any:
    """The model in float32, as if it had never been quantised: `save_pretrained` refuses others."""
    loaded = _read(header, config)
    config = loaded.config
    vars(config).pop("quantization_config", None)
    vars(config).pop("_model_name_or_path", None)
    config.dtype = torch.float32
    complete_configuration(header, config)
    check_configuration(header, config)
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _read(header: GGUFHeader, config: Any) -> Any:
    """The model as transformers reads it, with every number of the file in it."""
    import transformers  # noqa: PLC0415 (slow import)

    # Releases that can keep the matrices quantised are told not to; those before always unpack.
    config_class = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    path = header.path
    try:
        loaded, about = auto_class(config).from_pretrained(
            path.parent,
            config=config,
            gguf_file=path.name,
            dtype=torch.float32,
            **unpacked,
            output_loading_info=True,
        )
    except Unsupported:
        raise
    except _UNREAD as error:
        raise _not_read(header, error) from error
    lost = [*about["missing_keys"], *about["unexpected_keys"], *about["mismatched_keys"]]
    taken = sum(parameter.numel() for parameter in loaded.parameters())
    given = sum(size for name, size in header.tensors.items() if name != ROPE_FREQUENCIES)
    if lost or taken != given:
        raise not_converted(
            path,
            f"it holds {given:,} numbers, and transformers makes of them a model of {taken:,}"
            + (f", without {sorted(map(str, lost))[0]!r}" if lost else "")
            + f": {INSTEAD}",
        )
    return loaded


def _not_read(header: GGUFHeader, error: Exception) -> SteerError:
    reason = next(iter(str(error).strip().splitlines()), repr(error))
    return not_converted(
        header.path,
        f"transformers cannot read its architecture {header.architecture!r} ({reason}): {INSTEAD}",
    )
