"""sae-lens: SAEs of its own making, saved by itself, run by itself; and ours, read by it.

Runs in .venvs/sae-lens. For every case: the directory `options["saves"]/case`, and the outputs
`case.features`, `case.decoded`, `case.clamped` and `case.logits` of a model whose block output goes
through the clamped SAE with its error term.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CLASSES = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
    "abstopk": (AbsTopKSAE, AbsTopKSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka_batchtopk": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "matching_pursuit": (MatchingPursuitSAE, MatchingPursuitSAEConfig),
    "transcoder": (Transcoder, TranscoderConfig),
    "skip_transcoder": (SkipTranscoder, SkipTranscoderConfig),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
}


def build(case: dict[str, Any], layer: int, width: int) -> SAE:
    kind, config = CLASSES[case["architecture"]]
    is_transcoder = "transcoder" in case["architecture"]
    hooks = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    if is_transcoder:
        hooks = {
            "hook_name": f"blocks.{layer}.mlp_in",
            "hook_name_out": f"blocks.{layer}.hook_mlp_out",
        }
        case["config"] |= {"d_out": width}
    metadata = SAEMetadata(model_name="tiny", **hooks)
    sae = kind(config(d_in=width, d_sae=96, metadata=metadata, **case["config"]))
    generator = torch.Generator().manual_seed(case["seed"])
    for name, parameter in sorted(sae.named_parameters()):
        scale = 0.2 if name == "W_enc" else 0.3
        drawn = scale * torch.randn(parameter.shape, generator=generator)
        if case["architecture"] == "matching_pursuit" and name == "W_dec":
            drawn = drawn / drawn.norm(dim=-1, keepdim=True)
        parameter.data.copy_(drawn.abs() if name == "threshold" else drawn)
    if isinstance(sae, BatchTopKTrainingSAE):
        sae.topk_threshold.fill_(1.5)
    return sae


def ended(sae: SAE, folder: Path) -> SAE:
    """What is made of an SAE once its training has ended."""
    if not isinstance(sae, TrainingSAE):
        return sae
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def clamped(sae: SAE, x: torch.Tensor, features: list[int], value: float) -> torch.Tensor:
    def clamp(acts: torch.Tensor, hook: object) -> torch.Tensor:
        acts = acts.to_dense() if acts.is_sparse else acts.clone()
        acts[..., features] = value
        return acts

    sae.use_error_term = True
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", clamp)]):
        result = sae(x)
    sae.use_error_term = False
    return result


def clamped_logits(
    model: Any, layer: int, sae: SAE, options: dict[str, Any], tokens: torch.Tensor
) -> torch.Tensor:
    def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return clamped(sae, output, options["features"], options["value"])

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        return model(tokens).logits
    finally:
        handle.remove()


def outputs_of(sae: SAE, name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    features = sae.encode(x)
    features = features.to_dense() if features.is_sparse else features
    decoded = sae(x) if "skip" in sae.cfg.architecture() else sae.decode(features)
    return {f"{name}.features": features, f"{name}.decoded": decoded}


@torch.no_grad()
def main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    given = load_file(folder / "inputs.safetensors")
    model = AutoModelForCausalLM.from_pretrained(options["model"]).eval()
    x, layer = given["x"], options["layer"]
    out = {"plain": model(given["tokens"]).logits}
    for name, case in options["cases"].items():
        sae = build(case, layer, x.shape[-1])
        saves = Path(options["saves"])
        sae.save_model(saves / name)
        sae = ended(sae, saves / f"{name}-ended")
        out |= outputs_of(sae, name, x)
        if not case["clamps"]:
            continue
        out[f"{name}.clamped"] = clamped(sae, x, options["features"], options["value"])
        out[f"{name}.logits"] = clamped_logits(model, layer, sae, options, given["tokens"])
        if (
            options["scale"]
            and case["config"]["normalize_activations"] == "expected_average_only_in"
        ):
            sae.fold_activation_norm_scaling_factor(options["scale"])
            out |= outputs_of(sae, f"{name}.scaled", x)
    for name, path in options["ours"].items():
        out |= outputs_of(SAE.load_from_disk(path), name, x)
    save_file({name: t.contiguous() for name, t in out.items()}, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
