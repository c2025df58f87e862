"""The states that wait for a twin, and what two of them say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steer.errors import EngineError
from steer.model import HookPoint, ModelInfo
from steer.readouts.readers import Instruments
from steer.readouts.twins import KeptStates, chosen_at, divergences

INFO = ModelInfo(
    name="tiny",
    architecture="Tiny",
    n_layers=3,
    d_model=4,
    vocab_size=11,
    max_length=64,
    dtype="float32",
    sites=("resid_post",),
)
WHOLE = slice(0, 4)


def rows(*values: float) -> np.ndarray:
    return np.array([[value] * 4 for value in values], dtype=np.float32)


def test_they_are_kept_from_the_prompts_last_token_on() -> None:
    kept = KeptStates(INFO, 5)
    assert chosen_at(INFO) == HookPoint(2, "resid_post")
    assert list(kept.wanted(0, 3)) == []
    assert list(kept.wanted(3, 4)) == [4, 5, 6]
    assert list(kept.wanted(8, 2)) == [8, 9]
    assert list(KeptStates(INFO, 5, lambda _: False).wanted(3, 4)) == []


def test_what_is_computed_again_replaces_what_did_not_stay() -> None:
    """Drafts and preemptions: the last state of a position is the one that stayed."""
    kept = KeptStates(INFO, 3)
    kept.put(range(2, 6), WHOLE, rows(2, 3, 40, 50))
    kept.put(range(4, 5), WHOLE, rows(4))
    assert kept.take(5)[:, 0].tolist() == [2, 3, 4]


def test_a_row_does_not_hold_on_to_its_batch() -> None:
    kept, batch = KeptStates(INFO, 1), rows(1, 2)
    kept.put(range(2), WHOLE, batch)
    batch[:] = 9
    assert kept.take(2)[:, 0].tolist() == [1, 2]


def test_a_state_that_is_missing_withholds_the_answer() -> None:
    kept = KeptStates(INFO, 3)
    kept.put(range(2, 3), WHOLE, rows(2))
    with pytest.raises(EngineError, match="position 3") as caught:
        kept.take(4)
    assert caught.value.code == "readouts_missed"
    failed = KeptStates(INFO, 3)
    failed.fail("no state passed 2.resid_post")
    with pytest.raises(EngineError, match="no state passed"):
        failed.take(3)


@pytest.mark.parametrize("vocabulary", [11, 1 << 21, 1 << 23])
def test_divergences_are_those_of_float64_in_whatever_pieces(vocabulary: int) -> None:
    """A large vocabulary is read two rows at a time, or one."""
    draw = torch.Generator().manual_seed(1)
    head = torch.randn(11, 4, generator=draw)
    mine, theirs = (torch.randn(5, 4, generator=draw) for _ in range(2))
    tools = Instruments(torch.device("cpu"), lambda states: states @ head.T, vocab_size=vocabulary)
    p, q = ((x.double() @ head.double().T).log_softmax(-1) for x in (mine, theirs))
    wanted = (p.exp() * (p - q)).sum(-1).tolist()
    assert divergences(mine, theirs, tools) == pytest.approx(wanted, abs=1e-6)
    assert divergences(mine, mine, tools) == pytest.approx([0.0] * 5, abs=1e-12)


def test_a_worker_that_gets_no_logits_takes_part_to_the_end() -> None:
    calls: list[int] = []
    tools = Instruments(
        torch.device("cpu"), lambda states: calls.append(len(states)), vocab_size=1 << 23
    )
    states = torch.zeros(3, 4)
    assert divergences(states, states, tools) is None
    assert calls == [1] * 6
