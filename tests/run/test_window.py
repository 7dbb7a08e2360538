"""The logging window (run/window.py): sums, their way through a checkpoint, and the clock of training."""

import contextlib
import doctest

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from matrix_llm.run import window
from matrix_llm.run.window import TokenClock, TokenSums, training_flops_per_token


def test_doctests():
    found = doctest.testmod(window)
    assert found.attempted
    assert not found.failed


def test_taking_the_sums_empties_the_window():
    accelerator, sums = Accelerator(cpu=True), TokenSums()
    assert sums.take(accelerator) == {}
    for ce in (2.0, 6.0):
        sums.add(tokens=torch.tensor(4), ce=torch.tensor(ce, requires_grad=True))
    assert sums.take(accelerator) == {"ce": 8.0, "tokens": 8.0}
    assert sums.take(accelerator) == {}


def test_restored_sums_go_on_where_they_were():
    """In float64: a float32 sum of many tokens would no longer grow by one."""
    first, second = TokenSums(), TokenSums()
    first.add(tokens=torch.tensor(2**24))
    second.restore(first.state(), torch.device("cpu"))
    for sums in (first, second):
        sums.add(tokens=torch.tensor(1))
    assert first.state() == second.state() == {"tokens": 2**24 + 1}


def test_the_clock_leaves_out_what_is_not_training_and_what_was_read_before(monkeypatch):
    times = iter([0.0, 2.0, 3.0, 4.0, 7.0, 10.0, 12.0])
    monkeypatch.setattr(window.time, "perf_counter", lambda: next(times))
    clock = TokenClock(100)
    with clock.paused():  # from 2 to 7; Trainer evaluates several sets by one call within another
        for _ in range(2):
            with contextlib.suppress(ValueError), clock.paused():
                raise ValueError
    assert clock.read(600) == pytest.approx(100)  # 500 tokens in the 10 s of which 5 were training
    assert clock.read(640) == pytest.approx(20)


# --- floating-point operations per token -----------------------------------------------------------------------------


def test_a_shared_head_is_counted_once_and_multiplied():
    def flops(tied):
        config = LlamaConfig(
            vocab_size=10,
            hidden_size=8,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            tie_word_embeddings=tied,
        )
        return training_flops_per_token(LlamaForCausalLM(config), length=3)

    assert flops(tied=True) == flops(tied=False) == 6 * (4 * 8 * 8 + 3 * 8 * 4 + 3 * 8 + 10 * 8) + 12 * 8 * 3


def test_only_the_experts_that_a_token_is_sent_to_are_counted():
    def flops(experts, used):
        config = MixtralConfig(
            vocab_size=10, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, num_local_experts=experts, num_experts_per_tok=used,
        )  # fmt: skip
        return training_flops_per_token(MixtralForCausalLM(config), length=3)

    expert, router = 3 * 8 * 4, 8
    assert flops(4, 2) - flops(4, 1) == 6 * expert
    assert flops(8, 1) - flops(4, 1) == 6 * 4 * router


@pytest.mark.slow
def test_every_causal_architecture_of_transformers_can_be_counted():
    """What a known GPU needs at the first log: TRL's own formula raises for most of them."""
    counted = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception:
            continue
        flops = training_flops_per_token(model, 128)
        assert flops is None or flops > 0, model_type
        counted += flops is not None
    assert counted > 100
