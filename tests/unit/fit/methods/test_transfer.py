"""Maps between two spaces on planted data, and between two random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from steer.artefacts.control_vector import ControlVector
from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.methods.transfer import (
    MAPS,
    anchors,
    procrustes,
    relative,
    same_depth,
    transfer,
    transfer_error,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(d: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(draw(d, d, seed=seed)).Q


def test_relative_representations_ignore_rotation_and_scale() -> None:
    states, around = draw(30, 48), draw(20, 48, seed=1)
    turned = relative(7.3 * states @ rotation(48), 7.3 * around @ rotation(48))
    assert float((relative(states, around) - turned).abs().max()) <= 1e-12


def test_procrustes_finds_a_rotation_and_scale_exactly() -> None:
    source, turn = draw(100, 48), rotation(48)
    found = procrustes(source, 2.5 * source @ turn + 3)
    torch.testing.assert_close(found(draw(5, 48, seed=3)), 2.5 * draw(5, 48, seed=3) @ turn)


def test_procrustes_is_robust_to_noise() -> None:
    """σ = .3: directions arrive with cosine .998."""
    source, turn = draw(4000, 64), rotation(64)
    target = source @ turn + 0.3 * draw(4000, 64, seed=5)
    rows = draw(50, 64, seed=6)
    cosine = torch.cosine_similarity(procrustes(source, target)(rows), rows @ turn, dim=1).mean()
    assert float(cosine) >= 0.998


@pytest.mark.parametrize("method", MAPS)
def test_both_maps_reach_a_space_of_another_width(method: str) -> None:
    latent = draw(400, 10)
    source, target = latent @ draw(10, 48, seed=1), latent @ draw(10, 32, seed=2)
    found = MAPS[method](source, target)
    direction = draw(1, 10, seed=3)
    mapped, true = found(direction @ draw(10, 48, seed=1)), direction @ draw(10, 32, seed=2)
    cosine = float(torch.cosine_similarity(mapped, true).mean())
    # Anchors fit any linear map; a rotation cannot undo the two different embeddings.
    assert cosine >= (0.999 if method == "anchors" else 0.5)


def test_the_error_tells_a_map_that_holds_from_one_that_does_not() -> None:
    source, turn = draw(300, 32), rotation(32)
    related, unrelated = source @ turn, draw(300, 32, seed=8)
    errors = []
    for target in (related, unrelated):
        fitted = anchors(source[:200], target[:200])
        centres = (source[:200].mean(0), target[:200].mean(0))
        errors.append(transfer_error(source[200:], target[200:], fitted, centres))
    assert errors[0].cosine > 0.999
    assert errors[0].explained > 0.99
    assert abs(errors[1].cosine) < 0.15
    assert errors[1].explained < 0.05


def rotated_copy(engine: TransformersEngine, turn: Tensor) -> Any:
    """The same function in a turned residual stream (its norms have no weights of their own)."""
    copy = LlamaForCausalLM(engine._hooked.model.config)  # type: ignore[arg-type]
    copy.load_state_dict(engine._hooked.model.state_dict())
    q = turn.float()
    with torch.no_grad():
        copy.model.embed_tokens.weight.copy_(copy.model.embed_tokens.weight @ q)
        copy.lm_head.weight.copy_(copy.lm_head.weight @ q)
        for block in copy.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for reader in (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                mlp.gate_proj,
                mlp.up_proj,
            ):
                reader.weight.copy_(reader.weight @ q)
            for writer in (attention.o_proj, mlp.down_proj):
                writer.weight.copy_(q.T @ writer.weight)
    return copy


WORDS = [f"{a} {b}" for a in ("red", "blue", "old", "new") for b in "abcdefghijklmnopqr"]


@pytest.mark.parametrize("method", MAPS)
def test_a_vector_moves_to_a_model_that_differs_by_a_rotation(
    engine: TransformersEngine, method: str
) -> None:
    turn = rotation(32)
    vector = ControlVector.of({1: draw(32, seed=4), 2: draw(32, seed=5)}, name="v")
    done: list[int] = []
    with TransformersEngine(
        rotated_copy(engine, turn), ByteTokenizer(), name="turned", rows=8, slots=16
    ) as other:
        moved = transfer(
            engine, other, vector, WORDS, name="w", method=method, progress=done.append
        )
    for layer in (1, 2):
        cosine = torch.cosine_similarity(moved[layer], vector[layer] @ turn.float(), dim=0)
        # Only directions in which the anchors differ can be moved.
        assert float(cosine) > (0.99 if method == "procrustes" else 0.8)
        error = moved.card.provenance["transfer_error"][str(layer)]  # type: ignore[index,call-overload]
        assert error["cosine"] > 0.95  # type: ignore[index,call-overload]
    assert moved.card.model == "turned"
    assert moved.card.provenance["vector"] == {"name": "v", "sha256": vector.sha256}
    assert sum(done) == 2 * len(WORDS)


def test_what_cannot_be_moved_is_refused(engine: TransformersEngine) -> None:
    vector = ControlVector.of({1: draw(32)})
    for options, code in (
        ({"method": "magic"}, "unknown_method"),
        ({"prompts": WORDS[:4]}, "no_prompts"),
        ({"layers": {1: 9}}, "layer_out_of_range"),
        ({"layers": {0: 1}}, "layer_not_in_vector"),
    ):
        arguments: dict[str, Any] = {"prompts": WORDS, "name": "w", **options}
        with pytest.raises(SteerError) as caught:
            transfer(engine, engine, vector, arguments.pop("prompts"), **arguments)
        assert caught.value.code == code


def test_layers_go_to_the_same_depth() -> None:
    class Shape:
        def __init__(self, layers: int) -> None:
            self.info: Any = type("Info", (), {"n_layers": layers})

    vector = ControlVector.of({n: torch.ones(4) for n in (0, 3, 5)})
    small, large = Shape(6), Shape(11)
    assert same_depth(vector, small, large) == {0: 0, 3: 6, 5: 10}  # type: ignore[arg-type]
    assert same_depth(vector, small, Shape(2)) == {0: 0, 3: 1}  # type: ignore[arg-type]
