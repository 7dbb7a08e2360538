"""Read the messages of a conversation, whichever of the usual ways they are written in, and lose nothing of them.

    {"from": "human", "value": "Hi"}                           ->  {"role": "user", "content": "Hi"}
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]} -> {"role": "user", "content": "Hi"}
    {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]}
        ->  {"role": "assistant", "content": "", "tool_calls": [{"type": "function",
                                                                 "function": {"name": "f", "arguments": {"x": 1}}}]}

A field of a message that is not named here is passed to the chat template, which may use it. A field that is null is
the same as none: Parquet writes every field of any message in all of them.
"""

import json
from typing import Any

from matrix_llm.base.errors import DataError

# ShareGPT's names of the roles
ROLES = {
    "human": "user",
    **dict.fromkeys(["gpt", "chatgpt", "bing", "bard", "model", "bot"], "assistant"),
    **dict.fromkeys(["observation", "function", "function_response", "tool_response"], "tool"),
}
REASONING = ("reasoning_content", "thinking", "reasoning")
IS_TRAINED = ("weight", "train", "training")
# They say what is trained, or hold what a text model cannot be shown: never passed over
REFUSED = {
    **dict.fromkeys(
        ["train_detail", "mask", "masked", "loss", "loss_mask", "loss_weight"],
        "is not understood. Say whether the turn is trained by `weight` (0 or 1) or `train` (true or false)",
    ),
    **dict.fromkeys(
        ["audio", "image", "images", "video", "videos", "documents"],
        "cannot be shown to a language model. Remove it, or the row",
    ),
}


def read_conversation(value: Any, field: str, where: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages under `field`, each with a role and a content, and whether each is trained.

    Raises:
        DataError: a message cannot be used.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `{field}` is {describe(value)}, but it must be a list of role and content.")
    read = [_read_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1)]
    return [message for message, _ in read], [is_trained for _, is_trained in read]


def _read_message(found: Any, where: str) -> tuple[dict[str, Any], bool]:
    # 1. Its role: a ShareGPT function_call is a turn of the assistant
    if not isinstance(found, dict):
        raise DataError(f"{where} is {describe(found)}, but a message is an object with `role` and `content`.")
    message = {name: value for name, value in found.items() if value is not None}
    for name, reason in REFUSED.items():
        if is_given(message.get(name)):
            raise DataError(f"{where}: `{name}` {reason}.")
    role = _role(message, where)
    if role == "function_call":
        role, message["tool_calls"] = "assistant", _content(message, where)
        message["content"] = ""
        message.pop("value", None)

    # 2. What it says
    calls = _tool_calls(message, where)
    content = _content(message, where, may_lack=bool(calls))
    reasoning = _reasoning(message, where)
    is_trained = _is_trained(message, role, where)
    if role == "assistant" and is_trained and not content.strip() and not calls:
        raise DataError(
            f"{where}: `content` of the assistant is empty. Fill it in, give the message `weight: 0`, or remove the "
            "row."
        )

    # 3. In the one form that chat templates read; what else it has may be known to the template
    read = {"from", "value", "role", "content", "tool_calls", "function_call", *REASONING, *IS_TRAINED, *REFUSED}
    others = {str(name): value for name, value in message.items() if name not in read}
    result: dict[str, Any] = {"role": role, "content": content}
    if calls:
        result["tool_calls"] = calls
    if reasoning:
        result["reasoning_content"] = reasoning
    for name, value in others.items():
        check_unicode(name, "name of a field", where)
        result[name] = check_json(value, name, where)
    return result, is_trained


def _role(message: dict[str, Any], where: str) -> str:
    name = "from" if "role" not in message and "from" in message else "role"
    role = message.get(name)
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} has `{name}` = {describe(role)}, but it must be a text.")
    check_unicode(role, name, where)
    role = ROLES.get(role, role)
    if name == "from" and role not in ("user", "assistant", "system", "tool", "function_call"):
        raise DataError(f"{where} has `from` = {role!r}. It must be one of system, {', '.join(ROLES)}, function_call.")
    return role


def _content(message: dict[str, Any], where: str, *, may_lack: bool = False) -> str:
    """The text of a message; a list of text parts is joined."""
    name = "value" if "content" not in message and "value" in message else "content"
    content = message.get(name)
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise DataError(
                    f"{where}: `{name}` has a part of type {kind!r}, but only text is trained on. Remove it."
                )
        content = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in content):
            content = "".join(content)
    if not isinstance(content, str):
        raise DataError(f"{where} has `{name}` = {describe(content)}, but it must be a text.")
    check_unicode(content, name, where)
    return content


def _reasoning(message: dict[str, Any], where: str) -> str | None:
    given = [name for name in REASONING if is_given(message.get(name))]
    for name in given:
        if not isinstance(message[name], str):
            raise DataError(f"{where} has `{name}` = {describe(message[name])}, but it must be a text.")
        check_unicode(message[name], name, where)
    if len({message[name] for name in given}) > 1:
        raise DataError(f"{where} has both `{given[0]}` and `{given[1]}`. Keep one of them.")
    return message[given[0]] if given else None


