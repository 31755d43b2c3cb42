"""Pruned training: every kind of layer, the sparsity in each forward pass, scores, resume, and what a loop may do (P16–P24, P27–P30)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from torchopt.errors import StateError
from torchopt.network.weights import find_weight, weights
from torchopt.prune import Prune, attach, bake, finish, mask_of, observes, update
from torchopt.prune.schedule import ConstantSparsity, PolynomialDecay

HALF = Prune(schedule=ConstantSparsity(target_sparsity=0.5, begin_step=0, frequency=1))


def attached(model: nn.Module, config: Prune = HALF, *, preserve: bool = True) -> nn.Module:
    attach([(w, config) for w in weights(model)], preserve=preserve)
    return model


def train(model, inputs, steps, *, first=1, optimizer=None):
    """A few optimizer steps on the squared output, each counted; returns the optimizer."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        first_output(model(*inputs)).square().mean().backward()
        optimizer.step()
        update(model, step)
    return optimizer


def first_output(output):
    while isinstance(output, tuple):
        output = output[0]
    return output


def zeros(tensor) -> float:
    return (tensor == 0).double().mean().item()


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 10, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, **kwargs)

    def forward(self, x):
        return self.attention(x, x[..., : self.attention.kdim], x[..., : self.attention.vdim], need_weights=False)


