"""From a limit to the network: the drop is met by the user's own score, the file has the bytes that are told, rules make it again."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchopt
from torchopt.data import Digits
from torchopt.errors import ConfigError, DataError, TargetError
from torchopt.recipe import parse
from torchopt.search import composed, goals
from torchopt.search.choices import Choices

FEW = Choices(sparsities=(0.8, 0.97), values=(16, 4))
DATA = Digits().load()
BATCHES = list(DATA.train_inputs[:256].split(64))


def accuracy(model):
    with torch.no_grad():
        return float((model(DATA.test_inputs).argmax(1) == DATA.test_labels).float().mean())


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        for _ in range(150):
            chosen = torch.randint(len(DATA.train_inputs), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(DATA.train_inputs[chosen]), DATA.train_labels[chosen]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(net, cache):
    return torchopt.search(net, max_drop=0.02, evaluate=accuracy, batches=BATCHES, choices=FEW, cache=cache, trials=6)


def test_the_drop_is_met_and_the_next_smaller_point_is_not(net, found):
    assert accuracy(found.model) == pytest.approx(found.point.score)
    assert found.float_score - found.point.score <= 0.02
    assert found.float_bytes > 5 * found.point.bytes
    smaller = [p for p in found.tried if p.bytes < found.point.bytes]
    assert smaller
    assert all(found.float_score - p.score > 0.02 for p in smaller)
    assert any("the next smaller point" in text for text in found.left)
    sizes, scores = [p.bytes for p in found.front], [p.score for p in found.front]
    assert found.point in found.front
    assert sizes == sorted(sizes)
    assert scores == sorted(scores)


def test_the_bytes_told_are_those_of_the_file_and_rules_make_it_again(net, found, tmp_path):
    x = BATCHES[0][:1]
    assert torchopt.export(found.model, (x,), tmp_path / "a.onnx").size_bytes == found.point.bytes
    learn = [half for batch in BATCHES for half in batch.split(16)][::2]
    again = torchopt.one_shot(net, found.rules, learn, example_inputs=(x,), progress=False)
    assert torchopt.export(again.eval(), (x,), tmp_path / "b.onnx").size_bytes == found.point.bytes
    assert torch.equal(again(DATA.test_inputs), found.model(DATA.test_inputs))


def test_what_was_predicted_is_near(found):
    told = [(p.predicted_bytes, p.bytes) for p in found.tried[2:]]  # the first two teach
    assert len(told) >= 2
    assert all(abs(a - b) <= 0.03 * b for a, b in told)


def test_each_layer_says_why_and_the_recipe_reads(found):
    assert list(found.why) == ["1.weight", "3.weight", "5.weight"]
    assert all("noise" in text for text in found.why.values())
    text = f"model: {{kind: digits_net, classes: 10}}\ndata: {{kind: digits}}\n{found.recipe}"
    rules = parse(text).recipe.stages[0].compress
    assert [r.match for r in rules] == list(found.why)
    assert [r.cluster and r.cluster.n_clusters for r in rules] == [r.cluster and r.cluster.n_clusters for r in found.rules]
    assert [r.prune and r.prune.timing.final for r in rules] == [r.prune and r.prune.timing.final for r in found.rules]


def test_the_page_needs_no_network(found, tmp_path):
    found.to_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<circle") == len(found.tried)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "x smaller" in str(found).replace("×", "x")
    assert json.dumps(found.to_dict())


def test_a_killed_search_goes_on(net, cache, tmp_path, monkeypatch, found):
    asked = {"max_drop": 0.02, "evaluate": accuracy, "batches": BATCHES, "choices": FEW, "cache": cache}
    asked |= {"trials": 3, "folder": tmp_path}
    real, made = composed.export, []

    def counted(*args, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return real(*args, **options)

    monkeypatch.setattr(composed, "export", counted)
    with pytest.raises(KeyboardInterrupt):
        torchopt.search(net, **asked)
    monkeypatch.setattr(composed, "export", lambda *args, **options: (made.append(args), real(*args, **options))[1])
    again = torchopt.search(net, **asked)
    assert len(made) == len(again.tried) == 3  # none twice
    assert [p.bytes for p in again.tried] == [p.bytes for p in found.tried[:3]]


@pytest.mark.slow
def test_the_best_of_a_size(net, cache, found):
    limit = found.point.bytes + 1500
    best = torchopt.search(net, max_bytes=limit, batches=BATCHES, choices=FEW, cache=cache, trials=3)
    assert best.point.bytes <= limit
    assert best.point.score > 0.95
    assert best.units == "agreement with float"
    with pytest.raises(
        TargetError, match=r"max_bytes=1,000 cannot be met: the smallest file has \d,\d+ bytes .* by 3 layers 97% zeros, 4"
    ):
        torchopt.search(net, max_bytes=1000, batches=BATCHES, choices=FEW, cache=cache, trials=3)


def test_a_score_that_varies_is_averaged(net, cache):
    noise = iter(torch.randn(10_000, generator=torch.Generator().manual_seed(0)).mul(0.01).tolist())
    given = torchopt.search(
        net, max_drop=0.05, evaluate=lambda m: accuracy(m) + next(noise), batches=BATCHES, choices=FEW, cache=cache, trials=3
    )
    assert any("evaluate varies by 0.0" in text and "the mean of 2 calls" in text for text in given.left)
    with pytest.raises(DataError, match="a drop of 0.001 cannot be told from that"):
        torchopt.search(
            net, max_drop=0.001, evaluate=lambda m: accuracy(m) + next(noise), batches=BATCHES, choices=FEW, cache=cache
        )


def test_a_drop_that_nothing_meets_names_the_nearest(net, cache):
    """A score that only the float network itself gets."""
    whole = [p.clone() for p in net.parameters()]

    def evaluate(model):
        same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(whole, model.parameters()))
        return 1.0 if same and len(list(model.modules())) == len(list(net.modules())) else 0.5

    few = Choices(sparsities=(), values=(16,), keep_float=False)
    with pytest.raises(
        TargetError, match=r"max_drop=0.1 cannot be met: the nearest point drops 0.5 with [\d,]+ bytes, by 3 layers 8"
    ):
        torchopt.search(net, max_drop=0.1, evaluate=evaluate, batches=BATCHES, choices=few, cache=cache, trials=4)


@pytest.mark.slow
def test_training_between(net, cache):
    """Candidates learn for a fifth, the winner in full."""
    shares = []

    def train(ready, share):
        shares.append(share)
        optimizer = torch.optim.Adam(ready.parameters(), lr=1e-3)
        ready.train()
        for at in range(int(20 * share)):
            optimizer.zero_grad()
            F.cross_entropy(
                ready(DATA.train_inputs[64 * at : 64 * at + 64]), DATA.train_labels[64 * at : 64 * at + 64]
            ).backward()
            optimizer.step()
            torchopt.step(ready)

    given = torchopt.search(
        net, max_drop=0.1, evaluate=accuracy, batches=BATCHES, choices=FEW, cache=cache, trials=3, train=train
    )
    assert set(shares) == {0.2, 1.0}
    assert shares[-1] == 1.0
    assert given.float_score - given.point.score <= 0.1


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({}, ConfigError, "search: got no limit; exactly one of max_drop, max_bytes, max_latency_ms"),
        ({"max_drop": 0.1, "max_bytes": 5}, ConfigError, "got max_drop and max_bytes"),
        ({"max_drop": -0.1}, ConfigError, "max_drop=-0.1; 0 or more, in the units of evaluate"),
        ({"max_bytes": float("nan")}, ConfigError, "max_bytes=nan; a number above 0"),
        ({"max_drop": 0.1, "objective": "speed"}, ConfigError, "objective='speed'; 'size' or 'latency'"),
        ({"max_drop": 0.1, "trials": 1}, ConfigError, "trials=1; at least 3"),
        ({"max_bytes": 10, "objective": "latency"}, ConfigError, "objective='latency' goes with max_drop"),
        ({"max_drop": 0.001}, DataError, "128 samples are held back, which tell agreement to 0.00781; max_drop=0.001 needs 2000"),
        ({"max_drop": 0.1, "evaluate": lambda m: float("nan")}, DataError, "evaluate: returned nan"),
        ({"max_drop": 0.1, "evaluate": lambda m: 1 - accuracy(m)}, DataError, "higher must be better"),
    ],
)
def test_bad_input_is_one_sentence(net, cache, options, kind, text):
    hard = Choices(sparsities=(0.99,), values=(2, 16))
    with pytest.raises(kind, match=text) as caught, warnings.catch_warnings():
        torchopt.search(net, batches=BATCHES, choices=hard, cache=cache, **options)
    assert "\n" not in str(caught.value)


def test_a_drop_of_just_what_is_allowed_is_allowed():
    """1 − 0.99 is more than 0.01 in binary fractions."""
    assert 1 - 0.99 > 0.01
    point = composed.Point(chosen={}, rules=[], bytes=1, score=0.99, loss=0.1)
    state = goals.Search(composer=None, model=None, reference=1.0, minimize="bytes", most=3)
    assert state.meets(point, 0.01)
    assert not state.meets(point, 0.0099)
