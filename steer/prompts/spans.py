"""Which characters of a text each of its tokens stands for.

A character that is several tokens (a byte each, in byte-level BPE and in SentencePiece's byte
fallback) belongs to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, TypeAlias

from steer.prompts.labels import BROKEN, piece_bytes

Span: TypeAlias = tuple[int, int]
"""Characters of a text, half-open."""

_WINDOW = 64
"""Tokens that are decoded again for each new one."""


def token_spans(tokenizer: Any, ids: Sequence[int], text: str) -> tuple[str, list[Span]]:
    """Each token's characters in `text`, from which `ids` came; empty for tokens without any.

    The tokenizer's own offsets where it has them for exactly these tokens, else what they decode
    to. Where that does not hold `text`, the decoding is answered in its place: it is what the model
    reads.
    """
    if getattr(tokenizer, "is_fast", False):
        for special in (True, False):
            read, spans = _offsets(tokenizer, text, special=special)
            if read == list(ids):
                return text, _split_runs(tokenizer, ids, text, spans)
    decoded = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    spans = spans_by_decoding(tokenizer, ids, decoded)
    before = decoded.find(text)
    if before < 0:
        return decoded, spans
    return text, [_shifted(span, before, len(text)) for span in spans]


def tokens_within(spans: Sequence[Span], span: Span) -> list[int]:
    """The positions of the tokens whose `spans` share characters with `span`."""
    start, end = span
    return [n for n, (a, b) in enumerate(spans) if a < end and b > start]


def spans_by_decoding(tokenizer: Any, ids: Sequence[int], text: str) -> list[Span]:
    """Each token's characters in `text`, which is what `ids` decode to.

    What a prefix of the tokens decodes to is known as far as it agrees with the text. A token that
    adds nothing known and leaves something broken is a part of the next character.
    """
    spans: list[Span] = []
    known = 0
    # Decoding begins at token `first`, a little before the new ones, whose first `skip` characters
    # were read before; the others begin at character `begin` of the text.
    first = skip = begin = 0
    for place, token in enumerate(ids):
        piece = _decoded(tokenizer, ids[first : place + 1])[skip:]
        reached = begin + shared_length(piece, text[begin : begin + len(piece)])
        if reached > known:
            spans.append((known, reached))
            known = reached
        else:
            inside = BROKEN in piece[max(known - begin, 0) :]
            spans.append((known, min(known + inside, len(text))))
        whole = begin + len(piece) == known
        if place + 1 - first >= _WINDOW and whole:
            alone = _decoded(tokenizer, [token])
            if alone and BROKEN not in alone:
                first, skip, begin = place, len(alone), known
    return spans


def _offsets(tokenizer: Any, text: str, *, special: bool) -> tuple[list[int], list[Span]]:
    """The ids of `text` and their offsets; no ids where the tokenizer has none after all, as the
    one in which vLLM wraps Mistral's, which calls itself fast."""
    try:
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    except (NotImplementedError, TypeError, ValueError):
        return [], []
    return list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]


def _split_runs(tokenizer: Any, ids: Sequence[int], text: str, spans: list[Span]) -> list[Span]:
    """`spans`, with those of tokens that share several characters byte by byte set right.

    Unigram models give every byte of a run of unknown characters the span of the whole run.
    """
    found: list[Span] = []
    for (start, end), run in groupby(zip(spans, ids, strict=True), key=itemgetter(0)):
        tokens = [token for _, token in run]
        exact = None
        if len(tokens) > 1 and end - start > 1:
            pieces = map(piece_bytes, tokenizer.convert_ids_to_tokens(tokens))
            exact = _byte_spans(list(pieces), text[start:end], start)
        found.extend(exact or [(start, end)] * len(tokens))
    return found


def _byte_spans(pieces: Sequence[bytes | None], text: str, start: int) -> list[Span] | None:
    """The characters of `text`, counted from `start`, that each of `pieces` has bytes of; None
    where they are not its bytes."""
    if b"".join(piece or b"" for piece in pieces) != text.encode():
        return None
    owners = [start + place for place, sign in enumerate(text) for _ in sign.encode()]
    ends = list(accumulate(len(piece or b"") for piece in pieces))
    return [
        (owners[before], owners[after - 1] + 1)
        for before, after in zip([0, *ends], ends, strict=False)
    ]


def shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _shifted(span: Span, before: int, length: int) -> Span:
    start, end = (min(max(place - before, 0), length) for place in span)
    return start, end
