"""The settings of a language-model run: what a recipe becomes, and every combination that is refused."""

import ast
import dataclasses
import inspect
import itertools
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from matrix_llm.base.values import INHERITED_RANGES
from matrix_llm.config import DataArguments, MatrixConfig, ModelArguments, RecipeError, load_recipe
from matrix_llm.ssl.config import load_ssl_recipe
from tests.support.paths import ROOT

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

    def write(*lines: str) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(GOOD + "\n".join(lines), encoding="utf-8")
        return path

    return write


# ------------------------------------------------------------------------------------------------------ what is read


def test_a_recipe_fills_the_three_dataclasses(recipe):
    loaded = load_recipe(recipe("too_long: truncate", "mce_top_k: 64"))
    assert loaded.training.learning_rate == 2e-5
    assert loaded.training.mce_top_k == 64
    assert loaded.training.output_dir == "runs/tiny"
    assert loaded.training.report_to == []
    assert loaded.data.too_long == "truncate"
    assert loaded.model.model_config == {"model_type": "llama", "hidden_size": 16}
    assert loaded.resolved == {**yaml.safe_load(GOOD), "learning_rate": 2e-5, "eval_strategy": "no",
                               "too_long": "truncate", "mce_top_k": 64}  # fmt: skip


def test_overrides_win_over_the_file(recipe):
    overrides = shlex.split("--learning-rate 1e-4 --max_steps=5 --packing --mce-top-k 32 --run_name 7 --weight_decay 0")
    loaded = load_recipe(recipe("mce_top_k: 64", "packing: false"), overrides)
    assert (loaded.training.learning_rate, loaded.training.max_steps, loaded.training.packing) == (1e-4, 5, True)
    assert (loaded.training.mce_top_k, loaded.training.run_name) == (32, "7")
    assert loaded.resolved["packing"] is True


def test_matrix_config_is_built_in_python_like_sft_config(tmp_path):
    config = MatrixConfig(output_dir=str(tmp_path))
    assert config.mce_weight == 1.0
    assert config.logging_nan_inf_filter is False
    assert config.max_length == 1024
    assert config.gradient_checkpointing is True


@pytest.mark.parametrize("value", [0, -3, "big", True, 1.5])
@pytest.mark.parametrize("name", ["mce_top_k", "mce_sketch_dim"])
def test_sizes_given_in_python_are_checked_like_those_of_a_recipe(tmp_path, name, value):
    with pytest.raises(RecipeError, match=f"{name}={value!r}.*must be"):
        MatrixConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plan differs from the run only where there is no GPU")
