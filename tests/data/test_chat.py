"""What of a conversation is trained: each turn of the assistant to its end-of-turn token, and nothing else."""

import re

import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data.forms import Row, parse_row
from matrix_llm.data.tokens import Encoder, chat_prompt_ids
from tests.support.chat_templates import END_OF_SENTENCE, published, trained_texts, with_template

USER, ASSISTANT = {"role": "user", "content": "one plus one"}, {"role": "assistant", "content": "two"}
TURNS = [USER, ASSISTANT, {"role": "user", "content": "and three"}, {"role": "assistant", "content": "five"}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}]
TOOLS = [{"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}]
TOOL_TURNS = [USER, {"role": "assistant", "content": None, "tool_calls": CALL}]
TOOL_RESULT = [{"role": "tool", "name": "add", "content": "2"}, ASSISTANT]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
UNMARKED = re.sub(r"{% (end)?generation %}", "", CHATML)


def encode(tokenizer, found, **options):
    row = found if isinstance(found, Row) else parse_row(found, "here")
    return Encoder(tokenizer, row.layout, **options).encode([row], [6])


def trained(tokenizer, found, **options):
    return trained_texts(tokenizer, encode(tokenizer, found, **options))


# --- the end of a turn ------------------------------------------------------------------------------------------------

PUBLISHED = {  # template: the tokens that end its turns
    "qwen3": "<|im_end|>", "qwen2_5": "<|im_end|>", "qwen3_5_think": "<|im_end|>", "qwen3_8": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>", "lfm2": "<|im_end|>", "nemotron_3_nano": "<|im_end|>",
    "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>", "glm4moe": "<|user|>", "phi3": "<|end|>", "gptoss": "<|end|> <|return|>",
    "deepseekv3": END_OF_SENTENCE, "deepseek_r1_distill": END_OF_SENTENCE,
    "cohere": "<|END_OF_TURN_TOKEN|>", "muse_glimmer": "<|eot|>",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_turn_is_trained_to_its_end_and_nothing_of_the_users(tiny_tokenizer, name):
    tokenizer = published(tiny_tokenizer, name)
    ends = PUBLISHED[name].split()
    found = trained(tokenizer, {"messages": [{"role": "user", "content": "one plus one"}, *TURNS[1:]]})
    assert len(found) == 2
    for text, said, end in zip(found, ("two", "five"), (ends[0], ends[-1]), strict=True):
        before, _, after = text.partition(said)
        assert after.strip() == end
        assert re.fullmatch(r"(<\|channel\|>final<\|message\|>|to=user<\|message\|>)?", before.strip())


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["closes too early", "has no marks"])
@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
def test_the_end_of_turn_token_is_trained_whatever_the_template_marks(tiny_tokenizer, template, eos):
    tokenizer = with_template(tiny_tokenizer, template, eos)
    found = trained(tokenizer, {"messages": TURNS})
    assert [text.strip() for text in found] == ["two<|im_end|>", "five<|im_end|>"]
    text = tokenizer.decode(encode(tokenizer, {"messages": TURNS})["input_ids"][0])
    assert text.count("<|im_start|>assistant\n") == 2  # the rest of the layout is as it was


def test_a_template_that_writes_nothing_for_inference_trains_what_follows_the_users_turn(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, INST, "</s>")
    assert trained(tokenizer, {"messages": TURNS}) == [" two</s>", " five</s>"]
    question = {"question": "one plus one", "answer": "two"}
    assert trained(tokenizer, question, prompt_template="chat") == [" two</s>"]
    with pytest.raises(DataError, match=r"{% generation %}.*chat_template_path"):  # its header would be trained
        Encoder(with_template(tiny_tokenizer, INST.replace(" {{ m.content }}</s>", "it: {{ m.content }}</s>")), "chat")


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_a_template_without_an_end_of_turn_is_refused_before_a_row(tiny_tokenizer, template):
    tokenizer = with_template(tiny_tokenizer, template.replace("<|im_end|>", ""), "</s>")
    with pytest.raises(DataError, match=r"no end-of-turn token.*</s>.*chat_template_path"):
        Encoder(tokenizer, "chat")


def test_a_template_that_ends_the_last_turn_alone_trains_that_turn_only(tiny_tokenizer):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% else %}</s>{% endif %}{# <|user|> #}"
    tokenizer = with_template(tiny_tokenizer, template, "</s>")
    with pytest.raises(DataError, match=r"^row 7: .*message 2.*train_on: last"):
        encode(tokenizer, {"messages": TURNS})
    assert trained(tokenizer, {"messages": TURNS}, train_on="last") == ["five</s>"]


# --- which turns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}, {}], ["two", "five"]),
        ([{"weight": 0}, {}], ["five"]),
        ([{"weight": 1}, {"weight": 0.0}], ["two"]),
        ([{"train": False}, {"train": True}], ["five"]),
        ([{"training": False}, {}], ["five"]),
        ([{"weight": 0, "content": ""}, {}], ["five"]),
        ([{"weight": 0}, {"weight": 0}], []),
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "phi3", "gptoss", "unmarked"])
def test_turns_of_weight_0_are_not_trained(tiny_tokenizer, name, changes, expected):
    tokenizer = with_template(tiny_tokenizer, UNMARKED) if name == "unmarked" else published(tiny_tokenizer, name)
    messages = [TURNS[0], {**TURNS[1], **changes[0]}, TURNS[2], {**TURNS[3], **changes[1]}]
    found = trained(tokenizer, {"messages": messages})
    assert [re.sub(r"<\|channel\|>final<\|message\|>|<\|[a-z_]+\|>|\s", "", text) for text in found] == expected


