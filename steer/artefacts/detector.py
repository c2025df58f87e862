"""Detectors: a linear probe at one hook point that says whether something is going on there.

    s_t = ⟨w, x_t⟩ + b               the score of a token, a logit: higher is more
    p_t = max or mean of s over the last n tokens up to t, of fewer where there are fewer
    fires at the first token with p_t > threshold

A feature of an SAE is one too: its encoder row, with b_dec and scales folded in.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import Card, canonical_bytes, check_rows, parse_canonical
from steer.artefacts.detection import Detection, Pooling
from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, Unsupported
from steer.model import HookPoint

FIRST_WATCHED = 1
"""The first position of a sequence that a detector looks at. The token before it has seen nothing
but itself, and in many models its state is a hundred times as long as others' (2402.17762): where
it is always the same one it would fire always, or hide what fires behind it."""


@dataclass(frozen=True, eq=False)
class Detector:
    """A row w `[d]` float32, the bias b, and the threshold that a score must exceed.

    Guarantees: finite, w not zero, one layer on the card, and a `detection` on it.
    """

    direction: Float[Tensor, " d"]
    bias: float
    threshold: float
    card: Card

    @staticmethod
    def of(
        direction: Tensor,
        *,
        layer: int,
        bias: float = 0.0,
        threshold: float = 0.0,
        detection: Detection | None = None,
        **card: Any,
    ) -> Detector:
        """A checked detector; `card` holds any other field of `Card`. Raises `FileFormatError`."""
        row = direction.detach().to(torch.float32, copy=True).cpu().contiguous()
        width = check_rows([(layer, row)], source="the detector")
        for name, value in (("bias", bias), ("threshold", threshold)):
            if not math.isfinite(_float32(value)):
                raise FileFormatError(
                    f"the detector's {name} ({value!r}) is not a finite float32 number",
                    code="not_finite",
                )
        described = {
            "kind": "detector",
            "width": width,
            "layers": (layer,),
            "detection": detection or Detection(),
            **card,
        }
        return Detector(row, _float32(bias), _float32(threshold), Card(**described))

    @staticmethod
    def of_feature(
        sae: SAE, feature: int, *, threshold: float | None = None, detects: str = "", **card: Any
    ) -> Detector:
        """The detector that one feature of `sae` is, which needs the SAE no longer.

        The score is the feature's pre-activation, and above the threshold, which is the feature's
        own unless a higher one is given, its activation. Raises `IncompatibleArtefact`
        (`feature_out_of_range`), and `Unsupported` (`unsupported_architecture`) for features that
        are more than a fixed law of their own row.
        """
        if sae.competitive or sae.pursuit is not None or sae.signed:
            raise Unsupported(
                f"the features of a {sae.architecture!r} SAE depend on the token's other features: "
                "a detector can be made of those of a standard, jumprelu or gated SAE",
                code="unsupported_architecture",
            )
        if sae.measure != "product":
            raise Unsupported(
                f"the SAE normalises each token ({sae.normalize!r}), so that its features are not "
                "linear in the state: a detector can be made of those of an SAE that does not",
                code="per_token_normalisation",
            )
        reads = sae.reads([feature])
        least = float(reads.threshold[0])
        if threshold is not None and threshold < least:
            raise FileFormatError(
                f"the threshold {threshold!r} is below the feature's own, {least:.6g}, under which "
                "it is not active: give a higher one, or none",
                code="invalid_value",
            )
        label = sae.labels.get(feature)
        text = detects or (label.text if label is not None else "")
        return Detector.of(
            reads.read[0],
            layer=sae.layer,
            bias=float(reads.bias[0]),
            threshold=least if threshold is None else threshold,
            detection=Detection(detects=text, source="feature"),
            site=sae.site,
            model=sae.card.model,
            provenance={"sae_sha256": sae.sha256, "feature": feature},
            **card,
        )

    @property
    def point(self) -> HookPoint:
        """Where it reads."""
        return HookPoint(self.card.layers[0], self.card.site)

    @property
    def detection(self) -> Detection:
        """How it pools, and how well it tells."""
        assert self.card.detection is not None, "checked when the detector was read"
        return self.card.detection

    def scores(self, states: Float[Tensor, "T d"]) -> Float[Tensor, " T"]:
        """s of each token, float32."""
        return states.float() @ self.direction.to(states.device) + self.bias

    def window(self) -> ScoreWindow:
        """The pooling of one sequence, at its beginning."""
        return ScoreWindow(self.detection.pooling, self.detection.last)

    @cached_property
    def sha256(self) -> str:
        """The identity of the detector: the hash of its canonical file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The canonical file: `layers.N.direction` `[d]`, `.bias` and `.threshold` `[1]`; and the
        card."""
        at = f"layers.{self.card.layers[0]}"
        return canonical_bytes(
            {
                f"{at}.direction": self.direction,
                f"{at}.bias": torch.tensor([self.bias]),
                f"{at}.threshold": torch.tensor([self.threshold]),
            },
            self.card,
        )

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> Detector:
        tensors, card = parse_canonical(data, name)
        at = f"layers.{card.layers[0]}"
        return Detector(
            tensors[f"{at}.direction"],
            float(tensors[f"{at}.bias"]),
            float(tensors[f"{at}.threshold"]),
            card,
        )


@dataclass
class ScoreWindow:
    """The scores of the last tokens of one sequence, pooled.

    Guarantees: what comes out depends on the scores in their order alone, whatever pieces they came
    in; a mean is exact before it is rounded once.
    """

    pooling: Pooling
    last: int
    _scores: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self._scores = deque(maxlen=self.last)

    def push(self, score: float) -> float:
        """The pooled score at the next token, whose own score this is; NaN where one of them is."""
        self._scores.append(score)
        if any(map(math.isnan, self._scores)):
            return math.nan
        if self.pooling == "max":
            return max(self._scores)
        # One infinite score of either sign would end `fsum` with an error.
        if not all(map(math.isfinite, self._scores)):
            return sum(self._scores)
        return math.fsum(self._scores) / len(self._scores)


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
