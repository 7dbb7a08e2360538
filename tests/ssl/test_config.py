"""Image recipes (config.py): every one can be planned, and the paper's numbers are in them."""

import pytest

from matrix_llm.base.errors import RecipeError
from matrix_llm.ssl.config import load_ssl_recipe
from matrix_llm.ssl.methods import METHODS
from matrix_llm.ssl.modeling import SSLConfig
from tests.support.paths import ROOT
from tests.support.tiny_ssl import write_recipe

RECIPES = sorted((ROOT / "recipes/ssl").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(path):
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


def test_the_paper_recipe_has_the_papers_learning_rate_on_eight_gpus():
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


def test_a_learning_rate_given_twice_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="both given"):
        load_ssl_recipe(write_recipe(tmp_path, base_learning_rate=0.5))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs"),
        ("--lr_scheduler_kwargs={min_lrr: 1e-6}", "lr_scheduler_kwargs"),
        ("--report_to=wand", "report_to='wand'.*Did you mean wandb"),
        ("--torch_compile_backend=inductr", "torch_compile_backend='inductr'.*inductor"),
        ("--accelerator_config={even_batchs: true}", "even_batchs"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_the_trainer_would_refuse_later_is_refused_first(override, words, dry_run):
    with pytest.raises(RecipeError, match=words) as error:
        load_ssl_recipe(ROOT / "recipes/ssl/digits.yaml", [override], dry_run=dry_run)
    assert "\n" not in str(error.value)
