"""MatrixTrainer against SFTTrainer, step by step, on tiny random models."""

import copy
import gc
import inspect
import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from matrix_llm.base.errors import DataError, NonFiniteLossError, RecipeError
from matrix_llm.config import MatrixConfig
from matrix_llm.loss.settings import LossSettings
from matrix_llm.model.lm_head import add_matrix_head
from matrix_llm.trainer import MatrixTrainer
from tests.support.tiny import config, rows, tiny_model, train


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def assert_same_weights(a, b, atol=0.0):
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=atol, rtol=0)


def test_weight_zero_is_sft_trainer_to_the_last_bit(tmp_path, tiny_tokenizer):
    ours = train(tmp_path / "a", tiny_tokenizer, mce_weight=0.0)
    settings = {k: v for k, v in config(tmp_path / "b").items() if not k.startswith("mce")}
    theirs = SFTTrainer(tiny_model(), SFTConfig(**settings), train_dataset=rows(), processing_class=tiny_tokenizer)
    theirs.train()
    assert history(ours, "loss") == history(theirs, "loss")
    assert history(ours, "grad_norm") == history(theirs, "grad_norm")
    assert history(ours, "mean_token_accuracy") == history(theirs, "mean_token_accuracy")
    assert_same_weights(weights(ours), weights(theirs))


def test_cross_entropy_part_of_the_first_step_equals_sft_trainers_loss(tmp_path, tiny_tokenizer):
    ours = train(tmp_path / "a", tiny_tokenizer, max_steps=1)
    plain = train(tmp_path / "b", tiny_tokenizer, max_steps=1, mce_weight=0.0)
    assert history(ours, "ce")[0] == pytest.approx(history(plain, "loss")[0], rel=1e-5)
    assert history(ours, "entropy")[0] == pytest.approx(history(plain, "entropy")[0], rel=1e-5)
    assert history(ours, "mean_token_accuracy")[0] == pytest.approx(history(plain, "mean_token_accuracy")[0], rel=1e-6)
    assert history(ours, "num_tokens") == history(plain, "num_tokens")


