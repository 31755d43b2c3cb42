"""Tables while training: gradients, codes, copies, checkpoints, processes, compilers (C8, C9, C11, C12, C21, C22, C24)."""

import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import torchopt
from torchopt.cluster import Cluster, SharedWeights, attach, kmeans, shared_weights, squared_error, table_of, update
from torchopt.cluster.assign import COUNT, PAYS_FROM, assign_
from torchopt.cluster.blocks import PER_THREAD, count_by_code, look_up_, sum_by_code
from torchopt.cluster.soft import soft_table
from torchopt.errors import ModelError, StateError
from torchopt.network.weights import find_weight, weights
from torchopt.rules import Rule


def shared(table, weight, gradient="sum", out_axis=0, pinned=False, **config) -> SharedWeights:
    """A parametrization with a given table (groups, k) on a weight, its codes up to date."""
    table, weight = torch.tensor(table), torch.tensor(weight)
    codes = torch.zeros(len(table), weight.numel() // len(table), dtype=torch.uint8)
    made = SharedWeights(
        Cluster(n_clusters=2, gradient=gradient, **config), table, codes, weight.shape, out_axis=out_axis, pinned=pinned
    )
    assign_(made.codes, made.grouped(weight), table)
    made.recount()
    return made


def gradients(made: SharedWeights, weight) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = torch.tensor(weight, requires_grad=True)
    made(leaf).sum().backward()
    return leaf.grad, made.table.grad


CHECKER = [[0.0, 1.0, 0.0, 1.0]] * 4


@pytest.mark.parametrize(
    ("table", "weight", "total", "mean"),
    [
        ([[0.0, 1.0]], CHECKER, [[8.0, 8.0]], [[1.0, 1.0]]),
        ([[-5.0, 1.0]], CHECKER, [[0.0, 16.0]], [[0.0, 1.0]]),
        ([[0.0, 1.0]], [[0.1, 0.2, 0.9]] * 3, [[6.0, 3.0]], [[1.0, 1.0]]),
        (
            [[0.0, 1.0]] * 3,
            [[0.0, 0.1, 0.9, 1.0], [1.0, 0.0, 1.0, 0.0], [0.2, 0.1, 0.0, 0.8]],
            [[2.0, 2.0], [2.0, 2.0], [3.0, 1.0]],
            [[1.0, 1.0]] * 3,
        ),
    ],
    ids=["halves", "one empty", "3x3", "per channel"],
)
def test_C8_gradients(table, weight, total, mean):
    for gradient, expected in (("sum", total), ("mean", mean)):
        to_weight, to_table = gradients(shared(table, weight, gradient), weight)
        torch.testing.assert_close(to_table, torch.tensor(expected), rtol=0, atol=0)
        torch.testing.assert_close(to_weight, torch.ones_like(to_weight), rtol=0, atol=0)


def test_C8_a_pinned_zero_gets_no_gradient():
    _, to_table = gradients(shared([[0.0, 1.0]], CHECKER, pinned=True), CHECKER)
    torch.testing.assert_close(to_table, torch.tensor([[0.0, 8.0]]), rtol=0, atol=0)


def test_gradients_of_large_weights_are_exact_sums():
    torch.manual_seed(0)
    weight = torch.randn(700, 500)
    net = nn.Linear(500, 700, bias=False)
    net.weight.data = weight
    attach([(weights(net)[0], Cluster(n_clusters=16, gradient="sum"))], preserve=True)
    upstream = torch.randn(700, 500)
    (net.weight * upstream).sum().backward()
    made = net.parametrizations.weight[0]
    codes = made.codes.view(700, 500)
    expected = torch.stack([upstream.double()[codes == j].sum() for j in range(16)])
    torch.testing.assert_close(made.table.grad[0].double(), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(net.parametrizations.weight.original.grad, upstream, rtol=0, atol=0)
    torch.testing.assert_close(made.member_counts()[0], torch.bincount(codes.flatten(), minlength=16), rtol=0, atol=0)


@pytest.mark.parametrize("k", [2, 16, 100, 128, 129, 256])
@pytest.mark.parametrize("count", [50, PAYS_FROM + 3, 2 * PER_THREAD + 5])
@pytest.mark.parametrize("apart", [True, False])
def test_C9_nearest_entry(k, count, apart):
    torch.manual_seed(k)
    weight = torch.randn(1, count) * 3
    table = torch.linspace(-3, 3, k)[None, torch.randperm(k)] + torch.rand(1, k) / k if apart else torch.randn(1, k)
    weight[0, :2] = torch.tensor([1e4, -1e4])
    weight[0, 2 : 2 + min(k, 40)] = table[0, : min(k, 40)]  # entries themselves
    value = torch.empty_like(weight)
    codes = assign_(torch.empty(1, count, dtype=torch.uint8), weight, table, value)
    chosen = table[0, codes[0].long()]
    torch.testing.assert_close(value[0], chosen, rtol=0, atol=0)
    best = torch.full((count,), float("inf"))
    for entry in table[0]:
        best = torch.minimum(best, (weight[0] - entry).abs())
    rounding = float(table.max() - table.min()) / COUNT if count >= PAYS_FROM else 0.0
    torch.testing.assert_close((weight[0] - chosen).abs(), best, rtol=1e-6, atol=3e-7 + rounding)
    torch.testing.assert_close(chosen[2 : 2 + min(k, 40)], table[0, : min(k, 40)], rtol=0, atol=0)


@pytest.mark.parametrize("spread", [1e-35, 1e-6, 1e6, 1e35])
@pytest.mark.parametrize("middle", [0.0, 100.0])
def test_nearest_entry_at_any_scale(spread, middle):
    torch.manual_seed(0)
    weight, table = (torch.randn(1, 2 * PAYS_FROM) + middle) * spread, (torch.randn(1, 16) + middle) * spread
    codes = assign_(torch.empty(1, 2 * PAYS_FROM, dtype=torch.uint8), weight, table)
    away = (weight[0].double()[:, None] - table[0].double()).abs()
    chosen = away.gather(1, codes[0].long()[:, None])[:, 0]
    rounding = float(table.max() - table.min()) / COUNT
    assert ((chosen - away.min(1).values) <= rounding + 2e-7 * middle * spread).all()


def test_adjacent_floats_and_equal_entries():
    one = torch.tensor(1.0)
    above = torch.nextafter(one, torch.tensor(2.0))
    table = torch.stack((above, one, above)).view(1, 3)
    codes = assign_(torch.empty(1, 2, dtype=torch.uint8), torch.stack((one, above)).view(1, 2), table)
    torch.testing.assert_close(table[0, codes[0].long()], torch.stack((one, above)), rtol=0, atol=0)


def test_C11_codes_follow_the_weights_at_the_next_step():
    net = nn.Linear(8, 8)
    attach([(weights(net)[0], Cluster(n_clusters=4))], preserve=True)
    before = net.parametrizations.weight[0].codes.clone()
    with torch.no_grad():
        net.parametrizations.weight.original.neg_()
    update(net, 1)
    made = net.parametrizations.weight[0]
    assert not torch.equal(made.codes, before)
    table, original = made.table.detach(), net.parametrizations.weight.original.detach()
    torch.testing.assert_close(net.weight.detach(), table[0][(original[..., None] - table[0]).abs().argmin(-1)], rtol=0, atol=0)


def test_frequency():
    net = nn.Linear(8, 8)
    attach([(weights(net)[0], Cluster(n_clusters=4, frequency=3))], preserve=True)
    codes = [net.parametrizations.weight[0].codes.clone()]
    for step in (1, 2, 3):
        with torch.no_grad():
            net.parametrizations.weight.original.neg_()
        update(net, step)
        codes.append(net.parametrizations.weight[0].codes.clone())
    assert torch.equal(codes[1], codes[0])
    assert torch.equal(codes[2], codes[0])
    assert not torch.equal(codes[3], codes[0])


def test_an_entry_without_members_starts_again():
    net = nn.Linear(32, 32)
    attach([(weights(net)[0], Cluster(n_clusters=4))], preserve=True)
    made = net.parametrizations.weight[0]
    with torch.no_grad():
        made.table[0, 2] = 1e3
        net.parametrizations.weight.original[0, 0] = -5.0
    update(net, 1)
    assert -5.0 in made.table[0]  # the run of the outlier costs most, and is cut beside it
    assert (made.member_counts() > 0).all()


@pytest.mark.parametrize("size", [64, 400])
def test_entries_that_a_mask_empties_go_to_the_weights_that_are_left(size):
    """Moved to the farthest weights instead, seven of the sixteen would be spent on one outlier each."""
    torch.manual_seed(0)
    net = nn.Linear(size, size, bias=False)
    torch.nn.init.normal_(net.weight)
    rule = Rule("*", prune=torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.8, frequency=1)),
                cluster=Cluster(n_clusters=16))  # fmt: skip
    ready = torchopt.prepare(net, [rule])
    ready(torch.zeros(1, size)).sum().backward()
    assert torchopt.step(ready) == 1
    (_, made), *_ = shared_weights(ready)
    left = net.weight.detach()[ready.weight_mask].numpy()
    best = squared_error(left, kmeans(left, 16, pin_zero=True))
    assert (made.member_counts() > 0).all()
    torch.testing.assert_close(made.members, made.member_counts(), rtol=0, atol=0)  # by which the mean divides
    assert squared_error(left, made.table[0].detach().double().sort().values.numpy()) < 1.5 * best


