"""`attach` steers exactly the tokens that are fed, however the model is called."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attach_oracle import IDS, LENGTH, NEW, WHERE, begun, generate, oracle, score, steered
from transformers import DynamicCache

TinyModel = Callable[[str], Any]


# Ways to run the same generation


def _by_hand(model: Any, *, positional: bool = False) -> list[list[int]]:
    cache, ids, found = DynamicCache(config=model.config), IDS, list[int]()
    names = list(inspect.signature(model.forward).parameters)
    with torch.no_grad():
        for _ in range(NEW):
            mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
            given = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
            if positional:
                out = model(
                    *(given.get(name) for name in names[: 1 + names.index("past_key_values")])
                )
            else:
                out = model(**given)
            ids = out.logits[:, -1:].argmax(-1)
            found.append(int(ids))
    return [found]


def _in_a_thread(model: Any) -> list[list[int]]:
    found: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: found.append(generate(model)))
    thread.start()
    thread.join()
    return found[0]


RUNS: dict[str, Callable[[Any], list[list[int]]]] = {
    "generate": generate,
    "by hand": _by_hand,
    "arguments by position": functools.partial(_by_hand, positional=True),
    "in a thread": _in_a_thread,
    "in chunks of 4": functools.partial(generate, prefill_chunk_size=4),
    "in chunks of 5": functools.partial(generate, prefill_chunk_size=5),
    "in chunks of 1": functools.partial(generate, prefill_chunk_size=1),
    "without a cache": functools.partial(generate, use_cache=False),
    "static cache": functools.partial(generate, cache_implementation="static"),
    "static cache in chunks": functools.partial(
        generate, cache_implementation="static", prefill_chunk_size=5
    ),
    "prompt lookup": functools.partial(generate, prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_every_way_to_generate_steers_the_same_tokens(
    tiny_model: TinyModel, architecture: str, run: str, where: str
) -> None:
    model = tiny_model(architecture)
    tokens, count = oracle(model, IDS[0].tolist(), where)
    with steered(model, where) as attached:
        assert RUNS[run](model) == [tokens]
    (receipt,) = attached.receipts
    assert (receipt.tokens_steered, receipt.tokens_skipped) == (count, LENGTH + NEW - 1 - count)


PROMPTS = [list(range(3, 12)), [40, 41, 42, 43], list(range(50, 62)), [70]]
PADDED = torch.tensor([[0] * (LENGTH - len(one)) + one for one in PROMPTS])
MASK = torch.tensor([[0] * (LENGTH - len(one)) + [1] * len(one) for one in PROMPTS])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "options",
    [
        {"attention_mask": MASK},
        {"attention_mask": MASK, "prefill_chunk_size": 4},
        {"attention_mask": MASK, "use_cache": False},
        {"attention_mask": MASK, "cache_implementation": "static"},
        {"attention_mask": MASK, "cache_implementation": "static", "prefill_chunk_size": 5},
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_positions_are_counted_from_the_first_token_after_the_padding(
    tiny_model: TinyModel, architecture: str, options: dict[str, Any], where: str
) -> None:
    model = tiny_model(architecture)
    wanted = [oracle(model, prompt, where) for prompt in PROMPTS]
    with steered(model, where) as attached:
        assert generate(model, PADDED, **options) == [tokens for tokens, _ in wanted]
    for receipt, prompt, (_, count) in zip(attached.receipts, PROMPTS, wanted, strict=True):
        fed = len(prompt) + NEW - 1
        assert (receipt.tokens_steered, receipt.tokens_skipped) == (count, fed - count)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": torch.ones_like(IDS)},
        {"ids": IDS[:, 6:], "attention_mask": torch.ones_like(IDS)},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_on_a_ready_cache_only_what_is_fed_is_steered(
    tiny_model: TinyModel, options: dict[str, Any], where: str
) -> None:
    model = tiny_model("llama")
    ready = begun(model)
    tokens, count = oracle(model, IDS[0].tolist(), where, known=6)
    with steered(model, where) as attached:
        for _ in range(2):  # the second generate is a new batch
            assert generate(model, **options, past_key_values=copy.deepcopy(ready)) == [tokens]
            (receipt,) = attached.receipts
            fed = LENGTH - 6 + NEW - 1
            assert (receipt.tokens_steered, receipt.tokens_skipped) == (count, fed - count)


def test_a_batch_that_reuses_the_cache_of_the_last_one_is_a_new_one(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    longer = torch.arange(3, 40)[None]
    with steered(model, "prompt") as attached:
        cache = DynamicCache(config=model.config)
        generate(model, past_key_values=cache)
        assert attached.receipts[0].tokens_steered == LENGTH
        generate(model, longer, past_key_values=cache)
        assert attached.receipts[0].tokens_steered == 37 - (LENGTH + NEW - 1)


@pytest.mark.parametrize("where", WHERE)
def test_a_pass_on_a_ready_cache(tiny_model: TinyModel, where: str) -> None:
    model = tiny_model("llama")
    _, count = oracle(model, IDS[0].tolist(), where, new=1, known=6)
    ready = begun(model)
    with steered(model, where) as attached, torch.no_grad():
        for given in ({}, {"position_ids": torch.arange(6, LENGTH)[None]}):
            model(input_ids=IDS[:, 6:], past_key_values=copy.deepcopy(ready), **given)
            (receipt,) = attached.receipts
            assert (receipt.tokens_steered, receipt.tokens_skipped) == (count, 6 - count)
        model(input_ids=IDS)
        (receipt,) = attached.receipts
        assert receipt.tokens_steered + receipt.tokens_skipped == LENGTH


@pytest.mark.parametrize("where", WHERE)
def test_beams_and_several_sequences_are_rows_of_their_own(
    tiny_model: TinyModel, where: str
) -> None:
    """Each beam's sequence, fed again whole, has the score that the steered search gave it."""
    model = tiny_model("llama")
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    with steered(model, where) as attached:
        out = model.generate(
            PADDED[:2],
            attention_mask=MASK[:2],
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            output_scores=True,
            **options,
        )
    assert len(attached.receipts) == 6
    for row, sequence in enumerate(out.sequences.tolist()):
        prompt = PROMPTS[row // 2]
        generated = sequence[LENGTH:]
        assert score(model, prompt, generated, where) == pytest.approx(
            float(out.sequences_scores[row]), abs=1e-4
        )
    for row, receipt in enumerate(attached.receipts):
        prompt = PROMPTS[row // 3]
        count = oracle(model, prompt, where)[1]
        assert (receipt.tokens_steered, receipt.tokens_skipped) == (
            count,
            len(prompt) + NEW - 1 - count,
        )
