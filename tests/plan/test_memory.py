"""Memory per GPU: what is sharded, what trains, which GPU it fits, and the estimate against measured peaks."""

import functools

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import memory_plan
from matrix_llm.base.gpus import GIB, GPUS, usable
from matrix_llm.plan.memory import ENGINES, count_parameters, memory_lines, plan_memory
from tests.support.planned_recipe import SMALL, planned_recipe

SEVEN = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture
def recipe(tmp_path):
    return functools.partial(planned_recipe, tmp_path)


def small(**changes):
    return AutoConfig.for_model(**SMALL, vocab_size=300, **changes)


def seven():
    return AutoConfig.for_model(**SEVEN, vocab_size=32016)


def number_of_parameters(config):
    """Of a model really built."""
    return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def by_engine(plans):
    return {plan.engine: plan for plan in plans}


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model_that_is_built_tied_ones_once(recipe, tied):
    config = small(tie_word_embeddings=tied)
    count = count_parameters(recipe(), config)
    assert count.total == count.trained == number_of_parameters(config)
    assert count.embeddings == (1 if tied else 2) * 300 * 64
    assert count.linear == 2 * count.layer - 2 * 2 * 64  # two layers without the weights of their two norms


def test_linear_layers_are_counted_where_they_are_stored_transposed_as_in_gpt2(recipe):
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=64, n_layer=2, n_head=4)
    assert count_parameters(recipe(), config).linear == 2 * (4 + 2 * 4) * 64 * 64


def test_a_tied_head_costs_one_weight_and_one_gradient(recipe):
    tied, untied = (plan_memory(recipe(), small(tie_word_embeddings=tie), 128, 1)[0] for tie in (True, False))
    assert untied.weights - tied.weights == untied.gradients - tied.gradients == 4 * 300 * 64
    assert untied.lm_head == tied.lm_head


@pytest.mark.parametrize(
    ("optim", "bytes_a_number"), [("adamw_torch", 8), ("sgd", 0), ("adafactor", 0), ("adamw_8bit", 2)]
)
def test_each_optimizer_has_its_own_state(recipe, optim, bytes_a_number):
    for plan in plan_memory(recipe(optim=optim), small(), 128, 1):
        assert plan.optimizer == bytes_a_number * number_of_parameters(small())


def test_zero_stages_shard_optimizer_then_gradients_then_weights(recipe):
    plans = plan_memory(recipe(), small(), 128, 4)
    n = number_of_parameters(small())
    assert [p.engine for p in plans] == list(ENGINES)
    assert [p.optimizer for p in plans] == [8 * n, 2 * n, 2 * n, 2 * n, 2 * n]
    assert [p.gradients for p in plans] == [4 * n, 4 * n, n, n, n]
    assert [p.weights for p in plans] == [4 * n, 4 * n, 4 * n, n, n]
    assert [p.copies for p in plans] == [0, n, n, n, 0]  # DeepSpeed keeps its own float32 partition


def test_half_precision_is_a_copy_under_autocast_and_the_model_under_deepspeed(recipe):
    plans = by_engine(plan_memory(recipe(bf16=True), small(), 128, 4))
    n = number_of_parameters(small())
    assert (plans["no sharding"].weights, plans["no sharding"].copies) == (4 * n, 2 * n)
    assert (plans["ZeRO-2"].weights, plans["ZeRO-2"].copies, plans["ZeRO-2"].gradients) == (2 * n, n, 2 * n / 4)
    assert (plans["FSDP2"].weights, plans["FSDP2"].gradients, plans["FSDP2"].optimizer) == (n, n, 2 * n)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_lora_trains_what_peft_says(recipe, targets):
    loaded = recipe(use_peft=True, lora_r=4, lora_target_modules=targets)
    adapters = 2 * 4 * (64 + 64) if targets == ["q_proj"] else 2 * 4 * (4 * (64 + 64) + 3 * (64 + 96))
    count = count_parameters(loaded, small())
    assert (count.trained, count.total) == (adapters, number_of_parameters(small()) + adapters)
    plan = plan_memory(loaded, small(), 128, 1)[0]
    assert (plan.gradients, plan.optimizer) == (4 * adapters, 8 * adapters)


