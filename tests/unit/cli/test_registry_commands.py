"""`steer registry`, `steer aliases` and `steer tags`, through typer's runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from steer.artefacts.control_vector import ControlVector
from steer.cli import app
from steer.registry.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    place = tmp_path / "registry"
    with Registry.open(place) as opened:
        opened.add("french", ControlVector.of({0: torch.ones(4)}, model="demo"))
        opened.add("german", ControlVector.of({0: 2 * torch.ones(4)}))
    return place


def steer(place: Path, *arguments: object, code: int = 0, **options: object) -> Result:
    given = [*map(str, arguments), "--registry", str(place)]
    result = CliRunner().invoke(app, given, **options)
    assert result.exit_code == code, result.output
    return result


def figures(place: Path, *arguments: object) -> dict:
    return json.loads(steer(place, *arguments, "--json").stdout)


def test_names_and_tags(registry: Path) -> None:
    assert "prod -> french" in steer(registry, "aliases", "set", "prod", "french").output
    assert figures(registry, "aliases", "list") == [
        {"kind": "vector", "name": "prod", "target": "french"}
    ]
    assert "prod" in steer(registry, "aliases", "list").output
    assert "in_use" in steer(registry, "vectors", "remove", "french", code=2).output
    assert steer(registry, "tags", "set", "french", "b", "a").output == "a b\n"
    assert steer(registry, "tags", "unset", "prod", "b").output == "a\n"
    assert steer(registry, "tags", "show", "french").output == "a\n"
    assert [row["id"] for row in figures(registry, "registry", "search", "--tag", "a")] == [
        row["id"] for row in figures(registry, "vectors", "list", "--tag", "a")
    ]
    assert "french" in steer(registry, "registry", "search", "FREN", "-k", "vector").output
    steer(registry, "aliases", "remove", "prod")
    assert "unknown_alias" in steer(registry, "aliases", "remove", "prod", code=2).output


def test_removed_restored_and_collected(registry: Path) -> None:
    steer(registry, "vectors", "remove", "german")
    assert [row["name"] for row in figures(registry, "vectors", "list", "--deleted")] == ["german"]
    assert "restored german" in steer(registry, "vectors", "restore", "german").output
    steer(registry, "vectors", "remove", "german")
    assert figures(registry, "registry", "gc")["versions"] == 0
    planned = figures(registry, "registry", "gc", "--grace-days", 0, "--dry-run")
    assert (planned["versions"], planned["blobs"], planned["dry_run"]) == (1, 1, True)
    assert figures(registry, "registry", "stats")["removed_bytes"] == planned["bytes"] > 0
    assert figures(registry, "registry", "gc", "--grace-days", 0)["blobs"] == 1
    assert figures(registry, "registry", "stats")["removed_bytes"] == 0
    assert "collected" in steer(registry, "vectors", "restore", "german", code=2).output


def test_export_and_import(registry: Path, tmp_path: Path) -> None:
    archive = tmp_path / "all.tar"
    assert "2 versions" in steer(registry, "registry", "export", archive).stderr
    assert not archive.with_name("all.tar.partial").exists()
    copy = tmp_path / "copy"
    assert figures(copy, "registry", "import", archive)["versions"] == 2
    assert figures(copy, "registry", "import", archive)["versions"] == 0
    assert figures(copy, "registry", "stats") == figures(registry, "registry", "stats")
    piped = steer(registry, "registry", "export", "-").stdout_bytes
    assert piped == archive.read_bytes()
    third = tmp_path / "third"
    done = steer(third, "registry", "import", "-", "--json", input=piped)
    assert json.loads(done.stdout)["versions"] == 2
    archive.write_bytes(archive.read_bytes()[:3000])
    refused = steer(tmp_path / "fourth", "registry", "import", archive, code=2)
    assert "damaged_archive" in refused.output
    assert "no_such_file" in steer(copy, "registry", "import", tmp_path / "no", code=2).output
    assert "not_written" in steer(copy, "registry", "export", tmp_path / "n/o", code=2).output
    assert "schema 0004" in steer(copy, "registry", "migrate").output


def test_the_place_may_come_from_the_environment(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_REGISTRY", str(registry))
    shown = CliRunner().invoke(app, ["registry", "stats", "--json"])
    assert json.loads(shown.stdout)["vectors"] == 2
    other = tmp_path / "other.sqlite"
    monkeypatch.setenv("STEER_CATALOGUE", f"sqlite:///{other}")
    refused = CliRunner().invoke(app, ["registry", "stats"])
    assert (refused.exit_code, "wrong_catalogue" in refused.output) == (2, True)
    monkeypatch.setenv("STEER_REGISTRY", "memory://a-registry-for-commands")
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    assert (
        json.loads(CliRunner().invoke(app, ["registry", "stats", "--json"]).stdout)["vectors"] == 0
    )
    assert other.exists()


def test_names_of_one_model_beside_another(tmp_path: Path) -> None:
    """Without `--model` a name means the newest of all; with it, what it means for that model."""
    place = tmp_path / "registry"
    with Registry.open(place) as opened:
        for width, model in ((4, "org/A"), (6, "B")):
            opened.add("formal", ControlVector.of({0: torch.ones(width)}, model=model))
    spec = tmp_path / "polite.json"
    spec.write_text(json.dumps({"interventions": [{"kind": "add", "vector": "formal"}]}))

    assert figures(place, "vectors", "list")[0]["card"]["model"] == "B"
    assert figures(place, "vectors", "list", "--model", "A")[0]["card"]["model"] == "org/A"
    shown = json.loads(steer(place, "vectors", "show", "formal", "--model", "A").stdout)
    assert (shown["version"], len(shown["versions"])) == (1, 2)
    for model in ("A", "B"):
        steer(place, "profiles", "add", spec, "--model", model, "--description", f"of {model}")
    kept = tmp_path / "kept.json"
    kept.write_text(steer(place, "profiles", "show", "polite", "--model", "A").stdout)
    assert json.loads(kept.read_text())["description"] == "of A"
    assert [row["model"] for row in figures(place, "profiles", "list")] == ["A", "B"]
    assert [row["model"] for row in figures(place, "profiles", "list", "--model", "B")] == ["B"]

    steer(place, "profiles", "remove", "polite", "--model", "A")
    steer(place, "vectors", "remove", "formal", "--model", "A")
    assert [row["card"]["model"] for row in figures(place, "vectors", "list")] == ["B"]
    assert "in_use" in steer(place, "vectors", "remove", "formal", "--model", "B", code=2).output
    steer(place, "vectors", "restore", "formal", "--model", "A")
    steer(place, "profiles", "add", kept)  # which says itself whose it is
    assert [row["model"] for row in figures(place, "profiles", "list")] == ["A", "B"]
