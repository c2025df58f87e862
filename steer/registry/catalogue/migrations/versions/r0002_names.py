"""Aliases, tags, soft removal, and what listings filter by."""

from __future__ import annotations

import json
import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_NAME = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("artefacts", sa.Column("purged_at", sa.DateTime))
    op.add_column("artefacts", sa.Column("model", sa.String))
    op.add_column("artefacts", sa.Column("width", sa.Integer))
    op.create_table(
        "aliases",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("target", _NAME, nullable=False),
        sa.Column("sha256", sa.String),
    )
    op.create_index("aliases_by_target", "aliases", ["kind", "target"])
    op.create_table(
        "tags",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("tag", _NAME, primary_key=True),
    )
    op.create_index("tags_by_tag", "tags", ["tag"])
    state = op.create_table(
        "registry_state",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("identity", sa.String, nullable=False),
    )
    op.bulk_insert(state, [{"id": 1, "number": 0, "identity": uuid.uuid4().hex}])
    _fill()


def _fill() -> None:
    """Cards become searchable. What was removed had lost its blob in the same call."""
    connection = op.get_bind()
    artefacts = sa.table(
        "artefacts",
        sa.column("id"),
        sa.column("card"),
        sa.column("model"),
        sa.column("width"),
        sa.column("removed_at"),
        sa.column("purged_at"),
    )
    connection.execute(sa.update(artefacts).values(purged_at=artefacts.c.removed_at))
    rows = connection.execute(sa.select(artefacts.c.id, artefacts.c.card)).all()
    for row in rows:
        card = json.loads(row.card)
        connection.execute(
            sa.update(artefacts)
            .where(artefacts.c.id == row.id)
            .values(model=card.get("model"), width=card.get("width"))
        )
