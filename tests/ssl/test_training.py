"""Pre-training: models, heads, target network, trainer, pretrain.py and its recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel

from matrix_llm.base.errors import NonFiniteLossError, RecipeError
from matrix_llm.ssl import losses
from matrix_llm.ssl.config import SSLTrainingConfig, load_ssl_recipe
from matrix_llm.ssl.data import load_images
from matrix_llm.ssl.methods import METHODS, Branches
from matrix_llm.ssl.modeling import SSLConfig, SSLModel, SyncBatchNorm, load_backbone, pooled
from matrix_llm.ssl.pretrain import main
from matrix_llm.ssl.trainer import SSLTrainer, ema_momentum
from matrix_llm.ssl.training.lars import LARS
from tests.support import ssl_parity_run
from tests.support.paths import ROOT, SUPPORT

RECIPES = sorted((ROOT / "recipes/ssl").glob("*.yaml"))
TINY = {
    "method": "matrix_ssl", "dataset": "digits", "eval_dataset": "digits", "backbone_config": ssl_parity_run.BACKBONE,
    "projector_widths": [16, 12], "predictor_widths": [6, 12], "image_size": 8, "channels": 1, "flip_prob": 0.0,
    "image_mean": [0.5], "image_std": [0.5], "per_device_train_batch_size": 64, "max_steps": 6, "learning_rate": 0.05,
    "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_steps": 2,
}  # fmt: skip


def recipe(folder: Path, **changes) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


def views(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, 8, 8, generator=g), torch.randn(rows, 1, 8, 8, generator=g)


# --- the model
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_each_trained_weight_a_gradient_and_survives_saving(method, tmp_path):
    model = ssl_parity_run.tiny(method)
    out = model(*views(), labels=torch.arange(6))
    (out.loss + out.probe_loss).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(
        p.grad is None
        for part in (model.target_backbone, model.target_projector)
        if part is not None
        for p in part.parameters()
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, SSLModel)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_the_probe_sends_no_gradient_into_the_backbone():
    model = ssl_parity_run.tiny("simsiam")
    model(*views(), labels=torch.arange(6)).probe_loss.backward()
    assert model.probe[1].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.backbone.parameters())


def test_the_target_network_starts_equal_and_moves_by_one_minus_the_momentum():
    model = ssl_parity_run.tiny("byol")
    online, target = next(model.backbone.parameters()), next(model.target_backbone.parameters())
    assert torch.equal(online, target)
    before = target.clone()
    with torch.no_grad():
        online.add_(1.0)
    model.update_target(0.75)
    torch.testing.assert_close(target, before + 0.25)
    assert not any(p.requires_grad for p in model.target_backbone.parameters())


def test_the_momentum_rises_on_a_cosine_to_one():
    assert ema_momentum(0, 200, 0.9, "cosine") == pytest.approx(0.9)
    assert ema_momentum(100, 200, 0.9, "cosine") == pytest.approx(0.95)
    assert ema_momentum(200, 200, 0.9, "cosine") == pytest.approx(1.0)
    assert ema_momentum(150, 200, 0.9, "constant") == 0.9


def test_the_target_network_normalises_with_its_own_batch_statistics():
    """In train mode, as in the released codes: its running statistics move, and the online ones are not copied into
    it.
    """
    model = ssl_parity_run.tiny("matrix_ssl").train()
    with torch.no_grad():
        model.target_backbone.embedder.embedder.convolution.weight.mul_(3)
    model(*views())
    model.update_target(1.0)
    online = model.backbone.embedder.embedder.normalization
    target = model.target_backbone.embedder.embedder.normalization
    assert target.num_batches_tracked == 2  # once a view
    torch.testing.assert_close(3 * online.running_mean, target.running_mean)


def test_the_residual_branches_start_at_zero_unless_told_otherwise():
    config = {
        "method": "simsiam",
        "backbone_config": dict(ssl_parity_run.BACKBONE),
        "projector_widths": [8, 8],
        "predictor_widths": [4, 8],
    }
    for zero in (True, False):
        model = SSLModel(SSLConfig(**config, zero_init_residual=zero))
        last = model.backbone.encoder.stages[0].layers[0].layer[-1].normalization.weight
        assert bool((last == 0).all()) is zero


@pytest.mark.parametrize("method", METHODS)
def test_every_method_combines_its_branches_as_published(method):
    """Symmetrised and halved (Matrix-SSL, MEC, SimSiam), summed (BYOL), one-sided (MoCo), with the target of the
    other view.
    """
    model, (x, y) = ssl_parity_run.tiny(method).eval(), views()
    (_, z1, p1), (_, z2, p2) = model.online_branch(x), model.online_branch(y)
    t1, t2 = (model.target_branch(v) if METHODS[method].target else None for v in (x, y))
    unit = torch.nn.functional.normalize
    expected = {
        "matrix_ssl": lambda: (losses.matrix_ssl_loss(t2, p1) + losses.matrix_ssl_loss(t1, p2)) / 2,
        "mec": lambda: (losses.mec_loss(p1, t2) + losses.mec_loss(p2, t1)) / 2,
        "barlow_twins": lambda: losses.barlow_twins_loss(z1, z2),
        "vicreg": lambda: losses.vicreg_loss(z1, z2),
        "simclr": lambda: losses.nt_xent_loss(z1, z2),
        "moco": lambda: losses.moco_loss(z1, t2, model.queue),
        "byol": lambda: losses.byol_loss(p1, t2) + losses.byol_loss(p2, t1),
        "simsiam": lambda: losses.simsiam_loss(p1, p2, z1, z2),
        "swav": lambda: losses.swav_loss(*(unit(z, dim=1) @ unit(model.prototypes, dim=1).T for z in (z1, z2))),
    }[method]()
    torch.testing.assert_close(model(x, y).loss, expected)


def test_the_papers_preset_is_one_sided():
    config = ssl_parity_run.tiny("matrix_ssl").config
    config.loss_settings = {"preset": "paper", "lambda_": 0.1}
    model, (x, y) = SSLModel(config).eval(), views()
    expected = losses.matrix_ssl_loss(model.target_branch(x), model.online_branch(y)[2], preset="paper", lambda_=0.1)
    torch.testing.assert_close(model(x, y).loss, expected)


def test_the_queue_holds_the_newest_keys_and_wraps_around():
    model = ssl_parity_run.tiny("moco").train()
    size = len(model.queue)
    keys = torch.nn.functional.normalize(torch.randn(size - 1, 12), dim=1)
    model.enqueue(keys)
    more = torch.nn.functional.normalize(torch.randn(3, 12), dim=1)
    model.enqueue(more)
    torch.testing.assert_close(model.queue[size - 1], more[0])
    torch.testing.assert_close(model.queue[:2], more[1:])
    torch.testing.assert_close(model.queue[2:-1], keys[2:])
    with pytest.raises(ValueError, match=r"queue_size=40.*41.*at least 41"):
        model.enqueue(torch.randn(41, 12))


def test_the_queue_is_read_before_it_is_written():
    """A key that were its own negative would make the loss depend on itself."""
    model = ssl_parity_run.tiny("moco").train()
    x, y = views(4)
    before = model.queue.clone()
    expected = METHODS["moco"].loss_function(model.online_branch(x)[1], model.target_branch(y), before)
    torch.testing.assert_close(model(x, y).loss, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.queue, before)


def test_mec_lowers_eps_over_ten_epochs():
    schedule = METHODS["mec"].schedule
    assert [schedule({"eps": 64.0}, epoch)["eps"] for epoch in (0, 5, 10, 50)] == [512.0, 288.0, 64.0, 64.0]
    model, (x, y) = ssl_parity_run.tiny("mec").eval(), views()
    assert not torch.isclose(model(x, y, epoch=0.0).loss, model(x, y, epoch=10.0).loss)
    assert torch.equal(model(x, y, epoch=10.0).loss, model(x, y).loss)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "matrixssl"}, "Did you mean matrix_ssl"),
        ({"method": "byol", "loss_settings": {"gamma": 1.0}}, r"gamma.*byol.*no settings.*Remove"),
        ({"method": "matrix_ssl", "loss_settings": {"gama": 1.0}}, "which takes gamma, preset, order, mu, lambda_"),
        ({"method": "simclr", "predictor_widths": [4, 8]}, "simclr has no predictor"),
        ({"method": "byol", "projector_widths": [8, 8], "predictor_widths": [4, 9]}, "the same last width"),
        ({"method": "byol", "queue_size": 10}, r"queue_size=10.*byol has none"),
        ({"method": "moco", "queue_size": 0}, r"queue_size=0.*moco needs"),
    ],
)
def test_a_configuration_that_cannot_work_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        SSLConfig(backbone_config=dict(ssl_parity_run.BACKBONE), **settings)


def test_one_process_of_the_rank_wide_normalisation_is_batch_normalisation():
    torch.manual_seed(0)
    for ordinary, x in (
        (torch.nn.BatchNorm1d(3), torch.randn(5, 3)),
        (torch.nn.BatchNorm2d(3, affine=False), torch.randn(2, 3, 4, 5)),
    ):
        ours = SyncBatchNorm(3, affine=ordinary.affine)
        ours.train(), ordinary.train()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = torch.randn_like(x)
        (ours(a) * weights).sum().backward()
        (ordinary(b) * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        for name, value in ordinary.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
        torch.testing.assert_close(ours.eval()(x), ordinary.eval()(x))


def test_a_backbone_with_missing_weights_is_refused_not_started_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    ssl_parity_run.tiny("simclr").backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embedder.embedder.convolution.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weight\(s\).*embedder.embedder.convolution"):
        load_backbone(tmp_path)


# --- LARS
# --------------------------------------------------------------------------------------------------------------------


def test_lars_takes_steps_in_proportion_to_each_layer():
    w, b = torch.nn.Parameter(torch.full((2, 2), 2.0)), torch.nn.Parameter(torch.ones(2))
    optimizer = LARS([w, b], lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    for _ in range(2):
        w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
        optimizer.step()
    # by hand: |w| = 4, g + 0.1 w = 1.2, |.| = 2.4, ratio 0.01 * 4 / 2.4; v = 0.02, w = 1.99; then again with v kept
    # at 0.9
    first = 0.01 * 4 / 2.4 * 1.2
    w1 = 2 - 0.5 * first
    second = 0.9 * first + 0.01 * (2 * w1) / (2 * (1 + 0.1 * w1)) * (1 + 0.1 * w1)
    torch.testing.assert_close(w.detach(), torch.full((2, 2), w1 - 0.5 * second))
    torch.testing.assert_close(b.detach(), torch.full((2,), 1 - 0.5 - 0.5 * 1.9))  # no ratio, no decay


# --- training
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    """Each method for four steps: one process with 16 images a step, two (gloo) with 8 each."""
    folder = tmp_path_factory.mktemp("parity")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(SUPPORT / "ssl_parity_run.py")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
    ]
    commands = {
        1: [sys.executable, script, str(folder / "1.pt"), "16"],
        2: [*launch, script, str(folder / "2.pt"), "8"],
    }
    for command in commands.values():
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{n}.pt", weights_only=True) for n in commands]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_match_one_in_losses_and_every_weight(parity, method):
    one, two = (found[method] for found in parity)
    assert len(one["losses"]) == 4
    torch.testing.assert_close(two["losses"], one["losses"], rtol=5e-6, atol=2e-6)
    torch.testing.assert_close(two["held_out"], one["held_out"], rtol=1e-4, atol=1e-4)
    for name, value in one["state"].items():
        torch.testing.assert_close(
            two["state"][name], value, rtol=1e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("method", ["matrix_ssl", "moco"])
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path, method):
    whole = ssl_parity_run.run(method, 32, str(tmp_path / "whole"), max_steps=50)
    ssl_parity_run.run(method, 32, str(tmp_path / "cut"), max_steps=50, save_strategy="steps", save_steps=45)
    resumed = ssl_parity_run.run(method, 32, str(tmp_path / "cut"), max_steps=50, resume_from_checkpoint=True)
    assert resumed.state.global_step == 50
    assert resumed.state.log_history[-2]["step"] == 50
    for name, value in whole.ssl_model.state_dict().items():
        assert torch.equal(resumed.ssl_model.state_dict()[name], value), name


def test_training_moves_the_loss_down_and_the_probe_learns(tmp_path):
    settings = {"learning_rate": 0.5, "probe_learning_rate": 1.0, "logging_steps": 10, "effective_rank_steps": 20}
    trainer = ssl_parity_run.run("matrix_ssl", 128, str(tmp_path), max_steps=100, **settings)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert rows[-1]["online_probe_accuracy"] > rows[0]["online_probe_accuracy"] + 0.08
    ranked = [row for row in rows if "effective_rank" in row]
    assert [row["step"] for row in ranked] == [20, 40, 60, 80, 100]
    assert all(1 < row["effective_rank"] < 12 and row["effective_rank_rows"] == 128 for row in ranked)
    found = trainer.evaluate()
    assert found["eval_rows"] == 500
    assert found["eval_online_probe_accuracy"] > 0.25
    assert found["eval_inter_class_effective_rank"] < 9 + 1e-3  # K - 1


def test_the_target_network_follows_each_step(tmp_path):
    before = next(ssl_parity_run.tiny("byol").backbone.parameters()).detach().clone()
    trainer = ssl_parity_run.run("byol", 64, str(tmp_path), max_steps=1, ema_momentum=0.75, ema_schedule="constant")
    online, target = (
        next(part.parameters()) for part in (trainer.ssl_model.backbone, trainer.ssl_model.target_backbone)
    )
    assert not torch.equal(online, before)
    torch.testing.assert_close(target, 0.75 * before + 0.25 * online)
    whole = ssl_parity_run.run("byol", 64, str(tmp_path / "b"), max_steps=3)
    assert whole.ema.momentum == 1.0  # the end of the cosine


def test_effective_ranks_are_logged_with_the_first_row_after_each_so_many_steps(tmp_path):
    trainer = ssl_parity_run.run("vicreg", 64, str(tmp_path), max_steps=20, effective_rank_steps=4, logging_steps=5)
    assert [row["step"] for row in trainer.state.log_history if "effective_rank" in row] == [5, 10, 15, 20]


def test_only_simsiams_predictor_keeps_its_learning_rate(tmp_path):
    for method, fixed in (("simsiam", True), ("byol", False)):
        trainer = ssl_parity_run.run(method, 64, str(tmp_path / method), max_steps=4, warmup_steps=2)
        rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        predictor, backbone = (
            rates[id(next(part.parameters()))] for part in (trainer.ssl_model.predictor, trainer.ssl_model.backbone)
        )
        assert backbone < 0.01  # the end of the cosine
        assert (predictor == 0.05) is fixed
        assert id(next(trainer.ssl_model.probe.parameters())) in rates


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_every_optimizer_trains_each_weight_once(tmp_path, optimizer):
    trainer = ssl_parity_run.run("swav", 64, str(tmp_path), max_steps=1, optimizer=optimizer)
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.ssl_model.parameters() if p.requires_grad)


def test_a_loss_that_is_no_number_stops_the_run_before_the_step(tmp_path):
    with pytest.raises(
        NonFiniteLossError,
        match=r"at step \d+, which was not taken: (z1 holds NaN|the loss is).*Lower base_learning_rate",
    ):
        ssl_parity_run.run("vicreg", 64, str(tmp_path), max_steps=6, learning_rate=1e30)


def test_a_diverged_run_ends_with_one_line_and_status_1(tmp_path, capsys):
    assert (
        main(
            [
                recipe(tmp_path, method="vicreg", predictor_widths=None, learning_rate=1.0e30),
                "--output_dir",
                str(tmp_path / "run"),
            ]
        )
        == 1
    )
    assert "which was not taken" in capsys.readouterr().err.splitlines()[-1]


def test_unreadable_images_are_skipped_named_and_counted(tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        Image.new("L", (12, 12), i * 5).save(folder / f"{i:02}.png")
    (folder / "17.png").write_bytes(b"not an image")
    path = recipe(
        tmp_path, dataset=str(folder), max_steps=10, per_device_train_batch_size=8, eval_dataset=None, save_steps=100
    )
    assert main([path, "--output_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["skipped_images"] == 1
    assert "17.png" in capsys.readouterr().out


# --- pretrain.py
# -------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_backbone_that_auto_model_loads_alone(tmp_path, capsys):
    plain = {**ssl_parity_run.BACKBONE, "model_type": "resnet"}
    path = recipe(tmp_path, backbone_config=plain, image_size=32)
    run = tmp_path / "run"
    assert main([path, "--output_dir", str(run), "--eval_strategy", "steps", "--eval_steps", "3"]) == 0
    assert "Matrix-SSL" in (run / "README.md").read_text()
    whole = AutoModel.from_pretrained(run / "pretraining").eval()
    script = (
        f"import sys; from transformers import AutoModel; AutoModel.from_pretrained({str(run)!r}); "
        "assert 'matrix_llm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    x = torch.randn(3, 1, 32, 32)
    for folder in (run, run / "pretraining", run / "checkpoint-6"):
        torch.testing.assert_close(pooled(load_backbone(folder), x), pooled(whole.backbone, x), rtol=0, atol=0)
    assert "eval_intra_class_effective_rank" in (run / "metrics.jsonl").read_text()
    assert main([path, "--output_dir", str(run)]) == 2
    assert "holds the weights of a finished run" in capsys.readouterr().err


def test_the_script_runs_from_another_folder_with_the_standard_ssl(tmp_path):
    """matrix_llm/ssl as the first folder of the path would hide the module that every HTTPS client needs."""
    script = f"""