def test_loss_is_ce_plus_weighted_mce_over_one_denominator(tmp_path, tiny_tokenizer):
    trainer = train(
        tmp_path, tiny_tokenizer, mce_weight=0.5, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    for loss, ce, mce in zip(history(trainer, "loss"), history(trainer, "ce"), history(trainer, "mce"), strict=True):
        assert loss == pytest.approx(ce + 0.5 * mce, rel=1e-5)
        assert 0 < mce < ce


@pytest.mark.parametrize(
    ("warmup", "expected"), [(3, [1 / 3, 2 / 3, 1, 1]), (0.5, [1 / 2, 1, 1, 1]), (0.1, [1, 1, 1, 1])]
)
def test_the_weight_of_mce_rises_linearly_over_its_warmup(tmp_path, tiny_tokenizer, warmup, expected):
    trainer = train(tmp_path, tiny_tokenizer, mce_weight=0.5, mce_warmup_steps=warmup, gradient_accumulation_steps=2)
    assert history(trainer, "mce_weight") == pytest.approx([0.5 * share for share in expected])
    for loss, ce, mce, share in zip(
        history(trainer, "loss"), history(trainer, "ce"), history(trainer, "mce"), expected, strict=True
    ):
        assert loss == pytest.approx(ce + 0.5 * share * mce, rel=1e-5)


def test_a_warmup_moves_the_weights_and_not_the_held_out_loss(tmp_path, tiny_tokenizer):
    """Were the first step's weight not the smaller one, both runs would end alike."""
    at_once, rising = (train(tmp_path / str(n), tiny_tokenizer, max_steps=1, mce_warmup_steps=n) for n in (0, 8))
    grads = [history(trainer, "grad_norm")[0] for trainer in (at_once, rising)]
    assert grads[0] != pytest.approx(grads[1], rel=1e-3)
    held_out = rows(4, seed=3)
    losses = []
    for n in (0, 8):
        trainer = MatrixTrainer(
            tiny_model(),
            MatrixConfig(**config(tmp_path / f"eval{n}", mce_warmup_steps=n)),
            train_dataset=rows(),
            processing_class=tiny_tokenizer,
        )
        losses.append(trainer.evaluate(held_out)["eval_loss"])
    assert losses[0] == losses[1]


def test_accumulation_1x8_equals_8x1(tmp_path, tiny_tokenizer):
    at_once = train(tmp_path / "a", tiny_tokenizer, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    by_one = train(tmp_path / "b", tiny_tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    for key in ("loss", "ce", "mce", "grad_norm"):
        assert history(at_once, key) == pytest.approx(history(by_one, key), rel=2e-5)
    assert_same_weights(weights(at_once), weights(by_one), atol=2e-5)


def test_a_step_logs_every_promised_name(tmp_path, tiny_tokenizer):
    trainer = train(tmp_path, tiny_tokenizer)
    entry = trainer.state.log_history[0]
    names = "loss ce mce entropy mean_token_accuracy grad_norm learning_rate num_tokens"
    names += " tokens_per_second peak_memory_gib effective_rank"
    assert set(names.split()) <= set(entry)
    assert "effective_rank" not in trainer.state.log_history[1]
    assert "effective_rank" in trainer.state.log_history[3]
    assert all(isinstance(v, int | float) for v in entry.values()), entry
    json.dumps(entry)


def test_evaluation_reports_ce_and_mce_without_logits(tmp_path, tiny_tokenizer):
    data = rows(6, seed=3)
    trainer = MatrixTrainer(
        tiny_model(),
        MatrixConfig(**config(tmp_path, per_device_eval_batch_size=4)),
        train_dataset=rows(),
        eval_dataset=data,
        processing_class=tiny_tokenizer,
    )
    trainer.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head ran: logits were made"))
    metrics = trainer.evaluate()
    logged = trainer.state.log_history[-1]
    model = tiny_model()
    total = tokens = 0
    for row in data:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        tokens += (labels != -100).sum().item()
    assert logged["eval_ce"] == pytest.approx(total / tokens, rel=1e-5)  # token-weighted, not a mean of batch means
    assert logged["eval_mce"] < logged["eval_ce"]
    assert set(metrics) >= {"eval_loss", "eval_runtime"}


def test_held_out_figures_compare_across_weights(tmp_path, tiny_tokenizer):
    """Plain SFT is measured on held-out rows like every other run: token means, MCE included."""
    logged = []
    for weight in (0.0, 1.0):
        trainer = MatrixTrainer(
            tiny_model(),
            MatrixConfig(**config(tmp_path, mce_weight=weight, per_device_eval_batch_size=4)),
            train_dataset=rows(),
            eval_dataset=rows(7, seed=3),
            processing_class=tiny_tokenizer,
        )
        trainer.evaluate()
        logged.append(trainer.state.log_history[-1])
    for key in ("eval_ce", "eval_mce", "eval_entropy", "eval_mean_token_accuracy"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-6)


FIGURES = ("loss", "ce", "mce", "entropy", "mean_token_accuracy")


def test_centred_vectors_are_evaluated_as_they_are_trained(tmp_path, tiny_tokenizer):
    """The same weights and rows: a training step without a learning rate, and an evaluation."""
    found = {}
    for embeddings in ("centred", "lm_head"):
        model, batch = tiny_model(vocab_size=1100), rows(8)
        model.lm_head.weight.data += model.lm_head.weight.std()  # something that the vectors share
        settings = {"mce_embeddings": embeddings, "learning_rate": 0.0, "max_steps": 1, "eval_dataset": batch}
        trainer = make(tmp_path, tiny_tokenizer, model, batch, per_device_train_batch_size=8, **settings)
        trainer.train()
        found[embeddings] = trained = {name: history(trainer, name)[0] for name in ("loss", "ce", "mce")}
        evaluated = trainer.evaluate()
        assert {name: evaluated[f"eval_{name}"] for name in trained} == pytest.approx(trained, rel=1e-5)
    assert found["centred"]["ce"] == found["lm_head"]["ce"]
    assert found["centred"]["mce"] != pytest.approx(found["lm_head"]["mce"], rel=1e-2)


@pytest.mark.parametrize("mce_weight", [0.0, 0.5])
def test_held_out_figures_do_not_depend_on_the_batch_size(mce_weight, tmp_path, tiny_tokenizer):
    """Rows of very different lengths, and 11 of them, so that the last batch is a small one."""
    found = []
    for size in (1, 4, 11):
        trainer = make(
            tmp_path, tiny_tokenizer, mce_weight=mce_weight, per_device_eval_batch_size=size,
            eval_dataset=rows(11, seed=3, longest=40),
        )  # fmt: skip
        if size == 4:  # neither predictions nor a batch of an evaluation that failed leave anything behind
            trainer.predict(rows(3, seed=4))
            trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows(3, seed=5).to_list()))
        found.append(trainer.evaluate())
        assert found[-1]["eval_loss"] == found[-1]["eval_ce"] + mce_weight * found[-1]["eval_mce"]
    for name in FIGURES:
        assert [each[f"eval_{name}"] for each in found] == pytest.approx([found[0][f"eval_{name}"]] * 3, rel=2e-6)


@pytest.mark.parametrize("changes", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.3}])
def test_another_loss_is_token_weighted_too(changes, tmp_path, tiny_tokenizer):
    found = [
        make(tmp_path, tiny_tokenizer, mce_weight=0.0, per_device_eval_batch_size=size, **changes).evaluate(
            rows(11, seed=3, longest=40)
        )
        for size in (1, 11)
    ]
    for name in ("loss", "entropy", "mean_token_accuracy"):
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], rel=1e-5)


