"""Shared by all tests: no network, two threads, and one tiny tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import, which reads it once

import pytest
import torch

torch.set_num_threads(2)

SENTENCES = [
    "Question: Mia has 12 pens and buys 30 more. How many pens does Mia have?\nAnswer: 12 + 30 = 42.\nThe answer is: 42",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "A train drives 80 km an hour for 3 hours. How far does it drive? 80 * 3 = 240.\nThe answer is: 240",
]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of 300 tokens, as matrix_llm.model trains it."""
    from matrix_llm.model import train_tokenizer

    return train_tokenizer(SENTENCES, 300)
