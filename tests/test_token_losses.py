"""Every token loss in MatrixTrainer: what a step trains and logs, teachers, and what is refused."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import set_seed

from matrix_llm.base.errors import ModelError, RecipeError
from matrix_llm.config import MatrixConfig
from matrix_llm.losses import number_tokens, token_loss
from matrix_llm.trainer import MatrixTrainer
from tests.support.tiny import config, rows, tiny_model

V = 300  # tokens of the tiny tokenizer
CASES = {
    "dft": {},
    "minus_p": {},
    "power": {"alpha": 8.0},
    "threshold": {"at": 0.1, "side": "bottom"},
    "focal": {},
    "eaft": {},
    "asft": {},
    "label_smoothing": {},
    "z_loss": {},
    "gem": {"h": "logsigmoid"},
    "ntl": {},
    "emo": {},
    "kd": {"beta": 0.5},
    "soft_ce": {},
    "soft_mce": {"top_k": 4},
}
WITH_TEACHER = ("asft", "kd", "soft_ce", "soft_mce")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_tokenizer):
    """A folder with another tiny model and the student's tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("qwen2", seed=7, tie_word_embeddings=False, vocab_size=V).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def make(path, tokenizer, loss, settings=None, teacher=None, peft=None, data=None, **changes):
    if teacher is not None:
        changes["teacher_model_name_or_path"] = str(teacher)
    args = config(path, token_loss=loss, token_loss_settings=settings, **{"max_steps": 2, **changes})
    set_seed(0)
    return MatrixTrainer(
        tiny_model(vocab_size=V),
        MatrixConfig(**args),
        train_dataset=data or rows(),
        eval_dataset=rows(5, seed=3) if "eval_strategy" in changes else None,
        processing_class=tokenizer,
        peft_config=peft,
    )


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def dense_values(trainer, data, loss, settings):
    """The loss of every label, by the dense reference on whole logits: (N,), and the labels (N,)."""
    values, labels = [], []
    for row in data:
        ids, y = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        given = {}
        with torch.no_grad():
            z = trainer.model(input_ids=ids).logits[0, :-1]
            if loss in WITH_TEACHER:
                given["teacher_logits"] = trainer._teacher.model.lm_head(
                    trainer._teacher.hidden({"input_ids": ids})[0, :-1]
                )
        if loss in ("emo", "soft_mce"):
            given["embeddings"] = trainer.model.lm_head.weight
        if loss == "ntl":
            given["number_ids"], given["number_values"] = number_tokens(trainer.processing_class)
        values.append(token_loss(z, y, loss, **given, **settings))
        labels.append(y)
    return torch.cat(values), torch.cat(labels)


def number_rows(tokenizer, n=16):
    """Rows of which some labels are digits, and some rows without any."""
    ids, _ = number_tokens(tokenizer)
    data = rows(n).to_list()
    for i, row in enumerate(data):
        if i % 3:
            row["labels"][-1] = row["input_ids"][-1] = int(ids[i % 10])
    return type(rows(1)).from_list(data)


@pytest.mark.parametrize("loss", CASES)
def test_one_batch_equals_eight_micro_batches_and_the_dense_reference(loss, tmp_path, tiny_tokenizer, teacher):
    data = number_rows(tiny_tokenizer)
    given = teacher if loss in WITH_TEACHER else None
    at_once = make(
        tmp_path / "a", tiny_tokenizer, loss, CASES[loss], given, data=data,
        per_device_train_batch_size=16, mce_weight=0.5,
    )  # fmt: skip
    values, labels = dense_values(at_once, data, loss, CASES[loss])
    at_once.train()
    by_one = make(
        tmp_path / "b", tiny_tokenizer, loss, CASES[loss], given, data=data,
        per_device_train_batch_size=2, gradient_accumulation_steps=8, mce_weight=0.5,
    )  # fmt: skip
    by_one.train()
    for key in ("loss", "ce", "mce", "token_loss", "grad_norm"):
        assert history(at_once, key) == pytest.approx(history(by_one, key), rel=1e-4), key

    # the step's loss, and that of the dense reference: ntl adds 0.3 of its mean over the labels that are numbers
    for total, value, mce in zip(*(history(at_once, key) for key in ("loss", "token_loss", "mce")), strict=True):
        assert total == pytest.approx(value + 0.5 * mce, rel=1e-4)
    counted = (labels != -100).sum()
    if loss == "ntl":
        ids, _ = number_tokens(tiny_tokenizer)
        expected = history(at_once, "ce")[0] + 0.3 * values.sum() / torch.isin(labels, ids).sum()
    else:
        expected = values.sum() / counted
    assert history(at_once, "token_loss")[0] == pytest.approx(expected.item(), rel=2e-3 if loss == "soft_mce" else 1e-4)


