"""One round of repeng, one chat at a time; prints tokens per second."""

import json
import sys
import time
from pathlib import Path

import torch
from repeng import ControlModel, ControlVector
from transformers import AutoModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
base = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32)
model = ControlModel(base, [job["layer"]])
vectors = [
    ControlVector(model_type="llama", directions={job["layer"]: torch.tensor(row).numpy()})
    for row in job["directions"]
]


def generate(n: int) -> int:
    ids = torch.tensor([job["prompts"][n]])
    model.set_control(vectors[n % len(vectors)], 1.0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job["tokens"],
        min_new_tokens=job["tokens"],
        do_sample=False,
        pad_token_id=0,
    )
    model.reset()
    return int(out.shape[1]) - ids.shape[1]


with torch.inference_mode():
    generate(0)
    started = time.perf_counter()
    produced = sum(generate(n) for n in range(job["chats"]))
    print(produced / (time.perf_counter() - started))
