"""Turn an object from a file into a checked `Row`. Only this module knows the forms in which data sets write rows.

    {"query": "1 + 1?", "response": "2", "type": "x"}      ->  Row(layout="template", question="1 + 1?", answer="2")
    {"question": "1 + 1?", "answer": "#### 2"}             ->  Row(layout="template", question="1 + 1?",
                                                                   answer="The answer is: 2")
    {"instruction": "Add.", "input": "1, 1", "output": "2"} -> Row(layout="template", question="Add.\\n1, 1",
                                                                   answer="2")
    {"prompt": "1 + 1 =", "completion": " 2"}              ->  Row(layout="verbatim", question="1 + 1 =", answer=" 2")
    {"text": "Two is even."}                               ->  Row(layout="text", answer="Two is even.")
    {"messages": [{"role": "user", "content": "Hi"}, ..]}  ->  Row(layout="chat", messages=[...])

The messages of a conversation are read by `matrix_llm.data.messages`. To add a form, write a function that turns such
an object into a `Row`, and add it to FORMS.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from matrix_llm.base.errors import DataError
from matrix_llm.base.values import check_choice
from matrix_llm.data.messages import (
    IS_TRAINED,
    check_unicode,
    describe,
    is_given,
    read_conversation,
    read_flag,
    read_template_kwargs,
    read_tools,
)

BOXED_ANSWERS = ["sentence", "keep"]


@dataclass(frozen=True)
class Row:
    """One training example, checked."""

    layout: str = "template"
    """How it becomes tokens, one of the encoders of tokens.py: "template", "verbatim", "text" or "chat"."""
    question: str = ""
    """What the model is asked; empty for "text" and "chat"."""
    answer: str = ""
    """What the model is trained to write; for "text", the entire row; empty for "chat"."""
    messages: list[dict[str, Any]] | None = None
    """For "chat": {"role", "content", ...} of each turn; for "template": the turns that precede the question."""
    tools: list[dict[str, Any]] | None = None
    """The functions that the chat template describes to the model."""
    trained: list[bool] | None = None
    """Whether each message is trained; None: every turn of the assistant."""
    template_kwargs: dict[str, Any] | None = None
    """More variables for the chat template."""
    weight: int = 1
    """0: the row is left out, and counted."""

    @property
    def asked(self) -> str:
        """The part to compare with test questions: the question, the user's messages, or the full text."""
        if self.layout == "chat":
            return "\n".join(each["content"] for each in self.messages or [] if each["role"] == "user")
        return self.question or self.answer

    def record(self) -> dict[str, Any]:
        """The row for an Arrow table: what has a form of its own in each row is JSON text there.

        >>> Row("chat", messages=[{"role": "user", "content": "Hi"}]).record()["messages"]
        '[{"role": "user", "content": "Hi"}]'
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {name: None if values[name] is None else json.dumps(values[name]) for name in AS_JSON}


AS_JSON = ("messages", "tools", "trained", "template_kwargs")


def rows_from_columns(columns: Mapping[str, list]) -> list[Row]:
    """The rows of a batch as `datasets` gives it: a list of values for each field of `Row`, as `Row.record` has them.

    >>> record = Row("text", answer="Two is even.").record()
    >>> rows_from_columns({name: [value] for name, value in record.items()})[0].answer
    'Two is even.'
    """
    names = [field.name for field in fields(Row)]
    decoded = [
        [None if value is None else json.loads(value) for value in columns[name]] if name in AS_JSON else columns[name]
        for name in names
    ]
    return [Row(*values) for values in zip(*decoded, strict=True)]


@dataclass(frozen=True)
class Form:
    """One way in which data sets write their rows."""

    fields: tuple[str, ...]
    """Every row must have these; others are ignored, except those that change what is trained (CONTEXT and below)."""
    parse: Callable[[dict[str, Any], str], Row]
    """Makes a row from an object that has the fields; its second argument is the object's place, for error messages."""
    has_boxed: bool = False
    r"""Whether an answer in \boxed{} is said in a sentence as well, unless boxed_answers is "keep"."""
    optional: tuple[str, ...] = ()
    """Fields that it reads where a row has them."""


