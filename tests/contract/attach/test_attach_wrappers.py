"""`attach` reaches the model that really runs, whatever is around it, or refuses by name."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attach_oracle import ADD, IDS, LENGTH, NEW, VECTOR, WHERE, begun, generate, oracle, steered
from tiny_models import build, tiny_tokenizer
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    DynamicCache,
    pipeline,
)

import steer
from steer.errors import EngineError, SteerError

TinyModel = Callable[[str], Any]


class Outer(nn.Module):
    """Calls what it holds past its hooks, as PEFT does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Any:
        return self.inner.forward(**batch)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.generate(*args, **kwargs)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_blocks(model: Any) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def with_lora(model: Any) -> Any:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


WRAPPERS = {
    "itself": lambda model: model,
    "a module": Outer,
    "a module in a module": lambda model: Outer(Outer(model)),
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "a compiled forward": compiled_forward,
    "compiled blocks": compiled_blocks,
    "a module around a compiled one": lambda model: Outer(compiled(model)),
    "LoRA": with_lora,
}


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_that_runs_is_steered(wrapper: str, ran_before: bool) -> None:
    model = build("llama")
    wrapped = WRAPPERS[wrapper](model)
    plain = generate(wrapped) if ran_before else None
    tokens, count = oracle(model, IDS[0].tolist(), "window")
    with steered(wrapped, "window") as attached:
        assert generate(wrapped) == [tokens]
        (receipt,) = attached.receipts
        assert (receipt.tokens_steered, receipt.tokens_skipped) == (count, LENGTH + NEW - 1 - count)
    assert plain is None or generate(wrapped) == plain
    assert "generate" not in vars(model)


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "itself"])
def test_a_call_of_the_wrapper_is_a_pass(wrapper: str) -> None:
    model = build("llama")
    wrapped = WRAPPERS[wrapper](model)
    with steered(model, "prompt"), torch.no_grad():
        wanted = model(input_ids=IDS).logits
    with steered(wrapped, "prompt") as attached, torch.no_grad():
        logits = wrapped(input_ids=IDS).logits
    torch.testing.assert_close(logits, wanted)
    assert attached.receipts[0].tokens_steered == LENGTH


