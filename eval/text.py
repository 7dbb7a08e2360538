"""Text for people to read: progress, percentages, and model text made harmless."""

import unicodedata


def say(text: str) -> None:
    """One line of progress on standard output."""
    print(f"=> {text}", flush=True)


def percent(share: float) -> str:
    """
    >>> percent(0.6922)
    '69.22 %'
    """
    return f"{100 * share:.2f} %"


def visible(text: str) -> str:
    r"""Control, invisible and direction-changing characters spelled out, so that no text can hide or rearrange what
    is shown.

    Tabs and line feeds stay.

    >>> visible("a\x1b[31m\u202eb\r")
    'a␛[31m⟨U+202E⟩b␍'
    """
    return "".join(
        character if character in "\n\t" or character.isprintable() else _spelled_out(character) for character in text
    )


def _spelled_out(character: str) -> str:
    if character < "\x20":
        return chr(0x2400 + ord(character))
    # spaces of other widths are not "printable", but can be seen
    return character if unicodedata.category(character) == "Zs" else f"⟨U+{ord(character):04X}⟩"


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
