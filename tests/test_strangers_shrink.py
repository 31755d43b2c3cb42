"""`shrink` on networks that other people write: randomness in forward, sizes remembered under any name, buffers that are not saved."""

import ast
import copy
import random
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import torchopt
from torchopt.channels import Channels, shrunken_of, skipped_of
from torchopt.channels.proved.fixed import held_still
from torchopt.io.importing import unnoticed

C, L, S = nn.Conv2d, nn.Linear, nn.Sequential
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
STEPS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2))


def built(build):
    torch.manual_seed(0)
    return build().eval()


def reloaded(small: nn.Module, build, tmp_path) -> nn.Module:
    torchopt.save(small, tmp_path / "small.safetensors")
    return torchopt.load(tmp_path / "small.safetensors", build()).eval()


class Scaled(nn.Module):
    """A buffer along the channels that is not in the state."""

    def __init__(self):
        super().__init__()
        self.a, self.b = C(3, 32, 3, padding=1), C(32, 5, 1)
        self.register_buffer("scale", torch.rand(1, 32, 1, 1) + 0.5, persistent=False)

    def forward(self, x):
        return self.b(F.relu(self.a(x)) * self.scale[:, : self.a.out_channels])


def test_a_buffer_that_is_not_saved_is_cut_and_stored(tmp_path):
    small = torchopt.shrink(built(Scaled), (IMAGE,), ratio=0.5)
    assert small.scale.shape == (1, 16, 1, 1)
    torch.testing.assert_close(reloaded(small, Scaled, tmp_path)(IMAGE), small(IMAGE), rtol=0, atol=0)


class Vae(nn.Module):
    def __init__(self, like=True):
        super().__init__()
        self.like = like
        self.encoder, self.mean, self.log_variance = S(L(8, 64), nn.ReLU()), L(64, 16), L(64, 16)
        self.decoder = S(L(16, 64), nn.ReLU(), L(64, 8))

    def forward(self, x):
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        noise = torch.randn_like(mean) if self.like else torch.randn(mean.shape)
        return self.decoder(mean + noise * (log_variance / 2).exp())


@pytest.mark.parametrize("like", [True, False])
def test_noise_in_forward_does_not_spoil_the_proof(like):
    small = torchopt.shrink(built(lambda: Vae(like)), (ROWS,), ratio=0.5)
    assert [small.encoder[0].out_features, small.mean.out_features, small.decoder[0].out_features] == [32, 8, 32]


def test_dropout_that_never_rests():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = L(8, 64), L(64, 64), L(64, 3)

        def forward(self, x):
            return self.c(F.relu(self.b(F.dropout(F.relu(self.a(x)), 0.5))))

    small = torchopt.shrink(built(Net), (ROWS,), ratio=0.5)
    assert (small.a.out_features, small.b.out_features) == (32, 32)


def test_noise_hides_no_wrong_cut():
    class Net(nn.Module):
        """Rows of a weight that code of one's own puts in another order: a right cut would have to follow."""

        def __init__(self):
            super().__init__()
            self.a, self.b = L(8, 32), L(32, 3)

        def forward(self, x):
            hidden = F.dropout(F.relu(self.a(x)), 0.3)
            return self.b(hidden[:, torch.arange(hidden.shape[1]).flip(0)]) + torch.randn(3)

    with pytest.raises(torchopt.ModelError, match="a keeps its channels: they are picked by number"):
        torchopt.shrink(built(Net), (ROWS,), ratio=0.5)


def test_draws_held_still_are_equal_at_any_width():
    def draw(width):
        with held_still():
            x = torch.zeros(2, width)
            noise = [torch.randn_like(x), torch.rand(2, width), torch.empty_like(x).uniform_(2, 3), torch.normal(x, 1.0)]
            likely, unlikely = torch.bernoulli(torch.tensor([0.2, 0.9])), F.dropout(torch.ones(width), 0.75)
            return (
                [float(n[0, 0]) for n in noise],
                [len(n.unique()) for n in noise],
                likely.tolist(),
                unlikely[0].item(),
                random.random(),
            )

    assert draw(4) == draw(32)
    assert draw(4)[1:4] == ([1, 1, 1, 1], [0.0, 1.0], 4.0)


