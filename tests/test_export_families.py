"""The slow tier: one network of each torchvision classification family, in float, float16 and int8, weights equal and outputs close."""

import pytest
import torch
import torchvision
from torch import nn

from torchopt import Quantize, Rule, export, one_shot, verify

FAMILIES = {
    "alexnet": {},
    "convnext_tiny": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "maxvit_t": {},
    "mnasnet1_0": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "regnet_y_400mf": {},
    "resnet18": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x1_0": {},
    "squeezenet1_1": {},
    "swin_t": {},
    "vgg11": {},
    "vit_b_16": {},
    "wide_resnet50_2": {},
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **FAMILIES[name]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():  # ViT's head starts at zero, and nothing would be compared
            nn.init.normal_(module.weight, std=0.02)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float", "float16", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_P7_every_family_is_exported_and_verified(tmp_path, name, form) -> None:
    model, x = network(name), torch.randn(2, 3, 224, 224)
    if form == "float16":
        model = model.half().float()
    elif form == "int8":
        rules = [Rule("*", quantize=Quantize(observer="minmax"))]
        model = one_shot(model, rules, [x], example_inputs=(x[:1],), progress=False)
    path = tmp_path / "m.onnx"
    result = export(model, (x[:1],), path, pack=False)
    verdict = verify(model, path, [x], progress=False)
    assert verdict.weights_equal, verdict.first_difference
    assert verdict.weights_compared > 5
    bytes_of_weights = sum(p.numel() for p in model.parameters() if p.dim() > 1) * {"float": 4, "float16": 2, "int8": 1}[form]
    if form == "int8":
        assert verdict.max_relative < 0.05
    else:
        assert verdict.max_relative < 1e-4
        assert result.size_bytes < 1.06 * bytes_of_weights + 300_000