def test_a_callers_own_loss_is_evaluated_as_sft_trainer_does(tmp_path, tiny_tokenizer):
    """By what it is divided is the caller's affair."""
    settings = config(tmp_path, mce_weight=0.0, per_device_eval_batch_size=4)
    plain = {key: value for key, value in settings.items() if not key.startswith("mce_")}
    data = {"train_dataset": rows(), "eval_dataset": rows(7), "processing_class": tiny_tokenizer}
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.square().sum()}
    ours = MatrixTrainer(tiny_model(), MatrixConfig(**settings), **data, **own)
    theirs = SFTTrainer(tiny_model(), SFTConfig(**plain), **data, **own)
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]


@pytest.mark.parametrize("mce_weight", [0.0, 1.0])
def test_a_named_evaluation_set_has_all_figures_under_its_name(mce_weight, tmp_path, tiny_tokenizer):
    sets = {"near": rows(5, seed=3), "far": rows(6, seed=4)}
    trainer = make(
        tmp_path, tiny_tokenizer, mce_weight=mce_weight, eval_dataset=sets, eval_strategy="steps", eval_steps=1,
        save_strategy="best", metric_for_best_model="eval_near_ce", max_steps=2,
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    for name, data in sets.items():
        alone = trainer.evaluate(data)
        assert [found[f"eval_{name}_{each}"] for each in FIGURES] == [alone[f"eval_{each}"] for each in FIGURES]
    assert trainer.state.best_metric == min(history(trainer, "eval_near_ce")[:2])


KINDS = {
    "dense": {},
    "mixture": {"architecture": "mixtral"},
    "packed": {"packing": True, "max_length": 48},
    "padding-free": {"padding_free": True, "max_length": None},
    "LoRA": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")},
    "metrics": {
        "compute_metrics": lambda found: {"rows": len(found.predictions)},
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    },
}
CALLS = ("peft_config", "compute_metrics", "preprocess_logits_for_metrics")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mce_weight", [0.0, 1.0])
def test_every_name_that_sft_trainer_logs_is_logged(kind, mce_weight, tmp_path, tiny_tokenizer):
    changes = dict(KINDS[kind])
    architecture = changes.pop("architecture", "llama")
    calls = {key: changes.pop(key) for key in CALLS if key in changes}
    settings = config(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1, mce_weight=mce_weight, **changes)
    plain = {key: value for key, value in settings.items() if not key.startswith("mce_")}
    data = {"train_dataset": rows(), "eval_dataset": rows(7, seed=3), "processing_class": tiny_tokenizer, **calls}
    ours = MatrixTrainer(tiny_model(architecture), MatrixConfig(**settings), **data)
    theirs = SFTTrainer(tiny_model(architecture), SFTConfig(**plain), **data)
    for trainer in (ours, theirs):
        trainer.train()
        trainer.predict(rows(2))
    for mine, his in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert set(his) <= set(mine)
        for name in {"aux_loss", "num_tokens", "eval_num_tokens", "eval_rows"} & set(his):
            assert mine[name] == pytest.approx(his[name], rel=1e-5)
    if kind == "mixture":
        for prefix in ("", "eval_"):
            entry = next(each for each in ours.state.log_history if f"{prefix}aux_loss" in each)
            mce, aux = (entry.get(f"{prefix}{name}", 0.0) for name in ("mce", "aux_loss"))
            added = mce_weight * mce + ours.router_aux_loss_coef * aux
            assert entry[f"{prefix}loss"] == pytest.approx(entry[f"{prefix}ce"] + added, rel=1e-6)
            assert aux > 0


def test_packed_rows_have_the_same_per_token_loss(tmp_path, tiny_tokenizer):
    """With sdpa/eager attention an all-ones mask would let packed documents see each other."""
    data = rows(8)
    plain = MatrixTrainer(
        tiny_model(),
        MatrixConfig(**config(tmp_path / "a")),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer,
    )
    packed = MatrixTrainer(
        tiny_model(),
        MatrixConfig(**config(tmp_path / "b", packing=True, max_length=48)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer,
    )
    for trainer in (plain, packed):
        trainer.evaluate()
    a, b = (t.state.log_history[-1] for t in (plain, packed))
    assert a["eval_ce"] == pytest.approx(b["eval_ce"], rel=1e-5)
    assert a["eval_mce"] == pytest.approx(b["eval_mce"], rel=1e-4)


def test_an_all_masked_micro_batch_adds_nothing(tmp_path, tiny_tokenizer):
    data = rows(8).to_list()
    blank = [{**row, "labels": [-100] * len(row["labels"])} for row in data[:2]]
    trainer = MatrixTrainer(
        tiny_model(),
        MatrixConfig(**config(tmp_path)),
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer,
    )
    batch = trainer.data_collator(blank)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(7))
    assert loss == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(("mce_weight", "solver"), [(0.0, "krylov"), (1.0, "krylov"), (1.0, "exact")])
def test_a_non_finite_loss_stops_the_run_and_names_the_rows(tmp_path, tiny_tokenizer, mce_weight, solver):
    model = tiny_model()
    model.model.norm.weight.data[0] = torch.nan
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(NonFiniteLossError, match=r"step 1, on the data rows \[\d+, \d+, \d+, \d+\]"):
        train(tmp_path, tiny_tokenizer, model=model, mce_weight=mce_weight, mce_solver=solver)
    assert torch.equal(model.lm_head.weight, before)


def overflowing():
    model = tiny_model().half()
    model.model.norm.weight.data[0] = torch.inf
    return model


def test_plain_sft_in_float16_goes_on_as_sft_trainer_does_and_says_so(tmp_path, tiny_tokenizer, caplog):
    """float16 overflows now and then. With MCE, or where a recipe is run, the run stops."""
    trained = train(tmp_path / "a", tiny_tokenizer, model=overflowing(), mce_weight=0.0)
    assert trained.state.global_step == 4
    warnings = [record.getMessage() for record in caplog.records if "overflowed" in record.getMessage()]
    assert len(warnings) == 1
    assert "step 1, on the data rows [" in warnings[0]

    own = {key: value for key, value in config(tmp_path / "b").items() if key != "mce_steps"}
    theirs = SFTTrainer(overflowing(), SFTConfig(**own), train_dataset=rows(), processing_class=tiny_tokenizer)
    theirs.train()
    expected = theirs.model.state_dict()
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)

    with pytest.raises(NonFiniteLossError, match="step 1"):
        train(tmp_path / "c", tiny_tokenizer, model=overflowing(), mce_weight=1.0)


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_tokenizer):
    plain = train(tmp_path / "a", tiny_tokenizer)
    checkpointed = train(tmp_path / "b", tiny_tokenizer, gradient_checkpointing=True)
    assert history(plain, "loss") == pytest.approx(history(checkpointed, "loss"), rel=1e-6)


