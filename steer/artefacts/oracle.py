"""Oracles: a model's own weights with a LoRA adapter that was trained to answer questions about
states that are put into its prompt (activation oracles, 2512.15674; LatentQA, 2412.08686)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from steer.artefacts.control_vector import Card, canonical_bytes, parse_canonical
from steer.artefacts.lora import Lora, lora_from
from steer.artefacts.oracle_form import OracleForm
from steer.errors import FileFormatError


@dataclass(frozen=True, eq=False)
class Oracle:
    """An adapter, and on its card the form in which it is asked.

    The card's `layers` are those whose states it can be shown, its `default_layers` those that it
    is asked about where nobody says, its `width` that of the states.
    """

    lora: Lora
    card: Card

    @staticmethod
    def of(lora: Lora, *, form: OracleForm, **card: Any) -> Oracle:
        """`card` holds any other field of `Card`; `width` and `layers` are among them."""
        return Oracle(lora, Card(**{"kind": "oracle", "oracle": form, **card}))

    @property
    def form(self) -> OracleForm:
        """How it is asked. Raises `FileFormatError` for a card without one."""
        if self.card.oracle is None:
            raise FileFormatError("an oracle's card says how it is asked ('oracle')")
        return self.card.oracle

    @cached_property
    def sha256(self) -> str:
        """The identity of the oracle: the hash of its canonical file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The canonical file: `lora.MODULE.down`, `.up` and `.scale`, and the card."""
        return canonical_bytes(self.lora.tensors, self.card)

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> Oracle:
        tensors, card = parse_canonical(data, name)
        return Oracle(lora_from(tensors), card)