image, sequence = torch.randn(2, 3, 8, 8), torch.randn(3, 4, 3)
LAYERS = {
    "conv1d": (nn.Conv1d(3, 4, 3), (torch.randn(2, 3, 9),)),
    "conv2d": (nn.Conv2d(3, 4, 3), (image,)),
    "conv3d": (nn.Conv3d(3, 4, 2), (torch.randn(2, 3, 4, 4, 4),)),
    "conv_transpose": (nn.ConvTranspose2d(3, 4, 3), (image,)),
    "pointwise": (nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 1)), (image,)),
    "linear": (nn.Linear(5, 4), (torch.randn(2, 5),)),
    "bilinear": (nn.Bilinear(5, 3, 4), (torch.randn(2, 5), torch.randn(2, 3))),
    "embedding": (nn.Embedding(10, 3), (torch.arange(10),)),
    "lstm": (nn.LSTM(3, 10, batch_first=True), (sequence,)),
    "gru": (nn.GRU(3, 10, batch_first=True), (sequence,)),
    "rnn": (nn.RNN(3, 10, batch_first=True), (sequence,)),
    "stacked": (Stacked(), (sequence,)),
    "lstm_cell": (nn.LSTMCell(3, 10), (torch.randn(4, 3),)),
    "attention": (Attention(), (torch.randn(5, 2, 32),)),
    "attention_kv": (Attention(kdim=16, vdim=8), (torch.randn(5, 2, 32),)),
    "transformer": (nn.TransformerEncoderLayer(32, 2, 16, batch_first=True, dropout=0.0), (torch.randn(2, 5, 32),)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", LAYERS)
def test_P16_one_step_gives_exactly_half_on_every_layer(name):
    layer, inputs = LAYERS[name]
    model = attached(copy.deepcopy(layer))
    names = [key for key, _ in layer.named_parameters()]
    train(model, inputs, 1)
    pruned = [w for w in weights(model) if mask_of(w) is not None]
    assert pruned
    for weight in pruned:
        mask = mask_of(weight)
        assert int(mask.sum()) == round(mask.numel() * 0.5), weight.name
        assert torch.equal(weight.value == 0, ~mask), weight.name
    for mode in (True, False):  # evaluation has fast paths in C++ that read the attributes
        model.train(mode)
        with torch.no_grad():
            before = first_output(model(*inputs))
            plain = copy.deepcopy(model)
            bake(plain)
            assert torch.equal(first_output(plain(*inputs)), before)
    assert [key for key, _ in plain.named_parameters()] == names
    assert not list(plain.named_buffers())
    assert all(zeros(w.value) > 0 for w in weights(plain) if not w.depthwise)
    assert type(plain) is type(layer)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", LAYERS)
def test_forward_reads_the_masked_weight(name):
    """With every weight masked but one a tensor, the output is that of a plain copy with zeros, in each mode."""
    layer, inputs = LAYERS[name]
    model = attached(copy.deepcopy(layer), Prune(schedule=0.999, include_depthwise=True))
    finish(model)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for weight in weights(expected):
            weight.trainable.mul_(mask_of(find_weight(model, weight.name)))
        for mode in (True, False):
            torch.testing.assert_close(first_output(model.train(mode)(*inputs)), first_output(expected.train(mode)(*inputs)))


def convnet():
    return [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 13 * 13, 10)]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, _, _, _, self.dense = convnet()

    def forward(self, x):
        return self.dense(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


@pytest.mark.parametrize(
    "build", [lambda: nn.Sequential(*convnet()), Functional, lambda: nn.Sequential(nn.Sequential(*convnet()))]
)
def test_P17_a_convnet_goes_from_dense_to_half(build):
    model = attached(build())
    assert all(zeros(w.value) == 0 for w in weights(model))
    train(model, (torch.randn(4, 1, 28, 28),), 2)
    assert [zeros(w.value) for w in weights(model)] == pytest.approx([0.5, 0.5], abs=1e-4)


def test_P17_layer_by_layer():
    model = nn.Sequential(*convnet())
    for weight in weights(model):
        attach([(weight, HALF)], preserve=True)
    train(model, (torch.randn(4, 1, 28, 28),), 1)
    assert [zeros(w.value) for w in weights(model)] == pytest.approx([0.5, 0.5], abs=1e-4)


def test_P18_a_small_tensor_keeps_its_last_weight():
    model = attached(nn.Linear(5, 4), Prune(schedule=0.99))
    train(model, (torch.randn(2, 5),), 1)
    assert int(model.weight_mask.sum()) == 1


def test_P19_target_zero_leaves_the_weights_identical():
    model = nn.Linear(5, 4)
    before = model.weight.detach().clone()
    attached(model, Prune(schedule=0.0))
    update(model, 1)
    finish(model)
    assert torch.equal(model.weight, before)
    assert bool(model.weight_mask.all())


def test_P20_attaching_changes_neither_inference_nor_the_parameters():
    model = nn.Sequential(*convnet())
    x = torch.randn(4, 1, 28, 28)
    before, parameters, names = model(x), list(model.parameters()), [n for n, _ in model.named_parameters()]
    attached(model)
    assert torch.equal(model(x), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [n.replace("_orig", "") for n, _ in model.named_parameters()] == names
    assert sum(b.numel() * b.element_size() for b in model.buffers()) == sum(w.value.numel() for w in weights(model)) + 2


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, foreach=False),
        lambda p: torch.optim.Adam(p, lr=0.5, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.5),
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
    ],
)
def test_P21_a_masked_weight_is_zero_in_each_forward_pass(optimizer):
    """Also where a loop forgets to count a step: the pass itself sees that the optimizer moved the weights."""
    model = attached(nn.Linear(8, 8, bias=False), Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1000)))
    update(model, 1)
    seen = []
    model.register_forward_hook(lambda m, i, o: seen.append(m.weight.detach().clone()))
    x, solver = torch.randn(4, 8), optimizer(model.parameters())

    def loss():
        solver.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    mask = model.weight_mask.clone()
    for step in range(6):
        loss() if not isinstance(solver, torch.optim.LBFGS) else None
        solver.step(loss if isinstance(solver, torch.optim.LBFGS) else None)
        if step % 2:
            update(model, 2 + step)
    assert len(seen) >= 6
    assert all(torch.equal(value == 0, ~mask) for value in seen)
    assert torch.equal(model.weight_mask, mask)


@pytest.mark.parametrize("solver", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_P21_with_fused_optimizers(solver):
    """They do not count versions, as writes through `.data` do not: the update after each step is what masks."""
    model = attached(nn.Linear(8, 8, bias=False), Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1000)))
    seen = []
    model.register_forward_hook(lambda m, i, o: seen.append(m.weight.detach().clone()))
    train(model, (torch.randn(4, 8),), 6, optimizer=solver(model.parameters(), lr=0.5, weight_decay=0.1, fused=True))
    assert [zeros(value) for value in seen] == [0.0] + [0.5] * 5
    assert all(torch.equal(value == 0, ~model.weight_mask) for value in seen[1:])


def test_a_write_through_data_is_masked_by_the_next_update():
    model = attached(nn.Linear(8, 8, bias=False))
    update(model, 1)
    model.weight_orig.data.add_(1.0)  # as old optimizers do: the version counter does not see it
    update(model, 2)
    assert zeros(model.weight) == 0.5


