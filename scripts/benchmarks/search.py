"""Search against the best single setting for all layers, under the same engine: bytes at the same drop, and how well bytes are foreseen.

Needs the data folder ($TORCHOPT_DATA, or ../shared/data beside the checkout). The float networks are those of the recipes, trained here
once; `--networks DIR` keeps them. `--keep DIR` keeps what was measured, so that a run that was stopped goes on.
Uniform is found by trying single settings from the smallest on; the first that meets the drop is the best.
Seconds are of the processor, for this process; the machine may do other things meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Row, note, write
from ptq import DATA, network, photographs
from torch import nn

import torchopt
from torchopt.data import Augment, Dataset, FashionMnist, SpokenDigits
from torchopt.models import build
from torchopt.network.weights import weights
from torchopt.search import Choices, Option
from torchopt.train import AdamW, Train, accuracy, train

Evaluate = Callable[[nn.Module], float]
FLOATS = {  # name: (network, data, training); ResNet-8 is the recipes' float network
    "ResNet-8": (
        lambda: build("resnet8", classes=10, in_channels=1, width=2.0), FashionMnist(),
        Train(epochs=12, batch_size=128, optimizer=AdamW(lr=0.003, weight_decay=0.05), warmup_steps=200, precision="auto",
              augment=Augment(shift=1, flip=True)),
    ),
    "DS-CNN": (
        lambda: build("ds_cnn", classes=10, in_channels=1), SpokenDigits(),
        Train(epochs=30, batch_size=32, optimizer=AdamW(lr=0.003, weight_decay=0.05), warmup_steps=100, augment=Augment(shift=2)),
    ),
}  # fmt: skip
ASKED = {"ResNet-8": (0.01, 14.0, 600), "DS-CNN": (0.01, 6.0, None)}  # drop, times smaller than float, seconds


def trained(name: str, folder: Path | None) -> tuple[nn.Module, Dataset]:
    """The float network, and its data."""
    made, source, config = FLOATS[name]
    torch.manual_seed(0)
    model, data = made(), source.load()
    file = None if folder is None else folder / f"{name}.pt"
    if file is not None and file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        note(f"search: training {name}")
        train(model, data, config)
        if file is not None:
            torch.save(model.state_dict(), file)
    return model.eval(), data


def uniform(model: nn.Module, batches: list[torch.Tensor], evaluate: Evaluate, goal: float) -> tuple[str, int, float]:
    """The smallest single setting whose score is at least `goal`: its name, its bytes, its score."""
    options = [option for option in Choices().options() if option.bits is not None]
    for option in sorted(options, key=_bits):
        rules = [option.rule(weight) for weight in weights(model)]
        try:
            small = torchopt.one_shot(model, rules, batches, example_inputs=(batches[0][:1],), progress=False).eval()
        except torchopt.TorchoptError as error:
            note(f"search: uniform {option}: {error}")
            continue
        score = evaluate(small)
        note(f"search: uniform {option}: {score:.4f}")
        if score >= goal - 1e-9:
            with tempfile.TemporaryDirectory() as folder:
                return str(option), torchopt.export(small, (batches[0][:1],), Path(folder) / "a.onnx").size_bytes, score
    return "none", 0, 0.0


def _bits(option: Option) -> float:
    """Bits a weight, about: positions by their entropy, and codes."""
    codes = max(1, (option.values or 2**8) - 1).bit_length()
    zeros = option.sparsity
    if not zeros:
        return codes
    kept = torch.tensor([zeros, 1 - zeros])
    return float(min(1.0, -(kept * kept.log2()).sum() * 1.1)) + (1 - zeros) * codes


def rows(
    name: str,
    model: nn.Module,
    batches: list[torch.Tensor],
    evaluate: Evaluate,
    drop: float,
    times: float,
    limit: float | None,
    keep: Path,
) -> list[Row]:
    """Search, and the best single setting."""

    def said(point: torchopt.search.Point) -> None:  # type: ignore[name-defined]
        note(f"search: {name}: {point.bytes:,} bytes, score {point.score:.4f}")

    wall, start = time.perf_counter(), time.process_time()
    found = torchopt.search(model, max_drop=drop, evaluate=evaluate, batches=batches, cache=keep, folder=keep / name, said=said)
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    setting, size, score = uniform(model, batches, evaluate, found.float_score - drop)
    smaller, less = found.float_bytes / found.point.bytes, 1 - found.point.bytes / size if size else 1.0
    wrong = [abs(p.predicted_bytes / p.bytes - 1) for p in found.tried if p.predicted_bytes]
    what = f"{name} (float {found.float_score:.2%}), training-free, at most {100 * drop:.2g} points"
    lost = 100 * (found.float_score - found.point.score)
    return [
        Row(
            what=what,
            asked=f"≥ {times:g} × smaller than float",
            reached=f"{smaller:.1f} ×",
            holds=smaller >= times,
            note=f"{found.point.bytes:,} bytes, {lost:.2f} points; {len(found.tried)} points measured",
        ),
        Row(
            what=f"{name}, against the best single setting",
            asked="≥ 20 % smaller",
            reached=f"{less:.1%}",
            holds=less >= 0.2,
            note=f"{setting}: {size:,} bytes, {100 * (found.float_score - score):.2f} points",
        ),
        Row(
            what=f"{name}, bytes foreseen, the worst of {len(wrong)} points",
            asked="within 0.5 %",
            reached=f"{max(wrong, default=0):.2%}",
            holds=max(wrong, default=0) <= 0.005,
            note="each point's own bytes are those of its file",
        ),
        Row(
            what=f"{name}, seconds of the processor",
            asked=f"≤ {limit:g}" if limit else "",
            reached=f"{seconds:.0f}",
            holds=seconds <= limit if limit else None,
            note=f"{wall:.0f} s on the clock",
        ),
    ]


def photograph_rows(keep: Path) -> list[Row]:
    """MobileNetV2: one half of the photographs to learn from, agreement on the other, below that of W8A8."""
    model, x = network(), photographs()
    batches, rest = list(x[::2].split(20)), x[1::2]
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in rest.split(20)]).argmax(1)

    def agreement(judged: nn.Module) -> float:
        with torch.no_grad():
            return float((torch.cat([judged(part) for part in rest.split(20)]).argmax(1) == wanted).float().mean())

    whole = torchopt.one_shot(
        model, [torchopt.Rule("*", quantize=torchopt.Quantize())], batches, example_inputs=(x[:1],), progress=False
    )
    base, found = 1 - agreement(whole.eval()), []
    for points, times in ((0.01, 7.0), (0.04, 9.0)):
        name = f"MobileNetV2, {100 * points:g} below W8A8"
        found += rows(name, model, batches, agreement, base + points, times, 1200, keep)
    return found


def main() -> None:
    """Measure, print, write docs/bench/search.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="ResNet-8,DS-CNN,MobileNetV2", help="which networks, separated by commas")
    parser.add_argument("--networks", type=Path, help="where the float networks are, or are to be kept")
    parser.add_argument("--keep", type=Path, help="where what was measured is kept, so that a stopped run goes on")
    parser.add_argument("--raw", action="store_true", help="print the rows, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not (DATA / "pretrained").is_dir():
        sys.exit(f"search: {DATA}/pretrained is missing; set TORCHOPT_DATA to the data folder")
    torch.set_num_threads(1)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        keep = options.keep or Path(folder)
        for name, (drop, times, limit) in ASKED.items():
            if name in options.only.split(","):
                model, data = trained(name, options.networks)
                batches = data.calibration_batches(16)

                def evaluate(judged: nn.Module, data: Dataset = data) -> float:
                    return accuracy(judged, data.test_batches())

                found += rows(name, model, batches, evaluate, drop, times, limit, keep)
        if "MobileNetV2" in options.only:
            found += photograph_rows(keep)
    if options.raw:
        print(*found, sep="\n")
    else:
        write("search", found)


if __name__ == "__main__":
    main()
