"""The fake engine's tokenizer: bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SPECIAL = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")


class ByteTokenizer:
    """One token per UTF-8 byte, and five special tokens after them; the shape of a Hugging Face
    tokenizer as far as Steer uses it."""

    vocab_size = 256 + len(_SPECIAL)
    bos_token_id = 256
    eos_token_id = 257
    chat_template: str | None = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Bytes, with the special tokens that occur in `text` recognised."""
        ids = [self.bos_token_id] if add_special_tokens else []
        rest = text
        while rest:
            places = {rest.find(name): n for n, name in enumerate(_SPECIAL) if name in rest}
            cut = min(places, default=len(rest))
            ids.extend(rest[:cut].encode())
            if not places:
                break
            ids.append(256 + places[cut])
            rest = rest[cut + len(_SPECIAL[places[cut]]) :]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        data = bytearray()
        for token in ids:
            if token < 256:
                data.append(token)
            elif not skip_special_tokens:
                data.extend(_SPECIAL[token - 256].encode())
        return data.decode(errors="replace")

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Byte tokens in SentencePiece's notation, `<0xE2>`."""
        return [f"<0x{i:02X}>" if i < 256 else _SPECIAL[i - 256] for i in ids]

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, str]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **_: Any,
    ) -> str | list[int]:
        """`<|role|>content` for each message; nothing closes one, so that the last can always be
        continued. Raises ValueError unless system comes first."""
        if self.chat_template is None:
            raise ValueError("there is no chat template")
        if any(m["role"] == "system" for m in messages[1:]):
            raise ValueError("a system message must come first")
        text = "<|bos|>" + "".join(f"<|{m['role']}|>{m['content']}" for m in messages)
        if add_generation_prompt and continue_final_message:
            raise ValueError("an answer is either opened or continued")
        if add_generation_prompt:
            text += "<|assistant|>"
        return self.encode(text, add_special_tokens=False) if tokenize else text
