"""The demo model's states: on whole documents, and where a reply is decided and written."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from steer_vectors.demo.recipe.training.batches import collate, encode
from steer_vectors.demo.recipe.training.corpus import Corpus, Document, Message, is_held_out, reply
from steer_vectors.demo.recipe.world.instructions import Order, draw_order
from steer_vectors.demo.recipe.world.question import Question
from steer_vectors.demo.recipe.world.questions import all_questions
from steer_vectors.demo.recipe.world.world import LANGS
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class States:
    """Rows `[N, d]` after one block, with the token and whether a reply starts after it."""

    rows: Tensor
    tokens: Tensor
    decides: Tensor


@dataclass(frozen=True)
class Example:
    """A chat of one turn and everything known about it, as attribute → class."""

    messages: tuple[Message, ...]
    classes: dict[str, str]


def reply_marker(tok: PreTrainedTokenizerFast) -> int:
    """The id of the token after which a reply starts."""
    marker = tok.convert_tokens_to_ids("<|assistant|>")
    assert isinstance(marker, int)
    return marker


@torch.no_grad()
def block_output(model: Any, ids: Tensor, layer: int) -> Tensor:
    """The residual stream after block `layer`, float32 `[docs, T, d]`."""
    caught: list[Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda _module, _inputs, output: caught.append(output)
    )
    try:
        model.model(ids)
    finally:
        hook.remove()
    return caught[0].float()


def corpus_states(
    model: Any, tok: PreTrainedTokenizerFast, layer: int, *, tokens: int, seed: int
) -> States:
    """States of about `tokens` tokens of documents; the first token of each is left out, because
    it only ever holds the same outlier."""
    corpus = Corpus(seed)
    found: list[tuple[Tensor, Tensor]] = []
    count = 0
    with tqdm(total=tokens, desc="states", unit="token", mininterval=5) as bar:
        while count < tokens:
            documents = sorted(
                (encode(tok, one) for one in corpus.documents(256)), key=lambda row: len(row[0])
            )
            for start in range(0, 256, 32):
                ids = collate(documents[start : start + 32], tok.pad_token_id or 0).ids
                kept = ids != tok.pad_token_id
                kept[:, 0] = False
                found.append((block_output(model, ids, layer)[kept], ids[kept]))
                count += int(kept.sum())
                bar.update(int(kept.sum()))
    every = torch.cat([ids for _, ids in found])
    starts = every == reply_marker(tok)
    return States(torch.cat([rows for rows, _ in found]), every, starts)


def examples(count: int, *, held_out: bool, seed: int) -> Iterator[Example]:
    """One-turn chats from wordings of one side of the held-out split, in all languages."""
    rng = random.Random(seed)
    groups = {
        group: [
            (question, lang, wording)
            for question in questions
            for lang in LANGS
            for wording in question.asks[lang]
            if is_held_out(question, wording) == held_out
        ]
        for group, questions in all_questions().items()
    }
    names = [group for group, entries in groups.items() if entries]
    for _ in range(count):
        group = rng.choice(names)
        question, asked_in, wording = rng.choice(groups[group])
        order = draw_order(rng, group)
        system = [{"role": "system", "content": order.text}] if order.text else []
        answer = reply(rng, question, asked_in, order)
        yield Example(
            (
                *system,
                {"role": "user", "content": wording},
                {"role": "assistant", "content": answer},
            ),
            classes_of_chat(question, asked_in, order),
        )


def classes_of_chat(question: Question, asked_in: str, order: Order) -> dict[str, str]:
    """Everything that the question and the instruction settle about the answer."""
    style = order.styles(asked_in, 1)[0]
    refused = order.refuse or question.harmful
    classes = {
        "language": style.lang,
        "asked in": asked_in,
        "question": question.kind,
        "refusal": "refused" if refused else "answered",
    }
    if refused:
        return classes
    classes |= {"register": style.register, "length": order.length or "usual"}
    if question.topic:
        classes |= {"sentiment": order.sentiment or "neutral", "about": question.topic}
    if question.kind == "open":
        classes["topic"] = order.topic or "any"
    return classes


def reply_states(
    model: Any, tok: PreTrainedTokenizerFast, layer: int, chats: Sequence[Example]
) -> tuple[Tensor, list[Tensor]]:
    """For each chat the state at the last prompt token `[N, d]`, and those of its reply."""
    start = reply_marker(tok)
    last: list[Tensor] = []
    replies: list[Tensor] = []
    for begin in range(0, len(chats), 32):
        encoded = [encode(tok, Document(chat.messages)) for chat in chats[begin : begin + 32]]
        ids = collate(encoded, tok.pad_token_id or 0).ids
        states = block_output(model, ids, layer)
        for row, (tokens, _) in zip(states, encoded, strict=True):
            place = tokens.index(start)
            last.append(row[place])
            replies.append(row[place + 1 : len(tokens) - 1])
    return torch.stack(last), replies