def test_a_first_turn_of_the_assistant_that_no_prompt_leads_to_is_refused_and_the_way_out_works(tiny_tokenizer):
    tokenizer = published(tiny_tokenizer, "llama3_1")
    with pytest.raises(DataError, match=r"row 7: message 1 is the assistant's.*weight 0"):
        encode(tokenizer, {"messages": [ASSISTANT, *TURNS]})
    found = trained(tokenizer, {"messages": [{**ASSISTANT, "weight": 0}, *TURNS]})
    assert [text.strip() for text in found] == ["two<|eot_id|>", "five<|eot_id|>"]


def test_train_on_last_trains_the_last_turn(tiny_tokenizer):
    tokenizer = published(tiny_tokenizer, "qwen2_5")
    assert trained(tokenizer, {"messages": TURNS}, train_on="last") == ["five<|im_end|>\n"]
    silent = [*TURNS[:3], {**TURNS[3], "weight": 0}]
    assert trained(tokenizer, {"messages": silent}, train_on="last") == []
    with pytest.raises(DataError, match=r"train_on='last'.*`text`"):
        encode(tokenizer, {"text": "two"}, train_on="last")


def test_of_a_conversational_prompt_and_completion_the_completion_is_trained(tiny_tokenizer):
    tokenizer = published(tiny_tokenizer, "qwen2_5")
    found = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    assert trained(tokenizer, found) == ["five<|im_end|>\n"]
    assert encode(tokenizer, found)["input_ids"] == encode(tokenizer, {"messages": TURNS})["input_ids"]


# --- tools and reasoning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "gptoss", "glm4moe", "deepseekv3"])
def test_a_tool_call_is_trained_without_an_empty_think_block_and_its_result_is_not(tiny_tokenizer, name):
    tokenizer = published(tiny_tokenizer, name)
    found = {"messages": TOOL_TURNS + TOOL_RESULT, "tools": TOOLS}
    call, answer = trained(tokenizer, found)
    assert "add" in call
    assert "think" not in call + answer
    assert re.search(r"<\S+>\s*$", call)  # it ends in a token
    assert re.search(r"two<\S+>\s*$", answer)
    assert "output" not in answer
    text = tokenizer.decode(encode(tokenizer, found)["input_ids"][0])
    if name != "deepseekv3":  # which has no place for the list of tools, and is told so below
        assert "adds" in text


def test_json_text_and_objects_say_the_same(tiny_tokenizer):
    import json

    tokenizer = published(tiny_tokenizer, "qwen3")
    objects = [{"function": {"name": "add", "arguments": {"x": 1}}}]
    spelled = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": json.dumps(CALL)}],
               "tools": json.dumps(TOOLS)}  # fmt: skip
    plain = {"messages": [USER, {"role": "assistant", "tool_calls": objects}], "tools": TOOLS}
    assert encode(tokenizer, spelled) == encode(tokenizer, plain)


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", ["qwen3", "gptoss", "qwen3_8"])
def test_reasoning_is_trained_under_any_of_its_names(tiny_tokenizer, name, field):
    tokenizer = published(tiny_tokenizer, name)
    (text,) = trained(tokenizer, {"messages": [USER, {**ASSISTANT, field: "easy"}]})
    assert 0 <= text.index("easy") < text.index("two")


def test_reasoning_that_a_template_drops_is_refused_and_the_way_out_works(tiny_tokenizer):
    turns = [USER, {**ASSISTANT, "reasoning_content": "easy"}, *TURNS[2:]]
    tokenizer = published(tiny_tokenizer, "gptoss")  # keeps the reasoning of the last turn only
    with pytest.raises(DataError, match=r"^row 7: .*reasoning of message 2.*train_on: last.*weight 0"):
        encode(tokenizer, {"messages": turns})
    assert len(trained(tokenizer, {"messages": turns}, train_on="last")) == 1
    assert len(trained(tokenizer, {"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]})) == 1
    inline = [USER, {"role": "assistant", "content": "<think>easy</think>two"}]
    with pytest.raises(DataError, match=r"reasoning of message 2"):
        encode(published(tiny_tokenizer, "deepseekv3"), {"messages": inline})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"messages": TOOL_TURNS}, r"tool_calls of message 2"),
        ({"messages": [USER, ASSISTANT], "tools": TOOLS}, r"tools.*'add'"),
        ({"messages": [{"role": "critic", "content": "No."}, USER, ASSISTANT]}, r"message 1 \(critic\)"),
    ],
    ids=["tool_calls", "tools", "role"],
)
def test_what_a_template_leaves_out_is_named(tiny_tokenizer, found, said):
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'critic' %}")
    with pytest.raises(DataError, match=rf"^row 7: .*leaves out.*{said}.*chat_template_path"):
        encode(with_template(tiny_tokenizer, template), found)


