"""Train and label the demo SAE: ``python -m steer_vectors.demo.recipe.sae``.

A TopK SAE on the residual stream after one block, trained on the recipe's own documents. The last
prompt tokens, where a reply is decided, are drawn three times as often as others. What is measured
is the SAE as saved, in bfloat16: explained variance, loss recovered, which attribute every latent
tells apart, and what clamping single latents does to replies.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from steer_vectors.demo.recipe.sae.effects import (
    CAUSAL,
    CLASS_OF,
    Bench,
    Effect,
    best_clamp,
    candidates,
)
from steer_vectors.demo.recipe.sae.labels import classes_of, describe, matches, scores, table
from steer_vectors.demo.recipe.sae.states import corpus_states, examples, reply_states
from steer_vectors.demo.recipe.sae.training import Trainer, TrainingOptions
from steer_vectors.demo.recipe.training.batches import collate, encode
from steer_vectors.demo.recipe.training.corpus import Corpus, reader
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from steer.artefacts.sae import SAE, FeatureLabel, load_directory, save_directory

log = logging.getLogger("steer_vectors.demo")
DEMO = Path(__file__).resolve().parents[2]
EXTRA_DRAWS = 2
STRENGTHS = (1.0, 2.0, 3.0)
"""Clamp values that are tried, as multiples of the distance between the class means."""
# Training draws chunks 0, 1, 2, … of its seed; these seeds are far above them.
TRAIN_SEED, TEST_SEED = 900_000_007, 900_000_011


def train(model: Any, tok: PreTrainedTokenizerFast, args: argparse.Namespace) -> SAE:
    """The SAE, without labels."""
    states = corpus_states(model, tok, args.layer, tokens=args.tokens, seed=TRAIN_SEED + args.seed)
    rows = torch.cat([states.rows, *[states.rows[states.decides]] * EXTRA_DRAWS])
    options = TrainingOptions(latents=args.latents, k=args.k, steps=args.steps, seed=args.seed)
    weights = Trainer(rows, options).run()
    return SAE.of(
        "topk",
        W_enc=weights.W_enc,
        b_enc=weights.b_enc,
        W_dec=weights.W_dec,
        b_dec=weights.b_dec,
        k=args.k,
        layer=args.layer,
        model="steer-demo",
    )


def explained_variance(sae: SAE, rows: Tensor) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖²."""
    error = (rows - sae.decode(sae.encode(rows))).square().sum()
    return 1.0 - float(error / (rows - rows.mean(0)).square().sum())


@torch.no_grad()
def loss_recovered(
    model: Any, tok: PreTrainedTokenizerFast, sae: SAE, documents: int = 640
) -> float:
    """(L₀ − L_sae) / (L₀ − L): the loss on replies with the block's output replaced by its
    reconstruction, between that with zeros (L₀) and the model's own (L). The first token keeps its
    state, as in training."""
    rows = [encode(tok, one) for one in Corpus(TEST_SEED).documents(documents)]
    rows.sort(key=lambda row: len(row[0]))
    edits: list[Callable[[Tensor], Tensor] | None] = [
        None,
        lambda x: sae.decode(sae.encode(x)),
        torch.zeros_like,
    ]
    change = [edits[0]]

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if change[0] is None:
            return output
        changed = change[0](output)
        changed[:, 0] = output[:, 0]
        return changed

    handle = model.model.layers[sae.layer].register_forward_hook(hook)
    totals = []
    for edit in edits:
        change[0] = edit
        total, count = 0.0, 0
        for start in range(0, documents, 32):
            batch = collate(rows[start : start + 32], int(tok.pad_token_id))
            logits = model(batch.ids).logits.flatten(0, 1)
            wanted = batch.targets.flatten()
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            total, count = total + float(loss), count + int((wanted != -100).sum())
        totals.append(total / count)
    handle.remove()
    plain, rebuilt, without = totals
    return (without - rebuilt) / (without - plain)


