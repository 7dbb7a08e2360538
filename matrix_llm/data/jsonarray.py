"""Decode JSON one value at a time, with one chunk of the file in memory. Standard library only."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

SPACE = re.compile(r"[ \t\r\n]*")
CUT_OFF = 40  # characters: an error closer to the end of what has been read may go away when more is read


class ArrayError(ValueError):
    """The text is not complete JSON."""

    def __init__(self, message: str, count: int, line: int) -> None:
        super().__init__(message)
        self.count = count
        """Number of the faulty value, counted from 1."""
        self.line = line
        """Its line in the file."""


class JsonReader:
    """Walks through the JSON text of `file`, reading `chunk` characters at a time.

    Raises:
        ArrayError: by every method, where the text is malformed or cut off.
    """

    def __init__(self, file: TextIO, chunk: int) -> None:
        self._file, self._chunk, self._decoder = file, chunk, json.JSONDecoder()
        self._buffer, self._place, self._at_end = "", 0, False
        self._lines = 1  # the line of the file on which the buffer starts
        self.count = 0
        """Values of arrays that were complete so far."""

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            self._place = SPACE.match(self._buffer, self._place).end()  # type: ignore[union-attr]  # matches ""
            if self._place < len(self._buffer) or not self._read():
                return self._buffer[self._place : self._place + 1]

    def take(self, *expected: str) -> str:
        """Step over the next character, which must be one of `expected`."""
        found = self.peek()
        if found not in expected or not found:
            raise self._error(f"expected {' or '.join(expected)}, found {found or 'the end of the file'}")
        self._place += 1
        return found

    def value(self) -> Any:
        """The next value, decoded whole."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._place)
            except json.JSONDecodeError as error:
                # Read on only where that can help: a slip at the start of 400 MB is reported at once
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - CUT_OFF
                explained = self._error(error.msg, error.pos)  # its line is that of the buffer before reading on
                if not is_cut or not self._read():
                    raise explained from None
            except RecursionError:
                raise self._error("nested too deeply") from None
            except ValueError:
                raise self._error("an integer has too many digits") from None
            else:
                # A number at the very end may continue in the next chunk
                if end < len(self._buffer) or self._at_end or not self._read():
                    self._place = end
                    return value

    def array(self) -> Iterator[Any]:
        """The values of the array that comes next."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            value = self.value()
            self.count += 1
            yield value
            if self.take(",", "]") == "]":
                return

    def names(self) -> Iterator[str]:
        """The names in the object that comes next. After each, the caller must read its value."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self._error("expected a name in double quotes")
            name = self.value()
            self.take(":")
            yield name
            if self.take(",", "}") == "}":
                return

    def end(self) -> None:
        """Refuse anything but white space after the last value: it would be lost."""
        if found := self.peek():
            raise self._error(f"expected the end of the file, found {found}")

    def _read(self) -> bool:
        """Drop what has been used, and read on. False at the end of the file."""
        # Read at least as much as is kept: otherwise a very long value would be decoded once per chunk
        more = self._file.read(max(self._chunk, len(self._buffer) - self._place))
        self._lines += self._buffer.count("\n", 0, self._place)
        self._buffer, self._place, self._at_end = self._buffer[self._place :] + more, 0, not more
        return bool(more)

    def _error(self, message: str, place: int | None = None) -> ArrayError:
        place = self._place if place is None else place
        line = self._lines + self._buffer.count("\n", 0, place)
        return ArrayError(f"{message} in value {self.count + 1}", self.count + 1, line)


def iterate_array(file: TextIO, chunk: int) -> Iterator[Any]:
    """Yields the values of the array that `file` holds, reading `chunk` characters at a time.

    Raises:
        ArrayError: the array is malformed or cut off, or something follows it.

    >>> import io
    >>> list(iterate_array(io.StringIO('[{"a": 1}, [2], "x"]'), 3))
    [{'a': 1}, [2], 'x']
    """
    reader = JsonReader(file, chunk)
    yield from reader.array()
    reader.end()
