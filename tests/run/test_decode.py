"""Greedy decoding in batches, and the figures made from it."""

import copy
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.answers import is_correct
from matrix_llm.base.statistics import wilson_interval
from matrix_llm.data.wordproblems import generate
from matrix_llm.run.decode import final_answer, generate_greedy, measure_accuracy

PROMPTS = [
    "a",
    "Ana buys 3 pens.",
    "The",
    "",
    "How many pens does Ben have now, after all of this?",
    "x = 1 2",
    "Ana buys 3 pens.",
]


@pytest.fixture(scope="module")
def tokenizer():
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    base.decoder = decoders.ByteLevel()
    texts = [problem.query + " " + problem.response for problem in generate(200, seed=0)]
    base.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    base.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # the usual 0.02 leaves near-ties, whose winner rounding decides
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def reference(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """One prompt, no padding, no cache: the argmax of the last position, again and again."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + max_new_tokens:
            token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_give_the_text_of_one_prompt_at_a_time_in_the_order_of_the_prompts(model, tokenizer, batch_size):
    expected = [reference(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert len(set(expected)) == len(set(PROMPTS))  # the texts tell the prompts apart
    assert generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=20, batch_size=batch_size) == expected


def test_texts_stop_at_the_end_of_text_token_and_other_rows_go_on(model, tokenizer):
    free = [reference(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    with torch.no_grad():  # make one token that some rows say and others do not the end of text
        said = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in free]
        token = next(
            t for t in sorted(set.union(*said)) if 0 < sum(t in ids for ids in said) < len(set(PROMPTS)) and t > 2
        )
        model.lm_head.weight[[1, token]] = model.lm_head.weight[[token, 1]]
    expected = [reference(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert expected != free
    assert any(a == b for a, b in zip(expected, free, strict=True))
    assert generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=20, batch_size=4) == expected


def test_sampling_settings_of_the_checkpoint_do_not_reach_greedy_decoding(model, tokenizer, recwarn):
    expected = generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4)
    for name, value in {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 3,
        "repetition_penalty": 5.0,
        "num_beams": 3,
    }.items():
        setattr(model.generation_config, name, value)
    assert generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4) == expected
    assert not recwarn.list


def test_tokenizer_and_model_are_left_as_they_were(model, tokenizer):
    model.train()
    model.model.layers[1].eval()  # modes mixed by the caller, for example a frozen part
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    modes = {name: module.training for name, module in model.named_modules()}
    config, generation = copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=4)
        assert tokenizer.padding_side == side
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert model.is_gradient_checkpointing
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_modes_are_restored_after_an_error(model, tokenizer):
    model.train()

    def fail(*_):
        raise RuntimeError("out of memory")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_greedy(model, tokenizer, ["a"], max_new_tokens=2, batch_size=1)
    assert all(module.training for module in model.modules())


def test_no_prompts_give_no_texts(model, tokenizer):
    assert generate_greedy(model, tokenizer, [], max_new_tokens=5, batch_size=2) == []


def test_bad_sizes_and_a_prompt_without_tokens_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="max_new_tokens=0 must be 1 or more"):
        generate_greedy(model, tokenizer, ["a"], max_new_tokens=0, batch_size=2)
    with pytest.raises(ValueError, match="batch_size=-1 must be 1 or more"):
        generate_greedy(model, tokenizer, ["a"], max_new_tokens=1, batch_size=-1)
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match=r"prompt 1 \(''\) has no tokens"):
        generate_greedy(model, bare, ["a", ""], max_new_tokens=1, batch_size=2)


def test_an_end_of_text_token_added_by_the_tokenizer_is_dropped_and_a_missing_pad_token_is_no_matter(model, tokenizer):
    expected = generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=4)
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    ending.pad_token = None
    assert ending("a")["input_ids"][-1] == 1
    assert generate_greedy(model, ending, PROMPTS, max_new_tokens=8, batch_size=4) == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 42", "42"),
        ("The answer is: 7\nThe answer is: 1,234,567.", "1234567"),
        ("The answer is: $ 12.00 per day", "12"),
        ("The answer is: 012.50", "12.5"),
        ("The answer is: +5", "5"),
        ("The answer is: -5 or 6", "-5"),
        ("The answer is: -0.0", "0"),
        ("The answer is: .5", "0.5"),
        ("The answer is: 6/4", "6/4"),
        ("The answer is: 5/1", "5"),
        ("The answer is: x = 3", "3"),
        ("The answer is: - 3", "3"),
        ("The answer is: 42</s>", "42"),
        ("The answer is: ", None),
        ("The answer is: none", None),
        ("The answer is 42", None),
        ("42", None),
        ("", None),
        ("The answer is: 1\nThe answer is: ", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("piece", ["1", "1,", "-", "+-.", "0.", "/", "The answer is: ", ".9/", ",", "\n"])
def test_final_answer_takes_bounded_time_on_hostile_text(piece):
    text = "The answer is: " + piece * (1_000_000 // len(piece))
    start = time.process_time()
    final_answer(text)
    assert time.process_time() - start < 5  # a backtracking parser would take hours


def problem(*, query, answer):
    return replace(generate(1, seed=0)[0], query=query, answer=answer)


def test_accuracy_counts_right_wrong_and_unanswered(monkeypatch, model, tokenizer):
    problems = [problem(query=f"q{i} {{}}", answer=answer) for i, answer in enumerate(["1,000", "2", "3", "4.0"])]
    replies = {
        "Q: q0 {}": "The answer is: 1000.0",
        "Q: q1 {}": "The answer is: 3",
        "Q: q2 {}": "3",
        "Q: q3 {}": "The answer is: 4",
    }
    monkeypatch.setattr(
        "matrix_llm.run.decode.generate_greedy", lambda _m, _t, prompts, **_: [replies[p] for p in prompts]
    )
    result = measure_accuracy(model, tokenizer, problems, template="Q: {instruction}")
    assert (result.correct, result.total, result.accuracy, result.unanswered) == (2, 4, 0.5, 1)
    assert result.is_correct == (True, False, False, True)
    assert result.responses == tuple(replies.values())
    assert (result.low, result.high) == wilson_interval(2, 4)


def test_a_grader_that_takes_the_question_is_given_it(monkeypatch, model, tokenizer):
    """The question handed back earns nothing while training, as in eval/."""
    reply = r"It is $\boxed{2^{10}}$."
    monkeypatch.setattr("matrix_llm.run.decode.generate_greedy", lambda _m, _t, prompts, **_: [reply] * len(prompts))
    problems = [problem(query="Compute $2^{10}$.", answer="1024"), problem(query="How much is a KiB?", answer="1024")]
    how = {"template": "Q: {instruction}"}
    graded = measure_accuracy(model, tokenizer, problems, is_correct=partial(is_correct, benchmark="math"), **how)
    assert graded.is_correct == (False, True)
    told = measure_accuracy(
        model, tokenizer, problems, is_correct=lambda text, gold: (text, gold) == (reply, "1024"), **how
    )
    assert told.is_correct == (True, True)  # a grader of two arguments is called with two


def test_accuracy_in_the_chat_template_starts_from_the_ids_of_training(monkeypatch, model, tokenizer):
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    asked = []
    monkeypatch.setattr(
        "matrix_llm.run.decode.generate_greedy", lambda _m, _t, prompts, **_: asked.extend(prompts) or [""]
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    measure_accuracy(model, tokenizer, [problem(query="1 + 1?", answer="2")], template="chat")
    assert asked == [tokenizer("<s>1 + 1?</s>A:", add_special_tokens=False)["input_ids"]]


def test_prompts_may_be_given_as_ids_and_begin_once(model, tokenizer):
    texts = generate_greedy(model, tokenizer, [*PROMPTS[:2], f"<s>{PROMPTS[0]}"], max_new_tokens=6, batch_size=2)
    ids = tokenizer(PROMPTS[1])["input_ids"]
    assert texts[0] == texts[2]
    assert generate_greedy(model, tokenizer, [PROMPTS[0], ids], max_new_tokens=6, batch_size=2) == texts[:2]


def test_accuracy_of_an_untrained_model_on_word_problems(model, tokenizer):
    problems = generate(6, seed=0, split="test")
    result = measure_accuracy(
        model, tokenizer, problems, template="Question: {instruction}\nAnswer:", max_new_tokens=8, batch_size=4
    )
    assert (result.correct, result.total, result.unanswered, result.low) == (0, 6, 6, 0.0)


def test_unusable_problems_and_templates_are_refused(model, tokenizer):
    unanswerable = problem(query="q", answer="none")
    with pytest.raises(ValueError, match="no problems"):
        measure_accuracy(model, tokenizer, [])
    with pytest.raises(ValueError, match="problem 0 has the answer 'none'"):
        measure_accuracy(model, tokenizer, [unanswerable])
    with pytest.raises(ValueError, match=r"template='metamath'.*\{instruction\}"):
        measure_accuracy(model, tokenizer, [unanswerable], template="metamath")