import runpy, sys
sys.argv = ["pretrain.py", {recipe(tmp_path)!r}, "--dry_run"]
sys.path[0] = {str(ROOT / "matrix_llm/ssl")!r}
try:
    runpy.run_path({str(ROOT / "matrix_llm/ssl/pretrain.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
import ssl
assert ssl.SSLContext
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "steps            20 an epoch, 6 in all" in done.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gamma": 1.0}, "write it into loss_settings"),
        ({"dataset": "no/such/folder/of/images"}, "no/such/folder"),
        ({"gradient_accumulation_steps": 2}, "does not enlarge the batch"),
        ({"per_device_train_batch_size": 1298}, "Set per_device_train_batch_size lower"),
        ({"base_learning_rate": 1.0}, "Give one"),
        ({"optim": "sgd"}, "Write `optimizer: sgd`"),
        ({"method": "simsiam", "ema_momentum": 0.9}, "simsiam has no target network"),
        ({"channels": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}, "Make them equal"),
        ({"projector_widths": [16, 0]}, "one width above 0"),
        ({"backbone_config": {**ssl_parity_run.BACKBONE, "depths": [1]}}, "depths and hidden_sizes equally many"),
        ({"backbone_config": {"model_type": "resnt"}}, "Did you mean .*resnet"),
        ({"method": "moco", "predictor_widths": None, "queue_size": 63}, r"queue_size=63.*at least 64"),
        ({"backbone_config": {"depths": [1]}}, "Add model_type"),
        ({"eval_strategy": "epoch", "eval_dataset": None}, "Give eval_dataset"),
        ({"dataloader_drop_last": False}, "Set it to true"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1 .* at least 2"),
        ({"loss_settings": {"lambda_": "1e-3"}}, "lambda_='1e-3' must be a number.*1.0e-3"),
        ({"loss_settings": {"order": 2.5}}, "order=2.5 must be a whole number"),
    ],
)
def test_a_recipe_that_cannot_work_ends_with_one_line(tmp_path, capsys, changes, words):
    import re

    assert main([recipe(tmp_path, **changes), "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(words, error), error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(path, monkeypatch):
    found = load_ssl_recipe(path, dry_run=True)
    header = path.read_text().split("\n\n")[0]
    for part in ("Hardware", "Command", f"recipes/ssl/{path.name}"):
        assert part in header
    config = found.model
    SSLConfig(
        method=config.method, backbone_config=config.backbone_config, projector_widths=config.projector_widths,
        predictor_widths=config.predictor_widths, loss_settings=config.loss_settings, queue_size=config.queue_size,
        prototypes=config.prototypes,
    )  # fmt: skip


def test_the_paper_recipe_has_the_papers_learning_rate_on_eight_gpus(monkeypatch):
    found = load_ssl_recipe(ROOT / "recipes/ssl/imagenet_r50_100ep.yaml", dry_run=True)
    assert 8 * found.training.per_device_train_batch_size == 2048
    assert found.training.base_learning_rate * 2048 / 256 == 4.0
    assert found.training.get_warmup_steps(100 * 625) == 10 * 625
    assert SSLConfig(method="matrix_ssl").projector_widths == [2048, 2048, 2048]
    assert SSLConfig(method="matrix_ssl").predictor_widths == [512, 2048]


def test_every_method_of_a_cifar_recipe_can_be_planned():
    for method in METHODS:
        found = load_ssl_recipe(ROOT / "recipes/ssl/cifar10_r18.yaml", ["--method", method], dry_run=True).model
        SSLConfig(method=method, backbone_config=found.backbone_config, projector_widths=found.projector_widths)


@pytest.mark.parametrize(
    "settings", [{"preset": "papers"}, {"order": 0}, {"preset": "paper", "lambda_": 0.0}, {"eps": 0.0}]
)
def test_a_loss_setting_out_of_range_is_an_error_that_the_user_can_mend(settings):
    """pretrain.py prints the errors of this family in one line; any other would be a traceback."""
    model, (x, y) = ssl_parity_run.tiny("mec" if "eps" in settings else "matrix_ssl"), views()
    model.config.loss_settings = settings
    with pytest.raises(RecipeError, match=next(reversed(settings))):
        model(x, y)


def test_unknown_labels_are_refused_before_training(tmp_path):
    images = load_images("digits")
    images.labels = images.labels.clone()
    images.labels[::3] = -1
    args = SSLTrainingConfig(str(tmp_path), per_device_train_batch_size=8, use_cpu=True)
    with pytest.raises(ValueError, match="has the label -1"):
        SSLTrainer(ssl_parity_run.tiny("byol"), args, images=images, augment=ssl_parity_run.AUGMENT)


def test_moco_passes_each_network_over_one_view_alone():
    model = ssl_parity_run.tiny("moco").train()
    model(*views())
    assert model.backbone.embedder.embedder.normalization.num_batches_tracked == 1
    assert model.target_backbone.embedder.embedder.normalization.num_batches_tracked == 1


def test_swav_keeps_its_cosines_in_float32_under_autocast():
    model, (x, y) = ssl_parity_run.tiny("swav").eval(), views()
    branches = Branches(
        model.online_branch(x)[1],
        model.online_branch(y)[1],
        None,
        None,
        None,
        None,
        prototypes=model.prototypes.detach(),
    )
    expected = METHODS["swav"].loss(branches)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(METHODS["swav"].loss(branches), expected)


def test_an_unlabelled_probe_is_refused_before_training(tmp_path):
    images = load_images("digits")
    images.labels = None
    args = SSLTrainingConfig(str(tmp_path), per_device_train_batch_size=8, use_cpu=True)
    with pytest.raises(ValueError, match="has no labels, which the online probe needs"):
        SSLTrainer(ssl_parity_run.tiny("byol"), args, images=images, augment=ssl_parity_run.AUGMENT)


def test_a_learning_rate_given_twice_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="both given"):
        load_ssl_recipe(recipe(tmp_path, base_learning_rate=0.5))
