"""Steering in float64 numpy, written from the papers' formulas and not from `steer.edits`.

One intervention after another, in the order of the spec, on the tokens it selects; no passes, no
tables, no rank-1 form. SAEs are encoded in full, edited, and decoded with their error kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steer.artefacts.adapter_parts import LoReFTRows
from steer.artefacts.affine import AffineMap
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.detector import Detector
from steer.artefacts.sae.base import SAE
from steer.model import HookPoint
from steer.prompts.roles import RoleRanges
from steer.spec import (
    Clamp,
    Concept,
    Intervention,
    NormValue,
    SteeringSpec,
    WhenDetected,
    Where,
)

Array = NDArray[np.float64]


def f64(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


@dataclass(frozen=True)
class Seen:
    """The tokens of a request, what each stands for, and whose words those of its prompt are."""

    tokens: Sequence[int]
    vocabulary: Sequence[bytes] = ()
    roles: Mapping[int, str] = field(default_factory=dict)

    @staticmethod
    def of(tokens: Sequence[int], vocabulary: Sequence[bytes], roles: RoleRanges | None) -> Seen:
        spans = () if roles is None else roles.ranges
        whose = {place: role for start, end, role in spans for place in range(start, end)}
        return Seen(tokens, vocabulary, whose)

    def inside(self, opening: Any, closing: Any, end: int) -> bool:
        """Whether the first `end` tokens leave off after an opening that was not closed."""
        return self._left(opening, closing, end)[0]

    def may_begin(self, opening: Any, closing: Any, end: int) -> bool:
        """Whether they end in the beginning of an opening."""
        inside, rest, mark = self._left(opening, closing, end)
        return not inside and any(
            rest[len(rest) - n :] == mark[:n] for n in range(1, min(len(rest), len(mark)) + 1)
        )

    def _left(self, opening: Any, closing: Any, end: int) -> tuple[bool, Any, Any]:
        """Looked for one after the other, from where the last one ended: what the next one is."""
        marks = [self._symbols(mark) for mark in (opening, closing) if mark is not None]
        text: Any = tuple(self.tokens[:end])
        if isinstance(opening, str):
            text = b"".join(self.vocabulary[token] for token in text)
        inside = False
        while True:
            if inside and closing is None:
                return True, text, marks[0]
            mark = marks[inside]
            places = range(len(text) - len(mark) + 1)
            found = next((n for n in places if text[n : n + len(mark)] == mark), None)
            if found is None:
                return inside, text, mark
            text, inside = text[found + len(mark) :], not inside

    def _symbols(self, mark: Any) -> Any:
        return mark.encode() if isinstance(mark, str) else tuple(mark)


def selected(
    where: Where | None,
    position: int,
    prompt_length: int,
    token: int,
    seen: Seen | None = None,
) -> bool:
    """Whether one token is selected: `where` read aloud."""
    if where is None:
        return True
    phase = "prompt" if position < prompt_length else "generation"
    if where.phases is not None and phase not in where.phases:
        return False
    if where.positions is not None and not any(
        _bound(start, prompt_length) <= position
        and (end is None or position < _bound(end, prompt_length))
        for start, end in where.positions
    ):
        return False
    if where.tokens is not None and token not in where.tokens:
        return False
    if where.every is not None:
        number = position - prompt_length
        if number < 0 or number % (where.every.nth or 1):
            return False
        if where.every.first is not None and number >= where.every.first:
            return False
    if seen is not None and not _stands_so(where, position, prompt_length, seen):
        return False
    return where.except_ is None or not selected(
        where.except_, position, prompt_length, token, seen
    )


def _stands_so(where: Where, position: int, prompt_length: int, seen: Seen) -> bool:
    """What `where` asks of the tokens before this one, and of the messages."""
    if where.roles is not None:
        role = seen.roles.get(position) if position < prompt_length else "assistant"
        if role not in where.roles:
            return False
    if where.after is not None and not any(
        seen.inside(mark, None, position) for mark in where.after
    ):
        return False
    if where.before is not None and any(seen.inside(mark, None, position) for mark in where.before):
        return False
    if where.between is not None and not any(
        seen.inside(*pair, position) for pair in where.between
    ):
        return False
    return where.outside is None or not any(
        seen.inside(*pair, position)
        or seen.inside(*pair, position + 1)
        or seen.may_begin(*pair, position + 1)
        for pair in where.outside
    )


def chosen(
    spec: SteeringSpec,
    item: Intervention,
    position: int,
    prompt_length: int,
    token: int,
    seen: Seen | None = None,
) -> bool:
    """Whether `item` acts on one token, by its own `where` and the spec's, and by what a ramp
    leaves of it."""
    if factor(spec, item, position - prompt_length) == 0:
        return False
    own, token_at = item.where, (position, prompt_length, token, seen)
    if own is None or not (own.model_fields_set - {"except_"}):
        excepted = own is not None and own.except_ is not None and selected(own.except_, *token_at)
        return selected(spec.where, *token_at) and not excepted
    return selected(own, *token_at)


def factor(spec: SteeringSpec, item: Intervention, number: int) -> float:
    """How much of `item` the generated token `number` gets; one of the prompt is below 0."""
    points = spec.ramp if item.ramp is None else item.ramp
    if points is None:
        return 1.0
    if number <= points[0][0]:
        return points[0][1]
    for (start, low), (end, high) in pairwise(points):
        if start <= number <= end:
            return low + (high - low) * (number - start) / (end - start)
    return points[-1][1]


def _bound(bound: int, prompt_length: int) -> int:
    return max(prompt_length + bound, 0) if bound < 0 else bound


@dataclass
class OnwardGates:
    """The onward gates of one request, whose tokens are told in their order: each opens at the
    first token that its intervention selects and whose value is in range."""

    onsets: dict[int, int] = field(default_factory=dict)
    """By the place of an intervention, where its gate opened."""

    def tell(self, place: int, position: int, *, selected: bool, in_range: bool) -> None:
        if selected and in_range and place not in self.onsets:
            self.onsets[place] = position

    def are_open(self, place: int, position: int) -> bool:
        return place in self.onsets and position >= self.onsets[place]


@dataclass
class ReadScores:
    """The scores that the gates of one request have read, told in the order of its tokens."""

    scores: dict[int, list[float]] = field(default_factory=dict)
    """By the place of an intervention."""

    def tell(self, place: int, score: float) -> None:
        self.scores.setdefault(place, []).append(score)

    def pooled(self, place: int, pooling: str, last: int) -> float:
        """What is made of the last scores that were told."""
        found = self.scores[place][-last:]
        return max(found) if pooling == "max" else sum(found) / len(found)


@dataclass
class Float64Reference:
    """The artefacts, and what every kind does to one row x `[d]`."""

    vectors: Mapping[str, ControlVector] = field(default_factory=dict)
    saes: Mapping[str, SAE] = field(default_factory=dict)
    low_ranks: Mapping[str, LowRankAdapter] = field(default_factory=dict)
    maps: Mapping[str, AffineMap] = field(default_factory=dict)
    detectors: Mapping[str, Detector] = field(default_factory=dict)
    encode_text: Callable[[str, HookPoint], Tensor] | None = None

    def points(self, item: Any) -> list[HookPoint]:
        """Where `item` acts; tests give `layers` wherever a vector is used."""
        if isinstance(item, Clamp | Concept):
            return [self.saes[item.sae].write_point]
        return [HookPoint(layer, item.site or "resid_post") for layer in item.layers]

    def steer(
        self,
        spec: SteeringSpec,
        point: HookPoint,
        x: Array,
        position: int,
        prompt_length: int,
        token: int,
        gate_open: Callable[[int, Any], bool] = lambda place, when: True,
        seen: Seen | None = None,
    ) -> Array:
        """One token's row at `point` after every intervention of `spec` that acts there;
        `gate_open` is asked by the place of an intervention in the spec, and its gate."""
        for place, item in enumerate(spec.interventions):
            when = spec.when if item.when is None else item.when
            if point not in self.points(item) or not chosen(
                spec, item, position, prompt_length, token, seen
            ):
                continue
            if when is not None and not gate_open(place, when):
                continue
            after = self.edited(item, x, point.layer)
            after = x + factor(spec, item, position - prompt_length) * (after - x)
            if spec.norm == "preserve" and np.linalg.norm(after) > 0:
                after = after * np.linalg.norm(x) / np.linalg.norm(after)
            x = after
        return x

    def score(self, when: WhenDetected, x: Array) -> float:
        """The score of the row that a gate's detector reads."""
        detector = self.detectors[when.detector]
        return float(f64(detector.direction) @ x) + detector.bias

    def fires(self, when: WhenDetected, place: int, read: ReadScores) -> bool:
        """Whether a gate's detector fires at the token whose score was told last."""
        detector = self.detectors[when.detector]
        threshold = detector.threshold if when.threshold is None else when.threshold
        one = detector.detection
        return read.pooled(place, one.pooling, one.last) > threshold

    def edited(self, item: Any, x: Array, layer: int) -> Array:
        """x after one intervention."""
        return getattr(self, "_" + item.kind)(item, x, layer)

    def row(self, name: str, layer: int) -> Array:
        directions = self.vectors[name].directions
        chosen = directions[layer] if layer in directions else next(iter(directions.values()))
        return f64(chosen)

    def unit(self, name: str, layer: int) -> Array:
        row = self.row(name, layer)
        return row / np.linalg.norm(row)

    def _add(self, item: Any, x: Array, layer: int) -> Array:
        v = self.row(item.vector, layer)
        if item.strength is None:
            return x + self.vectors[item.vector].card.default_strength * v
        if isinstance(item.strength, float):
            return x + item.strength * v
        return x + item.strength.norm * np.linalg.norm(x) * v / np.linalg.norm(v)

    def _ablate(self, item: Any, x: Array, layer: int) -> Array:
        v = self.unit(item.vector, layer)
        return x - item.strength * np.outer(v, v) @ x

    def _project(self, item: Any, x: Array, layer: int) -> Array:
        v = self.unit(item.vector, layer)
        value = item.value
        if isinstance(value, str):
            value = getattr(self.vectors[item.vector].card.measures[layer], value)
        projection = float(v @ x)
        target = _bounded(projection, value, item.mode)
        return x + (target - projection) * v

    def _clamp(self, item: Any, x: Array, layer: int) -> Array:
        return self.clamped(item, x, x)

    def clamped(self, item: Any, x: Array, read: Array) -> Array:
        """x after a clamp of what the whole SAE makes of `read`: x itself, or of a transcoder the
        token where that reads, whose output x is."""
        sae = self.saes[item.sae]
        features = self.encode(sae, read, item.k)
        error = x - self.decode(sae, features, read)
        if item.mode == "keep_only":
            kept = np.zeros_like(features)
            kept[list(item.features)] = features[list(item.features)]
            return self.decode(sae, kept, read) + error
        for feature, number in zip(item.features, item.numbers, strict=True):
            active = features[feature]
            if item.only_if_active and active == 0:
                continue
            value = number
            if isinstance(item.value, NormValue):
                # The activation at which the decoder row is as long as this share of the token.
                row = self.factor(sae, read) * f64(sae.W_dec)[feature]
                value = number * np.linalg.norm(x) / np.linalg.norm(row)
            if item.mode == "scale":
                features[feature] *= value
            elif item.mode == "drop":
                features[feature] = 0.0
            elif item.mode == "add":
                features[feature] += value * _balance(item, value, active)
            else:
                features[feature] = _bounded(active, value, item.mode)
        return self.decode(sae, features, read) + error

    def encode(self, sae: SAE, x: Array, k: int | None = None) -> Array:
        """All activations of one token, by the definition of the architecture."""
        k = sae.k if k is None else k
        if sae.pursuit is not None:
            return self._pursued(sae, x, k)
        pre = self.pre_activations(sae, x)
        if sae.architecture == "abstopk":
            pre[np.argsort(-np.abs(pre), kind="stable")[k:]] = 0.0
            return pre
        active = np.maximum(pre, 0.0)
        if sae.architecture == "topk":
            active[np.argsort(-pre, kind="stable")[k:]] = 0.0
        if sae.architecture == "groupmax":
            groups = active.reshape(sae.k, -1)
            groups[groups < groups.max(axis=1, keepdims=True)] = 0.0
        if sae.architecture == "jumprelu":
            assert sae.threshold is not None
            active[pre <= f64(sae.threshold)] = 0.0
        return active

    def pre_activations(self, sae: SAE, x: Array) -> Array:
        return self._inputs(sae, x) @ f64(sae.W_enc) + f64(sae.b_enc)

    def _inputs(self, sae: SAE, x: Array) -> Array:
        if sae.normalize == "layer_norm":
            inputs = (x - x.mean()) / (x.std(ddof=1) + 1e-5)
        else:
            inputs = x / self.factor(sae, x)
        return inputs - f64(sae.b_dec) if sae.subtract_b_dec else inputs

    def _pursued(self, sae: SAE, x: Array, steps: int | None) -> Array:
        """Matching pursuit, one feature after another."""
        left, rows, rule = self._inputs(sae, x), f64(sae.W_dec), sae.pursuit
        assert rule is not None
        z = np.zeros(len(rows))
        for _ in range(steps or rule.max_iterations or len(left)):
            best = int(np.argmax(rows @ left))
            value, known = max(float(rows[best] @ left), 0.0), z[best] != 0
            z[best] += value
            left = left - value * rows[best]
            stuck = rule.stop_on_duplicate_support and (known or value == 0)
            if stuck or np.linalg.norm(left) < rule.residual_threshold:
                break
        return z

    def factor(self, sae: SAE, x: Array) -> float:
        """What the SAE divides a token by, and multiplies its output by."""
        if sae.normalize == "layer_norm":
            return float(x.std(ddof=1))
        if sae.normalize == "constant_norm_rescale":
            return float(np.linalg.norm(x)) / len(x) ** 0.5
        return 1.0

    def decode(self, sae: SAE, features: Array, x: Array) -> Array:
        mean = x.mean() if sae.normalize == "layer_norm" else 0.0
        output = features @ f64(sae.W_dec) + f64(sae.b_dec)
        if sae.W_skip is not None:
            output = output + f64(sae.W_skip) @ x
        return self.factor(sae, x) * output + mean

    def _concept(self, item: Any, x: Array, layer: int) -> Array:
        sae = self.saes[item.sae]
        latents = self._latents(sae, item.text)
        if item.contrast is not None:
            latents = latents - self._latents(sae, item.contrast)
        return x + item.strength * self.factor(sae, x) * latents @ f64(sae.W_dec)

    def _latents(self, sae: SAE, text: str) -> Array:
        assert self.encode_text is not None
        states = f64(self.encode_text(text, HookPoint(sae.layer, sae.site)))
        rows = [np.maximum(self.pre_activations(sae, state), 0.0) for state in states]
        return np.mean(rows, axis=0)

    def _swap(self, item: Any, x: Array, layer: int) -> Array:
        change = self.unit(item.add, layer) - self.unit(item.remove, layer)
        return x + item.strength * np.linalg.norm(x) * change

    def _low_rank(self, item: Any, x: Array, layer: int) -> Array:
        part = self.low_ranks[item.adapter].parts[layer]
        strength = 1.0 if item.strength is None else item.strength
        if isinstance(part, LoReFTRows):
            rotation, weight, bias = (f64(one) for one in part)
            return x + strength * rotation.T @ (weight @ x + bias - rotation @ x)
        assert part.threshold is not None
        before = f64(part.read) @ x + f64(part.bias)
        active = np.where(before > f64(part.threshold), before, 0.0)
        return x + strength * active @ f64(part.write)

    def _exchange(self, item: Any, x: Array, layer: int) -> Array:
        source, target = self.unit(item.vector, layer), self.unit(item.toward, layer)
        if item.mode == "move":
            return x + item.strength * (x @ source) * (target - source)
        # c = V⁺x, x + α·V(σc − c), σ the exchange of the two (Jacobian lens).
        both = np.stack([source, target], axis=1)
        c = np.linalg.pinv(both) @ x
        if item.mode == "one_way" and c[0] <= c[1]:
            return x
        return x + item.strength * both @ (c[::-1] - c)

    def _read_write(self, item: Any, x: Array, layer: int) -> Array:
        read = self.row(item.read, layer)
        value = read @ x
        if item.measure != "product":
            value /= np.linalg.norm(read)
        if item.measure == "cosine":
            value /= np.linalg.norm(x)
        value += item.bias
        if item.activation == "relu" and value <= item.threshold:
            value = 0.0
        if isinstance(item.strength, float):
            return x + item.strength * value * self.row(item.write, layer)
        length = item.strength.norm * value * np.linalg.norm(x)
        return x + length * self.unit(item.write, layer)

    def _affine(self, item: Any, x: Array, layer: int) -> Array:
        scale, shift, lower, upper = (f64(one) for one in self.maps[item.map].channels[layer])
        share = 1.0 if item.strength is None else item.strength
        inside = (lower <= x) & (x <= upper)
        return np.where(inside, share * (scale * x + shift) + (1 - share) * x, x)

    def _rotate(self, item: Any, x: Array, layer: int) -> Array:
        a, b = self.unit(item.vector, layer), self.unit(item.toward, layer)
        b = b - (a @ b) * a
        b = b / np.linalg.norm(b)
        angle = np.radians(item.degrees)
        along, across = a @ x, b @ x
        if item.only == "positive" and along <= 0:
            return x
        if item.mode == "to":
            angle -= np.arctan2(across, along)
        turned_along = along * np.cos(angle) - across * np.sin(angle)
        turned_across = along * np.sin(angle) + across * np.cos(angle)
        return x + (turned_along - along) * a + (turned_across - across) * b

    def _patch(self, item: Any, x: Array, layer: int) -> Array:
        return self.row(item.vector, layer)


def _balance(item: Clamp, value: float, active: float) -> float:
    """β of G-SAE: what is still missing of a full activation, or what there is of it."""
    if item.balance is None:
        return 1.0
    share = min(max(active / item.balance, 0.0), 1.0)
    return 1.0 - share if value > 0 else share


def _bounded(value: float, target: float, mode: str) -> float:
    if mode == "at_least":
        return max(value, target)
    if mode == "at_most":
        return min(value, target)
    return target