def test_bf16_autocast_keeps_float32_master_weights_and_nearly_the_loss(tmp_path, tiny_tokenizer):
    full = train(tmp_path / "a", tiny_tokenizer)
    half = train(tmp_path / "b", tiny_tokenizer, bf16=True)
    assert half.model.lm_head.weight.dtype == torch.float32
    assert history(full, "loss") == pytest.approx(history(half, "loss"), rel=3e-2)


def test_lora_trains_the_adapter_and_leaves_the_head(tmp_path, tiny_tokenizer):
    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    trainer = MatrixTrainer(
        model, MatrixConfig(**config(tmp_path)), train_dataset=rows(), processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    assert torch.equal(model.lm_head.weight, before)
    assert any((p != 0).any() for n, p in trainer.model.named_parameters() if "lora_B" in n)
    assert history(trainer, "mce")[-1] < history(trainer, "mce")[0]


def test_lora_with_a_saved_head_trains_the_copy_the_loss_reads(tmp_path, tiny_tokenizer):
    trainer = MatrixTrainer(
        tiny_model(), MatrixConfig(**config(tmp_path)), train_dataset=rows(), processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    head = next(p for n, p in trainer.model.named_parameters() if "lm_head" in n and p.requires_grad)
    before = head.detach().clone()
    trainer.train()
    assert (head != before).any()


def test_lora_on_the_head_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="lm_head"):
        MatrixTrainer(
            tiny_model(), MatrixConfig(**config(tmp_path)), train_dataset=rows(), processing_class=tiny_tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        )  # fmt: skip


def test_a_custom_loss_together_with_mce_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"mce_weight=1.0.*compute_loss_func.*mce_weight: 0"):
        MatrixTrainer(
            tiny_model(),
            MatrixConfig(**config(tmp_path)),
            train_dataset=rows(),
            processing_class=tiny_tokenizer,
            compute_loss_func=lambda *a, **k: None,
        )
    positional = (tiny_model(), MatrixConfig(**config(tmp_path)), None, rows(), None, tiny_tokenizer)
    with pytest.raises(ValueError, match=r"compute_loss_func"):
        MatrixTrainer(*positional, lambda *a, **k: None)


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
def test_the_settings_of_sft_trainer_are_taken_with_the_defaults_of_mce(kind, tmp_path, tiny_tokenizer):
    settings = {"use_cpu": True, "bf16": False, "max_steps": 1, "logging_steps": 1, "report_to": "none"}
    args = kind(str(tmp_path), learning_rate=3e-4, hub_token="x", **settings)
    trainer = MatrixTrainer(tiny_model(), args, train_dataset=rows(), processing_class=tiny_tokenizer)
    assert (trainer.args.learning_rate, trainer.args.mce_weight, trainer.args.hub_token) == (3e-4, 1.0, "x")
    trainer.train()
    assert history(trainer, "mce")


