"""One registry, several models: what a name means, what lists show, what may be removed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer.artefacts.control_vector import ControlVector
from steer.engines.fake.engine import fake_model
from steer.errors import Conflict, UnknownArtefact
from steer.model import ModelInfo
from steer.registry.catalogue.model_view import EVERY_MODEL
from steer.registry.profiles import Profile
from steer.registry.registry import Registry
from steer.spec import parse_spec

WIDTH = 4
A = fake_model(name="org/A", d_model=WIDTH, d_mlp=8)
B = fake_model(name="B", d_model=WIDTH + 2, d_mlp=12)


def a_vector(value: float, model: str | None = None, width: int = WIDTH) -> ControlVector:
    return ControlVector.of({0: torch.full((width,), value)}, model=model)


def using(ref: str) -> dict[str, object]:
    return {"interventions": [{"kind": "add", "vector": ref}]}


def meant(registry: Registry, model: ModelInfo | str, ref: str = "formal") -> int:
    """The number of the version that a reference means for a model."""
    return registry.for_model(model).entry("vector", ref).version


@pytest.fixture
def both(registry: Registry) -> Registry:
    """`formal` for A (versions 1 and 2), then for B (version 3)."""
    registry.add("formal", a_vector(1, "A"))
    registry.add("formal", a_vector(2, "A"))
    registry.add("formal", a_vector(3, "hub/B", WIDTH + 2))
    return registry


def test_a_bare_name_means_the_newest_version_for_the_model(both: Registry) -> None:
    assert meant(both, A) == 2
    assert meant(both, B) == 3
    assert both.entry("vector", "formal").version == 3
    assert meant(both, "elsewhere") == 3  # none is for it: the newest of all, to be refused by name
    assert both.for_model(A).vector("formal").card.width == WIDTH
    first = both.versions("vector", "formal")[-1]
    assert {meant(both, model, first.id) for model in (A, B)} == {1}


def test_near_names_are_those_of_the_model(registry: Registry) -> None:
    """Of what another model has nothing is suggested: it would be refused."""
    registry.add("french", a_vector(1, "A"))
    registry.add("frank", a_vector(2, "B", WIDTH + 2))
    registry.add("fresh", a_vector(3))  # for whoever has its width
    for view, near, other in ((A, ("french", "fresh"), "frank"), (B, ("frank",), "french")):
        with pytest.raises(UnknownArtefact, match="did you mean") as caught:
            registry.for_model(view).vector("frenk")
        for name in near:
            assert repr(name) in str(caught.value)
        assert repr(other) not in str(caught.value)
    with pytest.raises(UnknownArtefact, match="none is registered for this model"):
        registry.for_model(fake_model(name="C", d_model=64, d_mlp=64)).vector("french1")
    with pytest.raises(UnknownArtefact, match="did you mean"):
        registry.vector("frenk")


def test_near_profiles_are_those_of_the_model(registry: Registry) -> None:
    registry.add("v", a_vector(1))
    spec = parse_spec(using("v"))
    registry.put_profile(Profile(name="calm", spec=spec, model="A"))
    registry.put_profile(Profile(name="balm", spec=spec, model="B"))
    registry.put_profile(Profile(name="palm", spec=spec))
    with pytest.raises(UnknownArtefact, match="did you mean") as caught:
        registry.for_model(A).profile("alm")
    assert "'calm'" in str(caught.value)
    assert "'palm'" in str(caught.value)
    assert "'balm'" not in str(caught.value)


@pytest.mark.parametrize(
    "info",
    [
        A,
        fake_model(name="/models/A"),
        fake_model(name="org/A").served_as("prod"),
        fake_model(name="checkpoint").served_as("A"),
    ],
    ids=lambda info: f"{info.origin}-{info.name}",
)
def test_models_are_compared_as_cards_are(both: Registry, info: ModelInfo) -> None:
    assert meant(both, info) == 2


def test_an_alias_that_follows_follows_for_each_model(both: Registry) -> None:
    both.set_alias("vector", "polite", "formal")
    both.set_alias("vector", "first", both.versions("vector", "formal")[-1].id)
    assert [meant(both, model, "polite") for model in (A, B)] == [2, 3]
    assert [meant(both, model, "first") for model in (A, B)] == [1, 1]


def test_a_card_without_a_model_is_for_those_of_its_width(both: Registry) -> None:
    both.add("formal", a_vector(4))
    assert [meant(both, model) for model in (A, B)] == [4, 3]
    # Of a model whose shape is not known, any may be.
    assert meant(both, "B") == 4


def test_content_is_new_where_the_name_means_something_else_for_its_model(both: Registry) -> None:
    newest_for_a = a_vector(2, "A")
    for registry in (both, both.for_model(A), both.for_model(B)):
        entry, created = registry.add("formal", newest_for_a)
        assert (entry.version, created) == (2, False)
    entry, created = both.for_model(B).add("formal", a_vector(1, "A"))
    assert (entry.version, created) == (4, True)
    assert [meant(both, model) for model in (A, B)] == [4, 3]


def test_another_version_elsewhere_is_seen_at_once(both: Registry) -> None:
    here = both.for_model(A)
    assert here.entry("vector", "formal").version == 2
    both.for_model(B).add("formal", a_vector(5, "A"))
    assert here.entry("vector", "formal").version == 4


MODELS = st.sampled_from(["A", "B", "C", None])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.tuples(MODELS, st.booleans()), min_size=1, max_size=8))
def test_what_a_name_means_is_decided_by_its_own_models_versions(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str | None, bool]]
) -> None:
    """Whatever was added and removed: the newest live version whose card names the model or none,
    else the newest of all; so another model's versions change nothing where there is one."""
    with Registry.open(tmp_path_factory.mktemp("registry")) as registry:
        live: list[tuple[int, str | None]] = []
        for number, (model, keep) in enumerate(steps, start=1):
            entry, _ = registry.add("v", a_vector(number, model))
            if keep or number == 1:
                live.append((entry.version, model))
            else:
                registry.remove("vector", entry.id)
        for reader in ("A", "B", "C"):
            own = [version for version, model in live if model in (reader, None)]
            expected = max(own or [version for version, _ in live])
            assert meant(registry, reader, "v") == expected


