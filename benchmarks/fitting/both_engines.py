"""The check rows of the shipped vectors on one engine, and two engines beside each other.

    python -m benchmarks.fitting.both_engines transformers out/transformers.json
    python -m benchmarks.fitting.both_engines vllm out/vllm.json        (in vLLM's environment)
    python -m benchmarks.fitting.both_engines compare out/transformers.json out/vllm.json

Greedy, in float32, on the questions that `make` checks on: unsteered, told in words, steered, and
by chance, which is a direction with the states' covariance at the strength whose KL is the
vector's. Each engine scores its own answers and finds that strength, by its own readings. What a
file holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from steer_vectors import LIBRARY

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.checkpoints.found import find_model
from steer.fit.make.asking import Interview
from steer.fit.make.obedience import obedience
from steer.fit.make.questions import neutral_questions
from steer.fit.make.wish import QuestionParts
from steer.fit.measure.answers import Answer, answers_under, marked, measured
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.comparison import values, wrong_way
from steer.fit.measure.nulls.directions import answer_states, null_vectors
from steer.fit.measure.nulls.runs import Contender, run_nulls
from steer.prompts import as_chat
from steer.spec import parse_spec

SHIPPED = LIBRARY / "smollm2" / "vectors"
ROWS = ("unsteered", "in words", "steered", "by chance")
GREEDY = SamplingParams(max_tokens=32, temperature=0.0, logprobs=0)
SCALED_ON = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("transformers", "vllm", "compare"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--vectors", type=Path, default=SHIPPED, help="a folder of them")
    given = parser.parse_args()
    if given.what == "compare":
        print(compared(*(json.loads(path.read_text("utf-8")) for path in given.files)))
        return
    [file] = given.files
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    with _running(given.what) as engine:
        for path in sorted(given.vectors.glob("*.safetensors")):
            if path.stem not in found:
                found[path.stem] = _checked(engine, path)
                file.write_text(json.dumps(found, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def _running(name: str) -> Iterator[Engine]:
    folder = str(find_model("smollm2").location)
    if name == "transformers":
        from steer.engines.transformers.engine import TransformersEngine  # noqa: PLC0415

        with TransformersEngine.load(folder, dtype="float32") as engine:
            yield engine
        return
    # vLLM reads its environment when it is imported.
    os.environ |= {
        "VLLM_PLUGINS": "steer",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    from steer.engines.vllm.front.engine import VllmEngine  # noqa: PLC0415

    options: dict[str, Any] = {
        **{"model": folder, "dtype": "float32", "enforce_eager": True, "max_model_len": 512},
        # On a CPU, a share of the machine's memory, which the weights and the cache come out of.
        **{"max_num_seqs": 64, "gpu_memory_utilization": 0.2},
    }
    with (
        tempfile.TemporaryDirectory() as registry,
        VllmEngine.load(registry=registry, **options) as running,
    ):
        yield running


def _checked(engine: Engine, path: Path) -> dict[str, Any]:
    """The rows of one vector, with every answer's tokens and score."""
    vector = ControlVector.from_bytes(path.read_bytes(), name=path.stem)
    how: dict[str, Any] = dict(vector.card.provenance)
    talk = Interview(engine, how["instruction"], how["opposite"], GREEDY, place=how["place"])
    asked = [as_chat(engine.tokenizer, one) for one in neutral_questions()]
    parts = QuestionParts.of(asked, how["seed"])
    scaled = parts.fitted[:SCALED_ON]
    told, opposed, plain = talk.answers(
        [talk.told(one) for one in scaled], [talk.opposed(one) for one in scaled], scaled
    )
    known = talk.asked((*scaled, *parts.checked))
    scorer = obedience(engine, known[: len(scaled)], plain, told, opposed, known=known).scorer
    plans = plans_of(engine, MemoryLibrary({"made": vector}))
    plan = plans.plan(parse_spec({"interventions": [{"kind": "add", "vector": "made"}]}))
    plain, told, steered = answers_under(
        engine,
        [parts.checked, [talk.told(one) for one in parts.checked], parts.checked],
        [None, None, plan],
        sampling=GREEDY,
    )
    card = vector.card
    states = answer_states(engine, plain, card.site, card.used_layers)
    [_, null] = null_vectors(vector, 1, layers=card.used_layers, states=states)
    contender = Contender(plan, card.default_strength, steered, [null])
    [runs] = run_nulls(
        engine, parts.checked, References(engine, plain), [contender], None, sampling=GREEDY
    )
    [by_chance] = runs.nulls
    everything = marked(engine, scorer, [plain, told, steered, by_chance.answers])
    rows = dict(zip(ROWS, everything, strict=True))
    found = {name: _row(rows["unsteered"], answers) for name, answers in rows.items()}
    found["steered"] |= {"kl": runs.kl, "strength": card.default_strength}
    found["by chance"] |= {"kl": by_chance.match.kl, "strength": by_chance.match.strength}
    return found


def _row(plain: Sequence[Answer], answers: Sequence[Answer]) -> dict[str, Any]:
    draws = Resamples.draw(len(answers))
    return {
        "score": str(draws.mean(values(answers))),
        "valid": measured(answers).valid,
        "wrong_way": wrong_way(draws, values(plain), values(answers)).value,
        "tokens": [list(one.tokens) for one in answers],
        "scores": values(answers),
    }


def compared(one: dict[str, Any], other: dict[str, Any]) -> str:
    """A table of both engines' rows, and how many answers are the same token for token."""
    lines = [
        "| | | score | | sound | | wrong way | | KL in nats | | same answers | tokens before they "
        "part |",
        "|" + "---|" * 12,
    ]
    for name in sorted(one.keys() & other.keys()):
        for row in ROWS:
            a, b = one[name][row], other[name][row]
            pairs = list(zip(a["tokens"], b["tokens"], strict=True))
            same = sum(mine == theirs for mine, theirs in pairs)
            apart = [_alike(*pair) for pair in pairs if pair[0] != pair[1]]
            lines.append(
                f"| `{name}` | {row} | {a['score']} | {b['score']} | {a['valid']:.2f} | "
                f"{b['valid']:.2f} | {a['wrong_way']:.2f} | {b['wrong_way']:.2f} | "
                f"{_kl(a)} | {_kl(b)} | "
                f"{same} of {len(pairs)} | {', '.join(map(str, sorted(apart))) or '–'} |"
            )
    return "\n".join(lines)


def _kl(row: dict[str, Any]) -> str:
    return f"{row['kl']:.4f}" if "kl" in row else "–"


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


if __name__ == "__main__":
    main()