def test_mce_towards_the_teacher_is_trained_and_its_divergence_logged(tmp_path, tiny_tokenizer, teacher):
    trainer = make(tmp_path, tiny_tokenizer, "soft_ce", {}, teacher, mce_target="teacher", mce_weight=0.5)
    data = trainer.train_dataset
    trainer.train()
    values = {key: history(trainer, key) for key in ("loss", "token_loss", "mce", "divergence")}
    for loss, value, mce, divergence in zip(*values.values(), strict=True):
        assert loss == pytest.approx(value + 0.5 * mce, rel=1e-5)
        assert 0 < divergence < value
    label = make(tmp_path / "b", tiny_tokenizer, "soft_ce", {}, teacher, mce_weight=0.5, data=data)
    label.train()
    assert history(label, "token_loss")[0] == pytest.approx(values["token_loss"][0], rel=1e-5)
    assert history(label, "mce")[0] != pytest.approx(values["mce"][0], rel=1e-3)


def test_the_true_cross_entropy_is_logged_beside_the_loss(tmp_path, tiny_tokenizer):
    plain = make(tmp_path / "a", tiny_tokenizer, "ce", mce_weight=0.0)
    focal = make(tmp_path / "b", tiny_tokenizer, "focal", mce_weight=0.0)
    for trainer in (plain, focal):
        trainer.train()
    assert history(focal, "ce")[0] == pytest.approx(history(plain, "loss")[0], rel=1e-5)
    assert history(focal, "loss")[0] == pytest.approx(history(focal, "token_loss")[0], rel=1e-5)
    assert history(focal, "entropy")[0] == pytest.approx(history(plain, "entropy")[0], rel=1e-5)
    assert history(focal, "loss")[0] != pytest.approx(history(focal, "ce")[0], rel=1e-3)


def test_held_out_figures_are_those_of_the_loss_whatever_the_batches(tmp_path, tiny_tokenizer, teacher):
    found = []
    for size in (1, 5):
        trainer = make(
            tmp_path / str(size), tiny_tokenizer, "kd", {}, teacher,
            eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=size, mce_weight=0.5,
        )  # fmt: skip
        found.append(trainer.evaluate())
    for key in ("eval_loss", "eval_ce", "eval_token_loss", "eval_mce"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5)
    assert found[0]["eval_loss"] == pytest.approx(found[0]["eval_token_loss"] + 0.5 * found[0]["eval_mce"], rel=1e-5)


def test_ntl_held_out_is_a_mean_over_numbers(tmp_path, tiny_tokenizer):
    data = number_rows(tiny_tokenizer, 5)
    trainer = make(tmp_path, tiny_tokenizer, "ntl", {"weight": None}, data=data, mce_weight=0.0)
    found = trainer.evaluate(data)
    values, labels = dense_values(trainer, data, "ntl", {})
    expected = values.sum() / torch.isin(labels, number_tokens(tiny_tokenizer)[0]).sum()
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["kd", "asft", "ntl"])
def test_packed_rows_train_and_have_the_same_loss(loss, tmp_path, tiny_tokenizer, teacher):
    """Packing is checked through the same forward, which needs the teacher's hidden states too."""
    data, found = number_rows(tiny_tokenizer, 8), []
    for packing in (False, True):
        given, peft = (teacher if loss == "kd" else None), (lora() if loss == "asft" else None)
        changes = {"packing": packing, "max_length": 48, "gradient_checkpointing": True, "eval_strategy": "steps"}
        trainer = make(tmp_path / str(packing), tiny_tokenizer, loss, {}, given, peft, data, **changes)
        found.append(trainer.evaluate()["eval_token_loss"])  # before training, on the same held-out rows
        trainer.train()
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# ------------------------------------------------------------------------------------------- teachers and references


def lora(**changes):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)


