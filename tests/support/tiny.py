"""Tiny random models of many architectures, rows and settings for them, and a recipe that trains in seconds."""

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from matrix_llm.config import MatrixConfig
from matrix_llm.trainer import MatrixTrainer

V = 96
COMMON = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**COMMON, "num_key_value_heads": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ARCHITECTURES = {
    "llama": {**GROUPED, "tie_word_embeddings": False},
    "llama_tied": {**COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**GROUPED, "head_dim": 16},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "cohere": {**GROUPED, "logit_scale": 0.0625},
    "granite": {**GROUPED, "logits_scaling": 4.0},
    "gpt2": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **NO_DROPOUT},
    "phi": GROUPED,  # an LM head with a bias
    "opt": {**COMMON, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "dropout": 0.0},
    "mixtral": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def tiny_model(name="llama", seed=0, **changes):
    set_seed(seed)
    kwargs = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **ARCHITECTURES[name], **changes}
    model_type = kwargs.pop("model_type", name)
    # the grouped implementation of experts takes no float64
    experts = {"experts_implementation": "eager"} if "num_local_experts" in kwargs else {}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **kwargs), attn_implementation="eager", **experts
    )
    for p in model.parameters():  # wide logits: an untrained head is so flat that every error hides
        if p.ndim == 2:
            p.data.mul_(4.0)
    return model


def rows(n=16, seed=0, longest=12):
    g = torch.Generator().manual_seed(seed)
    data = []
    for i in range(n):
        length = int(torch.randint(4, longest + 1, (1,), generator=g))
        ids = torch.randint(3, V, (length,), generator=g).tolist()
        prompt = int(torch.randint(1, length - 1, (1,), generator=g))
        data.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "row_id": i})
    return Dataset.from_list(data)


def config(path, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "max_length": 64, "mce_steps": 32, "gradient_checkpointing": False, "use_cpu": True, "bf16": False,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return {"output_dir": str(path), **defaults, **kwargs}


def train(path, tokenizer, model=None, data=None, **kwargs):
    trainer = MatrixTrainer(
        model or tiny_model(),
        MatrixConfig(**config(path, **kwargs)),
        train_dataset=data or rows(),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


# a recipe for train.py
TINY = {
    "model_config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "tie_word_embeddings": False,
    },
    "tokenizer_vocab_size": 300, "dataset": "builtin", "builtin_rows": 64, "prompt_template": "plain",
    "max_length": 256, "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8,
    "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