def test_masked_weights_are_zero_and_get_gradients_as_without_a_table():
    torch.manual_seed(0)
    net = nn.Linear(16, 16, bias=False)
    net.weight.data[:, :8] = 0.0
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(n_clusters=4, frequency=2))])
    x = torch.randn(4, 16)
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ready(x).square().sum().backward()
        original = find_weight(ready, "weight").trainable
        assert (original.grad[:, :8] != 0).all()
        optimizer.step()
        assert (original[:, :8] != 0).any()
        assert (ready.weight_orig[:, :8] == 0).all()  # the codes are those of before
        torchopt.step(ready)
        ready(x)
        assert (ready.weight[:, :8] == 0).all()
        assert (original[:, :8] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diverged_training_says_so(bad):
    ready, x, y = prepared()
    with torch.no_grad():
        ready.head.parametrizations.weight[0].table[0, 3] = bad
    with pytest.raises(ModelError, match=r"head\.weight: holds NaN or infinity after an optimizer step; training has diverged"):
        torchopt.step(ready)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16 * 36, 10)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def prepared(**config) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = Net()
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(**{"n_clusters": 8, **config}))])
    return ready, torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))


def train(model, x, y, steps: int, seed: int = 0, optimizer=None):
    torch.manual_seed(seed)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        torchopt.step(model)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("config", [{}, {"per_channel": True}, {"soft_until": 12}, {"table_bits": 8}, {"gradient": "sum"}])
