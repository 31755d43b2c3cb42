"""Learned scales, milestones, and what a prepared checkpoint carries."""

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule, StateError
from torchopt.quantize.layers.learned import grown

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def prepared(net: nn.Module | None = None, x: torch.Tensor = X, **config: object) -> nn.Module:
    return torchopt.prepare(net or small(), [Rule("*", quantize=Quantize(**config))], (x,))


def rounds(model: nn.Module) -> dict[str, bool]:
    return {name: m.rounding for name, m in model.named_modules() if hasattr(m, "rounding") and not name.startswith("kernel")}


# --- learned scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.AdamW(p, 5e-4), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)])
@pytest.mark.parametrize(("config", "size"), [({"activation_bits": 16}, 1.0), ({}, 0.01), ({"weight_bits": 4}, 100.0)])
def test_learned_scales_follow_the_float_network_whatever_their_unit(config, size, optimizer):
    """40 steps on noise around the float network's outputs: with scales as Parameters, they crossed zero within ten."""
    net = small().eval()
    data = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * size
    with torch.no_grad():
        wanted = net(data)
    found = []
    for learn in (False, True):
        ready = torchopt.calibrate(prepared(net, data[:32], learn_scale=learn, **config), [data], progress=False).train()
        steps = optimizer(ready.parameters())
        for _ in range(40):
            steps.zero_grad()
            ((ready(data) - wanted) / wanted.std()).square().mean().backward()
            steps.step()
            torchopt.step(ready)
        with torch.no_grad():
            found.append(float(((torchopt.finalize(ready).eval()(data) - wanted) / wanted.std()).square().mean()))
    assert found[1] < max(4 * found[0], 1e-3)


def test_a_step_that_would_cross_zero_leaves_the_scale_positive():
    start, growth = torch.tensor([1e-6]), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([growth], lr=0.1)
    (1e9 * grown(start, growth)).sum().backward()
    assert growth.grad.tolist() == [1.0]  # bounded, so that a step is a tenth of the scale
    optimizer.step()
    assert 0.9e-6 < float(grown(start, growth).detach()) < 1e-6


def test_eight_bits_start_no_wider_than_the_largest_weight():
    layer = prepared(learn_scale=True).get_submodule("0")
    torch.testing.assert_close(layer.weight_scale, layer.weight.abs().amax(1) / 127)
    low = prepared(learn_scale=True, weight_bits=2).get_submodule("0")
    torch.testing.assert_close(low.weight_scale, torch.minimum(2 * low.weight.abs().mean(1), low.weight.abs().amax(1)))


def test_nothing_trains_in_one_shot():
    net, results = small().eval(), []
    for learn in (False, True):
        rules = [Rule("*", quantize=Quantize(learn_scale=learn))]
        results.append(torchopt.one_shot(net, rules, [X], example_inputs=(X,), progress=False).eval()(X))
    assert torch.equal(*results)  # 10 dB apart where the start formula was kept


def test_a_checkpoint_whose_scales_were_parameters_goes_on():
    ready = torchopt.calibrate(prepared(learn_scale=True), [X], progress=False)
    old = {}
    for key, value in ready.state_dict().items():
        if not key.endswith(("growth", "one_scale")):
            old[key.replace("weight_scale_start", "weight_scale").replace(".start", ".scale")] = value
    assert "0.weight_scale" in old
    assert "quantizer_0.scale" in old
    again = prepared(learn_scale=True)
    again.load_state_dict(old, strict=True)
    assert torch.equal(ready.eval()(X), again.eval()(X))


@pytest.mark.parametrize(("config", "size"), [({"activation_bits": 16}, 1.0), ({}, 1e-3)])
def test_ranges_that_training_follows_have_scales_as_fine_as_they_ask_for(config, size):
    ready = prepared(x=X, **config).train()
    ready(X * size)
    entry = ready.get_submodule("quantizer_0")
    levels = entry.quant_max - entry.quant_min
    torch.testing.assert_close(
        float(entry.scale), (float(X.max()) - float(X.min())) * size / levels
    )  # torch's own stop at 6.1e-5


