"""Examples that teach a probe and examples that try it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.concepts.codebook import Codebook
from steer.artefacts.concepts.form import MOST_NAMES, ProbeMeasures, RoleAccuracy
from steer.artefacts.concepts.network import CodeNetwork
from steer.errors import SpecError, TooLarge

Pairs = Mapping[str, str]
"""What a text says: fillers by their roles."""


@dataclass(frozen=True)
class ProbeLesson:
    """What each example says, and by number which of them teach and which try."""

    pairs: Sequence[Pairs]
    taught: tuple[int, ...]
    tried: tuple[int, ...]
    codebook: Codebook

    @staticmethod
    def of(pairs: Sequence[Pairs], held_out: int, codebook: Codebook) -> ProbeLesson:
        """`held_out` of the examples, drawn by the codebook's seed and at least one, try.

        Raises `SpecError` (`one_filler`) at `/examples` where there is nothing to tell apart, and
        `TooLarge` for more names than a probe knows.
        """
        drawn = torch.Generator().manual_seed(codebook.seed)
        order = torch.randperm(len(pairs), generator=drawn).tolist()
        held = max(held_out, 1)
        lesson = ProbeLesson(
            pairs, tuple(sorted(order[held:])), tuple(sorted(order[:held])), codebook
        )
        names = max(len(lesson.fillers), len(lesson.roles))
        if len(lesson.fillers) < 2:
            raise SpecError(
                f"all examples have the one filler {lesson.fillers[0]!r}: a probe tells fillers "
                "apart",
                param="/examples",
                code="one_filler",
            )
        if names > MOST_NAMES:
            raise TooLarge(
                f"the examples have {names} names, and a probe knows at most {MOST_NAMES} fillers "
                "and as many roles: give fewer",
                param="/examples",
            )
        return lesson

    @property
    def fillers(self) -> tuple[str, ...]:
        return tuple(sorted({filler for one in self.pairs for filler in one.values()}))

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(sorted({role for one in self.pairs for role in one}))

    def codes(self) -> Float[Tensor, "taught dimensions"]:
        """Those of the examples that teach."""
        return torch.stack([self.codebook.bundle(self.pairs[n]) for n in self.taught])

    def shuffled_codes(self) -> Float[Tensor, "taught dimensions"]:
        """The same, given to one another by chance: what a probe of them finds is none of what the
        texts say."""
        drawn = torch.Generator().manual_seed(self.codebook.seed + 1)
        return self.codes()[torch.randperm(len(self.taught), generator=drawn)]

    def measured(
        self, inputs: Float[Tensor, "N width"], taught: CodeNetwork, shuffled: CodeNetwork
    ) -> ProbeMeasures:
        """How both networks do on the examples that try; `inputs` are of all examples."""
        chosen = inputs[list(self.tried)]
        codes = [one.code(chosen) for one in (taught, shuffled)]
        roles = tuple(self._accuracy(codes, role) for role in self.roles)
        total = sum(one.pairs for one in roles)

        def over_all(name: str) -> float | None:
            parts = [(getattr(one, name), one.pairs) for one in roles if one.pairs]
            return sum(share * count for share, count in parts) / total if total else None

        return ProbeMeasures(
            trained=len(self.taught),
            held_out=len(self.tried),
            accuracy=over_all("accuracy"),
            shuffled=over_all("shuffled"),
            commonest=over_all("commonest"),
            roles=roles,
        )

    def _accuracy(
        self, codes: Sequence[Float[Tensor, "tried dimensions"]], role: str
    ) -> RoleAccuracy:
        pairs, fillers = self.pairs, self.fillers
        taught = Counter(pairs[n][role] for n in self.taught if role in pairs[n])
        asked = [(k, pairs[n][role]) for k, n in enumerate(self.tried) if role in pairs[n]]
        known = [(k, filler) for k, filler in asked if filler in taught]
        if not known:
            return RoleAccuracy(role=role, pairs=0, unseen=len(asked))
        rights = []
        for one in codes:
            best = self.codebook.filler_cosines(one, role, fillers).argmax(-1).tolist()
            rights.append(sum(fillers[best[k]] == filler for k, filler in known) / len(known))
        often = min(taught, key=lambda name: (-taught[name], name))
        return RoleAccuracy(
            role=role,
            pairs=len(known),
            unseen=len(asked) - len(known),
            accuracy=rights[0],
            shuffled=rights[1],
            commonest=sum(filler == often for _, filler in known) / len(known),
        )
