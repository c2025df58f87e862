"""A probe that is fitted: the one an inspection teaches, kept, and gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_concepts import PlantedEngine, planted_example

from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Captured, CaptureRequest
from steer.engines.journal import JournaledEngine, forget
from steer.errors import FileFormatError, SteerError
from steer.fit import SaidText, fit_concepts, read_said, said_texts
from steer.fit.methods import bookmark
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.inspection import ConceptsRequest, concepts
from steer.registry.registry import Registry


def fitted(count: int = 40, engine: Any = None, **fields: Any) -> ConceptProbe:
    said = said_texts([SaidText.model_validate(planted_example(n)) for n in range(count)])
    how: dict[str, Any] = {"name": "planted", "dimensions": 256, **fields}
    return fit_concepts(engine or PlantedEngine(), said, **how)


def test_it_is_the_probe_that_an_inspection_teaches() -> None:
    probe, prompts = fitted(), [{"tokens": [200, 41]}, {"tokens": [201, 2]}]
    examples = [planted_example(n) for n in range(40)]
    taught = ConceptsRequest.model_validate(
        {"examples": examples, "prompts": prompts, "dimensions": 256}
    )
    wanted = concepts(PlantedEngine(), taught)
    named = ConceptsRequest.model_validate({"probe": "p", "prompts": prompts})
    found = concepts(PlantedEngine(), named, library=MemoryLibrary(probes={"p": probe}))
    assert found.probe == f"planted@{probe.sha256[:12]}"
    assert found.model_copy(update={"probe": None}) == wanted
    assert (probe.card.layers, probe.card.width) == ((3, 4, 5), 16)
    assert probe.form.measures is not None
    assert (probe.form.measures.trained, probe.form.measures.held_out) == (32, 8)


def test_it_is_kept_as_others_are(tmp_path: Path) -> None:
    probe = fitted(layers=[2, 4], position=1, held_out=0.5)
    (tmp_path / "file").write_bytes(probe.to_bytes())
    read = read_artefact(tmp_path / "file", ImportOptions(), scratch=None, unpacked_limit=0)
    assert read.sha256 == probe.sha256
    assert isinstance(read, ConceptProbe)
    assert read.form == probe.form
    with Registry.open(tmp_path / "registry") as registry:
        entry, _ = registry.import_file(tmp_path / "file", name="planted")
        assert (entry.kind, entry.sha256) == ("probe", probe.sha256)
        assert registry.probe("planted").form.position == 1


@pytest.mark.parametrize("at", [1, 3, 300, 500])
def test_it_goes_on_where_it_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(bookmark, "_SHARE", 0)
    monkeypatch.setattr("steer.artefacts.concepts.network._HIDDEN", 8)
    told: list[int] = []
    wanted = fitted(20, batch=2, progress=told.append)
    assert sum(told) == 20 + 600

    class Ended(Exception):
        pass

    def ending(before: int) -> Callable[[int], None]:
        done = 0

        def progress(units: int) -> None:
            nonlocal done
            done += units
            if done > before:
                raise Ended

        return progress

    class Counted(PlantedEngine):
        texts = 0

        def capture(self, request: CaptureRequest) -> list[Captured]:
            self.texts += len(request.prompts)
            return super().capture(request)

    path = tmp_path / "journal"
    with pytest.raises(Ended):
        fitted(20, JournaledEngine(Counted(), path), batch=2, progress=ending(at))
    told.clear()
    counted = Counted()
    found = fitted(20, JournaledEngine(counted, path), batch=2, progress=told.append)
    assert found.sha256 == wanted.sha256
    assert sum(told) == 20 + 600
    assert counted.texts == {1: 18, 3: 16}.get(at, 0)
    forget(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"count": 9}, "/examples", "no_examples"),
        ({"layers": [3, 9]}, "/layers/1", "layer_out_of_range"),
        ({"position": 7}, "/position", "position_out_of_range"),
    ],
)
def test_what_teaches_nothing_is_refused(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(SteerError) as caught:
        fitted(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"}', "/pairs"),
        ('{"pairs": {"a": "b"}}', "text"),
        ('{"text": "a", "pairs": {}}', "/pairs"),
        ('{"text": "a", "pairs": {"a": 1}}', "/pairs/a"),
        ('{"text": "a", "pairs": {"a": "b"}, "more": 1}', "/more"),
        ("[]", "an example is"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    good = '{"text": "a", "pairs": {"a": "b"}}'
    (tmp_path / "said.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(FileFormatError, match="line 2") as caught:
        read_said(tmp_path / "said.jsonl")
    assert says in str(caught.value)
    assert caught.value.code == "invalid_examples"