def test_an_image_that_max_length_cuts_off_is_named_by_that_setting(tmp_path, tiny_tokenizer):
    trainer = make(tmp_path, tiny_tokenizer, max_length=12)

    def refuse(*args, **kwargs):
        raise ValueError("Image features and image tokens do not match, tokens: 3, features: 4")

    trainer.model.model.forward = refuse
    with pytest.raises(DataError, match=r"max_length=12.*larger max_length"):
        trainer.train()


@dataclass
class OwnConfig(SFTConfig):
    flavour: str = "plain"


def test_settings_that_a_subclass_of_sft_config_adds_are_kept(tmp_path, tiny_tokenizer):
    args = OwnConfig(str(tmp_path), flavour="sweet", use_cpu=True, bf16=False, report_to="none")
    trainer = MatrixTrainer(tiny_model(), args, train_dataset=rows(), processing_class=tiny_tokenizer)
    assert (trainer.args.flavour, trainer.args.mce_weight) == ("sweet", 1.0)


def test_the_constructor_shows_the_signature_of_sft_trainers():
    assert inspect.signature(MatrixTrainer.__init__) == inspect.signature(SFTTrainer.__init__)


def parameters(function):
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_every_public_method_shows_the_parameters_of_sft_trainers():
    """Tools read them to see what a version takes."""
    names = [name for name, _ in inspect.getmembers(SFTTrainer, inspect.isfunction) if not name.startswith("_")]
    assert {"train", "evaluate", "predict", "save_model", "push_to_hub"} <= set(names)
    for name in names:
        assert parameters(getattr(MatrixTrainer, name)) == parameters(getattr(SFTTrainer, name)), name


