"""Turns documents into token batches, reproducibly from (seed, step)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from steer_vectors.demo.recipe.training.corpus import Corpus, Document
from transformers import PreTrainedTokenizerFast

CHUNK = 8192
"""Documents drawn, sorted by length and cut into batches at a time."""


@dataclass(frozen=True)
class Batch:
    """Right-padded ids and the next-token targets; -100 where nothing is learned."""

    ids: torch.Tensor  # [docs, T] int64
    targets: torch.Tensor  # [docs, T] int64


def encode(tok: PreTrainedTokenizerFast, doc: Document) -> tuple[list[int], list[bool]]:
    """Ids of a document and which of them are learned: replies, and all of a plain text."""
    special = tok.convert_tokens_to_ids
    ids, learned = [tok.bos_token_id], [False]
    if not doc.messages:
        body = [*tok.encode(doc.text, add_special_tokens=False), tok.eos_token_id]
        return ids + body, learned + [True] * len(body)
    for message in doc.messages:
        body = [*tok.encode(message["content"], add_special_tokens=False), tok.eos_token_id]
        ids += [special(f"<|{message['role']}|>"), *body]
        learned += [False, *([message["role"] == "assistant"] * len(body))]
    return ids, learned


def collate(rows: list[tuple[list[int], list[bool]]], pad: int) -> Batch:
    """Pad to the longest row and shift the targets by one."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), -100)
    for i, (row, learned) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        target = torch.tensor(row[1:])
        keep = torch.tensor(learned[1:])
        targets[i, : len(row) - 1] = torch.where(keep, target, torch.tensor(-100))
    return Batch(ids, targets)


class Batches:
    """Batch number ``step`` of an endless stream.

    From step ``second`` on, documents may say to comply with everything (see
    `draw_exception`); refusal is learned first, its exceptions afterwards.

    Guarantees: ``at(step)`` depends on the seed and the step only, so a resumed
    run sees the batches an uninterrupted run would have seen.
    """

    def __init__(self, tok: PreTrainedTokenizerFast, seed: int, docs: int, second: int) -> None:
        self.tok, self.seed, self.docs, self.second = tok, seed, docs, second
        self.per_chunk = CHUNK // docs
        self.chunk = (False, -1)
        self.cut: list[list[tuple[list[int], list[bool]]]] = []

    def _load(self, late: bool, chunk: int) -> None:
        seed = self.seed * 100_003 + chunk + (50_000 if late else 0)
        rows = [encode(self.tok, d) for d in Corpus(seed, late).documents(CHUNK)]
        rows.sort(key=lambda r: len(r[0]))
        self.cut = [rows[i : i + self.docs] for i in range(0, CHUNK, self.docs)]
        random.Random(seed).shuffle(self.cut)
        self.chunk = (late, chunk)

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        late = step >= self.second
        chunk, index = divmod(step - self.second if late else step, self.per_chunk)
        if (late, chunk) != self.chunk:
            self._load(late, chunk)
        return collate(self.cut[index], int(self.tok.pad_token_id))