def test_the_callers_random_state_stays():
    net, np_before = built(Vae), np.random.get_state()[1].copy()
    before, python = torch.get_rng_state(), random.getstate()
    torchopt.shrink(net, (ROWS,), ratio=0.5, importance="random")
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], np_before)


def test_a_random_choice_follows_its_seed():
    net = built(lambda: S(L(8, 64), nn.ReLU(), L(64, 3)))
    rows = [torchopt.shrink(net, (ROWS,), ratio=0.5, importance="random", seed=s)[0].weight for s in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_imports_go_unnoticed():
    state, filters = random.getstate(), list(warnings.filters)
    with unnoticed():
        random.random()
        warnings.simplefilter("ignore")
    assert (random.getstate() == state, warnings.filters == filters) == (True, True)
    tree = ast.parse(Path(torchopt.__file__).read_text(encoding="utf-8"))
    outside = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert outside == ["typing", "torchopt.errors", "torchopt.io.lazy"]  # which imports the others so


@pytest.mark.slow
def test_importing_leaves_the_process_as_it_was():
    code = (
        "import random, warnings, numpy, torch\n"
        "random.seed(0); numpy.random.seed(0)\n"
        "state, array, filters = random.getstate(), numpy.random.get_state()[1].copy(), list(warnings.filters)\n"
        "import torchopt\n"
        "print(random.getstate() == state, (numpy.random.get_state()[1] == array).all(), warnings.filters == filters)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]


class Attention(nn.Module):
    def __init__(self, key="num_heads", width=64, heads=4):
        super().__init__()
        self.key, self.each, self.wide = key, width // heads, width
        setattr(self, key, heads)
        self.embed, self.q, self.k, self.v, self.o = L(8, width), *(L(width, width) for _ in range(4))
        self.head = L(width, 3)

    def forward(self, x):
        x, heads = self.embed(x), getattr(self, self.key)
        q, k, v = (part(x).view(*x.shape[:2], heads, self.each).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = (q @ k.transpose(-2, -1) / self.each**0.5).softmax(-1) @ v
        return self.head(x + self.o(y.transpose(1, 2).reshape(*x.shape[:2], heads * self.each)))


@pytest.mark.parametrize("key", ["num_heads", "h", "nheads", "_H"])
def test_heads_are_found_under_any_name(key, tmp_path):
    small = torchopt.shrink(built(lambda: Attention(key)), (STEPS,), ratio=0.5)
    assert (getattr(small, key), small.each, small.q.out_features, small.embed.out_features) == (2, 16, 32, 32)
    assert [(skip.name, skip.reason[:14]) for skip in skipped_of(small)] == [("wide", "still says 64,")]
    torch.testing.assert_close(reloaded(small, lambda: Attention(key), tmp_path)(STEPS), small(STEPS), rtol=0, atol=0)


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = inputs, outputs, 3
        self.conv, self.norm = C(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


def test_sizes_of_a_block_follow_though_nothing_reads_them():
    small = torchopt.shrink(built(lambda: S(Block(3, 32), Block(32, 64), C(64, 5, 1))), (IMAGE,), ratio=0.5)
    assert [(b.in_channels, b.out_channels, b.kernel_size) for b in small[:2]] == [(3, 16, 3), (16, 32, 3)]


@dataclass
class Config:
    hidden_size: int = 64
    heads: int = 4
    window: int = 64


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.config, self.a, self.b, self.horizon = Config(), L(8, 64), L(64, 3), 64
        self.sizes = {"hidden": 64, "image_size": 64}

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def test_a_configuration_follows_and_what_only_has_the_same_value_is_named(tmp_path):
    small = torchopt.shrink(built(Configured), (ROWS,), ratio=0.5)
    assert (small.config, small.sizes) == (Config(32, 4, 64), {"hidden": 32, "image_size": 64})
    assert ([skip.name for skip in skipped_of(small)], small.horizon) == (["horizon"], 64)
    assert skipped_of(small)[0].reason.startswith("still says 64, and what was so wide is 32 now")
    again = reloaded(small, Configured, tmp_path)
    assert (again.config, again.sizes) == (small.config, small.sizes)


def test_padding_at_the_edges_of_a_picture_ties_no_channels():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = C(3, 32, 3), C(32, 5, 3, stride=2)

        def forward(self, x):
            return self.b(F.pad(F.relu(self.a(x)), (0, 1, 0, 1)))

    assert torchopt.shrink(built(Padded), (IMAGE,), ratio=0.5).a.out_channels == 16


def test_a_blur_kernel_stretched_over_the_channels_ties_nothing():
    class Blurred(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = C(3, 32, 3), C(32, 5, 1)
            self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(F.conv2d(y, self.kernel.expand(y.shape[1], 1, 3, 3), groups=y.shape[1]))

    assert torchopt.shrink(built(Blurred), (IMAGE,), ratio=0.5).a.out_channels == 16


def test_batch_norm_over_weights_or_nodes_sees_the_channels_that_are_left():
    class Standardized(C):
        def forward(self, x):
            weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias)

    small = torchopt.shrink(
        built(lambda: S(Standardized(3, 32, 3), nn.ReLU(), Standardized(32, 64, 3), nn.ReLU(), C(64, 5, 1))), (IMAGE,), ratio=0.5
    )
    assert (small[0].out_channels, small[2].out_channels) == (16, 32)
    nodes = built(lambda: S(L(8, 32), nn.BatchNorm1d(6), L(32, 3)))
    assert torchopt.shrink(nodes, (STEPS,), ratio=0.5)[0].out_features == 16


class Graph(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c, self.how = L(8, 32), L(32, 32), L(32, 3), how

    def forward(self, x, ends):
        for layer in (self.a, self.b):
            sent = layer(x)[ends[0]]
            still = torch.zeros(len(x), sent.shape[1])
            if self.how == "index_add":
                x = still.index_add(0, ends[1], sent)
            else:
                x = still.scatter_add(0, ends[1][:, None].expand_as(sent), sent)
            x = F.relu(x)
        return self.c(x)


@pytest.mark.parametrize("how", ["index_add", "scatter_add"])
def test_graph_networks_sum_messages_at_their_nodes(how):
    ends = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    small = torchopt.shrink(built(lambda: Graph(how)), (ROWS, ends), ratio=0.5)
    assert (small.a.out_features, small.b.out_features) == (16, 16)


def test_experts_and_masked_steps():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.head, self.mask = L(8, 4), L(32, 3), nn.Parameter(torch.randn(32))
            self.experts = nn.ModuleList(S(L(8, 64), nn.ReLU(), L(64, 32)) for _ in range(4))

        def forward(self, x):
            scores, chosen = self.router(x).softmax(-1).topk(2, -1)
            made = torch.stack([expert(x) for expert in self.experts], 1)
            made = made.gather(1, chosen[..., None].expand(-1, -1, made.shape[-1])) * scores[..., None]
            made[torch.arange(8).view(4, 2) == 3] = self.mask
            return self.head(made.sum(1))

    small = torchopt.shrink(built(Experts), (ROWS,), ratio=0.5)
    assert [(e[0].out_features, e[2].out_features) for e in small.experts] == [(32, 16)] * 4
    assert (small.mask.shape, small.router.out_features) == ((16,), 4)


class Split(nn.Module):
    """Half of the channels go on as they are, as in detectors."""

    def __init__(self, how, width=32):
        super().__init__()
        self.c, self.how = width // 2, how
        self.first, self.middle = C(width, width, 1), C(width // 2, width // 2, 3, padding=1)
        self.last = C(width // 2 * 3, width, 1)

    def forward(self, x):
        y = self.first(x)
        parts = {"chunk": lambda: y.chunk(2, 1), "pair": lambda: y.split((self.c, self.c), 1), "one": lambda: y.split(self.c, 1)}
        kept = list(parts[self.how]())
        return self.last(torch.cat([*kept, F.relu(self.middle(kept[-1]))], 1))


@pytest.mark.parametrize("how", ["chunk", "pair", "one"])
def test_a_split_by_a_remembered_size_shrinks_as_a_chunk_does(how, tmp_path):
    build = lambda: S(C(3, 32, 3), Split(how), Split(how), C(32, 5, 1))
    small = torchopt.shrink(built(build), (IMAGE,), ratio=0.5)
    assert [small[i].first.weight.shape[:2] for i in (1, 2)] == [(16, 16), (16, 16)]
    assert [small[i].last.in_channels for i in (1, 2)] == [24, 24]
    assert (small[1].c, skipped_of(small)) == (8, [])
    torch.testing.assert_close(reloaded(small, build, tmp_path)(IMAGE), small(IMAGE), rtol=0, atol=0)


class Fixed(nn.Module):
    """Code that says how wide it is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = C(3, 32, 1), C(16, 5, 1)

    def forward(self, x):
        return self.b(self.a(x)[:, :16] * torch.arange(1.0, 17)[:, None, None] + self.a(x)[:, 16:32].view(-1, 16, *x.shape[2:]))


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = S(C(3, 32, 3, padding=1), Split("chunk"), C(32, 5, 1)), Fixed()

    def forward(self, x):
        return self.left(x) + self.right(x)


def test_a_chunk_shrinks_beside_an_unrelated_layer_of_the_same_width():
    """Ranked together the halves lose different numbers of channels, so they must be tied; the fixed layer must not be in the tie."""
    net = built(Beside)
    with torch.no_grad():
        net.left[1].first.weight[:16] *= 0.1
    small = torchopt.shrink(net, (IMAGE,), ratio=0.25, global_ranking=True, round_to=4)
    assert small.left[1].first.out_channels < 32
    assert small.right.a.out_channels == 32


def test_arguments_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = L(8, 64), L(64, 3)

        def forward(self, *, x, shift=None):
            return self.b(F.relu(self.a(x))) + shift

    net, examples = built(Named), {"x": ROWS, "shift": torch.randn(4, 3)}
    assert torchopt.shrink(net, examples, ratio=0.5).a.out_features == 32
    assert torchopt.shrink(net, examples, max_macs=2000).a.out_features == 40
    with pytest.raises(torchopt.DataError, match="arguments by name are given as a dict"):
        torchopt.shrink(net, (ROWS,), ratio=0.5)
    with pytest.raises(torchopt.DataError, match="the example inputs are str; a tuple of positional arguments, or a dict"):
        torchopt.shrink(net, "x", ratio=0.5)


def test_taylor_with_a_frozen_stem():
    net = built(lambda: S(L(8, 32), nn.ReLU(), L(32, 32), nn.ReLU(), L(32, 3)))
    net[0].requires_grad_(False)
    net(ROWS).square().sum().backward()
    small = torchopt.shrink(net, (ROWS,), ratio=0.5, importance="taylor")
    assert (small[0].out_features, small[2].out_features) == (16, 16)
    net[2].weight.grad[0, 0] = float("inf")
    with pytest.raises(torchopt.StateError, match=r"that of 2\.weight holds NaN or infinity; take one from a step"):
        torchopt.shrink(net, (ROWS,), ratio=0.5, importance="taylor")


def test_ratios_by_layer_and_what_the_report_says(tmp_path):
    build = lambda: S(C(3, 32, 3), nn.ReLU(), C(32, 32, 3), nn.ReLU(), C(32, 64, 3), nn.ReLU(), C(64, 3, 1))
    net = built(build)
    small = torchopt.shrink(net, (IMAGE,), ratio={"2": 0.5, "[24]": 0.25})
    assert [m.out_channels for m in small if isinstance(m, C)] == [32, 16, 48, 3]
    found = torchopt.report(small).shrunken
    assert found.widths == {"2": (32, 16), "4": (64, 48)}
    assert found.macs == (
        2 * (27 * 32 * 36 + 288 * 32 * 16 + 288 * 64 * 4 + 64 * 3 * 4),
        2 * (27 * 32 * 36 + 288 * 16 * 16 + 144 * 48 * 4 + 48 * 3 * 4),
    )
    assert f"shrunken: {found.macs[0]:,} → {found.macs[1]:,} multiply-adds" in str(torchopt.report(small))
    assert torchopt.report(reloaded(small, build, tmp_path)).to_dict()["shrunken"] == found.to_dict()
    twice = torchopt.shrink(small, (IMAGE,), ratio={"2": 0.5})
    assert shrunken_of(twice).widths == {"2": (32, 8), "4": (64, 48)}
    for bad, message in (
        ({}, "at least one glob"),
        ({"2": 1.0}, r"ratio\['2'\]=1.0; a fraction of channels in \[0, 1\)"),
    ):
        with pytest.raises(torchopt.ConfigError, match=message):
            torchopt.shrink(net, (IMAGE,), ratio=bad)
    with pytest.raises(torchopt.ConfigError, match="ratio by layer with global_ranking"):
        torchopt.shrink(net, (IMAGE,), ratio={"2": 0.5}, global_ranking=True)
    with pytest.raises(torchopt.RuleError, match="ratio names 'layer3.*', which matches no layer"):
        torchopt.shrink(net, (IMAGE,), ratio={"layer3.*": 0.5})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [spectral_norm, weight_norm, torch.nn.utils.spectral_norm, torch.nn.utils.weight_norm])
def test_weights_computed_from_others_shrink(norm, tmp_path):
    build = lambda: S(norm(C(3, 32, 3)), nn.ReLU(), norm(C(32, 32, 3)), nn.ReLU(), C(32, 3, 1))
    net = built(build)
    small = torchopt.shrink(net, (IMAGE,), ratio=0.5)
    assert [small[i].out_channels for i in (0, 2)] == [16, 16]
    assert small(IMAGE).shape == net(IMAGE).shape
    torch.testing.assert_close(reloaded(small, build, tmp_path)(IMAGE), small(IMAGE), rtol=0, atol=0)


def test_ranks_do_not_shrink_each_their_own():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(S(L(8, 32), L(32, 3)))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(
        torchopt.ModelError, match="wrapped in DistributedDataParallel; shrink model.module in every process before"
    ):
        torchopt.shrink(wrapped, (ROWS,), ratio=0.5)


def test_outputs_in_an_object_of_ones_own_keep_their_width():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = L(8, 64), L(64, 16)

        def forward(self, x):
            return SimpleNamespace(hidden=[self.b(F.relu(self.a(x)))])

    small = torchopt.shrink(built(Net), (ROWS,), ratio=0.5)
    assert (small.a.out_features, small.b.out_features) == (32, 16)


def test_a_network_that_shows_nothing_is_refused():
    dead = built(lambda: S(L(8, 32), nn.ReLU(), L(32, 3), nn.Threshold(1e9, 0.0)))
    with pytest.raises(torchopt.DataError, match="every output of the network is zero or NaN, so that no cut can be proved"):
        torchopt.shrink(dead, (ROWS,), ratio=0.5)

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = L(8, 64), L(64, 16)

        def forward(self, x):
            self.b(self.a(x))

    with pytest.raises(torchopt.ModelError, match="Silent returns no tensor, so that no cut can be proved"):
        torchopt.shrink(built(Silent), (ROWS,), ratio=0.5)


def test_a_network_that_computes_something_else_in_training_is_proved_there_too():
    class Net(nn.Module):
        """In training, the hidden channels are read in another order."""

        def __init__(self):
            super().__init__()
            self.a, self.b = L(8, 32), L(32, 3)

        def forward(self, x):
            hidden = F.relu(self.a(x))
            return self.b(hidden @ torch.eye(hidden.shape[1]).flip(0) if self.training else hidden)

    with pytest.raises(torchopt.ModelError, match="in training mode, what is computed from them does not follow"):
        torchopt.shrink(built(Net), (ROWS,), ratio=0.5)


def test_complex_and_whole_outputs_are_compared():
    class Net(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.a, self.b, self.wrong = L(8, 64), L(64, 16), wrong

        def forward(self, x):
            hidden = F.relu(self.a(x))
            y = self.b(hidden)
            extra = hidden.shape[1] if self.wrong else 64
            return torch.fft.rfft(y) * extra, y.argmax(1)

    assert torchopt.shrink(built(lambda: Net(False)), (ROWS,), ratio=0.5).a.out_features == 32
    with pytest.raises(torchopt.ModelError, match="no channel of Net can be removed"):
        torchopt.shrink(built(lambda: Net(True)), (ROWS,), ratio=0.5)


def test_a_copy_of_the_caller_is_left_alone():
    net = built(Attention)
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Channels(net, (STEPS,)).without(0.5)
    assert net.num_heads == 4
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
