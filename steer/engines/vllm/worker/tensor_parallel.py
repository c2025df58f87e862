"""Sites whose rows lie on several tensor-parallel workers: every worker edits whole rows.

At a tap where the running pass edits or reads, the workers bring their parts together, each makes
the same edit of it, and each keeps its own part: dot products, norms and gates are those of the
whole row. A worker that did not come to such a tap would leave the others waiting for ever. All of
them run the same passes over the same requests, and whether a plan can be had is agreed upon here,
before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from steer.engines.vllm.options import KEY
from steer.engines.vllm.taps.inner_sites import InnerSite, Shard
from steer.errors import EngineError, Unsupported
from steer.plan.plan import SteeringPlan
from steer.spec import Site


def shards_of(inner: Sequence[InnerSite]) -> dict[Site, Shard]:
    """This worker's part of the sites that are split over its tensor-parallel group."""
    if all(one.workers == 1 for one in inner):
        return {}
    from vllm.distributed import (  # noqa: PLC0415
        get_tensor_model_parallel_rank,
        tensor_model_parallel_all_gather,
    )

    rank = get_tensor_model_parallel_rank()
    return {
        one.site: Shard(tensor_model_parallel_all_gather, rank, one.workers)
        for one in inner
        if one.workers > 1
    }


def own_rank(vllm_config: Any) -> tuple[int, int]:
    """This worker's rank in its tensor-parallel group, and how many there are."""
    ranks = int(vllm_config.parallel_config.tensor_parallel_size)
    if ranks == 1:
        return 0, 1
    from vllm.distributed import get_tensor_model_parallel_rank  # noqa: PLC0415

    return int(get_tensor_model_parallel_rank()), ranks


def load_together(load: Callable[[str], SteeringPlan]) -> Callable[[str], SteeringPlan]:
    """`load` for workers that bring rows together where a plan edits: one that has not got the plan
    would not come to the taps where the others wait for it, so then nobody has it."""
    from vllm.distributed import get_tp_group  # noqa: PLC0415

    def together(sha256: str) -> SteeringPlan:
        plan, error = None, None
        try:
            plan = load(sha256)
        except Exception as raised:  # the others are waiting
            error = raised
        lacking = torch.tensor(int(error is not None))
        torch.distributed.all_reduce(lacking, group=get_tp_group().cpu_group)
        if error is not None:
            raise error
        if plan is None or int(lacking):
            raise EngineError(
                f"{int(lacking)} of the tensor-parallel workers could not load the plan "
                f"{sha256!r}: give all of them the same registry"
            )
        return plan

    return together


def check_unsplit(inner: Sequence[InnerSite]) -> None:
    """Raises `Unsupported` for sites whose rows lie on several workers: a kernel in a CUDA graph
    sees its own worker's part alone."""
    for one in inner:
        if one.workers > 1:
            raise Unsupported(
                f"the rows of {one.site!r} are split over {one.workers} workers, and inside CUDA "
                "graphs nothing brings them together: start vLLM with --enforce-eager, or leave "
                f"the site out of additional_config[{KEY!r}]['sites']",
                code="cuda_graphs",
            )
