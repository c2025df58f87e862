"""Profiles belong to models, and the models of artefacts are compared by their bare names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_NAME = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    _shorten_models()
    _give_profiles_models()


def _shorten_models() -> None:
    """Without folder or organisation, as they are compared; cards keep what they say."""
    artefacts = sa.table("artefacts", sa.column("model"))
    connection = op.get_bind()
    stated = sa.select(artefacts.c.model).where(artefacts.c.model.is_not(None)).distinct()
    for model in connection.execute(stated).scalars().all():
        bare = model.rstrip("/").rpartition("/")[2]
        connection.execute(
            sa.update(artefacts).where(artefacts.c.model == model).values(model=bare)
        )


def _give_profiles_models() -> None:
    """Those that are there serve every model, as they did. SQLite cannot change a primary key."""
    connection = op.get_bind()
    old = sa.table("profiles", sa.column("name"), sa.column("profile"))
    rows = [row._asdict() for row in connection.execute(sa.select(old.c.name, old.c.profile))]
    op.drop_table("profiles")
    new = op.create_table(
        "profiles",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("profile", sa.Text, nullable=False),
    )
    if rows:
        op.bulk_insert(new, [{**row, "model": ""} for row in rows])
