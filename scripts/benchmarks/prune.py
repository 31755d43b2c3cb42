"""What masks cost: a training step with and without them, one ranking over all of ResNet-50, and memory; then `shrink`'s rows."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Row, Times, interleave, note, ratio, write
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torchvision.models import resnet18, resnet50

from torchopt.network.weights import weights
from torchopt.prune import ConstantSparsity, Prune, attach, finish, update

EVERY_HUNDRED = Prune(schedule=ConstantSparsity(target_sparsity=0.8, frequency=100))
EVERY_STEP = Prune(schedule=ConstantSparsity(target_sparsity=0.8, frequency=1))


def masked(model: nn.Module, config: Prune) -> nn.Module:
    """Put masks on every convolution and linear layer of a copy."""
    model = copy.deepcopy(model)
    attach([(w, config) for w in weights(model)], preserve=True)
    return model


def training_step(model: nn.Module, after: Callable[[nn.Module, int], object] | None = None) -> Callable[[], None]:
    """One step of SGD with momentum on ResNet-18's benchmark batch, 32 images of 64×64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 3, 64, 64, generator=generator), torch.randint(0, 1000, (32,), generator=generator)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), iter(range(1, 1 << 30))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if after is not None:
            after(model, next(steps))

    return step


def step_times(rounds: int) -> Times:
    """Interleave the float step, ours, ours with new masks in each step, and torch's own masks."""
    torch.manual_seed(0)
    model = resnet18()
    theirs = copy.deepcopy(model)
    for weight in weights(theirs):
        torch_prune.l1_unstructured(weight.module, "weight", amount=0.8)
    cases = {
        "float": training_step(copy.deepcopy(model)),
        "torchopt": training_step(masked(model, EVERY_HUNDRED), update),
        "torchopt, new masks each step": training_step(masked(model, EVERY_STEP), update),
        "torch.nn.utils.prune": training_step(theirs),
    }
    return interleave(cases, repeats=rounds, warmup=3)


def step_rows(times: Times) -> list[Row]:
    """Ratios to the float step."""
    rows = []
    for name, asked in (("torchopt", 1.03), ("torchopt, new masks each step", None), ("torch.nn.utils.prune", None)):
        middle, low, high = ratio(times, name, "float")
        rows.append(
            Row(
                what=f"training step, {name} / float (ResNet-18, batch 32, 64×64, {torch.get_num_threads()} threads)",
                asked=f"≤ {asked}" if asked else "",
                reached=f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                holds=middle <= asked if asked else None,
                note=f"float {statistics.median(times['float']) * 1e3:.0f} ms, median and quartiles of paired steps",
            )
        )
    return rows


def ranking_rows(rounds: int) -> list[Row]:
    """One global ranking of ResNet-50's weights, and what the masks weigh."""
    torch.manual_seed(0)
    model = resnet50()
    count = sum(w.value.numel() for w in weights(model))
    before = sum(b.numel() * b.element_size() for b in model.buffers())
    model = masked(model, Prune(schedule=0.8, scope="global"))
    extra = sum(b.numel() * b.element_size() for b in model.buffers()) - before
    seconds = statistics.median(interleave({"global": lambda: finish(model)}, repeats=rounds)["global"])
    zeros = sum(int((w.value == 0).sum()) for w in weights(model))
    exact = count - zeros == round(count * 0.2)
    return [
        Row(
            what=f"global mask update, ResNet-50, {count / 1e6:.1f} M weights",
            asked="≤ 0.5 s",
            reached=f"{seconds:.3f} s",
            holds=seconds <= 0.5,
            note=f"median of {rounds}",
        ),
        Row(what="weights kept by it, at 80 %", asked=f"exactly {round(count * 0.2)}", reached=str(count - zeros), holds=exact),
        Row(
            what="memory held for masks, bytes a weight",
            asked="≤ 1",
            reached=f"{extra / count:.6f}",
            holds=extra <= count + len(weights(model)),
            note="one byte a weight, one flag a tensor",
        ),
    ]


def shrink_rows(quick: bool) -> tuple[list[Row], object]:
    """The rows of `scripts/benchmarks/shrink.py`, which measures channels really removed."""
    path = Path(__file__).with_name("shrink.py")
    if not path.exists():
        return [], None
    spec = importlib.util.spec_from_file_location("shrink_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.rows(quick=quick)  # type: ignore[no-any-return]


def main() -> None:
    """Measure, print the table, and write it to docs/bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few rounds, numbers not written")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds of training steps")
    parser.add_argument("--masks-only", action="store_true", help="leave out the channels really removed")
    options = parser.parse_args()
    torch.set_num_threads(2)
    note("training steps of ResNet-18 …")
    times = step_times(3 if options.quick else options.rounds)
    rows = step_rows(times)
    note("ranking ResNet-50 …")
    rows += ranking_rows(3 if options.quick else 15)
    more, details = ([], None) if options.masks_only else shrink_rows(options.quick)
    rows += more
    if options.quick:
        print(*rows, sep="\n")
    else:
        write("prune", rows, details={"seconds": times, "shrink": details})


if __name__ == "__main__":
    main()
