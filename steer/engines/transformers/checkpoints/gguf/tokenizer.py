"""The tokenizer in a GGUF file, so that it splits text and ends turns as llama.cpp does.

transformers makes the vocabulary, the merges and the special tokens. How text is split before the
merges stands in the file as a name alone (`tokenizer.ggml.pre`), of which transformers knows some
and passes over the others; the names and their expressions here are those of llama.cpp
(src/llama-vocab.cpp). A name that is not among them is refused: prompts would be split otherwise
than the model has learned.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from tokenizers import Regex, pre_tokenizers, processors

from steer.engines.transformers.checkpoints.gguf.header import INSTEAD, GGUFHeader, not_converted

_CONTROL = 3
"""The token type of control tokens."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _SLASH = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}|{_SLASH}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = r"\p{N}"
_FAMILIES: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum",
    (_DIGITS, _GPT2): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    (_LLAMA3,): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe "
    "glm4 chatglm-bpe",
    (_QWEN2,): "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2",
    (_QWEN35,): "qwen35",
    (_TEKKEN,): "tekken",
    (_GPT4O,): "gpt-4o llama4 kanana2 minimax-m2",
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3): "deepseek-v3 hunyuan-dense joyai-llm",
    (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"): "falcon",
}
SPLITS = MappingProxyType(
    {name: splits for splits, names in _FAMILIES.items() for name in names.split()}
)
"""By the name of a pre-tokenizer, the expressions that split a text, one after the other."""

_WHOLE_FIRST = frozenset(
    {
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "tekken"),
    }
)
"""Where a piece that is a token is that token, whatever merges would lead to it."""

_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>"),
        *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]"),
        *("<｜end▁of▁sentence｜>", "<end_of_utterance>"),
    }
)
"""Control tokens that end a model's turn, by their text; files name one or two of them by id."""


def read_tokenizer(header: GGUFHeader) -> Any:
    """The tokenizer of the file, with its chat template.

    Raises `SteerError` (`model_not_loaded`) for one that cannot be made as llama.cpp has it.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow import)

    path, splits = header.path, _splits(header)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError, ImportError) as error:
        raise not_converted(path, f"its tokenizer cannot be made ({error}): {INSTEAD}") from error
    backend = tokenizer.backend_tokenizer
    if splits is not None:
        steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_alone])
        backend.model.ignore_merges = header.keys["tokenizer.ggml.pre"] in _WHOLE_FIRST
    _begin(header, tokenizer)
    length = header.keys.get(f"{header.architecture}.context_length")
    tokenizer.model_max_length = length or tokenizer.model_max_length
    return tokenizer


def end_ids(header: GGUFHeader) -> list[int]:
    """The tokens that end a turn, the file's own end first."""
    keys = header.keys
    named = [keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    types = keys.get("tokenizer.ggml.token_type") or []
    by_text = [
        index
        for index, (token, kind) in enumerate(
            zip(keys["tokenizer.ggml.tokens"], types, strict=False)
        )
        if kind == _CONTROL and token in _ENDS
    ]
    return list(dict.fromkeys(index for index in (*named, *by_text) if index is not None))


def _splits(header: GGUFHeader) -> tuple[str, ...] | None:
    """The expressions that split text; None for a vocabulary that is not of byte-level BPE."""
    if header.keys["tokenizer.ggml.model"] != "gpt2":
        return None
    name = str(header.keys.get("tokenizer.ggml.pre"))
    if name not in SPLITS:
        raise not_converted(
            header.path,
            f"its key tokenizer.ggml.pre is {name!r}, a way of splitting text that is not known "
            f"here: {INSTEAD}",
        )
    return SPLITS[name]


def _begin(header: GGUFHeader, tokenizer: Any) -> None:
    """Has texts begin with the token that the file says, or with none."""
    keys = header.keys
    by_default = keys["tokenizer.ggml.model"] == "llama" or (
        keys.get("tokenizer.ggml.pre") in _WHOLE_FIRST
    )
    begins = bool(keys.get("tokenizer.ggml.add_bos_token", by_default))
    bos = tokenizer.bos_token
    if begins and bos is None:
        raise not_converted(
            header.path, "its key tokenizer.ggml.add_bos_token is true, and it has no bos_token_id"
        )
    first = [f"{bos}:0"] if begins else []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A:0"],
        pair=[*first, "$A:0", *[one.replace(":0", ":1") for one in first], "$B:1"],
        special_tokens=[(bos, tokenizer.bos_token_id)] if begins else [],
    )
    tokenizer.add_bos_token = begins
