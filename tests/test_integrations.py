"""The callbacks inside the real trainers: the counter counts optimizer steps, and the final sparsity is reached."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchopt

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers warn about workers, loggers and hardware


def prepared() -> nn.Module:
    torch.manual_seed(0)
    schedule = torchopt.PolynomialDecay(initial_sparsity=0.0, final_sparsity=0.75, begin_step=0, end_step=6, frequency=2)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    return torchopt.prepare(net, [torchopt.Rule("0", prune=torchopt.Prune(schedule=schedule))])


def test_lightning_counts_optimizer_steps(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from torchopt.integrations.lightning import CompressionCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = prepared()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(TensorDataset(torch.randn(64, 8), torch.randint(0, 2, (64,))), batch_size=4)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[CompressionCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    assert int(module.model.torchopt_state.step) == 8  # 16 batches, two to a step
    assert (torchopt.finalize(module)[0].weight == 0).sum() == 96


def test_lightning_refuses_an_unprepared_module():
    pytest.importorskip("lightning.pytorch")
    from torchopt.integrations.lightning import _require

    with pytest.raises(torchopt.StateError, match=r"nothing inside this Linear was prepared; set self\.model"):
        _require(nn.Linear(2, 2))


def test_transformers_counts_optimizer_steps(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from torchopt.integrations.transformers import CompressionCallback

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = prepared()

        def forward(self, x, labels=None):
            logits = self.body(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Classifier()
    rows = [{"x": torch.randn(8), "labels": int(i % 2)} for i in range(64)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[CompressionCallback()]).train()
    assert int(model.body.torchopt_state.step) == 8
    assert (torchopt.finalize(model)[0].weight == 0).sum() == 96


def test_transformers_refuses_an_unprepared_model():
    pytest.importorskip("transformers")
    from torchopt.integrations.transformers import CompressionCallback

    with pytest.raises(torchopt.StateError, match="the model was not prepared; give Trainer model="):
        CompressionCallback().on_train_begin(None, None, None, model=nn.Linear(2, 2))


def adversaries(lightning, callbacks, folder, accumulate=1):
    """A generator that steps once, and a critic that steps twice a batch."""
    import torch.nn.functional as F

    class Gan(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = prepared(), prepared()

        def training_step(self, batch, _):
            for net, optimizer in zip((self.generator, self.critic, self.critic), [*self.optimizers(), self.optimizers()[1]]):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.generator, self.critic)]

    module = Gan()
    fit(lightning, module, callbacks, folder)
    return module


def fit(lightning, module, callbacks, folder, **options):
    data = DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(0, 2, (32,))), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, data)


def test_lightning_counts_the_steps_of_each_networks_optimizer(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from torchopt.integrations.lightning import CompressionCallback

    module = adversaries(lightning, [CompressionCallback()], tmp_path)
    assert (int(module.generator.torchopt_state.step), int(module.critic.torchopt_state.step)) == (8, 16)
    for net in (module.generator, module.critic):
        assert (torchopt.finalize(net)[0].weight == 0).sum() == 96
    assert not any(o._optimizer_step_post_hooks for o in module.optimizers(use_pl_optimizer=False))


@pytest.mark.parametrize("ours", [True, False])
def test_lightnings_averages_with_their_defaults(ours, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    from torchopt.integrations.lightning import CompressionCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = prepared()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    theirs = callbacks.EMAWeightAveraging(decay=0.9)
    average = callbacks.WeightAveraging(multi_avg_fn=torchopt.ema_multi_avg_fn(0.9)) if ours else theirs
    module = Module()
    fit(lightning, module, [CompressionCallback(), average], tmp_path)
    if ours:
        assert (torchopt.finalize(module)[0].weight == 0).sum() == 96
    else:
        with pytest.raises(torchopt.StateError, match=r"the step counter .*EMAWeightAveraging.*torchopt\.ema_multi_avg_fn"):
            torchopt.finalize(module)


@pytest.mark.parametrize("score", ["taylor", "movement"])
def test_transformers_gives_scores_their_gradients(score, tmp_path):
    """`on_step_end` came after the gradients were cleared."""
    half = torchopt.ConstantSparsity(target_sparsity=0.5, begin_step=2, frequency=1)
    final, steps = trained_by_transformers([torchopt.Rule("*", prune=torchopt.Prune(schedule=half, score=score))], tmp_path)
    assert steps == 3
    zeros = [int((w.value == 0).sum()) for w in torchopt.network.weights.weights(final)]
    assert zeros[0] == 256
    assert zeros[1] >= 64  # weights that come back start from 0


def test_transformers_saves_a_tied_network_under_tables_and_resumes(tmp_path):
    """Its first checkpoint ended in a RuntimeError about shared tensors."""
    rules = [torchopt.Rule("*", prune=torchopt.Prune(schedule=0.5), cluster=torchopt.Cluster(n_clusters=8))]
    final, steps = trained_by_transformers(rules, tmp_path, save_strategy="steps", save_steps=2)
    assert steps == 3
    resumed, steps = trained_by_transformers(rules, tmp_path, resume=True, save_strategy="no")
    assert steps == 3, "one step after the checkpoint of the second"
    for model in (final, resumed):
        values = [w.value for w in torchopt.network.weights.weights(model)]
        assert [v.unique().numel() for v in values] == [8, 8]
        assert [int((v == 0).sum()) for v in values] == [256, 64]
        assert model.lm_head.weight is model.transformer.wte.weight


def trained_by_transformers(rules, folder, *, resume=False, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from torchopt.integrations.transformers import CompressionCallback

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32,
        n_positions=8,
        n_embd=16,
        n_layer=0,
        n_head=1,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    model = torchopt.prepare(transformers.GPT2LMHeadModel(config), rules)
    rows = [{"input_ids": torch.randint(0, 32, (8,)), "labels": torch.randint(0, 32, (8,))} for _ in range(24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **options},
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[CompressionCallback()])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return torchopt.finalize(model), int(model.torchopt_state.step)
