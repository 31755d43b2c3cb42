"""The eight cases mask × table × scale obey the same laws, on every layer kind, joint and successive."""

import copy
import itertools

import pytest
import torch
from torch import nn

import torchopt
from torchopt.network.weights import find_weight

K = 4
SPARSITY = 0.5
CASES = list(itertools.product((False, True), repeat=3))
NAMES = ["+".join(n for n, on in zip(("mask", "table", "scale"), case) if on) or "nothing" for case in CASES]


class Tokens(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(32, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, kind: type[nn.RNNBase], **options) -> None:
        super().__init__()
        self.layer = kind(8, 16, batch_first=True, **options)
        self.head = nn.Linear(16 * (1 + self.layer.bidirectional), 3)

    def forward(self, x):
        return self.head(self.layer(x)[0].mean(1))


class Tied(nn.Module):
    """An embedding whose weight the output layer uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(32, 16)
        self.middle = nn.Linear(16, 16)
        self.output = nn.Linear(16, 32, bias=False)
        self.output.weight = self.layer.weight

    def forward(self, x):
        return self.output(torch.relu(self.middle(self.layer(x)))).mean(1)


class Twice(nn.Module):
    """A module that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))


class Attention(nn.Module):
    """Self-attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x, x, x)[0].mean(1))


class Kernel(nn.Module):
    """Somebody's own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        return x @ self.kernel


def layered(layer: nn.Module, features: int) -> nn.Module:
    net = nn.Sequential()
    net.add_module("layer", layer)
    net.add_module("act", nn.ReLU())
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(features, 3))
    return net


NETS = {
    "linear": (lambda: layered(nn.Linear(16, 16), 16), (8, 16)),
    "large": (lambda: layered(nn.Linear(200, 300), 300), (8, 200)),  # from 16,384 weights on, codes are found in cells and pairs
    "conv1d": (lambda: layered(nn.Conv1d(4, 8, 3), 48), (8, 4, 8)),
    "conv2d": (lambda: layered(nn.Conv2d(4, 8, 3), 128), (8, 4, 6, 6)),
    "depthwise": (lambda: layered(nn.Conv2d(16, 16, 3, groups=16), 256), (8, 16, 6, 6)),
    "grouped": (lambda: layered(nn.Conv2d(8, 16, 3, groups=2), 256), (8, 8, 6, 6)),
    "transposed": (lambda: layered(nn.ConvTranspose2d(4, 8, 3), 288), (8, 4, 4, 4)),
    "embedding": (Tokens, None),
    "lstm": (lambda: Recurrent(nn.LSTM), (8, 5, 8)),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), (8, 5, 8)),
    "conv3d": (lambda: layered(nn.Conv3d(4, 8, 2), 64), (8, 4, 3, 3, 3)),
    "transposed3d": (lambda: layered(nn.ConvTranspose3d(4, 8, 2, groups=2), 216), (8, 4, 2, 2, 2)),
    "attention": (Attention, (8, 5, 16)),
    "tied": (Tied, None),
    "twice": (Twice, (8, 16)),
    "custom": (lambda: layered(Kernel(), 16), (8, 16)),
}
RECURRENT = tuple(f"layer.weight_{kind}_l0" for kind in ("ih", "hh"))
WEIGHTS = {
    "lstm": RECURRENT,
    "gru": tuple(f"layer.weight_{kind}_l{n}{end}" for kind in ("ih", "hh") for n in (0, 1) for end in ("", "_reverse")),
    "attention": ("layer.in_proj_weight", "layer.out_proj.weight"),
    "custom": ("layer.kernel",),
}
INTEGER_ACTIVATIONS = {
    "linear",
    "large",
    "conv1d",
    "conv2d",
    "depthwise",
    "grouped",
    "transposed",
    "conv3d",
    "transposed3d",
    "twice",
}


def build(kind: str):
    torch.manual_seed(7)
    make, shape = NETS[kind]
    net = make()
    x = torch.randn(shape) if shape else torch.randint(0, 32, (8, 5))
    return net, x, torch.randint(0, 3, (8,))


def rule(kind: str, mask: bool, table: bool, scale: bool, end: int = 4) -> torchopt.Rule:
    mode = "static" if kind in INTEGER_ACTIVATIONS else "weight_only"
    schedule = torchopt.PolynomialDecay(initial_sparsity=0.0, final_sparsity=SPARSITY, begin_step=0, end_step=end, frequency=1)
    return torchopt.Rule(
        "layer*",
        params=["kernel"] if kind == "custom" else (),
        prune=torchopt.Prune(schedule=schedule, include_depthwise=True) if mask else None,
        cluster=torchopt.Cluster(n_clusters=K, include_depthwise=True) if table else None,
        quantize=torchopt.Quantize(mode=mode) if scale else None,
    )


