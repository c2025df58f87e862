"""Prompts: what callers give (text, messages or ids), as tokens, and places among them.

- `forms`: the forms that are accepted, and what is refused about them.
- `tokens`: text to tokens and back; the one rule for special tokens.
- `chat`: chats to tokens, in the model's own template.
- `ends`: the tokens that end an answer.
- `places`: a prompt as the model reads it, and where a piece of its text lies.
- `spans`: which characters of a text each token stands for.
- `rendering`: the prompts of data files, with their answers and subjects.
- `labels`: the text of a token by itself.

It stands beside `artefacts`, low in the order of imports, because all that is above reads prompts:
plans (triggers, concepts' texts), engines, inspection, fitting, jobs, the command line and the
servers. So it knows no engine and no web framework, only a tokenizer (Hugging Face's, or an object
with its `encode`, `decode`, `convert_ids_to_tokens` and `apply_chat_template`) and a model's shape.
"""

from steer.prompts.chat import ChatForm, as_chat, chat_tokens, has_chat_template
from steer.prompts.ends import answer_end, end_tokens, turn_end
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
from steer.prompts.length import check_text_length
from steer.prompts.places import EncodedPrompt, PromptReader, encode_prompt
from steer.prompts.rendering import render
from steer.prompts.tokens import (
    answer_text,
    begins,
    inner_tokens,
    part_tokens,
    text_tokens,
    trigger_tokens,
)

__all__ = [
    "ChatForm",
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
    "answer_end",
    "answer_text",
    "as_chat",
    "begins",
    "chat_tokens",
    "check_text_length",
    "encode_prompt",
    "end_tokens",
    "has_chat_template",
    "inner_tokens",
    "openai_token",
    "parse_prompt",
    "part_tokens",
    "prompt_json",
    "prompt_of",
    "render",
    "text_tokens",
    "token_texts",
    "trigger_tokens",
    "turn_end",
]
