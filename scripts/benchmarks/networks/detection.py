"""Segmentation and detection: skips, pyramids, heads shared over levels, learned queries, several outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.stranger import Stranger, conv, pictures


class UNet(nn.Module):
    """Ronneberger et al. 2015: skips by concatenation, transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Sequential(conv(i, o), conv(o, o)) for i, o in ((3, 16), (16, 32), (32, 64))])
        self.up = nn.ModuleList([nn.ConvTranspose2d(i, o, 2, 2) for i, o in ((64, 32), (32, 16))])
        self.mix = nn.ModuleList([nn.Sequential(conv(i, o), conv(o, o)) for i, o in ((64, 32), (32, 16))])
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down[:-1]:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for up, mix in zip(self.up, self.mix):
            x = mix(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


class CSP(nn.Module):
    """ultralytics' C2f: a chunk, bottlenecks, all parts concatenated."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(i, o, 1, activation=nn.SiLU), conv(3 * o // 2, o, 1, activation=nn.SiLU)
        self.m = nn.ModuleList(
            [nn.Sequential(conv(o // 2, o // 2, activation=nn.SiLU), conv(o // 2, o // 2, activation=nn.SiLU))]
        )

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))  # type: ignore[no-any-return]


class Yolo(nn.Module):
    """A YOLO: three levels, spatial pyramid pooling, upsampling, one output a level."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3, 2, nn.SiLU), conv(16, 32, 3, 2, nn.SiLU), CSP(32, 32))
        self.p4 = nn.Sequential(conv(32, 64, 3, 2, nn.SiLU), CSP(64, 64))
        self.squeeze, self.pool, self.sppf = (
            conv(64, 32, 1, activation=nn.SiLU),
            nn.MaxPool2d(5, 1, 2),
            conv(128, 64, 1, activation=nn.SiLU),
        )
        self.up, self.neck = nn.Upsample(scale_factor=2, mode="nearest"), CSP(96, 32)
        self.heads = nn.ModuleList([nn.Conv2d(32, 18, 1), nn.Conv2d(64, 18, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p3 = self.stem(x)
        p4 = self.squeeze(self.p4(p3))
        a = self.pool(p4)
        b = self.pool(a)
        p4 = self.sppf(torch.cat((p4, a, b, self.pool(b)), 1))
        p3 = self.neck(torch.cat((self.up(p4), p3), 1))
        return self.heads[0](p3), self.heads[1](p4)


class RetinaNet(nn.Module):
    """A feature pyramid whose head, convolutions and batch norms, is shared over three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 16, 3, 4), conv(16, 32, 3, 2), conv(32, 64, 3, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(c, 32, 1) for c in (16, 32, 64)])
        self.head = nn.Sequential(conv(32, 32), conv(32, 32), nn.Conv2d(32, 12, 3, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        levels = [self.lateral[2](found[2])]
        for i in (1, 0):
            levels.append(self.lateral[i](found[i]) + F.interpolate(levels[-1], size=found[i].shape[-2:], mode="nearest"))
        return [self.head(level) for level in levels]


class DeepLab(nn.Module):
    """Atrous spatial pyramid pooling with a global branch that is resized bilinearly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2))
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(32, 16, 3, padding=d, dilation=d), nn.ReLU()) for d in (1, 2, 4)])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 16, 1), nn.ReLU())
        self.project, self.head = conv(64, 32, 1), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, x = x.shape[-2:], self.stem(x)
        parts = [b(x) for b in self.branches] + [
            F.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        ]
        return F.interpolate(self.head(self.project(torch.cat(parts, 1))), size=size, mode="bilinear", align_corners=False)


class Detr(nn.Module):
    """Carion et al. 2020: a transformer decoder over learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.project = nn.Sequential(conv(3, 16, 3, 4), conv(16, 32, 3, 4)), nn.Conv2d(32, 32, 1)
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
        self.queries, self.position = nn.Parameter(torch.rand(8, 32)), nn.Parameter(torch.rand(16, 32))
        self.classes, self.boxes = nn.Linear(32, 6), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.project(self.backbone(x)).flatten(2).transpose(1, 2)
        h = self.transformer(h + self.position, self.queries.expand(x.shape[0], -1, -1))
        return {"pred_logits": self.classes(h), "pred_boxes": self.boxes(h).sigmoid()}


def strangers() -> list[Stranger]:
    """All of them."""
    kinds = {"U-Net": UNet, "YOLO-like": Yolo, "RetinaNet-like": RetinaNet, "DeepLab-like": DeepLab, "DETR-like": Detr}
    return [Stranger(name=name, manner="detection", build=build, draw=pictures(64)) for name, build in kinds.items()]
