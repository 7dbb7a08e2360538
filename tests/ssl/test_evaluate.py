"""Probes against slow references and against what they must do on features made for it; the command line on the
digits.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")

from matrix_llm.base.errors import ProbeError
from matrix_llm.base.statistics import wilson_interval
from matrix_llm.ssl.augment import EvalTransform
from matrix_llm.ssl.data import Images, load_images
from matrix_llm.ssl.evaluate import main
from matrix_llm.ssl.evaluation.features import Features, check_classes, correct_at, effective_ranks
from matrix_llm.ssl.evaluation.label_draws import class_balanced_split, few_label_draws
from matrix_llm.ssl.evaluation.linear import choose_c, few_label_accuracy, linear_accuracy, linear_scores
from matrix_llm.ssl.evaluation.neighbours import knn_accuracy, knn_votes
from matrix_llm.ssl.evaluation.passes import AugmentedBatches, extract_features, labels_of
from matrix_llm.ssl.evaluation.protocols import interval_of_mean
from matrix_llm.ssl.evaluation.splits import aligned, read_split
from matrix_llm.ssl.evaluation.trained import fine_tune, fit_linear, lars_reach
from matrix_llm.ssl.metrics import batch_effective_rank, inter_class_effective_rank, intra_class_effective_rank
from matrix_llm.ssl.modeling import SmallResNetConfig, SmallResNetModel, SSLConfig, SSLModel
from tests.support.paths import ROOT

SCRIPT = ROOT / "matrix_llm" / "ssl" / "evaluate.py"
K = 6


def clusters(n, spread, *, width=12, seed=0):
    """K classes around fixed unit directions; spread 0.1 is separable, and no single feature tells them apart."""
    means = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99)))[0][:K]
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    return Features(means[y] + spread * torch.randn(n, width, generator=g), y)


def noise(n, *, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Features(torch.randn(n, width, generator=g), torch.randint(K, (n,), generator=g))


def feature_batches(train, batch_size):
    """Fixed features in a new order each epoch, whole batches only."""

    def batches(epoch):
        order = torch.from_numpy(np.random.default_rng([0, epoch]).permutation(len(train.y)))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield train.x[rows], train.y[rows]

    return batches


def trained_accuracy(train, test, optimizer, rate):
    batch = 40
    probe = fit_linear(
        feature_batches(train, batch), width=train.x.shape[1], classes=K, epochs=30, steps=len(train.y) // batch,
        learning_rate=rate, optimizer=optimizer,
    )  # fmt: skip
    return correct_at(probe(test.x), test.y) / len(test.y)


PROBES = {
    "lars": lambda a, b: trained_accuracy(a, b, "lars", 8.0),
    "sgd": lambda a, b: trained_accuracy(a, b, "sgd", 0.3),
    "lbfgs": linear_accuracy,
    "knn": lambda a, b: knn_accuracy(a, b, k=20),
}


@pytest.mark.parametrize("probe", PROBES)
def test_separable_features_are_all_right_and_random_labels_are_at_chance(probe):
    assert PROBES[probe](clusters(300, 0.1), clusters(120, 0.1, seed=1)) == 1.0
    found = PROBES[probe](noise(300), noise(600, seed=1))
    low, high = wilson_interval(round(found * 600), 600)
    assert low - 0.02 < 1 / K < high + 0.02


def test_a_lars_probe_with_too_few_steps_stays_at_its_start_and_its_reach_says_so():
    train, test = clusters(300, 0.1), clusters(120, 0.1, seed=1)
    assert lars_reach(0.01, 0.9, 210) < 0.1
    assert trained_accuracy(train, test, "lars", 0.01) < 0.9
    assert lars_reach(8.0, 0.9, 210) > 3


def test_trained_probe_is_the_same_for_the_same_seed():
    assert trained_accuracy(clusters(90, 0.5), clusters(90, 0.5, seed=1), "sgd", 0.1) == trained_accuracy(
        clusters(90, 0.5), clusters(90, 0.5, seed=1), "sgd", 0.1
    )


@pytest.mark.parametrize("k", [1, 7, 50])
def test_knn_equals_the_double_loop(k, monkeypatch):
    monkeypatch.setattr(
        "matrix_llm.ssl.evaluation.neighbours.SIMILARITIES", 3 * 50
    )  # three rows at a time: 20 rows leave a rest
    train, test = noise(50), noise(20, seed=1)
    expected = torch.zeros(20, K, dtype=torch.float64)
    for i in range(20):
        cosines = []
        for j in range(50):
            a, b = test.x[i].double(), train.x[j].double()
            cosines.append(float(a @ b / (a.norm() * b.norm())))
        for j in sorted(range(50), key=lambda j: -cosines[j])[:k]:
            expected[i, train.y[j]] += np.exp(cosines[j] / 0.07)
    torch.testing.assert_close(knn_votes(train, test, k=k).double(), expected, rtol=1e-4, atol=1e-6)
    assert knn_accuracy(train, test, k=k) == float((expected.argmax(1) == test.y).double().mean())


def test_ties_and_nan_count_as_wrong():
    y = torch.tensor([0, 2])
    assert correct_at(torch.ones(2, 3), y) == 0
    assert correct_at(torch.full((2, 3), float("nan")), y, 2) == 0
    assert correct_at(torch.tensor([[3.0, 2, 1], [3, 2, 1]]), y, 1) == 1
    assert correct_at(torch.tensor([[3.0, 2, 1], [3, 2, 1]]), y, 3) == 2
    with pytest.raises(ProbeError, match="diverged"):
        Features(torch.tensor([[float("inf")]]), torch.tensor([0]))


def test_a_constant_feature_changes_nothing():
    train, test = clusters(60, 0.5), clusters(60, 0.5, seed=1)
    more = [
        Features(torch.cat([part.x, torch.full((60, 1), value)], 1), part.y)
        for part, value in ((train, 3.0), (test, 1e6))
    ]
    torch.testing.assert_close(linear_scores(*more), linear_scores(train, test))


def test_a_class_whose_training_rows_are_gone_is_wrong_and_no_crash():
    train, test = clusters(60, 0.1), clusters(60, 0.1, seed=1)
    without = Features(train.x[train.y < K - 1], train.y[train.y < K - 1])
    for found in (
        linear_accuracy(without, test),
        knn_accuracy(without, test, k=5),
        *few_label_accuracy(without, test, draws=2),
    ):
        assert found == pytest.approx((K - 1) / K)


def test_chosen_c_is_smaller_where_the_labels_are_noise():
    train = clusters(240, 0.3)
    flipped = Features(
        train.x,
        torch.where(torch.rand(240, generator=torch.Generator().manual_seed(0)) < 0.6, (train.y + 1) % K, train.y),
    )
    assert choose_c(flipped) < 100
    assert choose_c(train) == choose_c(train)
    with pytest.raises(ProbeError, match="one training image"):
        choose_c(Features(torch.randn(3, 2), torch.tensor([0, 0, 1])))


def test_wilson_interval_equals_a_hand_computed_value():
    """8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.71674, radius 1.96 sqrt(0.016 + 0.009604) / 1.38415 =
    0.22657.
    """
    assert wilson_interval(8, 10) == pytest.approx((0.49017, 0.94331), abs=2e-4)


def test_interval_of_mean_covers_the_mean_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    covered = [low < 0 < high for low, high in (interval_of_mean(list(rng.normal(size=5))) for _ in range(1000))]
    assert 0.93 < np.mean(covered) < 0.97


# --------------------------------------------------------------------------------------------------------------------
# drawing


def test_splits_are_class_balanced_disjoint_from_the_rest_and_nested():
    y = torch.cat([torch.zeros(50), torch.ones(70), torch.full((80,), 2.0)]).long()[torch.randperm(200)]
    ten, thirty = class_balanced_split(y, 10, 0), class_balanced_split(y, 30, 0)
    assert torch.bincount(y[ten]).tolist() == [7, 7, 7]
    assert torch.bincount(y[thirty]).tolist() == [20, 20, 20]
    assert torch.equal(ten, class_balanced_split(y, 10, 0))
    assert not torch.equal(ten, class_balanced_split(y, 10, 1))
    assert set(ten.tolist()) < set(thirty.tolist())
    assert len(set(thirty.tolist())) == len(thirty)
    assert torch.bincount(y[class_balanced_split(y, 0.01, 0)]).tolist() == [1, 1, 1]
    assert torch.bincount(y[class_balanced_split(y, 20, 0, equal=False)]).tolist() == [10, 14, 16]


def test_the_digits_train_and_test_parts_are_disjoint():
    assert not set(load_images("digits", split="train").ids) & set(load_images("digits", split="test").ids)


def test_few_label_draws_are_the_same_for_two_models_and_differ_between_draws_and_seeds():
    train = clusters(120, 0.1)
    a = few_label_draws(train.y, labels_per_class=3, draws=4, seed=0)
    b = few_label_draws(noise(120).y * 0 + train.y, labels_per_class=3, draws=4, seed=0)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(np.bincount(train.y[rows]).tolist() == [3] * K for rows in a)
    assert len({tuple(rows) for rows in [*a, *few_label_draws(train.y, labels_per_class=3, draws=4, seed=1)]}) == 8
    assert np.array_equal(
        a[1], few_label_draws(train.y, labels_per_class=3, draws=2, seed=0)[1]
    )  # more draws leave the first as they are


def test_few_label_accuracy_grows_with_labels_and_reaches_one():
    train, test = clusters(300, 0.35), clusters(300, 0.35, seed=1)
    one, ten = (np.mean(few_label_accuracy(train, test, labels_per_class=n, draws=10)) for n in (1, 10))
    assert one < ten
    assert few_label_accuracy(clusters(60, 0.01), clusters(60, 0.01, seed=1), labels_per_class=1, draws=3) == [1.0] * 3


def test_few_labels_on_digits_are_told_apart():
    parts = []
    for split in ("train", "test"):
        pixels = extract_features(None, load_images("digits", split=split), EvalTransform(8, 1))
        lift = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        parts.append(Features((pixels.x @ lift).relu(), pixels.y))
    assert 0.75 < np.mean(few_label_accuracy(*parts, labels_per_class=5, draws=20)) < 0.9


def test_effective_ranks_are_those_of_metrics_with_the_batch_size():
    part = noise(60)
    assert effective_ranks(part.x, part.y) == {
        "effective_rank": batch_effective_rank(part.x),
        "intra_class_effective_rank": intra_class_effective_rank(part.x, part.y),
        "inter_class_effective_rank": inter_class_effective_rank(part.x, part.y),
        "effective_rank_batch_size": 60,
    }
    assert effective_ranks(part.x, torch.zeros(60, dtype=torch.long))["inter_class_effective_rank"] is None


def test_a_class_missing_in_training_is_named():
    with pytest.raises(ProbeError, match="no training image: owl"):
        check_classes(torch.tensor([0, 1]), torch.tensor([0, 2]), ["cat", "dog", "owl"])
    with pytest.raises(ProbeError, match="negative"):
        check_classes(torch.tensor([0, 1]), torch.tensor([0, -1]))
    with pytest.raises(ProbeError, match="one class"):
        check_classes(torch.tensor([1, 1]), torch.tensor([1]))


# --- images


def striped(n, *, seed=0, broken=()):
    """Grey 8 x 8 images: bright left, right, top or bottom halves under noise, 4 classes. Ids are file paths."""
    rng = np.random.default_rng(seed)
    y = torch.arange(n) % 4
    pixels = rng.integers(0, 100, (n, 8, 8)).astype(np.uint8)
    for i, half in enumerate(y.tolist()):
        part = [np.s_[:, :4], np.s_[:, 4:], np.s_[:4], np.s_[4:]][half]
        pixels[i][part] += 100

    def read(i):
        if i in broken:
            raise OSError("truncated")
        return Image.fromarray(pixels[i])

    return Images(
        "striped", [f"class{k}/{i}.png" for i, k in enumerate(y.tolist())], read, y, [f"class{k}" for k in range(4)]
    )


def tiny_backbone(seed=0):
    torch.manual_seed(seed)
    config = SmallResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return SmallResNetModel(config).eval()


TRANSFORM = EvalTransform(8, 1)


def test_unreadable_images_are_left_out_and_named():
    images = striped(20, broken=(3, 9))
    features = extract_features(None, images, TRANSFORM, batch_size=6)
    assert len(features.y) == 18
    assert torch.equal(features.y, images.labels[[i for i in range(20) if i not in (3, 9)]])
    assert [text.split(" ")[0] for text in features.skipped] == ["class3/3.png", "class1/9.png"]
    batches = AugmentedBatches(images, TRANSFORM, batch_size=10, seed=0, flip_prob=0.0)
    assert sum(len(y) for epoch in (0, 1) for _, y in batches(epoch)) == 36
    assert len(batches.skipped) == 2
    with pytest.raises(ProbeError, match="none of the 4 images"):
        extract_features(None, striped(4, broken=range(4)), TRANSFORM)


def test_features_do_not_depend_on_batch_size_or_mode_and_leave_the_mode():
    backbone = tiny_backbone().train()
    a, b = (extract_features(backbone, striped(11), TRANSFORM, batch_size=size).x for size in (4, 11))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert backbone.training


def test_augmented_batches_repeat_for_a_seed_and_change_with_the_epoch():
    def crops(seed, epoch, flip_prob=0.0):
        return next(AugmentedBatches(striped(12), TRANSFORM, batch_size=12, seed=seed, flip_prob=flip_prob)(epoch))

    assert torch.equal(crops(0, 1)[0], crops(0, 1)[0])
    assert not torch.equal(crops(0, 1)[0], crops(0, 2)[0])
    assert not torch.equal(crops(0, 1)[0], crops(1, 1)[0])
    assert torch.equal(crops(0, 1, 1.0)[0], crops(0, 1)[0].flip(-1))
    assert crops(0, 1)[0].shape == (12, 1, 8, 8)


def test_fine_tuning_changes_the_backbone_and_beats_the_frozen_start():
    train, test = striped(48), striped(80, seed=1)
    backbone = tiny_backbone()
    frozen = [extract_features(backbone, part, TRANSFORM) for part in (train, test)]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    batches = AugmentedBatches(train, TRANSFORM, batch_size=16, seed=0, flip_prob=0.0, crop_scale_min=0.8)
    head = fine_tune(
        backbone, batches, classes=4, epochs=25, steps=3, backbone_learning_rate=0.05, head_learning_rate=0.5,
    )  # fmt: skip
    features = extract_features(backbone, test, TRANSFORM)
    with torch.no_grad():
        tuned = correct_at(head(features.x), features.y) / len(features.y)
    moved = [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])]
    assert any("convolution" in name for name in moved)
    assert tuned > knn_accuracy(*frozen, k=5)
    assert tuned > 0.9


def test_a_backbone_learning_rate_of_zero_leaves_the_weights():
    backbone = tiny_backbone()
    before = [p.clone() for p in backbone.parameters()]
    batches = AugmentedBatches(striped(16), TRANSFORM, batch_size=8, seed=0, flip_prob=0.0)
    fine_tune(backbone, batches, classes=4, epochs=1, steps=2, backbone_learning_rate=0.0, head_learning_rate=0.5)
    assert all(torch.equal(p, old) for p, old in zip(backbone.parameters(), before, strict=True))


def test_classes_of_two_folders_are_matched_by_name():
    train = striped(8)
    test = Images("other", ["a", "b"], lambda i: Image.new("L", (8, 8)), torch.tensor([0, 1]), ["class1", "class3"])
    assert labels_of(aligned(train, test)[1]).tolist() == [1, 3]
    with pytest.raises(ProbeError, match="lacks: owl"):
        aligned(train, Images("other", ["a"], lambda i: Image.new("L", (8, 8)), torch.tensor([0]), ["owl"]))
    with pytest.raises(ProbeError, match="are the same"):
        aligned(train, striped(8))
    with pytest.raises(ProbeError, match="has no labels"):
        aligned(train, Images("flat", ["a"], lambda i: Image.new("L", (8, 8))))


def test_split_files_name_images_by_path_or_by_file_name(tmp_path):
    images = striped(8)
    file = tmp_path / "1percent.txt"
    file.write_text("5.png\nclass2/2.png\n\n")
    assert read_split(file, images).tolist() == [2, 5]
    file.write_text("5.png\nclass1/5.png\n")
    with pytest.raises(ProbeError, match="twice"):
        read_split(file, images)
    file.write_text("5.png\nowl.png\n")
    with pytest.raises(ProbeError, match=r"1 of its 2 names .* e.g. owl.png"):
        read_split(file, images)
    file.write_text("0.png\n")
    with pytest.raises(ProbeError, match="or of several"):
        read_split(file, Images("x", ["a/0.png", "b/0.png"], lambda i: Image.new("L", (8, 8)), torch.tensor([0, 1])))


# ---------------------------------------------------------------------------------------------------------------
# command line


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    tiny_backbone().save_pretrained(folder)
    TRANSFORM.save(folder)
    (folder / "recipe.yaml").write_text("flip_prob: 0.0\n")
    return folder


def evaluated(capsys, out, *arguments):
    assert main([*map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert str(out) in printed
    return json.loads(out.read_text())


def test_every_protocol_end_to_end_on_digits(run_folder, capsys):
    common = ["--model", run_folder, "--data", "digits", "--device", "cpu"]
    place = run_folder / "eval"
    knn = evaluated(capsys, place / "knn-digits.json", "knn", *common)
    assert knn["by_k"].keys() == {"20", "200"}
    assert knn["top1"] == knn["by_k"]["20"]["top1"] > 0.5
    assert (knn["n_train"], knn["n_test"], knn["classes"]) == (1297, 500, 10)
    assert knn["top5"] > knn["top1"]
    assert knn["effective_rank_batch_size"] == 500
    lbfgs = evaluated(capsys, place / "lbfgs-digits.json", "linear", "--protocol", "lbfgs", *common)
    assert lbfgs["protocol"] == "lbfgs"
    assert lbfgs["top1_interval"][0] < lbfgs["top1"] < lbfgs["top1_interval"][1]
    few = evaluated(capsys, place / "few-5-digits.json", "few", "--draws", 4, *common)
    assert len(few["top1_each_draw"]) == 4
    assert few["n_train"] == 50
    linear = evaluated(capsys, place / "linear-digits.json", "linear", "--epochs", 2, "--batch_size", 128, *common)
    assert linear["protocol"] == "linear-sgd"  # 20 steps are no use to LARS
    assert linear["settings"]["flip_prob"] == 0.0  # from the recipe
    semi = evaluated(capsys, place / "semi-10-digits.json", "semi", "--percent", 10, "--epochs", 2, *common)
    assert semi["n_train"] == 130
    names = (place / "semi-10-digits.split.txt").read_text()
    assert len(names.splitlines()) == 130
    again = evaluated(
        capsys, place / "again.json", "semi", "--split", place / "semi-10-digits.split.txt", "--epochs", 2,
        "--out", place / "again.json", *common,
    )  # fmt: skip
    assert again["top1"] == semi["top1"]
    assert {"torch", "transformers", "scikit-learn", "python"} <= semi["versions"].keys()
    assert semi["skipped"] == {"train": [], "test": []}


def test_random_and_pixel_baselines(run_folder, capsys):
    place = run_folder / "eval"
    common = ["few", "--data", "digits", "--draws", "3", "--device", "cpu", "--model"]
    trained = evaluated(capsys, place / "few-5-digits.json", *common, run_folder)
    random = evaluated(capsys, place / "random-few-5-digits.json", *common, f"random:{run_folder}")
    other = evaluated(capsys, place / "random-few-5-digits-seed3.json", *common, f"random:{run_folder}", "--seed", 3)
    pixels = evaluated(capsys, place / "pixels-few-5-digits.json", *common, f"pixels:{run_folder}")
    assert random["top1"] == trained["top1"]  # the run is the start of seed 0
    assert other["top1"] != random["top1"]
    plain = evaluated(capsys, place / "plain.json", *common, "pixels", "--out", place / "plain.json")
    assert (
        plain["top1_each_draw"] == pixels["top1_each_draw"]
    )  # the run's size is that of the digits, and features are standardised


def test_the_backbone_of_a_whole_ssl_model_is_evaluated(run_folder, tmp_path, capsys):
    backbone = tiny_backbone()
    model = SSLModel(
        SSLConfig(method="simsiam", backbone_config=backbone.config, projector_widths=[8, 8], predictor_widths=[4, 8])
    )
    model.backbone.load_state_dict(backbone.state_dict())
    model.save_pretrained(run_folder / "pretraining")
    common = ["knn", "--data", "digits", "--device", "cpu", "--model"]
    whole = evaluated(
        capsys, run_folder / "pretraining" / "eval" / "knn-digits.json", *common, run_folder / "pretraining"
    )
    assert whole["by_k"] == evaluated(capsys, run_folder / "eval" / "knn-digits.json", *common, run_folder)["by_k"]


def flat_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "flat" / split / "a.png")
    return tmp_path / "flat"


REFUSED = {
    "no such model": (["knn", "--model", "{tmp}/none"], "is no folder"),
    "no model in it": (["knn", "--model", "{tmp}"], "has no config.json"),
    "unlabelled": (["knn", "--data", "{flat}"], "has no labels"),
    "no such data": (["knn", "--data", "./nowhere"], "does not exist"),
    "too many labels": (["few", "--labels_per_class", "500"], "labels_per_class=500, but the smallest class has"),
    "percent above 100": (["semi", "--percent", "101"], "--percent 101"),
    "percent 0": (["semi", "--percent", "0"], "--percent 0"),
    "no labels named": (["semi"], "Give --percent 1, or --split FILE"),
    "no such split": (["semi", "--split", "{tmp}/none.txt"], "cannot be read as text"),
    "k too large": (["knn", "--k", "2000"], "--k 2000"),
    "pixels in training": (["linear", "--model", "pixels"], "has no network"),
    "one draw": (["few", "--draws", "1"], "--draws 1"),
    "no such device": (["knn", "--device", "cuda:99"], "--device cuda:99"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_any_weight_is_loaded(
    case, run_folder, tmp_path, capsys, monkeypatch
):
    def too_late(*args, **kwargs):
        raise AssertionError("loaded weights before checking")

    monkeypatch.setattr("matrix_llm.ssl.evaluation.subjects.load_backbone", too_late)
    given, reason = REFUSED[case]
    arguments = [a.format(tmp=tmp_path, flat=flat_folder(tmp_path) if "{flat}" in a else "") for a in given]
    for name, value in (("--model", str(run_folder)), ("--data", "digits")):
        arguments += [] if name in arguments else [name, value]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert reason in error
    assert not list(tmp_path.rglob("*.json.tmp"))
    assert not (run_folder / "eval").exists()


def test_an_earlier_result_is_kept_unless_forced(run_folder, capsys):
    common = ["few", "--model", run_folder, "--data", "digits", "--draws", 2, "--device", "cpu"]
    out = run_folder / "eval" / "few-5-digits.json"
    first = evaluated(capsys, out, *common)
    assert main([*map(str, common), "--seed", "0"]) == 2
    assert "--force" in capsys.readouterr().err
    assert evaluated(capsys, out, *common, "--force")["top1"] == first["top1"]


def test_weights_that_are_pickles_or_damaged_are_refused(run_folder, capsys):
    arguments = ["knn", "--model", str(run_folder), "--data", "digits"]
    weights = run_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(arguments) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    torch.save({}, run_folder / "pytorch_model.bin")
    weights.unlink()
    assert main(arguments) == 2
    assert "no model.safetensors" in capsys.readouterr().err


def test_the_script_runs_from_elsewhere_and_leaves_the_standard_ssl_module(run_folder, tmp_path):
    """Started as `python .../evaluate.py`, which puts the script's folder, whose parent holds our `ssl`, first on the
    path.
    """
    arguments = ["knn", "--model", str(run_folder), "--data", "digits", "--device", "cpu"]
    check = tmp_path / "sitecustomize.py"
    check.write_text(
        "import atexit, sys\n"
        "def seen():\n"
        "    import ssl\n"
        "    print('ssl:', hasattr(ssl, 'SSLContext'), 'matrix_llm' in ssl.__file__, file=sys.stderr)\n"
        "atexit.register(seen)\n"
    )
    out = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("knn: ")
    assert "ssl: True False" in out.stderr
    assert (run_folder / "eval" / "knn-digits.json").is_file()
