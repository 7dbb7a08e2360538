"""Model settings from scratch, and tiny checkpoints on disk."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from matrix_llm.config import ModelArguments

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def scratch(**changes) -> ModelArguments:
    return ModelArguments(model_config=TINY | changes, tokenizer_vocab_size=300)


def save_llama(folder, rows: int, dtype=torch.float32, **changes) -> str:
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, **{**TINY, **changes})).to(dtype).save_pretrained(folder)
    return str(folder)