def test_C12_training_changes_weights_table_and_bias(config):
    ready, x, y = prepared(**config)
    before = {name: p.detach().clone() for name, p in ready.named_parameters()}
    optimizer = torch.optim.Adam(ready.parameters(), lr=0.01)
    losses = train(ready, x, y, 15, optimizer=optimizer)
    assert losses[-1] < 0.7 * losses[0]
    for name, p in ready.named_parameters():
        assert not torch.equal(before[name], p.detach()), name
    final = torchopt.finalize(ready)
    assert final.head.weight.unique().numel() <= 8 * (10 if config.get("per_channel") else 1)


def test_dropout_and_batch_norm_work_as_without_tables():
    """TFMOT switches both off."""
    ready, x, _ = prepared()
    ready.train()
    dropped = []
    ready.drop.register_forward_hook(lambda m, i, o: dropped.append(float((o[i[0] != 0] == 0).float().mean())))
    before = ready.norm.running_mean.clone()
    ready(x)
    assert 0.4 < dropped[0] < 0.6
    assert not torch.equal(ready.norm.running_mean, before)
    mean = ready.conv(x).mean((0, 2, 3))
    torch.testing.assert_close(ready.norm.running_mean, 0.1 * mean.detach())


def test_C21_save_and_resume_bit_for_bit(tmp_path):
    ready, x, y = prepared()
    train(ready, x, y, 3)
    torch.save(ready.state_dict(), tmp_path / "state.pt")
    again, _, _ = prepared()
    again.load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
    for (name, ours), theirs in zip(ready.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    ready.eval(), again.eval()
    torch.testing.assert_close(again(x), ready(x), rtol=0, atol=0)
    ready.train(), again.train()
    assert train(ready, x, y, 3, seed=5) == train(again, x, y, 3, seed=5)
    codes = [name for name in ready.state_dict() if name.endswith("codes")]
    assert len(codes) == 2
    assert all(ready.state_dict()[name].dtype == torch.uint8 for name in codes)


@pytest.mark.parametrize("config", [{}, {"soft_until": 100}, {"per_channel": True}])
def test_copies_are_independent(config):
    ready, x, y = prepared(**config)
    train(ready, x, y, 2)
    other = copy.deepcopy(ready)
    ready.eval(), other.eval()
    last = ready(x).detach().clone()
    torch.testing.assert_close(other(x), last, rtol=0, atol=0)
    other.train()
    train(other, x, y, 2)
    torch.testing.assert_close(ready(x).detach(), last, rtol=0, atol=0)
    torchopt.finalize(other, unfinished=True)
    train(ready, x, y, 1)


def test_inference_mode_then_training():
    ready, x, y = prepared()
    with torch.inference_mode():
        ready(x)
    train(ready, x, y, 2)
    with torch.inference_mode():
        ready(x)
    train(ready, x, y, 1)


def test_gradient_accumulation_and_two_forwards():
    ready, x, _ = prepared()
    ready.eval()
    ready(x).sum().backward()
    once = ready.conv.parametrizations.weight[0].table.grad.clone()
    (ready(x).sum() + ready(x).sum()).backward()
    torch.testing.assert_close(ready.conv.parametrizations.weight[0].table.grad, 3 * once, rtol=1e-5, atol=1e-5)


def test_autocast_bfloat16():
    ready, x, y = prepared()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(ready(x), y)
    loss.backward()
    for name, p in ready.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    assert ready.conv.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    net = nn.Linear(32, 32).to(dtype)
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(n_clusters=8))])
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.1)
    ready(torch.randn(4, 32, dtype=dtype)).float().square().mean().backward()
    optimizer.step()
    torchopt.step(ready)
    final = torchopt.finalize(ready)
    assert final.weight.dtype == dtype
    assert final.weight.unique().numel() == 8


