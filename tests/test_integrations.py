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
