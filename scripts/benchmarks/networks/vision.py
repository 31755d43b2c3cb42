"""Pictures made, moved and recognized: generators, diffusion, super-resolution, flow, faces, computed weights, other forms in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.stranger import Inputs, Stranger, conv, normal, pictures


class Generator(nn.Module):
    """DCGAN: transposed convolutions from noise to a picture."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, s, p in ((32, 64, 1, 0), (64, 32, 2, 1), (32, 16, 2, 1)):
            layers += [nn.ConvTranspose2d(i, o, 4, s, p, bias=False), nn.BatchNorm2d(o), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(-1, 32, 1, 1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A diffusion U-Net's block: group norm, SiLU, a time embedding added per channel."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm1, self.conv1, self.time = nn.GroupNorm(4, i), nn.Conv2d(i, o, 3, padding=1), nn.Linear(32, o)
        self.norm2, self.conv2 = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))  # type: ignore[no-any-return]


class Diffusion(nn.Module):
    """A small denoising U-Net with a time of its own for each picture, and attention in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.stem, self.down, self.middle, self.up = (
            nn.Conv2d(3, 16, 3, padding=1),
            Residual(16, 32),
            Residual(32, 32),
            Residual(48, 16),
        )
        self.norm, self.qkv, self.out, self.head = (
            nn.GroupNorm(4, 32),
            nn.Conv2d(32, 96, 1),
            nn.Conv2d(32, 32, 1),
            nn.Conv2d(16, 3, 3, padding=1),
        )

    def attend(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, c, h * w).unbind(1)
        a = torch.softmax(q.transpose(1, 2) @ k * c**-0.5, -1)
        return x + self.out((v @ a.transpose(1, 2)).reshape(n, c, h, w))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(torch.arange(8, device=x.device) * -1.0)
        e = self.embed(torch.cat([angles.sin(), angles.cos()], -1))
        first = self.stem(x)
        h = self.attend(self.middle(F.avg_pool2d(self.down(first, e), 2), e))
        return self.head(self.up(torch.cat([F.interpolate(h, scale_factor=2.0), first], 1), e))  # type: ignore[no-any-return]


class SuperResolution(nn.Module):
    """ESPCN: pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2), nn.PReLU(32), nn.Conv2d(32, 32, 3, padding=1), nn.LeakyReLU(0.1)
        )
        self.head, self.shuffle = nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.head(self.body(x)))  # type: ignore[no-any-return]


class Flow(nn.Module):
    """Optical flow: one tower on two pictures, correlation by unfold, warping by grid_sample."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = (
            nn.Sequential(conv(3, 16, 3, 2), conv(16, 16, 3, 2)),
            nn.Sequential(conv(25, 32), nn.Conv2d(32, 2, 3, padding=1)),
        )

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        f, g = self.tower(a), self.tower(b)
        n, c, h, w = f.shape
        cost = (f[:, :, None] * F.unfold(g, 5, padding=2).view(n, c, 25, h, w)).mean(1)
        flow = self.head(cost)
        ys, xs = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        grid = torch.stack((xs, ys), -1)[None] + 0.1 * flow.permute(0, 2, 3, 1)
        return flow, F.grid_sample(g, grid, align_corners=True)


class ArcFace(nn.Module):
    """Face recognition: grouped convolutions, a batch norm, features of length 1, cosines with normalized classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 32, 3, 2, nn.PReLU), conv(32, 32, 3, 2, nn.PReLU, groups=32), conv(32, 64, 1, 1, nn.PReLU)
        )
        self.gdc, self.bn = nn.Conv2d(64, 64, 16, groups=64, bias=False), nn.BatchNorm2d(64)
        self.linear, self.classes = nn.Linear(64, 32), nn.Parameter(torch.randn(10, 32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(self.bn(self.gdc(self.body(x))).flatten(1))
        return 16 * F.linear(F.normalize(h), F.normalize(self.classes))


class Standardized(nn.Conv2d):
    """Big Transfer's convolution: the weight is standardized at each call."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BiT(nn.Module):
    """Standardized convolutions and group norms, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = Standardized(3, 16, 3, 2, 1), nn.GroupNorm(4, 16)
        self.conv, self.head = Standardized(16, 16, 3, 1, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.conv(F.relu(self.norm(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Auxiliary(nn.Module):
    """Another form in training: an auxiliary head beside the main one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(conv(3, 16, 3, 2), conv(16, 16, 3, 2)), conv(16, 32, 3, 2)
        self.aux, self.head = nn.Linear(16, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.a(x)
        y = self.head(self.b(h).mean((2, 3)))
        return (y, self.aux(h.mean((2, 3)))) if self.training else y


class Stn(nn.Module):
    """A spatial transformer before a small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 6))
        self.body = nn.Sequential(conv(1, 16, 3, 2), conv(16, 32, 3, 2), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        theta = torch.eye(2, 3)[None] + 0.1 * self.locate(x).view(-1, 2, 3)
        return self.body(F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False))  # type: ignore[no-any-return]


def video() -> nn.Module:
    """Three-dimensional convolutions."""
    return nn.Sequential(
        *(nn.Conv3d(3, 16, 3, 2, 1), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 32, 3, 2, 1), nn.BatchNorm3d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def _pair(n: int) -> Inputs:
    return (*pictures(32)(n), *pictures(32)(n))


def _noisy(n: int) -> Inputs:
    return (*pictures(32)(n), torch.rand(n))


def strangers() -> list[Stranger]:
    """All of them."""
    rows = [
        *(
            ("DCGAN generator", Generator, normal(32)),
            ("diffusion U-Net", Diffusion, _noisy),
            ("ESPCN", SuperResolution, pictures(32)),
        ),
        *(("optical flow", Flow, _pair), ("ArcFace-like", ArcFace, pictures(64)), ("BiT-like", BiT, pictures(64))),
        *(
            ("auxiliary head", Auxiliary, pictures(64)),
            ("spatial transformer", Stn, pictures(28, 1)),
            ("video", video, normal(3, 8, 32, 32)),
        ),
    ]
    return [Stranger(name=name, manner="vision", build=build, draw=draw) for name, build, draw in rows]
