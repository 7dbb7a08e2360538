"""Lay a conversation out by the tokenizer's chat template, and find in that text what is trained.

    [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        ->  "<|im_start|>user\\n1 + 1?<|im_end|>\\n<|im_start|>assistant\\n"    not trained: inference starts from it
            "2<|im_end|>\\n"                                                 trained, with the token that ends the turn

Where a turn starts and ends is what the template marks with {% generation %}, corrected where that is not what a model
must learn: a header that inference writes is not trained, the end-of-turn token is, and an empty block for reasoning
that the row does not have is not. A template without marks is laid out turn by turn, and each turn's text found by
comparison. What a template would leave out of a row (tools, a role, earlier reasoning) is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from matrix_llm.base.errors import DataError, LimitError, one_line
from matrix_llm.base.limits import limited

# What a template may raise on a row that it was not written for
TEMPLATE_FAILURES = (
    TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError
)  # fmt: skip
TEMPLATE = "the tokenizer's chat template (chat_template_path)"
LONGEST_TEXT = 2**24  # characters of one conversation
EMPTY_THINKING = re.compile(r"\s*(?:<think>)?\s*</think>\s*")


@dataclass(frozen=True)
class Segment:
    """A part of the text of a conversation; the parts are tokenised one by one."""

    text: str
    """Not empty."""
    is_trained: bool
    """Whether the model learns to write it."""


class RefusedError(Exception):
    """Why a row cannot be laid out; the caller knows which row it is."""


class ChatLayout:
    """Texts and trained parts of conversations, by one tokenizer's chat template.

    Args:
        train_on: "all" of the assistant's turns, or the "last" only.
        is_exact: a trained turn starts exactly where the prompt of inference ends, whatever the template marks.

    Raises:
        DataError: the tokenizer has no chat template, or one that does not show where the assistant's turns end.
    """

    def __init__(self, tokenizer: Any, train_on: str = "all", *, is_exact: bool = False) -> None:
        if not tokenizer.chat_template:
            asks = "prompt_template='chat' asks for" if is_exact else "the rows are conversations, which need"
            way_out = "set prompt_template: plain" if is_exact else "give rows with prompt and completion as texts"
            raise DataError(
                f"{asks} a template, but the tokenizer has no chat template. Give chat_template_path, or {way_out}."
            )
        self.tokenizer, self.train_on, self.is_exact = tokenizer, train_on, is_exact
        try:
            self.own_template: str = tokenizer.get_chat_template()
        except ValueError as error:  # several named templates, and none of them is the default
            raise DataError(f"the tokenizer's chat template: {error} Give chat_template_path.") from None
        self.template, self.is_marked = self.own_template, False
        self._find_marks()
        self.ends = self._find_ends()
        if is_exact:
            self._check_prompt()

    # --- what the template is like ------------------------------------------------------------------------------------

    def _find_marks(self) -> None:
        """Use the template's own marks, or TRL's template with marks, or compare texts if it can write a prompt."""
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers  # loads torch

        self.is_marked = has_generation_markers(self.own_template)
        if self.is_marked:
            return
        try:
            with limited(TEMPLATE):  # TRL tries the template
                self.template = get_training_chat_template(self.tokenizer) or self.own_template
            self.is_marked = True
        except TEMPLATE_FAILURES as error:
            if not self.is_exact and not self._has_prompt():
                raise DataError(
                    "the chat template of the tokenizer does not mark the assistant's turns, and TRL has no patched "
                    "one. Put {% generation %} and {% endgeneration %} around the assistant's content "
                    f"(chat_template_path). TRL says: {error}"
                ) from None

    def _check_prompt(self) -> None:
        """Refuse a template whose prompt for inference is not how a row with a question and an answer begins."""
        probe = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe"}]
        try:
            if not self._has_prompt():
                raise RefusedError("the chat template writes nothing for add_generation_prompt")
            self.segments(probe)
        except RefusedError as reason:
            raise DataError(
                f"prompt_template='chat': {reason}, so inference would not start where training does. Give another "
                "template (chat_template_path), or rows with messages."
            ) from None

    def _has_prompt(self) -> bool:
        """Whether the assistant's words follow the prompt of inference at once: after a header, or [/INST]."""
        if self.header:
            return True
        probe = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "answer"}]
        try:
            prompt, text = self._render(probe[:1], add_generation_prompt=True)[0], self._render(probe)[0]
        except TEMPLATE_FAILURES:
            return False
        return text.startswith(prompt) and text[len(prompt) :].lstrip().startswith("answer")

    @cached_property
    def header(self) -> str:
        """What inference writes before the assistant's turn: "<|im_start|>assistant\\n"; "" if it is not known."""
        user = [{"role": "user", "content": "probe"}]
        try:
            without, text = (self._render(user, add_generation_prompt=yes)[0] for yes in (False, True))
        except TEMPLATE_FAILURES:
            return ""
        pairs = enumerate(zip(without, text, strict=False))
        start = next((place for place, (a, b) in pairs if a != b), min(len(without), len(text)))
        for token in self.added_tokens:  # the two texts may part within a token: <|endoftext|> and <|assistant|>
            for place in range(max(start - len(token) + 1, 0), start):
                if text.startswith(token, place):
                    return text[place:]
        return text[start:]

    @cached_property
    def writes_start(self) -> bool:
        """Whether the template writes <s> in front of the conversation."""
        try:
            text = self._render([{"role": "user", "content": "probe"}])[0]
        except TEMPLATE_FAILURES:
            return False
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    @cached_property
    def added_tokens(self) -> list[str]:
        tokens = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        return sorted((token for token in tokens if token.strip()), key=len, reverse=True)

    def _find_ends(self) -> set[str]:
        """The tokens that end a turn of the assistant: before another turn, and at the end of the conversation."""
        eos = self.tokenizer.eos_token
        user, answer, other = "probequestion", "probeanswer", "probefollowing"
        probe = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": other},
        ]
        ends = {eos}
        try:
            for messages, following in ((probe[:2], None), (probe, other)):
                text, blocks = self._render(messages)
                start = text.rfind(answer) + len(answer)
                end = self._first_added(text[start : text.rfind(following) if following else None])
                place = text.find(end, start) if end else -1
                # Before another turn, what comes next may be what opens that turn, unless the template marks it
                if end and (following is None or any(a <= place < b for a, b in blocks)):
                    ends.add(end)
                if following is None and end is None:
                    raise DataError(
                        "the chat template writes no end-of-turn token after the assistant's turn, so a model could "
                        f"not learn where to stop. Put one there, such as {eos}, inside {{% generation %}} "
                        "(chat_template_path)."
                    )
        except TEMPLATE_FAILURES as error:
            if isinstance(error, DataError):
                raise
        return ends  # a template that fails on the probe needs more than these roles; each row is checked anyway

    def _first_added(self, text: str) -> str | None:
        places = [(text.index(token), -len(token), token) for token in self.added_tokens if token in text]
        return min(places)[2] if places else None

    # --- one conversation ---------------------------------------------------------------------------------------------

    def segments(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        trained: Sequence[bool] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> list[Segment]:
        """The text of a conversation in parts, one for each trained turn and for what is between them.

        Args:
            trained: for each message; None: every turn of the assistant.
            kwargs: more variables for the template.

        Raises:
            RefusedError: the template fails, leaves something out, or does not end a trained turn.
        """
        messages = [_with_aliases(message) for message in messages]
        options = {"tools": tools, **(kwargs or {})}
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = [i for i in assistants if trained is None or trained[i]]
        if self.train_on == "last":
            chosen = [i for i in chosen if i == assistants[-1]]
        try:
            text, blocks = self._render(messages, **options)
            _check_nothing_is_left_out(text, messages, tools)
            find = self._marked_span if self.is_marked and not self.is_exact else self._compared_span
            spans = {i: find(i, text, blocks, messages, options) for i in chosen}
        except TEMPLATE_FAILURES as error:
            raise RefusedError(
                f"the tokenizer's chat template refuses the messages: {one_line(error).rstrip('.!')}"
            ) from None
        spans = {i: self._with_end(*span, text, messages[i], i) for i, span in spans.items()}
        for i, (start, end) in spans.items():
            _check_turn(text[start:end], messages[i], i)
        return _cut(text, list(spans.values()))

    def _marked_span(
        self, i: int, text: str, blocks: list[tuple[int, int]], messages: list[dict], options: dict[str, Any]
    ) -> tuple[int, int]:
        """Where the template's marks for message i are."""
        assistants = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if len(blocks) == len(assistants):
            own = [blocks[assistants.index(i)]]
        else:  # some turn has no mark or several: those that appear before it, and before the next, are counted
            later = [k for k in assistants if k > i]
            first, last = (
                len(self._render(messages[:k], **options)[1]) if k else 0 for k in (i, min(later, default=0))
            )
            own = blocks[first : last if later else None]
        if not own:
            raise RefusedError(f"the chat template does not mark message {i + 1}, so it would not be trained")
        start, end = own[0][0], own[-1][1]
        start = self._after_header(text, start, end)
        if i and messages[i - 1]["role"] != "user":  # another header may follow the result of a tool
            prompt = self._render(messages[:i], add_generation_prompt=True, **options)[0]
            start = len(prompt) if text.startswith(prompt) and start < len(prompt) < end else start
        if not messages[i].get("reasoning_content") and "</think>" not in messages[i]["content"]:
            empty = EMPTY_THINKING.match(text, start, end)
            start = empty.end() if empty else start
        return start, end

    def _after_header(self, text: str, start: int, end: int) -> int:
        """The place in text from which on inference expects the model to write: TRL's marks may start earlier."""
        header = self.header
        for place in range(max(start - len(header), 0), start + 1):
            if header and text.startswith(header, place) and place + len(header) <= end:
                return max(place + len(header), start)
        # The header has more than the text, "<think>" after its first token: that token alone is not trained
        opening = self._first_added(header)
        if opening and header.startswith(opening) and text.startswith(opening, start):
            return start + len(opening)
        return start

    def _compared_span(
        self, i: int, text: str, blocks: list[tuple[int, int]], messages: list[dict], options: dict[str, Any]
    ) -> tuple[int, int]:
        """What comes after the prompt of inference for message i, up to what comes after message i."""
        own = self._template_for(options.get("tools"), patched=False)
        try:
            prompt = self._render(messages[:i], add_generation_prompt=True, template=own, **options)[0]
        except TEMPLATE_FAILURES:
            if i:
                raise
            raise RefusedError(
                "message 1 is the assistant's, but the chat template writes no prompt without a message before it. "
                "Give that message weight 0"
            ) from None
        whole = text if i == len(messages) - 1 else self._render(messages[: i + 1], **options)[0]
        if not text.startswith(whole):
            raise RefusedError(
                f"the chat template writes message {i + 1} differently once others follow it, so it cannot be trained "
                "as it is first written. Set train_on: last, or give a template that keeps earlier turns"
            )
        if not whole.startswith(prompt):
            raise RefusedError(
                f"the prompt that the chat template writes for inference is not the beginning of message {i + 1}: it "
                f"ends in {prompt[-40:]!r}"
            )
        return len(prompt), len(whole)

    def _with_end(self, start: int, end: int, text: str, message: dict[str, Any], i: int) -> tuple[int, int]:
        """The span with its end-of-turn token, which some templates write after their mark."""
        ends = tuple(self.ends)
        said = text[start:end].rstrip()
        if said.endswith(ends):
            token = max((each for each in ends if said.endswith(each)), key=len)
            once = said
            while once.removesuffix(token).rstrip().endswith(token):  # a template that ends a turn twice
                once = once.removesuffix(token).rstrip()
            return start, end if once == said else start + len(once)
        rest = text[end:].lstrip()
        if rest.startswith(ends):
            token = max((each for each in ends if rest.startswith(each)), key=len)
            return start, text.index(token, end) + len(token)
        if "tool_calls" in message and text[start:end].rstrip().endswith(tuple(self.added_tokens)):
            return start, end  # a call ends in a token of its own: <|call|>, <|observation|>
        raise RefusedError(
            f"the chat template writes no end-of-turn token ({', '.join(sorted(self.ends))}) after message {i + 1}, so "
            "a model could not learn where to stop"
        )

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        template: str | None = None,
        **options: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of the messages, and where the template's marks are."""
        from transformers.utils.chat_template_utils import render_jinja_template  # some versions load torch

        with limited(TEMPLATE):
            rendered: Any = render_jinja_template(  # annotated as a text, but it is a pair of lists
                conversations=[list(messages)],
                chat_template=template or self._template_for(options.get("tools")),
                return_assistant_tokens_mask=self.is_marked and template is None,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens_map, **options},
            )
        texts, blocks = rendered
        check_length(texts[0])
        return texts[0], [block for block in blocks[0] if block[0] < block[1]] if blocks else []

    def _template_for(self, tools: list[dict[str, Any]] | None, *, patched: bool = True) -> str:
        """A tokenizer may have another template for rows with tools."""
        if self.template == self.own_template or not patched:
            return self.tokenizer.get_chat_template(tools=tools)
        return self.template


