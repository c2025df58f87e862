"""What the chats of an arm ask to be read, and what their answers then hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.vllm.shapes import Shape

Answer = Mapping[str, Any]
TOP = 5
PLAIN, NOTHING = "plain vLLM", "nothing"


@dataclass(frozen=True)
class Artefacts:
    """What is shipped for a model and read here: vectors on one layer, and an SAE."""

    vectors: tuple[str, ...]
    layer: int
    sae: str


SHIPPED = {
    "smollm2": Artefacts(("cheerful", "concise", "poetic", "polite"), 14, "resid-14"),
    "demo": Artefacts(("french", "positive", "formal", "food"), 3, "resid-3"),
}


@dataclass(frozen=True)
class Arm:
    """`inspect` of every chat; `entries` say how many numbers an entry of its answer has in each
    field. `aim` is the largest cost over the chats that ask for nothing, as a share of their time.
    The `plain` arm's chats go to the server without the plugin."""

    name: str
    inspect: Mapping[str, Any] | None = None
    entries: Mapping[str, int] = field(default_factory=dict)
    aim: float | None = None
    plain: bool = False

    def body(self, chat: Sequence[Any], model: str, tokens: int) -> dict[str, Any]:
        """A chat of exactly so many greedy tokens."""
        asked = {} if self.inspect is None else {"inspect": dict(self.inspect)}
        return {
            "model": model,
            "messages": chat,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            **asked,
        }

    def check(self, answer: Answer, tokens: int) -> None:
        """Raises `RuntimeError` where an answer is not whole, or not what was asked for: every
        generated token that was fed, which is all but the last."""
        made = answer["usage"]["completion_tokens"]
        if made != tokens:
            raise RuntimeError(f"{self.name}: an answer has {made} tokens, not {tokens}")
        found = (answer.get("steering") or {}).get("readouts", [])
        wanted = tokens - 1 if self.inspect is not None else 0
        if len(found) != wanted:
            raise RuntimeError(f"{self.name}: an answer has {len(found)} entries, not {wanted}")
        for entry in found:
            counts = {name: count for name in self.entries if (count := _count(entry[name]))}
            if counts != dict(self.entries):
                raise RuntimeError(f"{self.name}: an entry has {counts}, not {self.entries}")


def _count(found: Sequence[Mapping[str, Any]]) -> int:
    """The numbers of one field, the ranked ones each counted once."""
    return sum(len(one["top"]) if "top" in one else 1 for one in found)


def arms(shape: Shape) -> tuple[Arm, ...]:
    """Plain vLLM, chats that ask for nothing, the same again as a control, and read-outs."""
    shipped = SHIPPED[shape.name]
    along = [{"vector": name, "layers": [shipped.layer]} for name in shipped.vectors]
    return (
        Arm(PLAIN, plain=True),
        Arm(NOTHING),
        Arm("nothing, again"),
        Arm("4 projections", {"projections": along}, {"projections": len(along)}, 0.02),
        Arm(
            f"top {TOP} features of {shipped.sae}",
            {"features": [{"sae": shipped.sae, "top": TOP}]},
            {"features": TOP},
            0.05,
        ),
        Arm(
            f"lens, top {TOP}",
            {"lens": {"layers": [shipped.layer], "top": TOP}},
            {"lens": TOP},
        ),
        Arm("norm", {"norms": [shipped.layer]}, {"norms": 1}),
    )