# Lists


def test_a_list_shows_a_name_once_and_the_version_that_counts(both: Registry) -> None:
    both.add("only-b", a_vector(1, "B", WIDTH + 2))
    both.add("for-all", a_vector(1))
    both.add("wide", a_vector(1, width=99))

    def listed(registry: Registry, **search: object) -> list[tuple[str, int]]:
        return [(e.name, e.version) for e in registry.entries("vector", **search)]  # type: ignore[arg-type]

    here = both.for_model(A)
    assert listed(here) == [("for-all", 1), ("formal", 2), ("wide", 1)]
    assert listed(here, model="org/B") == [("formal", 3), ("only-b", 1)]
    assert listed(here, model=EVERY_MODEL) == [
        ("for-all", 1),
        ("formal", 2),
        ("only-b", 1),
        ("wide", 1),
    ]
    assert listed(both, model="A") == [("formal", 2)]
    assert listed(both) == [("for-all", 1), ("formal", 3), ("only-b", 1), ("wide", 1)]
    assert listed(here, limit=1, offset=1) == [("formal", 2)]


# Removal


def test_removal_takes_what_the_name_means_for_the_model_and_leaves_the_others(
    both: Registry,
) -> None:
    here = both.for_model(B)
    assert here.remove("vector", "formal").version == 3
    assert [meant(both, model) for model in (A, B)] == [2, 2]
    with pytest.raises(UnknownArtefact, match="no version for 'B'") as raised:
        here.remove("vector", "formal")  # a second time, as a client does that got no answer
    assert raised.value.code == "unknown_vector"
    assert both.for_model(A).entry("vector", "formal").id in raised.value.message
    assert [entry.version for entry in here.entries(deleted=True)] == [3]
    assert both.for_model(A).entries(deleted=True) == []
    with pytest.raises(UnknownArtefact, match="no version for 'A'"):
        both.for_model(A).restore("vector", "formal")
    assert here.restore("vector", "formal").version == 3
    assert meant(both, B) == 3
    exact = both.for_model(A).entry("vector", "formal").id
    assert here.remove("vector", exact).version == 2  # by its content it is anybody's
    assert meant(both, A) == 1
    assert both.remove("vector", "formal").version == 3  # nobody's view: all of them
    assert both.entries("vector") == []


