"""Aliases, tags, pins, search, and removal that can be undone."""

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.errors import Conflict, SteerError, UnknownArtefact
from steer.registry.profiles import Profile, references
from steer.registry.registry import Registry


def a_vector(value: float = 1.0, *, width: int = 4, **card: object) -> ControlVector:
    return ControlVector.of({0: torch.full((width,), value)}, **card)


def using(ref: str) -> dict:
    return {"interventions": [{"kind": "add", "vector": ref}]}


def test_an_alias_follows_a_name_or_stays_with_a_version(registry: Registry) -> None:
    one, _ = registry.add("french", a_vector(1))
    registry.set_alias("vector", "newest", "french")
    held = registry.set_alias("vector", "held", one.id)
    two, _ = registry.add("french", a_vector(2))
    assert registry.vector("newest").sha256 == two.sha256
    assert registry.vector("newest").card.name == "french"
    assert registry.vector("held").sha256 == one.sha256
    assert registry.entry("vector", f"newest@{one.sha256[:6]}") == one
    assert registry.entry("vector", f"held@{one.sha256[:6]}") == one
    with pytest.raises(UnknownArtefact):
        registry.entry("vector", f"held@{two.sha256[:6]}")
    assert (held.target, held.sha256, held.ref) == ("french", one.sha256, one.id)
    assert registry.versions("vector", "held") == [two, one]
    assert [alias.name for alias in registry.aliases("vector", "french")] == ["held", "newest"]
    assert registry.aliases("sae") == []
    with pytest.raises(UnknownArtefact):
        registry.sae("newest")  # an alias is of one kind

    registry.set_alias("vector", "held", two.id)  # moved, in one step
    assert registry.vector("held").sha256 == two.sha256
    registry.unset_alias("vector", "held")
    with pytest.raises(UnknownArtefact):
        registry.vector("held")
    with pytest.raises(UnknownArtefact) as raised:
        registry.unset_alias("vector", "held")
    assert raised.value.code == "unknown_alias"


def test_an_alias_and_a_name_never_collide(registry: Registry) -> None:
    registry.add("v", a_vector(1))
    registry.add("w", a_vector(2))
    registry.set_alias("vector", "a", "v")
    cases = [
        (lambda: registry.set_alias("vector", "w", "v"), "name_taken"),
        (lambda: registry.add("a", a_vector(3)), "name_taken"),
        (lambda: registry.set_alias("vector", "b", "a"), "is_alias"),
        (lambda: registry.remove("vector", "a"), "is_alias"),
    ]
    registry.remove("vector", "w")
    cases.append((lambda: registry.set_alias("vector", "w", "v"), "name_taken"))  # restorable
    for call, code in cases:
        with pytest.raises(Conflict) as raised:
            call()
        assert raised.value.code == code
    with pytest.raises(UnknownArtefact) as unknown:
        registry.set_alias("vector", "b", "nowhere")
    assert unknown.value.param == "/target"
    with pytest.raises(SteerError) as raised:
        registry.set_alias("vector", "b@123456", "v")
    assert raised.value.code == "invalid_name"
    assert [alias.name for alias in registry.aliases()] == ["a"]


def test_what_an_alias_stands_for_cannot_be_removed(registry: Registry) -> None:
    one, _ = registry.add("v", a_vector(1))
    two, _ = registry.add("v", a_vector(2))
    registry.set_alias("vector", "held", one.id)
    registry.set_alias("vector", "newest", "v")
    with pytest.raises(Conflict, match="the aliases held, newest") as raised:
        registry.remove("vector", "v")
    assert raised.value.code == "in_use"
    with pytest.raises(Conflict, match="the aliases held:"):
        registry.remove("vector", one.id)
    registry.remove("vector", two.id)
    registry.unset_alias("vector", "held")
    registry.unset_alias("vector", "newest")
    registry.remove("vector", "v")


def test_an_alias_that_a_profile_uses(registry: Registry) -> None:
    registry.add("v", a_vector(1))
    registry.add("w", a_vector(2))
    registry.set_alias("vector", "a", "v")
    registry.put_profile(Profile(name="p", spec=using("a")))
    with pytest.raises(Conflict, match="profiles p"):
        registry.unset_alias("vector", "a")
    with pytest.raises(Conflict, match="the aliases a and the profiles p"):
        registry.remove("vector", "v")
    registry.set_alias("vector", "a", "w")  # the profile goes with it
    registry.put_profile(Profile(name="p", spec=using("a@" + a_vector(2).sha256[:8])))
    with pytest.raises(Conflict, match="'p' uses a@"):
        registry.set_alias("vector", "a", "v")
    assert registry.vector("a").sha256 == a_vector(2).sha256


