"""The built wheel, installed outside the checkout, serves the demo model by itself."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment that holds the wheel, and the dependencies of this one.

    The dependencies are borrowed through a path file, which does not bring the editable install of
    the checkout with it.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True, cwd=folder)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (wheel,) = folder.glob("steer_llm-*.whl")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "--quiet", "install", "--no-deps", wheel], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture
def server(installed: Path, tmp_path: Path) -> Iterator[str]:
    command = [installed / "steer", "serve", "--port", "0", "--registry", tmp_path / "registry"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            yield next(m[0] for m in (re.search(r"http://[\d.:]+/v1", s) for s in lines) if m)
        finally:
            process.terminate()


def test_the_wheel_is_used_and_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    script = (
        "import steer, steer_server, steer_vectors; print(steer.__file__, steer_vectors.LIBRARY)"
    )
    done = subprocess.run(
        [installed / "python", "-c", script],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert str(ROOT) not in done.stdout
    assert done.stdout.count(str(installed.parent)) == 2


def test_the_wheel_brings_its_migrations(installed: Path, tmp_path: Path) -> None:
    command = [installed / "steer", "registry", "migrate", "--registry", tmp_path / "registry"]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "schema 0004" in done.stdout
    assert (tmp_path / "registry" / "catalogue.sqlite").exists()


def test_steer_serve_answers_a_steered_chat(server: str) -> None:
    client = OpenAI(base_url=server, api_key="none")
    question = [{"role": "user", "content": "What is the capital of Italy?"}]
    plain = client.chat.completions.create(model="steer-demo", messages=question, temperature=0)
    steered = client.chat.completions.create(
        model="steer-demo",
        messages=question,
        temperature=0,
        extra_body={"steering": {"interventions": [{"kind": "add", "vector": "french"}]}},
    )
    assert plain.choices[0].message.content == "The capital of Italy is Rome."
    assert steered.choices[0].message.content == "La capitale de l'Italie est Rome."
    assert steered.model_extra is not None
    assert steered.model_extra["steering"]["tokens_steered"] >= 1
