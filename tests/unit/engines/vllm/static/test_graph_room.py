"""Which requests keep a step from running in its graph."""

from __future__ import annotations

import pytest

from steer.engines.vllm.static.graph_room import GraphRoom, Scheduled
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.model import HookPoint

PLAIN = Ticket("plain")
SMALL, LARGE = Ticket("small", latents=10), Ticket("large", latents=60)
HUGE = Ticket("huge", latents=101)
APART = Ticket("apart", latents=10, graphless=True)
ONWARD = Ticket("onward", latents=10, onward=2)
READ = Ticket("read", latents=10, capture=CaptureOrder((HookPoint(0),), (0,)))


@pytest.mark.parametrize(
    ("scheduled", "excluded"),
    [
        ([], []),
        ([(PLAIN, 5000)], []),
        ([(SMALL, 10), (PLAIN, 1)], []),
        ([(SMALL, 11), (PLAIN, 1)], [SMALL]),
        ([(SMALL, 4), (LARGE, 1)], []),
        ([(SMALL, 5), (LARGE, 1)], [SMALL, LARGE]),
        ([(SMALL, 10), (HUGE, 1)], [HUGE]),  # those who never have room take none from others
        ([(SMALL, 10), (READ, 9), (PLAIN, 1)], [READ]),
        ([(SMALL, 10), (APART, 9), (PLAIN, 1)], [APART]),
        ([(SMALL, 9), (ONWARD, 1)], []),
        ([(SMALL, 10), (ONWARD, 2)], [ONWARD]),  # its second token may hang on its first
        ([(SMALL, 10), (ONWARD, 1)], [SMALL, ONWARD]),
    ],
)
def test_a_step_has_room_for_so_many_latents(scheduled: Scheduled, excluded: list[Ticket]) -> None:
    room = GraphRoom(100)
    full = room.full(scheduled)
    assert [ticket for ticket, n in scheduled if room.excludes(ticket, n, full=full)] == excluded


def test_without_room_whoever_ranks_is_excluded() -> None:
    room = GraphRoom(0)
    assert not room.full([(SMALL, 1), (PLAIN, 1)])
    assert room.excludes(SMALL, 1, full=False)
    assert not room.excludes(PLAIN, 1, full=False)