def test_the_collator_is_still_trls_and_its_settings_count(tmp_path, tiny_tokenizer):
    trainer = MatrixTrainer(
        tiny_model(), MatrixConfig(**config(tmp_path)), train_dataset=rows(), processing_class=tiny_tokenizer
    )
    assert isinstance(trainer.data_collator, DataCollatorForLanguageModeling)
    trainer.data_collator.pad_to_multiple_of = 32
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] == 32
    assert batch["row_id"].dtype == torch.int64


@pytest.mark.parametrize("ids", [["a", "b"], [None, None], [1, None]])
def test_a_column_called_row_id_that_holds_no_numbers_is_dropped(ids, tmp_path, tiny_tokenizer):
    plain = rows(2).remove_columns("row_id")
    data = Dataset.from_list([{**row, "row_id": each} for row, each in zip(plain, ids, strict=True)])
    assert train(tmp_path, tiny_tokenizer, data=data, max_steps=1).state.global_step == 1


@pytest.mark.parametrize("changes", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.3}])
def test_another_loss_without_mce_is_evaluated_like_sft_trainers_and_not_called_ce(changes, tmp_path, tiny_tokenizer):
    """Its eval_loss chooses the best checkpoint, so it must be the loss that is trained."""
    settings = config(tmp_path, mce_weight=0.0, max_steps=1, **changes)
    plain = {key: value for key, value in settings.items() if not key.startswith("mce_")}
    data = {"train_dataset": rows(), "eval_dataset": rows(8), "processing_class": tiny_tokenizer}
    ours = MatrixTrainer(tiny_model(), MatrixConfig(**settings), **data)
    theirs = SFTTrainer(tiny_model(), SFTConfig(**plain), **data)
    ours.train()
    theirs.train()
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]
    assert not [entry for entry in ours.state.log_history if "ce" in entry or "eval_ce" in entry]


@pytest.mark.parametrize("option", [{"temperature": 0.9}, {"top_p": 0.6}, {"typical_p": 0.5}])
def test_a_model_whose_sampling_options_lack_do_sample_can_be_saved(option, tmp_path, tiny_tokenizer):
    model = tiny_model()
    model.generation_config.update(**option)
    trainer = MatrixTrainer(
        model, MatrixConfig(**config(tmp_path)), train_dataset=rows(), processing_class=tiny_tokenizer
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["do_sample"] is True


def test_resuming_from_nothing_is_the_value_error_that_transformers_raises(tmp_path, tiny_tokenizer):
    trainer = MatrixTrainer(
        tiny_model(), MatrixConfig(**config(tmp_path)), train_dataset=rows(), processing_class=tiny_tokenizer
    )
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True.*no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_raw_rows_take_sft_trainers_own_preparation(tmp_path, tiny_tokenizer):
    """Drop-in: prompt/completion rows go through SFTTrainer's tokenisation, with the loss on the completion."""
    data = Dataset.from_list([{"prompt": "the cat", "completion": " sat on the mat"}] * 8)
    trainer = train(tmp_path, tiny_tokenizer, model=tiny_model(vocab_size=len(tiny_tokenizer)), data=data, max_steps=1)
    assert history(trainer, "ce")[0] > history(trainer, "mce")[0] > 0


# ------------------------------------------------------------------------------------------ one model, many users


def make(path, tokenizer, model=None, data=None, eval_dataset=None, **settings):
    return MatrixTrainer(
        model or tiny_model(),
        MatrixConfig(**config(path, **settings)),
        train_dataset=data or rows(),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def loss_of(trainer):
    return trainer.evaluate(rows(5, seed=3))["eval_loss"]


def test_two_trainers_of_one_model_follow_their_own_settings(tmp_path, tiny_tokenizer):
    model = tiny_model(vocab_size=1100)
    settings = [{"mce_weight": 1.0, "mce_steps": 4}, {"mce_weight": 3.0, "mce_top_k": 2}, {"mce_weight": 0.0}]
    shared = [make(tmp_path / str(n), tiny_tokenizer, model, max_steps=2, **each) for n, each in enumerate(settings)]
    for n in range(3):
        alone = make(tmp_path / "alone", tiny_tokenizer, tiny_model(vocab_size=1100), max_steps=2, **settings[n])
        alone.model.load_state_dict(model.state_dict())
        for trainer in (shared[n], alone):
            trainer.train()
        assert_same_weights(weights(shared[n]), weights(alone))
        before = loss_of(shared[n])
        loss_of(shared[n - 1])
        assert loss_of(shared[n]) == before == loss_of(alone)


def test_a_loop_of_the_callers_own_sees_the_weights_of_each_step(tmp_path, tiny_tokenizer):
    """Nobody counts its steps, so no summary of the vocabulary may outlive one."""
    trainer = make(tmp_path, tiny_tokenizer, tiny_model(vocab_size=1100))
    batch = trainer.data_collator(rows(4).to_list())
    with torch.no_grad():
        trainer.compute_loss(trainer.model, dict(batch))
        trainer.model.lm_head.weight.copy_(torch.randn(1100, 32, generator=torch.Generator().manual_seed(5)))
        later = trainer.compute_loss(trainer.model, dict(batch))
        fresh = make(tmp_path, tiny_tokenizer, tiny_model(vocab_size=1100))
        fresh.model.load_state_dict(trainer.model.state_dict())
        assert later == fresh.compute_loss(fresh.model, dict(batch))


@pytest.mark.parametrize("mce_weight", [0.0, 1.0])
def test_a_model_outlives_its_trainer(mce_weight, tmp_path, tiny_tokenizer):
    """It computes, generates, saves and copies as before, and other trainers and adapters take it."""
    ids = torch.arange(3, 13).unsqueeze(0)
    model = train(tmp_path / "a", tiny_tokenizer, max_steps=1, mce_weight=mce_weight).model
    gc.collect()
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    for each in (model.eval(), copy.deepcopy(model)):
        found, expected = each(input_ids=ids, labels=ids), plain.eval()(input_ids=ids, labels=ids)
        assert torch.equal(found.logits, expected.logits)
        assert found.loss == expected.loss
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), plain.generate(ids, **greedy))
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(saved(ids).logits, found.logits)

    settings = {k: v for k, v in config(tmp_path / "b", max_steps=1).items() if not k.startswith("mce")}
    data = {"train_dataset": rows(), "processing_class": tiny_tokenizer}
    after, alone = (SFTTrainer(each, SFTConfig(**settings), **data) for each in (model, plain))
    for trainer in (after, alone):
        trainer.train()
    assert_same_weights(weights(after), weights(alone))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = make(tmp_path / "c", tiny_tokenizer, adapted, max_steps=1, mce_weight=mce_weight)
    trainer.train()
    assert history(trainer, "loss")


