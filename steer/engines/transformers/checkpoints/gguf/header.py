"""What a GGUF file says of itself, and whether it is a model that can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from steer.errors import FileFormatError, SteerError
from steer.formats.guards.gguf import MODEL, check_gguf
from steer.formats.guards.stand_ins import check_present

INSTEAD = "give the folder of the checkpoint that it was made from"


@dataclass(frozen=True)
class GGUFHeader:
    """The keys of the GGUF file at `path`, arrays as lists, and its tensors' sizes in numbers."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, int]

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    def numbers(self, tensor: str) -> torch.Tensor:
        """A tensor of floats that is not quantised."""
        (found,) = (one for one in GGUFReader(self.path).tensors if one.name == tensor)
        return torch.from_numpy(found.data.copy()).float()


def read_header(path: Path) -> GGUFHeader:
    """The header of a model.

    Raises `SteerError` (`model_not_loaded`) for a file that is cut off, a part of several, or
    something else than a language model with its tokenizer; `FileFormatError` for a Git LFS
    pointer.
    """
    check_present(path)
    try:
        check_gguf(path, MODEL)
        reader = GGUFReader(path)
    except FileFormatError as error:
        again = "; fetch the file again" if error.code == "truncated_file" else ""
        raise not_converted(path, error.message + again) from error
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise not_converted(path, f"it cannot be parsed ({error})") from error
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    header = GGUFHeader(path, keys, tensors)
    if (other := _something_else(header)) is not None:
        raise not_converted(path, other)
    return header


def not_converted(path: Path, reason: str) -> SteerError:
    return SteerError(
        f"the model {str(path)!r} cannot be loaded: {reason}", code="model_not_loaded"
    )


def _something_else(header: GGUFHeader) -> str | None:
    """What the file is instead of a whole model, and what to do; None for a model."""
    keys, kind = header.keys, header.keys.get("general.type", "model")
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str):
        return f"its key general.architecture is {architecture!r}, not the name of an architecture"
    if architecture == "controlvector":
        return "it is a control vector, not a model: register it with `steer vectors add`"
    if kind == "adapter":
        return "it is an adapter (general.type is 'adapter'), not a model: merge it into its base"
    if kind == "mmproj" or architecture == "clip":
        return (
            f"it projects images for another model (general.type is {kind!r}, "
            f"general.architecture {architecture!r}): give that model's own file; images are not "
            "taken"
        )
    if (parts := keys.get("split.count", 1)) > 1:
        return (
            f"it is part {keys.get('split.no', 0) + 1} of {parts} (split.count): join the parts "
            "with `llama-gguf-split --merge FIRST-PART WHOLE`, and give the whole"
        )
    if "tokenizer.ggml.tokens" not in keys or "tokenizer.ggml.model" not in keys:
        return f"it holds no tokenizer (tokenizer.ggml.tokens, tokenizer.ggml.model): {INSTEAD}"
    if not header.tensors:
        return f"it holds a tokenizer alone, and no weights: {INSTEAD}"
    return None