# Columns of any row that change what is trained: they are honoured where the row's layout can, else refused
CONTEXT = ("system", "system_prompt", "system_message", "history", "tools", "functions", "chat_template_kwargs")
LOST = ("image", "images", "video", "videos", "audio", "audios", "documents")
PASSAGES = ("context", "input")  # what a question may be about: read by the forms that say so, else refused
MASKS = (
    "loss_weight", "sample_weight", "loss_mask", "completion_mask", "assistant_masks", "train_detail", "mask",
    "weights",
)  # fmt: skip
SYSTEM = ("system", "system_prompt", "system_message")  # spellings of one column


def parse_row(found: Any, where: str, form: str | None = None, *, boxed_answers: str = "sentence") -> Row:
    r"""The row that the object `found` represents.

    Args:
        where: the object's place, which opens every error message: "data/train.jsonl line 3".
        form: a key of FORMS, whose fields the object must have; None takes the first form that fits.
        boxed_answers: "sentence" adds "The answer is: x" to a solution that ends in \boxed{x}; "keep" adds nothing.

    Raises:
        DataError: the object does not have this form, or a field cannot be used.

    >>> row = parse_row({"query": "1 + 1?", "response": "2", "type": "GSM_Rephrased"}, "a.jsonl line 1")
    >>> row.layout, row.question, row.answer
    ('template', '1 + 1?', '2')
    """
    check_choice("boxed_answers", boxed_answers, BOXED_ANSWERS)
    if form is None:
        form = detect_form(found, where)
    needed = FORMS[form].fields
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected an object with {' and '.join(needed)}, found {describe(found)}.")
    for name in needed:
        if name not in found:
            has = ", ".join(map(str, found)) or "no fields"
            raise DataError(f"{where}: no `{name}`; the row has {has}. Every row needs {' and '.join(needed)}.")
    row = FORMS[form].parse(found, where)
    if row.layout == "template":
        _check_passages(found, FORMS[form], where)
    if FORMS[form].has_boxed and boxed_answers == "sentence":
        row = replace(row, answer=boxed_response(row.answer))
    return _with_columns(row, found, where)


def detect_form(found: Any, where: str) -> str:
    """The first of FORMS whose fields the object has.

    >>> detect_form({"query": "1 + 1?", "response": "2", "original_question": "1 + 1?"}, "a.jsonl line 1")
    'query/response'
    """
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected an object, found {describe(found)}.")
    for name, form in FORMS.items():
        if all(field in found for field in form.fields):
            return name
    if "chosen" in found and "rejected" in found:
        raise DataError(
            f"{where}: `chosen` and `rejected` are a preference pair, and pairs are not trained on here. To train on "
            f"the chosen answer alone, set columns: {{{_field_of_chosen(found)}: chosen}}."
        )
    # Half of a pair is most likely a misspelling of the other half, so name that pair rather than all forms
    pairs = [form.fields for form in FORMS.values() if len(form.fields) == 2]
    halves = [(has, lacks) for pair in pairs for has, lacks in (pair, pair[::-1]) if has in found]
    described = f"has the fields {', '.join(map(str, found)) or '(none)'}"
    if halves:
        described = "has `{}` but no `{}`".format(*halves[0])
    known = "; ".join(" and ".join(form.fields) for form in FORMS.values())
    raise DataError(
        f"{where}: the row {described}. A row needs one of: {known}. Rename its fields, or set columns: "
        "{ours: theirs}."
    )


def unread_fields(found: dict[str, Any], form: str) -> list[str]:
    """The fields of an object, among those that are not empty, that `parse_row` ignores. An id says nothing.

    >>> unread_fields({"query": "1 + 1?", "response": "2", "type": "GSM_Rephrased"}, "query/response")
    ['type']
    """
    read = {*FORMS[form].fields, *FORMS[form].optional, *CONTEXT, *IS_TRAINED, "id"}
    return [str(name) for name, value in found.items() if name not in read and is_given(value)]


def _field_of_chosen(found: dict[str, Any]) -> str:
    """The field that the chosen answer of a preference pair would have in one of the forms."""
    if isinstance(found["chosen"], list) and not isinstance(found.get("prompt"), list):
        return "messages"
    pairs = [form.fields for form in FORMS.values() if len(form.fields) == 2]
    return next((answer for question, answer in pairs if question in found), "text")


