"""Places in a prompt, by tokenizers with and without offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from steer.engines.fake.engine import ByteTokenizer, FakeEngine
from steer.errors import SpecError
from steer.prompts import EncodedPrompt, PromptInput, encode_prompt


def _bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["the capital of France is Paris", "the river runs past x", "Paris and France"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(words * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


BPE = _bpe()


@dataclass
class Encoder:
    tokenizer: Any

    def __call__(self, **fields: Any) -> EncodedPrompt:
        engine = FakeEngine()
        engine.tokenizer = self.tokenizer
        return encode_prompt(engine, PromptInput.model_validate(fields))


@pytest.fixture(params=["bytes", "bpe"])
def encode(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(ByteTokenizer() if request.param == "bytes" else BPE)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("the capital of France is Paris", "France"),
        ("Paris and Paris", "Paris"),
        ("naïve café 日本 Paris", "日本"),
        ("naïve café 日本 Paris", "Paris"),
    ],
)
def test_text_is_found_at_the_last_token_of_its_last_occurrence(
    encode: Encoder, text: str, part: str
) -> None:
    prompt = encode(text=text)
    place = prompt.position(part, param="/p")
    until = text.rfind(part) + len(part)
    before = encode.tokenizer.decode(prompt.ids[: place + 1], skip_special_tokens=True)
    assert before == text[:until]


@given(st.text(alphabet="abc é日🙂", min_size=1, max_size=12), st.data())
def test_both_ways_of_placing_tokens_agree(text: str, data: Any) -> None:
    """A tokenizer's own offsets, and what prefixes of the tokens decode to."""
    with_offsets = Encoder(BPE)(text=text)
    without = EncodedPrompt(with_offsets.ids, text, _NoOffsets())
    place = data.draw(st.integers(0, len(text) - 1))
    span = (place, place + 1)
    assert with_offsets.tokens_of(span, "/p") == without.tokens_of(span, "/p")


class _NoOffsets:
    is_fast = False

    def decode(self, ids: Any, *, skip_special_tokens: bool) -> str:
        return str(BPE.decode(ids, skip_special_tokens=skip_special_tokens))


def test_positions_may_be_counted_from_the_end(encode: Encoder) -> None:
    prompt = encode(text="the river")
    assert prompt.position(-1, param="/p") == len(prompt.ids) - 1
    assert prompt.position(-len(prompt.ids), param="/p") == 0
    with pytest.raises(SpecError, match="outside the prompt"):
        prompt.position(len(prompt.ids), param="/p")


def test_a_chat_goes_through_the_template() -> None:
    encode = Encoder(ByteTokenizer())
    chat = encode(messages=[{"role": "developer", "content": "be kind"}])
    assert chat.text == "<|bos|><|system|>be kind<|assistant|>"
    assert chat.ids == tuple(ByteTokenizer().encode(chat.text, add_special_tokens=False))
    assert chat.tokens[chat.position("kind", param="/p")] == "d"
    closed = encode(messages=[{"role": "user", "content": "hello"}], add_generation_prompt=False)
    assert closed.text == "<|bos|><|user|>hello"


def test_the_placeholder_is_the_last_one_token_match() -> None:
    encode = Encoder(BPE)
    prompt = encode(text="x runs past x Paris")
    place = prompt.placeholder("x", param="/t")
    assert prompt.tokens[place].strip() == "x"
    assert prompt.tokens[place + 1] == " Paris"
    # An x that is part of another token is passed over for the one before it.
    bytes_only = Encoder(ByteTokenizer())(text="x<|user|>x")
    assert bytes_only.placeholder("x", param="/t") == 3
    joined = encode(text="x is Paris")
    assert joined.placeholder("is", param="/t") < joined.position("Paris", param="/t")


def test_a_placeholder_of_several_tokens_is_refused() -> None:
    prompt = Encoder(BPE)(text="a zebra")
    with pytest.raises(SpecError, match="not one token here") as caught:
        prompt.placeholder("zebra", param="/t")
    assert (caught.value.param, caught.value.code) == ("/t", "not_one_token")
    assert "'position'" in str(caught.value)


def test_parts_of_characters_are_named_in_the_tokenizers_notation() -> None:
    prompt = Encoder(ByteTokenizer())(text="é")
    assert prompt.tokens == ("<|bos|>", "<0xC3>", "<0xA9>")
