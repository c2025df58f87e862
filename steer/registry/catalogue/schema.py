"""The catalogue's tables, as the newest migration leaves them.

A change here needs a migration beside it (`migrations/versions`); a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

HEAD = "0004"
"""The newest migration."""

# Names sort by code point everywhere; PostgreSQL would otherwise ask the machine's locale.
NAME = String().with_variant(String(collation="C"), "postgresql")

metadata = MetaData()

artefacts = Table(
    "artefacts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column("name", NAME, nullable=False),
    Column("version", Integer, nullable=False),
    Column("sha256", String, nullable=False),
    Column("size_bytes", BigInteger().with_variant(Integer, "sqlite"), nullable=False),
    Column("card", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("created_at", DateTime, nullable=False),  # UTC, without a zone
    # A removed row stays, so that it can be restored and its number is never given out twice.
    Column("removed_at", DateTime),
    # Set when garbage collection has given up the blob: the row is a number that was used.
    Column("purged_at", DateTime),
    # Of the card's model, its name without folder or organisation.
    Column("model", String),
    Column("width", Integer),
    UniqueConstraint("kind", "name", "version"),
)
_LIVE = artefacts.c.removed_at.is_(None)
Index(
    "live_artefacts",
    artefacts.c.kind,
    artefacts.c.name,
    artefacts.c.version,
    sqlite_where=_LIVE,
    postgresql_where=_LIVE,
)
Index("artefacts_by_content", artefacts.c.sha256)

profiles = Table(
    "profiles",
    metadata,
    Column("name", NAME, primary_key=True),
    # As for artefacts; empty for a profile that serves every model.
    Column("model", String, primary_key=True),
    Column("profile", Text, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("kind", String, primary_key=True),
    Column("name", NAME, primary_key=True),
    Column("target", NAME, nullable=False),
    # The whole hash, or nothing where the alias follows the newest version.
    Column("sha256", String),
)
Index("aliases_by_target", aliases.c.kind, aliases.c.target)

tags = Table(
    "tags",
    metadata,
    Column("kind", String, primary_key=True),
    Column("name", NAME, primary_key=True),
    Column("tag", NAME, primary_key=True),
)
Index("tags_by_tag", tags.c.tag)

state = Table(
    "registry_state",
    metadata,
    Column("id", Integer, primary_key=True),
    # PostgreSQL's writers lock this row and count up; SQLite counts by itself.
    Column("number", BigInteger().with_variant(Integer, "sqlite"), nullable=False),
    # Blobs carry the same identity, so that a catalogue never rules the blobs of another.
    Column("identity", String, nullable=False),
)
