"""Every form of row becomes a checked Row, and a row that cannot is refused with its place and the way out."""

import json
import re
from dataclasses import replace

import pytest
import yaml

from matrix_llm.base.errors import DataError
from matrix_llm.data.forms import FORMS, Row, boxed_response, gsm8k_response, parse_row
from matrix_llm.data.readers import Source

USER, ASSISTANT = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
EXAMPLES = {
    "messages": ({"messages": [USER, ASSISTANT]}, Row("chat", messages=[USER, ASSISTANT])),
    "prompt/completion": ({"prompt": "1 + 1 =", "completion": " 2"}, Row("verbatim", "1 + 1 =", " 2")),
    "conversations": (
        {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
        Row("chat", messages=[USER, ASSISTANT]),
    ),
    "query/response": ({"query": "1 + 1?", "response": "2"}, Row("template", "1 + 1?", "2")),
    "question/answer": ({"question": "1 + 1?", "answer": "#### 2"}, Row("template", "1 + 1?", "The answer is: 2")),
    "problem/solution": ({"problem": "1 + 1?", "solution": "2"}, Row("template", "1 + 1?", "2")),
    "instruction/output": ({"instruction": "1 + 1?", "output": "2"}, Row("template", "1 + 1?", "2")),
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
        "messages": "1 + 1?", "conversations": "1 + 1?", "prompt/completion": "1 + 1 =", "query/response": "1 + 1?",
        "question/answer": "1 + 1?", "problem/solution": "1 + 1?", "instruction/output": "1 + 1?",
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
    message = refusal({"exercise": "1", "key": "2"})
    assert "exercise, key" in message
    assert all(field in message for form in FORMS.values() for field in form.fields)


@pytest.mark.parametrize(
    ("solution", "said"),
    [
        (r"So $\boxed{7}$.", "7"),
        (r"First \boxed{1}, then $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"It is \boxed{\text{even}} \fbox{ 3 }.", "3"),
        (r"so $\boxed 5$, then", "5"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{7}." + "\nThe answer is: 7", None),
        (r"\boxed{7", None),
        (r"\boxed{}", None),
        (r"\boxedminus 7", None),
        ("It is 7.", None),
    ],
)
def test_a_boxed_answer_is_said_in_metamaths_sentence_once(solution, said):
    expected = solution if said is None else f"{solution}\nThe answer is: {said}"
    assert boxed_response(solution) == expected
    for problem, answer in (("problem", "solution"), ("question", "answer")):
        found = {problem: "1 + 1?", answer: solution}
        assert parse_row(found, "here").answer == expected
        assert parse_row(found, "here", boxed_answers="keep").answer == solution
    assert parse_row({"query": "1 + 1?", "response": solution}, "here").answer == solution  # MetaMathQA says it itself


@pytest.mark.parametrize("given", [None, "", "  "])
def test_an_alpaca_input_follows_its_instruction_and_may_be_missing(given):
    assert parse_row({"instruction": "Add.", "input": "1, 1", "output": "2"}, "here").question == "Add.\n1, 1"
    assert parse_row({"instruction": "Add.", "input": given, "output": "2"}, "here").question == "Add."


# --- columns that any form may have -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_weight_0_says_so_and_other_weights_are_refused(form):
    found, row = EXAMPLES[form]
    assert parse_row({**found, "weight": 0}, "here").weight == 0
    assert parse_row({**found, "weight": 1.0}, "here") == parse_row({**found, "weight": None}, "here") == row
    for weight in (0.5, 2, -1, float("nan"), "heavy", [1]):
        assert "`weight`" in (said := refusal({**found, "weight": weight}))
        assert "0 or 1" in said


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["train", "training"])
def test_a_row_may_be_left_out_in_the_spellings_of_a_turn(form, name):
    found, row = EXAMPLES[form]
    assert parse_row({**found, name: False}, "here").weight == 0
    assert parse_row({**found, name: True}, "here") == parse_row({**found, name: "a split's name"}, "here") == row
    assert "disagree" in refusal({**found, name: True, "weight": 0})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", [True, False])
def test_rows_that_are_labelled_good_or_bad_are_not_all_trained(form, label):
    found, row = EXAMPLES[form]
    assert "columns: {weight: label}" in refusal({**found, "label": label})
    assert parse_row({**found, "label": "algebra"}, "here") == row


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["loss_weight", "sample_weight", "loss_mask", "completion_mask", "assistant_masks", "mask", "weights"]
)
def test_other_columns_that_say_what_is_trained_are_refused(form, name):
    found, row = EXAMPLES[form]
    assert re.search(rf"`{name}`.*`weight`", refusal({**found, name: [0, 1]}))
    assert parse_row({**found, name: None}, "here") == row


CONTEXT = {
    "system": "Be brief.", "system_prompt": "Be brief.", "system_message": "Be brief.",
    "history": [["0 + 1?", "1"]], "tools": [{"name": "add"}],
    "chat_template_kwargs": {"style": "dry"},
}  # fmt: skip


@pytest.mark.parametrize("name", CONTEXT)
@pytest.mark.parametrize("form", FORMS)
def test_a_column_that_changes_what_the_model_sees_is_kept_or_refused(form, name):
    found, row = EXAMPLES[form]
    for nothing in (None, "", [], "[]"):
        assert parse_row({**found, name: nothing}, "here") == row
    if row.layout in ("verbatim", "text"):
        assert re.search(rf"`{name}`.*no place for it.*messages", refusal({**found, name: CONTEXT[name]}))
    else:
        assert parse_row({**found, name: CONTEXT[name]}, "here") != row


def test_system_and_history_come_before_the_turns():
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "0 + 1?"},
              {"role": "assistant", "content": "1"}]  # fmt: skip
    for form in ("messages", "query/response"):
        found, row = EXAMPLES[form]
        given = parse_row({**found, "system": CONTEXT["system"], "history": CONTEXT["history"]}, "here")
        assert given.messages == before + (row.messages or [])
        assert parse_row({**found, "system_prompt": "Be brief."}, "here").messages == before[:1] + (row.messages or [])
        assert "`system_prompt`" in refusal({**found, "system": "Be brief.", "system_prompt": "Be long."})
    assert "system" in refusal({"messages": [before[0], USER, ASSISTANT], "system": "Be brief."})


