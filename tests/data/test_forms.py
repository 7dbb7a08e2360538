"""Every form of row becomes a checked Row, and a row that cannot is refused with its place and the way out."""

import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data.forms import FORMS, Row, gsm8k_response, parse_row

USER, ASSISTANT = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
EXAMPLES = {
    "messages": ({"messages": [USER, ASSISTANT]}, Row("chat", messages=[USER, ASSISTANT])),
    "prompt/completion": ({"prompt": "1 + 1 =", "completion": " 2"}, Row("verbatim", "1 + 1 =", " 2")),
    "query/response": ({"query": "1 + 1?", "response": "2"}, Row("template", "1 + 1?", "2")),
    "question/answer": ({"question": "1 + 1?", "answer": "#### 2"}, Row("template", "1 + 1?", "The answer is: 2")),
    "text": ({"text": "Two is even."}, Row("text", answer="Two is even.")),
}


def refusal(found, form=None) -> str:
    with pytest.raises(DataError) as error:
        parse_row(found, "a.jsonl line 3", form)
    message = str(error.value)
    assert message.startswith("a.jsonl line 3")
    return message


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_its_row_whatever_else_the_object_holds(form):
    found, row = EXAMPLES[form]
    assert parse_row(found, "here") == parse_row({**found, "type": "x"}, "here") == row


def test_what_is_compared_with_test_questions_is_what_is_asked():
    asked = {form: parse_row(found, "here").asked for form, (found, _) in EXAMPLES.items()}
    assert asked == {
        "messages": "1 + 1?", "prompt/completion": "1 + 1 =", "query/response": "1 + 1?", "question/answer": "1 + 1?",
        "text": "Two is even.",
    }  # fmt: skip
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        ASSISTANT,
        {"role": "user", "content": "And 2?"},
        ASSISTANT,
    ]
    assert parse_row({"messages": turns}, "here").asked == "1 + 1?\nAnd 2?"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([1, 2], "expected an object.*list"),
        (None, "expected an object.*null"),
        ({"query": "1 + 1?"}, "no `response`.*has query"),
        ({"query": "1 + 1?", "response": None}, "`response` is null"),
        ({"query": "1 + 1?", "response": "  "}, "`response` is empty.*remove the row"),
        ({"query": "1 + 1?", "response": 2}, "`response` is int '2'"),
        ({"query": "\ud83d", "response": "2"}, "`query`.*half of a surrogate pair"),
    ],
    ids=str,
)
def test_an_unusable_row_is_named_with_its_field(found, said):
    with pytest.raises(DataError, match=rf"^a.jsonl line 3: {said}"):
        parse_row(found, "a.jsonl line 3", "query/response")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "`messages`.*list of role and content"),
        ([{"role": "user"}], "message 1.*`content` = null"),
        (["hello"], "message 1 is str 'hello'"),
        ([USER], "no message has the role assistant.*Remove the row"),
        ([USER, {"role": "assistant", "content": "\ud83d"}], "message 2: `content`.*half of a surrogate pair"),
    ],
    ids=str,
)
def test_malformed_messages_are_named(messages, said):
    with pytest.raises(DataError, match=rf"^a.jsonl line 3: {said}"):
        parse_row({"messages": messages}, "a.jsonl line 3")


def test_an_unknown_form_names_what_is_missing():
    assert "`query` but no `response`" in refusal({"query": "1"})
    message = refusal({"problem": "1", "solution": "2"})
    assert "problem, solution" in message
    assert all(field in message for form in FORMS.values() for field in form.fields)


def test_gsm8k_answers_read_as_metamath_responses():
    answer = "48/2 = <<48/2=24>>24 clips.\nSo 48+24 = <<48+24=72>>72.\n#### 72"
    assert gsm8k_response(answer) == "48/2 = 24 clips.\nSo 48+24 = 72.\nThe answer is: 72"
    assert gsm8k_response("plain << text") == "plain << text"
