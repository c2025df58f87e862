"""Codes: what the paper's arithmetic gives, on random codes."""

from __future__ import annotations

import pytest
import torch

from steer.artefacts.concepts.codebook import Codebook

FILLERS = [f"filler {n}" for n in range(3000)]


def test_two_pairs_are_read_back_among_three_thousand_codes() -> None:
    """Each of two bundled pairs comes back with a cosine of .50, and no other code is near."""
    book = Codebook()
    right, own, others = 0, [], []
    for n in range(20):
        pairs = {"country": FILLERS[n], "capital": FILLERS[1000 + n]}
        bundled = book.bundle(pairs)[None]
        for role, filler in pairs.items():
            cosines = book.filler_cosines(bundled, role, FILLERS)[0]
            place = FILLERS.index(filler)
            right += int(cosines.argmax()) == place
            own.append(float(cosines[place]))
            cosines[place] = -1.0
            others.append(float(cosines.max()))
    assert right == 40
    assert sum(own) / 40 == pytest.approx(0.50, abs=0.01)
    assert max(others) < 0.1
    assert sum(others) / 40 == pytest.approx(0.055, abs=0.015)


def test_two_fifths_of_flipped_channels_still_tell_the_filler() -> None:
    book, drawn = Codebook(), torch.Generator().manual_seed(0)
    right = 0
    for n in range(100):
        bundled = book.bundle({"country": FILLERS[n], "capital": FILLERS[1000 + n]})
        flipped = torch.rand(book.dimensions, generator=drawn) < 0.4
        noisy = torch.where(flipped, -bundled, bundled)[None]
        right += int(book.filler_cosines(noisy, "country", FILLERS).argmax()) == n
    assert right >= 97


def test_codes_are_of_their_names_alone() -> None:
    book = Codebook()
    code = book.code("filler", "France")
    assert set(code.tolist()) == {-1.0, 1.0}
    assert torch.equal(code, Codebook().codes("filler", ["Italy", "France"])[1])
    for other in (book.code("role", "France"), Codebook(seed=1).code("filler", "France")):
        assert abs(float(code @ other)) / book.dimensions < 0.08
    one, other = {"a": "x", "b": "y"}, {"b": "y", "a": "x"}
    assert torch.equal(book.bundle(one), book.bundle(other))
    assert torch.equal(book.bundle({"a": "x"}), book.code("role", "a") * book.code("filler", "x"))
