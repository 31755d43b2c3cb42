"""Sound, text and sensors: recurrent, causal and attending networks in the manner of speech and language code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm

from networks.stranger import Inputs, Stranger, normal, tokens


class CRNN(nn.Module):
    """Text in pictures: convolutions, then a bidirectional LSTM over columns."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU()),
            nn.MaxPool2d((2, 1), (2, 1)),
        )
        self.rnn, self.head = nn.LSTM(32 * 4, 32, bidirectional=True, batch_first=True), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return self.head(self.rnn(h.permute(0, 3, 1, 2).flatten(2))[0])  # type: ignore[no-any-return]


class Wav2Vec(nn.Module):
    """A raw-audio encoder: strided convolutions, group norm, GELU, a positional convolution, a transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, 32, 10, 5), nn.GroupNorm(32, 32), nn.GELU(), nn.Conv1d(32, 32, 3, 2), nn.GELU())
        self.position, self.norm = weight_norm(nn.Conv1d(32, 32, 16, padding=8, groups=4)), nn.LayerNorm(32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x[:, None])
        h = h + F.gelu(self.position(h)[:, :, :-1])
        return self.layer(self.norm(h.transpose(1, 2)))  # type: ignore[no-any-return]


class Causal(nn.Module):
    """Bai et al. 2018: dilated convolutions padded on both sides and cut, so that no output sees what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(i, 16, 3, padding=2 * d, dilation=d) for i, d in ((4, 1), (16, 2), (16, 4))])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.convs):
            x = F.relu(layer(x)[:, :, : -2 * 2**i])
        return self.head(x[:, :, -1])  # type: ignore[no-any-return]


class WaveNet(nn.Module):
    """Gated dilated convolutions under weight norm, skips summed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 1)
        self.gates = nn.ModuleList([weight_norm(nn.Conv1d(16, 32, 2, dilation=2**i)) for i in range(3)])
        self.outs = nn.ModuleList([nn.Conv1d(16, 16, 1) for _ in range(3)])
        self.head = nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), 0.0
        for i, (gate, out) in enumerate(zip(self.gates, self.outs)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            h = torch.tanh(a) * torch.sigmoid(b)
            x, skips = x + out(h), skips + h
        return self.head(F.relu(skips))  # type: ignore[no-any-return]


class Transducer(nn.Module):
    """RNN-T: an encoder, a predictor of tokens, and a joint network over both times."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.embed, self.predictor = (
            nn.LSTM(16, 32, batch_first=True),
            nn.Embedding(20, 16),
            nn.GRU(16, 32, batch_first=True),
        )
        self.a, self.b, self.joint = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 20)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h, g = self.a(self.encoder(x)[0]), self.b(self.predictor(self.embed(y))[0])
        return self.joint(torch.tanh(h[:, :, None] + g[:, None]))  # type: ignore[no-any-return]


class Conformer(nn.Module):
    """Gulati et al. 2020: half feed-forward steps, attention, a gated depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.n1, self.n2, self.n3 = nn.Linear(20, 32), nn.LayerNorm(32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.ff = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.inner, self.depth, self.bn, self.outer = (
            nn.Conv1d(32, 64, 1),
            nn.Conv1d(32, 32, 7, padding=3, groups=32),
            nn.BatchNorm1d(32),
            nn.Conv1d(32, 32, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        x = x + 0.5 * self.ff(self.n1(x))
        h = self.n2(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        h = F.glu(self.inner(self.n3(x).transpose(1, 2)), dim=1)
        return x + self.outer(F.silu(self.bn(self.depth(h)))).transpose(1, 2)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A GPT in the manner of nanoGPT: a causal mask in a buffer, tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.n1, self.n2, self.nf = (
            nn.Embedding(60, 32),
            nn.Embedding(32, 32),
            nn.LayerNorm(32),
            nn.LayerNorm(32),
            nn.LayerNorm(32),
        )
        self.qkv, self.out, self.fc, self.proj = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 128), nn.Linear(128, 32)
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.full((32, 32), float("-inf")).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        n, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t, device=ids.device))
        q, k, v = (p.view(n, t, 4, 8).transpose(1, 2) for p in self.qkv(self.n1(x)).split(32, dim=2))
        a = (q @ k.transpose(-2, -1)) * 8**-0.5 + self.mask[:t, :t]
        x = x + self.out((a.softmax(-1) @ v).transpose(1, 2).reshape(n, t, 32))
        return self.head(self.nf(x + self.proj(F.gelu(self.fc(self.n2(x))))))  # type: ignore[no-any-return]


class Seq2Seq(nn.Module):
    """GRU cells unrolled over time with additive attention."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell = nn.GRU(8, 32, batch_first=True), nn.GRUCell(40, 32)
        self.query, self.key, self.score, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 1), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        memory, h = self.encoder(x)
        h, y, found = h[0], x[:, -1], []
        for _ in range(3):
            a = self.score(torch.tanh(self.query(h)[:, None] + self.key(memory))).softmax(1)
            h = self.cell(torch.cat([y, (a * memory).sum(1)], -1), h)
            y = self.head(h)
            found.append(y)
        return torch.stack(found, 1)


class Projected(nn.Module):
    """A language model with projected LSTM states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(50, 16), nn.LSTM(16, 32, proj_size=8, batch_first=True), nn.Linear(8, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])  # type: ignore[no-any-return]


def keyword() -> nn.Module:
    """DS-CNN, as in MLPerf Tiny."""

    def block(i: int, o: int) -> list[nn.Module]:
        depth = [nn.Conv2d(i, i, 3, 1, 1, groups=i), nn.BatchNorm2d(i), nn.ReLU()]
        return [*depth, nn.Conv2d(i, o, 1), nn.BatchNorm2d(o), nn.ReLU()]

    stem = [nn.Conv2d(1, 32, (10, 4), (2, 2), (5, 1)), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*stem, *block(32, 32), *block(32, 32), nn.AvgPool2d((25, 5)), nn.Flatten(), nn.Linear(32, 12))


def _transducer(n: int) -> Inputs:
    return torch.randn(n, 10, 16), torch.randint(0, 20, (n, 4))


def strangers() -> list[Stranger]:
    """All of them."""
    rows = [
        *(("CRNN", CRNN, normal(1, 16, 32)), ("wav2vec-like", Wav2Vec, normal(800)), ("causal TCN", Causal, normal(4, 32))),
        *(("WaveNet-like", WaveNet, normal(1, 32)), ("RNN-T", Transducer, _transducer)),
        *(("Conformer block", Conformer, normal(24, 20)), ("GPT, tied, causal", Decoder, tokens(16, 60))),
        *(("seq2seq of cells", Seq2Seq, normal(10, 8)), ("LSTM, projected", Projected, tokens(12, 50))),
        ("DS-CNN", keyword, normal(1, 49, 10)),
    ]
    return [Stranger(name=name, manner="sequences", build=build, draw=draw) for name, build, draw in rows]