def train(ready: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    ready.train()
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(ready(x), y).backward()
        optimizer.step()
        torchopt.step(ready)


def prepared(kind: str, case, net, x):
    if not any(case):
        return None
    return torchopt.prepare(net, [rule(kind, *case)], (x,))


def check(kind: str, case, ready: nn.Module, x: torch.Tensor) -> nn.Module:
    """The laws of a trained model; returns it finalized."""
    mask, table, scale = case
    ready.eval()
    with torch.no_grad():
        last = ready(x)
        torch.testing.assert_close(ready(x), last, rtol=0, atol=0)  # idempotent
        final = torchopt.finalize(ready).eval()
        torch.testing.assert_close(final(x), last, rtol=0, atol=0)  # finalize = last forward, bit for bit
        torch.testing.assert_close(ready(x), last, rtol=0, atol=0)  # the trainable model stays usable
    for name in WEIGHTS.get(kind, ("layer.weight",)):
        value = find_weight(final, name).value
        if mask:
            zeros, asked = int((value == 0).sum()), round(SPARSITY * value.numel())
            assert zeros >= asked if table or scale else zeros == asked  # small kept weights may snap to 0
        if table:
            assert value.unique().numel() <= K
        if scale:
            torchopt.network.grid.grids(final)[name].codes(value)
    assert not any(isinstance(m, torchopt.state.counter.State) for m in final.modules())
    return final


@pytest.mark.parametrize("case", CASES[1:], ids=NAMES[1:])
@pytest.mark.parametrize("kind", NETS)
def test_joint(kind, case):
    net, x, y = build(kind)
    before = copy.deepcopy(net.state_dict())
    ready = prepared(kind, case, net, x)
    train(ready, x, y, 6)
    check(kind, case, ready, x)
    after = net.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in CASES if sum(c) >= 2], ids=[n for n, c in zip(NAMES, CASES) if sum(c) >= 2])
@pytest.mark.parametrize("kind", NETS)
def test_successive(kind, case):
    net, x, y = build(kind)
    for number, on in enumerate(case):
        if on:
            alone = tuple(i == number for i in range(3))
            ready = prepared(kind, alone, net, x)
            train(ready, x, y, 6)
            net = torchopt.finalize(ready)
    check_final(kind, case, net)


def check_final(kind, case, final):
    mask, table, scale = case
    for name in WEIGHTS.get(kind, ("layer.weight",)):
        value = find_weight(final, name).value
        if mask:
            assert (value == 0).sum() >= round(SPARSITY * value.numel())
        if table:
            assert value.unique().numel() <= K
        if scale:
            torchopt.network.grid.grids(final)[name].codes(value)


@pytest.mark.parametrize("case", CASES[1:], ids=NAMES[1:])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "lstm", "tied", "custom"])
def test_resume_is_bit_equal(kind, case):
    net, x, y = build(kind)
    ready = prepared(kind, case, net, x)
    train(ready, x, y, 3)
    again = prepared(kind, case, net, x)
    again.load_state_dict(copy.deepcopy(ready.state_dict()), strict=True)
    train(ready, x, y, 3)
    train(again, x, y, 3)
    for (name, ours), theirs in zip(ready.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def test_cluster_then_prune_keeps_the_values():
    net, x, y = build("linear")
    clustered = torchopt.finalize(prepared("linear", (False, True, False), net, x))
    ready = prepared("linear", (True, False, False), clustered, x)
    train(ready, x, y, 6)
    value = torchopt.finalize(ready).layer.weight
    assert value[value != 0].unique().numel() <= K
    assert (value == 0).sum() == 128


def test_preserve_false_lets_the_zeros_go():
    net, x, y = build("linear")
    ready = prepared("linear", (True, False, False), net, x)
    train(ready, x, y, 6)
    sparse = torchopt.finalize(ready)
    loose = torchopt.prepare(sparse, [torchopt.Rule("layer", quantize=torchopt.Quantize())], (x,), preserve=False)
    train(loose, x, y, 6)
    kept = torchopt.prepare(sparse, [torchopt.Rule("layer", quantize=torchopt.Quantize())], (x,))
    train(kept, x, y, 6)
    # weight decay and gradients move the loose zeros off; rounding puts some back
    assert (loose.layer.weight == 0).sum() < 64
    assert (torchopt.finalize(kept).layer.weight == 0).sum() >= 128


def test_quantized_first_is_refused():
    net, x, y = build("linear")
    ready = prepared("linear", (False, False, True), net, x)
    train(ready, x, y, 2)
    quantized = torchopt.finalize(ready)
    with pytest.raises(torchopt.StateError, match=r"layer\.weight lies on an integer grid.*prune and cluster before"):
        torchopt.prepare(quantized, [rule("linear", True, False, False)], (x,))


def test_a_step_computes_no_weight_that_nobody_reads(monkeypatch):
    """`hasattr` on a parametrized attribute computes it: 20 ms a step of ResNet-18."""
    net, x, y = build("large")
    ready = prepared("large", (True, True, False), net, x)
    train(ready, x, y, 1)
    torch.optim.SGD(ready.parameters(), lr=0.1).step()  # a step follows a step of the optimizer
    monkeypatch.setattr(torchopt.cluster.SharedWeights, "forward", lambda *_: pytest.fail("computed"))
    torchopt.step(ready)
