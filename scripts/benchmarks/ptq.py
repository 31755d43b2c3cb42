"""Post-training quantization of the pretrained MobileNetV2: agreement with float, signal to noise, wall time, memory.

Needs the pretrained weights and the 200 ImageNet photographs of the data folder ($TORCHOPT_DATA, or ../shared/data beside the checkout).
Half of the photographs calibrate, the other half are compared; then the halves change places, and the mean of both is the figure.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from harness import Row, interleave, note, ratio, write
from onnxruntime import quantization as ort_quantization
from peers import Batches, preprocessed
from PIL import Image
from torch import nn

import torchopt

DATA = Path(os.environ.get("TORCHOPT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
OBSERVERS = ("moving_average", "percentile", "mse", "entropy", "auto")


def network() -> nn.Module:
    """The pretrained MobileNetV2."""
    model = torchvision.models.mobilenet_v2(weights=None)
    model.load_state_dict(torch.load(DATA / "pretrained" / "mobilenet_v2_imagenet.pth", weights_only=True))
    return model.eval()


def photographs() -> torch.Tensor:
    """(200, 3, 224, 224), normalized as the network wants them."""
    found = []
    with tarfile.open(DATA / "imagenet-sample" / "imagenet_sample_200.tar") as archive:
        for member in archive.getmembers():
            image = Image.open(io.BytesIO(archive.extractfile(member).read()))  # type: ignore[union-attr]
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
            found.append((pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225]))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def quantized(model: nn.Module, batches: list[torch.Tensor], **config: object) -> nn.Module:
    """The finalized int8 network."""
    rule = torchopt.Rule("*", quantize=torchopt.Quantize(**config))  # type: ignore[arg-type]
    return torchopt.one_shot(model, [rule], batches, example_inputs=(batches[0][:1],), progress=False).eval()


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits, in batches."""
    return torch.cat([model(part) for part in x.split(20)])


def likeness(model: nn.Module, x: torch.Tensor, **config: object) -> tuple[float, float]:
    """Return (top-1 agreement with float, SQNR of the logits in dB), each the mean over the two halves."""
    pairs = []
    for calibration, rest in ((x[::2], x[1::2]), (x[1::2], x[::2])):
        y, reference = outputs(quantized(model, list(calibration.split(20)), **config), rest), outputs(model, rest)
        agreement = float((y.argmax(1) == reference.argmax(1)).float().mean())
        pairs.append((agreement, float(10 * torch.log10(reference.var() / (y - reference).square().mean()))))
    return statistics.mean(a for a, _ in pairs), statistics.mean(d for _, d in pairs)


def accuracy_rows(model: nn.Module, x: torch.Tensor, *, quick: bool) -> list[Row]:
    """The default, each observer with weights rounded to nearest, and 4-bit weights."""
    cases: dict[str, tuple[dict[str, object], float | None, float | None]] = {"default": ({}, 0.975, 22.0)}
    if not quick:
        plain = {"rounding": "nearest", "equalize": False}
        cases |= {
            f"observer='{o}', nearest, not equalized": ({"observer": o, **plain}, None, None) for o in ("minmax", *OBSERVERS)
        }
        cases["weight_bits=4, default"] = ({"weight_bits": 4}, None, None)
        cases["weight_bits=4, adaptive, bias_correction"] = (
            {"weight_bits": 4, "rounding": "adaptive", "bias_correction": True}, 0.80, None,
        )  # fmt: skip
    rows = []
    for name, (config, share, decibels) in cases.items():
        note(f"ptq: {name}")
        agreement, noise = likeness(model, x, **config)
        goals = [f"≥ {share:.1%}"] if share else []
        goals += [f"≥ {decibels:g} dB"] if decibels else []
        holds = None if not goals else agreement >= (share or 0) and noise >= (decibels or 0)
        rows.append(
            Row(what=f"MobileNetV2, {name}", asked=", ".join(goals), reached=f"{agreement:.1%}, {noise:.1f} dB", holds=holds)
        )
    return rows


def time_rows(model: nn.Module, x: torch.Tensor, repeats: int) -> list[Row]:
    """Wall time of calibrating with 200 samples, ours over ORT's quantize_static with MinMax, and each observer over our minmax."""
    plain = {"rounding": "nearest", "equalize": False}
    batches = list(x.split(20))
    with tempfile.TemporaryDirectory() as name:
        source, target = (Path(name) / f"{n}.onnx" for n in ("float", "int8"))
        torchopt.export(model, (x[:1],), source, pack=False)
        entry = torchopt.runtime.session(source).get_inputs()[0].name
        prepared = preprocessed(source)

        def theirs() -> None:
            reader = Batches(entry, [b.numpy() for b in batches])
            ort_quantization.quantize_static(str(prepared), str(target), reader, per_channel=True)

        def ours(**config: object) -> None:
            torchopt.export(quantized(model, batches, **config), (x[:1],), target, pack=False)

        cases = {"ORT": theirs, "minmax": lambda: ours(observer="minmax", **plain)}
        cases |= {o: lambda o=o: ours(observer=o, **plain) for o in OBSERVERS}
        cases["default"] = ours
        times = interleave(cases, repeats=repeats, warmup=0)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    rows = []
    for name in ("minmax", *OBSERVERS, "default"):
        to, goal = ("ORT", 1.0) if name == "minmax" else ("minmax", None if name == "default" else 2.0)
        middle = ratio(times, name, to)[0]
        rows.append(
            Row(
                what=f"wall time, 200 samples, quantize and export, {name} / {'ORT quantize_static MinMax' if to == 'ORT' else 'minmax'}",
                asked=f"≤ {goal:g}" if goal else "",
                reached=f"{middle:.2f}",
                holds=middle <= goal if goal else None,
                note=f"{seconds[name]:.1f} s against {seconds[to]:.1f} s",
            )
        )
    return rows


def memory_row() -> Row:
    """Peak memory of calibration with 3,200 samples over that with 32, each in a process of its own."""
    small, large = (int(subprocess.check_output([sys.executable, __file__, "--peak", str(n)]).split()[-1]) for n in (32, 3200))
    return Row(
        what="peak memory of calibrating (mse observer), 3,200 samples / 32",
        asked="flat",
        reached=f"{large / small:.3f}",
        holds=large <= 1.05 * small,
        note=f"{small / 2**20:,.0f} and {large / 2**20:,.0f} MiB; 64×64 pictures, batches of 32 made on the way",
    )


def peak(samples: int) -> None:
    """Calibrate on random pictures and print the peak resident bytes."""
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    rule = torchopt.Rule("*", quantize=torchopt.Quantize(observer="mse"))
    batches = (torch.randn(32, 3, 64, 64) for _ in range(samples // 32))
    torchopt.one_shot(model, [rule], batches, example_inputs=(torch.randn(1, 3, 64, 64),), progress=False)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)  # type: ignore[index]


def main() -> None:
    """Measure, print, write docs/bench/ptq.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the default only, one round: numbers not written")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        peak(options.peak)
        return
    if not (DATA / "pretrained").is_dir():
        sys.exit(f"ptq: {DATA}/pretrained is missing; set TORCHOPT_DATA to the data folder")
    torch.set_num_threads(1)
    model, x = network(), photographs()
    rows = accuracy_rows(model, x, quick=options.quick)
    torch.set_num_threads(os.cpu_count() or 1)  # quantize_static calibrates on all cores
    rows += [*time_rows(model, x, 1 if options.quick else 3), memory_row()]
    if options.quick:
        print(*rows, sep="\n")
    else:
        write("ptq", rows)


if __name__ == "__main__":
    main()
