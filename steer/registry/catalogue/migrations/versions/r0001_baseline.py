"""Artefacts and profiles: the schema before there were migrations (SQLite's user_version 1)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NAME = sa.String().with_variant(sa.String(collation="C"), "postgresql")
_LIVE = sa.text("removed_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "artefacts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("size_bytes", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("card", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("removed_at", sa.DateTime),
        sa.UniqueConstraint("kind", "name", "version"),
    )
    op.create_index(
        "live_artefacts",
        "artefacts",
        ["kind", "name", "version"],
        sqlite_where=_LIVE,
        postgresql_where=_LIVE,
    )
    op.create_index("artefacts_by_content", "artefacts", ["sha256"])
    op.create_table(
        "profiles",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("profile", sa.Text, nullable=False),
    )
