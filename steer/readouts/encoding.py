"""An SAE made ready to encode many tokens: on the device that they are on, or with a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.storage.rows import FeatureRows, held_rows
from steer.errors import IncompatibleArtefact, Unsupported


def encoder_bytes(sae: SAE) -> int:
    """What `encoder_on` takes."""
    return 4 * sae.d_sae * sae.d_in


def encoder_on(sae: SAE, device: torch.device) -> SAE:
    """`sae` as it encodes on `device`, its encoder in memory there; nothing else is promised of it.

    Matching pursuit goes back and forth between its rows and the token, and stays on the CPU.
    """
    if sae.pursuit is not None:
        return sae
    threshold = None if sae.threshold is None else sae.threshold.to(device)
    return replace(
        sae,
        encoder=FeatureRows(sae.encoder.take(None).to(device)),
        b_enc=sae.b_enc.to(device),
        b_dec=sae.b_dec.to(device),
        threshold=threshold,
    )


def part_of(sae: SAE, features: Sequence[int]) -> SAE:
    """An SAE of these features alone, which encodes them as the whole one does, at O(k·d).

    Raises `IncompatibleArtefact` (`feature_out_of_range`), and `Unsupported` (`competitive_sae`)
    where features compete, so that none can be read without the others.
    """
    if sae.competitive:
        raise Unsupported(
            f"the features of the SAE {sae.card.name!r} compete with one another: none is read "
            "without the others",
            code="competitive_sae",
        )
    for feature in features:
        if not 0 <= feature < sae.d_sae:
            raise IncompatibleArtefact(
                f"feature {feature} is out of range: the SAE {sae.card.name!r} has features 0 to "
                f"{sae.d_sae - 1}",
                code="feature_out_of_range",
            )
    chosen = torch.tensor(list(features), dtype=torch.long)
    return replace(
        sae,
        encoder=held_rows(sae.encoder.take(features)),
        decoder=held_rows(torch.zeros(len(chosen), sae.d_out)),
        b_enc=sae.b_enc[chosen],
        threshold=None if sae.threshold is None else sae.threshold[chosen],
        labels={},
    )
