"""The reference networks: small, of the kinds that run on small machines, for any image size from 8×8 up.

ResNet8 and DsCnn have the layout of the networks of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597): three residual pairs of
16, 32, 64 channels; one convolution and four separable ones of 64 channels (Zhang et al., "Hello Edge" 2017, arXiv 1711.07128).
DigitsNet is made for 8×8 pictures: wide enough that arithmetic, not the cost of starting a node, decides its latency.
"""

from __future__ import annotations

import torch
from torch import nn

from torchopt.models.blocks import ConvNorm, Inverted, Residual, Separable


class Network(nn.Module):
    """Features, global average pool, one linear layer."""

    def __init__(self, features: nn.Sequential, channels: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pictures x (N, channels, H, W) to logits (N, classes)."""
        return self.classifier(self.flatten(self.pool(self.features(x))))  # type: ignore[no-any-return]


class ResNet8(Network):
    """Eight layers in three residual pairs; 78 thousand weights at width 1."""

    def __init__(self, classes: int, in_channels: int, width: float = 1.0) -> None:
        a, b, c = (round(n * width) for n in (16, 32, 64))
        features = nn.Sequential(
            ConvNorm(in_channels, a),
            Residual(a, a),
            Residual(a, b, stride=2),
            Residual(b, c, stride=2),
        )
        super().__init__(features, c, classes)


class DigitsNet(Network):
    """For 8×8 pictures: convolution, residual pairs and separable convolutions; 0.2 million weights at width 1."""

    def __init__(self, classes: int, in_channels: int, width: float = 1.0) -> None:
        a, b, c = (round(n * width) for n in (32, 96, 160))
        features = nn.Sequential(
            ConvNorm(in_channels, a),
            Residual(a, a),
            Separable(a, b, stride=2),
            Residual(b, b),
            Separable(b, c),
        )
        super().__init__(features, c, classes)


class DsCnn(Network):
    """Keyword spotting: one strided convolution and four separable ones; 22 thousand weights at width 1."""

    def __init__(self, classes: int, in_channels: int, width: float = 1.0) -> None:
        a = round(64 * width)
        blocks = [Separable(a, a) for _ in range(4)]
        super().__init__(nn.Sequential(ConvNorm(in_channels, a, 5, stride=2), *blocks), a, classes)


class MobileNet(Network):
    """Inverted residuals, as in MobileNetV2 but for small pictures; 0.1 million weights at width 1."""

    def __init__(self, classes: int, in_channels: int, width: float = 1.0) -> None:
        a, b, c = (round(n * width) for n in (16, 32, 64))
        features = nn.Sequential(
            ConvNorm(in_channels, a),
            Inverted(a, a),
            Inverted(a, b, stride=2),
            Inverted(b, b),
            Inverted(b, c, stride=2),
            Inverted(c, c),
            ConvNorm(c, 4 * c, 1),
        )
        super().__init__(features, 4 * c, classes)
