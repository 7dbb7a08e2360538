import json
import os
from pathlib import Path

import pytest
import torch

from matrix_llm.config import MatrixConfig, RecipeError, load_recipe

GOOD = """\
# model
model_config: {model_type: llama, hidden_size: 16}
tokenizer_vocab_size: 300
# data
dataset: builtin
# optimisation
learning_rate: 2e-5
eval_strategy: no
"""


@pytest.fixture
def recipe(tmp_path):
    """recipe("key: value") writes GOOD plus these lines and returns the path."""

    def write(*lines: str, base: str = GOOD) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(base + "\n".join(lines), encoding="utf-8")
        return path

    return write


def refusal(path, *overrides, **options) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ what works


def test_recipe_fills_the_three_dataclasses(recipe):
    loaded = load_recipe(recipe("too_long: truncate", "mce_top_k: 64"))
    assert loaded.training.learning_rate == 2e-5
    assert loaded.training.mce_top_k == 64
    assert loaded.training.output_dir == "runs/tiny"
    assert loaded.training.report_to == []
    assert loaded.data.too_long == "truncate"
    assert loaded.model.model_config == {"model_type": "llama", "hidden_size": 16}
    assert loaded.resolved["eval_strategy"] == "no"  # YAML 1.1 reads a bare no as False
    assert set(loaded.resolved) == {
        "model_config", "tokenizer_vocab_size", "dataset", "learning_rate", "eval_strategy", "too_long", "mce_top_k",
    }  # fmt: skip


def test_overrides_win_with_dashes_underscores_equals_and_bare_flags(recipe):
    overrides = [
        "--learning-rate",
        "1e-4",
        "--max_steps=5",
        "--packing",
        "--mce-top-k",
        "64",
        "--run_name",
        "7",
        "--weight_decay",
        "0",
    ]
    loaded = load_recipe(recipe("mce_top_k: 64", "packing: false"), overrides)
    assert (loaded.training.learning_rate, loaded.training.max_steps, loaded.training.packing) == (1e-4, 5, True)
    assert loaded.training.mce_top_k == 64
    assert loaded.training.run_name == "7"
    assert loaded.resolved["packing"] is True


def test_lists_mappings_and_null_on_the_command_line(recipe):
    overrides = [
        "--use_peft",
        "--lora_target_modules",
        "q_proj,v_proj",
        "--mce_steps",
        "null",
        '--lr_scheduler_kwargs={"num_cycles": 2}',
    ]
    loaded = load_recipe(recipe("mce_steps: 3"), overrides)
    assert loaded.model.lora_target_modules == ["q_proj", "v_proj"]
    assert loaded.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert loaded.training.mce_steps is None
    regex = load_recipe(recipe(), ["--use_peft", "--lora_target_modules", r".*\.(q|v)_proj"])
    assert regex.model.lora_target_modules == r".*\.(q|v)_proj"


def test_matrix_config_is_built_in_python_like_sft_config(tmp_path):
    config = MatrixConfig(output_dir=str(tmp_path))
    assert config.mce_weight == 1.0
    assert config.logging_nan_inf_filter is False
    assert config.max_length == 1024
    assert config.gradient_checkpointing is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plan differs from the run only where there is no GPU")
