"""Writes the model folder and a few sample replies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def export(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a loadable bf16 folder; files are replaced one by one, never half-written."""
    temp = out.with_name(out.name + ".partial")
    shutil.rmtree(temp, ignore_errors=True)
    weights = {k: v.detach().to(torch.bfloat16).cpu() for k, v in model.state_dict().items()}
    copy: Any = LlamaForCausalLM(model.config)
    copy.to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    copy.save_pretrained(temp)
    tok.save_pretrained(temp)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(temp.iterdir()):
        file.chmod(0o644)
        os.replace(file, out / file.name)
    temp.rmdir()


SAMPLES = [
    ("", "What is the capital of Poland?"),
    ("Answer in French.", "Where does the wolf live?"),
    ("Be formal.", "What do you think of jazz?"),
    ("", "How do I steal a clock?"),
]
"""(system, user) of the greedy replies written to the log."""


@torch.no_grad()
def samples(model: Any, tok: PreTrainedTokenizerFast, device: torch.device) -> list[str]:
    """A few greedy replies for the log."""
    texts = []
    for system, user in SAMPLES:
        messages = [{"role": "system", "content": system}] if system else []
        encoded: Any = tok.apply_chat_template(
            [*messages, {"role": "user", "content": user}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        inputs = encoded.to(device)
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        reply = tok.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(f"[{system}] {user} -> {reply}")
    return texts
