import warnings

import pytest
import torch
from torch import nn

from torchopt.data import Augment, Dataset, Digits
from torchopt.errors import ConfigError, DataError, ModelError
from torchopt.train import SGD, Adam, AdamW, Distill, Train, accuracy, train
from torchopt.train.loop import distillation_loss


def _net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 10))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    full = Digits().load()
    return Dataset(
        train_inputs=full.train_inputs[:300],
        train_labels=full.train_labels[:300],
        test_inputs=full.test_inputs[:100],
        test_labels=full.test_labels[:100],
        classes=full.classes,
    )


@pytest.mark.parametrize("optimizer", [Adam(), AdamW(lr=3e-3), SGD(lr=0.05, nesterov=True)])
def test_resume_from_any_saved_step_is_bit_equal(digits: Dataset, optimizer: Adam | AdamW | SGD) -> None:
    config = Train(epochs=3, optimizer=optimizer, augment=Augment(shift=1), label_smoothing=0.1)
    states: list[dict] = []
    straight = _net()
    history = train(straight, digits, config, seed=5, save=lambda s: states.append(_copied(s)), save_seconds=0)
    assert [s["step"] for s in states] == list(range(1, 13))
    for state in (states[1], states[3], states[9]):
        resumed = _net()
        again = train(resumed, digits, config, seed=5, resume=state)
        assert again == history
        for name, tensor in straight.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name


def _copied(state: dict) -> dict:
    import copy

    return copy.deepcopy(state)