# --- milestones --------------------------------------------------------------------------------------------------------------


def test_milestones_at_0_have_passed():
    ready = prepared(milestones=[0, 0, 0])
    assert all(rounds(ready).values())
    assert not any(m.observing for m in ready.modules() if hasattr(m, "observing"))


def test_each_layer_waits_for_its_own_milestones():
    waits, now = Quantize(milestones=[2, 3, 4]), Quantize()
    for first, second in ((now, waits), (waits, now)):
        ready = torchopt.prepare(small(), [Rule("0", quantize=first), Rule("2", quantize=second)], (X,))
        assert (rounds(ready)["0"], rounds(ready)["2"]) == (first is now, second is now)
        for _ in range(2):
            torchopt.step(ready)
        assert all(rounds(ready).values())


def test_a_network_that_does_not_round_yet_is_not_finalized():
    ready = torchopt.calibrate(prepared(milestones=[3, 4, 5]), [X], progress=False)
    torchopt.step(ready)
    with pytest.raises(StateError, match=r"finalize: after step 1, 0 is not rounded before step 3 \(Quantize\.milestones\)"):
        torchopt.finalize(ready)
    rounded = torchopt.finalize(ready, unfinished=True)
    for _ in range(2):
        torchopt.step(ready)
    torch.testing.assert_close(torchopt.finalize(ready).eval()(X), rounded.eval()(X), rtol=0, atol=0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.long, self.gated, self.head = nn.LSTM(4, 8, batch_first=True), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gated(self.long(x)[0])[0][:, -1])


@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_recurrent_layers_wait_for_milestones_and_say_that_their_scales_are_not_trained(mode, tmp_path):
    x, net = torch.randn(4, 3, 4), Recurrent()
    ready = prepared(net, x, mode=mode, milestones=[1, 2, 3], learn_scale=True)
    assert not any(rounds(ready).values())
    torch.testing.assert_close(ready.eval()(x), net.eval()(x), rtol=1e-5, atol=1e-6)
    said = {s.name.rpartition(".")[0] or s.name: s.reason for s in ready.torchopt_state.skipped}
    assert any("scales are trained in convolutions" in reason for reason in said.values())
    torchopt.step(ready)
    assert rounds(ready)["long"]
    assert rounds(ready)["gated"]
    assert not torch.equal(ready.eval()(x), net(x))
    torchopt.save(ready, tmp_path / "r.safetensors")
    assert torch.equal(torchopt.load(tmp_path / "r.safetensors", Recurrent()).eval()(x), ready(x))


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def again(ready: nn.Module, path) -> nn.Module:
    torchopt.save(ready, path)
    return torchopt.finalize(torchopt.load(path, small())).eval()


def test_clustered_weights_keep_their_one_scale_in_a_checkpoint(tmp_path):
    net = torchopt.one_shot(small(), [Rule("*", cluster=Cluster(n_clusters=4))])
    ready = torchopt.prepare(net, [Rule("*", quantize=Quantize())], (X,), preserve=False)
    torchopt.calibrate(ready, [X], progress=False)
    other = again(ready, tmp_path / "c.safetensors")
    assert torchopt.network.grid.grids(other)["0.weight"].scale.shape == ()
    assert torch.equal(other(X), torchopt.finalize(ready).eval()(X))


def test_a_frozen_layer_is_frozen_in_a_checkpoint(tmp_path):
    net = small()
    net[0].requires_grad_(False)
    rule = Rule("*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1)), quantize=Quantize())
    ready = torchopt.calibrate(torchopt.prepare(net, [rule], (X,)), [X], progress=False)
    torchopt.step(ready)
    other = again(ready, tmp_path / "f.safetensors")  # "was saved from another architecture"
    assert torch.equal(other(X), torchopt.finalize(ready).eval()(X))
