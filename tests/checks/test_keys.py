"""No key of SFTConfig, nor any of ours, is accepted and ignored."""

import ast
import dataclasses
from pathlib import Path

import pytest
import transformers
import trl
from transformers import TrainingArguments
from trl import SFTConfig

from matrix_llm.base.errors import RecipeError
from matrix_llm.checks import keys
from matrix_llm.checks.keys import BY_TRAINER, BY_US, KNOWN, NEEDS, REFUSED
from matrix_llm.config import SETTINGS, DataArguments, MatrixConfig, ModelArguments
from tests.support.paths import ROOT

FIELDS = {field.name for field in dataclasses.fields(SFTConfig)}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # of transformers 5.24

# What this package honours itself, and the test that holds it
HELD_BY = {
    "output_dir": "test_train.py::test_a_run_leaves_everything_it_promises",
    "average_tokens_across_devices": "test_trainer.py::test_accumulation_1x8_equals_8x1",
    "logging_nan_inf_filter": "test_trainer.py::test_a_non_finite_loss_stops_the_run_and_names_the_rows",
    "save_total_limit": "run/test_checkpoint_files.py",
    "greater_is_better": "test_config.py::test_our_metrics_carry_their_direction",
    "data_seed": "data/test_streaming.py",
    "resume_from_checkpoint": "test_train.py::test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one",
    **dict.fromkeys(
        ["push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_revision"],
        "publish/test_destination.py",
    ),
    "trust_remote_code": "model/test_load.py",
    "chat_template_path": "test_train.py::test_what_was_done_to_the_rows_is_not_asked_of_trl_again",
    "assistant_only_loss": "test_train.py::test_what_was_done_to_the_rows_is_not_asked_of_trl_again",
    "completion_only_loss": "data/test_tokens.py",
    "dataset_num_proc": "data/test_rowset.py",
    "eos_token": "model/test_tokenizer.py",
    "pad_token": "model/test_tokenizer.py",
    "max_length": "data/test_tokens.py",
    "eval_packing": "test_config.py::test_a_combination_that_cannot_work_is_refused_and_the_way_out_works",
    "do_train": "checks/test_keys.py::test_do_train_and_do_eval_may_say_what_happens_anyway",
    "do_eval": "checks/test_keys.py::test_do_train_and_do_eval_may_say_what_happens_anyway",
}


# --- the walk --------------------------------------------------------------------------------------------------------


def test_every_field_of_sft_config_is_honoured_or_refused():
    """A new field of TRL or transformers fails here until somebody has decided what becomes of it."""
    undecided, gone = FIELDS - KNOWN, KNOWN - FIELDS - NEWER
    assert not undecided
    assert not gone
    assert BY_TRAINER.isdisjoint(BY_US)
    assert (BY_TRAINER | BY_US).isdisjoint(REFUSED)


def reads_of(files, receivers):
    """The attributes that some source reads from one of these names: `args.seed`, `self.args.seed`."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "id", getattr(node.value, "attr", None))
                found |= {node.attr} if owner in receivers else set()
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                found |= {getattr(node.args[1], "value", None)}
    return found


def reads_in_methods(file):
    """What the methods that others call read of `self`: not __post_init__, and not the checks."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    methods = [node for node in nodes if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    reads = [node for method in methods for node in ast.walk(method) if isinstance(node, ast.Attribute)]
    return {node.attr for node in reads if getattr(node.value, "id", None) == "self"}


def test_what_the_trainer_is_said_to_honour_is_read_by_it():
    libraries, trl_folder = Path(transformers.__file__).parent, Path(trl.__file__).parent / "trainer"
    files = [*libraries.glob("trainer*.py"), *(libraries / "integrations").glob("*.py"), trl_folder / "sft_trainer.py"]
    own_reader = reads_of([libraries / "training_args.py"], {"self"})  # use_cpu chooses the device, for example
    assert BY_TRAINER - NEWER - reads_of(files, {"args", "training_args"}) - own_reader == set()


def test_what_we_are_said_to_honour_has_a_test():
    assert HELD_BY.keys() == BY_US
    for name in HELD_BY.values():
        file, _, function = name.partition("::")
        path = ROOT / "tests" / file
        assert path.is_file(), name
        assert not function or f"def {function}(" in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("cls", [ModelArguments, DataArguments, MatrixConfig])
def test_every_setting_of_ours_is_read_outside_its_own_checks(cls):
    rooms = [file for file in (ROOT / "matrix_llm").rglob("*.py") if not {"ssl", "checks"} & set(file.parts)]
    found = reads_of([file for file in rooms if file.name != "config.py"], {"args", "model", "data", "training"})
    found |= reads_in_methods(ROOT / "matrix_llm" / "config.py")
    assert {field.name for field in dataclasses.fields(cls)} - FIELDS - found == set()


# --- refusals --------------------------------------------------------------------------------------------------------

