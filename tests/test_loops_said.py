"""Loops that cannot be right are said or counted rightly: two networks, gradients that accumulate, the optimizer of another copy, LBFGS."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import torchopt

HALF = torchopt.ConstantSparsity(target_sparsity=0.5, frequency=1)
MASK = torchopt.Rule("*", prune=torchopt.Prune(schedule=HALF))
TABLE = torchopt.Rule("*", cluster=torchopt.Cluster(n_clusters=4))


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def backward(model, seed=0):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    F.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()


class Gan(nn.Module):
    """Two networks, each prepared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.critic = (torchopt.prepare(network(), [MASK]) for _ in range(2))


def steps(gan):
    return int(gan.generator.torchopt_state.step), int(gan.critic.torchopt_state.step)


@pytest.mark.parametrize("each", [True, False])
def test_two_networks_in_one_module_count_their_own_steps(each):
    gan = Gan()
    parts = [(net, torch.optim.SGD(net.parameters(), lr=0.1)) for net in (gan.generator, gan.critic, gan.critic)]
    for _ in range(3):
        for net, optimizer in parts:
            optimizer.zero_grad()
            backward(net)
            optimizer.step()
            if each:
                torchopt.step(gan)
        if not each:
            torchopt.step(gan)
    assert steps(gan) == ((3, 6) if each else (3, 3))
    assert [int((m.weight == 0).sum()) for m in (torchopt.finalize(gan.generator)[0], torchopt.finalize(gan.critic)[0])] == [
        64,
        64,
    ]


@pytest.mark.parametrize("verb", ["finalize", "report", "save"])
def test_what_needs_one_network_refuses_two(verb, tmp_path):
    gan = Gan()
    torchopt.step(gan)
    call = {"finalize": torchopt.finalize, "report": torchopt.report, "save": lambda m: torchopt.save(m, tmp_path / "m")}[verb]
    with pytest.raises(
        torchopt.StateError, match=rf"{verb}: 2 networks inside this Gan .*generator, critic.*such as model\.generator"
    ):
        call(gan)


def test_an_average_beside_its_network_is_no_second_one():
    both = nn.ModuleDict({"net": torchopt.prepare(network(), [MASK])})
    both["average"] = AveragedModel(both["net"])
    assert torchopt.step(both) == 1
    assert int(both["average"].module.torchopt_state.step) == 0
    assert (torchopt.finalize(both)[0].weight == 0).sum() == 64
    both["average"].update_parameters(both["net"])
    assert (torchopt.finalize(both["average"])[0].weight == 0).sum() == 64


def test_a_step_while_gradients_accumulate_is_said_once():
    model = torchopt.prepare(network(), [MASK])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = []
    for number in range(8):
        backward(model, number)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torchopt.step(model)
        said += [str(w.message) for w in caught]
    assert len(said) == 1
    assert "no weight has changed since the last call" in said[0]
    assert "accelerator.sync_gradients" in said[0]


def test_the_optimizer_of_another_copy_is_said():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = torchopt.prepare(net, [MASK])
    backward(model), optimizer.step(), torchopt.step(model)
    backward(model), optimizer.step()
    with pytest.warns(
        UserWarning, match=r"make the optimizer of what prepare returned: torch\.optim\.SGD\(model\.parameters\(\)"
    ):
        torchopt.step(model)