def test_the_vocabulary_is_read_again_once_training_has_ended(tmp_path, tiny_tokenizer):
    """The weights may change then, and nobody counts steps: a summary of the last step would be of other weights."""
    model = tiny_model(vocab_size=1100)  # above 1,024, so that the default keeps 16 tokens and summarises the others
    trainer = train(tmp_path, tiny_tokenizer, model=model, max_steps=1)
    batch = {"input_ids": torch.arange(3, 13).unsqueeze(0), "labels": torch.arange(3, 13).unsqueeze(0)}
    with torch.no_grad():
        before = trainer.model(**batch, matrix_loss=True).matrix_cross_entropy
        model.lm_head.weight.copy_(torch.randn(1100, 32, generator=torch.Generator().manual_seed(5)))
        after = trainer.model(**batch, matrix_loss=True).matrix_cross_entropy
        fresh = tiny_model(vocab_size=1100)
        fresh.load_state_dict(model.state_dict())
        add_matrix_head(fresh, LossSettings(steps=32))
        expected = fresh(**batch, matrix_loss=True).matrix_cross_entropy
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected)


# --------------------------------------------------------------------------------- batches without tokens, and mixtures


@pytest.mark.parametrize("count", [None, 0])
def test_a_batch_without_a_trained_token_has_loss_zero(tmp_path, tiny_tokenizer, count):
    """Its sum is 0 and so is its count: 0 / 0 would be NaN, and stop the run."""
    trainer = MatrixTrainer(
        tiny_model(), MatrixConfig(**config(tmp_path)), train_dataset=rows(), processing_class=tiny_tokenizer
    )
    batch = trainer.data_collator([{**row, "labels": [-100] * len(row["labels"])} for row in rows(2).to_list()])
    count = None if count is None else torch.tensor(count)
    assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=count) == 0


