"""LoRA adapters of requests in vLLM's form: a folder as PEFT writes it, and a number."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import safetensors.torch

from steer.artefacts.lora import Lora
from steer.errors import Unsupported


class LoraRequests:
    """Assumes: the engine's workers see this machine's temporary folder.

    Guarantees: an adapter has one name and number, in whichever server process it is asked for, so
    that vLLM loads it once, and no other adapter, and no cached block of one, is taken for it.
    """

    def __init__(self, max_rank: int | None) -> None:
        """`max_rank` is the largest that the engine was started for; None without LoRA."""
        self.max_rank = max_rank
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers: dict[int, str] = {}
        self._lock = threading.Lock()

    def check(self, lora: Lora) -> None:
        """Raises `Unsupported` (`no_lora`) for a rank that the engine has no room for."""
        if self.max_rank is None or lora.rank > self.max_rank:
            raise Unsupported(
                f"the adapter has rank {lora.rank}, and vLLM was started for at most "
                f"{self.max_rank or 0}: start it with --enable-lora and a larger --max-lora-rank",
                code="no_lora",
            )

    def of(self, lora: Lora | None) -> Any:
        """vLLM's `LoRARequest`, its folder written where this is the first; None without one."""
        if lora is None:
            return None
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        with self._lock:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="steer-lora-")
            folder = Path(self._folder.name) / lora.sha256
            # Of its content, in 31 bits, and beyond what vLLM counts up for adapters of its own.
            number = (1 << 30) + int(lora.sha256[:7], 16)
            if self._numbers.setdefault(number, lora.sha256) != lora.sha256:
                raise Unsupported(
                    "vLLM would take the adapter for another one, whose number is the same by "
                    "chance: train it again with another seed",
                    code="no_lora",
                )
            if not folder.is_dir():
                write_peft(folder, lora)
        return LoRARequest(f"steer-{lora.sha256[:16]}", number, str(folder))


def write_peft(folder: Path, lora: Lora) -> None:
    """The adapter as PEFT saves it, its scales multiplied into the upper halves, because a folder
    has one for all modules."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, part in lora.parts.items():
        path = f"base_model.model.{name}"
        tensors[f"{path}.lora_A.weight"] = part.down
        tensors[f"{path}.lora_B.weight"] = (part.up.float() * part.scale).to(part.up.dtype)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in lora.parts}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
