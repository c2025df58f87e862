"""For which model a catalogue is read: whose version a bare name means, and what lists show."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, FromClause, and_, case, literal

from steer.artefacts.control_vector import Card
from steer.model import ModelInfo, bare_name

EVERY_MODEL = "*"
"""Where lists are asked for one model's: those of all. No model is called so."""


@dataclass(frozen=True)
class ModelView:
    """One model's view of what is registered.

    `names` are all that cards may call the model, its own name first and each without folder or
    organisation; without any, it is nobody's view, to which everything is alike. `info` is the
    model's shape where it is known.
    """

    names: tuple[str, ...] = ()
    info: ModelInfo | None = None

    @classmethod
    def of(cls, model: ModelInfo | str, *also: str) -> ModelView:
        """The view of `model`, which may `also` be called so."""
        info = None if isinstance(model, str) else model
        names = (model,) if isinstance(model, str) else model.names
        return cls(tuple(dict.fromkeys(map(bare_name, (*names, *also)))), info)

    @property
    def own_name(self) -> str | None:
        """What is registered here for this model alone says so by this name."""
        return self.names[0] if self.names else None

    @property
    def everyones(self) -> bool:
        """Whether it is no model's in particular."""
        return not self.names

    def names_of(self, model: str) -> tuple[str, ...]:
        """All names of the model called `model`, as far as they are known here."""
        name = bare_name(model)
        return self.names if name in self.names else (name,)

    def of_card(self, card: Card) -> ModelView:
        """The view of the model that `card` names; this one where it names none."""
        return ModelView(self.names_of(card.model)) if card.model else self

    def holds(self, model: str | None) -> bool:
        """Whether what is for `model` (None: for all) is for this one."""
        return self.everyones or not model or bare_name(model) in self.names

    def is_for(self, card: Card) -> bool:
        """Whether an artefact is for this model: its card names it, or names none and has a width
        that this model has."""
        if not self.holds(card.model):
            return False
        widths = self._widths
        return bool(card.model) or widths is None or card.width in widths

    def can_use(self, card: Card) -> bool:
        """False where this model must refuse the artefact, whatever model it was made for: by its
        width or its layers. Where the shape is not known, one that is another model's."""
        info = self.info
        if info is None:
            return self.is_for(card)
        if card.site not in info.sites:
            return True
        return card.width == info.width(card.site) and min(card.layers) < info.n_layers

    def best_first(self, rows: FromClause) -> list[ColumnElement[int]]:
        """The order of a name's versions: those for this model before others, newest first."""
        newest = rows.c.version.desc()
        return [newest] if self.everyones else [self._rank(rows).desc(), newest]

    def is_better(self, rows: FromClause, than: FromClause) -> ColumnElement[bool]:
        """Whether a row comes before another one of the same name."""
        newer = rows.c.version > than.c.version
        if self.everyones:
            return newer
        ranks = self._rank(rows), self._rank(than)
        return (ranks[0] > ranks[1]) | and_(ranks[0] == ranks[1], newer)

    def is_listed(self, rows: FromClause) -> ColumnElement[bool] | None:
        """Whether lists show a row: unless its card names another model. None for all rows."""
        if self.everyones:
            return None
        return rows.c.model.is_(None) | rows.c.model.in_(self.names)

    def is_own(self, rows: FromClause) -> ColumnElement[bool] | None:
        """Whether a row is for this model (`is_for`). None for all rows."""
        if self.everyones:
            return None
        unnamed: ColumnElement[bool] = rows.c.model.is_(None)
        if (widths := self._widths) is not None:
            unnamed &= rows.c.width.in_(sorted(widths))
        return unnamed | rows.c.model.in_(self.names)

    @property
    def _widths(self) -> frozenset[int] | None:
        """Of the states at every site; None where the shape is not known."""
        info = self.info
        return None if info is None else frozenset(map(info.width, info.sites))

    def _rank(self, rows: FromClause) -> ColumnElement[int]:
        """1 for a row that is for this model, 0 for others."""
        own = self.is_own(rows)
        return literal(1) if own is None else case((own, 1), else_=0)


EVERYONE = ModelView()
"""The view of no model in particular."""
