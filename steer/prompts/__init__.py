"""Prompts: what callers give (text, messages or ids), as tokens, and places among them.

- `forms`: the forms that are accepted, and what is refused about them.
- `tokens`: text and chats to tokens and back; the one rule for special tokens.
- `places`: a prompt as the model reads it, and where a piece of its text lies.
- `labels`: the text of a token by itself.

It stands beside `artefacts`, low in the order of imports, because all that is above reads prompts:
plans (triggers, concepts' texts), engines, inspection, fitting, jobs, the command line and the
servers. So it knows no engine and no web framework, only a tokenizer (Hugging Face's, or an object
with its `encode`, `decode`, `convert_ids_to_tokens` and `apply_chat_template`) and a model's shape.
"""

from steer.prompts.forms import (
    Marked,
    Message,
    MessageParam,
    Messages,
    Place,
    Prompt,
    PromptInput,
    PromptParam,
    parse_prompt,
    prompt_json,
    prompt_of,
)
from steer.prompts.labels import openai_token, token_texts
from steer.prompts.places import EncodedPrompt, PromptReader, encode_prompt, spans_by_decoding
from steer.prompts.tokens import (
    answer_text,
    chat_tokens,
    has_chat_template,
    part_tokens,
    render,
    text_tokens,
)

__all__ = [
    "EncodedPrompt",
    "Marked",
    "Message",
    "MessageParam",
    "Messages",
    "Place",
    "Prompt",
    "PromptInput",
    "PromptParam",
    "PromptReader",
    "answer_text",
    "chat_tokens",
    "encode_prompt",
    "has_chat_template",
    "openai_token",
    "parse_prompt",
    "part_tokens",
    "prompt_json",
    "prompt_of",
    "render",
    "spans_by_decoding",
    "text_tokens",
    "token_texts",
]