def prompt_text(tokenizer: Any, question: str) -> str:
    """The text from which a model answers a question, by the tokenizer's chat template."""
    with limited(TEMPLATE):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    return check_length(text)


def check_length(text: str) -> str:
    """`text`, unless a template has made more of it than could be tokenised.

    Raises:
        LimitError: it is longer than any conversation.
    """
    if len(text) > LONGEST_TEXT:
        raise LimitError(f"{TEMPLATE} writes {len(text):,} characters for one conversation. Use another one.")
    return text


def _cut(text: str, spans: list[tuple[int, int]]) -> list[Segment]:
    """The text in parts: "ab[cd]e" with the span (2, 4) has "ab", "cd" and "e"."""
    segments, place = [], 0
    for start, end in spans:
        if start < place:
            raise RefusedError("the chat template writes two turns over each other")
        segments += [Segment(text[place:start], False), Segment(text[start:end], True)]
        place = end
    return [segment for segment in (*segments, Segment(text[place:], False)) if segment.text]


def _with_aliases(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read reasoning under one of three names."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {**message, "thinking": reasoning, "reasoning": reasoning}


# --- nothing is lost --------------------------------------------------------------------------------------------------


def _check_nothing_is_left_out(
    text: str, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    """Refuse a text in which a message or a tool is missing: the template has no place for it."""
    squeezed: list[str] = []  # the text without white space, made when it is first needed

    def holds(part: str) -> bool:
        if part in text:
            return True
        if not squeezed:
            squeezed.append("".join(text.split()))
        spelled = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
        return any("".join(each.split()) in squeezed[0] for each in spelled)

    for number, message in enumerate(messages, start=1):
        said = message["content"].split("</think>")[-1]
        if not holds(said):
            raise RefusedError(f"the chat template leaves out the content of message {number} ({message['role']})")
        for call in message.get("tool_calls", ()):
            if not holds(call["function"]["name"]):
                raise RefusedError(f"the chat template leaves out the tool_calls of message {number}")
    for tool in tools or ():
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and not holds(name):
            raise RefusedError(f"the chat template leaves out the tools: {name!r} is not in its text")


def _check_turn(text: str, message: dict[str, Any], i: int) -> None:
    """Refuse a trained turn whose text lacks something that the row says; templates drop earlier turns' reasoning."""
    squeezed = "".join(text.split())
    thought, closing, said = message["content"].rpartition("</think>")
    parts = {"content": [said], "reasoning": [message.get("reasoning_content") or ""]}
    if closing:
        parts["reasoning"].append(thought.split("<think>")[-1])
    parts["tool_calls"] = [call["function"]["name"] for call in message.get("tool_calls", ())]
    for name, texts in parts.items():
        if any("".join(each.split()) not in squeezed for each in texts):
            raise RefusedError(
                f"the chat template leaves out the {name} of message {i + 1}, which is trained. Set train_on: last if "
                "it is an earlier turn, or give that message weight 0"
            )
