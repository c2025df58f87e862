"""Fields that this server does not implement, with the values by which they ask for nothing.

Clients send many of them by default: the OpenAI SDK, LiteLLM, LangChain, Inspect, lm-eval, `llm`,
the Vercel AI SDK, Open WebUI, and what was written for vLLM. They are accepted with such a value,
or null, and refused by name with any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from steer.errors import Unsupported, pointer

Neutral = Mapping[str, Sequence[Any]]

GENERATION: Neutral = MappingProxyType(
    {
        # OpenAI's. Nothing is stored here, whatever `store` says: it cannot change the answer.
        "store": (False, True),
        "service_tier": ("auto", "default"),
        "prompt_cache_options": ({},),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "moderation": (),
        # vLLM's.
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "spaces_between_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "truncation_side": (),
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "logprob_token_ids": ([],),
        "prompt_logprobs": (),
        "structured_outputs": ({},),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "priority": (0,),
        "cache_salt": (),
        "vllm_xargs": ({},),
        "watermarking": (False,),
        "thinking_token_budget": (-1,),
        "repetition_detection": (),
        "return_tokens_as_token_ids": (False,),
        "return_token_ids": (False,),
        "typical_p": (1,),
        # What was meant for a client's `extra_body` and is empty.
        "extra_body": ({},),
    }
)

CHAT: Neutral = MappingProxyType(
    {
        **GENERATION,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        # How many tools one answer may call: none, where there are none.
        "parallel_tool_calls": (False, True),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "echo": (False,),
        "include_reasoning": (True,),
        "documents": ([],),
        "chat_template": (),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
    }
)

COMPLETION: Neutral = MappingProxyType({**GENERATION, "suffix": ("",), "prompt_embeds": ()})


RESPONSES: Neutral = MappingProxyType(
    {
        **GENERATION,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (False, True),
        "max_tool_calls": (),
        "conversation": (),
        "background": (False,),
        "prompt": (),
        "reasoning": ({},),
        "truncation": ("disabled",),
        "context_management": ([],),
    }
)


def without_nulls(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without the fields that are null, which ask for nothing."""
    return {name: value for name, value in data.items() if value is not None}


def without_neutral(data: Mapping[str, Any], neutral: Neutral) -> dict[str, Any]:
    """`data` without the fields in `neutral`. Raises `Unsupported` where one of them asks for
    something."""
    for name, value in data.items():
        if name in neutral and value is not None and value not in neutral[name]:
            allowed = ", ".join(repr(item) for item in neutral[name])
            only = f" (only {allowed} is accepted)" if allowed else ""
            raise Unsupported(
                f"{name!r} is not supported here: leave it out{only}",
                param=pointer(name),
                code="unsupported_parameter",
            )
    return {name: value for name, value in data.items() if name not in neutral}
