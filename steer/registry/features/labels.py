"""Labels that lie beside an SAE: brought along, or made here; one file for each source.

An SAE's own labels are part of its content and its hash. These are not: labels come and go, and a
pinned spec, a survey and a calibration stay with the SAE they name (ADR 20). Of a feature with
labels from several sources the one is shown that stands first in this order: what was imported,
the SAE's own, what a labeller wrote, what was made of exemplars.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import SteerError, StorageError, UnknownArtefact
from steer.registry.features.findings import BesideFiles
from steer.spec import check_name

LabelKind: TypeAlias = Literal["imported", "labeller", "exemplars"]

_FOLDER, _SUFFIX = "labels", ".jsonl"
_HELD = 8
"""Sources whose labels are kept in memory: an SAE of 262k features has some 40 MB of them."""


class LabelSource(BaseModel):
    """One source of labels of an SAE: how they were made, and how many there are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    kind: LabelKind
    labels: int


@dataclass(frozen=True)
class SourceLabels(Mapping[int, FeatureLabel]):
    """The labels of one source, each parsed when it is looked at."""

    source: LabelSource
    lines: Mapping[int, bytes]

    def __getitem__(self, feature: int) -> FeatureLabel:
        try:
            label = FeatureLabel.model_validate_json(self.lines[feature])
        except ValidationError as error:
            raise _damaged(self.source.source) from error
        return label.model_copy(update={"source": self.source.source})

    def __iter__(self) -> Iterator[int]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)


@dataclass(frozen=True)
class KnownLabels(Mapping[int, FeatureLabel]):
    """The labels of an SAE and those beside it: of each feature the one that is shown."""

    own: Mapping[int, FeatureLabel]
    beside: tuple[SourceLabels, ...] = ()

    def every(self, feature: int) -> tuple[FeatureLabel, ...]:
        """All labels of a feature, the one that is shown first."""
        before = [one[feature] for one in self._imported if feature in one]
        own = [self.own[feature]] if feature in self.own else []
        after = [one[feature] for one in self._made if feature in one]
        return (*before, *own, *after)

    def __getitem__(self, feature: int) -> FeatureLabel:
        first, *others = self.every(feature) or (None,)
        if first is None:
            raise KeyError(feature)
        # What was measured of the feature is true whatever it is called.
        figures = {
            name: value
            for name in ("attribute", "direction", "auroc", "effect", "density", "largest")
            if getattr(first, name) is None
            and (value := next(filter(None, (getattr(x, name) for x in others)), None)) is not None
        }
        return first.model_copy(update=figures) if figures else first

    def __iter__(self) -> Iterator[int]:
        return iter(sorted({*self.own, *(n for one in self.beside for n in one)}))

    def __len__(self) -> int:
        return len({*self.own, *(n for one in self.beside for n in one)})

    @property
    def _imported(self) -> list[SourceLabels]:
        return [one for one in self.beside if one.source.kind == "imported"]

    @property
    def _made(self) -> list[SourceLabels]:
        return [one for one in self.beside if one.source.kind != "imported"]


class LabelStore:
    """The labels beside SAEs, in a registry's files."""

    def __init__(self, files: BesideFiles) -> None:
        self.files = files
        self._held: OrderedDict[tuple[str, str], tuple[str, SourceLabels]] = OrderedDict()

    def keep(
        self, sae: str, source: str, kind: LabelKind, labels: Mapping[int, FeatureLabel]
    ) -> LabelSource:
        """Adds labels to those of a source, in the place of older ones of the same features.

        Raises `SteerError` (`invalid_name`, `invalid_labels` where the source has labels of another
        kind).
        """
        self.check_kind(sae, source, kind)
        name = checked_source(source)
        old = self._read(sae, name)
        lines = {**(old.lines if old is not None else {}), **_lines(labels)}
        made = LabelSource(source=name, kind=kind, labels=len(lines))
        data = [made.model_dump_json().encode()]
        data += [b"%d %s" % (feature, lines[feature]) for feature in sorted(lines)]
        self.files.write(b"\n".join(data), sae, _FOLDER, name + _SUFFIX)
        return made

    def check_kind(self, sae: str, source: str, kind: LabelKind) -> None:
        """Raises `SteerError` as `keep`, before there is anything to keep."""
        name = checked_source(source)
        old = self._read(sae, name)
        if old is not None and old.source.kind != kind:
            raise SteerError(
                f"{name!r} has labels of the kind {old.source.kind!r}, and these are {kind!r}: "
                "give them another source, or remove the old ones",
                code="invalid_labels",
                param="/source",
            )

    def sources(self, sae: str) -> list[LabelSource]:
        """The sources of labels beside an SAE, by name."""
        return [one.source for one in self._all(sae)]

    def known(self, sae: str, own: Mapping[int, FeatureLabel]) -> KnownLabels:
        """The labels of the SAE with this hash, `own` being its own."""
        order: list[LabelKind] = ["imported", "labeller", "exemplars"]
        found = sorted(self._all(sae), key=lambda one: order.index(one.source.kind))
        return KnownLabels(own, tuple(found))

    def remove(self, sae: str, source: str) -> None:
        """Removes the labels of a source; raises `UnknownArtefact` (`unknown_labels`)."""
        if not self.files.remove(sae, _FOLDER, checked_source(source) + _SUFFIX):
            known = ", ".join(repr(one.source) for one in self.sources(sae)) or "none"
            raise UnknownArtefact(
                f"there are no labels of the source {source!r}; sources: {known}",
                code="unknown_labels",
            )

    def _all(self, sae: str) -> list[SourceLabels]:
        names = self.files.names(sae, _FOLDER)
        found = (self._read(sae, name.removesuffix(_SUFFIX)) for name in names)
        return [one for one in found if one is not None]

    def _read(self, sae: str, name: str) -> SourceLabels | None:
        version = self.files.version(sae, _FOLDER, name + _SUFFIX)
        if version is None:
            return None
        held = self._held.get((sae, name))
        if held is not None and held[0] == version:
            return held[1]
        data = self.files.read(sae, _FOLDER, name + _SUFFIX)
        if data is None:
            return None
        found = _parsed(data, name)
        self._held[sae, name] = (version, found)
        while len(self._held) > _HELD:
            self._held.popitem(last=False)
        return found


def checked_source(source: str) -> str:
    """A source's name as it can be a file's; raises `SteerError`."""
    try:
        return check_name(source)
    except ValueError as error:
        raise SteerError(str(error), code="invalid_name", param="/source") from None


def _lines(labels: Mapping[int, FeatureLabel]) -> dict[int, bytes]:
    return {
        feature: label.model_dump_json(exclude_defaults=True, exclude={"source"}).encode()
        for feature, label in labels.items()
    }


def _parsed(data: bytes, name: str) -> SourceLabels:
    head, *rows = data.split(b"\n")
    try:
        source = LabelSource.model_validate_json(head)
        parts = (row.split(b" ", 1) for row in rows)
        lines = {int(feature): line for feature, line in parts}
    except (ValidationError, ValueError) as error:
        raise _damaged(name) from error
    if len(lines) != source.labels or (rows and not _whole(rows[-1])):
        raise _damaged(name)
    return SourceLabels(source, lines)


def _whole(row: bytes) -> bool:
    """Whether the last row is not cut off."""
    try:
        json.loads(row.split(b" ", 1)[1])
    except (ValueError, IndexError):
        return False
    return True


def _damaged(name: str) -> StorageError:
    return StorageError(
        f"the labels of the source {name!r} are damaged: remove them with `steer sae labels "
        "remove`, and import or make them again",
        code="damaged_labels",
    )