def test_a_generate_that_compiles_for_itself(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    generate(model, **options)
    tokens, count = oracle(model, IDS[0].tolist(), "window")
    with steered(model, "window") as attached:
        assert generate(model, **options) == [tokens]
    assert attached.receipts[0].tokens_steered == count


def test_a_pipeline_runs_its_model(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    pipe = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "batch_size": 2}
    with steered(model) as attached:
        pipe(["w3 w4 w5", "w4"], **options)
    assert [one.tokens_steered for one in attached.receipts] == [3 + 4, 1 + 4]


def test_a_model_that_was_changed_is_looked_at_again() -> None:
    model = build("llama")
    with steered(model):
        generate(model)
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    tokens, _ = oracle(model, IDS[0].tolist(), "everything")
    with steered(model):
        assert generate(model) == [tokens]


def test_modules_keep_their_modes() -> None:
    model = build("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with steered(model):
        generate(model)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("kind", [{"kind": "add", "strength": 1.5}, {"kind": "ablate"}])
def test_gradients_flow_through_the_edits(site: str, kind: dict[str, Any]) -> None:
    """The slope of the loss along the embeddings is that of finite differences."""
    model = build("llama").double().train()
    spec = {
        "interventions": [{"vector": "v", "layers": [1], "site": site, **kind}],
        "where": {"positions": [[2, 5]]},
    }
    weight, step = model.model.embed_tokens.weight, 1e-3
    along = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    with steer.attach(model, spec, vectors={"v": VECTOR}) as attached:
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert attached.receipts[0].tokens_steered == 3
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * step * along
                losses.append(float(model(input_ids=IDS, labels=IDS).loss))
                weight -= sign * step * along
    slope = (losses[0] - losses[1]) / (2 * step)
    assert float((weight.grad * along).sum()) == pytest.approx(slope, rel=1e-2)


def test_attachments_may_be_left_in_any_order(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    first, second = steered(model), steered(model)
    plain = generate(model)
    attached = first.__enter__()
    second.__enter__()
    generate(model)
    assert attached.receipts[0].tokens_steered == LENGTH + NEW - 1
    first.__exit__(None, None, None)
    generate(model, prefill_chunk_size=4)
    second.__exit__(None, None, None)
    assert generate(model) == plain
    assert "generate" not in vars(model)


# Refusals


def _bart() -> Any:
    shape = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    config = BartConfig(vocab_size=99, d_model=32, encoder_ffn_dim=32, **shape, **heads)
    return BartForConditionalGeneration(config)


def _virtual_tokens() -> Any:
    peft = importlib.import_module("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(build("llama"), config)


def _replaced_blocks() -> Any:
    model: Any = build("llama")
    model.model.layers[1] = compiled(model.model.layers[1])
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "data parallel": (lambda: nn.DataParallel(build("llama")), "DataParallel.*attach to the model"),
    "inside": (lambda: Outer(nn.DataParallel(build("llama"))), "DataParallel"),
    "two models": (
        lambda: nn.ModuleList([build("llama"), build("gpt2")]),
        "LlamaForCausalLM, GPT2",
    ),
    "no model": (lambda: nn.Linear(2, 2), "no transformers model"),
    "no module": (lambda: "llama", "is a str"),
    "a pipeline": (
        lambda: pipeline("text-generation", model=build("llama"), tokenizer=tiny_tokenizer()),
        r"attach to its \.model",
    ),
    "encoder and decoder": (_bart, "an encoder and a decoder"),
    "on no device": (lambda: build("llama").to("meta"), "offloaded"),
    "virtual tokens": (_virtual_tokens, "virtual tokens"),
    "compiled parts": (_replaced_blocks, r"part\.compile\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_at_once(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(SteerError, match=reason) as caught, steered(make()):
        pass
    assert caught.value.code == "unsupported_model"


def _in_two_passes(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:, :6], past_key_values=cache)
    model(input_ids=IDS[:, 6:], past_key_values=cache)


@torch.no_grad()
def _copied_cache(model: Any) -> None:
    out = model(input_ids=IDS, use_cache=True)
    model(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(out.past_key_values))


def _fewer_rows(model: Any) -> None:
    out = model(input_ids=IDS.repeat(3, 1), use_cache=True)
    out.past_key_values.batch_select_indices(torch.tensor([0, 2]))
    model(input_ids=IDS[:, :1].repeat(2, 1), past_key_values=out.past_key_values)


@torch.no_grad()
def _mask_at_first_only(model: Any) -> None:
    mask = torch.tensor([[0] * 3 + [1] * 9])
    out = model(input_ids=IDS, attention_mask=mask, use_cache=True)
    model(input_ids=IDS[:, :1], past_key_values=out.past_key_values)


HOLES = torch.tensor([[1] * 4 + [0] * 4 + [1] * 4])
SQUARE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
ASSISTED = {"prompt_lookup_num_tokens": 3}
UNCLEAR: dict[str, tuple[Callable[[Any], Any], str]] = {
    "packed rows": (
        lambda model: model(input_ids=IDS, position_ids=(torch.arange(LENGTH) % 6)[None]),
        "position id 0, where by cache and mask it is at position 6",
    ),
    "positions of a cache that is not there": (
        lambda model: model(input_ids=IDS, position_ids=torch.arange(6, 18)[None]),
        "position id 6",
    ),
    "a mask of four dimensions": (
        lambda model: model(input_ids=IDS, attention_mask=SQUARE),
        "two dimensions",
    ),
    "a short mask": (
        lambda model: model(
            input_ids=IDS[:, 6:], past_key_values=begun(model), attention_mask=torch.ones(1, 6)
        ),
        "has 6 columns and the pass ends in column 12",
    ),
    "a prompt in two passes": (_in_two_passes, "6 more tokens"),
    "a copied cache": (_copied_cache, "1 more tokens"),
    "a mask at first only": (_mask_at_first_only, "began after 3 columns of padding"),
    "fewer rows": (_fewer_rows, "3 rows and goes on with 2"),
    "two sequences": (lambda model: generate(model, guidance_scale=2.0), "guidance_scale"),
    "two sequences without a cache": (
        lambda model: generate(model, guidance_scale=2.0, use_cache=False, negative_prompt_ids=IDS),
        "guidance_scale",
    ),
    "drafts of its own": (lambda model: generate(model, assistant_early_exit=1), "draft"),
    "itself as assistant": (lambda model: generate(model, assistant_model=model), "draft"),
    # transformers feeds all the tokens again, on top of those in the cache.
    "drafts on a ready cache": (
        lambda model: generate(model, past_key_values=begun(model), **ASSISTED),
        "position id 0, where by cache and mask it is at position 6",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_pass_of_which_it_is_not_clear_what_it_feeds_is_refused(
    tiny_model: TinyModel, name: str
) -> None:
    model, (run, reason) = tiny_model("llama"), UNCLEAR[name]
    config = model.config.to_dict()
    with pytest.raises(SteerError, match=reason) as caught, steered(model, "prompt"):
        run(model)
    assert caught.value.code == "unclear_positions"
    assert model.config.to_dict() == config


def test_other_refusals_have_their_own_codes(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: model(input_ids=IDS, attention_mask=HOLES), "padding_side"),
        (lambda: model.model.layers[1](torch.zeros(1, 1, 32)), "not_steered"),
        (lambda: model.model.forward(IDS), "not_steered"),
    ]
    for run, code in refused:
        with steered(model):
            with pytest.raises(SteerError) as caught:
                run()
            assert caught.value.code == code
            generate(model)
    spec = {"interventions": [ADD], "where": {"tokens": [3]}}
    with (
        pytest.raises(SteerError, match="give the model input_ids") as caught,
        steer.attach(model, spec, vectors={"v": VECTOR}),
    ):
        model(inputs_embeds=model.model.embed_tokens(IDS))
    assert caught.value.code == "unknown_tokens"


def test_blocks_that_would_run_again_for_a_checkpoint_are_refused() -> None:
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    with steered(model):
        with pytest.raises(SteerError, match="disable") as caught:
            model(input_ids=IDS, labels=IDS)
        assert caught.value.code == "gradient_checkpointing"
        with torch.no_grad():
            model(input_ids=IDS)


def test_a_block_in_which_the_model_never_ran_raises(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(EngineError, match="no forward pass") as caught, steered(model):
        build("llama")(input_ids=IDS)
    assert caught.value.code == "not_steered"
    with pytest.raises(ZeroDivisionError), steered(model):  # what went wrong first is what is told
        raise ZeroDivisionError
    with steered(model):
        generate(model)


@pytest.mark.parametrize("where", WHERE)
def test_embeddings_in_the_place_of_ids(tiny_model: TinyModel, where: str) -> None:
    model = tiny_model("llama")
    tokens, count = oracle(model, IDS[0].tolist(), where)
    with steered(model, where) as attached:
        out = model.generate(
            inputs_embeds=model.model.embed_tokens(IDS),
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert out.tolist() == [tokens]
    assert attached.receipts[0].tokens_steered == count


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("likeness", ["near", "far"])
def test_another_model_may_draft(tiny_model: TinyModel, likeness: str, where: str) -> None:
    """Drafts that are dropped are fed and forgotten."""
    model = tiny_model("llama")
    assistant = copy.deepcopy(model)
    size = 0.05 if likeness == "near" else 5.0
    torch.manual_seed(0)
    assistant.lm_head.weight.data += size * torch.randn_like(assistant.lm_head.weight)
    tokens, count = oracle(model, IDS[0].tolist(), where)
    with steered(model, where) as attached:
        assert generate(model, assistant_model=assistant) == [tokens]
    (receipt,) = attached.receipts
    assert (receipt.tokens_steered, receipt.tokens_skipped) == (count, LENGTH + NEW - 1 - count)


@pytest.mark.parametrize("scope", ["prompt", "token"])
@pytest.mark.parametrize(
    "options",
    [{"prefill_chunk_size": 5}, {"use_cache": False}, {"cache_implementation": "static"}, ASSISTED],
    ids=str,
)
def test_gates_decide_once_for_each_token(
    tiny_model: TinyModel, scope: str, options: dict[str, Any]
) -> None:
    model = tiny_model("llama")
    when = {"vector": "v", "above": 0.0, "layer": 0, "scope": scope}
    spec = {"interventions": [ADD], "when": when}
    with steer.attach(model, spec, vectors={"v": VECTOR}) as attached:
        tokens, (wanted,) = generate(model), attached.receipts
        assert generate(model, **options) == tokens
        (receipt,) = attached.receipts
    assert (receipt.tokens_steered, receipt.tokens_skipped) == (
        wanted.tokens_steered,
        wanted.tokens_skipped,
    )
    assert [gate.fired for gate in receipt.gates] == [gate.fired for gate in wanted.gates]
