"""What a GGUF file says of itself, read without trusting it: each count and length is checked before it is used.

A header may claim 2^60 tensors, or data beyond the end of the file. Libraries that read GGUF find out late, with errors
that do not say so, and after building an object for each of millions of entries. So every file goes through here first:
time and memory stay within a few seconds and a few megabytes for any content.

The format: magic, version, number of tensors, number of metadata entries; the entries (key, type, value); for each
tensor its name, shape, type and offset; padding; the data.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import FetchError, one_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# type of a metadata value -> its format for struct
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Far above every real model (a vocabulary of 262,144 tokens, some 2,000 tensors), and read in seconds
MOST_ENTRIES = 65_536
MOST_ELEMENTS = 4_194_304
LONGEST_STRING = 16_777_216  # bytes
LONGEST_LIST = 1_024  # longer arrays are not kept, only counted
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: the fastest dimension last."""
    kind: int
    """Its ggml type, such as 3 for Q4_1."""


@dataclass
class Header:
    """The metadata of a GGUF file, and its table of tensors."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """Values by key; of a long array only its number of elements."""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def values(self) -> int:
        """The number of weights in all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    def kinds(self) -> str:
        """How the weights are stored, the most used first: "Q4_1, Q8_0, F32"."""
        from gguf import GGMLQuantizationType

        counts: dict[int, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.kind] = counts.get(tensor.kind, 0) + prod(tensor.shape)
        return ", ".join(GGMLQuantizationType(kind).name for kind in sorted(counts, key=lambda kind: -counts[kind]))


class _DamagedError(Exception):
    """What is wrong with the file; becomes a FetchError."""


class _Reader:
    """A position in the file, and what is read there."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def skip(self, size: int) -> int:
        """Move on by `size` bytes, which have to be there; returns where they begin."""
        begin = self.position
        if size > len(self.data) - begin:
            raise _DamagedError(f"it ends at byte {len(self.data):,}, inside its header")
        self.position += size
        return begin

    def number(self, kind: str) -> Any:
        layout = struct.Struct(f"<{kind}")
        return layout.unpack_from(self.data, self.skip(layout.size))[0]

    def count(self, what: str, most: int) -> int:
        found = self.number("Q")
        if found > most:
            raise _DamagedError(f"its header claims {found:,} {what}, and no model has over {most:,}")
        return found

    def string(self) -> str:
        length = self.count("bytes in one text", LONGEST_STRING)
        begin = self.skip(length)
        return self.data[begin : begin + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _DamagedError(f"its header holds a value of the unknown type {kind}")
        element, count = self.number("I"), self.count("elements in one array", MOST_ELEMENTS)
        if element == STRING:
            for _ in range(count):
                self.string()  # not kept, but it has to be text
            return count
        if element not in SCALARS:
            raise _DamagedError(f"its header holds an array of the unknown type {element}")
        layout = f"<{count}{SCALARS[element]}"
        begin = self.skip(struct.calcsize(layout))
        return list(struct.unpack_from(layout, self.data, begin)) if count <= LONGEST_LIST else count


def read_header(file: Path) -> Header:
    """The header of `file`, whole and plausible.

    Raises:
        FetchError: not a regular file, not GGUF, of another version or byte order, cut off, or with claims that cannot
            be true.
    """
    if not file.is_file():  # a pipe or a device would be read for ever
        raise FetchError(f"{str(file)!r} is not a file. Give the path of a .gguf file.")
    try:
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                raise _DamagedError(f"it does not begin with {MAGIC.decode()}")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Reader(data))
    except (_DamagedError, UnicodeDecodeError) as error:
        raise FetchError(
            f"{str(file)!r} is not a GGUF file that can be read: {one_line(error)}. Download it again, or give another."
        ) from None
    except OSError as error:
        raise FetchError(f"{str(file)!r} cannot be read: {error.strerror}. Give a file that can.") from None


def _read(reader: _Reader) -> Header:
    # 1. what kind of file
    reader.skip(len(MAGIC))
    version = reader.number("I")
    if version not in VERSIONS:
        is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise _DamagedError("it is big-endian" if is_swapped else f"it is of version {version}, and 2 and 3 are known")
    tensors, entries = reader.count("tensors", MOST_ENTRIES), reader.count("metadata entries", MOST_ENTRIES)

    # 2. metadata
    header = Header()
    for _ in range(entries):
        key = reader.string()
        if key in header.metadata:
            raise _DamagedError(f"its header has {key!r} twice")
        header.metadata[key] = reader.value(reader.number("I"))
    if not header.architecture:
        raise _DamagedError("its header names no general.architecture")

    if not tensors:
        raise _DamagedError("it holds no tensors, as a file with the vocabulary alone")

    # 3. tensors: all of their data must lie inside the file
    needed = 0
    for _ in range(tensors):
        info, end = _read_tensor(reader)
        if info.name in header.tensors:
            raise _DamagedError(f"its header has the tensor {info.name!r} twice")
        header.tensors[info.name] = info
        needed = max(needed, end)
    alignment = header.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= MOST_ENTRIES or alignment & (alignment - 1):
        raise _DamagedError(f"its general.alignment is {alignment!r}, and not a power of two")
    begin = -(-reader.position // alignment) * alignment
    if begin + needed > len(reader.data):
        raise _DamagedError(
            f"it ends at byte {len(reader.data):,}, and its tensors at {begin + needed:,}: it is cut off"
        )
    return header


def _read_tensor(reader: _Reader) -> tuple[TensorInfo, int]:
    """A line of the table, and where the tensor's data ends, counted from where all data begin."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = reader.string()
    dimensions = reader.number("I")
    if not 0 < dimensions <= MOST_DIMENSIONS:
        raise _DamagedError(f"its tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([reader.number("Q") for _ in range(dimensions)]))
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in GGMLQuantizationType._value2member_map_:
        raise _DamagedError(f"its tensor {name!r} is of the unknown type {kind}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block or not prod(shape):
        raise _DamagedError(f"its tensor {name!r} has the shape {shape}, in blocks of {block}")
    return TensorInfo(name, shape, kind), offset + prod(shape) // block * size
