"""The shipped demo model, its vectors, SAE and profiles: a quick part of `make demo-eval`.

The same measures as there on few prompts. A threshold counts as kept where the 95 % interval of
what was measured reaches it: so a model that meets it passes, and one that is broken does not.
What the model is known to miss is named here and in docs/results.md; `make demo-eval` fails for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from steer_vectors.demo.recipe.evaluation.checks import Check
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.groups import GROUPS, opened

FOLDER = Path(__file__).parents[2] / "vectors" / "demo"
PROMPTS = 24
KNOWN_TO_MISS = {
    "capital's token at layer 3",
    "capital's token at layer 4",
    "facts of a person: source layers that extract it",
}
"""What a name stands for is read at the name in blocks 0 to 2 and said only after that: so the
logit lens sees it late."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with opened(FOLDER, PROMPTS) as loaded:
        yield loaded


@pytest.mark.parametrize("group", GROUPS)
def test_the_thresholds_are_kept_within_sampling_error(demo: Demo, group: str) -> None:
    checks = [check for measure in GROUPS[group] for check in measure(demo)]
    assert any(check.bound is not None and not check.part for check in checks)
    missed = [one for one in checks if not (one.part or one.within_error)]
    assert [_row(one) for one in missed if one.what not in KNOWN_TO_MISS] == []


def _row(check: Check) -> str:
    measured = check.measured
    return f"{check.what}: {measured.value:.3f} ({measured.low:.3f} to {measured.high:.3f})"
