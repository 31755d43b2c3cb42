"""Which channels belong together, in networks of every shape; what cannot shrink stays, and the report says why."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import torchopt
from torchopt.channels import count_macs, remove_channels, skipped_of

IMAGE, ROW, STEPS = torch.randn(2, 3, 16, 16), torch.randn(2, 8), torch.randn(2, 6, 8)
WORDS = torch.randint(0, 50, (2, 9))


class Net(nn.Module):
    """Modules by name, and a forward of one's own."""

    def __init__(self, forward, parameters=(), **modules):
        super().__init__()
        self.body = forward
        for name, module in modules.items():
            setattr(self, name, module)
        for name, shape in dict(parameters).items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.1))

    def forward(self, *inputs):
        return self.body(self, *inputs)


def twice(s, x):
    return s.head(s.conv(F.relu(s.conv(s.stem(x)))).mean((2, 3)))


def unet(s, x):
    a = F.relu(s.e1(x))
    up = s.up(F.relu(s.e2(F.max_pool2d(a, 2))))
    return s.out(F.relu(s.d(torch.cat([up, a], 1))))


def recurrent(s, x):
    return s.head(s.gru(s.lstm(F.relu(s.conv(x)).transpose(1, 2))[0])[0][:, -1])


def timm_block(s, x):
    b, n, _ = x.shape
    q, k, v = s.qkv(x).reshape(b, n, 3, s.num_heads, s.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return s.head(F.relu(s.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, s.attn_dim))))


def timm_attention():
    net = Net(timm_block, qkv=nn.Linear(8, 192), proj=nn.Linear(64, 32), head=nn.Linear(32, 3))
    net.num_heads, net.head_dim, net.attn_dim = 4, 16, 64
    return net


def old_vit_block(s, x):
    """Heads taken from the width of the embedding: neither can shrink alone."""
    x = s.embed(x)
    b, n, c = x.shape
    q, k, v = s.qkv(x).reshape(b, n, 3, s.num_heads, c // s.num_heads).permute(2, 0, 3, 1, 4)
    x = x + s.proj((q @ k.transpose(-2, -1) / 4).softmax(-1).matmul(v).transpose(1, 2).reshape(b, n, c))
    return s.head(s.norm(x))


def old_vit():
    net = Net(
        old_vit_block,
        embed=nn.Linear(8, 64),
        qkv=nn.Linear(64, 192),
        proj=nn.Linear(64, 64),
        norm=nn.LayerNorm(64),
        head=nn.Linear(64, 3),
    )
    net.num_heads = 4
    return net


def cbam(s, x):
    x = F.relu(s.conv(x))
    gate = torch.sigmoid(s.f2(F.relu(s.f1(x.mean((2, 3))))) + s.f2(F.relu(s.f1(x.amax((2, 3))))))
    x = x * gate[:, :, None, None]
    return s.out(x * torch.sigmoid(s.spatial(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1))))


def loop(s, x):
    y = F.relu(s.stem(x))
    for _ in range(3 if float(y.detach().sum()) > -1e9 else 1):  # control flow on data
        y = y + F.relu(s.conv(y))
    return s.out(y)


def mixer(s, x):
    y = s.patches(x).flatten(2).transpose(1, 2) + s.position
    y = y + s.t2(F.gelu(s.t1(y.transpose(1, 2)))).transpose(1, 2)
    return s.out(y * s.scale)


def aux(s, x):
    y = F.relu(s.a(x))
    out = s.out(F.relu(s.b(y)))
    return (out, s.aux_out(F.relu(s.aux(y)))) if s.training else out


