"""One process and two of the same recipe: they share each batch, so both should end with the same score.

The recipe is fashion_all80 (80 % zeros, 16 values, int8 at once), with as many channels as MLPerf Tiny's ResNet-8 and fewer epochs.
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
RECIPE = "recipes/fashion_all80.yaml"
BATCHES = 60_000 // 128  # optimizer steps an epoch
GOAL = 0.3  # points


def settings(float_epochs: int, epochs: int) -> list[str]:
    """The recipe's values that are changed, as `--set` takes them; pruning ends where 40 % of the steps are done."""
    return [
        "model.width=1.0",
        f"stages.0.train.epochs={float_epochs}",
        f"stages.1.train.epochs={epochs}",
        f"stages.1.compress.0.prune.schedule.end_step={int(0.4 * epochs * BATCHES)}",
    ]


def score(ranks: int, changed: list[str], folder: str) -> dict[str, float]:
    """Run the recipe over `ranks` processes; return the accuracies of its two files and the seconds that it took."""
    note(f"ranks: {ranks}")
    start = [sys.executable, "-m"] + (
        ["torchopt.cli"] if ranks == 1 else ["torch.distributed.run", "--nproc-per-node", str(ranks)]
    )
    start += [] if ranks == 1 else ["-m", "torchopt.cli"]
    options = [part for setting in changed for part in ("--set", setting)]
    out = f"{folder}/{ranks}"
    command = [*start, "run", RECIPE, "--out", out, *options]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    report = json.loads(Path(out, "report.json").read_text(encoding="utf-8"))
    return {"float": report["score"]["baseline"], "compressed": report["score"]["final"], "seconds": report["seconds"]}


def main() -> None:
    """Measure, print, write docs/bench/ranks.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch each")
    parser.add_argument("--epochs", type=int, nargs=2, default=(2, 4), metavar=("FLOAT", "COMPRESSED"))
    options = parser.parse_args()
    float_epochs, epochs = (1, 1) if options.quick else options.epochs
    with tempfile.TemporaryDirectory() as folder:
        found = {ranks: score(ranks, settings(float_epochs, epochs), folder) for ranks in (1, 2)}
    rows = []
    for which in ("float", "compressed"):
        one, two = (100 * found[ranks][which] for ranks in (1, 2))
        rows.append(
            Row(
                what=f"fashion_all80, ResNet-8 of 78 k weights, {float_epochs} + {epochs} epochs, {which}: two processes against one",
                asked=f"within {GOAL} points",
                reached=f"{two - one:+.2f} points",
                holds=abs(two - one) <= GOAL,
                note=f"{one:.2f}% and {two:.2f}%",
            )
        )
    write("ranks", rows, details=found)


if __name__ == "__main__":
    main()
