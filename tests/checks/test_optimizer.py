"""The optimizer and the schedule are built before anything is loaded, and drop none of their arguments."""

import pytest
from transformers.trainer_utils import SchedulerType

from matrix_llm.base.errors import RecipeError

SCHEDULES = [
    ("cosine_with_min_lr", "{min_lr: 1e-6}"),
    ("cosine_with_min_lr", '{"min_lr": "1e-6"}'),
    ("cosine_warmup_with_min_lr", "{min_lr_rate: 1e-1}"),
    ("warmup_stable_decay", "{num_decay_steps: 2}"),
    ("cosine_with_restarts", "{num_cycles: 2}"),
    ("polynomial", "{lr_end: 1e-8, power: 2}"),
    ("inverse_sqrt", "{timescale: 100}"),
    ("reduce_lr_on_plateau", "{factor: 5e-1, min_lr: 1e-6}"),
    ("greedy", "{patience: 3}"),
    ("linear", "null"),
    ("cosine", "null"),
    ("constant", "null"),
    ("constant_with_warmup", "null"),
]


@pytest.mark.parametrize(("kind", "kwargs"), SCHEDULES)
def test_every_schedule_takes_its_arguments_and_no_others(load, evaluated, kind, kwargs):
    settings = {**evaluated, "lr_scheduler_type": kind}
    found = load("--lr_scheduler_kwargs", kwargs, **settings).training.lr_scheduler_kwargs or {}
    assert all(type(value) in (int, float) for value in found.values())
    with pytest.raises(RecipeError, match=f"lr_scheduler_type='{kind}' with lr_scheduler_kwargs=.*lr_scheduler_kwargs"):
        load("--lr_scheduler_kwargs", "{min_lrr: 1e-6}", **settings)


def test_every_schedule_of_transformers_is_tried_here():
    assert {kind for kind, _ in SCHEDULES} == {each.value for each in SchedulerType}


def test_numbers_of_a_recipe_are_numbers_at_any_depth(load):
    loaded = load(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": "1e-6"})
    assert loaded.training.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr' cannot be built.*lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay' cannot be built.*num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_end.*smaller"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}}, "rates such as -"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps=5.*constant_with_warmup"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau'.*eval"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(load, settings, refusal):
    with pytest.raises(RecipeError, match=refusal):
        load(**settings)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"optim": "sgd", "optim_args": "momentm=0.9"}, "optim_args='momentm=0.9'.*'sgd'.*does not read momentm"),
        ({"optim_args": "eps=1e-6"}, "optim_args='eps=1e-6'.*adamw_torch_fused.*does not read eps"),
        (
            {"optim": "sgd", "optim_args": "momentum=much"},
            "optim='sgd' with optim_args='momentum=much' cannot be built",
        ),
        ({"optim_args": "momentum"}, "optim_args='momentum'.*name=value"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1=0.8 does nothing with optim='sgd'"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06 does nothing with optim='adafactor'"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules='all-linear' does nothing"),
    ],
)
def test_an_argument_that_the_optimizer_would_drop_is_refused(load, settings, refusal):
    with pytest.raises(RecipeError, match=refusal):
        load(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=false"},
        {"optim": "rmsprop", "optim_args": "alpha=0.9"},
        {"optim": "adagrad", "optim_args": "lr_decay=0.1"},
        {"optim": "adafactor"},
        {"adam_beta1": 0, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    ],
)
def test_an_argument_that_the_optimizer_reads_is_taken(load, settings):
    load(**settings)


def test_a_switch_that_any_text_turns_on_is_not_believed_to_be_off(load, monkeypatch):
    """torch-optimi's kahan_sum, for example: bool("false") is True."""
    import torch
    from transformers import Trainer
    from transformers.trainer_optimizer import _parse_optim_args

    def handler(args, model=None):
        is_on = bool(_parse_optim_args(args.optim_args).get("nesterov", False))
        return torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": is_on}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(handler))
    with pytest.raises(RecipeError, match=r"nesterov is switched on by any text, 'false' too"):
        load(optim="sgd", optim_args="nesterov=false")
