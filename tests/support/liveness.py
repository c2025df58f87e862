"""How long a test waits for something that has to happen.

No test depends on how fast a machine is. What it waits for is told to it, by an event, a barrier or
an answer, or brought about by the test itself. The bound here only makes what never comes a failure
and not a hang: it is hundreds of times what anything takes, so that a machine many times slower
passes, and reaching it is a fault and never bad luck.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Seen = TypeVar("Seen")

LIVENESS_SECONDS = 900.0

VLLM_BOUNDS = dict.fromkeys(
    (
        "VLLM_ENGINE_READY_TIMEOUT_S",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS",
        "VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT",
        "VLLM_REGEX_COMPILATION_TIMEOUT_S",
        "VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
    ),
    str(int(LIVENESS_SECONDS)),
)
"""vLLM's own bounds, as its environment sets them: some are a second or five."""


def eventually(look: Callable[[], Seen], wanted: Callable[[Seen], bool]) -> Seen:
    """What `look` sees once it is as `wanted`.

    For what another process does and tells nobody; in this process, wait for an event. Raises
    `AssertionError`, with what was seen last, where that never comes.
    """
    until = time.monotonic() + LIVENESS_SECONDS
    while not wanted(seen := look()):
        assert time.monotonic() < until, f"it stays {seen!r}"
        time.sleep(0.02)
    return seen
