"""What a training loop may do around masks: copies, resume, accumulation, autocast, compile, EMA, DDP, tables (P24, P25, P29)."""

import copy
import io
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from torchopt.network.weights import weights
from torchopt.prune import Prune, attach, bake, mask_of, update
from torchopt.prune.schedule import ConstantSparsity, CosineDecay, MultiStep, PolynomialDecay

HALF = Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def pruned(config: Prune = HALF, seed: int = 0) -> nn.Sequential:
    model = network(seed)
    attach([(w, config) for w in weights(model)], preserve=True)
    return model


def batch(seed: int = 1) -> torch.Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def sparsity(model: nn.Module) -> list[float]:
    return [(w.value == 0).double().mean().item() for w in weights(model)]


def train(model: nn.Module, steps: int, *, forward=None) -> nn.Module:
    optimizer = sgd(model)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (forward or model)(batch(step)).square().mean().backward()
        optimizer.step()
        update(model, step)
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_deepcopy_at_any_time_is_independent_and_trains_alike():
    model = train(pruned(), 2)
    model(batch()).sum().backward()
    copied = copy.deepcopy(model)
    assert equal(model, copied)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(copied, 3)
    assert sparsity(copied) == [0.5, 0.5]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert equal(train(model, 3), copied)


def test_a_copy_made_between_optimizer_and_step_is_masked_in_its_forward():
    """The copy's Parameter starts at version 0 again, which must not look as if it had been masked."""
    model = pruned(Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1000)))
    update(model, 1)
    optimizer = sgd(model)
    for _ in range(3):
        model(batch()).square().mean().backward()
        optimizer.step()
        copied = copy.deepcopy(model)
        copied(batch())
        assert all(torch.equal(w.trainable == 0, ~mask_of(w)) for w in weights(copied))


def test_pickle_round_trip():
    model = train(pruned(), 2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert equal(model, again)
    assert equal(train(again, 2), train(model, 2))


def test_strict_load_assign_and_continue():
    config = Prune(schedule=PolynomialDecay(final_sparsity=0.8, end_step=6, frequency=2))
    model = train(pruned(config), 3)
    for assign in (False, True):
        other = pruned(config, seed=9)
        other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=assign)
        assert torch.equal(other.eval()(batch()), copy.deepcopy(model).eval()(batch()))
        assert other[4].weight is other[4].weight_orig
        assert equal(train(other.train(), 6), train(copy.deepcopy(model), 6))


def test_gradient_accumulation_equals_one_large_batch():
    def run(pieces):
        model = pruned()
        model[1] = nn.Identity()  # batch norm would see other batches
        optimizer = sgd(model)
        for step in range(1, 5):
            optimizer.zero_grad()
            for piece in batch(step).chunk(pieces):
                (model(piece).square().mean() / pieces).backward()
            optimizer.step()
            update(model, step)
        return model

    one, three = run(1), run(3)
    assert sparsity(three) == [0.5, 0.5]
    for a, b in zip(one.state_dict().values(), three.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_several_forward_passes_before_one_backward():
    model = train(pruned(), 2)
    loss = sum(model(batch(i)).square().mean() for i in range(3))
    with torch.no_grad():
        model(batch(7))
    model.eval()(batch(8))
    loss.backward()
    assert model[4].weight_orig.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saving = pruned(), pruned()
    train(plain, 3)
    train(saving, 3, forward=lambda x: checkpoint(saving, x, use_reentrant=False))
    norm_statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}  # checkpointing runs the norm twice
    for key, value in plain.state_dict().items():
        assert key in norm_statistics or torch.equal(saving.state_dict()[key], value), key


def test_autocast_bfloat16():
    model = pruned()
    optimizer = sgd(model)
    for step in range(1, 4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch(step))
            assert out.dtype == torch.bfloat16
            loss = out.float().square().mean()
        loss.backward()
        optimizer.step()
        update(model, step)
    assert sparsity(model) == [0.5, 0.5]
    assert model[4].weight_orig.dtype == torch.float32
    before = model.eval()(batch())
    bake(model)
    assert torch.equal(model(batch()), before)


