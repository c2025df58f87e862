"""Steer on vLLM's own OpenAI server: `VLLM_PLUGINS=steer`, and vLLM loads this.

vLLM only logs an endpoint plugin that it cannot import or make, and would go on without it. So
nothing here is imported before vLLM calls `attach_router`, from where an error ends the start.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any


class SteerEndpoints:
    """The entry point in `vllm.endpoint_plugins`."""

    name = "steer"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Adds Steer's routes, in place of vLLM's where both have one."""
        from steer_server.http.request_id import RequestId  # noqa: PLC0415
        from steer_server.http.shutdown import AnswerCutOff  # noqa: PLC0415
        from steer_server.vllm.doors import add_doors  # noqa: PLC0415
        from steer_server.vllm.ignored_field import RefuseIgnoredField  # noqa: PLC0415
        from steer_server.vllm.mounting import add_bounds, describe, mount, routers  # noqa: PLC0415

        for router in routers():
            mount(app, router)
        app.add_middleware(RefuseIgnoredField)
        add_bounds(app, os.environ)
        add_doors(app)
        app.add_middleware(AnswerCutOff)
        app.add_middleware(RequestId)
        describe(app, os.environ)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Opens the registry, and takes its place before the engine."""
        from steer_server.vllm.doors import keys_of  # noqa: PLC0415
        from steer_server.vllm.mounting import serve  # noqa: PLC0415

        state.steer_keys = keys_of(args, os.environ)
        await serve(engine_client, state, os.environ)