@pytest.mark.parametrize("name", ["images", "image", "audio", "video", "documents"])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_text_model_cannot_be_shown_is_refused(form, name):
    found, row = EXAMPLES[form]
    assert re.search(rf"`{name}`.*columns: {{id: {name}}}", refusal({**found, name: ["x"]}))
    assert parse_row({**found, name: None}, "here") == row


@pytest.mark.parametrize(
    "found",
    [
        {"prompt": [USER], "completion": "2"},
        {"prompt": "1 + 1?", "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": [USER]},
        {"prompt": [], "completion": [ASSISTANT]},
        {"instruction": "1 + 1?", "output": "2", "history": [["1"]]},
        {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tokenize": False}},
        {"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]},
    ],
    ids=str,
)
def test_half_a_conversation_is_refused(found):
    refusal(found)


@pytest.mark.parametrize(
    ("found", "column"),
    [
        ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "completion"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]}, "completion"),
        ({"prompt": "1 + 1?", "chosen": [USER, ASSISTANT], "rejected": [USER]}, "messages"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, "messages"),
        ({"question": "1 + 1?", "chosen": "2", "rejected": "3"}, "answer"),
        ({"chosen": "Human: 1 + 1? Assistant: 2", "rejected": "3"}, "text"),
    ],
    ids=str,
)
def test_a_preference_pair_is_refused_and_the_way_out_trains_the_chosen_answer(found, column, tmp_path):
    assert f"columns: {{{column}: chosen}}" in refusal(found)
    (tmp_path / "a.jsonl").write_text(json.dumps(found))
    (row,) = Source(str(tmp_path / "a.jsonl"), columns={column: "chosen"}).rows()
    assert "2" in str(row)
    assert "3" not in str(row)


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_label_of_wanted_completions_is_refused_and_the_way_out_leaves_the_others_out(is_wanted, tmp_path):
    found = {"prompt": "1 + 1?", "completion": "2", "label": is_wanted}
    assert "columns: {weight: label}" in refusal(found)
    (tmp_path / "a.jsonl").write_text(json.dumps(found))
    (row,) = Source(str(tmp_path / "a.jsonl"), columns={"weight": "label"}).rows()
    assert row.weight == is_wanted


@pytest.mark.parametrize("name", ["context", "input"])
@pytest.mark.parametrize("form", [name for name in FORMS if EXAMPLES[name][1].layout == "template"])
def test_a_passage_that_the_question_is_about_is_read_or_refused(form, name, tmp_path):
    found, row = EXAMPLES[form]
    assert parse_row({**found, name: ""}, "here") == row
    found = {**found, name: "Count in base 3."}
    if (form, name) != ("instruction/output", "input"):
        said = re.search(r"columns: ({.*?}), or ({.*?}) to leave it out", refusal(found))
        (tmp_path / "a.jsonl").write_text(json.dumps(found))
        source = Source(str(tmp_path / "a.jsonl"))
        (without,) = replace(source, columns=yaml.safe_load(said[2])).rows()
        assert without == row
        (found,) = (each for _, each in replace(source, columns=yaml.safe_load(said[1])).read())
    assert parse_row(found, "here").question == "1 + 1?\nCount in base 3."


def test_gsm8k_answers_read_as_metamath_responses():
    answer = "48/2 = <<48/2=24>>24 clips.\nSo 48+24 = <<48+24=72>>72.\n#### 72"
    assert gsm8k_response(answer) == "48/2 = 24 clips.\nSo 48+24 = 72.\nThe answer is: 72"
    assert gsm8k_response("plain << text") == "plain << text"