def test_ema_copy_follows_the_masks():
    model = pruned(Prune(schedule=PolynomialDecay(final_sparsity=0.75, end_step=6, frequency=2)))
    for average in (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers) for buffers in (False, True)
    ):
        if average.use_buffers:
            model[1] = average.module[1] = nn.Identity()
        optimizer = sgd(model)
        for step in range(1, 9):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            optimizer.step()
            update(model, step)
            average.update_parameters(model)
        average(batch())
        if not average.use_buffers:
            assert sparsity(average.module) == pytest.approx([0.75, 0.75])
            assert all(torch.equal(mask_of(a), mask_of(b)) for a, b in zip(weights(average.module), weights(model), strict=True))
        final = copy.deepcopy(average.module)
        bake(final)
        assert torch.equal(final.eval()(batch()), average.module.eval()(batch()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile():
    torch._dynamo.reset()
    model, plain = pruned(), pruned()
    compiled = torch.compile(model, backend="aot_eager")
    train(plain, 4)
    train(model, 4, forward=compiled)
    assert sparsity(model) == [0.5, 0.5]
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)
    assert torch.equal(copy.deepcopy(model).eval()(batch()), plain.eval()(batch()))


def test_functional_call_with_other_weights_is_masked_and_differentiable():
    model = train(pruned(), 1)
    other = {name: (p.detach() + 1.0).requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model.eval(), other, batch())
    grads = torch.autograd.grad(out.sum(), other["4.weight_orig"])
    assert torch.equal(grads[0] != 0, model[4].weight_mask & (grads[0] != 0))
    assert bool((other["4.weight_orig"] != 0).any(dim=0).any())
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in expected.named_parameters():
            p.copy_(other[name])
    assert torch.equal(expected(batch()), out)
    before = copy.deepcopy(model)
    assert torch.equal(before(batch()), model(batch()))


class Halves(nn.Module):
    """Some parametrization, as a table of shared values is."""

    def forward(self, w):
        return w + (torch.round(w * 32) / 32 - w).detach()


def test_a_parametrization_under_the_mask():
    model = pruned()
    for module in (model[0], model[4]):
        parametrize.register_parametrization(module, "weight_orig", Halves(), unsafe=True)
    seen = []
    model[4].register_forward_hook(lambda m, i, o: seen.append(m.weight.detach().clone()))
    train(model, 4)
    model(batch()).sum().backward()
    copied = copy.deepcopy(model)  # a product with a graph would refuse to be copied
    assert torch.equal(copied.eval()(batch()), model.eval()(batch()))
    mask = model[4].weight_mask
    assert int(mask.sum()) == round(mask.numel() * 0.5)
    assert not seen[-1][~mask].any()
    assert torch.equal(seen[-1] * 32, torch.round(seen[-1] * 32))
    assert not torch.signbit(seen[-1][~mask]).any()
    leaf = model[4].parametrizations.weight_orig.original
    assert leaf.grad[mask].abs().sum() > 0
    assert not leaf[~mask].any()


def test_a_parametrization_under_the_masks_of_recurrent_and_attention_layers():
    rnn, attention = nn.GRU(3, 8, batch_first=True), nn.MultiheadAttention(16, 2)
    for module, names in (
        (rnn, ("weight_ih_l0", "weight_hh_l0")),
        (attention.out_proj, ("weight",)),
        (attention, ("in_proj_weight",)),
    ):
        attach([(w, HALF) for w in weights(module) if w.param in names and w.module is module], preserve=True)
        for name in names:
            parametrize.register_parametrization(module, f"{name}_orig", Halves(), unsafe=True)
        update(module, 1)
    x, y = torch.randn(2, 5, 3), torch.randn(5, 2, 16)
    for mode in (True, False):
        out = rnn.train(mode)(x)[0], attention.train(mode)(y, y, y)[0]
        reference = copy.deepcopy(rnn), copy.deepcopy(attention)
        plain = nn.GRU(3, 8, batch_first=True), nn.MultiheadAttention(16, 2)
        with torch.no_grad():
            for source, target in zip(reference, plain, strict=True):
                values = {w.name: w.value for w in weights(source)}
                for name, p in target.named_parameters():
                    p.copy_(values[name] if name in values else source.get_parameter(name))
        torch.testing.assert_close(plain[0](x)[0], out[0])
        torch.testing.assert_close(plain[1](y, y, y)[0], out[1])
    copy.deepcopy(rnn)


def test_P24_P25_a_hand_written_loop_and_what_happens_without_its_step():
    import torchopt
    from torchopt.errors import StateError

    model = torchopt.prepare(network(), [torchopt.Rule("*", prune=HALF)])
    optimizer = sgd(model)
    for epoch in range(2):
        for seed in range(3):
            optimizer.zero_grad()
            model(batch(seed)).square().mean().backward()
            optimizer.step()
            if epoch:
                torchopt.step(model)
        if not epoch:
            with pytest.raises(StateError, match="finalize: step was never called"):
                torchopt.finalize(model)
            model.eval()(batch())  # inference alone is fine
            assert int(model.torchopt_state.step) == 0
            model.train()
    assert int(model.torchopt_state.step) == 3
    final = torchopt.finalize(model)
    assert sparsity(final) == [0.5, 0.5]
    assert torch.equal(final.eval()(batch()), model.eval()(batch()))
    with pytest.raises(StateError, match="was not prepared"):
        torchopt.step(network())


def _rank(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config = Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=2), scope="global", score="taylor")
    for chosen in (HALF, config):
        model = pruned(chosen, seed=rank)  # DDP makes the weights of rank 1 those of rank 0
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(parallel)
        for step in range(1, 6):
            optimizer.zero_grad()
            with parallel.no_sync():
                parallel(batch(100 * rank + step)).square().mean().backward()
            parallel(batch(200 * rank + step)).square().mean().backward()
            optimizer.step()
            update(parallel, step)
        queue.put((rank, chosen.score, {key: value.numpy() for key, value in model.state_dict().items()}, sparsity(model)))
    dist.barrier()
    dist.destroy_process_group()