def test_a_pinned_profile_keeps_its_meaning(registry: Registry) -> None:
    one, _ = registry.add("v", a_vector(1))
    registry.add("w", a_vector(5))
    registry.set_alias("vector", "a", "v")
    gate = {"vector": "v", "above": 0.1}
    spec = {
        "interventions": [
            {"kind": "add", "vector": "a", "when": gate},
            {"kind": "swap", "remove": "w", "add": "v"},
        ],
        "when": gate,
    }
    free = registry.put_profile(Profile(name="free", spec=spec))
    held = registry.put_profile(Profile(name="held", spec=spec), pin=True)
    assert free == Profile(name="free", spec=spec)
    assert registry.profile("held") == held
    named = [reference.ref for reference in references(held)]
    other = registry.entry("vector", "w").id
    assert sorted(named) == sorted([one.id] * 4 + [other])
    two, _ = registry.add("v", a_vector(2))
    registry.set_alias("vector", "a", "w")
    for reference in references(registry.profile("held")):
        assert registry.entry("vector", reference.ref).id in (one.id, other)
    newest = {registry.entry("vector", r.ref).id for r in references(free)}
    assert newest == {two.id, other}
    with pytest.raises(Conflict):
        registry.remove("vector", one.id)


def test_tags_belong_to_the_name(registry: Registry) -> None:
    registry.add("v", a_vector(1, tags=("from-card", "not a tag")))
    assert registry.tags("vector", ["v"]) == {"v": ("from-card",)}
    assert registry.change_tags("vector", "v", add=["b", "a"], remove=["from-card"]) == ("a", "b")
    assert registry.change_tags("vector", "v", add=["b"], remove=["never"]) == ("a", "b")
    registry.add("v", a_vector(2))
    assert registry.tags("vector", ["v", "other"]) == {"v": ("a", "b")}
    registry.set_alias("vector", "alias", "v")
    assert registry.change_tags("vector", "alias", add=["c"]) == ("a", "b", "c")
    for bad in ("", "a b", "-a", "a/b", "x" * 65):
        with pytest.raises(SteerError) as raised:
            registry.change_tags("vector", "v", add=[bad])
        assert raised.value.code == "invalid_tag"
    with pytest.raises(SteerError):
        registry.change_tags("vector", "v", add=["x"], remove=["x"])
    with pytest.raises(SteerError, match="at most 64"):
        registry.change_tags("vector", "v", add=[f"t{n}" for n in range(70)])
    with pytest.raises(UnknownArtefact):
        registry.change_tags("vector", "nowhere", add=["x"])
    assert registry.tags("vector", ["v"]) == {"v": ("a", "b", "c")}


def test_search_by_everything_and_by_page(registry: Registry) -> None:
    registry.add("french", a_vector(1, model="demo", description="Speaks like Molière"))
    registry.add("german", a_vector(2, model="other"))
    registry.add("wide", a_vector(3, width=8, model="demo"))
    registry.change_tags("vector", "german", add=["language"])
    registry.change_tags("vector", "french", add=["language", "tone"])

    def found(**search: object) -> list[str]:
        return [entry.name for entry in registry.entries(**search)]

    assert found(query="FREN") == ["french"]  # in any case
    assert found(query="moli") == ["french"]
    assert found(query="lang") == ["french", "german"]  # by tag
    assert found(tag="language", model="demo") == ["french"]
    assert found(tag="lang") == []
    assert found(model="demo") == ["french", "wide"]
    assert found(width=8) == ["wide"]
    assert found(kind="sae") == []
    assert [found(limit=1, offset=n) for n in range(4)] == [["french"], ["german"], ["wide"], []]


def test_what_was_removed_can_be_restored(registry: Registry) -> None:
    one, _ = registry.add("v", a_vector(1))
    two, _ = registry.add("v", a_vector(2))
    registry.change_tags("vector", "v", add=["kept"])
    assert registry.stats().removed_bytes == 0
    registry.remove("vector", "v")
    (gone,) = registry.entries(deleted=True)
    assert (gone.id, gone.removed_at is not None) == (two.id, True)
    assert registry.stats().blob_bytes == 0
    assert registry.stats().removed_bytes == one.size_bytes + two.size_bytes
    assert registry.restore("vector", one.id) == one
    assert registry.versions("vector", "v") == [one]
    assert registry.restore("vector", "v") == two
    assert registry.versions("vector", "v") == [two, one]
    assert registry.vector("v").sha256 == two.sha256
    assert registry.tags("vector", ["v"]) == {"v": ("kept",)}
    assert registry.entries(deleted=True) == []
    for ref, why in (("v", "is not removed"), ("never", "never one")):
        with pytest.raises(UnknownArtefact, match=why):
            registry.restore("vector", ref)
