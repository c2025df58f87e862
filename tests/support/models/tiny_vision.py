"""Models that see, on disk: the demo model behind tiny random image towers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

IMAGE = "<image>"
"""Stands for an image in prompts, and in specs for the token of its parts, whatever the family."""
SIDE, PATCH, SCALE = 128, 16, 2
PARTS = (SIDE // PATCH // SCALE) ** 2
"""Tokens that an image is for Idefics3, beside three that frame it and are text."""


@dataclass(frozen=True)
class Family:
    """`build` makes the model and its processor from the tokenizer and the demo model."""

    build: Callable[[Any, Any], tuple[Any, Any]]
    token: str
    """Of an image's parts."""
    written: str
    """How a prompt shows an image."""
    frame: tuple[str, ...]
    """What else the tokenizer has to know."""
    sizes: tuple[tuple[int, int], ...]
    """Heights and widths of pictures, in turn."""

    def worded(self, text: str) -> str:
        """`text` with its images as the family writes them."""
        return text.replace(IMAGE, self.written)

    def spec(self, spec: Any) -> Any:
        """`spec` with the family's token."""
        return replaced(spec, IMAGE, self.token)

    def picture(self, seed: int) -> Image.Image:
        """Noise."""
        height, width = self.sizes[seed % len(self.sizes)]
        draw = np.random.default_rng(seed)
        return Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))


def replaced(value: Any, old: Any, new: Any) -> Any:
    """`value`, of dictionaries and lists, with `new` wherever `old` is."""
    if isinstance(value, dict):
        return {name: replaced(one, old, new) for name, one in value.items()}
    if isinstance(value, list):
        return [replaced(one, old, new) for one in value]
    return new if value == old else value


def write_seeing_model(folder: Path, demo: Path, family: str = "idefics3") -> Any:
    """Saves the model and its processor to `folder`, and returns the model.

    Its text is the demo model's, with tokens more for images and their frames.
    """
    one = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.add_tokens([one.token, *one.frame], special_tokens=True)
    tokenizer.chat_template = _CHAT.replace(IMAGE, one.written)
    torch.manual_seed(23)
    text = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model, processor = one.build(tokenizer, text)
    # What the demo model lacks, biases and norms of queries and keys, stays as the family makes it.
    model.get_decoder().load_state_dict(text.model.state_dict(), strict=False)
    model.eval().tie_weights()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def _idefics3(tokenizer: Any, text: Any) -> tuple[Any, Any]:
    config = transformers.Idefics3Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": 0.2,
        },
        text_config=text.config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=SCALE,
        tie_word_embeddings=True,
    )
    edge = {"longest_edge": SIDE}
    images = transformers.Idefics3ImageProcessorPil(
        size=edge, max_image_size=edge, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=PARTS)
    return transformers.Idefics3ForConditionalGeneration(config), processor


# Of the rest a part is `_CELL` pixels wide and high, and an image takes as many positions as its
# longer side has parts: each of its tokens has the image's first, its row and its column.
_CELL = 2 * PATCH
_GLM_FRAME = (
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    "<|video|>",
)
_QWEN_FRAME = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "initializer_range": 0.2,
}


def _qwen25(tokenizer: Any, text: Any) -> tuple[Any, Any]:
    return _with_mrope(
        "Qwen2_5_VL",
        tokenizer,
        text,
        {"mrope_section": [4, 6, 6]},
        # Windows of 2 × 2 parts, and layers that look across them and not.
        {"window_size": 2 * _CELL, "fullatt_block_indexes": [1]},
        _qwen_ids(tokenizer),
        (transformers.Qwen2VLImageProcessor, transformers.Qwen2VLVideoProcessor),
    )


def _qwen3(tokenizer: Any, text: Any) -> tuple[Any, Any]:
    """Features of both layers of the tower are added to the stream, behind layers 0 and 1."""
    return _with_mrope(
        "Qwen3VL",
        tokenizer,
        text,
        {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        _qwen_ids(tokenizer),
        (transformers.Qwen2VLImageProcessor, transformers.Qwen3VLVideoProcessor),
    )


def _glm4v(tokenizer: Any, text: Any) -> tuple[Any, Any]:
    names = ("image_start", "image_end", "video_start", "video_end", "video")
    numbers = tokenizer.convert_tokens_to_ids(list(_GLM_FRAME))
    ids = {f"{name}_token_id": one for name, one in zip(names, numbers, strict=True)}
    return _with_mrope(
        "Glm4v",
        tokenizer,
        text,
        {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
        {"image_size": 8 * PATCH},
        {"image_token_id": tokenizer.convert_tokens_to_ids("<|image|>"), **ids},
        (transformers.Glm4vImageProcessor, transformers.Glm4vVideoProcessor),
    )


def _with_mrope(
    name: str,
    tokenizer: Any,
    text: Any,
    rope: dict[str, Any],
    tower: dict[str, Any],
    ids: dict[str, int],
    seen: tuple[Any, Any],
) -> tuple[Any, Any]:
    """What transformers calls `name`, with what its positions and its tower have of their own, and
    its classes that prepare images and videos."""
    config = getattr(transformers, f"{name}Config")(
        text_config=_mrope_text(text, rope),
        vision_config={**_TOWER, "out_hidden_size": text.config.hidden_size, **tower},
        tie_word_embeddings=True,
        **ids,
    )
    images, videos = map(_pixels, seen)
    processor = getattr(transformers, f"{name}Processor")(images, tokenizer, videos)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _mrope_text(text: Any, rope: dict[str, Any]) -> dict[str, Any]:
    config = text.config.to_dict()
    del config["model_type"], config["architectures"]
    config["rope_parameters"] = {**config["rope_parameters"], **rope}
    return config


def _qwen_ids(tokenizer: Any) -> dict[str, Any]:
    start, end, video = tokenizer.convert_tokens_to_ids(list(_QWEN_FRAME))
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }


def _pixels(processor: Any) -> Any:
    pixels = {"shortest_edge": _CELL**2, "longest_edge": 64 * _CELL**2}
    return processor(patch_size=PATCH, size=pixels)


_SIZES = ((4 * _CELL, 6 * _CELL), (5 * _CELL, 3 * _CELL))
_QWEN = ("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", _QWEN_FRAME, _SIZES)
FAMILIES = {
    "idefics3": Family(
        _idefics3,
        IMAGE,
        IMAGE,
        ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        ((SIDE, SIDE),),
    ),
    "qwen2.5-vl": Family(_qwen25, *_QWEN),
    "qwen3-vl": Family(_qwen3, *_QWEN),
    "glm-4v": Family(
        _glm4v,
        "<|image|>",
        "<|begin_of_image|><|image|><|end_of_image|>",
        _GLM_FRAME,
        _SIZES,
    ),
}


_CHAT = """{% for message in messages %}{{ message.role + ':' }}
{%- for part in message.content %}
{%- if part.type == 'image' %}<image>{% else %}{{ ' ' + part.text }}{% endif %}
{%- endfor %}{{ '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