def label(
    model: Any, tok: PreTrainedTokenizerFast, sae: SAE, args: argparse.Namespace
) -> tuple[dict[int, FeatureLabel], dict[str, Any], list[Effect]]:
    """Labels for the latents, figures about them, and the effects of clamps."""
    seen = list(examples(args.chats, held_out=False, seed=args.seed + 1))
    unseen = list(examples(args.chats, held_out=True, seed=args.seed + 2))
    last, replies = reply_states(model, tok, args.layer, seen)
    chosen_on = table(scores(sae, last, replies), seen)
    measured_on = table(scores(sae, *reply_states(model, tok, args.layer, unseen)), unseen)
    named = matches(chosen_on, measured_on)
    test = corpus_states(model, tok, args.layer, tokens=40_000, seed=TEST_SEED + args.seed)
    labels = describe(sae, test, named, tok)
    bench = Bench(model, tok, sae, reader())
    effects = []
    for attribute in CAUSAL:
        known, has = classes_of(seen)[CLASS_OF[attribute]]
        difference = last[has].mean(0) - last[known & ~has].mean(0)
        latents = candidates(attribute, sae, chosen_on, difference, args.candidates)
        values = [round(factor * float(difference.norm()), 2) for factor in STRENGTHS]
        effect = best_clamp(bench, attribute, latents, values, args.data)
        log.info("%s", effect)
        effects.append(effect)
        old = labels[effect.latent]
        if old.effect is None or effect.change > old.effect:
            labels[effect.latent] = old.model_copy(update={"effect": round(effect.change, 3)})
    figures = {
        "explained_variance": round(explained_variance(sae, test.rows), 4),
        "explained_variance_last_prompt_token": round(
            explained_variance(sae, test.rows[test.decides]), 4
        ),
        "loss_recovered": round(loss_recovered(model, tok, sae), 4),
        "active_per_token": round(float((sae.encode(test.rows) > 0).sum(-1).float().mean()), 2),
        "latents_never_active": sae.d_sae - len(labels),
        "latents_auroc_90": sum(match.auroc >= 0.9 for match in named),
        "latents_auroc_90_before_reply": sum(
            match.auroc >= 0.9 and match.place == "prompt" for match in named
        ),
    }
    return labels, figures, effects


def card_fields(
    args: argparse.Namespace, figures: dict[str, Any], effects: list[Effect]
) -> dict[str, Any]:
    """What the card says: how it was made, what was measured, and how to use it."""
    strong = [e for e in effects if e.change >= 0.4 and e.after.valid >= 0.8]
    return {
        "description": (
            f"TopK SAE on the residual stream after block {args.layer} of the demo model. Clamp at "
            "the last prompt token, where the model decides how to reply; single latents that "
            "do so: "
            + ", ".join(f"{e.attribute} = {e.latent} at {e.value:g}" for e in strong)
            + "."
        ),
        "licence": "Apache-2.0",
        "tags": ("demo",),
        "default_where": {"phases": ["prompt"], "positions": [[-1, None]]},
        "provenance": {
            "recipe": "steer_vectors.demo.recipe.sae",
            "seed": args.seed,
            "tokens": args.tokens,
            "steps": args.steps,
            "source": "2406.04093",
            "figures": figures,
            "clamps": [asdict(effect) for effect in effects],
        },
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Train and label the demo SAE.")
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--data", type=Path, default=DEMO / "data")
    parser.add_argument("--out", type=Path, default=DEMO / "saes")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--chats", type=int, default=4000)
    parser.add_argument("--candidates", type=int, default=6, help="latents tried, of each sort")
    parser.add_argument("--relabel", action="store_true", help="keep the weights that are there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch likes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    tok = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    folder = args.out / f"resid-{args.layer}"
    if not args.relabel:
        save_directory(train(model, tok, args), folder, dtype=torch.bfloat16)
    sae = load_directory(folder)
    labels, figures, effects = label(model, tok, sae, args)
    fields = card_fields(args, figures, effects)
    card = type(sae.card).model_validate(sae.card.model_dump() | fields)
    save_directory(replace(sae, labels=labels, card=card), folder, dtype=torch.bfloat16)
    log.info("%s", figures)
