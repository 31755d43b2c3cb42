"""What `prepare`, `calibrate`, `finalize` and `export` cost, proofs and all, beside an older checkout of this repository.

MobileNetV2 with random weights, 32 pictures of 224 × 224, observer="minmax". Both checkouts run in turn, each in a process of its own on
one thread, and processor time is counted: other programs on the machine change it least. Make the older checkout with

    git worktree add ../before 78729a6

which is the last one before rewritings were proved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from harness import Row, note, write

STEPS = ("prepare", "calibrate", "finalize", "export")
ALLOWED = 1.15
REPEATS = 2  # in a process, the first of which loads what is loaded once


def steps() -> dict[str, float]:
    """Processor seconds of each step, of the last repetition."""
    import torch
    from torchvision.models import mobilenet_v2

    import torchopt

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batches = mobilenet_v2().eval(), [torch.randn(8, 3, 224, 224) for _ in range(4)]
    example = (batches[0][:1],)
    rule = torchopt.Rule("*", quantize=torchopt.Quantize(observer="minmax"))
    times = []
    for _ in range(REPEATS):
        times = [time.process_time()]
        ready = torchopt.prepare(model, [rule], example)
        times.append(time.process_time())
        torchopt.calibrate(ready, batches, progress=False)
        times.append(time.process_time())
        final = torchopt.finalize(ready)
        times.append(time.process_time())
        with tempfile.TemporaryDirectory() as folder:
            torchopt.export(final, example, Path(folder) / "model.onnx")
        times.append(time.process_time())
    return {step: after - before for step, before, after in zip(STEPS, times[:-1], times[1:], strict=True)}


def in_checkout(path: Path) -> dict[str, float]:
    """The same by the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--steps"], capture_output=True, text=True, check=True, env=environment, cwd=path
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> int:
    """Measure in turn, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="the older checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", action="store_true", help="only this checkout's seconds, as JSON on stdout")
    arguments = parser.parse_args()
    if arguments.steps:
        print(json.dumps(steps()))
        return 0
    if arguments.before is None or not (arguments.before / "torchopt").is_dir():
        sys.exit(
            f"--before: {arguments.before} is no checkout of this repository; `git worktree add ../before 78729a6` makes one"
        )
    here, rounds = Path(__file__).resolve().parents[2], []
    for number in range(arguments.rounds):
        rounds.append((in_checkout(arguments.before.resolve()), in_checkout(here)))
        note(f"proofs: round {number + 1}: {sum(rounds[-1][0].values()):.1f} s before, {sum(rounds[-1][1].values()):.1f} s now")
    rows = []
    for step in (*STEPS, "all four"):
        pairs = [[sum(r.values()) if step == "all four" else r[step] for r in pair] for pair in rounds]
        ratio = statistics.median(now / before for before, now in pairs)
        seconds = " → ".join(f"{statistics.median(column):.2f}" for column in zip(*pairs, strict=True))
        whole = step == "all four"
        rows.append(
            Row(
                what=f"{step}: MobileNetV2, minmax",
                asked=f"≤ {ALLOWED} × before" if whole else "",
                reached=f"{ratio:.2f} ×",
                holds=ratio <= ALLOWED if whole else None,
                note=f"{seconds} s of one thread",
            )
        )
    write("proofs", rows, details={"rounds": rounds})
    return 0 if rows[-1].holds else 1


if __name__ == "__main__":
    sys.exit(main())