SCHEDULES = {
    "polynomial": PolynomialDecay(final_sparsity=0.5, end_step=4, frequency=2),
    "cosine": CosineDecay(final_sparsity=0.5, end_step=4, frequency=2),
    "stairs": MultiStep(milestones=(2, 4), sparsities=(0.25, 0.5)),
    "late": ConstantSparsity(target_sparsity=0.5, begin_step=4, frequency=1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_finalize_before_the_final_sparsity_says_what_is_missing(name):
    import torchopt
    from torchopt.errors import StateError

    model = torchopt.prepare(network(), [torchopt.Rule("*", prune=Prune(schedule=SCHEDULES[name]))])
    for _ in range(3):
        torchopt.step(model)
    now = sparsity(model)
    message = rf"after step 3, \S+weight has sparsity {now[0]:.3g}, its schedule reaches 0.5 at step 4 \(1 more .*until step 4"
    with pytest.raises(StateError, match=message):
        torchopt.finalize(model)
    assert sparsity(torchopt.finalize(model, unfinished=True)) == now
    torchopt.step(model)
    assert sparsity(torchopt.finalize(model)) == [0.5, 0.5]


def test_P29_data_parallel_on_two_ranks_gives_equal_masks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = {}
    for _ in range(4):
        rank, score, state, zeros = queue.get(timeout=120)
        results[rank, score] = state, zeros
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert results[0, "magnitude"][1] == [0.5, 0.5]
    for score in ("magnitude", "taylor"):
        (first, zeros), (second, _) = results[0, score], results[1, score]
        total = 36 + 5 * 144
        assert round(36 * zeros[0] + 720 * zeros[1]) == total // 2
        for key in first:
            if "running" not in key:
                assert (first[key] == second[key]).all(), (score, key)


def test_channels_last_and_a_change_of_precision():
    """Masks have the layout of their weights, stay bool when the model changes its floating-point type, and go on."""
    model = network().to(memory_format=torch.channels_last)
    attach([(w, HALF) for w in weights(model)], preserve=True)
    assert model[0].weight_mask.stride() == model[0].weight_orig.stride()
    reference = train(pruned(), 2)
    train(model, 2)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    model.double()
    assert model[0].weight_mask.dtype == torch.bool
    assert model[0].weight.dtype == torch.float64
    optimizer = sgd(model)
    model(batch().double()).square().mean().backward()
    optimizer.step()
    update(model, 3)
    assert sparsity(model) == [0.5, 0.5]


def test_wanda_gathers_inputs_in_a_compiled_model_too():
    torch._dynamo.reset()
    config = Prune(schedule=ConstantSparsity(target_sparsity=0.5, begin_step=2), score="wanda")
    model, plain = pruned(config), pruned(config)
    train(plain, 2)
    train(model, 2, forward=torch.compile(model, backend="aot_eager"))
    assert sparsity(model) == [0.5, 0.5]
    assert plain[4].weight_inputs.abs().sum() > 0
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)
