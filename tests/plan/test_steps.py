"""The plan's arithmetic is the Trainer's, and its words show what will be trained on."""

import functools

import pytest
from transformers import AutoConfig

from matrix_llm.data.selection import DataReport
from matrix_llm.plan.steps import describe_loss, masked_sample, plan_steps
from tests.support.planned_recipe import SMALL, planned_recipe

REPORT = DataReport("train", 1000, 1000, 0, 0, 0, 50_000, 30_000, 90, 50.0)


@pytest.fixture
def recipe(tmp_path):
    return functools.partial(planned_recipe, tmp_path)


@pytest.mark.parametrize(
    ("changes", "processes", "batch", "steps"),
    [
        ({"per_device_train_batch_size": 8, "num_train_epochs": 2}, 1, 8, 250),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 3}, 8, 128, 24),
        ({"per_device_train_batch_size": 8, "max_steps": 7}, 2, 16, 7),
        ({"per_device_train_batch_size": 8, "packing": True, "max_length": 100, "num_train_epochs": 1}, 1, 8, 63),
    ],
)
def test_step_arithmetic_is_the_trainers(recipe, changes, processes, batch, steps):
    planned = plan_steps(recipe(**changes), REPORT, processes)
    assert (planned.effective_batch, planned.steps) == (batch, steps)


def test_tokens_are_those_of_all_processes(recipe):
    planned = plan_steps(recipe(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3), REPORT, 5)
    assert planned.tokens_per_step == 4 * 2 * 5 * 50  # 50 tokens a row
    assert "2,000 a step, 6,000 in all" in planned.lines()[2]


def test_the_plan_of_a_stream_does_not_invent_epochs(recipe):
    report = DataReport("train", 1000, 1000, 0, 0, 0, 50_000, 30_000, 90, 50.0, sampled=True)
    planned = plan_steps(recipe(streaming=True, max_steps=7), report, 1)
    assert (planned.steps, planned.epochs) == (7, None)
    assert "(of a stream)" in planned.lines()[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mce_weight": 0.0}, ["CE (mce_weight: 0"]),
        ({}, ["CE + 1 x MCE", "krylov", "6 steps", "top 16 of 32000", "no sketch", "lm_head", "detached"]),
        ({"mce_weight": 0.5, "mce_warmup_steps": 20}, ["CE + 0.5 x MCE", "first 20 steps"]),
        ({"mce_warmup_steps": 0.1}, ["first 10 % of the steps"]),
        ({"mce_solver": "taylor", "mce_order": 7}, ["taylor", "order 7"]),
        (
            {"mce_sketch_dim": 8, "mce_embedding_grad": True},
            ["the whole vocabulary of 32000", "sketch 8", "with gradient"],
        ),
    ],
)
def test_the_loss_in_words_gives_the_defaults_that_a_recipe_leaves_open(recipe, settings, words):
    described = describe_loss(recipe(**settings).training, AutoConfig.for_model(**SMALL, vocab_size=32000))
    assert [word for word in words if word not in described] == []


def test_the_sample_shows_what_is_trained(tiny_tokenizer):
    ids = tiny_tokenizer("Question: 12")["input_ids"]
    lines = masked_sample({"input_ids": ids, "labels": [-100] * 2 + ids[2:-1] + [-100]}, tiny_tokenizer)
    assert [line[:8] for line in lines] == ["masked |", "TRAINED|", "masked |"]
    assert "".join(line[9:] for line in lines) == tiny_tokenizer.decode(ids)
