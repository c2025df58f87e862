"""torchvision on the path of this process and of those that it starts: import before transformers.

Its Python alone, from the folder that `tests/vllm/torchvision.sh` makes, because the environment
has none: see there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_FOLDER = Path(__file__).parents[3] / ".venvs" / "torchvision"

if not (_FOLDER / ".ready").exists():
    raise FileNotFoundError(f"there is no {_FOLDER}: run tests/vllm/torchvision.sh")

sys.path.append(str(_FOLDER))
_others = os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join([*([_others] if _others else []), str(_FOLDER)])
