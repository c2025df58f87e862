"""An answer ends with any token that the model's files name, and with those that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tiny_models import build, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steer.engines.base import Completion, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine, end_tokens

PROMPT = (1, 7, 21, 40)
DECLARED = 2
"""What the tiny models' generation config and config say."""

Load = Callable[[PreTrainedTokenizerFast], TransformersEngine]


@pytest.fixture
def load() -> Iterator[Load]:
    engines: list[TransformersEngine] = []

    def start(tokenizer: PreTrainedTokenizerFast) -> TransformersEngine:
        engines.append(TransformersEngine(build("llama"), tokenizer, rows=4))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def complete(engine: TransformersEngine, **sampling: object) -> Completion:
    params = SamplingParams(max_tokens=8, temperature=0, **sampling)  # type: ignore[arg-type]
    return engine.complete([GenerationRequest("one", PROMPT, params)])[0]


@pytest.fixture
def words(load: Load) -> tuple[int, ...]:
    """What the model says when nothing ends it."""
    return tuple(complete(load(tiny_tokenizer()), ignore_eos=True).tokens)


def by_eos(tokenizer: PreTrainedTokenizerFast, token: int) -> None:
    tokenizer.eos_token = f"w{token}"


def by_template(tokenizer: PreTrainedTokenizerFast, token: int) -> None:
    tokenizer.add_special_tokens({"pad_token": f"w{token}"})
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ m.content }}}} w{token}\n{{% endfor %}}"
    )


@pytest.mark.parametrize("named", [by_eos, by_template])
def test_an_end_that_the_generation_config_does_not_name(
    load: Load,
    words: tuple[int, ...],
    named: Callable[[PreTrainedTokenizerFast, int], None],
) -> None:
    tokenizer = tiny_tokenizer()
    named(tokenizer, words[3])
    engine = load(tokenizer)
    wanted = words[: words.index(words[3])]
    found = complete(engine)
    assert (tuple(found.tokens), found.finish) == (wanted, "stop")
    assert tuple(complete(engine, ignore_eos=True).tokens) == words


def test_a_request_names_ends_of_its_own(load: Load, words: tuple[int, ...]) -> None:
    engine = load(tiny_tokenizer())
    wanted = words[: words.index(words[2])]
    for ignored in (True, False):
        found = complete(engine, stop_token_ids=frozenset([words[2]]), ignore_eos=ignored)
        assert (tuple(found.tokens), found.finish) == (wanted, "stop")


def configured(generation: object, config: object) -> PreTrainedModel:
    model = build("llama")
    model.generation_config.eos_token_id = generation  # type: ignore[union-attr]
    model.config.eos_token_id = config
    return model


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (5, 5, {2, 5}),
        ([5, 6], 2, {2, 5, 6}),
        (None, 9, {2, 9}),
        (5, 9, {2, 5}),  # its class's default, a word of this vocabulary
        (5, [1], {1, 2, 5}),
        (None, None, {2}),
    ],
)
def test_all_files_count(generation: object, config: object, ends: set[int]) -> None:
    assert end_tokens(configured(generation, config), tiny_tokenizer()) == ends