def test_gradients_are_dense_and_a_masked_weight_can_come_back():
    """TFMOT's semantics: a weight masked once was alive again two steps later, lifted by one update."""
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    attached(model)
    update(model, 1)
    assert model.weight_mask.tolist() == [[False, False, True, True]]
    model(torch.tensor([[-10.0, 0.0, 0.0, 0.0]])).sum().backward()
    assert model.weight_orig.grad.tolist() == [[-10.0, 0.0, 0.0, 0.0]]
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    update(model, 2)
    assert model.weight.tolist() == [[10.0, 0.0, 0.0, 4.0]]


def test_P22_resume_in_the_middle_of_a_schedule():
    config = Prune(
        schedule=PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.6, begin_step=1, end_step=4, power=3, frequency=1)
    )
    torch.manual_seed(0)
    fresh, x = nn.Linear(10, 10), (torch.randn(4, 10),)
    model = attached(copy.deepcopy(fresh), config)
    assert zeros(model.weight) == 0
    optimizer = train(model, x, 1)
    assert zeros(model.weight) == pytest.approx(0.2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, x, 3, first=2, optimizer=optimizer)

    resumed = attached(nn.Linear(10, 10), config)  # other weights: everything comes from the file
    resumed.load_state_dict(saved[0], strict=True)
    other = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    other.load_state_dict(saved[1])
    assert zeros(resumed.weight_orig) == pytest.approx(0.2)
    train(resumed, x, 3, first=2, optimizer=other)
    assert zeros(resumed.weight) == pytest.approx(0.6)
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_P22_preserved_zeros_are_remembered_by_a_checkpoint():
    pruned = nn.Linear(4, 4)
    pruned.weight.data[0] = 0
    saved = attached(pruned).state_dict()
    resumed = attached(nn.Linear(4, 4))
    resumed.load_state_dict(saved, strict=True)
    resumed.weight_orig.data[0] = 100.0
    update(resumed, 1)
    assert not resumed.weight_mask[0].any()


def test_P23_the_final_sparsity_holds_after_the_end():
    config = Prune(schedule=PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.6, begin_step=0, end_step=2))
    x = (torch.randn(4, 10),)
    model = attached(nn.Linear(10, 10), config)
    train(model, x, 3)
    assert zeros(model.weight) == pytest.approx(0.6)
    again = attached(nn.Linear(10, 10), config)
    again.load_state_dict(model.state_dict())
    assert zeros(again.weight) == pytest.approx(0.6)
    train(again, x, 1, first=4)
    assert zeros(again.weight) == pytest.approx(0.6)


def test_P27_a_reused_layer_is_pruned_once_and_a_second_attach_is_refused():
    shared = nn.Linear(6, 6)
    model = attached(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)))
    assert len(shared._forward_pre_hooks) == 1
    train(model, (torch.randn(2, 6),), 3)
    assert zeros(shared.weight) == 0.5
    with pytest.raises(StateError, match=r"0\.weight: carries a mask already; finalize the model"):
        attach([(w, HALF) for w in weights(model)], preserve=True)


def test_P27_a_layer_without_weights_has_nothing_to_prune():
    assert attach([(w, HALF) for w in weights(nn.ReLU())], preserve=True) == []
    assert update(nn.ReLU(), 1) is False
    assert update(attached(nn.Linear(2, 2)), 1) is True


def test_P30_one_shot_without_data_on_a_nested_model():
    model = nn.Sequential(nn.Conv2d(1, 20, 5), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(20, 10))))
    assert finish(attached(model, Prune(schedule=PolynomialDecay(final_sparsity=0.8, end_step=1000))))
    assert [zeros(w.value) for w in weights(model)] == pytest.approx([0.8, 0.8])
    assert finish(nn.ReLU()) is False


def test_tied_weights_are_one_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x))

    model = attached(Tied())
    train(model, (torch.arange(10),), 3)
    assert zeros(model.embed.weight) == zeros(model.out.weight) == 0.5
    copied = copy.deepcopy(model)
    bake(copied)
    assert copied.out.weight is copied.embed.weight
    assert torch.equal(copied(torch.arange(10)), model(torch.arange(10)))


def test_a_parameter_of_a_custom_module():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x @ self.kernel

    model = nn.Sequential(Custom())
    attach([(find_weight(model, "0.kernel"), HALF)], preserve=True)
    train(model, (torch.randn(2, 4),), 2)
    assert zeros(model[0].kernel) == 0.5
    bake(model)
    assert zeros(dict(model.named_parameters())["0.kernel"]) == 0.5


