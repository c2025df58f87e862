"""A model that sees, on disk: the demo model behind a tiny random image tower, as Idefics3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

IMAGE = "<image>"
"""The token that stands for each part of an image."""
SIDE, PATCH, SCALE = 128, 16, 2
PARTS = (SIDE // PATCH // SCALE) ** 2
"""Tokens that an image is, beside three that frame it and are text."""

_FRAME = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def write_seeing_model(folder: Path, demo: Path) -> Idefics3ForConditionalGeneration:
    """Saves the model and its processor to `folder`, and returns the model.

    Its text is the demo model's, with tokens more for images and their frames.
    """
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.add_tokens([IMAGE, *_FRAME], special_tokens=True)
    tokenizer.chat_template = _CHAT
    torch.manual_seed(23)
    text = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
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
            image_token_id=image_id,
            scale_factor=SCALE,
            tie_word_embeddings=True,
        )
    ).eval()
    model.model.text_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    _processor(tokenizer).save_pretrained(folder)
    return model


def _processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    edge = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(images, tokenizer, image_seq_len=PARTS)


_CHAT = """{% for message in messages %}{{ message.role + ':' }}
{%- for part in message.content %}
{%- if part.type == 'image' %}<image>{% else %}{{ ' ' + part.text }}{% endif %}
{%- endfor %}{{ '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


def picture(seed: int) -> Image.Image:
    """Noise, of the size that the tower sees."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
