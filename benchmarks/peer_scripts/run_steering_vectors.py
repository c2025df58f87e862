"""One round of steering-vectors, one chat at a time; prints tokens per second."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
vectors = [
    SteeringVector(layer_activations={job["layer"]: torch.tensor(row)}, layer_type="decoder_block")
    for row in job["directions"]
]


def generate(n: int) -> int:
    ids = torch.tensor([job["prompts"][n]])
    with vectors[n % len(vectors)].apply(model):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job["tokens"],
            min_new_tokens=job["tokens"],
            do_sample=False,
            pad_token_id=0,
        )
    return int(out.shape[1]) - ids.shape[1]


with torch.inference_mode():
    generate(0)
    started = time.perf_counter()
    produced = sum(generate(n) for n in range(job["chats"]))
    print(produced / (time.perf_counter() - started))
