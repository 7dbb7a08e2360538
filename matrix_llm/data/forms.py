"""Turn an object from a file into a checked `Row`. Only this module knows the forms in which data sets write rows.

    {"query": "1 + 1?", "response": "2", "type": "x"}      ->  Row(layout="template", question="1 + 1?", answer="2")
    {"question": "1 + 1?", "answer": "#### 2"}             ->  Row(layout="template", question="1 + 1?",
                                                                   answer="The answer is: 2")
    {"prompt": "1 + 1 =", "completion": " 2"}              ->  Row(layout="verbatim", question="1 + 1 =", answer=" 2")
    {"text": "Two is even."}                               ->  Row(layout="text", answer="Two is even.")
    {"messages": [{"role": "user", "content": "Hi"}, ..]}  ->  Row(layout="chat", messages=[...])

To add a form, write a function that turns such an object into a `Row`, and add it to FORMS.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from matrix_llm.base.errors import DataError


@dataclass(frozen=True)
class Row:
    """One training example, checked."""

    layout: str = "template"
    """How it becomes tokens, one of the encoders of tokens.py: "template", "verbatim", "text" or "chat"."""
    question: str = ""
    """What the model is asked; empty for "text" and "chat"."""
    answer: str = ""
    """What the model is trained to write; for "text", the entire row; empty for "chat"."""
    messages: list[dict[str, str]] | None = None
    """For "chat": {"role", "content"} of each turn; only the assistant's turns are trained."""

    @property
    def asked(self) -> str:
        """The part to compare with test questions: the question, the user's messages, or the full text."""
        if self.messages is not None:
            return "\n".join(message["content"] for message in self.messages if message["role"] == "user")
        return self.question or self.answer


def rows_from_columns(columns: Mapping[str, list]) -> list[Row]:
    """The rows of a batch as `datasets` gives it: a list of values for each field of `Row`.

    >>> rows_from_columns({"layout": ["text"], "question": [""], "answer": ["Two is even."], "messages": [None]})
    [Row(layout='text', question='', answer='Two is even.', messages=None)]
    """
    return [Row(*values) for values in zip(*(columns[field.name] for field in fields(Row)), strict=True)]


@dataclass(frozen=True)
class Form:
    """One way in which data sets write their rows."""

    fields: tuple[str, ...]
    """Every row must have these; others are ignored."""
    parse: Callable[[dict[str, Any], str], Row]
    """Makes a row from an object that has the fields; its second argument is the object's place, for error messages."""


def parse_row(found: Any, where: str, form: str | None = None) -> Row:
    """The row that the object `found` represents.

    Args:
        where: the object's place, which opens every error message: "data/train.jsonl line 3".
        form: a key of FORMS, whose fields the object must have; None takes the first form that fits.

    Raises:
        DataError: the object does not have this form, or a field cannot be used.

    >>> parse_row({"query": "1 + 1?", "response": "2", "type": "GSM_Rephrased"}, "a.jsonl line 1")
    Row(layout='template', question='1 + 1?', answer='2', messages=None)
    """
    if form is None:
        form = detect_form(found, where)
    needed = FORMS[form].fields
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected an object with {' and '.join(needed)}, found {_describe(found)}.")
    for name in needed:
        if name not in found:
            has = ", ".join(map(str, found)) or "no fields"
            raise DataError(f"{where}: no `{name}`; the row has {has}. Every row needs {' and '.join(needed)}.")
    return FORMS[form].parse(found, where)


def detect_form(found: Any, where: str) -> str:
    """The first of FORMS whose fields the object has.

    >>> detect_form({"query": "1 + 1?", "response": "2", "original_question": "1 + 1?"}, "a.jsonl line 1")
    'query/response'
    """
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected an object, found {_describe(found)}.")
    for name, form in FORMS.items():
        if all(field in found for field in form.fields):
            return name
    # Half of a pair is most likely a misspelling of the other half, so name that pair rather than all forms
    pairs = [form.fields for form in FORMS.values() if len(form.fields) == 2]
    halves = [(has, lacks) for pair in pairs for has, lacks in (pair, pair[::-1]) if has in found]
    described = f"has the fields {', '.join(map(str, found)) or '(none)'}"
    if halves:
        described = "has `{}` but no `{}`".format(*halves[0])
    known = "; ".join(" and ".join(form.fields) for form in FORMS.values())
    raise DataError(f"{where}: the row {described}. A row needs one of: {known}. Rename its fields.")


# --- one function for each form ---------------------------------------------------------------------------------------


def _query_response(found: dict[str, Any], where: str) -> Row:
    return Row("template", _text(found, "query", where), _text(found, "response", where))


def _question_answer(found: dict[str, Any], where: str) -> Row:
    return Row("template", _text(found, "question", where), gsm8k_response(_text(found, "answer", where)))


def _prompt_completion(found: dict[str, Any], where: str) -> Row:
    return Row("verbatim", _text(found, "prompt", where), _text(found, "completion", where))


def _plain_text(found: dict[str, Any], where: str) -> Row:
    return Row("text", answer=_text(found, "text", where))


def _conversation(found: dict[str, Any], where: str) -> Row:
    messages = found["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: `messages` is {_describe(messages)}, but it must be a list of role and content.")
    checked = [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]
    if all(message["role"] != "assistant" for message in checked):
        raise DataError(f"{where}: no message has the role assistant, so there is nothing to train on. Remove the row.")
    return Row("chat", messages=checked)


FORMS: dict[str, Form] = {  # in order of precedence: a row that fits several takes the first
    "messages": Form(("messages",), _conversation),
    "prompt/completion": Form(("prompt", "completion"), _prompt_completion),
    "query/response": Form(("query", "response"), _query_response),  # MetaMathQA
    "question/answer": Form(("question", "answer"), _question_answer),  # GSM8K
    "text": Form(("text",), _plain_text),
}


# --- shared by the forms ----------------------------------------------------------------------------------------------


def gsm8k_response(answer: str) -> str:
    """GSM8K's answer as a response: without calculator annotations, and ending as MetaMathQA's responses do.

    >>> gsm8k_response("48/2 = <<48/2=24>>24 clips.\\n#### 24")
    '48/2 = 24 clips.\\nThe answer is: 24'
    """
    if not re.search(r"^#### ", answer, flags=re.MULTILINE):
        return answer
    return re.sub(r"^#### ", "The answer is: ", re.sub(r"<<[^<>]*>>", "", answer), flags=re.MULTILINE)


def _text(found: dict[str, Any], name: str, where: str) -> str:
    """The text under `name`: valid Unicode, and not blank."""
    value = found[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: `{name}` is {_describe(value)}, but it must be a text. Correct or remove the row.")
    _check_unicode(value, name, where)
    if not value.strip():
        raise DataError(f"{where}: `{name}` is empty. Fill it in, or remove the row.")
    return value


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_describe(message)}, but a message is an object with `role` and `content`.")
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            raise DataError(f"{where} has `{name}` = {_describe(message.get(name))}, but it must be a text.")
        _check_unicode(message[name], name, where)
    return {"role": message["role"], "content": message["content"]}


def _check_unicode(text: str, name: str, where: str) -> None:
    try:
        text.encode()  # JSON's "\ud83d" alone decodes to a str that no file, tokenizer or Arrow table can hold
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: `{name}` contains half of a surrogate pair, which is not valid text. "
            "Correct its escape sequences."
        ) from None


def _describe(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
