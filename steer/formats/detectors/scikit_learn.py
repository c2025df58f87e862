"""Linear classifiers in scikit-learn's pickles, for `steer vectors convert`.

Nothing of scikit-learn is imported or run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.errors import FileFormatError
from steer.formats.guards.pickled_tensors import Instance

_SCALER = "sklearn.preprocessing._data.StandardScaler"
_PIPELINE = "sklearn.pipeline.Pipeline"
_CLASSIFIERS = frozenset(
    {
        "sklearn.discriminant_analysis.LinearDiscriminantAnalysis",
        "sklearn.linear_model._logistic.LogisticRegression",
        "sklearn.linear_model._logistic.LogisticRegressionCV",
        "sklearn.linear_model._ridge.RidgeClassifier",
        "sklearn.linear_model._ridge.RidgeClassifierCV",
        "sklearn.svm._classes.LinearSVC",
    }
)
_BESIDE = "sklearn.preprocessing._label.LabelBinarizer"
"""What a ridge classifier keeps of its labels."""
CLASSES = _CLASSIFIERS | {_SCALER, _PIPELINE, _BESIDE}
"""Of which instances may be in a pickle."""


def is_classifier(found: Any) -> bool:
    """Whether this is a classifier, alone or in a pipeline."""
    return isinstance(found, Instance) and found.kind in CLASSES


def arrays_of(found: Instance) -> dict[str, Tensor]:
    """`coef_` and `intercept_`, and of a scaler in front `mean_` and `scale_`. Raises
    `FileFormatError` for other steps, and for what was not fitted."""
    steps = [found]
    if found.kind == _PIPELINE:
        steps = [step for _, step in found.state.get("steps", ()) if step != "passthrough"]
    if not steps:
        raise _not_linear(steps)
    *front, last = steps
    if not isinstance(last, Instance) or last.kind not in _CLASSIFIERS or len(front) > 1:
        raise _not_linear(steps)
    arrays = {name: _array(last, name) for name in ("coef_", "intercept_")}
    for scaler in front:
        if not isinstance(scaler, Instance) or scaler.kind != _SCALER:
            raise _not_linear(steps)
        for name, used in (("mean_", "with_mean"), ("scale_", "with_std")):
            if scaler.state.get(used):
                arrays[name] = _array(scaler, name)
    return arrays


def _array(fitted: Instance, name: str) -> Tensor:
    value = fitted.state.get(name)
    if isinstance(value, float):  # an intercept that was not fitted
        return Tensor([value])
    if not isinstance(value, Tensor):
        raise FileFormatError(
            f"the {fitted.kind.rpartition('.')[2]} in the pickle has no {name}: fit it first",
            code="unknown_layout",
        )
    return value


def _not_linear(steps: list[Any]) -> FileFormatError:
    kinds = [
        step.kind.rpartition(".")[2] if isinstance(step, Instance) else type(step).__name__
        for step in steps
    ]
    return FileFormatError(
        f"the pickle's steps are {', '.join(kinds)[:200] or 'none'}: read is a linear classifier, "
        "with one StandardScaler in front of it or none",
        code="unknown_layout",
    )
