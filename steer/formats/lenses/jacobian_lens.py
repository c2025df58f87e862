"""Jacobian lenses in `.pt` files, as the method's own code writes them.

    a lens        J {l: [d, d]}, n_prompts, source_layers, d_model
    a checkpoint  jacobian_sum {l: [d, d]}, n_done and more; J = jacobian_sum / n_done

J_l takes the *output* of block l to that of the last block. A published lens lies in a folder with
a `config.yaml` that names the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from steer.artefacts.lens import Lens
from steer.errors import FileFormatError
from steer.formats.claims import check_claims, unhonoured
from steer.formats.guards.torch import load_tensors
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash
from steer.spec import MAX_INTEGER

CONFIG = "config.yaml"
MAX_CONFIG_BYTES = 1 << 18
_FILES = "*jacobian_lens*.pt"
_MATRICES, _SUMS = "J", "jacobian_sum"
_MODEL_KEYS = ("hf_model_name", "model_name", "model_id", "model")
_KEPT = ("skip_first", "max_seq_len", "next_idx", "n_layers")
_MOST_LAYERS = 1 << 10


def is_jacobian_lens(held: Any) -> bool:
    """Whether a `.pt` file with this in it is a lens, finished or not."""
    return isinstance(held, dict) and any(
        isinstance(held.get(key), dict) for key in (_MATRICES, _SUMS)
    )


def is_jacobian_folder(folder: Path) -> bool:
    return any(folder.glob(_FILES))


def read_jacobian_folder(folder: Path, options: ImportOptions) -> Lens:
    """The one lens in a folder, with what its `config.yaml` says of the model where there is one.

    Raises `FileFormatError`.
    """
    files = sorted(folder.glob(_FILES))
    if len(files) != 1:
        names = ", ".join(path.name[:80] for path in files[:5])
        raise FileFormatError(
            f"the folder has several Jacobian lenses: {names}: send one of the files",
            code="unknown_layout",
        )
    held = load_tensors(files[0])
    if not is_jacobian_lens(held):
        raise FileFormatError(
            f"{files[0].name} has neither {_MATRICES!r} nor {_SUMS!r}, as a Jacobian lens has",
            code="unknown_layout",
        )
    config = _config(folder / CONFIG)
    return lens_of_held(held, files[0], options, model=_model(config))


def lens_of_held(
    held: Mapping[Any, Any], path: Path, options: ImportOptions, *, model: str | None = None
) -> Lens:
    """The lens in what a `.pt` file held. Raises `FileFormatError`."""
    options.refuse_placement("torch", "the lens")
    key, counted = (_MATRICES, "n_prompts") if _MATRICES in held else (_SUMS, "n_done")
    about = {str(name): value for name, value in held.items() if name not in (_MATRICES, _SUMS)}
    prompts = _count(about.pop(counted, None), counted)
    matrices = _matrices(key, held[key])
    _check_layers(about.pop("source_layers", None), matrices)
    _check_width(about.pop("d_model", None), key, matrices)
    _check_target(about.pop("target_layer", None), matrices)
    kept = {name: about.pop(name) for name in _KEPT if type(about.get(name)) is int}
    check_claims({name: one for name, one in about.items() if _plain(one)}, options)
    if key == _SUMS:
        matrices = {layer: one.float() / prompts for layer, one in matrices.items()}
    return Lens.of_jacobians(
        {layer + 1: one for layer, one in _needed(matrices).items()},
        model=model,
        provenance={
            "format": "jacobian-lens",
            "method": "jacobian-lens",
            "layer_offset": 1,
            "file_sha256": file_hash(path),
            "layer_names": {str(layer + 1): f"{key}[{layer}]" for layer in sorted(matrices)},
            "prompts": prompts,
            **kept,
        },
    )


def _count(value: Any, key: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_INTEGER:
        raise FileFormatError(
            f"{key!r} is {str(value)[:60]}; a lens is a mean over at least one prompt, whose "
            "number stands there",
            code="invalid_card",
        )
    return value


def _matrices(key: str, held: Mapping[Any, Any]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for layer, matrix in held.items():
        if (
            type(layer) is not int
            or not 0 <= layer < _MOST_LAYERS
            or not isinstance(matrix, Tensor)
        ):
            raise FileFormatError(
                f"{key}[{str(layer)[:60]!r}] is no matrix of a layer: a lens has one for each of "
                "its layers, numbered from 0",
                code="unknown_layout",
            )
        if matrix.layout != torch.strided or matrix.ndim != 2 or not matrix.is_floating_point():
            raise FileFormatError(
                f"{key}[{layer}] has the shape {list(matrix.shape)} and the type {matrix.dtype}; a "
                "dense matrix [d, d] of a float type is needed"
            )
        # float64 is of no use to anybody; other types are kept.
        small = matrix.to(torch.float32) if matrix.dtype == torch.float64 else matrix
        found[layer] = small.detach()
    if not found:
        raise FileFormatError(f"{key!r} holds no layer", code="unknown_layout")
    return found


def _check_layers(said: Any, matrices: Mapping[int, Tensor]) -> None:
    if said is None:
        return
    if not isinstance(said, list | tuple) or sorted(map(str, said)) != sorted(map(str, matrices)):
        raise FileFormatError(
            f"'source_layers' says {str(said)[:120]}, the file has the layers "
            f"{str(sorted(matrices))[:120]}",
            code="invalid_card",
        )


def _check_width(said: Any, key: str, matrices: Mapping[int, Tensor]) -> None:
    for layer, matrix in sorted(matrices.items()):
        width = len(matrix) if said is None else said
        if tuple(matrix.shape) != (width, width):
            raise FileFormatError(
                f"{key}[{layer}] has the shape {list(matrix.shape)}; "
                + ("it must be square" if said is None else f"'d_model' says {str(said)[:60]}"),
                code="invalid_card",
            )


def _check_target(said: Any, matrices: Mapping[int, Tensor]) -> None:
    """A lens that leads to a layer before the last cannot be told from one of a smaller model but
    by what it is tried on; one that leads nowhere can."""
    if said in (None, -1):
        return
    if type(said) is not int or not said >= max(matrices):
        raise unhonoured(
            "target_layer",
            said,
            "which the layers of the file do not lead up to",
            "fit a lens whose target is the last block (-1)",
        )


def _needed(matrices: dict[int, Tensor]) -> dict[int, Tensor]:
    """Without the last block's own output, which some write as an identity and which needs none."""
    last = max(matrices)
    one = matrices[last]
    same = len(matrices) > 1 and torch.equal(one.float(), torch.eye(len(one)))
    return {layer: matrix for layer, matrix in matrices.items() if layer != last or not same}


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise FileFormatError(f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        held = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise FileFormatError(f"{CONFIG} is not YAML: {str(error)[:200]}") from None
    if not isinstance(held, dict):
        raise FileFormatError(f"{CONFIG} does not hold an object")
    return held


def _model(config: Mapping[str, Any]) -> str | None:
    """The model that a configuration names, at its top or in one of its parts."""
    for part in (config, *(one for one in config.values() if isinstance(one, dict))):
        for key in _MODEL_KEYS:
            if isinstance(part.get(key), str):
                return str(part[key])[:300]
    return None
