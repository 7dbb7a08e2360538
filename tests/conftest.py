"""Shared by all tests: no network, two threads that wait passively, and one tiny tokenizer and model."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import, which reads it once
if "HF_DATASETS_CACHE" not in os.environ:  # tokenised test rows do not belong in the user's cache
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="matrix_llm-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

if "torch" not in sys.modules:  # OpenMP reads its settings when torch loads it
    from matrix_llm.base.threads import wait_passively

    wait_passively()

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of 300 tokens, as matrix_llm.model.load trains it."""
    from matrix_llm.model.tokenizer import train_tokenizer
    from tests.support.sentences import SENTENCES

    return train_tokenizer(SENTENCES, 300)


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer):
    """A random Llama with weights so large that one token is clearly likeliest; vLLM on a CPU needs head_dim 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(positions: int = 256) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=positions,
            initializer_range=0.2, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    return make
