"""The engines behind one client of vLLM's: more than one where it balances data-parallel ranks.

Each has a scheduler, a cache and workers of its own, and a request runs on one of them. vLLM's own
`collective_rpc` asks all and hands back what the first one said.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from steer.engines.vllm.internals import RANKS
from steer.engines.vllm.seams import check


async def ask_engines(client: Any, method: str, *args: Any) -> list[list[Any]]:
    """What the workers of each engine behind `client`, an `EngineClient`, answer; engines in the
    order of their ranks."""
    core: Any = getattr(client, "engine_core", None)
    engines = getattr(core, "core_engines", ())
    if len(engines) < 2:
        return [list(await client.collective_rpc(method, args=args))]
    _check_once()
    calls = (
        core._call_utility_async("collective_rpc", method, None, args, None, engine=engine)
        for engine in engines
    )
    return [list(answers) for answers in await asyncio.gather(*calls)]


@cache
def _check_once() -> None:
    check(*RANKS)
