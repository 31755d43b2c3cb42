"""What each layer costs under each option: noise, bytes, time; kept on disk, so that nothing is measured twice."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import torchopt
from torchopt.codecs import encode
from torchopt.errors import ConfigError, DataError, ModelError
from torchopt.search.choices import Choices, Option
from torchopt.search.knapsack import Candidate, choose
from torchopt.search.layers import trial
from torchopt.search.layers.journal import Journal, digest
from torchopt.search.layers.sizes import Size, sizes, total

FEW = Choices(sparsities=(0.5,), values=(16, 4))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    pooled = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), *pooled, nn.Linear(32, 4)).eval()


@pytest.fixture(scope="module")
def data():
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_more_bits_less_noise_and_more_bytes(net, data):
    found = torchopt.sensitivity(net, batches=data, choices=FEW, cache=False)
    rows = {(row.layer, str(row.option)): row for row in found.rows}
    big = "2.weight"
    assert rows[big, "float"].loss == 0
    assert rows[big, "float"].bytes == 4 * 32 * 16 * 9
    for option in FEW.options()[1:]:
        assert 0 < rows[big, str(option)].loss < 1
    assert rows[big, "8 bits"].loss < 1e-4 < rows[big, "4 values"].loss < 0.2
    assert rows[big, "8 bits"].bytes > rows[big, "16 values"].bytes > rows[big, "4 values"].bytes
    assert 32 * 16 * 9 / 4 < rows[big, "4 values"].bytes < 32 * 16 * 9 / 4 + 400


def test_the_network_and_random_state_stay(net, data):
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    torchopt.sensitivity(net, batches=data[:8], choices=Choices(sparsities=(), values=(4,)), cache=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_second_call_is_free_and_a_killed_one_goes_on(net, data, tmp_path, monkeypatch):
    real, made = trial._tried, []

    def counted(plain, weight, option, *rest):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append((weight.name, str(option)))
        return real(plain, weight, option, *rest)

    monkeypatch.setattr(trial, "_tried", counted)
    with pytest.raises(KeyboardInterrupt):
        torchopt.sensitivity(net, batches=data, choices=FEW, cache=tmp_path)
    first = list(made)
    made.clear()
    monkeypatch.setattr(
        trial, "_tried", lambda plain, *given: (made.append((given[0].name, str(given[1]))), real(plain, *given))[1]
    )
    found = torchopt.sensitivity(net, batches=data, choices=FEW, cache=tmp_path)
    assert not set(first) & set(made)
    assert len(first) + len(made) == len(found.rows)
    made.clear()
    assert torchopt.sensitivity(net, batches=data, choices=FEW, cache=tmp_path).to_dict() == found.to_dict()
    assert made == []
    torchopt.sensitivity(net, batches=data[:32], choices=FEW, cache=tmp_path)  # other samples are another question
    assert len(made) == len(found.rows)


def test_a_line_cut_in_the_middle_is_measured_again(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    journal.put("one", {"loss": 1.0})
    journal.put("two", {"loss": 2.0})
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text[:-9])
    again = Journal(tmp_path / "a.jsonl")
    assert again.get("one") == {"loss": 1.0}
    assert again.get("two") is None
    again.put("two", {"loss": 3.0})
    assert Journal(tmp_path / "a.jsonl").get("two") == {"loss": 3.0}


def test_a_full_disk_costs_the_cache_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "a.jsonl")
    with pytest.warns(UserWarning, match="cannot be written .*; what is measured from here on is not kept"):
        journal.put("one", {"loss": 1.0})
    journal.put("two", {"loss": 1.0})  # said once
    assert journal.get("one")
    assert journal.get("two")


def test_bytes_are_the_codecs_own(net):
    small = torchopt.one_shot(net, [torchopt.Rule("*", cluster=torchopt.Cluster(n_clusters=4))], progress=False)
    value = small[2].weight.detach().numpy()
    found = min(sizes(small, "2.weight"), key=lambda size: size.own)
    assert found.own == encode(value).payload_bytes + 80
    assert found.shared
    assert all(n > 0 for n in found.shared.values())
    assert total([found, found]) == 2 * found.own + sum(found.shared.values())


def test_time_is_measured_once_a_shape(data, tmp_path, monkeypatch):
    from torchopt.search.layers import latency

    net, few = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval(), Choices(sparsities=(), values=(4,))
    found = torchopt.sensitivity(net, batches=data[:8], choices=few, latency=True, cache=tmp_path)
    times = {(row.layer, row.option.bits): row.latency_ms for row in found.rows}
    assert all(value is not None and 0 < value < 50 for value in times.values())
    monkeypatch.setattr(latency, "benchmark", None)  # not needed again
    again = torchopt.sensitivity(net, batches=data[:8], choices=few, latency=True, cache=tmp_path)
    assert {(row.layer, row.option.bits): row.latency_ms for row in again.rows} == times


def test_pages_and_tables(net, data, tmp_path):
    found = torchopt.sensitivity(net, lambda m: 0.5, batches=data[:8], choices=Choices(sparsities=(), values=(4,)), cache=False)
    assert {row.score for row in found.rows} == {0.5}
    assert "2.weight" in str(found)
    found.to_json(tmp_path / "a.json")
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == len(found.rows)
    found.to_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<rect") == len(found.rows)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_an_option_that_cannot_be_had_says_why(data):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 16, 3), nn.Flatten(), nn.Linear(256, 3)).eval()
    found = torchopt.sensitivity(net, batches=data[:8], choices=Choices(sparsities=(0.9,), values=(16,)), cache=False)
    lost = [row for row in found.rows if row.reason]
    assert all(row.option not in [r.option for r in found.layers()[row.layer]] for row in lost)
    assert all(len(rows) >= 2 for rows in found.layers().values())


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        (lambda net, x: torchopt.sensitivity(net, batches=[]), DataError, "batches: hold no sample"),
        (
            lambda net, x: torchopt.sensitivity(net, batches=torch.zeros(8, 1, 8, 8)),
            DataError,
            "outputs for all samples are equal",
        ),
        (lambda net, x: torchopt.sensitivity(net, batches=x * float("nan")), DataError, "NaN or infinity"),
        (lambda net, x: torchopt.sensitivity(nn.ReLU(), batches=x), ModelError, "no weights"),
        (lambda net, x: torchopt.sensitivity(net, lambda m: None, batches=x, cache=False), DataError, "evaluate: returned None"),
        (
            lambda net, x: torchopt.sensitivity(net, lambda m: float("nan"), batches=x, cache=False),
            DataError,
            "evaluate: returned nan",
        ),
        (lambda net, x: Choices(sparsities=(1.0,)), ConfigError, r"Choices.sparsities: got \(1.0,\)"),
        (lambda net, x: Choices(values=(300,)), ConfigError, "whole numbers from 2 to 255"),
        (lambda net, x: Choices(bits=8), ConfigError, "Choices.bits: got 8; a list of"),
    ],
)
def test_bad_input_is_one_sentence(net, data, given, kind, text):
    with pytest.raises(kind, match=text) as caught:
        given(net, data)
    assert "\n" not in str(caught.value)


def test_the_choice_counts_what_is_shared_once():
    """Alone, the form with a function is dearer; three layers together pay for it once."""

    def made(layers):
        forms = (Size(own=100), Size(own=60, shared={"f": 90}))
        return [Candidate(layer=str(i), option=Option(values=4), loss=0.1, size=size) for i in range(layers) for size in forms]

    assert all(c.size.own == 100 for c in choose(made(2), minimize="bytes").values())
    assert all(c.size.own == 60 for c in choose(made(3), minimize="bytes").values())


def test_the_choice_is_the_best_of_all():
    rng, options = np.random.default_rng(0), [Option(values=v) for v in (2, 4, 8)]
    made = [
        Candidate(layer=str(i), option=o, loss=float(rng.random()), size=Size(own=int(rng.integers(10, 99))))
        for i in range(5)
        for o in options
    ]
    import itertools

    grid = [[c for c in made if c.layer == str(i)] for i in range(5)]
    best = min(sum(c.size.own for c in some) for some in itertools.product(*grid) if sum(c.loss for c in some) <= 2)
    assert sum(c.size.own for c in choose(made, minimize="bytes", loss=2).values()) == best
    assert choose(made, minimize="bytes", loss=0.01) is None


def test_content_names_content():
    a = torch.arange(6.0).reshape(2, 3)
    assert digest(a) == digest(a.clone()) != digest(a.T.contiguous())
    assert digest(["a", "b"]) != digest(["ab"])