@pytest.mark.parametrize("config", [{}, {"per_channel": True}])
def test_compile(config):
    ready, x, _ = prepared(**config)
    ready.eval()
    plain = ready(x)
    plain.sum().backward()
    expected = {name: p.grad.clone() for name, p in ready.named_parameters()}
    ready.zero_grad()
    compiled = torch.compile(ready, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, plain)
    out.sum().backward()
    for name, p in ready.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_functional_call():
    ready, x, _ = prepared()
    ready.eval()
    state = {name: p.detach() * 1.0 for name, p in ready.named_parameters()}
    state["conv.parametrizations.weight.0.table"] = state["conv.parametrizations.weight.0.table"] * 2
    out = torch.func.functional_call(ready, state, (x,))
    with torch.no_grad():
        assert not torch.allclose(out, ready(x))
        ready.conv.parametrizations.weight[0].table.mul_(2)
        torch.testing.assert_close(out, ready(x))


# ---- soft assignment


def test_soft_tends_to_hard_and_keeps_no_matrix():
    torch.manual_seed(0)
    table = torch.tensor([[-1.0, 0.0, 2.0]])
    places = torch.tensor([[-1.1, -0.45, 0.2, 0.9, 1.2]])
    torch.testing.assert_close(soft_table(places, table, 1e-3), torch.tensor([[-1.0, 0.0, 0.0, 0.0, 2.0]]))
    # between two entries one unit apart, temperature 1, gap median 1: softmax of -(0.5², 0.5², 1.5²... )
    weights_ = torch.softmax(-((torch.tensor(0.5) - table[0]) ** 2), 0)
    torch.testing.assert_close(
        soft_table(torch.tensor([[0.5]]), table, 1.0)[0, 0], (weights_ * table[0]).sum(), rtol=1e-4, atol=1e-4
    )


def test_soft_becomes_hard():
    ready, x, y = prepared(soft_until=4)
    made = ready.head.parametrizations.weight[0]
    temperatures = []
    for step in range(1, 6):
        assert (ready.head.weight.unique().numel() > 8) == (step <= 4)
        train(ready, x, y, 1)
        temperatures.append(round(made.temperature, 6))
        if step == 2:
            with pytest.raises(
                StateError, match=r"finalize: after step 2, shared values are soft until step 4.*Cluster\.soft_until"
            ):
                torchopt.finalize(ready)
            assert torchopt.finalize(ready, unfinished=True).head.weight.unique().numel() == 8
    assert temperatures == [0.075, 0.05, 0.025, 0.0, 0.0]
    ready.eval()
    with torch.no_grad():
        torch.testing.assert_close(torchopt.finalize(ready).eval()(x), ready(x), rtol=0, atol=0)


