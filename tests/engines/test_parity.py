"""Packed rows have the loss of unpacked rows, token by token, or are refused; so is what no engine does right."""

import json

import pytest
import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig
from packaging import version
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from matrix_llm.config import MatrixConfig, RecipeError
from matrix_llm.trainer import MatrixTrainer
from tests.support.tiny import TINY, config, rows, tiny_model, train

LEAKY = {  # architectures of transformers that do not restart where the positions do
    "opt": {
        "model_type": "opt",
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    },
    "bloom": {"model_type": "bloom", "n_layer": 2, "n_head": 2},
    "falcon": {"model_type": "falcon", "alibi": False},
    "mamba": {"model_type": "mamba", "state_size": 8},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "full_attention"],
    },
    "lfm2": {"model_type": "lfm2", "full_attn_idxs": [1], "block_multiple_of": 8, "num_key_value_heads": 1},
    "nemotron_h": {
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 4,
        "mamba_n_groups": 1,
        "ssm_state_size": 16,
        "num_key_value_heads": 1,
    },
}


def per_token(trainer, implementation):
    """CE, MCE and entropy of each trained token: {(row, place in it): values}, whatever the batches are."""
    trainer.model.set_attn_implementation(implementation)
    trainer.model.eval()
    found = {}
    for batch in trainer.get_train_dataloader():
        batch.pop("row_id", None)
        ids, places = (
            batch["input_ids"],
            batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])),
        )
        with torch.no_grad():
            out = trainer.model(**batch, use_cache=False, matrix_loss=True)
        for sequence, t in out.label_mask.nonzero().tolist():
            start = t + 1 - int(places[sequence, t + 1])
            key = tuple(ids[sequence, start : t + 2].tolist())  # the row up to the token
            values = (out.cross_entropy, out.matrix_cross_entropy, out.entropy)
            found[key] = [value[sequence, t].item() for value in values]
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("top_k", [None, 16])
def test_packed_rows_lose_what_unpacked_rows_lose_token_by_token(name, implementation, top_k, tmp_path, tiny_tokenizer):
    found = []
    for packing in ({}, {"packing": True, "max_length": 48}):
        settings = config(
            tmp_path / str(len(found)), per_device_train_batch_size=2, mce_top_k=top_k, mce_steps=6, **packing
        )
        model = tiny_model(name)
        if implementation == "sdpa" and not model._supports_sdpa:
            pytest.skip(f"transformers {transformers.__version__} has no sdpa for {name}")
        trainer = MatrixTrainer(
            model, MatrixConfig(**settings), train_dataset=rows(24), processing_class=tiny_tokenizer
        )
        found.append(per_token(trainer, implementation))
        rows_at_once = next(iter(trainer.get_train_dataloader()))["input_ids"].shape[0]
        assert rows_at_once == (1 if packing else 2)  # flattened, or side by side
    plain, packed = found
    assert set(plain) == set(packed)
    assert len(plain) > 100
    for key, values in plain.items():
        assert packed[key] == pytest.approx(values, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", LEAKY)
def test_a_model_that_lets_packed_rows_see_each_other_is_refused(name, tmp_path, tiny_tokenizer, monkeypatch):
    from tests.support import tiny

    monkeypatch.setitem(tiny.ARCHITECTURES, name, {**tiny.COMMON, **LEAKY[name]})
    steps = []
    monkeypatch.setattr(MatrixTrainer, "training_step", lambda *a, **k: steps.append(1))
    model = tiny_model(name)
    if name == "falcon" and version.parse(transformers.__version__) >= version.parse("5.20"):
        pytest.skip(f"transformers {transformers.__version__} keeps Falcon's rows apart")
    with pytest.raises(RecipeError, match=r"packing: .* (see each other|apart: ).*Set packing: false"):
        train(tmp_path, tiny_tokenizer, model=model, data=rows(24), packing=True, max_length=48)
    assert not steps


def test_a_model_that_leaks_trains_unpacked(tmp_path, tiny_tokenizer, monkeypatch):
    from tests.support import tiny

    monkeypatch.setitem(tiny.ARCHITECTURES, "opt", {**tiny.COMMON, **LEAKY["opt"]})
    assert train(tmp_path, tiny_tokenizer, model=tiny_model("opt"), max_steps=1).state.global_step == 1


def test_the_packing_check_leaves_weights_modes_and_random_numbers_alone(tmp_path, tiny_tokenizer):
    settings = config(tmp_path, packing=True, max_length=48)
    trainer = MatrixTrainer(
        tiny_model(), MatrixConfig(**settings), train_dataset=rows(24), processing_class=tiny_tokenizer
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.train()
    state = torch.get_rng_state()
    trainer.check_packing()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in trainer.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


# ------------------------------------------------------------------------- the LM head that the model itself uses


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama_tied", {"modules_to_save": ["lm_head"]}),
        ("llama_tied", {"modules_to_save": ["embed_tokens"]}),
        ("llama_tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
)
def test_trained_or_tied_heads_under_lora_have_the_loss_of_the_models_own_logits(
    name, adapted, tmp_path, tiny_tokenizer
):
    adapter = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **adapted})
    settings = MatrixConfig(**config(tmp_path, learning_rate=1e-2))
    trainer = MatrixTrainer(
        tiny_model(name), settings, train_dataset=rows(), processing_class=tiny_tokenizer, peft_config=adapter
    )
    trainer.train()
    assert_own_loss(trainer.model)


