"""vLLM's own adapters (LoRA), where Steer asks something of the model without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.engines.vllm.internals import ADAPTERS
from steer.engines.vllm.seams import check
from steer.engines.vllm.taps.layouts import Unembed


def without_adapters(runner: Any, unembed: Unembed) -> Unembed:
    """`unembed` of the model that the adapters of `runner`, a model runner of vLLM's, go with.

    With adapters vLLM's logits are those of the batch that ran last: row i by the adapter of its
    request i. So rows that belong to no batch are said to belong to none.
    """
    if runner.lora_config is None:
        return unembed
    check(*ADAPTERS)
    most = runner.vllm_config.scheduler_config.max_num_seqs

    def plain(states: Tensor) -> Tensor | None:
        found = []
        for rows in torch.split(states, most):
            nobody = (0,) * len(rows)
            runner._set_active_loras(nobody, nobody, set())
            found.append(unembed(rows))
        whole = [one for one in found if one is not None]
        return torch.cat(whole) if len(whole) == len(found) else None

    return plain
