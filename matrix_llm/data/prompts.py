"""Instruction templates, as constants. Standard library only, so that evaluation scripts can compare against them cheaply."""

import difflib

PLACEHOLDER = "{instruction}"

# "metamath" is byte for byte the Alpaca prompt that the MetaMath authors trained with (no input field, no space after the last colon).
PROMPT_TEMPLATES: dict[str, str] = {
    "metamath": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
    "plain": "Question: {instruction}\nAnswer:",
}

# The MetaMath authors' evaluation scripts append this to the training prompt.
METAMATH_EVAL_SUFFIX = " Let's think step by step."


def resolve_template(template: str) -> str:
    """The template's text: `template` is a key of PROMPT_TEMPLATES, or already a text that holds {instruction} once.

    >>> resolve_template("plain")
    'Question: {instruction}\\nAnswer:'
    """
    if template in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[template]
    count = template.count(PLACEHOLDER)
    if count == 1:
        return template
    if count > 1:
        raise ValueError(
            f"prompt_template={template!r} holds {PLACEHOLDER} {count} times, but a row has one instruction to put in. "
            f"Keep exactly one {PLACEHOLDER}."
        )
    nearest = difflib.get_close_matches(template, PROMPT_TEMPLATES, n=1)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"prompt_template={template!r} is neither a known template nor a text that holds {PLACEHOLDER}, so the instruction has no place "
        f"to go.{meant} Known templates: {', '.join(PROMPT_TEMPLATES)}."
    )


def format_prompt(template: str, instruction: str) -> str:
    """Puts `instruction` into `template`. Replaces instead of formatting, so that the braces of LaTeX survive.

    >>> format_prompt("plain", "Is \\\\frac{1}{2} > 0?")
    'Question: Is \\\\frac{1}{2} > 0?\\nAnswer:'
    """
    return resolve_template(template).replace(PLACEHOLDER, instruction)