# --- one function for each form ---------------------------------------------------------------------------------------


def _query_response(found: dict[str, Any], where: str) -> Row:
    return Row("template", _text(found, "query", where), _text(found, "response", where))


def _question_answer(found: dict[str, Any], where: str) -> Row:
    return Row("template", _text(found, "question", where), gsm8k_response(_text(found, "answer", where)))


def _problem_solution(found: dict[str, Any], where: str) -> Row:
    return Row("template", _text(found, "problem", where), _text(found, "solution", where))


def _alpaca(found: dict[str, Any], where: str) -> Row:
    question = _text(found, "instruction", where)
    if is_given(found.get("input")):
        question += "\n" + _text(found, "input", where)
    return Row("template", question, _text(found, "output", where))


def _prompt_completion(found: dict[str, Any], where: str) -> Row:
    prompt, completion = found["prompt"], found["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError(
            f"{where}: `prompt` is {describe(prompt)} and `completion` is {describe(completion)}, but they must be two "
            "texts or two lists of messages. Correct or remove the row."
        )
    if not isinstance(prompt, list):
        return Row("verbatim", _text(found, "prompt", where), _text(found, "completion", where))
    before, _ = read_conversation(prompt, "prompt", where)
    after, trained = read_conversation(completion, "completion", where)
    return _conversation(before + after, [False] * len(before) + trained, where)


def _plain_text(found: dict[str, Any], where: str) -> Row:
    return Row("text", answer=_text(found, "text", where))


def _messages(found: dict[str, Any], where: str) -> Row:
    return _conversation(*read_conversation(found["messages"], "messages", where), where)


def _sharegpt(found: dict[str, Any], where: str) -> Row:
    return _conversation(*read_conversation(found["conversations"], "conversations", where), where)


