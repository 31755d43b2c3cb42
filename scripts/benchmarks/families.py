"""Export of every torchvision classification family, in float, float16 and int8: verified against torch, weights bit for bit.

One network a family, with random weights and statistics that random activations pass through alive; int8 is post-training quantization
of all layers on two random pictures, so what is verified is the file, not an accuracy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision
from harness import Row, note, write
from torch import nn

from torchopt import Quantize, Rule, export, one_shot, verify
from torchopt.runtime import inspect

FAMILIES = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0"),
    *("efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"),
    *("resnet18", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1"),
    *("swin_t", "vgg11", "vit_b_16", "wide_resnet50_2"),
]
WHOLE = {"aux_logits": False, "init_weights": False}  # the inception nets have outputs for training, and initialize slowly
FORMS = ("float", "float16", "int8")
ALLOWED = {"float": 1e-4, "float16": 1e-4, "int8": 0.05}  # of the largest output: rounding of sums; steps that fall the other way


def network(name: str) -> nn.Module:
    """The family's network, in evaluation mode."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **(WHOLE if "ception" in name or name == "googlenet" else {})).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():  # ViT's head starts at zero, and nothing would be compared
            nn.init.normal_(module.weight, std=0.02)
    return model


def case(name: str, form: str, folder: Path) -> dict[str, Any]:
    """Export one network in one form, and verify the file."""
    model, x = network(name), torch.randn(2, 3, 224, 224)
    parameters = sum(p.numel() for p in model.parameters())
    if form == "float16":
        model = model.half().float()
    elif form == "int8":
        rule = Rule("*", quantize=Quantize(observer="minmax"))
        model = one_shot(model, [rule], [x], example_inputs=(x[:1],), progress=False)
    path = folder / "m.onnx"
    result = export(model, (x[:1],), path, pack=False)
    verdict = verify(model, path, [x], progress=False)
    placement = inspect(path)
    return {
        "network": name,
        "form": form,
        "bytes": result.size_bytes,
        "bytes_a_parameter": result.size_bytes / parameters,
        "weights_equal": verdict.weights_equal,
        "weights": verdict.weights_compared,
        "relative": verdict.max_relative,
        "integer_layers": len(placement.integer),
        "layers": len(placement.layers),
    }


def row(form: str, cells: list[dict[str, Any]]) -> Row:
    """All networks in one form."""
    good = [c for c in cells if c["weights_equal"] and c["relative"] < ALLOWED[form]]
    bad = ", ".join(c["network"] for c in cells if c not in good)
    size = sum(c["bytes_a_parameter"] for c in cells) / len(cells)
    worst = max(c["relative"] for c in cells)
    layers = (
        f"; {sum(c['integer_layers'] for c in cells)} of {sum(c['layers'] for c in cells)} layers integer"
        if form == "int8"
        else ""
    )
    return Row(
        what=f"torchvision's classification families exported in {form}, weights equal, outputs within {ALLOWED[form]} of the largest",
        asked="all",
        reached=f"{len(good)} of {len(cells)}",
        holds=len(good) == len(cells),
        note=(f"not: {bad}; " if bad else "") + f"{size:.2f} bytes a parameter; outputs apart by {worst:.1g} at most{layers}",
    )


def main() -> int:
    """Measure, write the table, and fail where a file is not the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three small networks; writes nothing")
    quick = parser.parse_args().quick
    names = ["mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x1_0"] if quick else FAMILIES
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for form in FORMS:
                cells.append(case(name, form, Path(folder)))
                note(str(cells[-1]))
    rows = [row(form, [c for c in cells if c["form"] == form]) for form in FORMS]
    if quick:
        print("\n".join(map(str, rows)))
    else:
        write("families", rows, details=cells)
    return 0 if all(r.holds for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
