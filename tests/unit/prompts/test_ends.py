"""Which tokens end an answer, when a model's files do not agree."""

from __future__ import annotations

from typing import Any

import pytest
from chats import WithoutTemplate, byte_level, chat_tokenizer

from steer.engines.fake.engine import ByteTokenizer
from steer.prompts import answer_end, end_tokens, turn_end


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot|>"),
        ("gemma", "<end_turn>"),
        ("folding", "</s>"),
        ("empties", "<|im_end|>"),
        ("opens", "</s>"),
        ("channels", "<|return|>"),
        # Nothing behind the answer, or nothing that is a special token: none is guessed.
        ("endless", None),
        ("words", None),
        ("{% for m in messages %}{{ m.content }}[END]{% endfor %}", None),
        # The beginning of the next sequence is not the end of this one.
        ("{% for m in messages %}{{ m.content }}<s>{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(
    template: str | None, end: str | None
) -> None:
    tokenizer = chat_tokenizer(template)
    assert turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WithoutTemplate()])
def test_other_tokenizers_name_their_end_themselves(tokenizer: Any) -> None:
    assert turn_end(tokenizer) is None
    assert end_tokens(tokenizer) == {tokenizer.eos_token_id}


def test_a_model_is_taught_to_end_its_turn() -> None:
    tokenizer = chat_tokenizer("chatml")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer_end(tokenizer, chat=True) == turn
    assert answer_end(tokenizer, chat=False) == tokenizer.eos_token_id
    assert answer_end(chat_tokenizer(None), chat=True) == tokenizer.eos_token_id


def test_all_that_is_named_ends_an_answer() -> None:
    tokenizer = chat_tokenizer("chatml")
    end, turn, other = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<|eot|>"])
    assert end_tokens(tokenizer, declared=[7, None, [8, 9]]) == {7, 8, 9, end, turn}
    assert end_tokens(tokenizer, declared=[7], supposed=[other]) == {7, end, turn, other}


def test_a_config_classs_default_is_no_token_to_end_with() -> None:
    """`LlamaConfig` says 2, which is a word of most other vocabularies."""
    tokenizer = byte_level()
    end = tokenizer.eos_token_id
    assert end_tokens(tokenizer, declared=[end], supposed=[2]) == {end}
    assert end_tokens(tokenizer, supposed=[2]) == {2, end}
    assert end_tokens(None, supposed=[2, None]) == {2}
    assert end_tokens(None) == frozenset()
