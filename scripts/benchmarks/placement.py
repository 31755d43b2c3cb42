"""Whether the int8 file is the model: layers that run as integers, floats left between them, bytes, and ORT's answers beside torch's.

The networks of `quantize.py`. MobileNetV2 has its pretrained weights where the data folder ($TORCHOPT_DATA, or ../shared/data) has them,
the others random ones, with the batch-norm statistics of the inputs; inputs are its photographs, else random. No time is measured.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from harness import Row, note, write
from ptq import DATA, photographs
from ptq import network as pretrained
from quantize import NETWORKS, network
from torch import nn

import torchopt
from torchopt.runtime.session import session

BETWEEN = {"Clip", "Relu", "Sigmoid", "HardSigmoid", "HardSwish"}


def inputs(count: int) -> torch.Tensor:
    """(count, 3, 224, 224), normalized."""
    if (DATA / "imagenet-sample").is_dir():
        return photographs()[:count]
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def model_of(name: str, x: torch.Tensor) -> nn.Module:
    """The network in evaluation mode, with statistics and a head that tell its classes apart."""
    if name == "mobilenet_v2" and (DATA / "pretrained").is_dir():
        return pretrained()
    model = network(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
        if isinstance(module, nn.Linear) and not module.weight.any():  # ViT's head starts at zero
            nn.init.normal_(module.weight, std=0.02)
    model.train()(x[:16])
    return model.eval()


def left_between(path: Path) -> Iterator[str]:
    """Activations that run in float between two integer kernels of ORT's optimized graph."""
    with tempfile.TemporaryDirectory() as folder:
        session(path, optimized_to=Path(folder) / "optimized.onnx")
        nodes = onnx.load(Path(folder) / "optimized.onnx").graph.node
    maker = {output: node for node in nodes for output in node.output}
    for node in nodes:
        source = maker.get(node.input[0]) if node.op_type in BETWEEN else None
        readers = [user for user in nodes if set(node.output) & set(user.input)]
        if source is not None and source.op_type == "DequantizeLinear" and any(u.op_type == "QuantizeLinear" for u in readers):
            yield node.op_type


def dense_bytes(model: nn.Module) -> int:
    """One byte a weight, four a bias or another parameter, four a scale."""
    weights = {id(p): p for module in model.modules() for n, p in module.named_parameters(recurse=False) if p.dim() > 1}
    others = sum(p.numel() for p in model.parameters() if p.dim() <= 1)
    scales = sum(grid.scale.numel() for grid in torchopt.network.grid.grids(model).values())
    gridded = {id(model.get_parameter(name)) for name in torchopt.network.grid.grids(model)}
    return sum(p.numel() * (1 if i in gridded else 4) for i, p in weights.items()) + 4 * (others + scales)


def measure(name: str, x: torch.Tensor) -> Row:
    """One network: quantize, export, compare on inputs that did not calibrate."""
    note(f"placement: {name}")
    model, calibration, rest = model_of(name, x), x[: len(x) // 2], x[len(x) // 2 :]
    trained = name == "mobilenet_v2" and (DATA / "pretrained").is_dir()
    plain = torchopt.Quantize(observer="minmax", rounding="nearest", equalize=False)  # searching pays for trained weights only
    rule = torchopt.Rule("*", quantize=torchopt.Quantize() if trained else plain)
    batches = list(calibration.split(16))
    final = torchopt.one_shot(model, [rule], batches, example_inputs=(x[:1],), progress=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        result = torchopt.export(final, (x[:1],), path, pack=False)
        placement, left = torchopt.inspect(path), list(left_between(path))
        verdict = torchopt.verify(final, path, rest.split(16), progress=False)
    over = result.size_bytes / dense_bytes(final) - 1
    share, same = verdict.within_one_step or 0.0, verdict.top1_agreement
    floats = "" if not placement.float else f"; float, measured faster so: {', '.join(placement.float)}"
    return Row(
        what=name,
        asked="integer, no float between, file ≤ +2 %, ≥ 99.9 % of logits within a step, top-1 ≥ 99.9 %",
        reached=f"{len(placement.integer)} of {len(placement.layers)}, {len(left)}, {over:+.1%}, {share:.2%}, {same:.2%}",
        holds=not left and over <= 0.02 and share >= 0.999 and same >= 0.999 and verdict.weights_equal,
        note=f"{result.size_bytes:,} bytes; at most {verdict.max_steps:.2f} steps; {verdict.samples} inputs{floats}",
    )


def main() -> None:
    """Measure, print, write docs/bench/placement.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, 32 inputs: numbers not written")
    parser.add_argument("--networks", nargs="+", default=None)
    parser.add_argument("--inputs", type=int, default=128)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = options.networks or (NETWORKS[2:4] if options.quick else NETWORKS)
    x = inputs(32 if options.quick else options.inputs)
    rows = []
    for name in names:
        rows.append(measure(name, x))
        note(str(rows[-1]))
    if options.quick:
        print(*rows, sep="\n")
    else:
        write("placement", rows)


if __name__ == "__main__":
    main()
