"""The pieces that the reference networks share: convolution + batch norm + ReLU, a residual pair, a depthwise pair.

Plain modules without control flow on data, so that FX and the exporter trace them; each ReLU is a module of its own, so that
quantization can fuse it into the convolution before it.
"""

from __future__ import annotations

import torch
from torch import nn


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and a ReLU unless `relu=False`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (N, in, H, W) to (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.bn(self.conv(x))
        return y if self.relu is None else self.relu(y)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes.

    He, Zhang, Ren, Sun, "Deep residual learning for image recognition" (2015), arXiv 1512.03385.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNorm(in_channels, out_channels, stride=stride)
        self.second = ConvNorm(out_channels, out_channels, relu=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else ConvNorm(in_channels, out_channels, 1, stride=stride, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (N, in, H, W) to (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        beside = x if self.shortcut is None else self.shortcut(x)
        return self.relu(self.second(self.first(x)) + beside)  # type: ignore[no-any-return]


class Separable(nn.Module):
    """A depthwise 3×3 convolution and a pointwise one.

    Howard et al., "MobileNets" (2017), arXiv 1704.04861.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = ConvNorm(in_channels, in_channels, stride=stride, groups=in_channels)
        self.pointwise = ConvNorm(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (N, in, H, W) to (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return self.pointwise(self.depthwise(x))  # type: ignore[no-any-return]


class Inverted(nn.Module):
    """Widen by a pointwise convolution, depthwise 3×3, narrow again without ReLU; a shortcut where the shape stays.

    Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks" (2018), arXiv 1801.04381.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, expand: int = 4) -> None:
        super().__init__()
        wide = in_channels * expand
        self.expand = ConvNorm(in_channels, wide, 1)
        self.depthwise = ConvNorm(wide, wide, stride=stride, groups=wide)
        self.project = ConvNorm(wide, out_channels, 1, relu=False)
        self.same = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (N, in, H, W) to (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.same else y  # type: ignore[no-any-return]