def test_what_is_trained_besides_the_adapters_is_counted(recipe):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"]}
    plain, plan = (count_parameters(recipe(**lora), small()).trained, plan_memory(recipe(**lora), small(), 128, 1)[0])
    for more, numbers in (
        ({"use_dora": True}, 2 * 64),
        ({"lora_modules_to_save": ["model.norm"]}, 64),
        ({"lora_trainable_token_indices": [1, 2, 3]}, 3 * 64),
        ({"lora_rank_pattern": {"q_proj": 2}}, -2 * 2 * (64 + 64)),
        ({"init_lora_weights": "pissa"}, 0),
    ):
        assert count_parameters(recipe(**lora, **more), small()).trained - plain == numbers, more
    head = {"lora_modules_to_save": ["model.embed_tokens", "head"]}  # by any name
    assert plan_memory(recipe(**lora, **head), small(), 128, 1)[0].lm_head - plan.lm_head == 4 * 300 * 64


@pytest.mark.parametrize(("key", "bytes_a_number"), [("load_in_4bit", 0.53), ("load_in_8bit", 1)])
def test_qlora_holds_linear_layers_in_few_bytes_and_is_not_sharded(recipe, tmp_path, key, bytes_a_number):
    small().save_pretrained(tmp_path / "base")
    loaded = recipe(
        model_config=None,
        tokenizer_vocab_size=None,
        model_name_or_path=str(tmp_path / "base"),
        use_peft=True,
        **{key: True},
    )
    plans = plan_memory(loaded, small(), 128, 1)
    assert [plan.engine for plan in plans] == ["no sharding", "ZeRO-1", "ZeRO-2"]
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    rest = count_parameters(loaded, small()).total - linear
    assert plans[0].weights == pytest.approx(4 * rest + bytes_a_number * linear)


def test_the_headline_fits_eight_gpus_of_80_gb_only_sharded(recipe):
    """Llemma 7B: 6.7 billion parameters, 16 bytes each before anything else."""
    loaded = recipe(model_config=SEVEN, bf16=True, per_device_train_batch_size=4, max_length=512, gpu="h100-80gb")
    plans = by_engine(plan_memory(loaded, seven(), 512, 8))
    assert 16 * 6.7e9 < plans["no sharding"].state < 20 * 6.8e9
    lines = list(memory_lines(loaded, seven(), 512, 8))
    assert "no sharding" in lines[0]
    assert "DOES NOT FIT" in lines[0]
    assert lines[-1].startswith("h100-80gb: 72.8 of 79.1 GiB for tensors on each of 8. Fits: ")
    assert "ZeRO-3, FSDP2" in lines[-1]
    assert "no sharding" not in lines[-1]
    alone = list(memory_lines(recipe(model_config=SEVEN, bf16=True, gpu="t4-16gb"), seven(), 512, 1))
    assert "t4-16gb" in alone[-1]
    assert "use_peft" in alone[-1]


def test_without_a_gpu_named_each_line_says_the_smallest_that_fits(recipe):
    plan = plan_memory(recipe(), small(), 128, 1)[0]
    assert plan.line().endswith("fits t4-16gb")
    assert all(usable(name) < GPUS[name] * GIB for name in GPUS)


@pytest.mark.slow
@pytest.mark.parametrize("size", list(memory_plan.SIZES))
def test_weights_gradients_and_optimizer_are_within_a_quarter_of_the_measured_peak(size):
    """Real training on the CPU with rows of 32 tokens, so that little else is in memory."""
    got = memory_plan.measure(size, **memory_plan.SHORT)
    assert got["state"] == pytest.approx(got["measured"], rel=0.25)