def test_asft_under_lora_compares_with_the_model_without_its_adapters(tmp_path, tiny_tokenizer):
    """As with the base model given as the teacher; at the first step the two are the same, so that it is DFT."""
    base = tmp_path / "base"
    tiny_model(vocab_size=V).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    runs = []
    for given in (None, base):
        trainer = make(
            tmp_path / str(given is None), tiny_tokenizer, "asft", {"weight": 5.0}, given, lora(),
            max_steps=4, learning_rate=0.05, mce_weight=0.0,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    dft = make(
        tmp_path / "dft", tiny_tokenizer, "dft", None, None, lora(), max_steps=4, learning_rate=0.05, mce_weight=0.0
    )
    dft.train()
    off, other = (history(run, "token_loss") for run in runs)
    assert off == pytest.approx(other, rel=1e-4)
    assert off[0] == pytest.approx(history(dft, "token_loss")[0], rel=1e-5)
    assert history(runs[0], "loss")[-1] != pytest.approx(history(dft, "loss")[-1], rel=1e-3)
    assert all(layer.disable_adapters is False for layer in runs[0].model.modules() if hasattr(layer, "lora_A"))


def test_a_saved_head_is_read_as_it_was_before_the_adapters(tmp_path, tiny_tokenizer):
    trainer = make(
        tmp_path, tiny_tokenizer, "asft", None, None, lora(modules_to_save=["lm_head"]),
        learning_rate=0.05, mce_weight=0.0,
    )  # fmt: skip
    trainer.train()
    trained = trainer._base_model().get_output_embeddings().weight
    weight, _ = trainer._teacher.head.parameters()
    assert torch.equal(weight, tiny_model(vocab_size=V).lm_head.weight)
    assert not torch.equal(weight, trained)


def test_a_teacher_is_not_trained_and_not_saved(tmp_path, tiny_tokenizer, teacher):
    trainer = make(tmp_path, tiny_tokenizer, "kd", {}, teacher)
    before = {name: value.clone() for name, value in trainer._teacher.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer._teacher.model.state_dict().items())
    assert not any("teacher" in name for name in trainer.model.state_dict())


def test_a_teacher_with_padded_vectors_is_cut_to_the_students(tmp_path, tiny_tokenizer, teacher):
    padded = tiny_model("qwen2", seed=7, tie_word_embeddings=False, vocab_size=V)
    padded.resize_token_embeddings(V + 8)
    padded.save_pretrained(tmp_path / "padded")
    tiny_tokenizer.save_pretrained(tmp_path / "padded")
    losses = []
    for given in (teacher, tmp_path / "padded"):
        trainer = make(tmp_path / "run", tiny_tokenizer, "kd", {}, given, max_steps=1)
        trainer.train()
        losses.append(history(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_teacher_with_another_vocabulary_is_refused_before_its_weights(tmp_path, tiny_tokenizer, teacher):
    from matrix_llm.model.tokenizer import train_tokenizer

    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer(["another text zq zq zq zq"], 270).save_pretrained(other)
    (other / "config.json").write_text((teacher / "config.json").read_text())
    with pytest.raises(RecipeError, match=r"teacher_model_name_or_path=.*other vocabulary.*tokenizer"):
        make(tmp_path / "run", tiny_tokenizer, "kd", {}, other)


def test_a_teacher_with_fewer_vectors_is_refused(tmp_path, tiny_tokenizer, teacher):
    """Where the student's are padded: both have one for each of the tokenizer's tokens."""
    args = MatrixConfig(**config(tmp_path, token_loss="kd", teacher_model_name_or_path=str(teacher)))
    with pytest.raises(RecipeError, match=rf"teacher_model_name_or_path=.* {V} tokens, the student for {V + 8}"):
        MatrixTrainer(tiny_model(vocab_size=V + 8), args, train_dataset=rows(), processing_class=tiny_tokenizer)


def test_a_teacher_whose_weights_are_not_its_own_is_named_by_its_key(tmp_path, tiny_tokenizer):
    folder = tmp_path / "gap"
    tiny_model("qwen2", tie_word_embeddings=False, vocab_size=V).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^teacher_model_name_or_path=.*gap' lacks lm_head.weight"):
        make(tmp_path / "run", tiny_tokenizer, "kd", {}, folder)


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("loss", ["emo", "ntl", "kd"])
def test_a_resumed_run_ends_with_the_same_bits(loss, tmp_path, tiny_tokenizer, teacher):
    data, given = number_rows(tiny_tokenizer), teacher if loss == "kd" else None
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "data": data}
    whole = make(tmp_path / "a", tiny_tokenizer, loss, CASES[loss], given, **saving)
    whole.train()
    resumed = make(tmp_path / "a", tiny_tokenizer, loss, CASES[loss], given, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for key in ("loss", "ce", "token_loss", "grad_norm"):
        assert history(whole, key) == history(resumed, key), key


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"token_loss": "soft_mce", "teacher_model_name_or_path": "x", "mce_embedding_grad": True},
            r"mce_embedding_grad=True.*soft_mce",
        ),
        ({"mce_target": "teacher"}, r"mce_target='teacher'.*token_loss='ce'.*kd"),
        (
            {"mce_target": "teacher", "token_loss": "kd", "teacher_model_name_or_path": "x", "mce_weight": 0.0},
            r"mce_target='teacher'.*mce_weight=0.0",
        ),
        (
            {"mce_target": "teacher", "token_loss": "kd", "teacher_model_name_or_path": "x", "mce_solver": "taylor"},
            r"mce_target='teacher'.*mce_solver='taylor'",
        ),
        ({"token_loss": "emmo"}, r"token_loss='emmo'.*emo"),
        ({"token_loss": "focal", "token_loss_settings": {"gama": 2}}, r"gama.*gamma"),
        ({"token_loss": "focal", "token_loss_settings": {"gamma": -1}}, r"gamma=-1"),
        ({"token_loss": "ce", "token_loss_settings": {"gamma": 1}}, r"gamma"),
        ({"token_loss": "kd"}, r"teacher_model_name_or_path"),
        ({"token_loss": "dft", "teacher_model_name_or_path": "x"}, r"teacher_model_name_or_path='x'.*kd"),
        ({"label_smoothing_factor": 0.2}, r"label_smoothing_factor=0.2.*token_loss: label_smoothing.*epsilon: 0.2"),
        ({"loss_type": "dft"}, r"loss_type='dft'.*token_loss: dft"),
        ({"token_loss": "emo", "mce_weight": 0.0, "use_liger_kernel": True}, r"use_liger_kernel"),
        (
            {"token_loss": "emo", "mce_weight": 0.0, "packing": True, "packing_strategy": "wrapped"},
            r"packing_strategy",
        ),
        ({"token_loss": "emo", "mce_weight": 0.0, "label_smoothing_factor": 0.1}, r"label_smoothing_factor"),
    ],
)
def test_settings_that_would_do_nothing_or_something_else_are_refused(changes, words, tmp_path):
    with pytest.raises(RecipeError, match=words) as refused:
        MatrixConfig(str(tmp_path), use_cpu=True, bf16=False, **changes)
    assert "\n" not in str(refused.value)


