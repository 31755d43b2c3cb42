"""Tables, graphs, fields, flows, towers: networks whose inputs are no pictures and whose layers are shared, tied or made by others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.stranger import Inputs, Stranger, normal


class Nerf(nn.Module):
    """Mildenhall et al. 2020: sines of the position, a skip in the middle, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(27, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(91, 64), nn.ReLU())
        self.density, self.color = nn.Linear(64, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        waves = [f(2.0**i * x) for i in range(4) for f in (torch.sin, torch.cos)]
        e = torch.cat([x, *waves], -1)
        h = self.second(torch.cat([self.first(e), e], -1))
        return torch.sigmoid(self.color(h)), F.softplus(self.density(h))


class Siren(nn.Module):
    """Sitzmann et al. 2020: sines between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(2, 64), nn.Linear(64, 64)]), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.sin((10.0 if i == 0 else 1.0) * layer(x))
        return self.head(x)  # type: ignore[no-any-return]


class GraphConvolution(nn.Module):
    """Kipf and Welling 2017 on a dense adjacency, batch norm over the nodes' axis as it is often written."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.BatchNorm1d(10), nn.Linear(32, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(adjacency @ x)))
        return self.head(F.elu(self.b(adjacency @ x)).mean(1))  # type: ignore[no-any-return]


class MessagePassing(nn.Module):
    """Nodes and edge indices, with no batch in front: gather, transform, scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.head = nn.Linear(16, 32), nn.Linear(40, 32), nn.Linear(32, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        m = F.relu(self.message(torch.cat([nodes[source], nodes[target]], -1)))
        summed = torch.zeros(nodes.shape[0], 32).index_add(0, target, m)
        return self.head(F.relu(self.update(torch.cat([nodes, summed], -1))))  # type: ignore[no-any-return]


class GraphAttention(nn.Module):
    """Veličković et al. 2018 on a dense mask."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.left, self.right, self.head = nn.Linear(8, 32), nn.Linear(32, 1), nn.Linear(32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.w(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).transpose(1, 2), 0.2)
        scores = scores.masked_fill(adjacency < 0.3, -1e9)
        return self.head(F.elu(scores.softmax(-1) @ h).mean(1))  # type: ignore[no-any-return]


class PointNet(nn.Module):
    """Qi et al. 2017: one network on every point, a maximum over points, a learned transformation."""

    def __init__(self) -> None:
        super().__init__()
        self.tnet = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 9))
        self.body = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1), nn.BatchNorm1d(64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        t = self.tnet(x).view(-1, 3, 3) + torch.eye(3)
        return self.head(torch.max(self.body(torch.bmm(t, x)), 2)[0])  # type: ignore[no-any-return]


class Recommender(nn.Module):
    """DLRM: bags of embeddings, a tower for numbers, products of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList([nn.EmbeddingBag(30, 16, mode="sum") for _ in range(3)])
        self.bottom = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(22, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
        x = self.bottom(numbers)
        z = torch.stack([x, *(bag(kinds[:, 4 * i : 4 * i + 4]) for i, bag in enumerate(self.bags))], 1)
        rows, columns = torch.triu_indices(4, 4, 1)
        pairs = (z @ z.transpose(1, 2))[:, rows, columns]
        return torch.sigmoid(self.top(torch.cat([x, pairs], 1)))


class Siamese(nn.Module):
    """One tower, two inputs, a distance."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)),
        )
        self.head = nn.Linear(16, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.tower(a) - self.tower(b)).abs())  # type: ignore[no-any-return]


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 8)
        self.biases = nn.ParameterList([torch.zeros(32), torch.zeros(64)])

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(F.relu(self.a(x)))
        return F.linear(F.relu(F.linear(z, self.b.weight.t(), self.biases[0])), self.a.weight.t(), self.biases[1])


class Variational(nn.Module):
    """A variational autoencoder: noise is drawn in forward while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.log = nn.Sequential(nn.Linear(64, 48), nn.ReLU()), nn.Linear(48, 8), nn.Linear(48, 8)
        self.decode = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encode(x)
        mean, log = self.mean(h), self.log(h)
        z = mean + torch.exp(0.5 * log) * torch.randn_like(mean) if self.training else mean
        return self.decode(z), mean, log


class Coupling(nn.Module):
    """RealNVP: each half scales and shifts the other, channels turned between."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log = x.new_zeros(x.shape[0])
        for net in self.nets:
            a, b = x.chunk(2, 1)
            s, t = net(a).chunk(2, 1)
            s = torch.tanh(s)
            x, log = torch.cat([b * s.exp() + t, a], 1), log + s.sum(1)
        return x, log


class Experts(nn.Module):
    """A mixture of four experts, weighed by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return (self.gate(x).softmax(-1)[:, :, None] * torch.stack([e(x) for e in self.experts], 1)).sum(1)


class Hyper(nn.Module):
    """A network whose weight is another network's output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.maker, self.head = nn.Linear(16, 8), nn.Linear(4, 64), nn.Linear(8, 3)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        w = self.maker(c).view(-1, 8, 8)
        return self.head(F.relu(torch.bmm(w, self.body(x)[:, :, None])[:, :, 0]))  # type: ignore[no-any-return]


class Mask(nn.Module):
    """An optional second argument, given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(8, 32), nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        h = h if mask is None else h * mask[:, :, None]
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]


def _graph(n: int) -> Inputs:
    a = torch.rand(n, 10, 10)
    return torch.randn(n, 10, 8), a / a.sum(-1, keepdim=True) if n else a


def _edges(_: int) -> Inputs:
    return torch.randn(12, 8), torch.randint(0, 12, (2, 30))


def strangers() -> list[Stranger]:
    """All of them."""
    rows = [
        *(("NeRF", Nerf, normal(3)), ("SIREN", Siren, lambda n: (torch.rand(n, 2) * 2 - 1,)), ("GCN", GraphConvolution, _graph)),
        *(
            ("message passing", MessagePassing, _edges),
            ("GAT", GraphAttention, lambda n: (torch.randn(n, 10, 8), torch.rand(n, 10, 10))),
        ),
        ("PointNet", PointNet, normal(3, 64)),
        ("DLRM", Recommender, lambda n: (torch.randn(n, 6), torch.randint(0, 30, (n, 12)))),
        ("siamese", Siamese, lambda n: (torch.randn(n, 1, 28, 28), torch.randn(n, 1, 28, 28))),
        *(("tied autoencoder", Tied, normal(64)), ("VAE", Variational, normal(64)), ("RealNVP", Coupling, normal(16))),
        *(
            ("mixture of experts", Experts, normal(16)),
            ("hypernetwork", Hyper, lambda n: (torch.randn(n, 16), torch.randn(n, 4))),
        ),
        ("optional mask", Mask, lambda n: (torch.randn(n, 6, 8), (torch.rand(n, 6) > 0.3).float())),
    ]
    return [
        Stranger(name=name, manner="others", build=build, draw=draw, batched=build is not MessagePassing)
        for name, build, draw in rows
    ]