FORMS: dict[str, Form] = {  # in order of precedence: a row that fits several takes the first
    "messages": Form(("messages",), _messages),
    "conversations": Form(("conversations",), _sharegpt),
    "prompt/completion": Form(("prompt", "completion"), _prompt_completion),
    "query/response": Form(("query", "response"), _query_response),  # MetaMathQA
    "question/answer": Form(("question", "answer"), _question_answer, has_boxed=True),  # GSM8K
    "problem/solution": Form(("problem", "solution"), _problem_solution, has_boxed=True),  # MATH, NuminaMath
    "instruction/output": Form(("instruction", "output"), _alpaca, optional=("input",)),  # Alpaca
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


BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")


def boxed_response(solution: str) -> str:
    r"""A solution of MATH as a response: its last boxed answer is said in MetaMathQA's sentence, unless it is already.

    >>> boxed_response(r"Half of it: $\boxed{\frac{1}{2}}$.")
    'Half of it: $\\boxed{\\frac{1}{2}}$.\nThe answer is: \\frac{1}{2}'
    """
    boxes = list(BOX.finditer(solution))
    if not boxes or "The answer is:" in solution[boxes[-1].end() :]:
        return solution
    answer = _argument(solution[boxes[-1].end() :])
    return f"{solution.rstrip()}\nThe answer is: {answer}" if answer else solution


def _argument(text: str) -> str | None:
    r"""The argument that `text` starts with: "{\frac{1}{2}}$." has "\frac{1}{2}", and " 5$." has "5"."""
    text = text.lstrip()
    if not text.startswith("{"):
        return re.match(r"[^\s$]*", text)[0].rstrip(".,;:") or None  # type: ignore[index]
    depth = 0
    for part in re.finditer(r"\\.|[{}]", text, flags=re.DOTALL):  # an escaped brace, \{, opens nothing
        depth += {"{": 1, "}": -1}.get(part[0], 0)
        if depth == 0 and part[0] == "}":
            return text[1 : part.start()].strip() or None
    return None


def _conversation(messages: list[dict[str, Any]], trained: list[bool], where: str) -> Row:
    is_assistant = [message["role"] == "assistant" for message in messages]
    if not any(is_assistant):
        raise DataError(f"{where}: no message has the role assistant, so there is nothing to train on. Remove the row.")
    return Row("chat", messages=messages, trained=None if trained == is_assistant else trained)


def _with_columns(row: Row, found: dict[str, Any], where: str) -> Row:
    """The row with the columns that any form may have: `weight`, and those of CONTEXT."""
    # 1. The row's own weight
    flags = [name for name in IS_TRAINED if name == "weight" or isinstance(found.get(name), bool)]
    weight = read_flag(found, tuple(flags), where, "a row is trained or left out")
    if weight is not None:
        row = replace(row, weight=int(weight))
    for name in MASKS:
        if is_given(found.get(name)):
            raise DataError(
                f"{where}: `{name}` says what is trained, but is not understood. Use `weight` (0 or 1) on the row or "
                "on its messages, or remove the column."
            )
    if isinstance(found.get("label"), bool):  # TRL's rows for KTO
        raise DataError(
            f"{where}: `label` = {found['label']} says whether the row is a good or a bad example. Write `columns: "
            "{weight: label}` to train on the good ones, or `{id: label}` to train on all."
        )
    # 2. What no text model can be shown, and what this layout has no place for
    given = [name for name in (*CONTEXT, *LOST) if is_given(found.get(name))]
    for name in given:
        if name in LOST:
            raise DataError(
                f"{where}: `{name}` cannot be shown to a language model. Remove the row, or set columns: "
                f"{{id: {name}}} to leave the column out."
            )
        if name in CONTEXT and row.layout in ("verbatim", "text"):
            raise DataError(
                f"{where}: `{name}` is given, but a row with {' and '.join(_fields_of(row))} has no place for it. "
                "Write the row as messages, or remove the column."
            )
    if not set(given) & set(CONTEXT):
        return row
    # 3. System prompt and earlier turns go first; a question's earlier turns are trained as those of messages are
    before: list[dict[str, Any]] = []
    systems = [name for name in SYSTEM if name in given]
    if len(systems) > 1:
        raise DataError(f"{where}: `{systems[0]}` and `{systems[1]}` are both given. Remove one of them.")
    for name in systems:
        if row.messages and row.messages[0]["role"] == "system":
            raise DataError(
                f"{where}: `{name}` is given, but the first message has the role system as well. Remove one of them."
            )
        before.append({"role": "system", "content": _text(found, name, where)})
    if "history" in given:
        before += _history(found["history"], where)
    messages = before + (row.messages or [])
    trained = None if row.trained is None else [False] * len(before) + row.trained
    return replace(
        row,
        messages=messages or None,
        trained=trained,
        tools=read_tools(found, where),
        template_kwargs=read_template_kwargs(found, where),
    )


def _check_passages(found: dict[str, Any], form: Form, where: str) -> None:
    """Refuse a passage that the question is about, where the form would drop it."""
    for name in PASSAGES:
        if is_given(found.get(name)) and name not in form.optional:
            question, answer = form.fields
            columns = {"instruction": question, "input": name, "output": answer}
            new = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items() if ours != theirs)
            raise DataError(
                f"{where}: `{name}` is given, but a row with {question} and {answer} has no place for it. Set columns: "
                f"{{{new}}}, or {{id: {name}}} to leave it out."
            )


def _fields_of(row: Row) -> tuple[str, ...]:
    return ("prompt", "completion") if row.layout == "verbatim" else ("text",)


def _history(history: Any, where: str) -> list[dict[str, Any]]:
    """[["1 + 1?", "2"]], the earlier questions and answers of a row, as messages."""
    messages: list[dict[str, Any]] = []
    is_pairs = isinstance(history, list) and all(isinstance(each, list) and len(each) == 2 for each in history)
    if not is_pairs:
        raise DataError(
            f"{where}: `history` is {describe(history)}, but it must be a list of [question, answer]. Correct the row."
        )
    for question, answer in history:
        pair = {"history": question, "history answer": answer}
        messages.append({"role": "user", "content": _text(pair, "history", where)})
        messages.append({"role": "assistant", "content": _text(pair, "history answer", where)})
    return messages


def _text(found: dict[str, Any], name: str, where: str) -> str:
    """The text under `name`: valid Unicode, and not blank."""
    value = found[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: `{name}` is {describe(value)}, but it must be a text. Correct or remove the row.")
    check_unicode(value, name, where)
    if not value.strip():
        raise DataError(f"{where}: `{name}` is empty. Fill it in, or remove the row.")
    return value