def test_asft_without_adapters_or_teacher_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(RecipeError, match=r"asft.*teacher_model_name_or_path.*use_peft"):
        make(tmp_path, tiny_tokenizer, "asft")


def test_asft_with_adapters_that_change_the_base_needs_a_teacher(tmp_path, tiny_tokenizer):
    with pytest.raises(RecipeError, match=r"init_lora_weights='pissa'.*teacher_model_name_or_path"):
        make(tmp_path, tiny_tokenizer, "asft", None, None, lora(init_lora_weights="pissa"))


def test_a_loss_function_of_the_callers_own_is_refused(tmp_path, tiny_tokenizer):
    args = MatrixConfig(**config(tmp_path, token_loss="emo", mce_weight=0.0))
    with pytest.raises(RecipeError, match=r"token_loss='emo'.*compute_loss_func"):
        MatrixTrainer(
            tiny_model(), args, train_dataset=rows(), processing_class=tiny_tokenizer,
            compute_loss_func=lambda *a, **k: 0,
        )  # fmt: skip


def test_a_teacher_that_does_more_to_its_logits_is_named_by_its_key(tmp_path, tiny_tokenizer, teacher, monkeypatch):
    from matrix_llm.model import lm_head

    monkeypatch.setattr(lm_head, "logit_transform", lambda config: (2.0 if config.model_type == "qwen2" else 1.0, None))
    with pytest.raises(RecipeError, match=r"teacher_model_name_or_path=.*cannot be a teacher.*another teacher"):
        make(tmp_path, tiny_tokenizer, "kd", {}, teacher)
