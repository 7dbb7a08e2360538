"""Decode a JSON array one value at a time, with one chunk of the file in memory. Standard library only."""

import json
from collections.abc import Iterator
from typing import Any, TextIO


class ArrayError(ValueError):
    """The text is not a complete JSON array."""

    def __init__(self, message: str, count: int, line: int) -> None:
        super().__init__(message)
        self.count = count
        """Number of the faulty value, counted from 1."""
        self.line = line
        """Its line in the file."""


def iterate_array(file: TextIO, chunk: int) -> Iterator[Any]:
    """Yields the values of the array that `file` holds, reading `chunk` characters at a time.

    Raises:
        ArrayError: the array is malformed or cut off.

    >>> import io
    >>> list(iterate_array(io.StringIO('[{"a": 1}, [2], "x"]'), 3))
    [{'a': 1}, [2], 'x']
    """
    decoder, buffer = json.JSONDecoder(), file.read(chunk)
    while buffer.isspace() and (more := file.read(chunk)):
        buffer += more
    place = buffer.index("[") + 1  # where in the buffer the next value is looked for
    count, lines, at_end = 1, 1, False  # lines: those already removed from the buffer
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(buffer, place)
            complete = end < len(buffer) or at_end  # a number at the very end may continue in the next chunk
        except json.JSONDecodeError as error:
            if at_end:
                raise ArrayError(f"{error.msg} in value {count}", count, lines - 1 + error.lineno) from None
            complete = False
        if complete:
            yield value
            place, count = end, count + 1
        else:
            # Read at least as much as the buffer holds: otherwise a very long value would be decoded once per chunk
            more = file.read(max(chunk, len(buffer) - place))
            lines += buffer.count("\n", 0, place)
            buffer, place, at_end = buffer[place:] + more, 0, not more
