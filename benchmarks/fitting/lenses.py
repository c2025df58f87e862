"""How far is what each lens reads from what the model says in the end?

    python -m benchmarks.fitting.lenses --model smollm2
    python -m benchmarks.fitting.lenses --data vectors/demo/data/heldout.jsonl --skip 4

A tuned and Jacobian lenses (of several averages) are fitted on the same texts: pages of CPython's
documentation, or those of `--data`. On tokens of other texts, for what goes into each block: the
mean KL(model ‖ lens) in nats, and the share of tokens at which the lens's likeliest token is the
model's own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from torch import Tensor

from steer.artefacts.lens import Lens
from steer.cli.local import running_engine
from steer.engines.base import Engine
from steer.fit import fit_jacobian_lens, fit_tuned_lens
from steer.fit.methods.lenses.yardstick import Yardstick
from steer.fit.states import prompt_tokens
from steer.prompts import Prompt

LETTERS = 500
MEASURING = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="steer-demo")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--texts", type=int, default=80)
    parser.add_argument("--average", default="2,8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--skip", type=int, default=16)
    given = parser.parse_args()
    texts = _texts(given.data)[: given.texts]
    fitted, fresh = texts[: len(texts) * 3 // 4], texts[len(texts) * 3 // 4 :]
    with running_engine(given.model) as engine:
        lenses = {"tuned lens": fit_tuned_lens(engine, fitted, name="tuned", steps=0)}
        for average in map(int, given.average.split(",")):
            lenses[f"Jacobian lens, {average} texts a row"] = fit_jacobian_lens(
                engine,
                fitted,
                name="jacobian",
                average=average,
                tokens=given.tokens,
                skip=given.skip,
            )
        _print(engine, lenses, fresh)


def _texts(data: Path | None) -> list[Prompt]:
    if data is None:
        return [topics[name][:LETTERS] for name in sorted(topics)]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    return [row if isinstance(row, str) else row["messages"] for row in rows]


def _print(engine: Engine, lenses: Mapping[str, Lens], fresh: Sequence[Prompt]) -> None:
    tokens = [tuple(prompt_tokens(engine, one)) for one in fresh]
    on = Yardstick.read(engine, tokens, MEASURING, 0, 8, None)
    print(f"{on.states.shape[1]} tokens of {len(fresh)} texts")
    print("into block | " + " | ".join(map(str, range(engine.info.n_layers))))
    for name, lens in {"logit lens": None, **lenses}.items():
        read = [
            states if lens is None else lens.translated(states, block, "resid_pre")
            for block, states in enumerate(on.states[:-1])
        ]
        print(f"{name}, KL | " + " | ".join(f"{on.divergence(one):.2f}" for one in read))
        print(f"{name}, same token | " + " | ".join(f"{_agrees(on, one):.2f}" for one in read))


def _agrees(on: Yardstick, read: Tensor) -> float:
    said = on.engine.unembed(read).cpu().argmax(-1)
    return float((said == on.logits.argmax(-1)).float().mean())


if __name__ == "__main__":
    main()
