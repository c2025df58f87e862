"""Every published layout of an SAE, written byte by byte from the same random tensors.

Each builder gives the files of a folder (one file alone for those that are one) and the function
that the SAE must be, in float64 and from the layout's own definition.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from steer.formats.options import ImportOptions

D, F, LAYER = 8, 24, 3
RESID = f"blocks.{LAYER}.hook_resid_post"


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ENC, DEC = draw(1, F, D) / D**0.5, draw(2, F, D) / 3
B_ENC, B_DEC = 0.3 * draw(3, F), 0.5 * draw(4, D)
THRESHOLD = 0.5 * draw(5, F).abs()
SKIP = draw(6, D, D)  # [out, in]

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """The files of one published SAE, and the features and output that it gives for rows x."""

    name: str
    files: dict[str, bytes]
    encode: Encode
    decode: Callable[[Tensor, Tensor], Tensor]
    architecture: str
    site: str = "resid_post"
    write_site: str = "resid_post"
    options: ImportOptions = field(default_factory=ImportOptions)
    folder: str = "sae"

    @property
    def is_file(self) -> bool:
        return len(self.files) == 1 and "npz" not in self.name


def pt(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def npz(arrays: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: array.numpy() for name, array in arrays.items()})
    return stream.getvalue()


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def pre(x: Tensor, *, subtract: bool = False) -> Tensor:
    x = x.double() - (B_DEC if subtract else 0)
    return x @ ENC.double().T + B_ENC


def relu(x: Tensor) -> Tensor:
    return pre(x).relu()


def jumprelu(x: Tensor, threshold: Tensor | float = THRESHOLD, *, subtract: bool = False) -> Tensor:
    a = pre(x, subtract=subtract)
    return a.relu() * (a > threshold)


def topk(x: Tensor, k: int, *, subtract: bool = False) -> Tensor:
    a = pre(x, subtract=subtract).relu()
    return a * (a >= a.topk(k, dim=-1).values[..., -1:])


def plain(z: Tensor, x: Tensor) -> Tensor:
    return z @ DEC.double() + B_DEC


def with_skip(z: Tensor, x: Tensor) -> Tensor:
    return plain(z, x) + x.double() @ SKIP.double().T


LINEAR = {"encoder.weight": ENC, "encoder.bias": B_ENC, "decoder.weight": DEC.T.contiguous()}
UPPER = {"W_enc": ENC.T.contiguous(), "W_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC}
AT_LAYER = ImportOptions(layers=(LAYER,))


def _dictionary(kind: str, arrays: dict[str, Any], encode: Encode, **more: Any) -> Layout:
    trainer = {
        "dict_class": kind,
        "layer": LAYER,
        "lm_name": "EleutherAI/pythia-70m",
        "submodule_name": f"resid_post_layer_{LAYER}",
        "activation_dim": D,
        "dict_size": F,
    }
    files = {"ae.pt": pt(arrays), "config.json": text({"trainer": trainer, "buffer": {}})}
    return Layout(f"dictionary_learning {kind}", files, encode, **{"decode": plain, **more})


def dictionaries() -> list[Layout]:
    norms = DEC.double().norm(dim=-1)
    r_mag, gate, mag = 0.3 * draw(7, F), 0.5 * draw(8, F), 0.5 * draw(9, F)

    def gated(x: Tensor) -> Tensor:
        a = (x.double() - B_DEC) @ ENC.double().T
        return (a + gate > 0) * (r_mag.double().exp() * a + mag).relu()

    number = {"k": torch.tensor(5, dtype=torch.int32), "threshold": torch.tensor(0.4)}
    groups = {"group_sizes": torch.tensor([8, 16])}
    matryoshka = UPPER | number | groups
    return [
        _dictionary(
            "AutoEncoder",
            LINEAR | {"bias": B_DEC},
            lambda x: pre(x, subtract=True).relu() * norms,
            decode=lambda z, x: (z / norms) @ DEC.double() + B_DEC,
            architecture="standard",
        ),
        _dictionary(
            "AutoEncoderNew", LINEAR | {"decoder.bias": B_DEC}, relu, architecture="standard"
        ),
        _dictionary(
            "GatedAutoEncoder",
            {
                "encoder.weight": ENC,
                "decoder.weight": DEC.T.contiguous(),
                "decoder_bias": B_DEC,
                "gate_bias": gate,
                "mag_bias": mag,
                "r_mag": r_mag,
            },
            gated,
            architecture="jumprelu",
        ),
        _dictionary(
            "JumpReluAutoEncoder",
            UPPER | {"threshold": THRESHOLD},
            jumprelu,
            architecture="jumprelu",
        ),
        _dictionary(
            "AutoEncoderTopK",
            LINEAR | {"b_dec": B_DEC} | number,
            lambda x: topk(x, 5, subtract=True),
            architecture="topk",
        ),
        _dictionary(
            "BatchTopKSAE",
            LINEAR | {"b_dec": B_DEC} | number,
            lambda x: jumprelu(x, 0.4, subtract=True),
            architecture="jumprelu",
        ),
        _dictionary(
            "MatryoshkaBatchTopKSAE",
            matryoshka,
            lambda x: jumprelu(x, 0.4, subtract=True),
            architecture="jumprelu",
        ),
    ]


def sparsify() -> list[Layout]:
    arrays = {"encoder.weight": ENC, "encoder.bias": B_ENC, "W_dec": DEC, "b_dec": B_DEC}
    base = {"d_in": D, "expansion_factor": F // D, "num_latents": 0, "k": 6}

    def groupmax(x: Tensor) -> Tensor:
        a = pre(x, subtract=True).relu().unflatten(-1, (6, -1))
        return (a * (a == a.max(-1, keepdim=True).values)).flatten(-2)

    def files(cfg: dict[str, Any], more: dict[str, Tensor]) -> dict[str, bytes]:
        return {"cfg.json": text(base | cfg), "sae.safetensors": save(arrays | more)}

    transcoder = {"transcode": True, "skip_connection": True}
    return [
        Layout(
            "sparsify topk",
            files({"activation": "topk"}, {}),
            lambda x: topk(x, 6, subtract=True),
            plain,
            "topk",
            folder=f"layers.{LAYER}",
        ),
        Layout(
            "sparsify groupmax",
            files({"activation": "groupmax"}, {}),
            groupmax,
            plain,
            "groupmax",
            site="mlp_out",
            write_site="mlp_out",
            folder=f"layers.{LAYER}.mlp",
        ),
        Layout(
            "sparsify transcoder",
            files(transcoder, {"W_skip": SKIP}),
            lambda x: topk(x, 6),
            with_skip,
            "topk",
            site="mlp_in",
            write_site="mlp_out",
            folder=f"layers.{LAYER}.mlp",
        ),
    ]


def gemma() -> list[Layout]:
    lower = {name.lower(): array for name, array in (UPPER | {"threshold": THRESHOLD}).items()}
    hooks = {
        "hf_hook_point_in": f"model.layers.{LAYER}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"model.layers.{LAYER}.post_feedforward_layernorm.output",
    }
    about = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}
    resid = {"hf_hook_point_in": f"model.layers.{LAYER}.output"}
    attention = {"hf_hook_point_in": f"model.layers.{LAYER}.self_attn.o_proj.input"}
    skip = {"affine_skip_connection": SKIP.T.contiguous()}
    return [
        Layout(
            "Gemma Scope 1 npz",
            {"params.npz": npz(UPPER | {"threshold": THRESHOLD})},
            jumprelu,
            plain,
            "jumprelu",
            folder=f"layer_{LAYER}/width_16k/average_l0_71",
        ),
        Layout(
            "Gemma Scope 1 npz, lower case",
            {"params.npz": npz(lower)},
            jumprelu,
            plain,
            "jumprelu",
            site="mlp_out",
            write_site="mlp_out",
            options=ImportOptions(layers=(LAYER,), site="mlp_out"),
        ),
        Layout(
            "Gemma Scope 2 resid_post",
            {"config.json": text(about | resid), "params.safetensors": save(lower)},
            jumprelu,
            plain,
            "jumprelu",
        ),
        Layout(
            "Gemma Scope 2 attn_out",
            {"config.json": text(about | attention), "params.safetensors": save(lower)},
            jumprelu,
            plain,
            "jumprelu",
            site="head_out",
            write_site="head_out",
        ),
        Layout(
            "Gemma Scope 2 transcoder",
            {
                "config.json": text(about | hooks | {"affine_connection": True}),
                "params.safetensors": save(lower | skip),
            },
            jumprelu,
            with_skip,
            "jumprelu",
            site="mlp_in",
            write_site="mlp_out",
        ),
    ]


def llama_scope() -> list[Layout]:
    arrays = LINEAR | {"decoder.bias": B_DEC}
    norm_in, norm_out, t = 3.5, 1.25, 0.3
    s_in, s_out = math.sqrt(D) / norm_in, math.sqrt(D) / norm_out
    norms = (s_in / s_out) * DEC.double().norm(dim=-1)

    def files(out: str) -> dict[str, bytes]:
        config = {
            "jump_relu_threshold": t,
            "dataset_average_activation_norm": {"in": norm_in, "out": norm_out},
            "sparsity_include_decoder_norm": True,
            "hook_point_in": RESID if out == RESID else f"blocks.{LAYER}.mlp_in",
            "hook_point_out": out,
            "act_fn": "jumprelu",
        }
        weights = save(arrays)
        return {"hyperparams.json": text(config), "checkpoints/final.safetensors": weights}

    def encode(x: Tensor) -> Tensor:
        z = s_in * x.double() @ ENC.double().T + B_ENC
        return norms * z / s_in * (z > t * s_in / norms)

    def decode(f: Tensor, x: Tensor) -> Tensor:
        z = f * s_in / norms
        return (z @ DEC.double() + B_DEC) / s_out

    return [
        Layout("Llama Scope", files(RESID), encode, decode, "jumprelu"),
        Layout(
            "Llama Scope transcoder",
            files(f"blocks.{LAYER}.hook_mlp_out"),
            encode,
            decode,
            "jumprelu",
            site="mlp_in",
            write_site="mlp_out",
        ),
    ]


def llamascopium() -> list[Layout]:
    norm = 3.5
    scale, lengths = math.sqrt(D) / norm, DEC.double().norm(dim=-1)
    logs = THRESHOLD.log()
    config = {
        "hook_point_in": RESID,
        "hook_point_out": RESID,
        "act_fn": "jumprelu",
        "sparsity_include_decoder_norm": True,
    }
    about = {f"dataset_average_activation_norm.{RESID}": torch.tensor([norm])}
    names = {"W_E": ENC.T.contiguous(), "b_E": B_ENC, "W_D": DEC, "b_D": B_DEC}

    def files(arrays: dict[str, Tensor], threshold: str) -> dict[str, bytes]:
        held = arrays | about | {threshold: logs}
        return {"config.json": text(config), "sae_weights.safetensors": save(held)}

    def encode(x: Tensor) -> Tensor:
        z = scale * x.double() @ ENC.double().T + B_ENC
        return z * lengths / scale * (z * lengths > THRESHOLD)

    def decode(f: Tensor, x: Tensor) -> Tensor:
        return (f * scale / lengths @ DEC.double() + B_DEC) / scale

    return [
        Layout(
            "Llama Scope R1",
            files(LINEAR | {"decoder.bias": B_DEC}, "log_jumprelu_threshold"),
            encode,
            decode,
            "jumprelu",
        ),
        Layout(
            "llamascopium",
            files(names, "activation_function.log_jumprelu_threshold"),
            encode,
            decode,
            "jumprelu",
        ),
    ]


def single_files() -> list[Layout]:
    goodfire = {
        "encoder_linear.weight": ENC,
        "encoder_linear.bias": B_ENC,
        "decoder_linear.weight": DEC.T.contiguous(),
        "decoder_linear.bias": B_DEC,
    }
    openai = {
        "encoder.weight": ENC,
        "latent_bias": B_ENC,
        "pre_bias": B_DEC,
        "decoder.weight": DEC.T.contiguous(),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.int64),
    }
    rows = {"W_enc": ENC, "W_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC}
    qwen = rows | {"W_dec": DEC.T.contiguous()}

    def normalised(x: Tensor) -> Tensor:
        x = x.double()
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)

    def back(z: Tensor, x: Tensor) -> Tensor:
        x = x.double()
        return plain(z, x) * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)

    middle = ImportOptions(layers=(LAYER,), site="resid_mid")
    thresholds = {"activation_function.threshold": THRESHOLD}
    return [
        Layout("Goodfire", {"sae.pth": pt(goodfire)}, relu, plain, "standard", options=AT_LAYER),
        Layout(
            "Qwen Scope",
            {f"layer{LAYER}.sae.pt": pt(qwen)},
            lambda x: topk(x, 5),
            plain,
            "topk",
            options=AT_LAYER,
            folder="SAE-Res-Qwen3-1.7B-W32K-L0_5",
        ),
        Layout(
            "OpenAI v4",
            {"3.pt": pt(openai | {"activation": "ReLU"})},
            lambda x: pre(x, subtract=True).relu(),
            plain,
            "standard",
            site="resid_mid",
            write_site="resid_mid",
            options=middle,
        ),
        Layout(
            "OpenAI v5",
            {"3.pt": pt(openai | {"activation": "TopK", "activation_state_dict": {"k": 5}})},
            lambda x: topk(normalised(x), 5, subtract=True),
            back,
            "topk",
            site="resid_mid",
            write_site="resid_mid",
            options=middle,
        ),
        Layout(
            "circuit-tracer",
            {"layer_3.safetensors": save(rows | thresholds | {"W_skip": SKIP})},
            jumprelu,
            with_skip,
            "jumprelu",
            site="mlp_in",
            write_site="mlp_out",
            options=AT_LAYER,
        ),
        Layout(
            "circuit-tracer, ReLU",
            {"layer_3.safetensors": save(rows)},
            relu,
            plain,
            "standard",
            site="mlp_in",
            write_site="mlp_out",
            options=AT_LAYER,
        ),
    ]


def layouts() -> list[Layout]:
    """All of them."""
    return [
        *dictionaries(),
        *sparsify(),
        *gemma(),
        *llama_scope(),
        *llamascopium(),
        *single_files(),
    ]
