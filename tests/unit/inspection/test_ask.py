"""Asking states, against plain hooks on the model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from artefacts import random_lora
from torch import Tensor, nn

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.oracle import Oracle
from steer.artefacts.oracle_form import OracleForm
from steer.engines.fake.engine import FakeEngine
from steer.engines.oracle_prompt import oracle_prompt
from steer.errors import SteerError
from steer.inspection.oracles.ask import ask, ask_heat_map
from steer.inspection.oracles.request import AskRequest
from steer.inspection.oracles.result import AskResult
from steer.inspection.oracles.runs import permuted
from steer.prompts import PromptInput, encode_prompt

SOURCE = "the river runs"
ADD = OracleForm(message="L{layer} {states} {question}", placeholder="?", layer=1)
FORMS = {
    "add": ADD,
    "replace": ADD.model_copy(update={"mode": "replace", "layer": 0}),
    "repeated at the input": ADD.model_copy(
        update={"mode": "replace", "site": "resid_pre", "repeat": 3}
    ),
    "an opening": ADD.model_copy(update={"message": "{states}", "opening": "So, {question}"}),
}


def answered(engine: Any, library: MemoryLibrary | None = None, **fields: Any) -> AskResult:
    body = {"source": {"text": SOURCE}, "questions": ["Who", "What"], "max_tokens": 4, **fields}
    return ask(engine, AskRequest.model_validate(body), library=library)


def by_hand(subject: Any, form: OracleForm, ids: Any, puts: dict[int, Tensor], lora: Any) -> str:
    """What plain hooks make the model say, in float64: `puts` are states by position."""
    blocks, tokens = subject.blocks, list(ids)
    modules = dict(subject.model.named_modules())

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        for place, state in puts.items():
            v, there = state.double(), x[:, place]
            unit = v / v.norm()
            added = there + form.strength * there.norm(dim=-1, keepdim=True) * unit
            x[:, place] = added if form.mode == "add" else v
        return x

    def after(_: nn.Module, _args: Any, out: Any) -> Any:
        return put(out) if isinstance(out, Tensor) else (put(out[0]), *out[1:])

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (put(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": put(kwargs["hidden_states"])}

    with ExitStack() as hooks:
        block = blocks[form.layer]
        handle = (
            block.register_forward_hook(after)
            if form.site == "resid_post"
            else block.register_forward_pre_hook(before, with_kwargs=True)
        )
        hooks.callback(handle.remove)
        for name, part in ({} if lora is None else lora.parts).items():

            def changed(_: nn.Module, args: Any, out: Tensor, part: Any = part) -> Tensor:
                return out + part.scale * (args[0] @ part.down.double().T) @ part.up.double().T

            hooks.callback(modules[name].register_forward_hook(changed).remove)
        subject.model.double()
        hooks.callback(subject.model.float)
        for _ in range(4):
            tokens.append(int(subject.logits(tuple(tokens))[-1].argmax()))
            if tokens[-1] == subject.engine.tokenizer.eos_token_id:
                break
    return subject.engine.tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True).strip()


def lora_of(subject: Any) -> Any:
    """An adapter of a matrix of every block."""
    names = {
        name: tuple(module.weight.shape)
        for name, module in subject.model.named_modules()
        if name.endswith(("down_proj", "mlp.c_proj"))
    }
    # GPT-2 keeps its matrices the other way round.
    turned = "c_proj" in next(iter(names))
    sizes = {name: shape if turned else shape[::-1] for name, shape in names.items()}
    return random_lora(3, sizes)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_every_answer_equals_plain_hooks(subject: Any, name: str, trained: bool) -> None:
    engine, form = subject.engine, FORMS[name]
    ids = tuple(engine.tokenizer.encode(SOURCE))
    states = subject.states(ids)
    lora = lora_of(subject) if trained else None
    library = MemoryLibrary()
    if lora is not None:
        oracle = Oracle.of(lora, form=form, width=32, layers=(0, 1, 2), default_layers=(0, 2))
        library = MemoryLibrary(oracles={"o": oracle})
    fields = {"oracle": "o"} if trained else {"form": form.model_dump(), "layers": [0, 2]}
    result = answered(engine, library, positions=[3, -1], **fields)
    assert (result.layers, result.trained, result.form) == ((0, 2), trained, form)
    assert [(c.layer, c.question) for c in result.cells] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    for cell in result.cells:
        asked = oracle_prompt(
            engine, form, result.questions[cell.question], layer=cell.layer, states=2
        )
        read = states[cell.layer][[3, len(ids) - 1]]
        for rows, said in ((read, cell.text), (permuted(read), cell.controls.shuffled.text)):
            puts = {n: row for row, ns in zip(rows, asked.places, strict=True) for n in ns}
            assert said == by_hand(subject, form, asked.ids, puts, lora)
        assert cell.controls.none.text == by_hand(subject, form, asked.ids, {}, lora)
        other = {one.text for one in vars(cell.controls).values()}
        assert cell.from_state == (cell.text not in other)
        assert 0 < cell.probability <= 1


def test_the_text_control_reads_the_text_in_place_of_the_states(subject: Any) -> None:
    engine = subject.engine
    result = answered(engine, form=ADD.model_dump(), layers=[1], positions=[4])
    ids = engine.tokenizer.encode(SOURCE)[:5]
    read = engine.tokenizer.decode(ids, skip_special_tokens=True)
    for cell in result.cells:
        text = f"L1 {read} {result.questions[cell.question]}"
        chat = PromptInput.model_validate({"messages": [{"role": "user", "content": text}]})
        ids = encode_prompt(engine, chat).ids
        assert cell.controls.text.text == by_hand(subject, ADD, ids, {}, None)


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(engine: Any) -> None:
    fields = {"form": ADD.model_dump(), "layers": [0, 1, 2], "positions": [1, 2]}
    together = answered(engine, questions=["Who", "What", "Where", "Is it long ago"], **fields)
    for number, question in enumerate(together.questions):
        alone = answered(engine, questions=[question], **fields)
        mine = [cell for cell in together.cells if cell.question == number]
        for one, other in zip(mine, alone.cells, strict=True):
            assert (one.text, one.controls.shuffled.text) == (
                other.text,
                other.controls.shuffled.text,
            )
            assert one.probability == pytest.approx(other.probability, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"oracle": "nobody"}, "unknown_oracle", "/oracle"),
        ({"questions": ["Who", "Is it so? Or not"]}, "ambiguous_placeholder", "/questions/1"),
        ({"questions": ["x" * 120]}, "context_length_exceeded", "/questions/0"),
        ({"layers": [0, 7]}, "layer_out_of_range", "/layers/1"),
        ({"positions": [-1, 99]}, "position_out_of_range", "/positions/1"),
        ({"form": ADD.model_dump() | {"layer": 9}}, "layer_out_of_range", "/form"),
        ({"layers": [0, 1, 2], "questions": ["Who"] * 50}, None, None),
    ],
)
def test_what_cannot_be_asked_is_refused_by_field(
    engine: Any, fields: dict[str, Any], code: str | None, param: str | None
) -> None:
    if code is None:
        with pytest.raises(ValueError, match="at most 32"):
            answered(engine, **fields)
        return
    with pytest.raises(SteerError) as caught:
        answered(engine, **{"form": ADD.model_dump(), **fields})
    assert (caught.value.code, caught.value.param) == (code, param)


def test_an_oracle_of_another_model_is_refused(subject: Any) -> None:
    wrong = random_lora(1, {"model.layers.0.nothing": (32, 32)})
    narrow = random_lora(1, dict.fromkeys(lora_of(subject).parts, (8, 8)))
    for lora, width, code in (
        (wrong, 32, "wrong_lora"),
        (narrow, 32, "wrong_lora"),
        (wrong, 16, "wrong_width"),
    ):
        oracle = Oracle.of(lora, form=ADD, width=width, layers=(0, 1, 2))
        with pytest.raises(SteerError) as caught:
            answered(subject.engine, MemoryLibrary(oracles={"o": oracle}), oracle="o")
        assert (caught.value.code, caught.value.param) == (code, "/oracle")


def test_a_placeholder_of_several_tokens_is_for_models_as_they_are(subject: Any) -> None:
    form = ADD.model_copy(update={"placeholder": " ?"})
    answered(subject.engine, form=form.model_dump(), layers=[1])
    oracle = Oracle.of(lora_of(subject), form=form, width=32, layers=(0, 1, 2))
    with pytest.raises(SteerError) as caught:
        answered(subject.engine, MemoryLibrary(oracles={"o": oracle}), oracle="o", layers=[1])
    assert caught.value.code == "placeholder_not_one_token"


def test_forms_and_requests_are_checked() -> None:
    for message, opening in (
        ("{question}", ""),
        ("{states}", ""),
        ("{states} {states} {question}", ""),
        ("{states} {question}", "{question}"),
    ):
        with pytest.raises(ValueError, match="holds"):
            OracleForm(message=message, opening=opening)
    with pytest.raises(ValueError, match="residual stream"):
        AskRequest.model_validate({"source": {"text": "a"}, "questions": ["b"], "site": "mlp_out"})


def test_the_picture_frames_what_no_control_says() -> None:
    result = answered(FakeEngine(), form=ADD.model_dump(), layers=[0, 2])
    heat = ask_heat_map(result)
    assert (heat.rows, heat.columns) == (["0", "2"], ["Who", "What"])
    flat = [cell for row in heat.texts for cell in row]
    assert flat == [cell.text for cell in result.cells]
    framed = {(result.layers.index(c.layer), c.question) for c in result.cells if c.from_state}
    assert heat.marked == framed
    assert heat.png().startswith(b"\x89PNG")


def test_permuted_states_are_as_long_and_others() -> None:
    states = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    other = permuted(states)
    torch.testing.assert_close(other.norm(dim=1), states.norm(dim=1))
    assert not torch.allclose(other, states)
    assert torch.equal(permuted(states), other)
