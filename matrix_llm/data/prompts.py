"""Prompt templates, as constants. Standard library only, so that evaluation scripts can import them cheaply."""

import difflib

from matrix_llm.base.errors import RecipeError

PLACEHOLDER = "{instruction}"

# "metamath" is, byte for byte, the prompt that the MetaMath authors train with: Alpaca's, without the input field and
# without a space after the last colon.
PROMPT_TEMPLATES: dict[str, str] = {
    "metamath": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
    "plain": "Question: {instruction}\nAnswer:",
}

TRAIN_ON = ["all", "last"]  # which of the assistant's turns are trained
CHAT = "chat"  # not a text: the tokenizer's own chat template lays the question out

# The MetaMath authors' evaluation scripts append this to the training prompt.
METAMATH_EVAL_SUFFIX = " Let's think step by step."


def resolve_template(template: str) -> str:
    """The text of a template; "chat" has none of its own, and stays as it is.

    Args:
        template: a key of PROMPT_TEMPLATES, "chat", or a custom template that contains {instruction} once.

    Raises:
        RecipeError: it is none of these.

    >>> resolve_template("plain")
    'Question: {instruction}\\nAnswer:'
    """
    if template in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[template]
    count = template.count(PLACEHOLDER)
    if count == 1 or template == CHAT:
        return template
    if count > 1:
        raise RecipeError(
            f"prompt_template={template!r} contains {PLACEHOLDER} {count} times, but a row has one instruction. "
            f"Keep exactly one {PLACEHOLDER}."
        )
    nearest = difflib.get_close_matches(template, [*PROMPT_TEMPLATES, CHAT], n=1)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise RecipeError(
        f"prompt_template={template!r} is neither a known template nor a text that contains {PLACEHOLDER}, "
        f"so there is no place for the instruction.{meant} Known templates: {', '.join(PROMPT_TEMPLATES)}, {CHAT}."
    )


def format_prompt(template: str, instruction: str) -> str:
    """`template` with `instruction` filled in. The text is replaced, not formatted, so LaTeX braces survive.

    >>> format_prompt("plain", "Is \\\\frac{1}{2} > 0?")
    'Question: Is \\\\frac{1}{2} > 0?\\nAnswer:'
    """
    return resolve_template(template).replace(PLACEHOLDER, instruction)