def test_a_machine_without_gpu_can_plan_a_gpu_recipe(recipe, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the current folder comes first: it must have no ds_configs of its own
    (tmp_path / ".git").mkdir()
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    path = recipe("bf16: true", "tf32: true", "deepspeed: ds_configs/zero3.json")
    with pytest.raises(RecipeError, match=r"tiny\.yaml: .*bf16"):
        load_recipe(path)
    loaded = load_recipe(path, dry_run=True)
    assert (loaded.training.bf16, loaded.training.tf32, loaded.training.use_cpu) == (True, True, False)
    assert loaded.training.deepspeed == str(tmp_path / "ds_configs/zero3.json")  # found from the recipe's repository
    assert loaded.resolved["deepspeed"] == "ds_configs/zero3.json"


def test_leakage_sources_are_found_from_the_recipes_repository(recipe, tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.jsonl").write_text("")
    loaded = load_recipe(recipe("leakage_check: [a.jsonl, openai/gsm8k:main]"))
    assert loaded.data.leakage_check == [f"{tmp_path}/a.jsonl", "openai/gsm8k:main"]
    assert loaded.resolved["leakage_check"] == ["a.jsonl", "openai/gsm8k:main"]


def test_what_a_run_writes_down_holds_no_token_and_nothing_that_was_changed_later(recipe):
    loaded = load_recipe(recipe("hub_token: hf_secret", "lora_modules_to_save: [lm_head]", "use_peft: true"))
    assert loaded.training.hub_token == "hf_secret"
    assert "hub_token" not in loaded.resolved
    loaded.model.model_config["vocab_size"] = 300
    loaded.model.lora_modules_to_save.append("embed_tokens")
    assert loaded.resolved["model_config"] == {"model_type": "llama", "hidden_size": 16}
    assert loaded.resolved["lora_modules_to_save"] == ["lm_head"]


@pytest.mark.parametrize(
    ("key", "way_out"),
    [
        ("warmup_ratio", "warmup_steps: 0.03"),
        ("overwrite_output_dir", "another output_dir"),
        ("logging_dir", "output_dir"),
        ("group_by_length", "train_sampling_strategy: group_by_length"),
        ("evaluation_strategy", "eval_strategy"),
        ("scheduler", "lr_scheduler_type: cosine"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("cutoff_len", "max_length"),
        ("val_set_size", "eval_dataset.*eval_split: train"),
        ("lora_target_linear", "lora_target_modules: all-linear"),
        ("mce_wieght", "Did you mean mce_weight"),
    ],
)
def test_a_name_that_does_not_exist_comes_with_what_to_write(recipe, key, way_out):
    with pytest.raises(RecipeError, match=rf"tiny\.yaml line 9: '{key}' is not a setting.*{way_out}"):
        load_recipe(recipe(f"{key}: 1"))


# ------------------------------------------------------------------------------------------------------------ ranges

RANGES = {  # a value that is refused, and the settings that refuse it
    "0": """accuracy_gpu_memory
        learning_rate num_train_epochs logging_steps eval_steps save_steps adam_epsilon per_device_train_batch_size
        per_device_eval_batch_size gradient_accumulation_steps max_length mce_steps mce_order mce_sketch_dim mce_top_k
        lora_r lora_alpha save_total_limit dataset_num_proc max_train_rows max_eval_rows builtin_rows builtin_eval_rows
        accuracy_max_new_tokens streaming_buffer leakage_ngram leakage_share max_steps early_stopping_patience
        pad_to_multiple_of eval_accumulation_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout""",
    "-1": """mce_weight mce_warmup_steps effective_rank_steps accuracy_rows accuracy_steps weight_decay warmup_steps
        max_grad_norm seed data_seed dataloader_num_workers early_stopping_threshold
        eval_delay neftune_noise_alpha router_aux_loss_coef""",
    "1.0": "lora_dropout label_smoothing_factor adam_beta1 adam_beta2",
    "1.1": "leakage_share accuracy_gpu_memory",
    "-5": "max_steps",
    "259": "tokenizer_vocab_size",
    "4294967296": "seed data_seed",
    "nan": "mce_weight",
    "inf": "weight_decay",
}


@pytest.mark.parametrize(("value", "keys"), RANGES.items())
def test_values_out_of_range_are_refused_with_the_range(recipe, value, keys):
    path = recipe()
    for key in keys.split():
        with pytest.raises(RecipeError, match=rf"{key}={value}(\.0)? cannot work: it must be \w+"):
            load_recipe(path, [f"--{key}={value}"])


def test_every_range_is_tried():
    own = {f.name for f in OWN_FIELDS.values() if str(f.metadata.get("range", ""))}
    assert {*INHERITED_RANGES, *own} == {key for keys in RANGES.values() for key in keys.split()}


@pytest.mark.parametrize(
    "override", ["momentum=1", "base_learning_rate=0", "probe_learning_rate=0", "effective_rank_steps=-1",
                 "max_train_rows=0", "learning_rate=0", "per_device_train_batch_size=0", "image_size=0"],
)  # fmt: skip
def test_image_recipes_have_ranges_too(override):
    with pytest.raises(RecipeError, match=f"{override}.*must be|{override}.*image"):
        load_ssl_recipe(ROOT / "recipes" / "ssl" / "digits.yaml", [f"--{override}"])


# ------------------------------------------------------------------------------------------------------ combinations

PRETRAINED = "--model_config null --tokenizer_vocab_size null --model_name_or_path x/y"
ADAPTED = f"{PRETRAINED} --use_peft --accuracy_rows 8"
STREAM = "--streaming --max_steps 5"

REFUSED = [  # overrides of GOOD; what is said; the overrides as the message would mend them
    # model
    ("--model_name_or_path x/y", "model_name_or_path and model_config.*both.*exactly one", PRETRAINED),
    ("--model_config null", "model_name_or_path and model_config.*neither.*exactly one", PRETRAINED),
    ("--model_config '{hidden_size: 16}'", "model_config=.*model_type", "--model_config '{model_type: llama}'"),
    ("--tokenizer_vocab_size null", "model_config.*exactly one of.*tokenizer_name_or_path",
     "--tokenizer_vocab_size null --tokenizer_name_or_path x/y"),
    ("--tokenizer_name_or_path x/y", "model_config.*exactly one of.*tokenizer_vocab_size", ""),
    (f"{PRETRAINED} --tokenizer_vocab_size 300", "tokenizer_vocab_size=300.*Remove it", PRETRAINED),
    (f"{PRETRAINED} --load_in_4bit", "load_in_4bit=True.*use_peft: true", f"{PRETRAINED} --load_in_4bit --use_peft"),
    ("--load_in_4bit --use_peft", "load_in_4bit=True.*model_name_or_path", f"{PRETRAINED} --load_in_4bit --use_peft"),
    ("--gpu h100", "gpu='h100'.*Did you mean h100-80gb", "--gpu h100-80gb"),
    # adapters
    ("--lora_r 8", "lora_r given.*use_peft: true", "--lora_r 8 --use_peft"),
    ("--use_dora", "use_dora given.*use_peft: true", "--use_dora --use_peft"),
    ("--use_peft --bnb_4bit_quant_type fp4", "bnb_4bit_quant_type given.*load_in_4bit: true", "--use_peft"),
    (f"{PRETRAINED} --load_in_8bit", "load_in_8bit=True.*use_peft: true", f"{PRETRAINED} --load_in_8bit --use_peft"),
    ("--load_in_8bit --use_peft", "load_in_8bit=True.*model_name_or_path", f"{PRETRAINED} --load_in_8bit --use_peft"),
    (f"{PRETRAINED} --use_peft --load_in_8bit --load_in_4bit", "load_in_4bit=True.*load_in_8bit=True.*Remove one",
     f"{PRETRAINED} --use_peft --load_in_8bit"),
    (f"{PRETRAINED} --use_peft --load_in_8bit --use_dora", "load_in_8bit=True.*use_dora=True.*load_in_4bit",
     f"{PRETRAINED} --use_peft --load_in_4bit --use_dora"),
    ("--use_peft --init_lora_weights pisa", "init_lora_weights='pisa'.*Did you mean pissa",
     "--use_peft --init_lora_weights pissa_niter_4"),
    ("--use_peft --init_lora_weights false", "init_lora_weights=False.*to true", "--use_peft --init_lora_weights true"),
    ("--use_peft --init_lora_weights eva", "init_lora_weights='eva'.*data.*to pissa",
     "--use_peft --init_lora_weights pissa"),
    ("--use_peft --init_lora_weights pissa --use_rslora", "init_lora_weights='pissa'.*remove use_rslora",
     "--use_peft --use_rslora"),
    ("--use_peft --init_lora_weights olora --use_dora", "init_lora_weights='olora'.*remove use_dora",
     "--use_peft --use_dora"),
    (f"{PRETRAINED} --use_peft --init_lora_weights pissa --load_in_4bit", "'pissa'.*remove load_in_4bit",
     f"{PRETRAINED} --use_peft --init_lora_weights true --load_in_4bit"),
    ("--use_peft --lora_rank_pattern '{q_proj: 0}'", "lora_rank_pattern=.'q_proj': 0.*at least 1",
     "--use_peft --lora_rank_pattern '{q_proj: 1}'"),
    ("--use_peft --lora_bias true", "lora_bias='true'.*lora_only", "--use_peft --lora_bias lora_only"),
    ("--use_peft --lora_trainable_token_indices '[-1]'", "lora_trainable_token_indices=.-1.*at least 0.*Correct",
     "--use_peft --lora_trainable_token_indices '[1]'"),
    ("--use_peft --lora_layers_pattern layers", "lora_layers_pattern='layers'.*remove lora_layers_pattern",
     "--use_peft --lora_layers_pattern layers --lora_layers_to_transform [0]"),
    ("--use_peft --lora_layers_to_transform [0] --lora_target_modules all-linear",
     "lora_layers_to_transform=.0.*lora_target_modules='all-linear'.*as a list",
     "--use_peft --lora_layers_to_transform [0] --lora_target_modules [q_proj]"),
    ("--use_peft --lora_target_modules '*proj'", "lora_target_modules='.proj' is not a regular.*list of module names",
     "--use_peft --lora_target_modules all-linear"),
    # data
    ("--dataset null", 'dataset is not given.*"builtin"', "--dataset builtin"),
    ("--prompt_template metamaths", "prompt_template='metamaths'.*Did you mean 'metamath'",
     "--prompt_template metamath"),
    ("--response_separator '###'", "response_separator='###'.*prompt_template", "--response_separator="),
    ("--accuracy_steps 5", "accuracy_steps=5.*Set accuracy_rows", "--accuracy_steps 5 --accuracy_rows 8"),
    ("--accuracy_rows 8 --accuracy_engine vlm", "accuracy_engine='vlm'.*HOST:PORT.*vllm",
     "--accuracy_rows 8 --accuracy_engine transformers"),
    ("--accuracy_rows 8 --accuracy_engine http://me:secret@host:1", r"accuracy_engine=.*VLLM_API_KEY",
     "--accuracy_rows 8 --accuracy_engine http://host:1"),
    ("--accuracy_rows 8 --accuracy_gpu_memory 0.5", "accuracy_gpu_memory=0.5.*accuracy_engine: vllm",
     "--accuracy_rows 8"),
    ("--accuracy_rows 8 --accuracy_engine http://host:1 --accuracy_gpu_memory 0.5",
     "accuracy_gpu_memory=0.5.*accuracy_engine: vllm", "--accuracy_rows 8 --accuracy_engine http://host:1"),
    (f"{ADAPTED} --accuracy_engine http://host:1", "accuracy_engine='http.*use_peft.*Set accuracy_engine to vllm",
     f"{ADAPTED} --accuracy_engine vllm"),
    (f"{ADAPTED} --accuracy_engine vllm --use_dora", "accuracy_engine='vllm'.*use_dora=True.*to transformers",
     f"{ADAPTED} --accuracy_engine transformers --use_dora"),
    (f"{ADAPTED} --accuracy_engine vllm --lora_modules_to_save lm_head", "accuracy_engine=.*lm_head.*transformers",
     f"{ADAPTED} --accuracy_engine transformers --lora_modules_to_save lm_head"),
    (f"{ADAPTED} --accuracy_engine vllm --lora_r 300 --init_lora_weights pissa", "accuracy_engine.*lora_r=300.*600",
     f"{ADAPTED} --accuracy_engine vllm --lora_r 200 --init_lora_weights pissa"),
    ("--use_peft --accuracy_rows 8 --accuracy_engine vllm", "accuracy_engine='vllm'.*model_config.*to transformers",
     "--use_peft --accuracy_rows 8 --accuracy_engine transformers"),
    ("--dataset x/y --accuracy_rows 8", "accuracy_rows=8.*eval_dataset",
     "--dataset x/y --accuracy_rows 8 --eval_dataset x/y"),
    ("--eval_strategy steps", "eval_strategy='steps'.*Give eval_dataset",
     "--eval_strategy steps --eval_dataset builtin"),
    ("--leakage drop", "leakage given.*Set leakage_check", "--leakage drop --leakage_check openai/gsm8k:main"),
    ("--streaming", "streaming=True.*Set max_steps", STREAM),
    ("--streaming_buffer 5", "streaming_buffer=5.*Set streaming to true", f"--streaming_buffer 5 {STREAM}"),
    (f"{STREAM} --train_sampling_strategy group_by_length",
     "streaming=True.*train_sampling_strategy='group_by_length'.*Remove train_sampling_strategy", STREAM),
    (f"{STREAM} --shuffle_dataset", "streaming=True.*shuffle_dataset=True.*Remove shuffle_dataset", STREAM),
    # loss
    ("--label_smoothing_factor 0.1", "label_smoothing_factor=0.1.*mce_weight=1.*set mce_weight to 0",
     "--label_smoothing_factor 0.1 --mce_weight 0"),
    ("--label_smoothing_factor 0.1", "label_smoothing_factor=0.1.*token_loss: label_smoothing.*epsilon: 0.1",
     "--token_loss label_smoothing --token_loss_settings '{epsilon: 0.1}'"),
    ("--loss_type dft", "loss_type='dft'.*mce_weight=1.*set mce_weight to 0", "--loss_type dft --mce_weight 0"),
    ("--loss_type dft", "loss_type='dft'.*token_loss: dft", "--token_loss dft"),
    ("--use_liger_kernel", "mce_weight=1.0.*use_liger_kernel=True.*Remove use_liger_kernel", ""),
    ("--packing --packing_strategy wrapped", "mce_weight=1.0.*packing_strategy='wrapped'.*Remove packing_strategy",
     "--packing"),
    ("--eval_packing", "eval_packing=True.*Set packing: true", "--eval_packing --packing"),
    ("--mce_embeddings lmhead", "mce_embeddings='lmhead'.*Did you mean lm_head", "--mce_embeddings lm_head"),
    ("--mce_embeddings centered", "mce_embeddings='centered'.*Did you mean centred", "--mce_embeddings centred"),
    ("--mce_embeddings {files}/vectors.safetensors,centred", "mce_embeddings=.*not one of.*centred",
     "--mce_embeddings centred --mce_embedding_grad"),
    ("--mce_embeddings none.safetensors", "mce_embeddings='none.safetensors': no file at /.*/none.safetensors.*Correct",
     "--mce_embeddings {files}/vectors.safetensors"),
    ("--mce_embeddings {files}/vectors.safetensors --mce_embedding_grad",
     "mce_embedding_grad=True.*vectors.safetensors.*Set mce_embedding_grad to false",
     "--mce_embeddings input --mce_embedding_grad"),
    # paths
    ("--dataset no/such.jsonl", "dataset='no/such.jsonl': nothing at /.*/no/such.jsonl.*Correct",
     "--dataset {files}/rows.jsonl"),
    ("--eval_dataset {files}/none", "eval_dataset='.*/none': nothing at /.*/none.*Correct",
     "--eval_dataset {files}/rows.jsonl"),
    ("--leakage_check {files}/none.jsonl", "leakage_check='.*none.jsonl': nothing at /.*none.jsonl.*Correct",
     "--leakage_check {files}/rows.jsonl,openai/gsm8k:main"),
    (f"{PRETRAINED} --model_name_or_path ./none", "model_name_or_path='./none': no folder at /.*/none.*Correct",
     f"{PRETRAINED} --model_name_or_path {{files}}"),
    # DeepSpeed files
    ("--deepspeed none.json", "deepspeed='none.json': no file at /.*/none.json.*Correct",
     "--deepspeed {files}/ds.json"),
    ("--deepspeed {files}/scheduler.json", "scheduler.json'.*lr_scheduler_type.*Remove the block",
     "--deepspeed {files}/ds.json"),
    ("--deepspeed {files}/cut.json", "cut.json' line 2: this is not JSON", "--deepspeed {files}/ds.json"),
    ("--deepspeed {files}/list.json", "list.json'.*JSON object.*ds_configs/", "--deepspeed {files}/ds.json"),
    ("--deepspeed {files}/unknown.json", "unknown.json': 'zero_optimisation'.*Did you mean zero_optimization",
     "--deepspeed {files}/ds.json"),
    ("--deepspeed {files}/latin1.json", "latin1.json'.*Save the file as UTF-8", "--deepspeed {files}/ds.json"),
    # what transformers refuses or cannot find
    ("--accelerator_config none.json", "none.json", ""),
    ("--debug foo", "foo", ""),
    ("--load_best_model_at_end --eval_strategy epoch --eval_dataset builtin", "load_best_model_at_end.*strategy",
     "--load_best_model_at_end --eval_strategy epoch --eval_dataset builtin --save_strategy epoch"),
]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in {
        "rows.jsonl": b"", "vectors.safetensors": b"", "ds.json": b"{}", "scheduler.json": b'{"scheduler": {}}',
        "unknown.json": b'{"zero_optimisation": {}}',
        "cut.json": b"{\n", "list.json": b"[1]", "latin1.json": b'{"a": "\xe9"}',
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(("overrides", "refusal", "mended"), REFUSED, ids=[overrides for overrides, _, _ in REFUSED])
def test_a_combination_that_cannot_work_is_refused_and_the_way_out_works(recipe, files, overrides, refusal, mended):
    path = recipe()
    with pytest.raises(RecipeError, match=refusal) as error:
        load_recipe(path, shlex.split(overrides.replace("{files}", str(files))), dry_run=True)
    assert str(error.value).startswith(str(path)) or "on the command line" in str(error.value)
    assert "\n" not in str(error.value)
    load_recipe(path, shlex.split(mended.replace("{files}", str(files))), dry_run=True)


# ---------------------------------------------------------------------------------------------------- documentation

OWN = [ModelArguments, DataArguments, MatrixConfig]


def class_body(cls) -> list[ast.stmt]:
    return ast.parse(inspect.getsource(cls)).body[0].body


def own_names(cls) -> list[str]:
    return [node.target.id for node in class_body(cls) if isinstance(node, ast.AnnAssign)]


OWN_FIELDS = {f.name: f for cls in OWN for f in dataclasses.fields(cls) if f.name in own_names(cls)}


@pytest.mark.parametrize("cls", OWN)
def test_every_setting_has_a_sentence_under_it(cls):
    body = class_body(cls)
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(below, ast.Expr), node.target.id
            assert below.value.value.endswith("."), node.target.id


def test_one_process_with_several_gpus_is_refused_with_mce_and_can_still_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(MatrixConfig, "n_gpu", property(lambda self: 0 if self.use_cpu else 4))
    with pytest.raises(RecipeError, match=r"mce_weight=1.0.*sees 4 GPUs.*--num_processes 4"):
        MatrixConfig(str(tmp_path), bf16=False)
    assert MatrixConfig(str(tmp_path), bf16=False, mce_weight=0).n_gpu == 4  # SFTTrainer's own affair
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset: builtin\nmodel_name_or_path: a/b\nbf16: false\n")
    assert load_recipe(recipe, dry_run=True).training.mce_weight == 1


def documented_settings() -> dict[str, tuple[str, str]]:
    """The rows `| key | default | allowed | meaning |` of docs/training.md."""
    found = {}
    for line in (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`") and "::" not in cells[3]:  # not the table of refusals
            found[cells[0].strip("`")] = (cells[1].strip("`"), cells[2])
    return found


def test_the_training_page_has_every_setting_with_its_default_and_range():
    documented = documented_settings()
    assert OWN_FIELDS.keys() <= documented.keys()
    every = {f.name: f for cls in OWN for f in dataclasses.fields(cls)}
    for name, (default, allowed) in documented.items():
        field = every[name]
        expected = str(field.metadata.get("range", INHERITED_RANGES.get(name, "")))
        if choices := field.metadata.get("choices"):
            expected = ", ".join(f"`{choice}`" for choice in choices)
        assert name == "gpu" or allowed == expected, name
        if name in OWN_FIELDS:
            assert yaml.safe_load(default) == field.default, name


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("eval_ce", False),
        ("mce", False),
        ("eval_entropy", False),
        ("eval_gsm8k_ce", False),
        ("eval_gsm8k_mean_token_accuracy", True),
        ("eval_mean_token_accuracy", True),
        ("eval_loss", False),
        ("bleu", True),
    ],
)
def test_our_metrics_carry_their_direction(metric, higher, tmp_path):
    """By eval_ce transformers would keep the worst checkpoint: there, only names ending in "loss" should be low."""
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "metric_for_best_model": metric}
    assert MatrixConfig(**settings).greater_is_better is higher
    assert MatrixConfig(**settings, greater_is_better=not higher).greater_is_better is not higher


# --- settings given in Python, or through the parsers that the scripts of TRL use -------------------------------------


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_settings_are_arguments_of_the_parsers_that_trl_scripts_use(parser):
    arguments = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false", "--model_name_or_path", "gpt2"]
    arguments += ["--dataset", "builtin", "--lora_r", "4", "--mce_weight", "0.5", "--mce_solver", "taylor"]
    model, data, training = parser((ModelArguments, DataArguments, MatrixConfig)).parse_args_into_dataclasses(arguments)
    assert (model.lora_r, data.dataset) == (4, "builtin")
    assert (training.mce_weight, training.mce_solver) == (0.5, "taylor")


def test_those_parsers_refuse_a_solver_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(MatrixConfig).parse_args_into_dataclasses(["--output_dir", "x", "--mce_solver", "lanczos"])
    assert "krylov" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("mce_weight", np.float64(0.5), float), ("mce_weight", np.float32(0.5), float), ("mce_steps", np.int64(4), int)],
)
def test_numpy_numbers_are_settings_too(name, value, kind):
    found = getattr(MatrixConfig(output_dir="x", use_cpu=True, bf16=False, **{name: value}), name)
    assert (type(found), found) == (kind, value)


@pytest.mark.parametrize("value", ["[a]", "{a: 1}"])
def test_a_list_or_a_mapping_in_place_of_a_choice_is_refused_by_name(tmp_path, value):
    """transformers gives log_level's choices as the keys of a dictionary, which cannot look up a list."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset: builtin\nlog_level: {value}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"line 2: log_level=.*debug"):
        load_recipe(recipe)


def test_a_revision_of_a_folder_is_refused_unless_the_folder_stands_in_for_a_model_of_the_hub(tmp_path):
    (tmp_path / "model").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(f"dataset: builtin\nmodel_revision: v2\nmodel_name_or_path: {tmp_path / 'model'}\n")
    with pytest.raises(RecipeError, match=r"model_revision='v2' does nothing.*is a folder.*Remove it"):
        load_recipe(path)
    path.write_text("dataset: builtin\nmodel_revision: v2\nmodel_name_or_path: org/name\n")
    folder = ["--model_name_or_path", str(tmp_path / "model")]
    assert load_recipe(path, folder).model.model_revision == "v2"
    with pytest.raises(RecipeError, match="model_revision='v3'"):
        load_recipe(path, [*folder, "--model_revision", "v3"])
