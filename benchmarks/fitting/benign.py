"""AlphaSteer and a gate (CAST) on harmless prompts, by how many of them each was fitted on.

    python -m benchmarks.fitting.benign --model smollm2

Both are fitted on 48 harmful requests and on a growing number of harmless questions, and read on
others: everyday questions, mathematics, code, and harmful requests. AlphaSteer adds a share of its
vector at every token, so what counts is that share (1 is the whole vector); a gate adds all of it
or none, so what counts is how often it opens. States are read once, and kept in `--states`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.fitting import prompts
from steer.cli.local import running_engine
from steer.engines.base import Engine
from steer.fit.make.questions import neutral_questions
from steer.fit.methods.linear.alphasteer import null_basis, ridge_of_one
from steer.fit.methods.linear.moments import Moments
from steer.fit.methods.linear.reading import positions_of
from steer.fit.states import make_reading, read_tokens

PENALTY = 10.0
OTHERS = ("everyday", "maths", "code", "harmful")
ALONE = ("all", "last")
"""Which tokens of the harmless prompts AlphaSteer is to leave alone: every one, or the last."""

States: TypeAlias = Mapping[str, Sequence[Tensor]]
"""Of each group, the states `[tokens, d]` of every prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--counts", default="10,20,40,80,160")
    parser.add_argument("--shares", default="0.1,0.3,0.5,0.7")
    parser.add_argument("--states", type=Path, default=Path("build/fitting/benign.pt"))
    given = parser.parse_args()
    if not given.states.is_file():
        given.states.parent.mkdir(parents=True, exist_ok=True)
        with running_engine(given.model, dtype=given.dtype) as engine:
            torch.save(_read(engine, given.layer), given.states)
    states = torch.load(given.states)
    print("| harmless prompts | tokens | |" + "".join(f" {name} |" for name in OTHERS))
    print("|---|---|---|" + "---|" * len(OTHERS))
    for count in map(int, given.counts.split(",")):
        harmless = states["harmless"][:count]
        rows = f"| {count} | {sum(map(len, harmless))} |"
        print(rows, _gate(states, harmless), flush=True)
        for share in map(float, given.shares.split(",")):
            for alone in ALONE:
                print(rows, _alphasteer(states, harmless, share, alone), flush=True)


def _read(engine: Engine, layer: int) -> dict[str, list[Tensor]]:
    harmful = prompts.harmful()
    groups = {
        "harmless": list(neutral_questions()),
        "to steer": harmful[:48],
        "everyday": prompts.everyday(),
        "maths": prompts.maths(),
        "code": prompts.code(),
        "harmful": harmful[48:],
    }
    reading = make_reading(engine, layers=[layer], positions=positions_of("all"), batch=16)
    found: dict[str, list[Tensor]] = {}
    for name, texts in groups.items():
        chats = [prompts.chat(text) for text in texts]
        found[name] = [rows[layer].clone() for _, rows in read_tokens(engine, chats, reading)]
    return found


def _alphasteer(states: States, harmless: Sequence[Tensor], share: float, left: str) -> str:
    """What is read: its root mean square over all tokens, and at the prompts' last (the mean, of
    harmful requests), where the vector is to act."""
    width = harmless[0].shape[1]
    alone, steered = Moments(width), Moments(width)
    for rows in harmless:
        alone.add(rows if left == "all" else rows[-1:])
    for rows in states["to steer"]:
        steered.add(rows[-1:])
    read = ridge_of_one(steered, null_basis(alone.gram, share), PENALTY)
    cells = []
    for name in OTHERS:
        every = [rows.double() @ read for rows in states[name]]
        last = torch.stack([one[-1] for one in every])
        shown = last.mean() if name == "harmful" else last.square().mean().sqrt()
        rms = torch.cat(every).square().mean().sqrt()
        cells.append(f"{rms:.2f}, last {shown:.2f}")
    return f"AlphaSteer, ρ {share:g}, {left} | " + " | ".join(cells) + " |"


def _gate(states: States, harmless: Sequence[Tensor]) -> str:
    """How often a gate at the last prompt token opens, with its threshold halfway between the
    classes."""
    steered = torch.stack([rows[-1] for rows in states["to steer"]]).double()
    alone = torch.stack([rows[-1] for rows in harmless]).double()
    direction = steered.mean(0) - alone.mean(0)
    middle = ((steered.mean(0) + alone.mean(0)) / 2) @ direction
    cells = []
    for name in OTHERS:
        last = torch.stack([rows[-1] for rows in states[name]]).double()
        cells.append(f"opens {(last @ direction > middle).double().mean():.2f}")
    return "gate | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