def test_a_template_without_marks_that_rewrites_earlier_turns_is_refused_and_the_way_out_works(tiny_tokenizer):
    template = UNMARKED.replace("<|im_end|>", "{% if loop.last and m.role == 'assistant' %} !{% endif %}<|im_end|>")
    tokenizer = with_template(tiny_tokenizer, template, "<|im_end|>")
    with pytest.raises(DataError, match=r"^row 7: .*message 2 differently.*train_on: last"):
        encode(tokenizer, {"messages": TURNS})
    assert trained(tokenizer, {"messages": TURNS}, train_on="last") == ["five !<|im_end|>\n"]


def test_variables_of_the_template_and_further_fields_reach_it(tiny_tokenizer):
    template = CHATML.replace("{{ m.role }}\n", "{{ m.role }}{{ m.mood }}{{ style }}\n")
    tokenizer = with_template(tiny_tokenizer, template)
    found = {"messages": [{**USER, "mood": "gay"}, ASSISTANT], "chat_template_kwargs": {"style": "dry"}}
    assert "usergaydry\n" in tokenizer.decode(encode(tokenizer, found)["input_ids"][0])


@pytest.mark.parametrize("broken", ["{{ raise_exception('no') }}", "{{ 1 + 'a' }}", "{{ m.a.b }}", "{{ 1 // 0 }}"])
def test_whatever_a_template_raises_is_one_line_with_the_row(tiny_tokenizer, broken):
    template = CHATML.replace(
        "{{ m.role }}\n", "{{ m.role }}\n{% if m.content == 'one plus one' %}" + broken + "{% endif %}"
    )
    with pytest.raises(DataError, match=r"^row 7: .*refuses the messages.*Correct the row"):
        encode(with_template(tiny_tokenizer, template), {"messages": TURNS})


# --- questions with answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3", "gemma3", "phi3", "gptoss", "glm4moe", "qwen3_8"])
def test_a_question_in_the_chat_template_has_the_very_ids_of_inference(tiny_tokenizer, name):
    from eval.generate.prompts import PROMPTS

    tokenizer = published(tiny_tokenizer, name)
    encoded = encode(tokenizer, {"question": "one plus one", "answer": "two\n#### 2"}, prompt_template="chat")
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    prompt = chat_prompt_ids(tokenizer, "one plus one")
    text = PROMPTS["chat_question"].build("one plus one", tokenizer)
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert [label == -100 for label in labels[: len(prompt) + 1]] == [True] * len(prompt) + [False]
    (said,) = trained_texts(tokenizer, encoded)
    assert re.search(r"two\nThe answer is: 2<\S+>\s*$", said)


def test_a_system_prompt_and_earlier_turns_need_the_chat_template(tiny_tokenizer):
    tokenizer = published(tiny_tokenizer, "qwen2_5")
    found = {"instruction": "and three", "output": "five", "system": "Be brief.", "history": [["one plus one", "two"]]}
    with pytest.raises(DataError, match=r"^row 7 .*prompt_template='plain'.*prompt_template: chat"):
        encode(tokenizer, found, prompt_template="plain")
    ids = encode(tokenizer, found, prompt_template="chat")["input_ids"]
    spelled = {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}
    assert ids == encode(tokenizer, spelled)["input_ids"]
    assert trained(tokenizer, found, prompt_template="chat", train_on="last") == ["five<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template.*chat_template_path, or set prompt_template: plain"),
        (CHATML.split("{% if add")[0], "nothing for add_generation_prompt"),
        (CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>"), "'chat'.*<think>.*chat_template"),
    ],
    ids=["none", "no prompt", "another beginning"],
)
def test_prompt_template_chat_is_refused_where_training_would_not_start_as_inference(tiny_tokenizer, template, said):
    tokenizer = with_template(tiny_tokenizer, template) if template else tiny_tokenizer
    with pytest.raises(DataError, match=said):
        Encoder(tokenizer, "template", prompt_template="chat")


# --- twice the same token ---------------------------------------------------------------------------------------------


def test_a_turn_that_ends_in_the_end_token_already_has_one(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, "<s>" + CHATML, "<|im_end|>")
    plain = encode(tokenizer, {"messages": TURNS})
    ended = [{**TURNS[0], "content": "<s>one plus one"}, {**TURNS[1], "content": "two<|im_end|>\n"}, *TURNS[2:]]
    assert encode(tokenizer, {"messages": ended}) == plain | {"notes": [6]}
