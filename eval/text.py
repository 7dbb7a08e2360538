"""Text for people to read: progress, percentages, and model text made harmless."""

from matrix_llm.base.secrets import scrub
from matrix_llm.base.text import visible as visible


def say(text: str) -> None:
    """One line of progress on standard output."""
    print(f"=> {visible(' '.join(scrub(text).splitlines()))}", flush=True)


def percent(share: float) -> str:
    """
    >>> percent(0.6922)
    '69.22 %'
    """
    return f"{100 * share:.2f} %"


def shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters, without control characters.

    >>> shorten("one two\\n three", 9)
    'one two …'
    """
    text = visible(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_line(error: BaseException) -> str:
    """An exception's message as part of one line: its first line without the full stop, or its class."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0].strip().rstrip(".") if lines else "") or type(error).__name__
