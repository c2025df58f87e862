"""The demo model with quantised weights, as quantisers write it, and the same model with what these
weights stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

GROUP = 32
"""Numbers of four bits that share a scale."""
_LINEAR = tuple(
    f".{name}.weight"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """`write` gives the tensors that stand for a weight `[out, in]`, by what follows its layer's
    name, and the weight that they mean. `dtype` is that of the activations. `kernel` is the
    operator of vLLM that not every build has: on CPUs those for processors with AVX-512."""

    config: dict[str, Any]
    write: Callable[[Tensor], tuple[Tensors, Tensor]]
    dtype: str
    kernel: str | None = None


def write_quantised(folder: Path, model: Path, form: Format) -> tuple[Path, Path]:
    """`model` in the format, and the same model with the weights that it means, in float32."""
    weights = safetensors.torch.load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    quantised: Tensors = {}
    plain: Tensors = {}
    for name, weight in weights.items():
        if name.endswith(_LINEAR):
            tensors, meant = form.write(weight.float())
            layer = name.removesuffix(".weight")
            quantised |= {f"{layer}.{end}": one.contiguous() for end, one in tensors.items()}
            plain[name] = meant
        else:
            quantised[name] = weight.to(getattr(torch, form.dtype))
            plain[name] = quantised[name].float()
    found = []
    for name, tensors, more in (
        ("quantised", quantised, {"quantization_config": form.config, "dtype": form.dtype}),
        ("meant", plain, {"dtype": "float32"}),
    ):
        shutil.copytree(model, folder / name)
        safetensors.torch.save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({**config, **more}))
        found.append(folder / name)
    return found[0], found[1]


def _int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round()
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale


def _float8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, q.float() * scale


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from 0 to 15, which mean as much less 8, their scales in bfloat16, and the weight."""
    groups = weight.view(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    q = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    meant = (q * scale.float()[..., None]).view_as(weight)
    return (q.view_as(weight) + 8).int(), scale, meant


def _packed(q: Tensor) -> Tensor:
    """Eight numbers of four bits in each int32, along the last dimension."""
    parts = q.unflatten(-1, (-1, 8)).long() << 4 * torch.arange(8)
    return parts.sum(-1).to(torch.uint32).view(torch.int32)


def _compressed_int4(weight: Tensor) -> tuple[Tensors, Tensor]:
    q, scale, meant = _int4(weight)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {"weight_packed": _packed(q), "weight_scale": scale, "weight_shape": shape}, meant


def _gptq(weight: Tensor) -> tuple[Tensors, Tensor]:
    q, scale, meant = _int4(weight)
    zeros = torch.full_like(scale.T, 7, dtype=torch.int32)  # one less than they are
    return {
        "qweight": _packed(q).T,
        "scales": scale.T,
        "qzeros": _packed(zeros),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }, meant


def _awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    q, scale, meant = _int4(weight)
    zeros = torch.full_like(scale.T, 8, dtype=torch.int32)

    def ordered(rows: Tensor) -> Tensor:
        return _packed(rows.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2))

    return {"qweight": ordered(q.T), "scales": scale.T, "qzeros": ordered(zeros)}, meant


def _compressed(form: str, weights: dict[str, Any], activations: Any = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _of(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


_EACH_TOKEN = {"strategy": "token", "symmetric": True, "dynamic": True}
_INT4_KERNEL = "cpu_gemm_wna16"
FORMATS = {
    "compressed-tensors W8A8": Format(
        _compressed(
            "int-quantized",
            _of(8, "int", "channel", dynamic=False),
            {"num_bits": 8, "type": "int", **_EACH_TOKEN},
        ),
        _int8,
        "bfloat16",  # the kernel for processors with AMX takes no float32
    ),
    "compressed-tensors FP8": Format(
        _compressed(
            "float-quantized",
            _of(8, "float", "channel", dynamic=False),
            {"num_bits": 8, "type": "float", **_EACH_TOKEN},
        ),
        _float8,
        "bfloat16",
    ),
    "compressed-tensors W4A16": Format(
        _compressed("pack-quantized", _of(4, "int", "group", group_size=GROUP)),
        _compressed_int4,
        "bfloat16",
        _INT4_KERNEL,
    ),
    "GPTQ": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        _gptq,
        "bfloat16",
        _INT4_KERNEL,
    ),
    "AWQ": Format(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        _awq,
        "bfloat16",
        _INT4_KERNEL,
    ),
}