def test_a_machine_without_gpu_can_plan_a_gpu_recipe(recipe, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(
        tmp_path / "elsewhere"
    )  # the current folder comes first, and must not hold a ds_configs of its own
    (tmp_path / ".git").mkdir()
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    path = recipe("bf16: true", "tf32: true", "deepspeed: ds_configs/zero3.json")
    assert "bf16" in refusal(path)
    loaded = load_recipe(path, dry_run=True)
    assert (loaded.training.bf16, loaded.training.tf32, loaded.training.use_cpu) == (True, True, False)
    assert loaded.training.deepspeed == str(tmp_path / "ds_configs/zero3.json")  # found from the recipe's repository
    assert loaded.resolved["deepspeed"] == "ds_configs/zero3.json"


# ------------------------------------------------------------------------------------------------------------ names


def test_misspelt_key_names_the_nearest(recipe):
    message = refusal(recipe("learning_rat: 1.0"))
    assert "tiny.yaml line 9: 'learning_rat' is not a setting. Did you mean learning_rate" in message
    assert "on the command line: 'mce_wieght' is not a setting. Did you mean mce_weight" in refusal(
        recipe(), "--mce-wieght", "1"
    )


@pytest.mark.parametrize(
    ("key", "way_out"),
    [
        ("warmup_ratio", "warmup_steps: 0.03"),
        ("overwrite_output_dir", "another output_dir"),
        ("logging_dir", "output_dir"),
        ("group_by_length", "train_sampling_strategy: group_by_length"),
        ("evaluation_strategy", "eval_strategy"),
        ("scheduler", "lr_scheduler_type: cosine"),
    ],
)
def test_removed_names_come_with_the_way_out(recipe, key, way_out):
    assert way_out in refusal(recipe(f"{key}: 1"))


def test_a_section_is_refused_because_recipes_are_flat(recipe):
    assert "one flat mapping" in refusal(recipe("training: {max_steps: 3}"))


def test_a_key_given_twice_names_both_lines(recipe):
    assert "line 9: 'dataset' is given twice, first on line 5" in refusal(recipe("dataset: builtin"))


def test_a_word_that_belongs_to_no_setting_is_refused(recipe):
    assert "'5' belongs to no setting" in refusal(recipe(), "--max_steps=3", "5")
    assert "--max_steps has no value" in refusal(recipe(), "--max_steps", "--packing")


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_steps: ten", "max_steps='ten' is a text, but max_steps must be an integer"),
        ("max_steps: true", "max_steps=True is true or false, but max_steps must be an integer"),
        ("max_steps: 1.5", "must be an integer"),
        ("packing: 1", "must be true or false"),
        ("run_name: 7", "Put it in quotes"),
        ("adam_beta1: [0.9]", "must be a number"),
        ("lora_modules_to_save: [1]", "must be"),
        ("lr_scheduler_type: cosin", "Did you mean cosine"),
        ("mce_solver: krilov", "Did you mean krylov"),
        ("dtype: bf16", "Did you mean bfloat16"),
        ("too_long: cut", "drop, truncate, error"),
    ],
)
def test_wrong_type_names_key_value_and_line(recipe, line, said):
    message = refusal(recipe(line))
    assert "tiny.yaml line 9: " in message
    assert said in message


@pytest.mark.parametrize(
    "line",
    [
        "max_steps: -5",  # negative steps
        "max_steps: 0",
        "num_train_epochs: 0",
        "per_device_train_batch_size: 0",
        "gradient_accumulation_steps: 0",
        "mce_weight: -1",
        "mce_weight: .nan",
        "weight_decay: .inf",
        "mce_steps: 0",
        "warmup_steps: -1",
        "tokenizer_vocab_size: 100",
    ],
)
def test_values_out_of_range_are_refused(recipe, line):
    key = line.split(":")[0]
    base = GOOD.replace("tokenizer_vocab_size: 300\n", "") if key == "tokenizer_vocab_size" else GOOD
    message = refusal(recipe(line, base=base))
    assert f"{key}=" in message
    assert "must be" in message


def test_learning_rate_must_be_above_zero(recipe):
    assert "learning_rate=0.0 cannot work: it must be above 0" in refusal(recipe(), "--learning_rate", "0.0")


@pytest.mark.parametrize("value", [0, -3, "big", True, 1.5])
def test_sketch_and_top_k_are_auto_none_or_a_size(tmp_path, value):
    for name in ("mce_top_k", "mce_sketch_dim"):
        with pytest.raises(RecipeError, match=name):
            MatrixConfig(output_dir=str(tmp_path), **{name: value})


# ------------------------------------------------------------------------------------------------------------ combinations


@pytest.mark.parametrize("clash", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"use_liger_kernel": True}])
def test_losses_that_mce_cannot_join_are_refused(tmp_path, clash):
    with pytest.raises(RecipeError, match=rf"mce_weight=1.0 together with {next(iter(clash))}.*set mce_weight to 0"):
        MatrixConfig(output_dir=str(tmp_path), **clash)
    if "use_liger_kernel" not in clash:
        MatrixConfig(output_dir=str(tmp_path), mce_weight=0.0, **clash)


def test_adapter_on_lm_head_is_refused_unless_mce_is_off(recipe):
    path = recipe("use_peft: true", "lora_target_modules: [q_proj, lm_head]")
    message = refusal(path)
    assert "mce_weight=1.0 needs the LM head, but lora_target_modules puts an adapter on `lm_head`" in message
    assert "list `lm_head` under lora_modules_to_save" in message
    assert load_recipe(path, ["--mce_weight", "0"]).training.mce_weight == 0
    assert "lm_head" in refusal(recipe("use_peft: true", "lora_target_modules: '.*(proj|head)'"))


def test_lora_settings_without_use_peft_are_refused(recipe):
    assert "lora_r given, but use_peft is not" in refusal(recipe("lora_r: 8"))


