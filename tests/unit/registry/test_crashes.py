"""A crash at every step of every write, on a folder: all or nothing is seen afterwards, nothing
that was acknowledged is lost, the write can be done again, and nothing is left over."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from crashes import Died, Mortal, bury, observed
from registry_writes import NAMES, a_vector, archive, prepare, writes

from steer.registry.blobs.plan_store import PlanStore
from steer.registry.registry import Registry


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return archive(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    with Registry.open(root) as registry:
        prepare(registry)
    return root


def blobs_of(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").glob("*/*")}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "import" else n for n in NAMES]
)
def test_a_crash_at_every_step(
    base: Path, exported: bytes, tmp_path: Path, name: str, after: bool
) -> None:
    write = writes(exported)[name]
    with Registry.open(shutil.copytree(base, tmp_path / "whole")) as registry:
        before = observed(registry)
        write(registry)
        done = observed(registry)
        done_blobs = blobs_of(tmp_path / "whole")
    assert before != done
    step = 0
    while True:
        root = tmp_path / f"step-{step}"
        shutil.copytree(base, root)
        registry = Registry.open(root)
        mortal = Mortal(step, after=after)
        with mortal.living(), suppress(Died):
            write(registry)
        bury(registry)
        if not mortal.dead:
            break
        with Registry.open(root) as registry:
            seen = observed(registry)
            if name == "collect":  # in steps, each of which gives up what can be restored no more
                assert {**seen, "removed": [], "tags": []} == {**done, "removed": [], "tags": []}
                assert set(done["removed"]) <= set(seen["removed"]) <= set(before["removed"])
            else:
                assert seen in (before, done), mortal.steps
            assert [path.name for path in (root / "staging").glob("*/*")] == ["owner.lock"]
            if seen == before:
                write(registry)
            if name == "collect":
                registry.collect_garbage(grace_seconds=0)
            assert observed(registry) == done, mortal.steps
            assert blobs_of(root) == done_blobs
        step += 1
        shutil.rmtree(root)
    assert step >= 2  # at least a change and its commit


@pytest.mark.slow
def test_a_crash_at_every_step_of_opening_an_old_folder(tmp_path: Path) -> None:
    old = Path(__file__).parent / "version-1"
    with Registry.open(shutil.copytree(old, tmp_path / "whole")) as registry:
        done = observed(registry)
    for after in (False, True):
        step = 0
        while True:
            root = shutil.copytree(old, tmp_path / f"step-{after}-{step}")
            mortal = Mortal(step, after=after)
            with mortal.living(), suppress(Died):
                registry = Registry.open(root)
            if not mortal.dead:
                registry.close()
                break
            with Registry.open(root) as registry:
                assert observed(registry) == done, mortal.steps
            step += 1
        assert step > 10, mortal.steps


@pytest.mark.slow
def test_a_crash_at_every_step_of_making_a_registry(tmp_path: Path) -> None:
    for after in (False, True):
        step = 0
        while True:
            root = tmp_path / f"step-{after}-{step}"
            mortal = Mortal(step, after=after)
            with mortal.living(), suppress(Died):
                registry = Registry.open(root)
            if not mortal.dead:
                registry.close()
                break
            with Registry.open(root) as registry:
                registry.add("v", a_vector(1))
                assert len(observed(registry)["live"]) == 1
            step += 1
        assert step > 10, mortal.steps


def test_a_crash_at_every_step_of_storing_a_plan(tmp_path: Path) -> None:
    step = 0
    while True:
        root = tmp_path / f"step-{step}"
        store = PlanStore(root)
        mortal = Mortal(step, after=False)
        with mortal.living(), suppress(Died):
            sha256 = store.put(b"a plan")
        again = PlanStore(root)
        if not mortal.dead:
            assert again.get(sha256) == b"a plan"
            break
        assert again.get(again.put(b"a plan")) == b"a plan"
        step += 1
    assert step >= 1
