"""Peers' packages used as their documentation shows: one request at a time, in their own
environments (set up by `make oracles`)."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.engine import _completing
from benchmarks.timing import interleaved, paired_ratio
from benchmarks.workload import CHATS, MODEL, TOKENS, prompts, requests, specs, vectors
from steer.engines.transformers.engine import TransformersEngine

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"steering-vectors": "peers", "repeng": "repeng"}


def run(rounds: int) -> list[tuple[str, str, str, str]]:
    """64 chats × 32 tokens over 16 specs: our engine, and each peer, in turn."""
    with (
        TransformersEngine.load(MODEL, name="steer-demo") as engine,
        tempfile.TemporaryDirectory() as folder,
    ):
        job = _job(engine, Path(folder) / "job.json")
        contestants = {"steer": _completing(engine, requests(engine, specs(16)))}
        for peer, venv in PEERS.items():
            contestants[peer] = _peer(peer, venv, job)
        found = interleaved(contestants, rounds=rounds, title="peers")
    rows = [("steer, 16 specs in one batch", str(found["steer"]), "", "")]
    for peer in PEERS:
        ratio = paired_ratio(found["steer"], found[peer])
        rows.append((f"{peer}, one at a time", str(found[peer]), f"steer is {ratio} ×", "≥ 10 ×"))
    return rows


def _job(engine: TransformersEngine, path: Path) -> Path:
    """What a peer's script needs: the model, the prompts and a direction for each chat."""
    found = vectors()
    chosen = [spec["interventions"][0] for spec in specs(16)]  # type: ignore[index]
    path.write_text(
        json.dumps(
            {
                "model": str(MODEL),
                "tokens": TOKENS,
                "prompts": [list(prompt) for prompt in prompts(engine)],
                "layer": 4,
                "directions": [
                    (float(item["strength"]) * found[item["vector"]][4]).tolist() for item in chosen
                ],
                "chats": CHATS,
            }
        )
    )
    return path


def _peer(peer: str, venv: str, job: Path) -> Callable[[], float]:
    """The peer as a contestant that measures itself, and so returns a negative rate."""
    return lambda: -_peer_rate(peer, venv, job)


def _peer_rate(peer: str, venv: str, job: Path) -> float:
    """Tokens per second of one round, as the peer's own process measures it."""
    python = ROOT / ".venvs" / venv / "bin" / "python"
    script = ROOT / "benchmarks" / "peer_scripts" / f"run_{peer.replace('-', '_')}.py"
    done = subprocess.run([python, script, job], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])