def test_soft_resumes_bit_for_bit():
    ready, x, y = prepared(soft_until=4)
    train(ready, x, y, 2)
    again, _, _ = prepared(soft_until=4)
    again.load_state_dict(copy.deepcopy(ready.state_dict()), strict=True)
    assert train(ready, x, y, 4, seed=3) == train(again, x, y, 4, seed=3)
    for (name, ours), theirs in zip(ready.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def test_one_shot_is_hard_at_once():
    torch.manual_seed(0)
    final = torchopt.one_shot(Net(), [Rule("*", cluster=Cluster(n_clusters=8, soft_until=1000))])
    assert final.conv.weight.unique().numel() == 8


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("size", [64, 256])
def test_soft_gradient_matches_a_dense_matrix(gradient, size):
    torch.manual_seed(0)
    net = nn.Linear(size, size, bias=False)
    original = net.weight.detach().clone()
    attach([(weights(net)[0], Cluster(n_clusters=4, soft_until=9, temperature=0.5, gradient=gradient))], preserve=True)
    made = net.parametrizations.weight[0]
    upstream = torch.randn(size, size)
    (net.weight * upstream).sum().backward()
    table = made.table.detach().clone().requires_grad_()
    dense = soft_table(original.view(1, -1), table, 0.5).view(size, size)
    (dense * upstream).sum().backward()
    torch.testing.assert_close(net.weight.detach(), dense.detach(), rtol=0, atol=1e-3)
    expected = table.grad / (made.member_counts() if gradient == "mean" else 1)
    torch.testing.assert_close(made.table.grad, expected, rtol=2e-2, atol=2e-2 if gradient == "sum" else 2e-5)


# ---- memory, pieces


def test_memory_is_one_byte_a_weight_beyond_the_copies():
    net = nn.Linear(256, 256)
    attach([(weights(net)[0], Cluster(n_clusters=16))], preserve=True)
    made = net.parametrizations.weight[0]
    net(torch.randn(2, 256))
    count = 256 * 256
    held = sum(b.numel() * b.element_size() for b in made.buffers()) + made.table.numel() * 4
    assert held <= count * 1 + 16 * (4 + 8) + 4
    assert made.rendered[0].numel() == count  # ŵ itself, which forward needs anyway
    buffer = made.rendered[0].data_ptr()
    update(net, 1)
    net(torch.randn(2, 256))
    assert made.rendered[0].data_ptr() == buffer


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_finds_the_same(threads):
    torch.manual_seed(0)
    count = 6 * PER_THREAD + 7  # blocks, a part of one, and what four codes a thread leave over
    weight, table, upstream = torch.randn(1, count), torch.randn(1, 16), torch.randn(count)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        codes, value = torch.empty(1, count, dtype=torch.uint8), torch.empty(1, count)
        assign_(codes, weight, table, value)
        again = look_up_(torch.empty(count), table[0], codes[0])
        total, counts = sum_by_code(codes[0], upstream, 16), count_by_code(codes[0], 16)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(value[0], table[0][codes[0].long()], rtol=0, atol=0)
    torch.testing.assert_close(again, value[0], rtol=0, atol=0)
    exact = (weight[0][:, None] - table[0]).abs().min(1).values
    assert ((weight - value)[0].abs() - exact).max() <= (table.max() - table.min()) / COUNT
    torch.testing.assert_close(counts, torch.bincount(codes[0], minlength=16), rtol=0, atol=0)
    expected = torch.stack([upstream.double()[codes[0] == j].sum() for j in range(16)])
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-3)


# ---- several processes


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    ready, x, y = prepared()
    model = nn.parallel.DistributedDataParallel(ready)
    half = slice(rank * 8, rank * 8 + 8)
    train(model, x[half], y[half], 4)
    names = ("conv.weight", "head.weight")
    tables = [table_of(find_weight(ready, name)) for name in names]
    codes = [made.codes for _, made in shared_weights(ready)]
    torch.save((tables, codes), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_C24_two_processes_have_equal_tables(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    (tables, codes), (other_tables, other_codes) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    ready, _, _ = prepared()
    for ours, theirs, name in zip(tables, other_tables, ("conv.weight", "head.weight")):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert not torch.equal(ours, table_of(find_weight(ready, name)))
    for ours, theirs in zip(codes, other_codes):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_C22_digits_keep_their_accuracy():
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pictures, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:1000]), y[:1000]).backward()
        optimizer.step()
    accuracy = lambda model: float((model(x[1000:]).argmax(1) == y[1000:]).float().mean())
    before = accuracy(net)
    ready = torchopt.prepare(net, [Rule("*", cluster=Cluster(n_clusters=4))])
    train(ready, x[:1000], y[:1000], 40, optimizer=torch.optim.Adam(ready.parameters(), lr=0.003))
    final = torchopt.finalize(ready)
    assert before > 0.85
    assert accuracy(final) > before - 0.02
    assert [final[i].weight.unique().numel() for i in (0, 2)] == [4, 4]
