"""`python -m benchmarks.vllm.acceptance`: how many drafted tokens stay when answers are steered.

In vLLM's environment, on SmolLM2 with the ngram drafter: the same chats unsteered and under one
direction of several strengths, on every token or on the answer alone, greedily. What is counted are
tokens and passes, so the figures are the same on a machine however busy.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.vllm.pair import ENVIRONMENT
from steer.artefacts.control_vector import ControlVector
from steer.engines.transformers.checkpoints.found import find_model
from steer.registry.registry import Registry

LAYERS = range(12, 19)
STRENGTHS = (0.02, 0.05, 0.1, 0.2)
TEXT = (
    "The old lighthouse stands on a cliff above the harbour. Every evening the keeper climbs the "
    "stairs, lights the lamp, and writes the names of the passing ships into a book. In winter the "
    "storms are so loud that he cannot hear the radio, and he reads the book instead."
)
CHATS = (
    f"Copy this text word by word: {TEXT}",
    f"Copy this text, and replace 'keeper' by 'woman': {TEXT}",
    f"Summarise this text in one sentence: {TEXT}",
    f"Which words of this text begin with s? {TEXT}",
    "Write a list of the numbers from 1 to 30, separated by commas.",
    "Write a Python function that returns the larger of two numbers.",
    "What is the capital of France, and what is it known for?",
    "Write a short story about the sea.",
)
"""Half of them quote what was said, where an ngram drafter finds much, and half say new things."""


@dataclass
class Counts:
    """Sums over the answers to `CHATS`: tokens generated, drafted, and those that stayed."""

    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def share(self) -> float:
        """Of the drafted tokens, those that stayed."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def for_each_pass(self) -> float:
        """Tokens of an answer for each pass that computed one."""
        return self.tokens / (self.tokens - self.accepted)


def specs() -> dict[str, dict[str, Any] | None]:
    """What is compared, by name."""
    found: dict[str, dict[str, Any] | None] = {"unsteered": None}
    for phases in (None, ["generation"]):
        for share in STRENGTHS:
            item: dict[str, Any] = {"kind": "add", "vector": "v", "strength": {"norm": share}}
            name = f"{share} of the norm, {'answer' if phases else 'every token'}"
            where = {"where": {"phases": phases}} if phases else {}
            found[name] = {"interventions": [item | where]}
    return found


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 96,
    drafts: Annotated[int, typer.Option(help="Tokens drafted for each pass.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Counts what stays of the tokens that are drafted, unsteered and steered."""
    with tempfile.TemporaryDirectory() as folder:
        location = str(find_model("smollm2").location)
        with Registry.open(folder) as registry:
            registry.add("v", _direction(location))
        os.environ |= {**ENVIRONMENT, "VLLM_PLUGINS": "steer", "STEER_REGISTRY": folder}
        found = _counted(location, folder, tokens, drafts)
    table = Table("", "tokens", "drafted", "stayed", "share", "tokens for each pass")
    for name, one in found.items():
        counts = (one.tokens, one.drafted, one.accepted)
        table.add_row(name, *map(str, counts), f"{one.share:.2f}", f"{one.for_each_pass:.2f}")
    Console(width=120).print(table)
    if out is not None:
        out.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))


def _direction(location: str) -> ControlVector:
    """A random direction of a fixed seed, the same in every layer."""
    width = json.loads((Path(location) / "config.json").read_text())["hidden_size"]
    row = torch.randn(width, generator=torch.Generator().manual_seed(5))
    return ControlVector.of(dict.fromkeys(LAYERS, row / row.norm()))


def _counted(location: str, registry: str, tokens: int, drafts: int) -> Mapping[str, Counts]:
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - its environment is set by now

    from steer.engines.vllm.front.offline import Steered  # noqa: PLC0415

    llm = LLM(
        location,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=len(CHATS),
        block_size=32,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        per_request_spec_decode_metrics="summary",
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": drafts,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 2,
        },
    )
    steered = Steered(llm, registry=registry)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    chats = [[{"role": "user", "content": text}] for text in CHATS]
    return {
        name: _sums(steered.chat(chats, params, spec, use_tqdm=False))
        for name, spec in specs().items()
    }


def _sums(answers: Sequence[Any]) -> Counts:
    """By receipts where there are any, and for plain requests by what vLLM counts itself."""
    counts = Counts()
    for one in answers:
        (made,) = one.output.outputs
        counts.tokens += len(made.token_ids)
        if one.receipt is not None:
            counts.drafted += one.receipt.speculation.drafted
            counts.accepted += one.receipt.speculation.accepted
        else:
            told = made.spec_decode_metrics.to_dict()
            counts.drafted += told["num_draft_tokens"]
            counts.accepted += told["num_accepted_draft_tokens"]
    return counts


if __name__ == "__main__":
    typer.run(main)