def test_loops_that_are_right_are_not_warned_of():
    """A learning rate of 0, a step that mixed precision skips, writes through .data, no gradients, a copy: filterwarnings is error."""
    model = torchopt.prepare(network(), [MASK, TABLE][:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        torchopt.step(model)
    model[0].weight_orig.grad.fill_(torch.inf)
    torchopt.step(model)
    optimizer.zero_grad()
    backward(model)
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    torchopt.step(model)
    twin = copy.deepcopy(model)
    backward(twin)
    torchopt.step(twin)
    optimizer.zero_grad()
    torchopt.step(model)
    assert int(model.torchopt_state.step) == 6


@pytest.mark.parametrize(("rule", "warned"), [(TABLE, True), (MASK, False)])
def test_a_line_search_over_tables_is_said(rule, warned):
    torch.manual_seed(0)
    model = torchopt.prepare(network(), [rule]).train()
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        loss = F.cross_entropy(model(x), (x[:, 0] > 0).long())
        loss.backward()
        return loss

    optimizer.step(closure)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torchopt.step(model)
    assert [("line search (LBFGS)" in str(w.message)) for w in caught] == [True] * warned


def test_an_optimizer_that_looks_ahead_once_is_not():
    model = torchopt.prepare(network(), [TABLE]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        with torch.no_grad():  # sharpness-aware minimization
            ahead = [0.05 * p.grad for p in model.parameters()]
            torch._foreach_add_(list(model.parameters()), ahead)
        optimizer.zero_grad()
        backward(model)
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), ahead)
        optimizer.step()
        torchopt.step(model)
    assert model[0].weight.unique().numel() == 4


def test_sharded_weights_are_refused_in_one_sentence(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        whole, ready = network(), torchopt.prepare(network(), [MASK, TABLE][:1])
        for model in (whole, ready):
            fsdp.fully_shard(model)
        with pytest.raises(torchopt.StateError, match=r"prepare: 0\.weight is sharded over processes.*DistributedDataParallel"):
            torchopt.prepare(whole, [TABLE])
        for verb in (torchopt.step, torchopt.finalize, torchopt.report):
            with pytest.raises(torchopt.StateError, match=r"0\.weight_orig is sharded over processes"):
                verb(ready)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_the_values_of_a_tiny_layer_stay_few_through_later_training(mode):
    """12 or 13 weights besides the zeros, 8 values: seen as never clustered, they became 11 integers."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)), torch.randn(32, 5)
    y = torch.randint(0, 5, (32,))
    rounds = [
        {"prune": torchopt.Prune(schedule=0.5), "cluster": torchopt.Cluster(n_clusters=8)},
        {"quantize": torchopt.Quantize(mode=mode)},
    ]
    for techniques in rounds:
        ready = torchopt.prepare(net, [torchopt.Rule("*", **techniques)], (x,))
        optimizer = torch.optim.SGD(ready.parameters(), lr=0.3)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(ready(x), y).backward()
            optimizer.step()
            torchopt.step(ready)
        net = torchopt.finalize(ready)
    grids = torchopt.network.grid.grids(net)
    assert all(grids[f"{n}.weight"].codes(net.get_parameter(f"{n}.weight")).unique().numel() <= 8 for n in (0, 2))


ALL = {"mask": MASK, "table": TABLE, "both": torchopt.Rule("*", prune=MASK.prune, cluster=TABLE.cluster)}


@pytest.mark.parametrize("name", ALL)
def test_a_weight_that_is_tied_after_prepare_is_refused(name):
    """A mask stood beside the new Parameter, which trained and was never used: 0.38 between prepared and finalized."""
    model = torchopt.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), [ALL[name]])

    def tie():
        model[1].weight = nn.Parameter(torch.ones(8, 8))
        torchopt.step(model)

    with pytest.raises(torchopt.StateError, match=r"after prepare.*tie or replace weights before"):
        tie()


@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_a_model_in_training_that_is_converted_says_what_to_call(mode):
    x = torch.randn(4, 8)
    model = torchopt.prepare(network(), [torchopt.Rule("*", quantize=torchopt.Quantize(mode=mode))], (x,)).train()
    model(x)
    model.half()
    use = (lambda: model(x.half())) if mode == "static" else (lambda: torchopt.finalize(model))
    with pytest.raises(torchopt.StateError, match=r"the prepared model was converted.*call model\.float\(\)"):
        use()
    torchopt.finalize(model.float())


@pytest.mark.parametrize("name", ALL)
def test_an_empty_model_takes_a_state(name):
    torch.manual_seed(0)
    model, x = torchopt.prepare(network(), [ALL[name]]), torch.randn(4, 8)
    torchopt.step(model)
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(x), model(x), rtol=0, atol=0)
    torchopt.finalize(empty)
    with pytest.raises(torchopt.ModelError, match=r"0\.weight has no data \(device='meta'\)"):
        torchopt.prepare(network().to("meta"), [ALL[name]])


OPTIMIZERS = {"foreach": {"foreach": True}, "fused": {"fused": True}, "one by one": {"foreach": False}}


def test_optimizers_of_every_make_train_alike_and_decay_moves_no_mask():
    both, ends = ALL["both"], []
    for options in OPTIMIZERS.values():
        torch.manual_seed(0)
        model = torchopt.prepare(network(), [both]).train()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, **options)
        for _ in range(4):
            optimizer.zero_grad()
            backward(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            torchopt.step(model)
        final = torchopt.finalize(model)
        assert [int((final[n].weight == 0).sum()) for n in (0, 2)] == [64, 16]
        assert [final[n].weight.unique().numel() for n in (0, 2)] == [4, 4]
        ends.append(final[0].weight)
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-4, atol=1e-5)
