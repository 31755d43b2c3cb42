"""Compression without training, with the defaults: what masks, tables and few bits cost a trained network, and what the solver gives back.

Needs the data folder ($TORCHOPT_DATA, or ../shared/data beside the checkout). MobileNetV2 is calibrated on one half of the 200 photographs
and compared with the float network on the other; then the halves change places, and the mean of both is the figure. ResNet-8 is trained
here for a few minutes on Fashion-MNIST, compressed from 128 training pictures, and scored on the 10,000 test pictures.
`--raw` prints the figures without goals and writes nothing, so that an older checkout can be measured by the same file.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from harness import Row, note, write
from ptq import DATA, network, outputs, photographs
from torch import nn
from torch.nn import functional as F

import torchopt
from torchopt import Cluster, Prune, Quantize, Rule
from torchopt.models import build

EVERY = {"include_depthwise": True}
PHOTOGRAPHS = {  # name: (rule, agreement asked, before the solver)
    "W8A8": (Rule("*", quantize=Quantize()), 0.98, "98.0 %, 23.7 dB"),
    "W4A8": (Rule("*", quantize=Quantize(weight_bits=4)), 0.93, "83.0 %, 9.3 dB"),
    "16 shared values + int8": (Rule("*", cluster=Cluster(n_clusters=16, **EVERY), quantize=Quantize()), 0.93, "3.0 %, -1.7 dB"),
    "50 % zeros + int8": (Rule("*", prune=Prune(schedule=0.5), quantize=Quantize()), 0.90, "0.5 %, -0.8 dB"),
    "50 % zeros chosen by the solver + int8": (Rule("*", prune=Prune(schedule=0.5, score="hessian"), quantize=Quantize()), 0.90, ""),
}  # fmt: skip
CLOTHES = {  # name: (rule, points asked, before the solver)
    "16 values + int8": (Rule("*", cluster=Cluster(n_clusters=16), quantize=Quantize()), 0.15, ""),
    "60 % zeros + 16 values + int8": (Rule("*", prune=Prune(schedule=0.6), cluster=Cluster(n_clusters=16), quantize=Quantize()), 0.5, ""),
    "W3A8": (Rule("*", quantize=Quantize(weight_bits=3)), 0.5, ""),
    "2:4 zeros + int8": (Rule("*", prune=Prune(pattern="2:4"), quantize=Quantize()), 0.5, ""),
}  # fmt: skip
STEPS, BATCH = 900, 128


def photograph_row(name: str, model: nn.Module, x: torch.Tensor) -> Row:
    """Agreement with float and signal to noise, the mean of both ways."""
    rule, asked, before = PHOTOGRAPHS[name]
    note(f"oneshot: MobileNetV2, {name}")
    found = []
    for known, rest in ((x[::2], x[1::2]), (x[1::2], x[::2])):
        start = time.perf_counter()
        small = torchopt.one_shot(model, [rule], list(known.split(20)), example_inputs=(known[:1],), progress=False).eval()
        seconds = time.perf_counter() - start
        y, reference = outputs(small, rest), outputs(model, rest)
        agreement = float((y.argmax(1) == reference.argmax(1)).float().mean())
        found.append((agreement, float(10 * torch.log10(reference.var() / (y - reference).square().mean())), seconds))
    agreement, decibels, seconds = (statistics.mean(part) for part in zip(*found, strict=True))
    return Row(
        what=f"MobileNetV2, {name}",
        asked=f"≥ {asked:.0%}",
        reached=f"{agreement:.1%}, {decibels:.1f} dB, {seconds:.0f} s",
        holds=agreement >= asked,
        note=f"before the solver: {before}" if before else "",
    )


def pictures(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Fashion-MNIST, normalized: (n, 1, 28, 28) and labels."""

    def idx(kind: str, dims: int) -> np.ndarray:
        raw = gzip.decompress((DATA / "fashion-mnist" / f"{part}-{kind}-idx{dims}-ubyte.gz").read_bytes())
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(
            [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
        )

    x = torch.from_numpy(idx("images", 3).astype(np.float32) / 255)[:, None]
    return (x - 0.2860) / 0.3530, torch.from_numpy(idx("labels", 1).astype(np.int64))


def trained(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """ResNet-8, after `STEPS` steps."""
    torch.manual_seed(0)
    model = build("resnet8", classes=10, in_channels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def points(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Top-1 accuracy in points."""
    return (
        100
        * sum(int((model(part).argmax(1) == label).sum()) for part, label in zip(x.split(500), y.split(500), strict=True))
        / len(x)
    )


def clothes_rows(file: Path | None, chosen: str) -> list[Row]:
    """Points lost on the test pictures."""
    x, y = pictures("train")
    if file is not None and file.is_file():
        model = build("resnet8", classes=10, in_channels=1).eval()
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        note("oneshot: training ResNet-8")
        model = trained(x, y)
        if file is not None:
            torch.save(model.state_dict(), file)
    test, rows = pictures("t10k"), []
    whole = points(model, *test)
    for name, (rule, asked, before) in CLOTHES.items():
        if chosen not in f"clothes {name}":
            continue
        note(f"oneshot: ResNet-8, {name}")
        small = torchopt.one_shot(model, [rule], list(x[:128].split(32)), example_inputs=(x[:1],), progress=False).eval()
        lost = whole - points(small, *test)
        rows.append(
            Row(
                what=f"Fashion-MNIST ResNet-8 ({whole:.2f} %), {name}",
                asked=f"≤ {asked} point",
                reached=f"{lost:.2f}",
                holds=lost <= asked,
                note=f"before the solver: {before}" if before else "",
            )
        )
    return rows


def main() -> None:
    """Measure, print, write docs/bench/oneshot.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", action="store_true", help="print the rows, write nothing")
    parser.add_argument("--only", default="", help="rows whose name holds this: 'photographs', 'clothes', or part of a setting")
    parser.add_argument("--network", type=Path, help="where ResNet-8's trained weights are, or are to be kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not (DATA / "pretrained").is_dir():
        sys.exit(f"oneshot: {DATA}/pretrained is missing; set TORCHOPT_DATA to the data folder")
    torch.set_num_threads(1)
    names, rows = [name for name in PHOTOGRAPHS if options.only in f"photographs {name}"], []
    if names:
        model, x = network(), photographs()
        rows += [photograph_row(name, model, x) for name in names]
    if any(options.only in f"clothes {name}" for name in CLOTHES):
        rows += clothes_rows(options.network, options.only)
    if options.raw:
        print(*(f"{row.what}: {row.reached}" for row in rows), sep="\n")
    else:
        write("oneshot", rows)


if __name__ == "__main__":
    main()
