"""Models that `prepare` refuses, each with one sentence that says what would be right; and odd ones that work."""

import pytest
import torch
from torch import nn

import torchopt

QUANTIZE = [torchopt.Rule("*", quantize=torchopt.Quantize())]
PRUNE = [torchopt.Rule("*", prune=torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.5, begin_step=0)))]
X = torch.randn(4, 8)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def computed() -> nn.Module:
    net = plain()
    nn.utils.parametrize.register_parametrization(net[0], "weight", Doubled())
    return net


@pytest.mark.parametrize(
    ("model", "rules", "message"),
    [
        (nn.DataParallel(plain()), QUANTIZE, r"wrapped in DataParallel; prepare model\.module"),
        (torch.compile(plain()), PRUNE, r"wrapped in OptimizedModule; prepare model\._orig_mod"),
        (computed(), PRUNE, r"0\.weight is computed by Doubled; .*remove_parametrizations\(module, 'weight'\)"),
        (plain().bfloat16(), QUANTIZE, r"0\.weight is torch\.bfloat16; .*model\.float\(\)"),
        (plain().double(), QUANTIZE, r"0\.weight is torch\.float64"),
    ],
)
def test_refused_with_the_remedy(model, rules, message):
    with pytest.raises(torchopt.ModelError, match=message):
        torchopt.prepare(model, rules, example_inputs=(X,))


def test_a_weight_that_no_rule_names_may_be_computed_by_others():
    model = torchopt.prepare(computed(), [torchopt.Rule("2", prune=PRUNE[0].prune)])
    torchopt.step(model)
    assert [row.sparsity for row in torchopt.report(model).rows] == [0, 0.5]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        scores = torch.einsum("bic,bjc->bij", self.q(x), self.k(x)).softmax(-1)
        return torch.einsum("bij,bjc->bic", scores, self.v(x))


def test_functions_that_torch_writes_in_python_are_saved_and_loaded(tmp_path):
    x = torch.randn(2, 5, 8)
    model = torchopt.one_shot(Attention(), QUANTIZE, [x], example_inputs=(x,), progress=False)
    torchopt.save(model, tmp_path / "m.safetensors")
    assert torch.equal(torchopt.load(tmp_path / "m.safetensors", Attention())(x), model(x))


def test_outputs_without_a_range_have_no_step(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    final = torchopt.one_shot(model, QUANTIZE, [X], example_inputs=(X,), progress=False)
    torchopt.export(final, (X,), tmp_path / "m.onnx")
    assert torchopt.verify(final, tmp_path / "m.onnx", [X]).max_steps is None
