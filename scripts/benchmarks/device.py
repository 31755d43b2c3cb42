"""C code for microcontrollers: four networks of MLPerf Tiny's shapes, in int8, with 16 values, and with 80 % zeros and 16 values.

Integers are compared with ONNX Runtime's at every step: 1,000 inputs on this machine, 50 on a Cortex-M4 in QEMU. Flash and RAM are what
the ARM compiler says of the network's own object file, instructions are QEMU's (each takes one step of its clock; a processor takes more
cycles). Weights are not trained, which changes neither sizes nor arithmetic: inputs and batch norms are random.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, interleave, ratio, write
from torch import nn

import torchopt
from torchopt.c_code import machines, verify_c
from torchopt.c_code.arena import largest_pair
from torchopt.c_code.export import as_onnx, lowered
from torchopt.models import build
from torchopt.runtime.session import session

SPARE, STACK = 16 * 1024, 4 * 1024  # bytes that code and scratch may take
ZEROS = torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.8, frequency=1))
SHARED = torchopt.Cluster(n_clusters=16)
FORMS: dict[str, dict[str, Any]] = {
    "int8": {},
    "16 values": {"cluster": SHARED},
    "80 % zeros, 16 values": {"prune": ZEROS, "cluster": SHARED},
}
FLASH = {"int8": 1.05, "16 values": 0.55, "80 % zeros, 16 values": 0.35}
PORTABLE = "cortex-m4-portable"


def mobilenet(width: float = 0.25, classes: int = 2) -> nn.Module:
    """MobileNetV1 (Howard et al. 2017) for 96×96 pictures of people."""
    channels = [int(c * width) for c in (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)]
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, 2, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU6()]
    for into, out, stride in zip(channels[:-1], channels[1:], strides, strict=True):
        layers += [nn.Conv2d(into, into, 3, stride, 1, groups=into, bias=False), nn.BatchNorm2d(into), nn.ReLU6()]
        layers += [nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


def autoencoder() -> nn.Module:
    """Ten linear layers that give a spectrum back: sounds that come out otherwise are strange ones."""
    layers: list[nn.Module] = []
    sizes = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out), nn.BatchNorm1d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640))


NETWORKS = {
    "ResNet-8": (lambda: build("resnet8", 10, 3), (3, 32, 32)),
    "DS-CNN": (lambda: build("ds_cnn", 12, 1), (1, 49, 10)),
    "MobileNetV1-0.25": (mobilenet, (3, 96, 96)),
    "autoencoder": (autoencoder, (640,)),
}


def compressed(name: str, form: str) -> tuple[nn.Module, int]:
    """A network with batch norms that have seen data, compressed; and the number of its weights."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.bias, -0.2, 0.5)
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(32, *shape))
    x = torch.randn(32, *shape)
    rules = [torchopt.Rule("*", quantize=torchopt.Quantize(), **FORMS[form])]
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return torchopt.one_shot(model.eval(), rules, [x], example_inputs=(x[:1],), progress=False), weights


def times(source: Path, content: bytes, shape: tuple[int, ...]) -> tuple[float, float, float]:
    """Median and quartiles of the C code's processor time over ONNX Runtime's, one thread each."""
    library = source.with_suffix(".so")
    command = ["gcc", "-std=c99", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library), "-lm"]
    subprocess.run(command, check=True)
    file = source.with_suffix(".onnx")
    file.write_bytes(content)
    opened = session(file)
    x = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    feed = {opened.get_inputs()[0].name: x}
    y = np.zeros_like(opened.run(None, feed)[0])
    function = getattr(ctypes.CDLL(str(library)), f"{source.stem}_run")
    given = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, y)]
    cases: dict[str, Callable[[], object]] = {"c": lambda: function(*given), "ort": lambda: opened.run(None, feed)}
    found = interleave(cases, repeats=30, inner=50, clock=time.process_time)  # others may work on this machine too
    return ratio(found, "c", "ort")


