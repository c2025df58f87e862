"""Hub references: how they are read, and what is found in a local cache without a network."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from steer.errors import SteerError
from steer.formats.hub import HubRef, fetch, parse_hub_ref
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.jobs import hub as hub_imports

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("hf://org/repo", HubRef("org/repo")),
        ("hf://org/repo/v.gguf", HubRef("org/repo", "v.gguf")),
        ("hf://org/repo.x/a/b c/v.pt@main", HubRef("org/repo.x", "a/b c/v.pt", "main")),
        ("hf://org/repo/saes/l4@refs/pr/1", HubRef("org/repo", "saes/l4", "refs/pr/1")),
        ("hf://datasets/org/repo/v.npz", HubRef("org/repo", "v.npz", is_dataset=True)),
    ],
)
def test_references(text: str, ref: HubRef) -> None:
    assert parse_hub_ref(text) == ref
    assert str(ref) == text


@pytest.mark.parametrize(
    "text",
    [
        "hf://org",
        "hf://",
        "hf://org/repo/../x",
        "hf://org/repo//x",
        "hf://org/repo/x@",
        "hf:///org/repo",
        "https://org/repo",
        "hf://-org/repo",
        "hf://org/repo/x@a@b",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(SteerError) as raised:
        parse_hub_ref(text)
    assert raised.value.code == "invalid_reference"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache with one repository, laid out as huggingface_hub does."""
    root = tmp_path / "hub" / "models--org--repo"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    (snapshot / "vectors").mkdir(parents=True)
    save_file({"layers.2": torch.ones(4)}, snapshot / "vectors" / "joy.safetensors")
    return tmp_path / "hub"


def test_a_file_in_the_local_cache(cache: Path) -> None:
    for text in ("", "@main", f"@{COMMIT}"):
        ref = parse_hub_ref("hf://org/repo/vectors/joy.safetensors" + text)
        fetched = fetch(ref, cache=cache, offline=True)
        assert fetched.commit == COMMIT
        options = ImportOptions(origin=fetched.origin)
        vector = read_artefact(fetched.path, options, scratch=None, unpacked_limit=0)
        assert vector.card.layers == (2,)
        assert vector.card.provenance["origin"] == (
            f"hf://org/repo/vectors/joy.safetensors@{COMMIT}"
        )


@pytest.mark.parametrize("path", ["/vectors/sad.safetensors", "@v2", ""])
def test_what_is_not_in_the_cache(cache: Path, path: str) -> None:
    repo = "repo" if path else "other"
    with pytest.raises(SteerError) as raised:
        fetch(parse_hub_ref(f"hf://org/{repo}{path}"), cache=cache, offline=True)
    assert raised.value.code == "hub_unreachable"
    assert "HF_HUB_CACHE" in raised.value.message


class Hub:
    """Stands for the hub: a listing with sizes, then a download into a folder."""

    def __init__(self, root: Path, size: int, error: Exception | None = None) -> None:
        self.root, self.size, self.error = root, size, error
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, **where: Any) -> Any:
        self.calls.append(where)
        if where.get("dry_run"):
            if self.error is not None:
                raise errors.DryRunError("no") from self.error
            return [type("File", (), {"file_size": self.size})()]
        if where["local_files_only"]:
            raise errors.LocalEntryNotFoundError("not here")
        (self.root / "v.safetensors").write_bytes(b"x" * self.size)
        return str(self.root)


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("the hub says no",)
    return error


def test_a_download_is_limited_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, size=1000)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    ref = parse_hub_ref("hf://org/repo/v.safetensors@main")
    with pytest.raises(SteerError) as raised:
        fetch(ref, max_bytes=999)
    assert raised.value.code == "download_too_large"
    assert "STEER_MAX_HUB_BYTES" in raised.value.message
    assert [call.get("dry_run") for call in hub.calls] == [True]
    assert fetch(ref, max_bytes=1000).path == tmp_path / "v.safetensors"
    assert hub.calls[-1]["revision"] == "main"
    assert hub.calls[-1]["allow_patterns"] == ["v.safetensors", "v.safetensors/*"]
    with pytest.raises(SteerError, match="999"):
        hub_imports(999)["hf"](str(ref), tmp_path, lambda *_: None)
    with pytest.raises(SteerError, match="it has no 'w'"):
        fetch(parse_hub_ref("hf://org/repo/w"))


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        (errors.GatedRepoError, "no_such_file", "gated"),
        (errors.RepositoryNotFoundError, "no_such_file", "private"),
        (errors.RevisionNotFoundError, "no_such_file", "revision"),
        (errors.HfHubHTTPError, "hub_unreachable", "HfHubHTTPError"),
        (errors.OfflineModeIsEnabled, "hub_unreachable", "cannot be reached"),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], code: str, said: str
) -> None:
    hub = Hub(tmp_path, 1, http_error(kind))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    with pytest.raises(SteerError, match=said) as raised:
        fetch(parse_hub_ref("hf://org/repo/v@r"))
    assert raised.value.code == code


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SteerError) as raised:
        fetch(parse_hub_ref("hf://org/repo/v.gguf"), cache=tmp_path)
    assert raised.value.code == "hub_unreachable"
