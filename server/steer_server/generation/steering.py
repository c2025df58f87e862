"""From a request's `model` and `steering` to the plan that its sequences run with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from steer.artefacts.arming import ArmedDetector
from steer.engines.checks import no_messages
from steer.errors import SpecError, SteerError, UnknownArtefact, UnknownModel
from steer.plan.plan import SteeringPlan
from steer.prompts.roles import RoleRanges
from steer.references import Reference
from steer.registry.profiles import Profile
from steer.spec import SteeringSpec, TokenVector
from steer_server.state import Serving


@dataclass(frozen=True)
class Steering:
    """How one request is steered: by a profile, by a spec of its own, or not at all."""

    plan: SteeringPlan | None = None
    profile: str | None = None
    detectors: tuple[ArmedDetector, ...] = ()
    """Those that the profile arms."""

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of the vectors used, without hashes; `inline` for those in the request, `token`
        for those of a lens."""
        if self.plan is None:
            return ()
        names = [
            _called(reference)
            for reference in self.plan.spec.references()
            if reference.kind == "vector"
        ]
        return tuple(dict.fromkeys(names))

    @property
    def roles_at(self) -> str:
        """The pointer into the request at which roles are named."""
        if self.profile is not None or self.plan is None:
            return "/model"
        return "/steering" + (self.plan.spec.roles_at or "")

    @property
    def strengths(self) -> tuple[float, ...]:
        """Every intervention's strength, in multiples of its vector."""
        return () if self.plan is None else self.plan.strengths


def _called(reference: Reference) -> str:
    if isinstance(reference.ref, TokenVector):
        return "token"
    return (reference.name or "inline").split("@")[0]


def resolve(serving: Serving, model: str, spec: SteeringSpec | None) -> Steering:
    """The steering of a request for `model` with `spec`.

    Raises `UnknownModel` for a model that is not served, and whatever is
    wrong with the spec, its pointers below `/steering`.
    """
    profile = None
    if model != serving.model_name:
        profile = profile_of(serving, model)
        if spec is not None:
            raise SpecError(
                f"the model {model!r} is already steered by the profile {profile.name!r}: send "
                f"'steering' with the model {serving.model_name!r}, or leave 'steering' out",
                param="/steering",
                code="steering_conflict",
            )
        spec = profile.spec
    if spec is None:
        return Steering()
    at = "/steering" if profile is None else "/model"
    plan = compile_spec(serving, spec, at=at)
    return Steering(plan) if profile is None else Steering(plan, profile.name, profile.detectors)


def whose_words(steering: Steering, find: Callable[[], RoleRanges] | None) -> RoleRanges | None:
    """Whose words the prompt's tokens are, found where the steering asks; `find` is None for a
    prompt that was not given as messages, and then such steering is refused (`no_messages`)."""
    if steering.plan is None or not steering.plan.reads_roles:
        return None
    if find is None:
        raise no_messages(param=steering.roles_at)
    return find()


def compile_spec(serving: Serving, spec: SteeringSpec, *, at: str) -> SteeringPlan:
    """The plan of `spec`, which stands at the pointer `at` of the request."""
    try:
        return serving.plans.plan(spec)
    except SteerError as error:
        # A profile's spec is not in the request: there the pointer ends at the model's name.
        error.param = at if at == "/model" else at + (error.param or "")
        raise


def profile_of(serving: Serving, model: str) -> Profile:
    """The profile that `<served model>:<profile>` names."""
    name = model.removeprefix(serving.model_name + ":")
    try:
        if name != model:
            return serving.registry.profile(name)
    except UnknownArtefact:
        pass  # what is missing is the model that the caller named
    raise unknown_model(serving, model)


def unknown_model(serving: Serving, model: str) -> UnknownModel:
    """The error for a model that is not in the list of models."""
    served = serving.model_name
    return UnknownModel(
        f"the model {model!r} does not exist: this server has {served!r}, and "
        f"'{served}:<profile>' for each saved profile (GET /v1/models lists them)",
        param="/model",
    )
