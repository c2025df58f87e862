"""Which requests of a step Python steers, so that the step runs without its CUDA graph.

All workers must say the same of a step: stages of a pipeline pad alike with a graph and without one
only if all of them choose alike. So it follows from the tickets in the step and from how many
tokens of each it computes, which vLLM tells every worker, and from options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer.engines.vllm.ticket import Ticket

Scheduled = Sequence[tuple[Ticket, int]]
"""The requests of a step that have tickets, and how many tokens of each it computes."""


@dataclass(frozen=True)
class GraphRoom:
    """What kernels have room for: `latents` of TopK SAEs, ranked by the tokens of one step."""

    latents: int

    def full(self, scheduled: Scheduled) -> bool:
        """Whether a step ranks more. Python then steers all in it that rank: a matrix product reads
        the SAE once, a kernel once for each token."""
        ranked = (
            ticket.latents * tokens
            for ticket, tokens in scheduled
            if not self.excludes(ticket, tokens, full=False)
        )
        return sum(ranked) > self.latents

    def excludes(self, ticket: Ticket, tokens: int, *, full: bool) -> bool:
        """Whether Python steers this request in a step that computes so many `tokens` of it, and
        that is `full` or not: states leave a pass in Python alone, as what no kernel does is done
        in Python alone, and an SAE may have more latents than there is room for. A kernel's program
        sees one token, so whether an onward gate was opened by the token before is known to it only
        where that was computed in an earlier step."""
        if ticket.onward and tokens > 1:
            return True
        reads = ticket.capture is not None or ticket.readouts is not None
        alone = reads or ticket.graphless
        return alone or ticket.latents > (0 if full else self.latents)