GIVEN = {  # a value that is not the default, where true will not do
    "dataset_text_field": "body", "dataset_kwargs": {"skip_prepare_dataset": True}, "truncation_mode": "keep_end",
    "length_column_name": "size", "model_init_kwargs": {"dtype": "bfloat16"}, "eval_do_concat_batches": False,
    "include_for_metrics": ["loss"], "label_names": ["targets"], "local_rank": 0,
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(REFUSED.keys() - {"parallelism_config"}))
def test_a_key_that_would_do_nothing_is_refused_with_the_way_out(load, key):
    with pytest.raises(
        RecipeError, match=f"recipe.yaml: {key}=.* cannot be honoured: .*(Remove|Write|Choose)"
    ) as error:
        load(**{key: GIVEN.get(key, True)})
    assert "\n" not in str(error.value)
    default = {field.name: keys._default(field) for field in dataclasses.fields(TrainingArguments)}.get(key)
    if default is not None:
        load(**{key: default})


def test_the_text_field_is_refused_with_the_columns_to_write(load):
    with pytest.raises(RecipeError, match=r"dataset_text_field='body'.*`columns: {text: body}`"):
        load(dataset_text_field="body")


def test_do_train_and_do_eval_may_say_what_happens_anyway(load):
    load(do_train=True)
    load(do_eval=False)
    load(do_eval=True, eval_dataset="builtin")
    with pytest.raises(RecipeError, match=r"do_train=False.*--dry_run"):
        load(do_train=False)
    with pytest.raises(RecipeError, match=r"do_eval=False.*remove eval_dataset"):
        load(do_eval=False, eval_dataset="builtin")
    with pytest.raises(RecipeError, match=r"do_eval=True.*give eval_dataset"):
        load(do_eval=True)


def test_a_key_of_a_newer_library_is_refused(load, monkeypatch):
    monkeypatch.setattr(keys, "KNOWN", KNOWN - {"neftune_noise_alpha"})
    with pytest.raises(RecipeError, match=r"neftune_noise_alpha=5.*does not know.*Remove it"):
        load(neftune_noise_alpha=5)
    load(neftune_noise_alpha=None)


ALONE = {
    "eval_steps": 5, "eval_delay": 1, "hub_model_id": "a/b", "hub_private_repo": True, "hub_revision": "x",
    "hub_strategy": "end", "packing_strategy": "wrapped", "trackio_space_id": "a/b", "trackio_bucket_id": "a",
    "trackio_static_space_id": "a", "dataloader_persistent_workers": True, "dataloader_in_order": False,
    "dataloader_multiprocessing_context": "spawn", "dataloader_prefetch_factor": 2, "project": "x",
    "liger_kernel_config": {"rope": True}, "fsdp_config": {"version": 2}, "eval_on_start": True,
    "early_stopping_threshold": 0.1, "mce_order": 6, "max_eval_rows": 5, "eval_split": "train",
    "builtin_eval_rows": 5, "accuracy_max_new_tokens": 5, "accuracy_engine": "vllm",
}  # fmt: skip


@pytest.mark.parametrize("key", NEEDS)
def test_a_key_that_needs_another_is_refused_alone_and_not_where_the_other_was_switched_off(load, key):
    needed = NEEDS[key][0]
    with pytest.raises(RecipeError, match=f"{key}=.* {needed} is not given. Write `{needed}: "):
        load(**{key: ALONE[key]})
    keys.check_keys({key: ALONE[key], needed: False})


@pytest.mark.parametrize(
    ("key", "value", "refusal"),
    [
        ("gradient_checkpointing_kwargs", {"use_reentrnt": False}, "'use_reentrnt'.*Did you mean use_reentrant"),
        ("gradient_checkpointing_kwargs", "often", "must be a mapping"),
        ("accelerator_config", {"split_batches": True}, "split_batches=True.*per_device_train_batch_size"),
        ("accelerator_config", {"gradient_accumulation_kwargs": {"num_steps": 2}}, "gradient_accumulation_steps"),
        ("accelerator_config", {"even_batchs": True}, "even_batchs.*Correct or remove accelerator_config"),
        ("fsdp", "full_shards", "full_shards"),
        ("include_num_input_tokens_seen", "some", "not one of no, all, non_padding"),
        ("pad_to_multiple_of", "eight", "Correct or remove pad_to_multiple_of"),
        ("chat_template_path", "none.jinja", "no file at /.*none.jinja"),
    ],
)
def test_a_value_that_would_be_ignored_or_fail_late_is_refused_by_its_key(load, key, value, refusal):
    with pytest.raises(RecipeError, match=f"{key}.*{refusal}"):
        load(**{key: value})


# --- any key, any value ----------------------------------------------------------------------------------------------

JUNK = [None, "zzz", -1, 1.5, True, [], {}, [1, {"a": 1}], {"a": {"b": 1}}, "{", "é\n", 10**30]


@pytest.mark.parametrize("part", range(8))
def test_any_value_under_any_key_is_taken_or_refused_in_one_line_that_names_the_key(load, part):
    for number, key in enumerate(sorted(SETTINGS.names)[part::8]):
        for value in JUNK[number % 2 :: 2]:
            said = key
            try:
                load(**{key: value}, dry_run=True)
            except RecipeError as error:
                said = str(error)
            assert key in said, (key, value)
            assert "\n" not in said, (key, value)
