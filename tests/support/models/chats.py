"""Tokenizers of every family, and chat templates in the shapes of well-known ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

MARKS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|eot|>", "<turn>", "<end_turn>"),
    *("<User>", "<Assistant>", "[INST]", "[/INST]", "<|channel|>", "<|message|>", "<|return|>"),
)
"""The control tokens of all the templates below. `</s>` is the tokenizers' own end."""

TEMPLATES = MappingProxyType(
    {path.stem: path.read_text() for path in sorted(Path(__file__).parent.glob("chat_templates/*"))}
)

PIECES = ("▁", "▁a", "▁the", "▁fox", "fox", "▁Paris", "yes", "▁yes")
WORDS = ("[UNK]", "[CLS]", "[SEP]", "a", "the", "fox", "##es", "caf", "##e", "日", "本", "🦊")


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's family: a byte without a merge is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("f", "o"), ("fo", "x"), ("Ġ", "fox"), ("y", "e"), ("ye", "s")]
    vocabulary = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama's family: SentencePiece's words and signs, and bytes for all other characters."""
    words = [*PIECES, *"abcdefghijklmnopqrstuvwxyzAP.,:"]
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [(piece, -10.0 if len(piece) < 2 else -1.0) for piece in vocabulary]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finished(tokenizer)


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """BERT's family: lower case, no accents, and what decoding cannot give back."""
    vocabulary = {word: n for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def chat_tokenizer(template: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one of `TEMPLATES`, or with the template given."""
    tokenizer = byte_level.__wrapped__()
    named = isinstance(template, str) and template in TEMPLATES
    tokenizer.chat_template = TEMPLATES[template] if named else template
    return tokenizer


class WithoutOffsets:
    """A tokenizer as one written in Python is: it does not say what its tokens cover."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class NotSoFast(WithoutOffsets):
    """vLLM's wrapper of Mistral's tokenizer: called fast, and without offsets all the same."""

    is_fast = True

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        return self._tokenizer(text, add_special_tokens=add_special_tokens)


class WithoutTemplate(WithoutOffsets):
    """A tokenizer as Mistral's own is: it writes chats by a program, reads no control token in a
    text, and has histories end with a question."""

    chat_template = None

    def __init__(self) -> None:
        super().__init__(chat_tokenizer("chatml"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        begin = [self._tokenizer.bos_token_id] if add_special_tokens else []
        return begin + self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        reasoning_effort: str | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
    ) -> Any:
        answered = conversation[-1]["role"] == "assistant"
        if answered != continue_final_message:
            raise ValueError("Expected last role User for serving but got assistant")
        ids = [self._tokenizer.bos_token_id]
        open_mark, close_mark = self._tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"])
        for turn in conversation:
            said = self.encode(turn["content"], add_special_tokens=False)
            ids += said if turn["role"] == "assistant" else [open_mark, *said, close_mark]
        if reasoning_effort is not None:
            ids[1:1] = self.encode(f"effort {reasoning_effort}", add_special_tokens=False)
        if not tokenize:
            return self._tokenizer.decode(ids)
        return {"input_ids": ids} if return_dict else ids


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
