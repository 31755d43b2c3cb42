"""Compression in one call: tables weighed by what each weight does, scores that need gradients, tables for what masks leave."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchopt
from torchopt import Cluster, Prune, Quantize, Rule, one_shot
from torchopt.cluster.tables.kmeans import kmeans, squared_error
from torchopt.network.batches import pieces
from torchopt.network.gradients import SAMPLES, sample_gradients

FISHER = Cluster(n_clusters=8, importance="fisher")


class Net(nn.Module):
    """Half of the inputs hardly matter, and their weights are the larger ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 5)
        with torch.no_grad():
            self.first.weight[:, 16:] *= 4

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 32, generator=generator)
    x[:, 16:] *= 0.02
    return x, torch.randint(0, 5, (96,), generator=generator)


def output_error(model: nn.Module, small: nn.Module) -> float:
    x = data()[0]
    with torch.no_grad():
        return float((small.eval()(x) - model.eval()(x)).square().mean())


@pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["outputs", "labels"])
def test_tables_weighed_by_squared_gradients_disturb_the_outputs_less(loss):
    model, (x, y) = Net(), data()
    batches = [(x, y)] if loss else [x]
    even = one_shot(model, [Rule("*", cluster=Cluster(n_clusters=8))])
    fisher = one_shot(model, [Rule("*", cluster=FISHER)], batches, loss=loss)
    assert [w.unique().numel() for w in (fisher.first.weight, fisher.last.weight)] == [8, 8]
    assert output_error(model, fisher) < 0.5 * output_error(model, even)


def test_the_table_is_that_of_weighed_k_means():
    model, (x, y) = Net().eval(), data()
    squares = torch.zeros_like(model.first.weight)
    for sample, label in zip(x, y):
        F.cross_entropy(model(sample[None]), label[None]).backward()
        squares += model.first.weight.grad.square()
        model.zero_grad()
    masses = (squares + 0.01 * squares.mean()).numpy()
    values = model.first.weight.detach().numpy()
    final = one_shot(model, [Rule("first", cluster=FISHER)], [(x[:50], y[:50]), (x[50:], y[50:])], loss=F.cross_entropy)
    best = squared_error(values, kmeans(values, 8, importance=masses), masses)
    ours = float((torch.from_numpy(masses) * (final.first.weight - model.first.weight).detach().square()).sum())
    assert ours == pytest.approx(best, rel=1e-3)  # each weight takes its nearest entry


def test_gradients_are_those_of_single_samples_and_of_so_many():
    model, (x, y) = Net(), data()
    modes = [m.training for m in model.modules()]
    found = list(sample_gradients(model, ["last.weight", "missing"], [(x, y), (x, y)], F.cross_entropy))
    assert len(found) == SAMPLES
    assert [m.training for m in model.modules()] == modes
    assert model.last.weight.grad is None
    F.cross_entropy(model.eval()(x[3:4]), y[3:4]).backward()
    torch.testing.assert_close(found[3]["last.weight"], model.last.weight.grad)
    assert set(found[3]) == {"last.weight"}


def test_gradients_of_the_outputs_estimate_what_a_change_does_to_them():
    """Σ g² of random projections tends to Σ |∂f/∂w|²: of a linear layer, the squares of its inputs for each output."""
    layer, x = nn.Linear(6, 200, bias=False), torch.randn(40, 6)
    total = sum(g["weight"].square() for g in sample_gradients(layer, ["weight"], [x]))
    torch.testing.assert_close(total.mean(0), x.square().sum(0), rtol=0.1, atol=0)


def test_pieces_cut_every_structure():
    batch = {"x": torch.arange(5), "pair": (torch.zeros(5, 2), torch.ones(3)), "name": "all"}
    parts = list(pieces(batch, 2))
    assert [len(p["x"]) for p in parts] == [2, 2, 1]
    assert [(p["pair"][0].shape, p["pair"][1].shape, p["name"]) for p in parts[2:]] == [((1, 2), (3,), "all")]
    assert list(pieces("none", 2)) == ["none"]


@pytest.mark.parametrize("score", ["taylor", "movement"])
def test_scores_of_gradients_without_training(score):
    model, (x, y) = Net(), data()
    final = one_shot(model, [Rule("first", prune=Prune(schedule=0.5, score=score))], [(x, y)], loss=F.cross_entropy)
    total = torch.zeros_like(model.first.weight)
    for g in sample_gradients(model, ["first.weight"], [(x, y)], F.cross_entropy):
        product = model.first.weight.detach() * g["first.weight"]
        total += product.abs() if score == "taylor" else -product
    assert (final.first.weight == 0).sum() == 1024
    assert total[final.first.weight != 0].min() >= total[final.first.weight == 0].max()


