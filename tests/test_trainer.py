"""MatrixTrainer against SFTTrainer and against the dense reference, on tiny random models of many architectures."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

from matrix_llm.base.errors import NonFiniteLossError
from matrix_llm.config import MatrixConfig
from matrix_llm.mce import token_mce
from matrix_llm.model.lm_head import (
    MatrixLossOptions,
    add_matrix_head,
    check_head,
    head_effective_rank,
    logit_transform,
)
from matrix_llm.model.tokenizer import train_tokenizer
from matrix_llm.trainer import MatrixTrainer
from tests.support.tiny import ARCHITECTURES, V, config, rows, tiny_model, train


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def assert_same_weights(a, b, atol=0.0):
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------- the head, any architecture


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("embedding_grad", [False, True])
def test_loss_and_every_gradient_equal_the_dense_reference(name, embedding_grad):
    """float64, the model's own logits, torch's cross-entropy and the dense MCE on one side; the fused head on the other."""
    model = tiny_model(name).double().eval()
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1] = -100
    mask = torch.ones_like(ids)

    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    keep = labels[:, 1:] != -100
    head = model.get_output_embeddings().weight
    kept, target = logits[keep], labels[:, 1:][keep]
    mce = token_mce(kept, target, head if embedding_grad else head.detach(), solver="exact")
    reference = F.cross_entropy(kept, target, reduction="sum") + 0.5 * mce.sum()
    expected = torch.autograd.grad(reference, list(model.parameters()), allow_unused=True)

    add_matrix_head(model, MatrixLossOptions(0.5, "krylov", 99, 4, None, None, "lm_head", embedding_grad))
    out = model(input_ids=ids, attention_mask=mask, labels=labels, matrix_loss=True)
    torch.testing.assert_close(out.loss_sum, reference)
    torch.testing.assert_close(out.matrix_cross_entropy[keep], mce.detach())
    assert (out.cross_entropy[~keep] == 0).all()
    got = torch.autograd.grad(out.loss_sum, list(model.parameters()), allow_unused=True)
    for (parameter, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        assert (a is None) == (b is None), parameter
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, p=parameter: f"{p}: {m}")


def test_scale_and_cap_are_read_from_the_config():
    assert logit_transform(tiny_model("gemma2").config) == (1.0, 5.0)
    assert logit_transform(tiny_model("cohere").config) == (0.0625, None)
    assert logit_transform(tiny_model("granite").config) == (0.25, None)
    assert logit_transform(tiny_model("llama").config) == (1.0, None)


def test_a_model_that_does_more_to_its_logits_is_refused():
    model = tiny_model("llama")
    check_head(model)
    original = model.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = forward
    with pytest.raises(ValueError, match="mce_weight: 0"):
        check_head(model)


def test_forward_without_the_keyword_is_untouched():
    model = tiny_model().eval()
    ids = torch.arange(3, 11).unsqueeze(0)
    before = model(input_ids=ids).logits
    add_matrix_head(model, MatrixLossOptions(1.0, "krylov", None, 4, None, None, "lm_head", False))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)


def test_effective_rank_of_the_head_lies_between_collapse_and_isotropy():
    model = tiny_model()
    assert 16 < head_effective_rank(model) <= 32
    model.lm_head.weight.data[:] = 1.0
    assert head_effective_rank(model) == pytest.approx(1.0, abs=1e-3)


def test_embeddings_from_the_input_table_or_a_file(tmp_path):
    from safetensors.torch import save_file

    model = tiny_model()
    ids = torch.randint(3, V, (2, 6))
    for source, table in (
        ("input", model.get_input_embeddings().weight),
        (str(tmp_path / "e.safetensors"), torch.randn(V, 7)),
    ):
        if source != "input":
            save_file({"embeddings": table}, source)
        fresh = tiny_model()
        add_matrix_head(fresh, MatrixLossOptions(1.0, "exact", None, 4, None, None, source, False))
        out = fresh(input_ids=ids, labels=ids, matrix_loss=True)
        expected = token_mce(
            fresh(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), table.detach(), solver="exact"
        )
        torch.testing.assert_close(out.matrix_cross_entropy.flatten(), expected.detach(), rtol=1e-4, atol=1e-5)
    save_file({"embeddings": torch.randn(5, 7)}, str(tmp_path / "short.safetensors"))
    with pytest.raises(ValueError, match=rf"\(5, 7\).*{V} rows"):
        add_matrix_head(
            tiny_model(),
            MatrixLossOptions(1.0, "exact", None, 4, None, None, str(tmp_path / "short.safetensors"), False),
        )


# ------------------------------------------------------------------------------------------------------------------- the trainer


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
    names = "loss ce mce entropy mean_token_accuracy grad_norm learning_rate tokens_per_second peak_memory_gib effective_rank num_tokens"
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


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_tokenizer):
    plain = train(tmp_path / "a", tiny_tokenizer)
    checkpointed = train(tmp_path / "b", tiny_tokenizer, gradient_checkpointing=True)
    assert history(plain, "loss") == pytest.approx(history(checkpointed, "loss"), rel=1e-6)


def test_bf16_autocast_keeps_float32_master_weights_and_nearly_the_loss(tmp_path, tiny_tokenizer):
    full = train(tmp_path / "a", tiny_tokenizer)
    half = train(tmp_path / "b", tiny_tokenizer, bf16=True)
    assert half.model.lm_head.weight.dtype == torch.float32
    assert history(full, "loss") == pytest.approx(history(half, "loss"), rel=3e-2)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_head_and_tail_under_autocast_is_nearly_that_in_float32(device):
    """A vocabulary above 1,024, so that the summary of it is made where the trainer makes it: inside autocast."""
    model = tiny_model(vocab_size=1100).to(device)
    add_matrix_head(model, MatrixLossOptions(1.0, "krylov", None, 4, None, None, "lm_head", False))
    ids = torch.randint(3, 1100, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)

    def step(autocast):
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            out = model(input_ids=ids, labels=ids, matrix_loss=True)
        out.loss_sum.backward()
        return out, model.lm_head.weight.grad.clone()

    (full, expected), (half, got) = step(False), step(True)
    torch.testing.assert_close(half.loss_sum, full.loss_sum, rtol=2e-2, atol=0)
    torch.testing.assert_close(half.matrix_cross_entropy, full.matrix_cross_entropy, rtol=0.1, atol=0.1)
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 0.05 * expected.norm()


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


def test_a_custom_loss_beside_mce_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="compute_loss_func"):
        MatrixTrainer(
            tiny_model(),
            MatrixConfig(**config(tmp_path)),
            train_dataset=rows(),
            processing_class=tiny_tokenizer,
            compute_loss_func=lambda *a, **k: None,
        )
    with pytest.raises(TypeError, match="MatrixConfig"):
        MatrixTrainer(
            tiny_model(),
            SFTConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=rows(),
            processing_class=tiny_tokenizer,
        )


def test_raw_rows_take_sft_trainers_own_preparation(tmp_path, tiny_tokenizer):
    """Drop-in: prompt/completion rows go through SFTTrainer's tokenisation, with the loss on the completion."""
    data = Dataset.from_list([{"prompt": "the cat", "completion": " sat on the mat"}] * 8)
    trainer = train(tmp_path, tiny_tokenizer, model=tiny_model(vocab_size=len(tiny_tokenizer)), data=data, max_steps=1)
    assert history(trainer, "ce")[0] > history(trainer, "mce")[0] > 0


def test_a_trainer_whose_model_a_later_one_took_over_says_so(tmp_path):
    """The model's forward follows the later trainer's settings, and its summary the later trainer's steps."""
    model, tokenizer = tiny_model("llama"), train_tokenizer(["a b"], 260)
    first, second = (
        MatrixTrainer(
            model,
            MatrixConfig(**config(tmp_path / str(weight), max_steps=1, mce_weight=weight)),
            train_dataset=rows(8),
            processing_class=tokenizer,
        )
        for weight in (1.0, 3.0)
    )
    with pytest.raises(RuntimeError, match="another MatrixTrainer"):
        first.train()
    second.train()
    assert second._head_state.step is None  # the weights are anybody's again