C, L, S = nn.Conv2d, nn.Linear, nn.Sequential
NETS = {
    # name: (network, inputs, how many features are left at half: by layer)
    "module called twice": (
        lambda: Net(twice, stem=C(3, 32, 3), conv=C(32, 32, 3, padding=1), head=L(32, 5)),
        (IMAGE,),
        {"stem": 16, "conv": 16},
    ),
    "module on two inputs": (
        lambda: Net(lambda s, x: s.out(s.c(s.a(x)) + s.c(s.b(x))), a=C(3, 32, 3), b=C(3, 32, 3), c=C(32, 48, 1), out=C(48, 5, 1)),
        (IMAGE,),
        {"a": 16, "b": 16, "c": 24},
    ),
    "u-net": (
        lambda: Net(
            unet,
            e1=C(3, 16, 3, padding=1),
            e2=C(16, 32, 3, padding=1),
            up=nn.ConvTranspose2d(32, 16, 2, 2),
            d=C(32, 16, 3, padding=1),
            out=C(16, 2, 1),
        ),
        (IMAGE,),
        {"e1": 8, "e2": 16, "up": 8, "d": 8},
    ),
    "norms": (
        lambda: S(
            C(3, 32, 3),
            nn.GroupNorm(4, 32),
            nn.PReLU(32),
            C(32, 32, 3),
            nn.InstanceNorm2d(32, affine=True, track_running_stats=True),
            C(32, 32, 3),
            nn.GroupNorm(32, 32),
            C(32, 4, 1),
        ),
        (IMAGE,),
        {"0": 16, "3": 16, "5": 16},
    ),
    "norms without weights": (
        lambda: S(
            C(3, 32, 3),
            nn.GroupNorm(4, 32, affine=False),
            C(32, 32, 3),
            nn.BatchNorm2d(32, affine=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            L(32, 64),
            nn.LayerNorm(64, elementwise_affine=False),
            L(64, 4),
        ),
        (IMAGE,),
        {"0": 16, "2": 16, "6": 32},
    ),
    "LSTM and GRU": (
        lambda: Net(
            recurrent,
            conv=nn.Conv1d(4, 32, 3),
            lstm=nn.LSTM(32, 32, 2, batch_first=True, bidirectional=True),
            gru=nn.GRU(64, 32, batch_first=True),
            head=L(32, 3),
        ),
        (torch.randn(2, 4, 20),),
        {"conv": 16, "lstm": 16, "gru": 16},
    ),
    "LSTM with projection": (
        lambda: Net(lambda s, x: s.head(s.lstm(x)[0]), lstm=nn.LSTM(8, 32, proj_size=16, batch_first=True), head=L(16, 3)),
        (STEPS,),
        {"lstm": 16},
    ),
    "dicts in and out": (
        lambda: Net(lambda s, d: {"a": s.a(s.c(d["x"])), "b": [s.b(s.c(d["y"]))]}, c=C(3, 32, 3), a=C(32, 4, 1), b=C(32, 2, 1)),
        ({"x": IMAGE, "y": IMAGE},),
        {"c": 16, "a": 4, "b": 2},
    ),
    "pixel shuffle": (lambda: S(C(3, 64, 3), nn.PixelShuffle(2), C(16, 3, 3)), (IMAGE,), {"0": 32}),
    "channel shuffle": (
        lambda: S(C(3, 32, 1), nn.ChannelShuffle(4), C(32, 32, 3, groups=4), C(32, 4, 1)),
        (IMAGE,),
        {"0": 16, "2": 16},
    ),
    "flattened in one dimension": (
        lambda: S(nn.Conv1d(3, 32, 3), nn.Flatten(), L(32 * 18, 16), L(16, 4)),
        (torch.randn(2, 3, 20),),
        {"0": 16, "2": 8},
    ),
    "flattened in three": (
        lambda: S(nn.Conv3d(3, 32, 3), nn.Flatten(), L(32 * 216, 16), L(16, 4)),
        (torch.randn(2, 3, 8, 8, 8),),
        {"0": 16},
    ),
    "depthwise with a multiplier": (lambda: S(C(3, 16, 3), C(16, 32, 3, groups=16), C(32, 4, 1)), (IMAGE,), {"0": 8, "1": 16}),
    "grouped and transposed": (
        lambda: S(
            C(3, 32, 3),
            C(32, 64, 3, groups=8),
            nn.ConvTranspose2d(64, 32, 2, groups=4),
            nn.ConvTranspose2d(32, 32, 2, groups=32),
            C(32, 4, 1),
        ),
        (IMAGE,),
        {"0": 16, "1": 32, "2": 16, "3": 16},
    ),
    "weight norm": (
        lambda: S(nn.utils.parametrizations.weight_norm(C(3, 32, 3)), C(32, 64, 3), C(64, 4, 1)),
        (IMAGE,),
        {"0": 16, "1": 32},
    ),
    "weights used as functions": (
        lambda: Net(lambda s, x: s.out(F.relu(F.conv2d(s.a(x), s.w))), {"w": (24, 32, 3, 3)}, a=C(3, 32, 3), out=C(24, 4, 1)),
        (IMAGE,),
        {"a": 16, "out": 4},
    ),
    "gated": (lambda: S(C(3, 64, 3), nn.GLU(1), C(32, 4, 1)), (IMAGE,), {"0": 32}),
    "attention over channels and space": (
        lambda: Net(cbam, conv=C(3, 32, 3), f1=L(32, 16), f2=L(16, 32), spatial=C(2, 1, 3, padding=1), out=C(32, 4, 1)),
        (IMAGE,),
        {"conv": 16, "f1": 8},
    ),
    "softmax over channels": (lambda: S(L(8, 32), nn.Softmax(1), L(32, 4)), (ROW,), {"0": 16}),
    "unit vectors": (lambda: Net(lambda s, x: s.out(F.normalize(s.a(x), dim=1)), a=L(8, 32), out=L(32, 4)), (ROW,), {"a": 16}),
    "root mean square norm": (lambda: S(L(8, 32), nn.RMSNorm(32), L(32, 4)), (ROW,), {"0": 16}),
    "control flow": (
        lambda: Net(loop, stem=C(3, 32, 3), conv=C(32, 32, 3, padding=1), out=C(32, 4, 1)),
        (IMAGE,),
        {"stem": 16, "conv": 16},
    ),
    "padded shortcut": (
        lambda: Net(
            lambda s, x: s.out(s.b(s.a(x)) + F.pad(s.a(x), (0, 0, 0, 0, 8, 8))), a=C(3, 16, 3), b=C(16, 32, 1), out=C(32, 4, 1)
        ),
        (IMAGE,),
        {"a": 8, "b": 24},
    ),
    "token mixing": (
        lambda: Net(
            mixer, {"position": (1, 16, 32), "scale": (32,)}, patches=C(3, 32, 4, 4), t1=L(16, 32), t2=L(32, 16), out=L(32, 3)
        ),
        (IMAGE,),
        {"patches": 16, "t1": 16, "t2": 16},
    ),
    "vector to image": (
        lambda: S(L(8, 32 * 16), nn.Unflatten(1, (32, 4, 4)), nn.ConvTranspose2d(32, 3, 4, 2, 1)),
        (ROW,),
        {"0": 256},
    ),
    "embedding bag": (lambda: S(nn.EmbeddingBag(50, 32), L(32, 32), L(32, 3)), (WORDS,), {"1": 16}),
    "training-only head": (
        lambda: Net(aux, a=C(3, 32, 3), b=C(32, 32, 3), aux=C(32, 16, 1), aux_out=C(16, 4, 1), out=C(32, 4, 1)),
        (IMAGE[:1],),
        {"a": 16, "aux": 8},
    ),
    "fused queries, keys and values": (timm_attention, (STEPS,), {"qkv": 96, "proj": 16}),
    "heads as wide as the embedding": (old_vit, (STEPS,), {"embed": 32, "qkv": 96, "proj": 32}),
    "intermediate features": (
        lambda: Net(lambda s, x: [s.b(s.a(x)), s.c(s.b(s.a(x)))], a=C(3, 32, 3), b=C(32, 32, 3), c=C(32, 4, 1)),
        (IMAGE,),
        {"a": 16, "b": 32, "c": 4},
    ),
    "bfloat16": (lambda: S(C(3, 32, 3), nn.GroupNorm(4, 32), C(32, 4, 1)).bfloat16(), (IMAGE.bfloat16(),), {"0": 16}),
    "zeros as example": (lambda: S(C(3, 32, 3), nn.BatchNorm2d(32), C(32, 4, 1)), (torch.zeros_like(IMAGE),), {"0": 16}),
}


def width(module: nn.Module) -> int:
    sizes = ("out_channels", "out_features", "hidden_size")
    return next(getattr(module, name) for name in sizes if hasattr(module, name))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", NETS)
def test_networks_of_every_shape(name, tmp_path):
    """Half of each width goes; the network trains, and reloads into a freshly built one without pickle."""
    build, inputs, left = NETS[name]
    torch.manual_seed(0)
    model = build().eval()
    small = torchopt.shrink(model, inputs, ratio=0.5)
    assert {layer: width(small.get_submodule(layer)) for layer in left} == left
    torchopt.save(small, tmp_path / "s.safetensors")
    again = torchopt.load(tmp_path / "s.safetensors", build()).eval()
    for ours, theirs in zip(tree_leaves(small(*inputs)), tree_leaves(again(*inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    twice_the_batch = [torch.cat([x, x]) if isinstance(x, torch.Tensor) else x for x in inputs]
    sum(y.float().square().sum() for y in tree_leaves(small.train()(*twice_the_batch))).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())


def hard_slice(s, x):
    y = s.a(x)
    return s.out(s.b(torch.cat([y[:, :16] * 2, y[:, 16:]], 1)))


def written(s, x):
    a = s.a(x)
    y = torch.zeros(a.shape[0], 64, *a.shape[2:])
    y[:, :32], y[:, 32:] = a, s.b(x)
    return s.out(s.c(y))


KEPT = {
    "sliced at a fixed place": (
        lambda: Net(hard_slice, a=C(3, 32, 3), b=C(32, 32, 3), out=C(32, 4, 1)),
        (IMAGE,),
        "a",
        "what is computed from them does not follow",
    ),
    "split at fixed places": (
        lambda: Net(
            lambda s, x: s.out(torch.cat([s.b(torch.split(s.a(x), [8, 24], 1)[0]), torch.split(s.a(x), [8, 24], 1)[1]], 1)),
            a=C(3, 32, 3),
            b=C(8, 16, 1),
            out=C(40, 4, 1),
        ),
        (IMAGE,),
        "a",
        "the network does not run without some of them (split_with_sizes",
    ),
    "written into a tensor of fixed width": (
        lambda: Net(written, a=C(3, 32, 3), b=C(3, 32, 3), c=C(64, 32, 1), out=C(32, 4, 1)),
        (IMAGE,),
        "a",
        "the network does not run without some of them",
    ),
    "an operator that is not known": (
        lambda: Net(lambda s, x: s.out(s.b(torch.fft.rfft2(s.a(x)).abs())), a=C(3, 32, 3), b=C(32, 32, 1), out=C(32, 4, 1)),
        (IMAGE,),
        "a",
        "they go through the operator _fft_r2c",
    ),
    "a convolution over channels": (
        lambda: Net(
            lambda s, x: s.out(s.b(s.a(x) * s.eca(s.a(x).mean((2, 3))[:, None])[:, 0, :, None, None])),
            a=C(3, 32, 3),
            eca=nn.Conv1d(1, 1, 3, padding=1),
            b=C(32, 32, 1),
            out=C(32, 4, 1),
        ),
        (IMAGE,),
        "a",
        "they lie along a spatial axis in eca",
    ),
    "one output a group": (
        lambda: S(C(3, 32, 3), C(32, 8, 3, groups=8), C(8, 4, 1)),
        (IMAGE,),
        "1",
        "each is the only output of its group",
    ),
    "added to the input": (
        lambda: Net(lambda s, x: s.out(x + s.b(s.a(x))), a=L(8, 32), b=L(32, 8), out=L(8, 3)),
        (ROW,),
        "b",
        "they meet an axis of fixed length in the network",
    ),
    "hidden state of fixed width": (
        lambda: Net(
            lambda s, x: s.out(s.m(s.cell(x, torch.zeros(len(x), 32)))), cell=nn.GRUCell(8, 32), m=L(32, 32), out=L(32, 2)
        ),
        (ROW,),
        "cell",
        "the network does not run without some of them",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_shrink_stays_and_the_report_says_why(name):
    build, inputs, layer, reason = KEPT[name]
    torch.manual_seed(0)
    model = build().eval()
    small = torchopt.shrink(model, inputs, ratio=0.5)
    assert width(small.get_submodule(layer)) == width(model.get_submodule(layer))
    kept = {skip.name: skip.reason for skip in torchopt.report(small).skipped}
    assert kept[layer].startswith(f"keeps its channels: {reason}")
    assert f"left alone by shrink: {layer}: keeps its channels" in str(torchopt.report(small))
    assert count_macs(small, inputs)[0] < count_macs(model, inputs)[0]


def test_channels_behind_a_shuffle_that_the_code_repeats():
    """ShuffleNet: the branches shrink, what the shuffles tie together stays, and the network still runs."""
    torch.manual_seed(0)
    model = torchvision.models.ShuffleNetV2([2, 3, 2], [24, 48, 96, 192, 256]).eval()
    x = torch.randn(1, 3, 64, 64)
    ratios = {
        "stage3.1.branch2.3": 0.0,
        "stage3.2.branch2.0": 0.75,
    }  # a depthwise layer, a pointwise one: each of its whole group
    small = remove_channels(model, (x,), 0.5, round_to=2, ratios=ratios)
    branches = [small.stage2[1].branch2, small.stage3[1].branch2, small.stage3[2].branch2, small.stage4[1].branch2]
    assert [branch[0].out_channels for branch in branches] == [12, 48, 12, 48]
    assert [branch[3].groups for branch in branches] == [12, 48, 12, 48]
    whole, left = (count_macs(net, (x,))[0] for net in (model, remove_channels(model, (x,), 0.5, round_to=2)))
    assert left < 0.45 * whole


def test_tied_weights_are_cut_once_and_stay_tied():
    model = Net(
        lambda s, x: s.out(s.b(F.relu(s.a(s.e(x))))), e=nn.Embedding(50, 32), a=L(32, 64), b=L(64, 32), out=L(32, 50, bias=False)
    )
    model.out.weight = model.e.weight
    small = torchopt.shrink(model.eval(), (WORDS,), ratio=0.5)
    assert small.out.weight is small.e.weight
    assert small.e.weight.shape == (50, 16)
    assert (small.e.embedding_dim, small.out.in_features, small.a.out_features) == (16, 16, 32)


def test_an_addition_before_the_output_keeps_both_of_its_layers():
    model = Net(lambda s, x: s.a(s.stem(x)) + s.b(s.stem(x)), stem=L(8, 32), a=L(32, 16), b=L(32, 16)).eval()
    small = torchopt.shrink(model, (ROW,), ratio=0.5)
    assert (small.stem.out_features, small.a.out_features, small.b.out_features) == (16, 16, 16)
    assert skipped_of(small) == []  # what makes the outputs is no surprise