def test_a_resized_vocabulary_has_the_loss_of_the_models_own_logits(tmp_path, tiny_tokenizer):
    model = tiny_model()
    model.resize_token_embeddings(101)
    assert_own_loss(train(tmp_path, tiny_tokenizer, model=model).model)


def assert_own_loss(model):
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        found = model(input_ids=ids, labels=ids, matrix_loss=True).cross_entropy.flatten()
    torch.testing.assert_close(found, expected)


# ----------------------------------------------------------------------------------- refused before a weight loads


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is a failure."""
    for loader in ("from_pretrained", "from_config"):
        monkeypatch.setattr(AutoModelForCausalLM, loader, lambda *a, **k: pytest.fail("a weight was loaded"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' cannot work"),
        ({"eval_packing": True}, "eval_packing=True with packing=False"),
    ],
)
def test_packing_that_joins_rows_is_refused(settings, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        MatrixConfig(**config(tmp_path, **settings))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            r"tensor parallelism \(tp_size=2\).*ZeRO-3 or FSDP2",
        ),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "4"},
            r"sequence parallelism \(sp_size=4\).*Remove it",
        ),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            r"context parallelism \(cp_size=2\).*ZeRO-3 or FSDP2",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1.*--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1.*ds_configs/fsdp2.yaml"),
    ],
)
def test_what_the_launcher_asks_for_and_the_loss_cannot_follow_is_refused(
    environment, said, tmp_path, monkeypatch, capsys, no_model
):
    from matrix_llm.train import main

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=said):
        MatrixConfig(**config(tmp_path))
    MatrixConfig(**config(tmp_path, mce_weight=0.0))  # plain SFT is SFTTrainer's own affair
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(TINY | {"output_dir": str(tmp_path / "run")}))
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "said"), [("tp_size", "tensor parallelism"), ("cp_size", "context parallelism")])
def test_parallelism_given_in_python_is_refused(key, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        MatrixConfig(**config(tmp_path, parallelism_config=ParallelismConfig(**{key: 2})))


def test_tensor_parallelism_in_a_deepspeed_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv(
        "ACCELERATE_USE_DEEPSPEED", "false"
    )  # set to true by what is built here, and put back after the test
    pytest.importorskip("deepspeed")
    with pytest.raises(RecipeError, match=r"`tensor_parallel` block.*set stage 3"):
        MatrixConfig(
            **config(tmp_path, deepspeed={"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}})
        )


def test_fsdp_version_1_in_the_recipe_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="FSDP version 1"):
        MatrixConfig(**config(tmp_path, fsdp="full_shard", fsdp_config={"version": 1}))
