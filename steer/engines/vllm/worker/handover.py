"""What gates decided, on its way through the stages of a pipeline beside the states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from steer.batch.gates import Decisions
from steer.engines.vllm.seams import replaced
from steer.engines.vllm.worker.steering import WorkerSteering

_OPENED, _READ = "steer_gates_opened", "steer_gates_read"
"""The names that decisions have among the tensors of a stage."""


@contextmanager
def handing_on(runner: Any, steering: WorkerSteering) -> Iterator[None]:
    """Inside the block, what gates decided comes to `runner`, a model runner of vLLM's, with the
    states that it is given, and goes on with those that it makes.

    A model that is not split into stages has nothing to hand on.
    """
    execute = runner.execute_model

    def execute_model(output: Any, given: Any = None, *args: Any, **named: Any) -> Any:
        # Names are here before the tensors are, and nobody waits for these without need.
        if given is not None and _OPENED in vars(given)["tensors"]:
            steering.receive(Decisions(given.tensors.pop(_OPENED), given.tensors.pop(_READ)))
        made = execute(output, given, *args, **named)
        states = getattr(made, "tensors", None)
        decided = None if states is None else steering.decisions()
        if decided is None:
            return made
        return type(made)({**states, _OPENED: decided.opened, _READ: decided.values})

    if steering.stages == 1:
        yield
        return
    with replaced(runner, "execute_model", execute_model):
        yield
