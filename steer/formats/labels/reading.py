"""Labels from files or texts of any known layout, plain or gzipped, a line at a time."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import FileFormatError, IncompatibleArtefact
from steer.formats.labels.neuronpedia import NAME, NeuronpediaRows, is_row, source_layer
from steer.formats.labels.plain import plain_labels

LONGEST_LINE = 64 << 20
"""Bytes of one line; a file that is one object is one line."""

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class ReadLabels:
    """Labels by feature, and whose layout they came in: `neuronpedia` or `plain`. `sources` are
    the names of the SAEs that rows say they belong to."""

    labels: Mapping[int, FeatureLabel]
    layout: str
    sources: tuple[str, ...] = ()

    def check(self, d_sae: int, layer: int) -> None:
        """Raises `IncompatibleArtefact` (`wrong_labels`) where they belong to another SAE."""
        for source in self.sources:
            told = source_layer(source)
            if told is not None and told != layer:
                raise IncompatibleArtefact(
                    f"the labels are of the source {source!r}, of layer {told}; this SAE reads "
                    f"layer {layer}: import those of a source that begins with '{layer}-'",
                    code="wrong_labels",
                )
        if len(self.sources) > 1:
            raise IncompatibleArtefact(
                f"the labels are of several SAEs: {', '.join(map(repr, self.sources))}; import "
                "those of one",
                code="wrong_labels",
            )
        furthest = max(self.labels)
        if furthest >= d_sae:
            raise IncompatibleArtefact(
                f"the labels name feature {furthest}; this SAE has features 0 to {d_sae - 1}",
                code="wrong_labels",
            )


def read_label_files(paths: Sequence[Path]) -> ReadLabels:
    """The labels in all files together; raises `FileFormatError` naming file and line."""
    return _gathered(_values(paths), ", ".join(path.name for path in paths))


def read_label_text(text: str) -> ReadLabels:
    """The labels in a text that would be a file. Raises `FileFormatError`."""
    return _gathered(_lines(io.BytesIO(text.encode()), "data"), "data")


def _values(paths: Iterable[Path]) -> Iterator[tuple[Any, str]]:
    for path in paths:
        try:
            with path.open("rb") as raw:
                packed = raw.read(2) == _GZIP
                raw.seek(0)
                with gzip.open(raw) if packed else raw as file:
                    yield from _lines(file, path.name)  # type: ignore[arg-type]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileFormatError(
                f"{path.name} is a damaged gzip file: {error}", code="invalid_labels"
            ) from error
        except OSError as error:
            raise FileFormatError(
                f"{str(path)!r} cannot be read: {error.strerror or error}", code="no_such_file"
            ) from error


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[Any, str]]:
    """The JSON values of a file, each with its place: the lines', or the one of all of it."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        at = f"{name}, line {number}"
        if len(line) > LONGEST_LINE:
            raise FileFormatError(f"{at} has more than {LONGEST_LINE} bytes", code="invalid_labels")
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number > 1:
                raise FileFormatError(f"{at}: not JSON: {error}", code="invalid_labels") from None
            # An object that is spread over lines.
            whole = line + file.read(LONGEST_LINE)
            try:
                value = json.loads(whole)
            except (ValueError, RecursionError):
                raise FileFormatError(f"{at}: not JSON: {error}", code="invalid_labels") from None
        yield value, at


def _gathered(values: Iterable[tuple[Any, str]], name: str) -> ReadLabels:
    rows = NeuronpediaRows()
    plain: dict[int, FeatureLabel] = {}
    for value, at in values:
        items = value if isinstance(value, list) else [value]
        for item in items:
            if is_row(item):
                rows.add(item, at)
            else:
                plain.update(plain_labels(item, at))
    labels = {**rows.labels(), **plain}
    if not labels:
        raise FileFormatError(
            f"{name} holds no labels: give a Neuronpedia export (explanations, features or "
            'activations), or JSON such as {"5": "French words"}',
            code="no_labels",
        )
    return ReadLabels(
        dict(sorted(labels.items())), NAME if rows.sources else "plain", tuple(sorted(rows.sources))
    )
