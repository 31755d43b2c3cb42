"""Dropout whose rate the code chooses by its mode, as transformers' attention does: a prepared network trains with the same rates."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchopt import Quantize, Rule, finalize, prepare, step

RULES = [Rule("*", quantize=Quantize())]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(16, 16), nn.Linear(16, 4), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(self.a(x), p=0.5 if self.training else 0.0, training=self.training)
        return self.b(self.drop(F.relu(h)))


def test_the_rates_of_training_are_those_of_the_float_network() -> None:
    torch.manual_seed(0)
    net, x = Attends(), torch.randn(64, 16)
    ready = prepare(net, RULES, (x[:1],))
    assert sorted(m.p for m in ready.modules() if isinstance(m, nn.Dropout)) == [0.2, 0.5]
    ready.train()(x).square().mean().backward()
    step_ready = torch.optim.SGD(ready.parameters(), lr=0.1)
    step_ready.step()
    step(ready)
    final = finalize(ready).eval()
    torch.testing.assert_close(final(x), ready.eval()(x), rtol=0, atol=0)


def test_a_bert_trains_with_fake_quantizers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    config = transformers.BertConfig(**sizes, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.1)
    config._attn_implementation = "eager"

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config, add_pooling_layer=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.bert(ids).last_hidden_state

    ids = torch.randint(0, 20, (4, 6))
    ready = prepare(Hidden(), RULES, (ids[:1],)).train()
    ready(ids).square().mean().backward()
    assert 0.3 in [m.p for m in ready.modules() if isinstance(m, nn.Dropout)]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return F.dropout(h) if self.training else h


def test_a_dropout_that_the_graph_has_not_is_said() -> None:
    with pytest.warns(UserWarning, match="drops values at 1 places while it trains, and its graph at 0"):
        prepare(Twice(), RULES, (torch.randn(2, 16),)).train()(torch.randn(4, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(Attends(), RULES, (torch.randn(2, 16),))
