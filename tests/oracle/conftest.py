"""Runs peers' packages in environments of their own; results travel as safetensors.

Both sides load the same tiny random models from disk and read the same inputs. A missing
environment is a failure, not a skip: a comparison that did not run proves nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from liveness import LIVENESS_SECONDS
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".venvs"
WIDTH = 32

Tensors = dict[str, torch.Tensor]
RunPeer = Callable[..., Tensors]


def _tiny(name: str) -> PreTrainedModel:
    shape = {
        "vocab_size": 64,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    # Far larger than the usual start, so that every block moves the stream visibly.
    wide = {"initializer_range": 0.2}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, **wide))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape, **wide))
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=WIDTH, n_layer=4, n_head=4, n_positions=64, **wide)
    )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of random four-layer models, by architecture."""
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for seed, name in enumerate(("llama", "qwen2", "gpt2")):
        torch.manual_seed(seed)
        folders[name] = root / name
        _tiny(name).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def inputs() -> Tensors:
    """Two prompts of nine tokens and a direction for each of the layers 1 and 2."""
    generator = torch.Generator().manual_seed(7)
    return {
        "tokens": torch.randint(0, 64, (2, 9), generator=generator),
        "layers.1": torch.randn(WIDTH, generator=generator),
        "layers.2": torch.randn(WIDTH, generator=generator),
    }


@pytest.fixture(scope="session")
def run_peer(tmp_path_factory: pytest.TempPathFactory) -> RunPeer:
    """`run_peer(environment, script, inputs, **options)` gives the tensors the script wrote.

    The script is called as `script FOLDER`: it finds `inputs.safetensors` and `options.json` there
    and writes `outputs.safetensors` beside them.
    """

    def run(environment: str, script: str, given: Tensors, **options: Any) -> Tensors:
        python = ENVIRONMENTS / environment / "bin" / "python"
        if not (ENVIRONMENTS / environment / ".ready").exists():
            pytest.fail(f"the environment {environment!r} is missing: run `make oracles`")
        folder = tmp_path_factory.mktemp(environment)
        save_file(given, folder / "inputs.safetensors")
        (folder / "options.json").write_text(json.dumps(options, default=str))
        # As many threads as here: another number sums in another order, and the plain logits are
        # compared to the bit.
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(
            [python, HERE / "peers" / script, folder],
            env=os.environ | threads,
            capture_output=True,
            text=True,
            timeout=LIVENESS_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            pytest.fail(f"{script} failed:\n{done.stderr[-4000:]}")
        return load_file(folder / "outputs.safetensors")

    return run
