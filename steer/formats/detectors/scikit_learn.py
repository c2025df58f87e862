"""Linear classifiers of scikit-learn in pickles and joblib files, for `steer vectors convert`.

    s = ⟨w, x⟩ + b                                     decision_function, of the second class
    w ← Aᵀw,  b ← b + ⟨w, c⟩ − ⟨Aᵀw, μ⟩                behind a step x ↦ A(x − μ) + c

A file holds a classifier, a Pipeline, a search with its best, these by layer, or a classifier
beside what is in front of it. Nothing of scikit-learn is imported or run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steer.errors import FileFormatError, quoted
from steer.formats.arrays import MOST_WRAPPERS
from steer.formats.detectors.by_layer import of_stated_layer
from steer.formats.guards.pickle_machine import Instance
from steer.formats.options import ImportOptions

_CLASSIFIERS = frozenset(
    {"LogisticRegression", "LogisticRegressionCV", "RidgeClassifier", "RidgeClassifierCV"}
    | {"SGDClassifier", "Perceptron", "PassiveAggressiveClassifier"}
    | {"LinearSVC", "LinearDiscriminantAnalysis", "SVC", "NuSVC"}
)
_REGRESSIONS = frozenset(
    {"LinearRegression", "Ridge", "RidgeCV", "Lasso", "LassoCV", "ElasticNet", "ElasticNetCV"}
    | {"SGDRegressor", "HuberRegressor", "BayesianRidge", "LinearSVR"}
)
_BOTH = 2
_MOST_STEPS = 16


@dataclass(frozen=True)
class FittedProbe:
    """What a file holds of a linear classifier: `arrays` called `coef_` and `intercept_`, what
    stands `about` it in the file, and which label it `detects`, where labels are texts."""

    arrays: Mapping[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    detects: str = ""


@dataclass(frozen=True)
class _Affine:
    """x ↦ `factor`·(x − `centre`) + `shift`; a factor is of channels, `[d]`, or a matrix."""

    factor: Tensor | None = None
    centre: Tensor | None = None
    shift: Tensor | None = None


def fitted_probe(found: Any, options: ImportOptions) -> FittedProbe | None:
    """The classifier in what a file held, or None where nothing of scikit-learn is in it.

    Raises `FileFormatError` for other estimators, by name, and for what was not fitted, or
    `SteerError` where the sender has to say which of several is meant.
    """
    steps, about = _chosen(found, options)
    if not steps:
        return None
    *front, last = _flattened(steps)
    weight, bias = _of_classifier(last, [*front, last])
    for step in reversed(front):
        weight, bias = _folded(weight, bias, _of_step(step, [*front, last]), step)
    arrays = {"coef_": weight, "intercept_": bias}
    return FittedProbe(arrays, about, _second_label(last))


def _chosen(
    found: Any, options: ImportOptions, wrappers: int = MOST_WRAPPERS
) -> tuple[list[Instance], dict[str, Any]]:
    """The steps that are meant, in their order, and what stands beside them."""
    if _is_estimator(found):
        return [found], {}
    if isinstance(found, list | tuple):
        held = [one for one in found if _is_estimator(one)]
        return _ordered(held, len(found)) if held else [], {}
    if not isinstance(found, dict):
        return [], {}
    named = {key: one for key, one in found.items() if _is_estimator(one)}
    about = {str(key): one for key, one in found.items() if key not in named}
    if (stated := of_stated_layer(named, options)) is not None:
        layer, one = stated
        return [one], {**about, "layer": layer}
    if named:
        return _ordered(list(named.values()), len(named)), about
    inner = [name for name, one in about.items() if isinstance(one, dict)]
    if len(inner) == 1 and wrappers:
        steps, beside = _chosen(about.pop(inner[0]), options, wrappers - 1)
        return steps, about | beside
    return [], {}


def _is_estimator(one: Any) -> bool:
    return isinstance(one, Instance) and one.kind.startswith("sklearn.")


def _ordered(held: list[Instance], among: int) -> list[Instance]:
    """A classifier, and the one step in front of it if there is one, whichever comes first."""
    if len(held) <= 1 and among == len(held):
        return held
    last = [one for one in held if _ends(one)]
    front = [one for one in held if not _ends(one)]
    if among != len(held) or len(last) != 1 or len(front) > 1:
        raise FileFormatError(
            f"the file holds {', '.join(map(_name, held))[:200]}: in which order they are meant, "
            "or which of them, is not said; save the one classifier, or one Pipeline",
            code="unknown_layout",
        )
    return [*front, *last]


def _ends(step: Instance) -> bool:
    """Whether it gives a score, and is in front of nothing."""
    return _name(step) in _CLASSIFIERS | _REGRESSIONS or bool(_inner(step))


def _inner(step: Instance) -> list[Any] | None:
    """What an estimator runs in its own place, if it is made of others."""
    steps = step.state.get("steps")
    if isinstance(steps, list):  # a Pipeline's, each with its name
        return [one[-1] for one in steps if isinstance(one, tuple) and one]
    best = step.state.get("best_estimator_")
    return None if best is None else [best]


def _flattened(steps: Sequence[Any]) -> list[Any]:
    """Steps one after the other, those of pipelines and the best of searches in their place."""
    flat: list[Any] = []
    waiting = list(reversed(steps))
    while waiting and len(flat) < _MOST_STEPS:
        step = waiting.pop()
        inner = _inner(step) if isinstance(step, Instance) else None
        if inner is not None:
            waiting.extend(reversed(inner[:_MOST_STEPS]))
        elif step is not None and step != "passthrough":
            flat.append(step)
    if waiting or not flat:
        raise _not_linear(flat)
    return flat


def _of_classifier(last: Any, steps: list[Any]) -> tuple[Tensor, Tensor]:
    """The weights `[k, d]` and biases `[k]` of the last step, in float64."""
    if isinstance(last, Instance) and _name(last) in _REGRESSIONS:
        raise FileFormatError(
            f"the pickle holds a {_name(last)}, which predicts a number, and no number is the one "
            "above which a detector fires: save its arrays, with intercept_ less the number that "
            "you mean (np.savez('probe.npz', coef_=…, intercept_=… - number)), and import those",
            code="unknown_layout",
        )
    if not isinstance(last, Instance) or _name(last) not in _CLASSIFIERS:
        raise _not_linear(steps)
    bias = _array(last, "intercept_").reshape(-1)
    if _name(last) not in ("SVC", "NuSVC"):
        weight = _array(last, "coef_")
        return weight.reshape(-1, weight.shape[-1]), bias
    if last.state.get("kernel") != "linear":
        raise FileFormatError(
            f"the pickle holds a {_name(last)} with the kernel "
            f"{quoted(last.state.get('kernel'), 40)}: a detector is linear",
            code="unknown_layout",
        )
    dual, vectors = _array(last, "dual_coef_"), _array(last, "support_vectors_")
    if len(dual) != 1 or dual.shape[-1] != len(vectors):
        raise _not_linear(steps, "of more classes than two")
    return dual @ vectors, bias


def _standard(step: Instance) -> _Affine:
    said = step.state
    return _Affine(
        1 / _array(step, "scale_") if said.get("with_std") else None,
        _array(step, "mean_") if said.get("with_mean") else None,
    )


def _robust(step: Instance) -> _Affine:
    said = step.state
    return _Affine(
        1 / _array(step, "scale_") if said.get("with_scaling") else None,
        _array(step, "center_") if said.get("with_centering") else None,
    )


def _min_max(step: Instance) -> _Affine:
    if step.state.get("clip"):
        raise _not_linear([step], "that clips")
    return _Affine(_array(step, "scale_"), None, _array(step, "min_"))


def _max_abs(step: Instance) -> _Affine:
    if step.state.get("clip"):
        raise _not_linear([step], "that clips")
    return _Affine(1 / _array(step, "scale_"))


def _components(step: Instance) -> _Affine:
    """PCA, whitened or not, and the decomposition that does not centre."""
    factor = _array(step, "components_")
    if step.state.get("whiten"):
        factor = factor / _array(step, "explained_variance_").sqrt()[:, None]
    return _Affine(factor, None if _name(step) == "TruncatedSVD" else _array(step, "mean_"))


_Step: TypeAlias = Callable[[Instance], _Affine]
_STEPS: Mapping[str, _Step] = {
    "StandardScaler": _standard,
    "RobustScaler": _robust,
    "MinMaxScaler": _min_max,
    "MaxAbsScaler": _max_abs,
    "PCA": _components,
    "IncrementalPCA": _components,
    "TruncatedSVD": _components,
}


def _of_step(step: Any, steps: list[Any]) -> _Affine:
    if not isinstance(step, Instance) or _name(step) not in _STEPS:
        raise _not_linear(steps)
    return _STEPS[_name(step)](step)


def _folded(weight: Tensor, bias: Tensor, step: _Affine, of: Instance) -> tuple[Tensor, Tensor]:
    """Weights and biases that read what the step reads."""
    given = weight.shape[-1]
    for one in (step.factor, step.shift):
        if one is not None and len(one) != given:
            raise _other_width(of, one, weight)
    if step.shift is not None:
        bias = bias + weight @ step.shift
    if step.factor is not None:
        weight = weight * step.factor if step.factor.ndim == 1 else weight @ step.factor
    if step.centre is not None:
        if step.centre.shape != weight.shape[-1:]:
            raise _other_width(of, step.centre, weight)
        bias = bias - weight @ step.centre
    return weight, bias


def _other_width(step: Instance, array: Tensor, weight: Tensor) -> FileFormatError:
    return FileFormatError(
        f"the {_name(step)} has an array of the shape {list(array.shape)}, what is behind it "
        f"weights of the shape {list(weight.shape)}",
        code="mixed_widths",
    )


def _array(fitted: Instance, name: str) -> Tensor:
    value = fitted.state.get(name)
    if isinstance(value, float):  # an intercept that was not fitted
        return torch.tensor([value], dtype=torch.float64)
    if not isinstance(value, Tensor) or not 1 <= value.ndim <= _BOTH:
        raise FileFormatError(
            f"the {_name(fitted)} in the pickle has no {name}: fit it first",
            code="unknown_layout",
        )
    return value.double()


def _second_label(last: Instance) -> str:
    """What the score speaks for, where labels are texts: scikit-learn sorts them."""
    binarizer = last.state.get("_label_binarizer")
    labels = (binarizer if isinstance(binarizer, Instance) else last).state.get("classes_")
    if not isinstance(labels, list) or len(labels) != _BOTH:
        return ""
    return f"{labels[1]!s:.200}, not {labels[0]!s:.200}"


def _name(step: Instance) -> str:
    return step.kind.rpartition(".")[2]


def _not_linear(steps: list[Any], how: str = "") -> FileFormatError:
    kinds = [_name(one) if isinstance(one, Instance) else type(one).__name__ for one in steps]
    return FileFormatError(
        f"the pickle's steps are {', '.join(kinds)[:200] or 'none'}{how and ' ' + how}: read is a "
        "linear classifier, alone or behind scalers and PCA",
        code="unknown_layout",
    )
