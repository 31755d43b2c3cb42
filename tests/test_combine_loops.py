"""The three together in the training loops people have: DDP, autocast, accumulation, EMA, compile, checkpointing."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import torchopt


class Net(nn.Module):
    """Conv, batch norm, residual, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        return self.head(x.mean((2, 3)))


def rules() -> list[torchopt.Rule]:
    schedule = torchopt.PolynomialDecay(initial_sparsity=0.0, final_sparsity=0.5, begin_step=0, end_step=4, frequency=1)
    return [
        torchopt.Rule(
            "*",
            prune=torchopt.Prune(schedule=schedule),
            cluster=torchopt.Cluster(n_clusters=8),
            quantize=torchopt.Quantize(),
        )
    ]


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return torchopt.prepare(Net(), rules(), (torch.randn(2, 1, 6, 6),))


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def fit(model, steps=6, start=0, *, accumulate=1, autocast=False):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for number in range(start, start + steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = batch(number * accumulate + part)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(x).float(), y)
            (loss / accumulate).backward()
        optimizer.step()
        torchopt.step(model)
    return model


def check(model) -> nn.Module:
    final = torchopt.finalize(model)
    for name in ("stem", "body", "head"):
        weight = final.get_submodule(name).weight
        assert (weight == 0).sum() >= weight.numel() // 2, name
        codes = torchopt.network.grid.grids(final)[f"{name}.weight"].codes(weight)
        assert codes.abs().unique().numel() <= 8, name
    return final


def test_plain_loop():
    check(fit(fresh()))


def test_autocast_bf16():
    check(fit(fresh(), autocast=True))


def test_gradient_accumulation_counts_optimizer_steps():
    model = fit(fresh(), accumulate=3)
    assert int(model.torchopt_state.step) == 6
    check(model)


def test_ema_copy_finalizes_to_the_same_sparsity():
    model = fresh()
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=False)
    for number in range(6):
        fit(model, 1, number)
        average.update_parameters(model)
    for ours, theirs in zip(average.module.buffers(), model.buffers()):
        if ours.shape:
            ours.copy_(theirs)  # masks, codes and ranges are those of the trained model
    check(average)


def test_activation_checkpointing_gives_the_same_gradients():
    plain, saved = fresh(), fresh()
    fit(plain, 3), fit(saved, 3)
    x, y = batch(99)
    plain.eval(), saved.eval()
    nn.functional.cross_entropy(plain(x), y).backward()
    nn.functional.cross_entropy(checkpoint(saved, x, use_reentrant=False), y).backward()
    for ours, theirs in zip(plain.parameters(), saved.parameters()):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_deepcopy_trains_on_alone():
    model = fit(fresh(), 3)
    twin = copy.deepcopy(model)
    fit(twin, 3, 3), fit(model, 3, 3)
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_compiled_model_trains():
    model = fresh()
    compiled = torch.compile(model, backend="aot_eager")
    fit(compiled)
    check(compiled)


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(fresh())
    fit(model, 6, 100 * rank)
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _rank_with_other_rules(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rule = torchopt.Rule("*", cluster=torchopt.Cluster(n_clusters=4 + rank))
    model = torchopt.prepare(nn.Linear(16, 16), [rule])
    try:
        torchopt.step(model)
    except torchopt.StateError as error:
        with open(f"{folder}/{rank}.txt", "w") as file:
            file.write(str(error))
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_ranks_agree_on_masks_tables_and_ranges(tmp_path):
    mp.spawn(_rank, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert list(first) == list(second)
    for name, tensor in first.items():
        if "running" not in name:  # plain DDP keeps batch-norm statistics per rank until the next forward
            torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, msg=name)


def _rank_with_half_a_batch(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save([_ranges(slice(4 * rank, 4 * rank + 4), learn) for learn in (False, True)], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _ranges(part: slice, learn: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 8, 16)
    rule = torchopt.Rule("*", quantize=torchopt.Quantize(learn_scale=learn))
    model = torchopt.prepare(nn.Sequential(nn.Linear(16, 4)), [rule], example_inputs=(x[0],)).train()
    for number in range(3):
        model(x[number, part])
        for name, parameter in model.named_parameters():
            if number and name.endswith("scale"):
                parameter.data.mul_(1.5)  # as an optimizer would, on all ranks alike
        torchopt.step(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(("_val", "scale", "zero_point"))}


def test_ranges_on_two_ranks_are_those_of_the_whole_batches(tmp_path):
    mp.spawn(_rank_with_half_a_batch, (free_port(), str(tmp_path)), nprocs=2)
    alone = [_ranges(slice(None), learn) for learn in (False, True)]
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone, rtol=1e-6, atol=0)


def test_ranks_with_other_rules_are_refused(tmp_path):
    mp.spawn(_rank_with_other_rules, (free_port(), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        assert "ranks [1] were prepared with other rules than rank 0" in (tmp_path / f"{rank}.txt").read_text()


def test_the_report_in_training_shows_what_would_be_baked():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU())
    x = torch.randn(4, 3, 12, 12)
    rule = torchopt.Rule("*", cluster=torchopt.Cluster(n_clusters=16), quantize=torchopt.Quantize())
    model = torchopt.prepare(plain, [rule], example_inputs=(x,))
    assert [row.bits for row in torchopt.report(plain).rows] == [32, 32]
    assert torchopt.report(model).rows[1].techniques == ("clustered",), "no range of activations yet: the table alone"
    model(x)
    torchopt.step(model)
    during, after = torchopt.report(model), torchopt.report(torchopt.finalize(model))
    assert during.rows == after.rows
    assert during.rows[1].techniques == ("clustered", "int8")
    assert 4 <= during.rows[1].bits < 4.02
