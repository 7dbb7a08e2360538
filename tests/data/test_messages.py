"""Messages in any of the usual spellings become one; what cannot be used is named, whatever it is."""

import json
import random

import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data.forms import parse_row, rows_from_columns
from matrix_llm.data.messages import read_conversation

USER, ASSISTANT = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
CALL = {"name": "add", "arguments": {"x": 1}}
READ_CALL = [{"type": "function", "function": CALL}]


def read(*messages):
    return read_conversation(list(messages), "messages", "a.jsonl line 3")[0]


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ({"from": "human", "value": "1 + 1?"}, USER),
        ({"from": "chatgpt", "value": "2"}, ASSISTANT),
        ({"role": "model", "content": "2"}, ASSISTANT),
        ({"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]}, USER),
        ({"role": "user", "content": ["1 + ", "1?"]}, USER),
        ({"from": "observation", "value": "2"}, {"role": "tool", "content": "2"}),
        ({**ASSISTANT, "tool_calls": None, "weight": None, "name": None}, ASSISTANT),  # as Parquet writes it
        ({**ASSISTANT, "tool_calls": []}, ASSISTANT),
        ({**ASSISTANT, "thinking": "easy"}, {**ASSISTANT, "reasoning_content": "easy"}),
        ({**USER, "name": "Ana", "id": 7}, {**USER, "name": "Ana", "id": 7}),
        (
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
        ),
    ],
    ids=str,
)
def test_each_spelling_becomes_the_one_that_templates_read(spelled, expected):
    assert read(spelled) == [expected]


@pytest.mark.parametrize(
    "spelled",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {**CALL, "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": {**CALL, "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
    ids=str,
)
def test_each_spelling_of_a_call_becomes_one(spelled):
    assert read(spelled) == [{"role": "assistant", "content": "", "tool_calls": READ_CALL}]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "content": ""}, "`content`.*empty.*weight: 0"),
        ({"role": "assistant", "content": " ", "tool_calls": []}, "`content`.*empty"),
        ({"role": "assistant", "content": None}, "`content` = null"),
        ({"role": "user", "content": 7}, "`content` = int '7'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "type 'image_url'"),
        ({"role": "user", "content": [{"text": None}]}, "`content`"),
        ({"role": None, "content": "x"}, "`role` = null"),
        ({"from": "martian", "value": "x"}, "`from` = 'martian'.*human"),
        ({"from": "human", "value": None}, "`content` = null|`value`"),
        ({**ASSISTANT, "weight": 0.5}, "`weight`.*0 or 1"),
        ({**ASSISTANT, "train": "yes"}, "`train`.*0 or 1"),
        ({**ASSISTANT, "weight": 0, "train": True}, "disagree"),
        ({**USER, "train": True}, "`train`.*turn of the user"),
        ({**ASSISTANT, "train_detail": [{"begin_offset": 0}]}, "`train_detail`.*`weight`"),
        ({**ASSISTANT, "loss_mask": [0, 1]}, "`loss_mask`"),
        ({**USER, "images": ["x.png"]}, "`images`"),
        ({**ASSISTANT, "reasoning": "a", "thinking": "b"}, "`thinking`.*`reasoning`"),
        ({**ASSISTANT, "reasoning_content": 7}, "`reasoning_content` = int"),
        ({**ASSISTANT, "tool_calls": "[{"}, "`tool_calls` is not JSON"),
        ({**ASSISTANT, "tool_calls": [7]}, "`tool_calls`.*`function`"),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": ""}}]}, "`tool_calls`.*`name`"),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "arguments of f"),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "\ud83d"}}}]}, "surrogate"),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}, "arguments of f"),
        ({**ASSISTANT, "note": "\ud83d"}, "`note`.*surrogate"),
        ({**ASSISTANT, "\ud83d": 1}, "surrogate"),
        ({"role": "\ud83d", "content": "x"}, "`role`.*surrogate"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_what_cannot_be_used_is_named_with_its_place(message, said):
    with pytest.raises(DataError, match=rf"^a.jsonl line 3: message 2.*({said})") as error:
        read(USER, message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tools", ["[", "{}}", [7], {"name": "add"}, "[" * 100_000, [{"name": "\ud83d"}]], ids=ascii)
def test_tools_that_cannot_be_used_are_named(tools):
    with pytest.raises(DataError, match=r"^a.jsonl line 3: `tools`"):
        parse_row({"messages": [USER, ASSISTANT], "tools": tools}, "a.jsonl line 3")


def test_a_conversation_comes_out_of_an_arrow_table_as_it_went_in():
    messages = [USER, {"role": "assistant", "content": "a\0b", "tool_calls": [CALL], "weight": 0}, USER, ASSISTANT]
    row = parse_row({"messages": messages, "tools": [{"name": "add"}], "weight": 0}, "here")
    assert row.trained == [False, False, False, True]
    assert rows_from_columns({name: [value] for name, value in row.record().items()}) == [row]


def test_no_value_in_any_field_is_a_traceback():
    """10,000 rows in which some field has been replaced, at a fixed seed."""
    values = [None, "", " ", 7, 0.5, True, [], {}, [[]], [None], {"a": None}, "\ud83d", "\0", "[1", "{}", [{}], b"x",
              float("nan"), [USER], {"type": "text"}, [{"type": "text"}], "null", -(10**30)]  # fmt: skip
    fields = ["role", "content", "from", "value", "tool_calls", "name", "weight", "train", "reasoning", "function_call"]
    columns = ["messages", "conversations", "prompt", "completion", "query", "response", "problem", "solution", "text",
               "instruction", "input", "output", "tools", "weight", "system", "history",
               "chat_template_kwargs"]  # fmt: skip
    draw = random.Random(1)
    outcomes = {"row": 0, "refused": 0}
    for _ in range(10_000):
        message = dict(draw.choice([USER, ASSISTANT]))
        message.update({draw.choice(fields): draw.choice(values) for _ in range(draw.randint(0, 2))})
        found = {"messages": [USER, message, ASSISTANT]}
        found.update({draw.choice(columns): draw.choice(values) for _ in range(draw.randint(0, 3))})
        try:
            json.dumps(parse_row(found, "here").record(), ensure_ascii=False).encode()
            outcomes["row"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 1000
