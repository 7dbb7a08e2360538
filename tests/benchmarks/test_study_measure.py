"""Decoding and likelihood of the study against the model's own."""

import math

import pytest
import torch

from benchmarks.study.decoding import Decoding, Generated, decode, to_response
from benchmarks.study.likelihood import hidden_effective_rank, likelihood, make_batches
from matrix_llm.run.decode import generate_greedy


def test_greedy_decoding_is_that_of_generate(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    prompts = [f"Question: Mia has {n} pens and buys more. How many?\nAnswer:" for n in (2, 31, 456)] + ["A"]
    found = decode(model, tiny_tokenizer, prompts, Decoding(max_new_tokens=24, batch_size=3))
    texts = [to_response(tiny_tokenizer, each).text for each in found]
    assert texts == generate_greedy(model, tiny_tokenizer, prompts, max_new_tokens=24, batch_size=2)


def test_probabilities_of_greedy_tokens_are_those_of_one_pass_over_the_whole_text(tiny_llama, tiny_tokenizer):
    model, prompts = tiny_llama(), ["Question: Mia has 2 pens.\nAnswer:", "A"]
    found = decode(model, tiny_tokenizer, prompts, Decoding(max_new_tokens=6, batch_size=2))
    for prompt, generated in zip(prompts, found, strict=True):
        ids = tiny_tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            q = model(torch.tensor([[*ids, *generated.ids]])).logits[0].softmax(-1)
        expected = [q[len(ids) - 1 + i, token].item() for i, token in enumerate(generated.ids)]
        assert generated.probabilities == pytest.approx(expected, rel=1e-3)


def test_an_answers_confidence_is_that_of_the_tokens_after_the_marker(tiny_tokenizer):
    text, end = "So it is 42.\nThe answer is: 42", tiny_tokenizer.eos_token_id
    ids = [*tiny_tokenizer(text, add_special_tokens=False)["input_ids"], end]
    after = len(tiny_tokenizer(" 42", add_special_tokens=False)["input_ids"]) + 1
    probabilities = [0.5] * (len(ids) - after) + [0.9] * after
    found = to_response(tiny_tokenizer, Generated(ids, probabilities))
    assert (found.answer, found.confidence) == ("42", pytest.approx(0.9**after))
    cut_off = to_response(tiny_tokenizer, Generated(ids[:3], probabilities[:3]))
    assert cut_off.answer is None
    assert math.isnan(cut_off.confidence)


def test_likelihood_is_the_models_own_loss(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    texts = [("Question: 2?\nAnswer:", " 2 pens"), ("Question: Mia has 12?\nAnswer:", " The answer is: 42")]
    total = count = 0
    for batch in make_batches(tiny_tokenizer, texts, model.device, batch_size=1):
        with torch.no_grad():
            loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.item()
        kept = int((batch.labels[:, 1:] != -100).sum())
        total, count = total + loss * kept, count + kept
    found = likelihood(model, tiny_tokenizer, texts)
    assert (found.ce, found.tokens) == (pytest.approx(total / count, rel=1e-5), count)
    assert 1 <= hidden_effective_rank(model, tiny_tokenizer, texts) <= 64
