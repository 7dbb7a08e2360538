r"""Access tokens and passwords, found in text and in files by their shapes, however they are written.

They are found after any letter ("token_hf_...", "\nhf_..." in JSON), behind escapes (\u0068f_..., hf%5F...), split over
two lines, in UTF-16, and in the header of a safetensors file. What has no shape of its own, such as a password alone,
is found only where a URL or a header marks it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Each shape is tried where its needle stands in the text, and no part of it reads further than a bound: a scan of ten
# million characters takes seconds, whatever they are.
_SHAPES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (needle, re.compile(shape))
    for needle, shape in (
        # Hugging Face. Names in code ("hf_pretrainedconfig") have neither capitals nor digits, nor such a length
        ("hf_", r"(hf_(?:oauth|jwt)_)[A-Za-z0-9._-]{16,4000}"),
        ("hf_", r"(hf_)(?:(?=[a-z]{0,40}[A-Z0-9])[A-Za-z0-9]{16,200}|[a-z]{24,200})"),
        ("api_org_", r"(api_org_)[A-Za-z0-9]{16,200}"),
        # OpenAI, Anthropic and others; a letter before would make it a word ("task-"), unless it belongs to an escape
        ("sk-", r"(?:(?<![A-Za-z-])|(?<=\\[nrtbf]))(sk-)(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{20,300}"),
        ("gh", r"(gh[pousr]_)[A-Za-z0-9]{30,300}"),
        ("github_pat_", r"(github_pat_)[A-Za-z0-9_]{22,300}"),
        ("glpat-", r"(glpat-)[A-Za-z0-9_-]{20,300}"),
        ("AKIA", r"(?<![A-Z0-9])(AKIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
        ("ASIA", r"(?<![A-Z0-9])(ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
        ("wandb_v", r"(wandb_v[0-9]_)[A-Za-z0-9_]{20,300}"),
        ("xox", r"(xox[abposr]-)[A-Za-z0-9-]{20,300}"),
        ("AIza", r"(AIza)[A-Za-z0-9_-]{35}"),
        ("npm_", r"(npm_)[A-Za-z0-9]{36}"),
        ("pypi-", r"(pypi-)AgE[A-Za-z0-9_-]{50,300}"),
        ("eyJ", r"(eyJ)[A-Za-z0-9_-]{10,300}\.eyJ[A-Za-z0-9_-]{10,3000}\.[A-Za-z0-9_-]{10,1000}"),
        # a key of 40 hexadecimal digits looks like a commit: only where W&B is named
        ("", r"(?i:(wandb[\w.]{0,30}[\\\"']{0,9}\s{0,3}[:=]\s{0,3}[\\\"']{0,9}))[0-9a-f]{40}(?![0-9a-f])"),
        # user:password@host; quotes and commas end it, or the vocabulary in a tokenizer.json would match
        ("://", r"([A-Za-z][A-Za-z0-9+.-]{0,9}://)[^\s/:@\"'<>,{}\[\]\\]{0,200}:[^\s/\"'<>,{}\[\]\\]{1,300}(?=@)"),
        (
            "",
            r"(?i:(authorization[\\\"']{0,9}\s{0,3}[:=]\s{0,3}[\\\"']{0,9}(?:bearer|basic|token)\s{1,3}))"
            r"[A-Za-z0-9+/=._~-]{8,4000}",
        ),
    )
)

# A token of the Hub broken at the end of a line, as mail programs, YAML and printed logs do; there it must be as long
# as they are, or "hf_transfer", followed by a line, would be one.
_BREAK = r"(?:\\?\r?\n[ \t>#]{0,40}|\\n[ ]{0,40}|[\"'][ ]{0,9}\+?\s{0,40}[\"'])?"
_BROKEN = re.compile(f"h{_BREAK}f{_BREAK}_{_BREAK}(?:[A-Za-z0-9]{_BREAK}){{33,80}}[A-Za-z0-9]")

# One character, spelled out: \u0068 and \x68 (with any number of backslashes: JSON in JSON), %5F, &#95; and &#x5f;
_ESCAPE = re.compile(
    r"\\+(?:u00|x)([2-7][0-9A-Fa-f])|%([2-7][0-9A-Fa-f])|&#x([2-7][0-9A-Fa-f]);|&#(3[3-9]|[4-9][0-9]|1[01][0-9]|12[0-6]);"
)


def scrub(text: str, *tokens: str | None) -> str:
    """`text` with the given tokens, and everything that looks like a token or a password, masked.

    >>> scrub("Bearer hf_abcdefghijklmnopqrstuvwxyz")
    'Bearer hf_***'
    >>> scrub("https://me:pa55word@example.org/x")
    'https://***@example.org/x'
    """
    for token in filter(None, tokens):
        text = text.replace(token, "***")
    pieces, place = [], 0
    for start, end, mask in sorted(_spans(text, tokens)):
        if start >= place:
            pieces += [text[place:start], mask]
        place = max(place, end)
    return "".join([*pieces, text[place:]]) if pieces else text


def holds_secret(text: str, *tokens: str | None) -> bool:
    """Whether `scrub` would mask anything."""
    return any(token in text for token in filter(None, tokens)) or next(_spans(text, tokens), None) is not None


def file_holds_secret(file: Path, *tokens: str | None) -> bool:
    """Whether a file of any kind holds a token or a password. Of safetensors, whose tensors are numbers, the header.

    >>> file = Path("/tmp/matrix_llm_example.txt")
    >>> _ = file.write_text("hf_abcdefghijklmnopqrstuvwxyz", encoding="utf-16")
    >>> file_holds_secret(file)
    True
    """
    if file.suffix == ".safetensors":
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            content = opened.read(min(size, file.stat().st_size))
    else:
        content = file.read_bytes()
    text = content.decode("utf-8", errors="ignore")
    if holds_secret(text, *tokens):
        return True
    return b"\0" in content and holds_secret(content.replace(b"\0", b"").decode("latin-1"), *tokens)  # UTF-16, UTF-32


def _spans(text: str, tokens: tuple[str | None, ...]) -> Iterator[tuple[int, int, str]]:
    """Start, end and mask of each secret in `text`."""
    yield from _plain_spans(text)
    if not _ESCAPE.search(text):
        return
    # The same in the text without escapes, of which each character knows where it came from
    letters: list[str] = []
    starts: list[int] = []
    place = 0
    for match in _ESCAPE.finditer(text):
        letters += text[place : match.start()]
        starts += range(place, match.start())
        code = next(group for group in match.groups() if group)
        letters.append(chr(int(code, 10 if match[4] else 16)))
        starts.append(match.start())
        place = match.end()
    letters += text[place:]
    starts += [*range(place, len(text)), len(text)]
    plain = "".join(letters)
    for start, end, mask in _plain_spans(plain):
        yield starts[start], starts[end], mask
    for token in filter(None, tokens):
        for match in re.finditer(re.escape(token), plain):
            yield starts[match.start()], starts[match.end()], "***"


def _plain_spans(text: str) -> Iterator[tuple[int, int, str]]:
    for needle, shape in _SHAPES:
        if needle in text:
            for match in shape.finditer(text):
                yield match.start(), match.end(), f"{match[1]}***"
    for match in _BROKEN.finditer(text):
        if re.search("[A-Z0-9]", match[0]):
            yield match.start(), match.end(), "hf_***"
