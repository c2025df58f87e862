"""Files on the Hugging Face hub: `hf://org/repo/path@revision`.

`path` is a file, or a folder of one artefact; without it, the repository itself is that folder.
Nothing is loaded here: what comes back is a path for `read_artefact`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from steer.errors import FileFormatError, SteerError, TooLarge

SCHEME = "hf://"
MAX_BYTES = 512 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REF = re.compile(
    rf"hf://(?:(?P<kind>datasets)/)?(?P<repo>{_PART}/{_PART})"
    r"(?:/(?P<path>[^@]{1,500}))?(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,127}))?"
)


@dataclass(frozen=True)
class HubRef:
    """A file or folder in a repository; `revision` is a branch, a tag or a commit."""

    repo: str
    path: str = ""
    revision: str | None = None
    is_dataset: bool = False

    @property
    def stem(self) -> str:
        """A name for what is imported from here."""
        return PurePosixPath(self.path or self.repo).stem

    def __str__(self) -> str:
        kind = "datasets/" if self.is_dataset else ""
        path = f"/{self.path}" if self.path else ""
        return f"{SCHEME}{kind}{self.repo}{path}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Fetched:
    """What a reference led to: `path` in the hub's local cache, and the commit it is of."""

    path: Path
    commit: str | None
    ref: HubRef

    @property
    def origin(self) -> str:
        """The reference with the commit that was fetched, for the card."""
        return str(replace(self.ref, revision=self.commit or self.ref.revision))


def parse_hub_ref(text: str) -> HubRef:
    """The parts of `hf://org/repo/path@revision`; raises `SteerError` (`invalid_reference`)."""
    match = _REF.fullmatch(text)
    path = (match["path"] or "") if match else ""
    if match is None or any(part in ("", ".", "..") for part in path.split("/") if path):
        raise SteerError(
            f"{text[:200]!r} is no reference to the hub: write hf://organisation/repository/path, "
            "with @revision behind it for a branch, tag or commit",
            code="invalid_reference",
        )
    return HubRef(match["repo"], path, match["revision"], match["kind"] is not None)


def fetch(
    ref: HubRef, *, cache: Path | None = None, max_bytes: int = MAX_BYTES, offline: bool = False
) -> Fetched:
    """Downloads what `ref` names, or finds it in the hub's local cache; `offline` only looks there.

    Takes the token and the address that huggingface_hub takes from the environment. Raises
    `FileFormatError` (`no_such_file`, `hub_unreachable`) or `TooLarge` before anything is
    downloaded that is larger than `max_bytes`.
    """
    from huggingface_hub import errors  # noqa: PLC0415 - takes a moment, and few need it

    try:
        return _fetched(ref, cache, max_bytes, offline)
    except errors.GatedRepoError as error:
        raise _missing(ref, "its repository is gated: accept its terms and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise _missing(
            ref, "there is no such repository, or it is private and HF_TOKEN is not set"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise _missing(ref, f"it has no revision {ref.revision!r}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise _missing(ref, f"it has no {ref.path!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(ref) from error
    except (errors.HfHubHTTPError, OSError) as error:
        # An error of this machine's disk names its files: only what it says of them is told.
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreachable(ref, f"{type(error).__name__}: {reason[:200]}") from error


def _fetched(ref: HubRef, cache: Path | None, max_bytes: int, offline: bool) -> Fetched:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    where: dict[str, Any] = {
        "repo_id": ref.repo,
        "repo_type": "dataset" if ref.is_dataset else "model",
        "revision": ref.revision,
        "cache_dir": cache,
        "allow_patterns": [ref.path, f"{ref.path}/*"] if ref.path else None,
    }
    reachable = not offline and _check_size(ref, where, max_bytes)
    root = Path(snapshot_download(**where, local_files_only=not reachable))
    path = root / ref.path
    if not path.exists():
        raise _missing(ref, f"it has no {ref.path!r}") if reachable else _unreachable(ref)
    return Fetched(path, root.name if _COMMIT.fullmatch(root.name) else None, ref)


def _check_size(ref: HubRef, where: Mapping[str, Any], max_bytes: int) -> bool:
    """Whether the hub can be reached; raises `TooLarge` for what it lists with `max_bytes`."""
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415

    try:
        listed = snapshot_download(**where, dry_run=True)
    except errors.DryRunError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise error.__cause__ from None
        return False
    total = sum(file.file_size or 0 for file in listed)
    if total > max_bytes:
        raise TooLarge(
            f"{ref} has {total} bytes; at most {max_bytes} are downloaded: name one file, or raise "
            "the limit (--max-hub-mib of `steer vectors import` and `steer serve`, "
            "STEER_MAX_HUB_BYTES with vLLM)",
            code="download_too_large",
        )
    return True


def _missing(ref: HubRef, why: str) -> FileFormatError:
    return FileFormatError(f"{str(ref)!r} cannot be had: {why}", code="no_such_file")


def _unreachable(ref: HubRef, why: str = "") -> FileFormatError:
    return FileFormatError(
        f"{str(ref)!r} is not in the local cache, and the hub cannot be reached"
        + (f" ({why})" if why else "")
        + ": download the file on a machine with a connection and add it from there, or set "
        "HF_HUB_CACHE to a cache that has it",
        code="hub_unreachable",
    )
