from pathlib import Path

import pytest

from torchopt import recipe as recipes
from torchopt.cluster import Cluster
from torchopt.errors import ConfigError, FileError
from torchopt.prune import Prune
from torchopt.prune.schedule import ConstantSparsity, CosineDecay, MultiStep, PolynomialDecay
from torchopt.quantize import Quantize
from torchopt.recipe import Benchmark, Export, Shrink, Stage, parse
from torchopt.train import SGD, Distill

WHOLE = """\
model: {kind: resnet8, classes: 10, in_channels: 3}
data: {kind: fashion_mnist, train_samples: 100}
seed: 3
stages:
  - train: {epochs: 20, optimizer: {kind: sgd, lr: 1e-1}}
  - shrink: {ratio: 0.3}
    train: {epochs: 5}
  - compress:
      - {match: stem.*, quantize: {}}
      - match: "*"
        prune:
          schedule: {kind: polynomial, final_sparsity: 0.8, end_step: 1000}
        cluster: {n_clusters: 16}
        quantize: {weight_bits: 4}
    train: {epochs: 10, distill: true}
export: {target: ort-x86, pack: auto}
benchmark: {threads: 2}
"""


def test_a_recipe_maps_one_to_one_onto_the_configuration_classes() -> None:
    found = parse(WHOLE).recipe
    assert found.seed == 3
    assert found.model.in_channels == 3
    assert found.data.train_samples == 100
    assert found.stages[0].train.optimizer == SGD(lr=0.1)
    assert found.stages[1].shrink == Shrink(ratio=0.3)
    first, second = found.stages[2].compress
    assert (first.match, first.quantize, first.prune) == ("stem.*", Quantize(), None)
    assert second.prune == Prune(schedule=PolynomialDecay(final_sparsity=0.8, end_step=1000))
    assert second.cluster == Cluster(n_clusters=16)
    assert second.quantize == Quantize(weight_bits=4)
    assert found.stages[2].train.distillation == Distill()
    assert found.export == Export()
    assert found.benchmark == Benchmark(threads=2)
    assert [s.title for s in found.stages] == ["train", "shrink", "prune + cluster + quantize"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", ConstantSparsity(target_sparsity=0.5)),
        ("{kind: constant, target_sparsity: 0.5, begin_step: 3}", ConstantSparsity(target_sparsity=0.5, begin_step=3)),
        ("{kind: cosine, final_sparsity: 0.5, end_step: 9}", CosineDecay(final_sparsity=0.5, end_step=9)),
        ("{kind: multi_step, milestones: [1, 2], sparsities: [0.1, 0.2]}", MultiStep(milestones=(1, 2), sparsities=(0.1, 0.2))),
    ],
)
def test_every_schedule_has_its_kind(text: str, expected: object) -> None:
    recipe = parse(_with_rule(f"prune: {{schedule: {text}}}")).recipe
    assert recipe.stages[0].compress[0].prune.schedule == expected


def _with_rule(rule: str) -> str:
    return (
        "model: {kind: resnet8, classes: 10}\ndata: {kind: digits}\n"
        f"stages:\n  - train: {{epochs: 1}}\n    compress:\n      - match: '*'\n        {rule}\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 20", "epoch: 20", r"^r.yaml:5: stages.0.train.epoch: unknown key; did you mean 'epochs'\?"),
        ("seed: 3", "sed: 3", "^r.yaml:3: sed: unknown key; did you mean 'seed'"),
        ("epochs: 20, ", "", "^r.yaml:5: stages.0.train: the key 'epochs' is missing"),
        ("epochs: 20", "epochs: many", "^r.yaml:5: stages.0.train.epochs: got 'many'; a whole number is needed"),
        ("epochs: 20", "epochs: 1.5", "stages.0.train.epochs: got 1.5; a whole number is needed"),
        ("epochs: 20", "epochs: true", "stages.0.train.epochs: got True; a whole number is needed"),
        ("epochs: 20", "epochs: 0", "^r.yaml:5: stages.0.train: Train.epochs: got 0; at least 1 is needed"),
        ("kind: sgd", "kind: sdg", "^r.yaml:5: stages.0.train.optimizer.kind: 'sdg' is not one of .*did you mean 'sgd'"),
        ("kind: sgd, ", "", "stages.0.train.optimizer: the key 'kind' is missing; one of adam, adamw, sgd"),
        ("kind: polynomial", "kind: cubic", "^r.yaml:12: .*schedule.kind: 'cubic' is not one of constant, polynomial"),
        ("final_sparsity: 0.8", "final_sparsity: 1.4", "^r.yaml:12: .*PolynomialDecay.final_sparsity: got 1.4; a fraction"),
        ("n_clusters: 16", "n_cluster: 16", "^r.yaml:13: .*n_cluster: unknown key; did you mean 'n_clusters'"),
        ("kind: fashion_mnist", "kind: fashion", "^r.yaml:2: data.kind: 'fashion' is not one of .*did you mean 'fashion_mnist'"),
        ("kind: resnet8", "kind: resnet9", "^r.yaml:1: model: model.kind: 'resnet9' is not one of"),
        ("ratio: 0.3", "ratio: 1.3", "Shrink.ratio: got 1.3; a fraction in"),
        ("ratio: 0.3", "ratio: 0.3, max_macs: 10", r"Shrink: got \['ratio', 'max_macs'\]; exactly one of"),
        ("target: ort-x86", "target: ort-x68", "Export.target: 'ort-x68' is not one of .*did you mean 'ort-x86'"),
        ("pack: auto", "pack: maybe", "Export.pack: got 'maybe'; auto, true or false"),
        ("threads: 2", "threads: 0", "Benchmark.threads: got 0; at least 1"),
        ("seed: 3", "seed: -3", "seed: got -3"),
        ("distill: true", "distill: 3", "stages.2.train.distill: got 3; true or false or keys and values of Distill"),
        ("seed: 3", "seed: 3\nseed: 4", "^r.yaml:4: seed: stands here twice"),
        ("seed: 3", "seed: [3", "^r.yaml:[45]: not YAML"),
    ],
)
def test_mistakes_are_named_with_line_and_key_path(old: str, new: str, message: str) -> None:
    assert old in WHOLE
    with pytest.raises(ConfigError, match=message):
        parse(WHOLE.replace(old, new), name="r.yaml")


