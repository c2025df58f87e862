"""What comes out when a vector is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.artefacts.control_vector import ControlVector
from steer.fit.data.instruction import Placement
from steer.fit.make.asking import NEUTRAL
from steer.fit.make.checking import Check
from steer.fit.make.choosing import Choice
from steer.fit.make.wish import Wish


@dataclass(frozen=True)
class Made:
    """A vector, how it was chosen, and what it does on questions of its own.

    `place` is where the model was told, `obedience` how often an answer of the told model has a
    greater gain than one of the model that was told the opposite, `said_kl` how far the words move
    the model, in nats.
    """

    vector: ControlVector
    wish: Wish
    place: Placement
    obedience: float
    said_kl: float
    choice: Choice
    check: Check
    notes: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether it does more than chance at the same KL; only then is it called steering."""
        return self.check.comparison.above_null is True

    def as_json(self) -> dict[str, Any]:
        """Everything, for a report."""
        return {
            "vector": self.vector.card.name,
            "sha256": self.vector.sha256,
            "instruction": self.wish.instruction,
            "opposite": self.wish.opposite or NEUTRAL,
            "place": self.place,
            "obedience": self.obedience,
            "instruction_kl": self.said_kl,
            "chosen": self.choice.best.as_json(),
            "trials": [one.as_json() for one in self.choice.trials],
            "run_off": [one.as_json() for one in self.choice.run_off],
            "check": self.check.as_json(),
            "works": self.works,
            "notes": list(self.notes),
        }
