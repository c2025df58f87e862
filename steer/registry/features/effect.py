"""What a feature does to what the model says: the finding of `steer sae effect`."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from steer.registry.features.findings import Finding

OutputVerdict: TypeAlias = Literal["causes", "writes", "detects", "unknown"]

VERDICTS: dict[OutputVerdict, str] = {
    "causes": "CAUSES: raised, it makes the model say what it fires on, more than chance does",
    "writes": "WRITES: raised, it makes the model say what its decoder row points to; that this "
    "goes with what it fires on is not shown",
    "detects": "DETECTS: it fires, but raising it does no more than chance does to what is said",
    "unknown": "UNKNOWN: nothing tells what it should make the model say, or it cannot be raised "
    "far enough",
}


class ChangedToken(BaseModel):
    """A token, and the change of its mean log-probability in nats."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    token: str
    change: float


class TargetEffect(BaseModel):
    """What steering did to a few tokens, beside nulls.

    `change` is the mean change of their log-probabilities less that of all tokens, in nats; a null
    does `null` on average and at most `strongest`. `p` is the chance of a null that does as much,
    `q` the false discovery rate of p over the features that were asked for together (None: of an
    older version, which did not say).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: tuple[str, ...]
    change: float
    null: float
    strongest: float
    p: float
    q: float | None = None


class OutputEffect(Finding):
    """What adding `strength` to the feature does to what `model` says next, on neutral questions.

    `kl` is how far that moves it, in nats on average; `reached` whether that is the KL asked for,
    at which `nulls` directions of chance were held against it. `promoted` and `demoted` are the
    tokens whose log-probability rose and fell most. `written` are the tokens that the decoder row
    points to (logit lens), `detected` those on which the feature fired where the SAE was surveyed,
    and those that followed.
    """

    kept_as: ClassVar[str] = "effect"

    model: str
    prompts: int
    strength: float
    kl: float
    reached: bool
    nulls: int
    promoted: tuple[ChangedToken, ...]
    demoted: tuple[ChangedToken, ...]
    written: TargetEffect | None
    detected: TargetEffect | None
    verdict: OutputVerdict
