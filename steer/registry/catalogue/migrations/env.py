"""Run by Alembic: the steps go through the connection, and the transaction, of the caller."""

from __future__ import annotations

from alembic import context

from steer.registry.catalogue.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
