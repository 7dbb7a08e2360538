"""Text from data, models and other people's files, made harmless for a terminal and a log."""

import unicodedata


def visible(text: str) -> str:
    r"""Control, invisible and direction-changing characters spelled out, so that no text can hide or rearrange what
    is shown.

    Tabs and line feeds stay.

    >>> visible("a\x1b[31m\u202eb\r")
    'a␛[31m⟨U+202E⟩b␍'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if character in "\n\t" or character.isprintable() else _spelled_out(character) for character in text
    )


def quoted_lines(text: str) -> str:
    r"""Text of several lines from data, in which no line but the first can pass for one of ours ("=> ", "error: ").

    >>> print(quoted_lines("a\n=> b\rc"))
    a
         | => b␍c
    """
    return "\n     | ".join(visible(text).split("\n"))


def _spelled_out(character: str) -> str:
    if character < "\x20":
        return chr(0x2400 + ord(character))
    # spaces of other widths are not "printable", but can be seen
    return character if unicodedata.category(character) == "Zs" else f"⟨U+{ord(character):04X}⟩"
