"""The values of one JSON array, decoded one by one: memory holds a chunk of the file and one value. Standard library only."""

import json
from collections.abc import Iterator
from typing import Any, TextIO


class ArrayError(ValueError):
    """The text is no whole JSON array. `count` is the value at fault, from 1, and `line` where in the file it is."""

    def __init__(self, message: str, count: int, line: int) -> None:
        super().__init__(message)
        self.count, self.line = count, line


def iterate_array(file: TextIO, chunk: int) -> Iterator[Any]:
    """The values of the array that `file` holds, read `chunk` characters at a time.

    >>> import io
    >>> list(iterate_array(io.StringIO('[{"a": 1}, [2], "x"]'), 3))
    [{'a': 1}, [2], 'x']
    """
    decoder, buffer = json.JSONDecoder(), file.read(chunk)
    while buffer.isspace() and (more := file.read(chunk)):
        buffer += more
    place, ended, count, lines = buffer.index("[") + 1, False, 1, 1  # lines: of what has been taken off the buffer
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(buffer, place)
            whole = end < len(buffer) or ended  # a number at the very end may go on in the next chunk
        except json.JSONDecodeError as error:
            if ended:
                raise ArrayError(f"{error.msg} in value {count}", count, lines - 1 + error.lineno) from None
            whole = False
        if whole:
            yield value
            place, count = end, count + 1
        else:
            more = file.read(max(chunk, len(buffer) - place))  # doubling: a value longer than a chunk stays linear
            lines += buffer.count("\n", 0, place)
            buffer, place, ended = buffer[place:] + more, 0, not more
