"""What the three keep together, on every kind of layer, and what they cost: the training step over the float step, on two networks."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch
import torchvision
from harness import Row, interleave, note, ratio, write
from torch import nn

import torchopt

GOAL = 1.5


def small() -> nn.Module:
    """The convolutional network that TFMOT's own step times were measured on (34,826 parameters)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1600, 10),
    )


def resnet18() -> nn.Module:
    """ResNet-18 for ten classes."""
    return torchvision.models.resnet18(weights=None, num_classes=10)


NETWORKS = {"resnet18, batch 32, 64×64": (resnet18, (32, 3, 64, 64)), "TFMOT's small net, batch 128": (small, (128, 1, 28, 28))}
QAT = dict(zip(NETWORKS, (1.3, 1.25), strict=True))
PARTS = {
    "mask": {"prune": torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.8, frequency=100))},
    "table": {"cluster": torchopt.Cluster(n_clusters=16)},
    "scale": {"quantize": torchopt.Quantize()},
}
CASES = ("mask", "table", "scale", "mask + scale", "table + scale", "mask + table + scale")


def trainer(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, prepared: bool):
    """One training step as a function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()

    def once() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if prepared:
            torchopt.step(model)

    return once


def rows_of(name: str, rounds: int) -> list[Row]:
    """Time every case on one network against its float step, interleaved."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])
    steps = {"float": trainer(build(), x, y, prepared=False)}
    for case in CASES:
        fields = {k: v for part in case.split(" + ") for k, v in PARTS[part].items()}
        steps[case] = trainer(torchopt.prepare(build(), [torchopt.Rule("*", **fields)], (x[:2],)), x, y, prepared=True)
    note(f"combine: {name}")
    times = interleave(steps, repeats=rounds, warmup=3)
    base = statistics.median(times["float"]) * 1e3
    found = []
    for case in CASES:
        middle, low, high = ratio(times, case, "float")
        goal = GOAL if case == CASES[-1] else QAT[name] if case == "scale" else None
        found.append(
            Row(
                what=f"training step, {case}, {name}",
                asked=f"≤ {goal} × float" if goal else "",
                reached=f"{middle:.2f} [{low:.2f}–{high:.2f}]",
                holds=middle <= goal if goal else None,
                note=f"float {base:.0f} ms",
            )
        )
    return found


def laws_row(orders: str = "joint or successive") -> Row:
    """The laws of `tests/test_combine_laws.py`: zeros stay, at most K values, idempotent, final = last forward, the model untouched."""
    note("combine: laws")
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "laws.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_combine_laws.py", "-k", orders, f"--junit-xml={report}"]
        subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL, check=False)
        suite = next(ElementTree.parse(report).iter("testsuite"))
    count, failed = int(suite.get("tests", 0)), int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return Row(
        what="mask, table, scale and all together, on every kind of layer, jointly and in rounds: cases whose laws hold",
        asked="all",
        reached=f"{count - failed} of {count}",
        holds=count > 0 and not failed,
        note="tests/test_combine_laws.py",
    )


def main() -> None:
    """Measure, print, write docs/bench/combine.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows = [row for name in NETWORKS for row in rows_of(name, 3 if options.quick else options.rounds)]
    write("combine", [laws_row(), *rows])


if __name__ == "__main__":
    main()
