"""From upload to steering: a vector set of an 8B model's shape (32 layers × 4096, 512 KiB).

Two servers on loopback, each with a registry on disk. On the first, with a fake engine of that
model's shape, an upload is timed from the client's first byte to the answer, and on to the first
token of a chat steered by it: receive, parse, check, hash, store durably, compile the plan, without
a model's own time. On the second, a real (random, 32-layer, 256-wide) transformers model streams a
long completion while such uploads arrive; its gaps between tokens are compared with those of the
same completion alone.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from gguf import GGUFWriter

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.serve import Server
from steer_server.settings import ServerSettings

HEADINGS = ("measured", "milliseconds", "ratio", "aim")
Row = tuple[str, str, str, str]
"""What was measured, milliseconds (median and range), ratio, aim."""

LAYERS, WIDTH = 32, 4096
TOKENS = 160
SETS = 40
RATES = (1, 10)
_CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "stream": True}


def run(rounds: int) -> list[Row]:
    """The table of this benchmark; every upload is of numbers not seen before."""
    rows: list[Row] = []
    shape = fake_model(n_layers=LAYERS, d_model=WIDTH, name="shape-of-8b")
    with _served(FakeEngine(shape)) as url, httpx.Client(base_url=url, timeout=60) as http:
        for form, write in (("canonical safetensors", _canonical), ("GGUF", _gguf)):
            times = [_first_token(http, write, turn) for turn in range(rounds + 1)][1:]
            rows.append((f"{form}: upload to answer", _shown([one for one, _ in times]), "", ""))
            both = [upload + token for upload, token in times]
            rows.append((f"{form}: upload to first steered token", _shown(both), "", "< 100 ms"))
    rows += _beside_a_generation(rounds)
    return rows


def _first_token(
    http: httpx.Client, write: Callable[[int], bytes], turn: int
) -> tuple[float, float]:
    """Seconds of an upload, and of a steered chat to its first token."""
    name = f"{write.__name__.strip('_')}-{turn}"
    data = write(turn)
    started = time.perf_counter()
    answer = http.post("/v1/steering/vectors", files={"file": (name, data)}, data={"name": name})
    uploaded = time.perf_counter()
    assert answer.status_code == 201, answer.text
    spec = {"interventions": [{"kind": "add", "vector": name}]}
    body = {**_CHAT, "model": "shape-of-8b", "steering": spec}
    with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get(
                "content"
            ):
                break
        first = time.perf_counter()
    return uploaded - started, first - uploaded


def _beside_a_generation(rounds: int) -> list[Row]:
    """Gaps between a stream's tokens, alone and while uploads arrive, by turns."""
    alone: list[float] = []
    beside: dict[int, list[float]] = {rate: [] for rate in RATES}
    uploads: dict[int, list[float]] = {rate: [] for rate in RATES}
    with _served(_small_model()) as url, httpx.Client(base_url=url, timeout=120) as http:
        _gaps(http)
        for turn in range(rounds):
            alone += _gaps(http)
            for rate in RATES:
                with _uploading(url, f"{rate}-{turn}", rate, uploads[rate]):
                    beside[rate] += _gaps(http)
    rows = [("gap between tokens, no uploads", _gap(alone), "", "")]
    for rate in RATES:
        ratio = statistics.median(beside[rate]) / statistics.median(alone)
        title = f"gap between tokens, {rate} uploads a second"
        rows.append((title, _gap(beside[rate]), f"{ratio:.3f}", "not paused"))
        count = f"{len(uploads[rate])} uploads"
        rows.append(("  upload to answer meanwhile", _shown(uploads[rate]), count, "< 100 ms"))
    return rows


def _gap(seconds: list[float]) -> str:
    """Median, 99th percentile and longest in milliseconds."""
    last = sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))] * 1e3
    return (
        f"{statistics.median(seconds) * 1e3:.1f} ms, p99 {last:.1f}, longest "
        f"{max(seconds) * 1e3:.1f}"
    )


def _gaps(http: httpx.Client) -> list[float]:
    body = {"prompt": "hello", "max_tokens": TOKENS, "stream": True, "model": "small"}
    body |= {"temperature": 0}
    times = []
    with http.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.status_code == 200, stream.read()
        for line in stream.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0].get("text"):
                times.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(times)]


@contextmanager
def _uploading(url: str, turn: str, rate: int, seconds: list[float]) -> Iterator[None]:
    """Uploads one set after the other from a process of its own, until the block ends."""
    spawned = multiprocessing.get_context("spawn")
    ready, done, times = spawned.Event(), spawned.Event(), spawned.Queue()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(SETS):
            data = _canonical(zlib.crc32(f"{turn}-{number}".encode()))
            (Path(folder) / f"beside-{turn}-{number}").write_bytes(data)
        process = spawned.Process(target=_upload_all, args=(url, folder, rate, ready, done, times))
        process.start()
        assert ready.wait(60), "the uploading process did not start"
        try:
            yield
        finally:
            done.set()
            seconds += times.get(timeout=60)
            process.join()


def _upload_all(url: str, folder: str, rate: int, ready: Any, done: Any, times: Any) -> None:
    """Uploads the files in `folder`, `rate` a second at most; their seconds go into `times`."""
    files = [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())]
    seconds = []
    with httpx.Client(base_url=url, timeout=60) as http:
        ready.set()
        for name, data in files:
            if done.wait(1 / rate):
                break
            started = time.perf_counter()
            http.post(
                "/v1/steering/vectors", files={"file": (name, data)}, data={"name": name}
            ).raise_for_status()
            seconds.append(time.perf_counter() - started)
    times.put(seconds)


def _vector(seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(WIDTH, generator=generator) for n in range(LAYERS)}


def _canonical(seed: int) -> bytes:
    return ControlVector.of(_vector(seed)).to_bytes()


def _gguf(seed: int) -> bytes:
    """As repeng writes, without the card; blocks 1 to 31, because GGUF has no place for block 0."""
    with tempfile.NamedTemporaryFile() as file:
        writer = GGUFWriter(file.name, "controlvector")
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_uint32("controlvector.layer_count", LAYERS - 1)
        for layer, row in _vector(seed).items():
            if layer:
                writer.add_tensor(f"direction.{layer}", row.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(file.name).read_bytes()


def _small_model() -> Engine:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from steer.engines.transformers.engine import TransformersEngine  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=256,
        num_hidden_layers=LAYERS,
        intermediate_size=512,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    return TransformersEngine(model, ByteTokenizer(), name="small", rows=4, slots=8)


@contextmanager
def _served(engine: Engine) -> Iterator[str]:
    """The engine behind the server, on a loopback port, with a registry in a new folder."""
    listening = threading.Event()

    class Announced(Server):
        async def startup(self, sockets: object = None) -> None:
            await super().startup(sockets)  # type: ignore[arg-type]
            listening.set()

    with tempfile.TemporaryDirectory() as folder, Registry.open(folder) as registry:
        settings = ServerSettings(port=0, measured_share=0)
        server = Announced(create_app(engine, registry, settings), settings)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert listening.wait(60), "the server did not start"
        try:
            yield server.url
        finally:
            server.should_exit = True
            thread.join()


def _shown(seconds: list[float]) -> str:
    """Median and range in milliseconds."""
    low, high = min(seconds) * 1e3, max(seconds) * 1e3
    return f"{statistics.median(seconds) * 1e3:.1f} ms ({low:.1f}–{high:.1f})"
