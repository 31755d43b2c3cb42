"""Networks of timm, the smallest of each family: batch norms that activate, padding computed in forward, standardized convolutions,
squeeze and excitation, windows, talking heads, re-parametrized branches.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from networks.stranger import Stranger, pictures

NAMES: dict[str, dict[str, Any]] = {
    "resnet10t": {"channels": (16, 32, 64, 128)},
    "resnet14t": {"channels": (16, 32, 64, 128)},
    "seresnet18": {"channels": (16, 32, 64, 128)},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small": {},
    "tf_efficientnet_lite0": {},
    "tf_mobilenetv3_small_minimal_100": {},
    "ghostnet_050": {},
    "fbnetc_100": {},
    "lcnet_035": {},
    "tinynet_e": {},
    "regnetx_002": {},
    "regnety_002": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "nf_regnet_b0": {},
    "mobileone_s0": {},
    "dla46x_c": {},
    "rexnet_100": {},
    "res2net50_14w_8s": {"channels": (16, 32, 64, 128), "layers": (1, 1, 1, 1)},
    "edgenext_xx_small": {},
    "efficientvit_b0": {},
    "inception_next_atto": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "pit_ti_224": {"img_size": 64},
    "mobilevit_xxs": {},
    "fastvit_t8": {},
}


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **options)  # type: ignore[no-any-return]


def strangers() -> list[Stranger]:
    """All of them, on pictures of 64 × 64."""
    return [
        Stranger(name=name, manner="timm", build=lambda n=name, o=options: _build(n, o), draw=pictures(64))
        for name, options in NAMES.items()
    ]