def _is_trained(message: dict[str, Any], role: str, where: str) -> bool:
    flag = read_flag(message, IS_TRAINED, where, "a turn is trained or not")
    if role != "assistant" and flag:
        name = next(name for name in IS_TRAINED if name in message)
        raise DataError(
            f"{where}: `{name}` = {message[name]!r} asks to train on a turn of the {role}, but only the assistant's "
            "turns are trained. Remove it."
        )
    return role == "assistant" and flag is not False


def _tool_calls(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls of a turn: {"type": "function", "function": {"name": ..., "arguments": {...}}}, with an id if given."""
    name = "tool_calls" if is_given(message.get("tool_calls")) else "function_call"
    calls = parse_json(message.get(name), name, where)
    if not is_given(calls):
        return []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise DataError(f"{where}: `{name}` is {describe(calls)}, but it must be a list of calls.")
    return [_tool_call(call, name, where) for call in calls]


def _tool_call(call: Any, field: str, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(
            f"{where}: `{field}` has {describe(call)}, but a call is an object with `function`: `name` and `arguments`."
        )
    arguments = parse_json(function.get("arguments"), f"arguments of {function['name']}", where)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"{where}: the arguments of {function['name']} are {describe(arguments)}, but they must be an object."
        )
    outer = {} if function is call else {name: value for name, value in call.items() if value is not None}
    inner = {name: value for name, value in function.items() if value is not None}
    whole = {**outer, "type": "function", "function": {**inner, "arguments": arguments}}
    return check_json(whole, field, where)


# --- columns of a row -------------------------------------------------------------------------------------------------


def read_tools(found: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The functions under `tools`, or `functions`: a list or JSON text, each wrapped as OpenAI writes it."""
    name = "tools" if is_given(found.get("tools")) else "functions"
    tools = parse_json(found.get(name), name, where)
    if not is_given(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{where}: `{name}` is {describe(tools)}, but it must be a list of functions, or JSON text of one."
        )
    checked = check_json(tools, name, where)
    return [{"type": "function", "function": tool} if _is_bare(tool) else tool for tool in checked]


def _is_bare(tool: dict[str, Any]) -> bool:
    """{"name": ..., "parameters": ...}, a function without the object around it."""
    return "name" in tool and "function" not in tool


RESERVED = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "return_assistant_tokens_mask", "return_dict", "return_tensors", "padding", "truncation",
    "max_length", "tokenizer_kwargs",
)  # fmt: skip


def read_template_kwargs(found: dict[str, Any], where: str) -> dict[str, Any] | None:
    """TRL's column `chat_template_kwargs`: variables of the chat template, such as {"enable_thinking": false}."""
    name = "chat_template_kwargs"
    given = parse_json(found.get(name), name, where)
    if not is_given(given):
        return None
    if not isinstance(given, dict):
        raise DataError(f"{where}: `{name}` is {describe(given)}, but it must be an object.")
    for key in given:
        if key in RESERVED:
            raise DataError(f"{where}: `{name}` has {key!r}, which is not a variable of a chat template. Remove it.")
    return check_json({key: value for key, value in given.items() if value is not None}, name, where)


def read_flag(found: dict[str, Any], names: tuple[str, ...], where: str, meaning: str) -> bool | None:
    """Whether something is trained, by the first of the fields `names` that is given; None if none is."""
    given = {name: found[name] for name in names if found.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"{where}: `{name}` = {describe(value)}, but {meaning}: it must be 0 or 1. "
                "Round it, repeat a row that should count more, or rename the field if it means something else."
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise DataError(f"{where}: {' and '.join(f'`{n}` = {v!r}' for n, v in given.items())} disagree. Keep one.")
    return bool(next(iter(given.values()))) if given else None


# --- any value --------------------------------------------------------------------------------------------------------


def is_given(value: Any) -> bool:
    """False for null, blank text, [] and {}, which data sets write where there is nothing."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and not (isinstance(value, (list, dict)) and not value)


def parse_json(value: Any, name: str, where: str) -> Any:
    """The value, or what it says if it is JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: `{name}` is not JSON ({error}): {value[:60]!r}. Correct the row.") from None


def check_json(value: Any, name: str, where: str) -> Any:
    """The value as JSON can hold it; dates and the like become text.

    Raises:
        DataError: it is nested too deeply, or a text in it is not valid Unicode.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        check_unicode(text, name, where)
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: `{name}` cannot be written as JSON ({error}). Correct the row.") from None


def check_unicode(text: str, name: str, where: str) -> None:
    try:
        text.encode()  # JSON's "\ud83d" alone decodes to a str that no file, tokenizer or Arrow table can hold
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: `{name}` contains half of a surrogate pair, which is not valid text. "
            "Correct its escape sequences."
        ) from None


def describe(value: Any) -> str:
    """The value for an error message: its type and its beginning."""
    if value is None:
        return "null"
    try:
        shown = str(value)[:60]
    except RecursionError:
        shown = "nested too deeply"
    return f"{type(value).__name__} {shown.encode(errors='replace').decode()!r}"