def test_texts_that_are_no_recipe() -> None:
    with pytest.raises(ConfigError, match="recipe: holds no keys and values; a recipe has model, data, stages"):
        parse("")
    with pytest.raises(ConfigError, match="recipe:1: the key 'data' is missing"):
        parse("model: {kind: resnet8, classes: 10}")
    with pytest.raises(ConfigError, match="stages: the list is empty"):
        parse("model: {kind: resnet8, classes: 10}\ndata: {kind: digits}\nstages: []")
    with pytest.raises(ConfigError, match="stages.0: Stage: does nothing"):
        parse("model: {kind: resnet8, classes: 10}\ndata: {kind: digits}\nstages: [{}]")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none.yaml: cannot be read \(No such file or directory\)"):
        recipes.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FileError, match="it is not UTF-8 text"):
        recipes.load(tmp_path / "latin.yaml")


def test_overrides_meet_the_same_checks() -> None:
    assert [s.train.epochs for s in parse(WHOLE, ["train.epochs=1"]).recipe.stages] == [1, 1, 1]
    assert [s.train.epochs for s in parse(WHOLE, ["stages.1.train.epochs=7"]).recipe.stages] == [20, 7, 10]
    assert parse(WHOLE, ["export.pack=false"]).recipe.export.pack is False
    assert parse(WHOLE, ["stages.2.compress.1.prune.schedule=0.5"]).recipe.stages[2].compress[1].prune.schedule.final == 0.5
    assert parse(WHOLE.replace("seed: 3\n", ""), ["seed=9"]).recipe.seed == 9


@pytest.mark.parametrize("rule", ["{match: '*', prune: {pattern: 2:4}}", "{match: '*', prune: {pattern: '2:4'}}"])
def test_two_of_four_is_a_pattern_and_no_number_of_base_60(rule: str) -> None:
    text = f"model: {{kind: resnet8, classes: 10}}\ndata: {{kind: digits}}\nstages: [{{compress: [{rule}]}}]\n"
    overridden = parse(text.replace("2:4", "1:4"), ["stages.0.compress.0.prune.pattern=2:4"])
    nested = parse(text.replace("2:4", "1:4"), ["stages.0.compress.0.prune={pattern: 2:4}"])
    for loaded in (parse(text), overridden, nested, parse(overridden.text)):
        found = loaded.recipe.stages[0].compress[0].prune
        assert (found.pattern, found.n, found.m) == ("n:m", 2, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=1", "stages.0.train.epoch: unknown key; did you mean 'epochs'"),
        ("train.epochs", "--set train.epochs: 'key.path=value' is needed"),
        ("stages.9.train.epochs=1", "--set stages.9.train.epochs=1: '9' is no place in a list of 3; 0 to 2 are"),
        ("seed.x=1", "--set seed.x=1: seed is 3, which has no keys"),
        ("name=a", "--set name=a: no stage has 'name'"),
        ("seed=[1", "--set seed=.1: the value is not YAML"),
        ("trian.epochs=1", "--set trian.epochs=1: unknown key 'trian'; did you mean 'train'"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(WHOLE, [override])


def test_the_text_kept_with_a_run_reads_back_as_the_same_recipe() -> None:
    loaded = parse(WHOLE, ["train.epochs=2"])
    assert parse(loaded.text).recipe == loaded.recipe
    assert parse(WHOLE).text == WHOLE


def test_first_difference() -> None:
    a, b = parse(WHOLE).plain, parse(WHOLE, ["stages.1.train.epochs=6"]).plain
    assert recipes.first_difference(a, b) == "stages.1.train.epochs"
    assert recipes.first_difference(a, a) is None
    assert recipes.first_difference({"a": [1]}, {"a": [1, 2]}) == "a"
    assert recipes.first_difference({"a": 1}, {"a": 1, "b": 2}) == "b"


def test_bad_stages() -> None:
    with pytest.raises(ConfigError, match="Stage.calibrate: got -1"):
        Stage(shrink=Shrink(ratio=0.5), calibrate=-1)
    with pytest.raises(ConfigError, match="there is nothing to calibrate without compress"):
        Stage(shrink=Shrink(ratio=0.5), calibrate=4)
    with pytest.raises(ConfigError, match="Shrink: got no goal; exactly one of"):
        Shrink()
    with pytest.raises(ConfigError, match="Shrink.max_macs: got 0; a number above 0"):
        Shrink(max_macs=0)
    with pytest.raises(ConfigError, match="Shrink.round_to: got 0"):
        Shrink(ratio=0.5, round_to=0)
    with pytest.raises(ConfigError, match="Benchmark.repeats: got 1; at least 3"):
        Benchmark(repeats=1)
