"""The catalogue's schema in PostgreSQL."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from object_store import ObjectStore
from postgres_server import PostgresServer
from sqlalchemy import create_engine

from steer.errors import StorageError
from steer.registry.catalogue.schema import metadata
from steer.registry.opening import open_database
from steer.registry.registry import Registry

pytestmark = pytest.mark.slow


def test_the_tables_are_what_the_migrations_make(postgres: PostgresServer) -> None:
    database = open_database(postgres.url())
    try:
        with database.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    finally:
        database.close()


def test_a_newer_catalogue_is_refused_by_name(postgres: PostgresServer, store: ObjectStore) -> None:
    place, url = store.url(), postgres.url()
    Registry.open(place, catalogue=url).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(StorageError, match=r"newer Steer \(schema 9999") as raised:
        Registry.open(place, catalogue=url)
    assert postgres.password not in raised.value.message


def test_a_database_of_something_else_is_left_alone(
    postgres: PostgresServer, store: ObjectStore
) -> None:
    url = postgres.url()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE artefacts (id int)")
    engine.dispose()
    with pytest.raises(StorageError, match="something else"):
        Registry.open(store.url(), catalogue=url)


def test_a_lookup_is_one_indexed_query(postgres: PostgresServer, store: ObjectStore) -> None:
    """Among 5000 names, and without a sort."""
    from torch import ones

    from steer.artefacts.control_vector import ControlVector
    from steer.registry.catalogue.catalogue import Draft

    with Registry.open(store.url(), catalogue=postgres.url()) as registry:
        card = ControlVector.of({0: ones(4)}).card
        with registry._catalogue.writing() as connection:
            for number in range(5000):
                draft = Draft("vector", f"v-{number:05d}", f"{number:064x}", 1, card)
                registry._catalogue.insert(connection, draft)
            connection.exec_driver_sql("ANALYZE artefacts")
        with registry._catalogue.reading() as connection:
            plan = connection.exec_driver_sql(
                "EXPLAIN SELECT * FROM artefacts WHERE removed_at IS NULL AND kind = 'vector' "
                "AND name = 'v-02500' ORDER BY version DESC LIMIT 1"
            ).scalars()
            text = "\n".join(plan)
        assert "live_artefacts" in text
        assert "Seq Scan" not in text
        assert "Sort" not in text