def measured(name: str, form: str, folder: Path, samples: int, board: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one network in one form."""
    model, weights = compressed(name, form)
    shape = NETWORKS[name][1]
    inputs = torch.randn(samples, *shape)
    result = torchopt.export(model, (inputs[:1],), folder / "net.c")
    _, program, _ = lowered(as_onnx(model, (inputs[:1],)), "net", "net")
    verdict = verify_c(model, result.path, [inputs], machines=["host-fast", "cortex-m4"], board_samples=board)
    plain = verify_c(model, result.path, [inputs[:2]], machines=["host", PORTABLE], board_samples=1)
    host, cortex = verdict.machines
    label = f"{name}, {form}"
    rows = []
    for m, goal in ((host, samples), (plain.machines[0], 2), (cortex, board), (plain.machines[1], 1)):
        if m.skipped:
            rows.append(Row(what=f"{label}: {m.machine}", asked="integers equal", reached=f"skipped: {m.skipped}"))
            continue
        reached = f"{m.integers - m.integers_different:,} of {m.integers:,} in {m.layers} steps; outputs {m.max_abs:.1g} apart"
        good = m.first_difference is None and m.max_abs <= 1e-5
        rows.append(
            Row(
                what=f"{label}: {m.machine}",
                asked=f"100 % of {goal:,} inputs' integers, outputs ≤ 1e-5",
                reached=reached,
                holds=good,
            )
        )
    if cortex.flash_bytes is not None and cortex.ram_bytes is not None:
        limit = int(FLASH[form] * weights + SPARE)
        asked = f"≤ {FLASH[form]} × {weights:,} + 16 kB = {limit:,}"
        rows.append(
            Row(what=f"{label}: flash", asked=asked, reached=f"{cortex.flash_bytes:,}", holds=cortex.flash_bytes <= limit)
        )
        pair = largest_pair(program)
        limit = int(1.1 * pair + STACK)
        asked = f"≤ 1.1 × {pair:,} + 4 kB = {limit:,}"
        rows.append(Row(what=f"{label}: RAM", asked=asked, reached=f"{cortex.ram_bytes:,}", holds=cortex.ram_bytes <= limit))
    if form == "int8":
        middle, low, high = times(result.path, as_onnx(model, (inputs[:1],)), shape)
        note = "gcc -O3 -march=native beside kernels written for this processor"
        reached = f"{middle:.2f} × ({low:.2f} to {high:.2f})"
        rows.append(Row(what=f"{label}: time here", asked="≤ 4 × ONNX Runtime's", reached=reached, holds=middle <= 4, note=note))
    found = {m.machine: m.to_dict() if hasattr(m, "to_dict") else m.__dict__ for m in (*verdict.machines, *plain.machines)}
    return rows, {"network": name, "form": form, "weights": weights, "machines": found}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="20 inputs here, 2 in QEMU, two networks")
    quick = parser.parse_args().quick
    m4 = machines.MACHINES["cortex-m4"]
    machines.MACHINES[PORTABLE] = replace(m4, name=PORTABLE, flags=(*m4.flags, "-DTORCHOPT_PORTABLE"))
    rows: list[Row] = []
    details: list[dict[str, Any]] = []
    for name in ("DS-CNN", "autoencoder") if quick else NETWORKS:
        counts: dict[str, tuple[int, int]] = {}
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                more, detail = measured(name, form, Path(folder), 20 if quick else 1000, 2 if quick else 50)
            rows += more
            details.append(detail)
            found = detail["machines"]
            if found["cortex-m4"]["instructions"] is not None:
                counts[form] = found["cortex-m4"]["instructions"], found[PORTABLE]["instructions"]
        for form, (own, portable) in counts.items():
            dense = counts["int8"][1]
            sparse = "zeros" in form
            asked = "≤ 0.4 × of int8 in portable C" if sparse else "instructions on Cortex-M4"
            reached = f"{own:,}; portable C {portable:,} ({portable / dense:.2f} ×)"
            holds = portable <= 0.4 * dense if sparse else None
            rows.append(Row(what=f"{name}, {form}: instructions", asked=asked, reached=reached, holds=holds))
        write("device", rows, details=details)  # after each network: it takes a while


if __name__ == "__main__":
    main()