@pytest.mark.parametrize(
    ("saved_for", "remover", "refused"),
    [("A", B, False), ("A", A, True), ("B", A, False), (None, A, True), (None, B, True)],
)
def test_what_a_profile_of_the_model_needs_stays(
    both: Registry, saved_for: str | None, remover: ModelInfo, refused: bool
) -> None:
    both.put_profile(Profile(name="p", spec=using("formal"), model=saved_for))
    here = both.for_model(remover)
    if not refused:
        here.remove("vector", "formal")
        return
    with pytest.raises(Conflict, match="the profiles p") as raised:
        here.remove("vector", "formal")
    assert raised.value.code == "in_use"


def test_a_version_for_all_models_is_enough_for_a_profile(both: Registry) -> None:
    both.put_profile(Profile(name="p", spec=using("formal"), model="A"))
    both.set_alias("vector", "polite", "formal")
    common, _ = both.add("formal", a_vector(4))
    for entry in both.versions("vector", "formal"):
        if entry != common:
            both.remove("vector", entry.id)
    with pytest.raises(Conflict, match="polite and the profiles p"):
        both.remove("vector", common.id)


# Profiles


def test_each_model_has_its_own_profile_of_a_name(both: Registry) -> None:
    one, two = both.for_model(A), both.for_model(B)
    pinned = one.put_profile(Profile(name="p", spec=using("formal")), pin=True)
    two.put_profile(Profile(name="p", spec=using("formal")))
    assert (pinned.model, two.profile("p").model) == ("A", "B")
    assert pinned.spec.interventions[0].vector == both.versions("vector", "formal")[1].id  # type: ignore[union-attr]
    assert [profile.model for profile in one.profiles()] == ["A"]
    assert [profile.model for profile in one.profiles("hub/B")] == ["B"]
    assert [profile.model for profile in one.profiles(EVERY_MODEL)] == ["A", "B"]
    assert both.stats().profiles == 2

    replaced = one.put_profile(Profile(name="p", spec=using("formal"), description="new"))
    assert one.profile("p") == replaced
    assert two.profile("p").description == ""

    two.remove_profile("p")
    assert one.profile("p") == replaced
    # It is found, so that its use is refused for what it is; it is neither listed nor removed.
    assert two.profile("p") == replaced
    assert two.profiles() == []
    with pytest.raises(UnknownArtefact, match="serves 'A', not this model") as raised:
        two.remove_profile("p")
    assert raised.value.code == "unknown_profile"
    both.remove_profile("p")
    assert both.profiles() == []


def test_a_profile_without_a_model_serves_those_that_can_use_it(both: Registry) -> None:
    both.add("only-b", a_vector(1, "B", WIDTH + 2))
    both.put_profile(Profile(name="polite", spec=using("formal")))
    both.put_profile(Profile(name="exact", spec=using("only-b")))
    one, two = both.for_model(A), both.for_model(B)
    assert [profile.name for profile in one.profiles()] == ["polite"]
    assert [profile.name for profile in two.profiles()] == ["exact", "polite"]
    # A tuned model of the same shape can use what was made for the first one.
    tuned = both.for_model(fake_model(name="tuned", d_model=WIDTH + 2))
    assert [profile.name for profile in tuned.profiles()] == ["exact", "polite"]
    one.put_profile(Profile(name="polite", spec=using("formal"), description="own"))
    assert [profile.description for profile in one.profiles()] == ["own"]
    assert one.profile("polite").description == "own"
    assert two.profile("polite").model is None
    assert both.profile("polite").model is None
    one.remove_profile("polite")  # both that serve it, so that the name is gone
    with pytest.raises(UnknownArtefact):
        one.profile("polite")


# Archives


def test_an_archive_keeps_what_names_mean(both: Registry, tmp_path: Path) -> None:
    for model in (A, B):
        both.for_model(model).put_profile(
            Profile(name="p", spec=using("formal"), description=model.name)
        )
    data = io.BytesIO()
    both.export_archive(data)
    data.seek(0)
    with Registry.open(tmp_path / "copy") as copy:
        assert copy.import_archive(data).kept == []
        for model in (A, B):
            assert meant(copy, model) == meant(both, model)
            assert copy.for_model(model).profile("p").description == model.name
