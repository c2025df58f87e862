"""Results by name in a JSON file that is whole after each of them: a run that was cut off goes on
where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import same


class Kept:
    """What was measured so far. Results are JSON; their names are a benchmark's own.

    Guarantees: `keep` leaves either the file as it was or a whole new one.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        machine: dict[str, Any],
        results: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.settings, self.machine = path, settings, machine
        self.results: dict[str, Any] = results or {}

    @classmethod
    def at(
        cls, path: Path, settings: dict[str, Any], machine: dict[str, Any], *, fresh: bool = False
    ) -> Kept:
        """The results at `path`, to go on with; none where there is no file, or with `fresh`.

        Raises `ValueError` where they are of other settings, another machine or other sources:
        nothing is mixed, and nothing that took hours is thrown away unasked.
        """
        if fresh or not path.exists():
            return cls(path, settings, machine)
        content = json.loads(path.read_text())
        asked, known = (json.loads(json.dumps(one)) for one in (settings, content["settings"]))
        differs = [key for key in {**asked, **known} if asked.get(key) != known.get(key)]
        if not same(machine, content["machine"]):
            differs.append("machine")
        if differs:
            raise ValueError(
                f"{path} holds a run with other {', '.join(differs)}: name another file with "
                "--out, or begin anew with --fresh"
            )
        return cls(path, settings, content["machine"], content["results"])

    def __contains__(self, name: str) -> bool:
        return name in self.results

    def __getitem__(self, name: str) -> Any:
        return self.results[name]

    def get(self, name: str, default: Any) -> Any:
        return self.results.get(name, default)

    def below(self, folder: str) -> list[Any]:
        """The results whose names begin with `folder/`, in the order in which they were kept."""
        return [found for name, found in self.results.items() if name.startswith(f"{folder}/")]

    def keep(self, name: str, result: Any) -> None:
        self.results[name] = result
        content = {"machine": self.machine, "settings": self.settings, "results": self.results}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        beside.replace(self.path)