def test_torch_prune_means_what_its_users_expect():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    assert not torch_prune.is_pruned(model)
    attached(model)
    update(model, 1)
    assert torch_prune.is_pruned(model)
    assert set(dict(model[0].named_parameters())) == {"weight_orig", "bias"}
    assert torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)
    value = model[0].weight.detach().clone()
    torch_prune.remove(model[0], "weight")
    assert not torch_prune.is_pruned(model)
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, value)
    assert list(model[0].state_dict()) == ["weight", "bias"]
    assert not model[0]._forward_hooks
    assert not torch.signbit(model[0].weight[value == 0]).any()  # +0.0, so that a bitmask restores every bit


def test_no_containers_are_stacked_however_long_training_runs():
    model = attached(nn.Linear(6, 6))
    for step in range(1, 300):
        update(model, step)
    assert len(model._forward_pre_hooks) == 1
    assert sorted(name for name, _ in model.named_buffers()) == ["weight_floor", "weight_mask"]


def test_taylor_adds_up_weight_times_gradient():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0]])
    attached(model, Prune(schedule=ConstantSparsity(target_sparsity=0.3, begin_step=2, frequency=1), score="taylor"))
    for step, gradient in ((1, [9.0, -1.0, 0.5]), (2, [-3.0, 1.0, 0.5])):
        model.weight_orig.grad = torch.tensor([gradient])
        update(model, step)
    assert model.weight_score.tolist() == [[12.0, 4.0, 3.0]]
    assert model.weight_mask.tolist() == [[True, True, False]]


def test_movement_keeps_what_moves_away_from_zero():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, -3.0]])
    attached(model, Prune(schedule=ConstantSparsity(target_sparsity=0.3, begin_step=2, frequency=1), score="movement"))
    for step, gradient in ((1, [-9.0, 1.0, 0.5]), (2, [3.0, 1.0, 0.5])):
        model.weight_orig.grad = torch.tensor([gradient])
        update(model, step)
    assert model.weight_score.tolist() == [[6.0, -4.0, 3.0]]
    assert model.weight_mask.tolist() == [[True, False, True]]


@pytest.mark.parametrize("score", ["taylor", "movement"])
def test_scores_without_gradients_are_errors(score):
    model = attached(nn.Linear(3, 3), Prune(schedule=0.5, score=score))
    with pytest.raises(
        StateError, match=rf"weight: has no gradient, which score='{score}' needs; call torchopt\.step\(model\) after"
    ):
        update(model, 1)
    with pytest.raises(StateError, match=rf"weight: score='{score}' has seen no data; it needs training steps with gradients"):
        finish(model)


def test_wanda_weighs_by_the_norm_of_the_inputs():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    attached(model, Prune(schedule=0.5, score="wanda"))
    assert observes(model)
    with pytest.raises(StateError, match=r"weight: score='wanda' has seen no data; it needs forward passes"):
        finish(model)
    model(torch.tensor([[[3.0, 0.1, 1.0]], [[4.0, 0.1, 0.0]]]))  # norms 5, 0.1414, 1
    assert model.weight_inputs.tolist() == pytest.approx([25.0, 0.02, 1.0])
    finish(model)
    assert model.weight_mask.int().tolist() == [[1, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("conv", "x"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(5, 4, 7, 7)),
        (nn.Conv1d(4, 6, 3), torch.randn(4, 9)),
        (nn.ConvTranspose2d(4, 6, 3), torch.randn(5, 4, 7, 7)),
    ],
)
def test_wanda_on_convolutions(conv, x):
    before = conv.weight.detach().clone()
    attached(conv, Prune(schedule=0.5, score="wanda"))
    conv(x)
    spatial = len(conv.kernel_size)
    channels = x.movedim(-1 - spatial, 0).flatten(1)
    torch.testing.assert_close(conv.weight_inputs, channels.square().sum(dim=1))
    finish(conv)
    norm = channels.norm(dim=1)
    score = torch.zeros_like(before)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in before.shape[:2]]).tolist():
        group = index[0] // (before.shape[0] // conv.groups)
        channel = index[0] if conv.transposed else group * before.shape[1] + index[1]
        score[index[0], index[1]] = before[index[0], index[1]].abs() * norm[channel]
    threshold = score.flatten().sort(descending=True).values[round(score.numel() / 2) - 1]
    assert torch.equal(conv.weight_mask, score >= threshold)
