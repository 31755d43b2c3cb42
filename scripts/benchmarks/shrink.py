"""Channels really removed: thirteen families in ONNX Runtime against torch, and half the latency measured on this machine.

`scripts/bench prune` adds these rows to its own; alone: `scripts/bench shrink [--quick] [--networks a,b]`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from harness import Row, note, write
from torch import nn

import torchopt
from torchopt.channels import count_macs
from torchopt.runtime import session

FAMILIES = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "densenet121",
    "convnext_tiny", "vit_b_16", "shufflenet_v2_x1_0", "squeezenet1_1", "regnet_y_400mf", "mnasnet1_0",
)  # fmt: skip
X = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
STEPS = 6  # bisections over the ratio for the comparison at equal latency


def network(name: str) -> nn.Module:
    """A torchvision network with random weights; heads that start at zero get random ones, so that outputs differ."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model


def agreement(name: str, folder: Path) -> Row:
    """Shrink by half, export, and compare ONNX Runtime with torch."""
    note(f"shrink {name} …")
    model = network(name)
    shrunk = torchopt.shrink(model, (X,), ratio=0.5)
    path = folder / f"{name}.onnx"
    torchopt.export(shrunk, (X,), path)
    opened = session(path)
    theirs = opened.run(None, {opened.get_inputs()[0].name: X.numpy()})[0]
    ours = shrunk(X).detach().numpy()
    error = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    kept = count_macs(shrunk, (X,))[0] / count_macs(model, (X,))[0]
    return Row(
        what=f"shrink(ratio=0.5), {name}: ONNX Runtime against torch",
        asked="≤ 1e-4 relative",
        reached=f"{error:.1e}",
        holds=error <= 1e-4 and kept < 1,
        note=f"{kept:.2f} of the multiply-adds kept",
    )


def ratios(folder: Path, dense: Path, candidates: dict[str, nn.Module], repeats: int) -> dict[str, float]:
    """Latency of each candidate divided by the dense network's, all interleaved in one run."""
    paths = []
    for name, candidate in candidates.items():
        paths.append(folder / f"{name}.onnx")
        torchopt.export(candidate, (X,), paths[-1], pack=False)
    rows = torchopt.benchmark([dense, *paths], threads=1, repeats=repeats, progress=False).rows
    return {name: row.ratio for name, row in zip(candidates, rows[1:], strict=True)}


def by_ratio(model: nn.Module, folder: Path, dense: Path, goal: float, repeats: int) -> nn.Module:
    """Plain ratio pruning (widths as they fall, round_to=1) whose latency is nearest to `goal` times the dense one."""
    low, high = 0.0, 0.95
    found: list[tuple[float, nn.Module]] = []
    for _ in range(STEPS):
        middle = (low + high) / 2
        candidate = torchopt.shrink(model, (X,), ratio=middle, round_to=1)
        took = ratios(folder, dense, {"step": candidate}, repeats)["step"]
        found.append((abs(took - goal), candidate))
        low, high = (middle, high) if took > goal else (low, middle)
    return min(found, key=lambda pair: pair[0])[1]


def half_latency(name: str, folder: Path, repeats: int) -> tuple[list[Row], dict[str, Any]]:
    """Half the dense latency by `max_latency_ms`, and plain ratio pruning of the same latency, timed in one run."""
    note(f"half the latency of {name} …")
    model, dense = network(name), folder / "dense.onnx"
    torchopt.export(model, (X,), dense, pack=False)
    stand = torchopt.benchmark([dense], threads=1, repeats=repeats, progress=False).rows[0].latency_ms
    ours = torchopt.shrink(model, (X,), max_latency_ms=stand / 2)
    reached = ratios(folder, dense, {"ours": ours}, repeats)["ours"]
    plain = by_ratio(model, folder, dense, reached, repeats)
    final = ratios(folder, dense, {"ours": ours, "plain": plain}, 2 * repeats)
    full = count_macs(model, (X,))[0]
    kept = {which: count_macs(net, (X,))[0] / full for which, net in (("ours", ours), ("plain", plain))}
    rows = [
        Row(
            what=f"shrink(max_latency_ms=dense / 2), {name}, 1 thread: latency / dense",
            asked="0.475 … 0.525",
            reached=f"{final['ours']:.3f}",
            holds=abs(final["ours"] / 0.5 - 1) <= 0.05,
            note=f"dense {stand:.1f} ms",
        ),
        Row(
            what=f"multiply-adds it keeps, {name}, against ratio pruning of the same latency",
            asked="more",
            reached=f"{kept['ours']:.3f} against {kept['plain']:.3f}",
            holds=kept["ours"] > kept["plain"],
            note=f"latencies {final['ours']:.3f} and {final['plain']:.3f} of dense",
        ),
    ]
    return rows, {"network": name, "dense_ms": stand, "latency_ratio": final, "macs_kept": kept}


def rows(*, quick: bool, families: tuple[str, ...] = FAMILIES) -> tuple[list[Row], object]:
    """Every row of structured pruning, and the details beneath them."""
    torch.set_num_threads(1)
    found, details = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found += [agreement(family, folder) for family in (families[:1] if quick else families)]
        for network_name in [n for n in families if n == "resnet18" or (n == "mobilenet_v2" and not quick)]:
            more, detail = half_latency(network_name, folder, 3 if quick else 20)
            found += more
            details.append(detail)
    return found, details


def main() -> None:
    """Measure, print the table, and write it to docs/bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run on ResNet-18: numbers not written")
    parser.add_argument("--networks", default=",".join(FAMILIES), help="some of the families only: numbers not written")
    options = parser.parse_args()
    chosen = tuple(options.networks.split(","))
    found, details = rows(quick=options.quick, families=chosen)
    if options.quick or chosen != FAMILIES:
        print(*found, sep="\n")
    else:
        write("shrink", found, details=details)


if __name__ == "__main__":
    main()