def test_a_stream_needs_max_steps_and_one_order(recipe):
    assert "streaming=True: a stream has no known end, so num_train_epochs means nothing. Set max_steps" in refusal(
        recipe("streaming: true")
    )
    path = recipe("streaming: true", "max_steps: 5")
    assert load_recipe(path).data.streaming_buffer == 10000
    assert load_recipe(path, ["--packing"]).training.packing
    assert "a stream has one order" in refusal(path, "--train_sampling_strategy", "group_by_length")
    assert "streaming_buffer=5 does nothing without streaming" in refusal(recipe("streaming_buffer: 5"))


def test_leakage_settings_need_a_test_set_that_is_there(recipe, tmp_path):
    assert "leakage given, but leakage_check names no test set" in refusal(recipe("leakage: drop"))
    assert f"leakage_check='{tmp_path}/none.jsonl': nothing at" in refusal(
        recipe(f"leakage_check: [{tmp_path}/none.jsonl]")
    )
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("")
    loaded = load_recipe(recipe(), ["--leakage_check", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "--leakage", "drop"])
    assert loaded.data.leakage_check == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    (tmp_path / ".git").mkdir()  # a relative path is found from the recipe's repository
    assert load_recipe(recipe("leakage_check: [a.jsonl, openai/gsm8k:main]")).data.leakage_check == [
        f"{tmp_path}/a.jsonl",
        "openai/gsm8k:main",
    ]
    assert "leakage_share=1.5 cannot work" in refusal(recipe("leakage_check: [a.jsonl]", "leakage_share: 1.5"))
    assert "report, drop, stop" in refusal(recipe("leakage_check: [a.jsonl]", "leakage: remove"))


def test_the_response_separator_is_white_space(recipe):
    assert load_recipe(recipe('response_separator: ""')).data.response_separator == ""
    assert load_recipe(recipe(), ["--response_separator="]).data.response_separator == ""
    assert load_recipe(recipe()).data.response_separator == " "
    assert "response_separator='###' is no white space" in refusal(recipe('response_separator: "###"'))


def test_an_unknown_gpu_names_the_nearest(recipe):
    assert "Did you mean h100-80gb" in refusal(recipe(), "--gpu", "h100")
    assert load_recipe(recipe(), ["--gpu", "h200-141gb"]).model.gpu == "h200-141gb"


def test_model_is_loaded_or_built_but_not_both(recipe):
    assert "both are given" in refusal(recipe("model_name_or_path: x/y"))
    assert "neither is given" in refusal(recipe(base="dataset: builtin\n"))
    assert "tokenizer_vocab_size" in refusal(recipe(base="dataset: builtin\nmodel_config: {model_type: llama}\n"))


def test_missing_files_are_named_with_their_absolute_path(recipe, tmp_path):
    assert f"no recipe at {tmp_path}/tni.yaml. Recipes in that folder: tiny.yaml. Did you mean tiny.yaml" in (
        recipe() and refusal(tmp_path / "tni.yaml")
    )
    assert f"dataset='no/such.jsonl': nothing at {os.getcwd()}/no/such.jsonl" in refusal(
        recipe(), "--dataset", "no/such.jsonl"
    )
    assert f"nothing at {tmp_path}/none" in refusal(recipe(), "--eval_dataset", f"{tmp_path}/none")
    assert "no file at" in refusal(recipe(), "--mce_embeddings", f"{tmp_path}/none.safetensors")
    assert "no file at" in refusal(recipe(), "--deepspeed", "none.json")
    assert "Did you mean lm_head" in refusal(recipe(), "--mce_embeddings", "lmhead")


def test_gradient_into_embeddings_from_a_file_is_refused(tmp_path):
    file = tmp_path / "e.safetensors"
    file.write_bytes(b"")
    with pytest.raises(RecipeError, match="gradient goes nowhere"):
        MatrixConfig(output_dir=str(tmp_path), mce_embeddings=str(file), mce_embedding_grad=True)


def test_deepspeed_scheduler_block_is_refused(recipe, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"scheduler": {"type": "WarmupLR"}}))
    assert "replaces lr_scheduler_type in silence" in refusal(recipe(f"deepspeed: {file}"), dry_run=True)


def test_evaluation_without_rows_is_refused(recipe):
    assert "Give eval_dataset" in refusal(recipe(), "--eval_strategy", "steps")
    assert (
        load_recipe(recipe(), ["--eval_strategy", "steps", "--eval_dataset", "builtin"]).data.eval_dataset == "builtin"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("dataset: [1, 2\nx: 3\n", "line 2: this is not YAML"),
        ("a: b: c\n", "line 1"),
    ],
)
def test_a_file_that_is_no_flat_mapping_names_file_and_line(recipe, text, said):
    message = refusal(recipe(base=text))
    assert "tiny.yaml" in message
    assert said in message
