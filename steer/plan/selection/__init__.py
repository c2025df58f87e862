"""Which tokens an intervention touches: `Where`, resolved against a model, as masks.

A token is prompt or generation by its absolute position against the prompt's length, and by
nothing else. Chunked prefill, preemption and prefix caching change when a token is computed,
never what it is; so every mask here is a function of (position, prompt length, token id), and where
texts or roles are asked for also of the tokens before it and of the prompt's messages, which a
`TokenTrace` knows. How much of an edit a token gets (`Ramp`) is a function of the first two.
"""

from steer.plan.selection.counting import Counted, Factors, Lines, Ramp
from steer.plan.selection.resolving import NO_READER, TokenReader, resolve
from steer.plan.selection.tokens import (
    EVERYWHERE,
    FOREVER,
    Selection,
    factors_of,
    fixed_until,
    rules_selecting,
    trace_of,
)

__all__ = [
    "EVERYWHERE",
    "FOREVER",
    "NO_READER",
    "Counted",
    "Factors",
    "Lines",
    "Ramp",
    "Selection",
    "TokenReader",
    "factors_of",
    "fixed_until",
    "resolve",
    "rules_selecting",
    "trace_of",
]
