"""One process and two of the same recipe: they share each batch, so both should end with the same score.

The recipe is the demo's: digits, 80 % zeros, 16 values and int8 at once, from the first float epoch to the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Row, note, write

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/digits.yaml"
GOAL = 0.3  # points


def score(ranks: int, options: list[str], folder: str) -> dict[str, float]:
    """Run the recipe over `ranks` processes; return the accuracies of its two files and the seconds that it took."""
    note(f"ranks: {ranks}")
    start = [sys.executable, "-m"] + (["torchopt"] if ranks == 1 else ["torch.distributed.run", "--nproc-per-node", str(ranks)])
    start += [] if ranks == 1 else ["-m", "torchopt"]
    out = f"{folder}/{ranks}"
    command = [*start, "run", RECIPE, "--out", out, *options]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    report = json.loads(Path(out, "report.json").read_text(encoding="utf-8"))
    return {"float": report["score"]["baseline"], "compressed": report["score"]["final"], "seconds": report["seconds"]}


def main() -> None:
    """Measure, print, write docs/bench/ranks.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch each: numbers not written")
    options = parser.parse_args()
    quick = ["--set", "train.epochs=1"] if options.quick else []
    with tempfile.TemporaryDirectory() as folder:
        found = {ranks: score(ranks, quick, folder) for ranks in (1, 2)}
    rows = []
    for which in ("float", "compressed"):
        one, two = (100 * found[ranks][which] for ranks in (1, 2))
        rows.append(
            Row(
                what=f"{RECIPE}, {which}: two processes against one",
                asked=f"within {GOAL} points",
                reached=f"{two - one:+.2f} points",
                holds=abs(two - one) <= GOAL,
                note=f"{one:.2f}% and {two:.2f}%",
            )
        )
    if options.quick:
        print(*rows, sep="\n")
    else:
        write("ranks", rows, details=found)


if __name__ == "__main__":
    main()