def test_taylor_without_labels_keeps_the_weights_that_reach_the_outputs():
    model, (x, _) = Net(), data()
    rule = lambda score: [Rule("first", prune=Prune(schedule=0.5, score=score))]
    taylor, magnitude = one_shot(model, rule("taylor"), [x]), one_shot(model, rule("magnitude"))
    assert (taylor.first.weight[:, :16] != 0).float().mean() > 0.85
    assert output_error(model, taylor) < 0.05 * output_error(model, magnitude)


def test_tables_stand_for_what_the_masks_leave():
    """Of 80 % zeros and 16 values, the 15 others are the optimum of the weights that are left, not of all of them."""
    model = Net()
    rule = Rule("first", prune=Prune(schedule=0.8), cluster=Cluster(n_clusters=16))
    joint = one_shot(model, [rule]).first.weight.detach().numpy()
    masked = one_shot(model, [Rule("first", prune=Prune(schedule=0.8))]).first.weight.detach().numpy()
    assert (joint != 0).sum() == (masked != 0).sum() == round(0.2 * masked.size)
    left = masked[masked != 0]
    error = float(((joint - masked) ** 2).sum())
    assert error == pytest.approx(squared_error(left, kmeans(left, 16, pin_zero=True)), rel=1e-3)


def test_all_three_with_importance_and_attention():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(24, 6, 16)
    rule = Rule("*", prune=Prune(schedule=0.5), cluster=FISHER, quantize=Quantize())
    final = one_shot(model, [rule], [x], example_inputs=(x[:1],), progress=False)
    rows = torchopt.report(final).rows
    assert len(rows) == len(torchopt.network.grid.grids(final)) == 4
    assert all(row.sparsity >= 0.5 and row.distinct_values <= 8 for row in rows)


def test_a_weight_that_no_sample_touches_counts_evenly():
    class Unused(Net):
        def forward(self, x):
            return self.last(torch.relu(x.repeat(1, 2)))

    model = Unused()
    final = one_shot(model, [Rule("*", cluster=FISHER)], [data()[0]])
    even = one_shot(model, [Rule("*", cluster=Cluster(n_clusters=8))])
    torch.testing.assert_close(final.first.weight, even.first.weight)


def test_the_model_and_its_gradients_stay():
    model, (x, y) = Net().train(), data()
    before = copy.deepcopy(model.state_dict())
    one_shot(model, Rule("*", cluster=FISHER), [(x, y)], loss=F.cross_entropy)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


BOTH = Rule("*", prune=Prune(schedule=0.5, score="movement"))


@pytest.mark.parametrize(
    ("rule", "batches", "loss", "error", "message"),
    [
        (Rule("*", cluster=FISHER), None, None, torchopt.ConfigError, r"one_shot: first\.weight: importance='fisher' needs data; give"),
        (Rule("*", prune=Prune(schedule=0.5, score="taylor")), None, None, torchopt.ConfigError, "score='taylor' needs data; give batches"),
        (BOTH, [data()], None, torchopt.ConfigError, "score='movement' needs a loss to move against"),
        (Rule("*", cluster=FISHER), [], None, torchopt.DataError, "the loader gave no batch; give at least one"),
        (Rule("*", cluster=FISHER), [data()], lambda out, y: out, torchopt.ConfigError, r"loss: returned a tensor of shape \(1, 5\); one"),
        (Rule("*", cluster=FISHER), [data()], lambda out, y: 3.0, torchopt.ConfigError, "loss: returned float; one number"),
        (Rule("*", cluster=FISHER), [data()], lambda out, y: out.sum() * torch.nan, torchopt.DataError, "is NaN or infinite; clean"),
    ],
)  # fmt: skip
def test_refusals(rule, batches, loss, error, message):
    with pytest.raises(error, match=message):
        one_shot(Net(), [rule], batches, loss=loss)


def test_prepare_refuses_an_importance_that_it_cannot_find():
    with pytest.raises(
        torchopt.ConfigError, match=r"first\.weight: importance='fisher' needs data; find the table with torchopt\.one_shot"
    ):
        torchopt.prepare(Net(), [Rule("*", cluster=FISHER)])
    with pytest.raises(torchopt.ConfigError, match="Cluster.importance: got 'fischer'; one of 'even', 'fisher' is needed"):
        Cluster(n_clusters=8, importance="fischer")
