"""Catalogues of other schemas: older ones are brought up to date, newer ones refused by name."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from crashes import observed
from sqlalchemy import create_engine

from steer.artefacts.control_vector import ControlVector
from steer.errors import StorageError, Unsupported
from steer.registry.catalogue.migrating import known_revisions
from steer.registry.catalogue.schema import HEAD, metadata
from steer.registry.location import locate
from steer.registry.opening import open_database
from steer.registry.registry import Registry

OLD = Path(__file__).parent / "version-1"
FRENCH = (
    "095133544d877b0a676d3f0d000bdf299b8e8601bd13b170c93114dee45872e0",
    "a3d1cd19394ca31ee533394b8512f03b7f95a2474e963d23d093616f50e1119a",
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_a_folder_of_version_1_keeps_everything(old: Path) -> None:
    with Registry.open(old) as registry:
        assert [(e.version, e.sha256) for e in registry.versions("vector", "french")] == [
            (2, FRENCH[1]),
            (1, FRENCH[0]),
        ]
        assert registry.entry("vector", "same").sha256 == FRENCH[0]
        assert [e.version for e in registry.versions("vector", "partly")] == [3, 1]
        assert registry.vector("french").card.description == "speaks like Racine"
        assert registry.low_rank("adapter").card.width == 4
        assert registry.sae("features").layer == 2
        assert [p.name for p in registry.profiles()] == ["held", "plain"]
        assert registry.profile("held").spec.interventions[0].vector == f"french@{FRENCH[0][:12]}"
        assert registry.profile("plain").spec.interventions[0].vector == "french"
        # What was removed had lost its blob, and its number stays used.
        assert registry.entries(deleted=True) == []
        assert registry.add("gone", _one())[0].version == 2
        # And what is new works on what is old.
        assert [e.name for e in registry.entries(model="demo", width=4, kind="vector")] == [
            "french",
            "same",
        ]
        registry.set_alias("vector", "fr", "french")
        assert registry.vector("fr").sha256 == FRENCH[1]
    with Registry.open(old) as registry:  # the second time there is nothing to do
        assert registry.vector("fr").sha256 == FRENCH[1]


def test_what_was_there_is_for_the_models_it_was_for(old: Path) -> None:
    with sqlite3.connect(old / "catalogue.sqlite") as connection:
        stated = connection.execute("SELECT card FROM artefacts WHERE name = 'same'").fetchone()[0]
        long = json.dumps({**json.loads(stated), "model": "/models/org/demo/"})
        connection.execute("UPDATE artefacts SET card = ? WHERE name = 'same'", [long])
    connection.close()
    with Registry.open(old) as registry:
        assert registry.entry("vector", "same").card.model == "/models/org/demo/"
        assert [e.name for e in registry.entries("vector", model="demo")] == ["french", "same"]
        # Saved before profiles had models, they serve every one, by their names as well.
        assert [p.model for p in registry.profiles()] == [None, None]
        for model in ("org/demo", "other"):
            seen = registry.for_model(model)
            assert seen.entry("vector", "french").version == 2
            assert seen.profile("plain") == registry.profile("plain")
        assert [p.name for p in registry.for_model("demo").profiles()] == ["held", "plain"]


def _one() -> ControlVector:
    return ControlVector.of({0: torch.ones(4)})


def test_the_old_steer_refuses_the_new_catalogue(old: Path) -> None:
    Registry.open(old).close()
    with sqlite3.connect(old / "catalogue.sqlite") as connection:
        (mark,) = connection.execute("PRAGMA user_version").fetchone()
    assert mark > 1  # which it compares with its own


@pytest.mark.parametrize(
    "change", ["PRAGMA user_version = 3", "UPDATE alembic_version SET version_num = '9999'"]
)
def test_a_newer_catalogue_is_refused_by_name(old: Path, change: str) -> None:
    Registry.open(old).close()
    path = old / "catalogue.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(
        StorageError, match=r"newer Steer \(schema (3|9999); this one reads up to"
    ) as raised:
        Registry.open(old)
    assert raised.value.code == "newer_schema"
    assert str(path) in raised.value.message
    assert path.read_bytes() == before


def test_a_migration_that_fails_changes_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old / "catalogue.sqlite"
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr("json.loads", fail)  # the last thing that the last step does
        with pytest.raises(RuntimeError):
            Registry.open(old)
    assert path.read_bytes() == before
    with Registry.open(old) as registry:
        assert len(observed(registry)["live"]) == 7


def test_the_tables_are_what_the_migrations_make(tmp_path: Path) -> None:
    assert known_revisions()[-1] == HEAD
    database = open_database(locate(tmp_path).catalogue)
    try:
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection)
            assert compare_metadata(context, metadata) == []
    finally:
        database.close()


def test_an_upgraded_catalogue_has_the_same_tables_as_a_new_one(old: Path, tmp_path: Path) -> None:
    Registry.open(old).close()
    engine = create_engine(f"sqlite:///{old}/catalogue.sqlite")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()
    with pytest.raises(StorageError, match="something else"):
        Registry.open(tmp_path / "r", catalogue=f"sqlite:///{path}")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://host/db", "no url"])
def test_catalogues_that_cannot_be(tmp_path: Path, url: str) -> None:
    with pytest.raises(Unsupported) as raised:
        Registry.open(tmp_path, catalogue=url)
    assert raised.value.code == "unsupported_catalogue"
