"""What tensors and settings must be to make an SAE."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from steer.artefacts.control_vector import Card
from steer.artefacts.sae.architecture import Architecture
from steer.artefacts.sae.labels import FeatureLabel
from steer.artefacts.sae.storage.rows import FeatureRows
from steer.errors import FileFormatError


def check_shapes(
    encoder: FeatureRows,
    decoder: FeatureRows,
    small: Mapping[str, Tensor],
    kind: Architecture,
    *,
    writes_elsewhere: bool,
) -> None:
    """Raises `FileFormatError` unless the tensors agree; only what `writes_elsewhere` may write
    rows of another width than it reads."""
    if kind.needs_threshold and "threshold" not in small:
        raise FileFormatError(f"a {kind.name} SAE needs a threshold for every feature")
    for name, rows in (("W_enc", encoder), ("W_dec", decoder)):
        if len(rows.matrix.shape) != 2 or 0 in rows.matrix.shape:
            raise FileFormatError(
                f"{name} must be a matrix; its shape is {list(rows.matrix.shape)}"
            )
    d_sae, d_in = encoder.shape
    d_out = decoder.shape[1] if writes_elsewhere else d_in
    found = {"W_dec": list(decoder.shape), **{name: list(t.shape) for name, t in small.items()}}
    shapes = {
        "W_dec": [d_sae, d_out],
        "b_enc": [d_sae],
        "b_dec": [d_out],
        "threshold": [d_sae],
        "W_skip": [d_out, d_in],
    }
    for name, shape in found.items():
        if shape != shapes[name]:
            raise FileFormatError(
                f"{name} has the shape {shape}; beside W_enc {[d_in, d_sae]} it must be "
                f"{shapes[name]}",
                code="mixed_widths",
            )


def check_settings(
    kind: Architecture,
    k: int | None,
    d_sae: int,
    card: Card,
    subtract_b_dec: bool,
    has_skip: bool,
) -> None:
    """Raises `FileFormatError` for settings that the architecture or a transcoder cannot have."""
    if kind.needs_k and (k is None or not 1 <= k <= d_sae):
        raise FileFormatError(
            f"a {kind.name} SAE of {d_sae} features needs a k from 1 to {d_sae}; got {k!r}"
        )
    if kind.name == "groupmax" and k is not None and d_sae % k:
        raise FileFormatError(f"{d_sae} features are not {k!r} groups of one size")
    if card.write_site is None:
        if has_skip:
            raise FileFormatError("W_skip is a transcoder's: say in write_site where it writes")
        return
    if subtract_b_dec or kind.iterative:
        raise FileFormatError(
            "a transcoder's b_dec is of its output and not subtracted from its input; "
            f"subtract_b_dec is {subtract_b_dec!r} and the architecture {kind.name!r}"
        )


def check_numbers(encoder: FeatureRows, decoder: FeatureRows, small: Mapping[str, Tensor]) -> None:
    """Raises `FileFormatError` (`not_finite`); goes through all rows, block by block."""
    for name, tensor in small.items():
        if not bool(tensor.isfinite().all()):
            raise FileFormatError(f"{name} contains NaN or Inf", code="not_finite")
    for name, rows in (("W_enc", encoder), ("W_dec", decoder)):
        if name == "W_dec" or encoder is not decoder:
            rows.check(name)


def check_labels(labels: Mapping[int, FeatureLabel], d_sae: int) -> None:
    """Raises `FileFormatError` for labels of features that there are not."""
    wrong = sorted(feature for feature in labels if not 0 <= feature < d_sae)
    if wrong:
        raise FileFormatError(
            f"there are labels for the features {wrong[:5]}, but the SAE has features 0 to "
            f"{d_sae - 1}"
        )
