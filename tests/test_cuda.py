"""Masks, shared values and quantizers on a GPU, in float32 and under bf16 autocast: the same invariants as on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchopt
from torchopt.data import Digits
from torchopt.train import AdamW, Train, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none here")

PRUNE = torchopt.Prune(schedule=torchopt.PolynomialDecay(final_sparsity=0.8, end_step=20, frequency=5), scope="global")
RULES = {
    "prune": {"prune": PRUNE},
    "cluster": {"cluster": torchopt.Cluster(n_clusters=16)},
    "soft cluster": {"cluster": torchopt.Cluster(n_clusters=16, soft_until=10)},
    "per channel": {"cluster": torchopt.Cluster(n_clusters=4, per_channel=True)},
    "quantize": {"quantize": torchopt.Quantize()},
    "quantize 4 bits, learned": {"quantize": torchopt.Quantize(weight_bits=4, learn_scale=True)},
    "prune, cluster": {"prune": PRUNE, "cluster": torchopt.Cluster(n_clusters=16)},
    "all": {"prune": PRUNE, "cluster": torchopt.Cluster(n_clusters=16), "quantize": torchopt.Quantize()},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", RULES)
def test_trains_on_the_gpu(name: str, autocast: bool, tmp_path) -> None:
    data = Digits().load()
    x, y = data.train_inputs.cuda(), data.train_labels.cuda()
    rules = [torchopt.Rule("*", **RULES[name])]
    model = torchopt.prepare(network().cuda(), rules, example_inputs=(x[:1],))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for start in range(0, 1280, 64):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x[start : start + 64]).float(), y[start : start + 64])
        loss.backward()
        optimizer.step()
        torchopt.step(model)
    torchopt.save(model, tmp_path / "state.pt")
    model.eval()
    expected = model(x[:32])
    final = torchopt.finalize(model)
    assert torch.equal(final(x[:32]), expected), "finalize is the last forward, bit for bit"
    weight = final.get_parameter("3.weight") if name.startswith(("prune", "cluster", "soft", "per")) else None
    if weight is not None and "prune" in RULES[name]:
        assert int((weight == 0).sum()) >= 0.5 * weight.numel()
    if weight is not None and name in ("cluster", "soft cluster", "prune, cluster"):
        assert weight.unique().numel() <= 16
    final = final.cpu()
    torchopt.export(final, (x[:1].cpu(),), tmp_path / "model.onnx")
    verdict = torchopt.verify(final, tmp_path / "model.onnx", [x[:256].cpu()])
    assert verdict.top1_agreement >= 0.99, str(verdict)


def test_gpu_and_cpu_choose_the_same_masks_and_codes() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    rules = [
        torchopt.Rule(
            "*",
            prune=torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.7, begin_step=0), scope="global"),
            cluster=torchopt.Cluster(n_clusters=8),
        )
    ]
    finals = {}
    for device in ("cpu", "cuda"):
        model = torchopt.prepare(plain.to(device), rules, example_inputs=(torch.zeros(1, 64, device=device),))
        torchopt.step(model)
        finals[device] = torchopt.finalize(model).cpu().state_dict()
    for name in ("0.weight", "2.weight"):
        assert torch.equal(finals["cpu"][name] == 0, finals["cuda"][name] == 0)
        torch.testing.assert_close(finals["cpu"][name], finals["cuda"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_loop_trains_there_and_brings_the_model_back(precision: str) -> None:
    model = torchopt.prepare(network(), [torchopt.Rule("*", **RULES["all"])], example_inputs=(torch.zeros(1, 1, 8, 8),))
    config = Train(epochs=3, optimizer=AdamW(lr=0.003), device="cuda", precision=precision)
    history = train(model, Digits().load(), config, after_step=torchopt.step, progress=False)
    assert history[-1].accuracy > 0.9
    assert {p.device.type for p in model.parameters()} == {"cpu"}
