"""``python -m steer_vectors.demo.recipe.evaluation``: see the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from steer_vectors import LIBRARY
from steer_vectors.demo.recipe.evaluation.checks import Check, table
from steer_vectors.demo.recipe.evaluation.groups import GROUPS, opened
from tqdm import tqdm


def main() -> None:
    """Entry point: exits with 1 where a threshold is not met."""
    parser = argparse.ArgumentParser(description="Check the demo model against its thresholds.")
    parser.add_argument("--demo", type=Path, default=LIBRARY / "demo", help="the model's folder")
    parser.add_argument("--only", choices=[*GROUPS], nargs="+", default=[*GROUPS])
    parser.add_argument("--prompts", type=int, default=240, help="drawn for each measure")
    parser.add_argument("--json", type=Path, help="write every row here")
    args = parser.parse_args()
    found: list[Check] = []
    with opened(args.demo, args.prompts) as demo:
        for name in (bar := tqdm(args.only, unit="group")):
            bar.set_description(name)
            for measure in GROUPS[name]:
                for check in measure(demo):
                    found.append(check)
                    bar.set_postfix_str(check.what, refresh=False)
    print(table(found))
    if args.json:
        rows = [check.as_json() for check in found]
        args.json.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "utf-8")
    failed = [check for check in found if check.fails]
    for check in failed:
        print(f"not met: {check.group}: {check.what}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
