"""Train the demo model: ``python -m steer_vectors.demo.recipe``.

Muon for matrices (weight decay .4; projections into the residual stream start at
zero and learn at half the rate, which keeps the residual stream small) and AdamW
for embeddings and norms.  Two phases: the second adds the
exceptions to refusal (see `draw_exception`).  The run writes a
resumable checkpoint and a loadable model folder every few minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from steer_vectors.demo.recipe.training.batches import Batch, Batches
from steer_vectors.demo.recipe.training.corpus import Corpus
from steer_vectors.demo.recipe.training.export import export, samples
from steer_vectors.demo.recipe.training.tokenizer import train_tokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("steer_vectors.demo")
MODEL = Path(__file__).resolve().parents[2] / "model"
RESIDUAL_WRITERS = ("o_proj", "down_proj")


def build_tokenizer(seed: int, vocab: int, context: int) -> PreTrainedTokenizerFast:
    """Tokenizer trained on a sample of the corpus."""
    docs = Corpus(seed).documents(30_000)
    texts = (t for d in docs for t in ([d.text] if d.text else [m["content"] for m in d.messages]))
    return train_tokenizer(texts, vocab, context)


def build_model(tok: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A small Llama with tied embeddings; residual writers start at zero."""
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        intermediate_size=args.hidden,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.kv_heads,
        head_dim=32,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if any(w in name for w in RESIDUAL_WRITERS):
            torch.nn.init.zeros_(weight)
    model.generation_config.eos_token_id = tok.eos_token_id
    model.generation_config.pad_token_id = tok.pad_token_id
    model.generation_config.bos_token_id = tok.bos_token_id
    model.generation_config.max_new_tokens = 64
    return model


def build_optimizers(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the blocks, AdamW on everything else."""
    inner = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    writers = [p for n, p in inner if any(w in n for w in RESIDUAL_WRITERS)]
    readers = [p for n, p in inner if not any(w in n for w in RESIDUAL_WRITERS)]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    muon = torch.optim.Muon(
        [{"params": readers, "lr": args.muon_lr}, {"params": writers, "lr": args.muon_lr / 2}],
        lr=args.muon_lr,
        weight_decay=args.weight_decay,
        momentum=0.95,
    )
    adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.01)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def rate(step: int, first: int, second: int) -> float:
    """Share of the peak rate, in two phases.

    The first warms up over 30 steps, is constant to 45 % and falls linearly to
    2 %; the second restarts at half the rate and falls linearly to 2 %.
    """
    if step >= first:
        return 0.5 - 0.48 * (step - first) / second
    if step < 30:
        return (step + 1) / 30
    done = step / first
    return 1.0 if done < 0.45 else 1.0 - 0.98 * (done - 0.45) / 0.55


def loss_of(model: Any, batch: Batch, device: torch.device, fast: bool) -> torch.Tensor:
    """Mean next-token loss over the learned tokens; only they reach the output layer."""
    ids, targets = batch.ids.to(device), batch.targets.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [docs, T, d]
        keep = targets != -100
        logits = model.lm_head(hidden[keep])  # [learned, vocab]
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits.float(), targets[keep])
    return loss


def validate(model: LlamaForCausalLM, held: list[Batch], device: torch.device, fast: bool) -> float:
    """Mean loss on documents of another seed."""
    with torch.no_grad():
        return sum(float(loss_of(model, b, device, fast)) for b in held) / len(held)


class Run:
    """A training run that can stop and go on.

    Assumes: ``args.work`` belongs to this run.
    Guarantees: after a stop, the same command continues from the last checkpoint.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.device = torch.device(args.device)
        self.tok = build_tokenizer(args.seed, args.vocab, args.context)
        self.model: Any = build_model(self.tok, args)
        self.model.to(self.device)  # type: ignore[arg-type]
        self.optimizers = build_optimizers(self.model, args)
        self.batches = Batches(self.tok, args.seed, args.docs, args.steps)
        held = Batches(self.tok, args.seed + 1, args.docs, args.steps)
        self.held = [held.at(i) for i in range(8)]
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.last = args.steps + args.more
        self.file = args.work / "checkpoint.pt"
        if self.file.exists():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        log.info("resumed at step %d", self.step)

    def save(self) -> None:
        """Checkpoint, export, and log the state of the run."""
        state = {
            "model": self.model.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)
        self.model.eval()
        valid = validate(self.model, self.held, self.device, self.args.bf16)
        log.info(
            "step %d tokens %d seconds %.0f validation loss %.4f",
            self.step,
            self.tokens,
            self.seconds,
            valid,
        )
        for text in samples(self.model, self.tok, self.device):
            log.info("  %s", text)
        export(self.model, self.tok, self.args.out)
        self.model.train()
        record = {
            "step": self.step,
            "of": self.last,
            "tokens": self.tokens,
            "seconds": round(self.seconds),
            "validation_loss": round(valid, 4),
        }
        (self.args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")

    def train_step(self) -> float:
        """One update; returns the loss."""
        batch = self.batches.at(self.step)
        loss = loss_of(self.model, batch, self.device, self.args.bf16)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(self.step, self.args.steps, self.args.more)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tokens += int((batch.ids != self.tok.pad_token_id).sum())
        self.step += 1
        return float(loss.detach())

    def go(self) -> None:
        """Train to the last step."""
        bar = tqdm(total=self.last, initial=self.step, mininterval=10)
        saved = last = time.monotonic()
        while self.step < self.last:
            loss = self.train_step()
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            bar.update()
            if self.step % 50 == 0:
                log.info("step %d loss %.3f seconds %.0f", self.step, loss, self.seconds)
            if now - saved > self.args.every or self.step == self.last:
                self.save()
                saved = last = time.monotonic()


def parse_args() -> argparse.Namespace:
    """Command line; the defaults are the published recipe."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--out", type=Path, default=MODEL, help="model folder to write")
    p.add_argument("--work", type=Path, help="checkpoint folder (default: OUT.work)")
    p.add_argument("--steps", type=int, default=3500, help="steps of the first phase")
    p.add_argument("--more", type=int, default=700, help="steps of the second phase")
    p.add_argument("--docs", type=int, default=64, help="documents per batch")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--width", type=int, default=192)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--vocab", type=int, default=3072)
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--muon-lr", type=float, default=0.02)
    p.add_argument("--adam-lr", type=float, default=4e-3)
    p.add_argument("--weight-decay", type=float, default=0.4)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="autocast; the weights stay in float32",
    )
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--every", type=float, default=200, help="seconds between checkpoints")
    args = p.parse_args()
    args.work = args.work or args.out.with_name(args.out.name + ".work")
    return args


def main() -> None:
    """Entry point."""
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.work / "train.log")],
    )
    run = Run(args)
    count = sum(p.numel() for p in run.model.parameters())
    log.info("%d parameters, vocabulary %d", count, len(run.tok))
    run.go()


if __name__ == "__main__":
    main()
