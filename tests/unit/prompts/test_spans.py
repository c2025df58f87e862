"""A piece of a text in tokens of every family, with the tokenizer's offsets and without."""

from __future__ import annotations

from typing import Any

import pytest
from chats import NotSoFast, WithoutOffsets, WithoutTemplate, byte_fallback, byte_level, word_piece

from steer.engines.fake.engine import ByteTokenizer
from steer.fit.data.prompt import subject_position
from steer.jobs.pace import Pace
from steer.jobs.tokenizing import PacedTokenizer
from steer.prompts import EncodedPrompt, Marked, openai_token, text_tokens, token_texts
from steer.prompts.spans import spans_by_decoding, token_spans
from steer.prompts.tokens import inner_tokens, trigger_tokens

TOKENIZERS = {
    "bytes": ByteTokenizer,
    "byte-level": byte_level,
    "byte-level, no offsets": lambda: WithoutOffsets(byte_level()),
    "byte-fallback": byte_fallback,
    "byte-fallback, no offsets": lambda: WithoutOffsets(byte_fallback()),
    "no offsets, called fast": lambda: NotSoFast(byte_level()),
    "own program": WithoutTemplate,
}
SUBJECTS = ["fox", "🦊", "日本", "é", "e\u0301", "👩\u200d🚀", "🇳🇴", "a 🦊", "x\u0301\u0323", "𝔘"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("text", ["{}", "the {} and a {}", "a {}, the", "🦊日{}日 a", "{}{}"])
def test_a_subject_ends_with_the_last_token_of_its_last_character(
    tokenizer: Any, text: str, subject: str
) -> None:
    """The same token for a fit and for an inspection, and the whole subject is read by then."""
    text = text.replace("{}", subject)
    ids = text_tokens(tokenizer, text)
    place = subject_position(tokenizer, Marked(text, subject=subject))
    assert EncodedPrompt(tuple(ids), text, tokenizer).position(subject, param="/p") == place
    wanted = text[: text.rfind(subject) + len(subject)]
    # Tokens that end the subject are those from which on it is in the decoded prefix.
    assert subject_end(tokenizer, ids, wanted) == place


def subject_end(tokenizer: Any, ids: list[int], wanted: str) -> int:
    for place in range(len(ids)):
        if tokenizer.decode(ids[: place + 1], skip_special_tokens=True).strip().startswith(wanted):
            return place
    raise AssertionError(wanted)


@pytest.mark.parametrize(
    ("subject", "token"),
    [("Fox", "fox"), ("Foxes", "##es"), ("CAFÉ", "##e"), ("Cafe\u0301", "##e"), ("日本", "本")],
)
def test_a_tokenizer_that_changes_the_text_is_asked_where_it_was(subject: str, token: str) -> None:
    """WordPiece gives back neither capitals nor accents; its offsets are those of the text."""
    tokenizer = word_piece()
    text = f"the {subject} the"
    place = subject_position(tokenizer, Marked(text, subject=subject))
    assert tokenizer.convert_ids_to_tokens(text_tokens(tokenizer, text))[place] == token


def test_without_offsets_a_changed_text_is_searched_as_the_model_reads_it() -> None:
    tokenizer = WithoutOffsets(word_piece())
    text = "the Foxes"
    ids = text_tokens(tokenizer, text)
    found, spans = token_spans(tokenizer, ids, text)
    assert found == "[CLS] the foxes [SEP]"
    assert found[slice(*spans[3])] == "es"


def test_special_tokens_around_a_text_cover_none_of_it() -> None:
    tokenizer = WithoutOffsets(byte_level())
    text, spans = token_spans(tokenizer, text_tokens(tokenizer, "fox"), "fox")
    assert (text, spans) == ("fox", [(0, 0), (0, 3)])


def test_a_long_text_is_placed_like_a_short_one() -> None:
    """Decoding starts again on the way, behind whole characters only."""
    tokenizer = byte_fallback()
    text = "the fox 🦊日本 yes " * 40
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    ends = [end for _, end in spans_by_decoding(tokenizer, ids, text)]
    assert ends == [end for _, end in token_spans(tokenizer, ids, text)[1]]


def idle() -> Pace:
    return Pace(lambda: 0, lambda: None, lambda _: None, duty=0.5, quiet_seconds=0.0)


def test_a_job_reads_offsets_too() -> None:
    tokenizer = PacedTokenizer(word_piece(), idle())
    assert subject_position(tokenizer, Marked("the CAFÉ", subject="CAFÉ")) == 3


def test_a_token_by_itself_keeps_its_space() -> None:
    """SentencePiece's decoder drops it from whatever it is given first."""
    tokenizer = byte_fallback()
    ids = tokenizer.encode("the Paris 🦊", add_special_tokens=False)
    assert token_texts(tokenizer, ids[:3]) == (" the", " Paris", " ")
    assert token_texts(tokenizer, ids[3:]) == ("<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>")
    assert openai_token(tokenizer, ids[1]) == (" Paris", list(b" Paris"))
    assert openai_token(tokenizer, ids[3]) == ("bytes:\\xf0", [0xF0])


@pytest.mark.parametrize("text", ["Paris", " Paris"])
def test_a_trigger_is_one_token_with_the_space_that_sentencepiece_adds_or_with_its_own(
    text: str,
) -> None:
    tokenizer = byte_fallback()
    assert tokenizer.convert_ids_to_tokens(trigger_tokens(tokenizer, text)) == ["▁Paris"]


def test_in_the_middle_of_a_text_no_space_is_added() -> None:
    tokenizer = byte_fallback()
    assert tokenizer.convert_ids_to_tokens(inner_tokens(tokenizer, "yes")) == ["yes"]
    assert tokenizer.convert_ids_to_tokens(inner_tokens(tokenizer, " yes")) == ["▁yes"]
    assert byte_level().convert_ids_to_tokens(inner_tokens(byte_level(), " fox")) == ["Ġfox"]