def balanced(tmp_path, tokenizer, **settings):
    return MatrixTrainer(
        tiny_model("mixtral"),
        MatrixConfig(**config(tmp_path, average_tokens_across_devices=False, **settings)),
        train_dataset=rows(),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_load_balancing_loss_of_a_mixture_enters_value_and_gradient(tmp_path, tiny_tokenizer, accumulation):
    """coefficient * (the model's own aux_loss) / accumulation in each micro-batch, and its gradient in the router."""
    found = []
    for coefficient in (0.0, 0.5):
        trainer = balanced(tmp_path / str(coefficient), tiny_tokenizer, router_aux_loss_coef=coefficient)
        trainer.current_gradient_accumulation_steps = accumulation
        batch = trainer.data_collator(rows(4).to_list())
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(20))
        found.append((loss, torch.autograd.grad(loss, router(trainer.model))[0]))
    inputs = {key: value for key, value in batch.items() if key != "row_id"}
    aux_loss = trainer.model(**inputs, output_router_logits=True, use_cache=False).aux_loss
    (without, plain), (with_aux, balancing) = found
    torch.testing.assert_close(with_aux - without, 0.5 * aux_loss / accumulation, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(0.5 * aux_loss / accumulation, router(trainer.model))
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(balancing - plain, expected, rtol=1e-3, atol=1e-5)


def router(model):
    return next(p for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight")))


def test_the_load_balancing_loss_is_averaged_over_the_accumulation(tmp_path, tiny_tokenizer):
    """Logged loss = CE + MCE + coefficient * (the mean aux_loss of the step's micro-batches)."""
    added = []
    for coefficient in (0.0, 0.5):
        trainer = balanced(
            tmp_path / str(coefficient),
            tiny_tokenizer,
            router_aux_loss_coef=coefficient,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )
        seen = []
        hook = trainer.model.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1].aux_loss))
        trainer.train()
        hook.remove()
        loss, ce, mce = (history(trainer, key)[0] for key in ("loss", "ce", "mce"))
        added.append(loss - ce - mce)
    assert len(seen) == 4
    assert added[0] == pytest.approx(0, abs=1e-5)
    assert added[1] == pytest.approx(0.5 * torch.stack(seen).mean().item(), rel=1e-4)


# --- early stopping ---------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def stopping_trainer(path, tokenizer, **changes):
    """No evaluation after the first is 100 better, so patience 3 ends the run at step 4."""
    settings = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_ce",
        "early_stopping_patience": 3, "early_stopping_threshold": 100.0, **changes,
    }  # fmt: skip
    args = MatrixConfig(**config(path, **settings))
    return MatrixTrainer(tiny_model(), args, train_dataset=rows(), eval_dataset=rows(4, 1), processing_class=tokenizer)


def test_a_run_ends_after_so_many_evaluations_without_improvement(tmp_path, tiny_tokenizer, capsys):
    trainer = stopping_trainer(tmp_path, tiny_tokenizer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "=> early stop at step 4: eval_ce has not improved in 3 evaluations" in capsys.readouterr().out
    trainer.train()  # counts from 0 again
    assert trainer.state.global_step == 4
    never = stopping_trainer(tmp_path, tiny_tokenizer, early_stopping_patience=None, early_stopping_threshold=0.0)
    never.train()
    assert never.state.global_step == 8


def test_early_stopping_goes_on_counting_in_a_resumed_run(tmp_path, tiny_tokenizer):
    first = stopping_trainer(tmp_path, tiny_tokenizer)
    first.add_callback(StopAt(2))
    first.train()
    assert first.state.global_step == 2
    resumed = stopping_trainer(tmp_path, tiny_tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


@pytest.mark.parametrize(
    ("missing", "words"), [("eval_strategy", "eval_strategy: steps"), ("metric_for_best_model", "eval_loss")]
)
def test_early_stopping_needs_evaluations_and_a_metric(tmp_path, missing, words):
    given = {"eval_strategy": "steps", "metric_for_best_model": "eval_ce", "early_stopping_patience": 2}
    del given[missing]
    with pytest.raises(RecipeError, match=f"early_stopping_patience=2.*{missing}.*{words}"):
        MatrixConfig(**config(tmp_path, **given))