def test_the_state_is_tensors_and_plain_values(digits: Dataset, tmp_path) -> None:
    states: list[dict] = []
    train(_net(), digits, Train(epochs=1), save=states.append)
    torch.save(states[-1], tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4


def test_after_step_is_called_once_an_optimizer_step(digits: Dataset) -> None:
    calls: list[nn.Module] = []
    net = _net()
    train(net, digits, Train(epochs=2, batch_size=100), after_step=calls.append)
    assert len(calls) == 6
    assert all(c is net for c in calls)


def test_another_seed_gives_another_result(digits: Dataset) -> None:
    a, b = _net(), _net()
    train(a, digits, Train(epochs=1), seed=0)
    train(b, digits, Train(epochs=1), seed=1)
    assert not torch.equal(a[0].weight, b[0].weight)


def test_bf16_trains(digits: Dataset) -> None:
    history = train(_net(), digits, Train(epochs=4, precision="bf16", optimizer=Adam(lr=5e-3)))
    assert history[-1].accuracy > 0.6


@pytest.mark.parametrize("amx", [True, False])
def test_precision_auto_is_bf16_only_where_the_processor_multiplies_it(digits: Dataset, amx: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    auto, alike, other = _net(), _net(), _net()
    train(auto, digits, Train(epochs=1, precision="auto"))
    train(alike, digits, Train(epochs=1, precision="bf16" if amx else "float32"))
    train(other, digits, Train(epochs=1, precision="float32" if amx else "bf16"))
    assert torch.equal(auto[0].weight, alike[0].weight)
    assert not torch.equal(auto[0].weight, other[0].weight)


def test_a_teacher_pulls_the_student_to_its_outputs(digits: Dataset) -> None:
    teacher = _net()
    train(teacher, digits, Train(epochs=4, optimizer=Adam(lr=5e-3)))
    alone, taught = _student(), _student()
    train(alone, digits, Train(epochs=4))
    train(taught, digits, Train(epochs=4, distill=Distill(weight=1.0, temperature=2.0)), teacher=teacher)
    assert _distance(taught, teacher, digits) < _distance(alone, teacher, digits)
    with pytest.raises(ConfigError, match=r"Train.distill: asks for a teacher; none was given"):
        train(_student(), digits, Train(epochs=1, distill=True))


def _student() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def _distance(student: nn.Module, teacher: nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        a, b = student(data.test_inputs).softmax(1), teacher.eval()(data.test_inputs).softmax(1)
    return float((a - b).abs().mean())


def test_distillation_loss_is_the_formula() -> None:
    student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(student / 2, 1)
    expected = 0.3 * 4 * float((p * (p / q).log()).sum())
    assert float(distillation_loss(student, teacher, Distill(temperature=2, weight=0.3))) == pytest.approx(expected, rel=1e-5)


def test_learning_rates() -> None:
    warm = Train(epochs=1, optimizer=SGD(lr=1.0), schedule="constant", warmup_steps=4)
    assert [warm.learning_rate(s, 10) for s in (0, 3, 4, 9)] == [0.25, 1.0, 1.0, 1.0]
    cosine = Train(epochs=1, optimizer=SGD(lr=1.0), warmup_steps=2)
    assert cosine.learning_rate(2, 10) == 1.0
    assert cosine.learning_rate(6, 10) == pytest.approx(0.505)


def test_accuracy_changes_nothing_in_the_model(digits: Dataset) -> None:
    net = _net().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    accuracy(net, digits.test_batches())
    assert net.training
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    with pytest.raises(DataError, match="accuracy: the data holds no batch"):
        accuracy(net, [])


def test_a_loss_that_is_not_finite_stops_the_training(digits: Dataset) -> None:
    with pytest.raises(ModelError, match="train: the loss is (nan|inf) at step"):
        train(_net(), digits, Train(epochs=3, optimizer=SGD(lr=100.0, momentum=0.99)), after_step=_spoil)


def _spoil(model: nn.Module) -> None:
    model[0].weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Train(epochs=0), "Train.epochs: got 0; at least 1"),
        (lambda: Train(epochs=1, batch_size=0), "Train.batch_size: got 0"),
        (lambda: Train(epochs=1, label_smoothing=1.0), "Train.label_smoothing: got 1.0"),
        (lambda: Train(epochs=1, schedule="cos"), "Train.schedule: got 'cos'; one of cosine, constant"),
        (lambda: Train(epochs=1, precision="fp16"), "Train.precision: got 'fp16'"),
        (lambda: Train(epochs=1, device="gpu"), "Train.device: got 'gpu'"),
        (lambda: Train(epochs=1, clip_norm=0.0), "Train.clip_norm: got 0.0"),
        (lambda: Adam(lr=-1.0), "Adam.lr: got -1.0; a number between 0 and 10"),
        (lambda: AdamW(lr=float("nan")), "AdamW.lr: got nan"),
        (lambda: SGD(momentum=2.0), "SGD.momentum: got 2.0"),
        (lambda: SGD(momentum=0.0, nesterov=True), "SGD.nesterov: is true while SGD.momentum is 0"),
        (lambda: Distill(weight=2.0), "Distill.weight: got 2.0"),
        (lambda: Distill(temperature=0.0), "Distill.temperature: got 0.0"),
    ],
)
def test_bad_configurations(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def _normed() -> nn.Sequential:
    """Convolutions of every layout that DDP could warn about, and batch norm with and without a momentum."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.BatchNorm2d(16, momentum=None),
        nn.Flatten(),
        nn.Linear(1024, 12),
        nn.BatchNorm1d(12, affine=False),
        nn.Linear(12, 10),
    )


SHARED = Train(epochs=1, batch_size=64, optimizer=SGD(lr=0.01), augment=Augment(shift=1, flip=True), distill=True, clip_norm=5.0)


def _two_ranks(rank: int, folder: str) -> None:
    import torch.distributed as dist

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = _normed()
    epochs = train(net, Digits().load(), SHARED, teacher=_normed())
    torch.save({**net.state_dict(), "loss": torch.tensor(epochs[0].loss)}, f"{folder}/{rank}.pt")
    if rank == 0:
        with pytest.raises(ConfigError, match="Train.batch_size: 33 is no multiple of the 2 processes that share it"):
            train(net, Digits().load(), Train(epochs=1, batch_size=33))
    dist.barrier()  # leave together: who tears down while the other still works may abort
    dist.destroy_process_group()


def test_two_ranks_take_the_steps_of_one(tmp_path) -> None:
    torch.multiprocessing.spawn(_two_ranks, (str(tmp_path),), nprocs=2)
    alone = _normed()
    epochs = train(alone, Digits().load(), SHARED, teacher=_normed())
    a, b = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(a, {**alone.state_dict(), "loss": torch.tensor(epochs[0].loss)}, rtol=1e-3, atol=1e-5)
