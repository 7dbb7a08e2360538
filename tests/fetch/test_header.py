"""A file that is not what it says, or claims what cannot be: one line, at once, with nothing written."""

import os
import random
import struct
import time

import pytest

from matrix_llm.base.errors import FetchError
from matrix_llm.fetch.header import read_header

HEAD = 24  # magic, version, number of tensors, number of metadata entries
ENTRY = struct.Struct("<Q")


def header(tensors=0, entries=b"", count=None, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, 1 if count is None else count) + entries


def entry(key, kind, value):
    return ENTRY.pack(len(key)) + key + struct.pack("<I", kind) + value


def tensor(*shape, name=b"w"):
    """A line of the table of tensors: float32, the data at 0."""
    return ENTRY.pack(1) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)


NAME = entry(b"general.architecture", 8, ENTRY.pack(5) + b"llama")
TENSOR = ENTRY.pack(1) + b"w" + struct.pack("<IQIQ", 1, 32, 0, 0)
ALIGNED_48 = entry(b"general.alignment", 4, struct.pack("<I", 48))
BAD = {
    "empty": (b"", "GGUF"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "GGUF"),
    "magic alone": (b"GGUF", "inside its header"),
    "old": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "tensors": (header(2**60, NAME), "1,152,921,504,606,846,976 tensors"),
    "a tensor too many": (header(65_537, NAME), "65,537 tensors"),
    "entries": (header(0, NAME, count=2**60), "metadata entries"),
    "more entries than bytes": (header(1, NAME, count=60_000), "inside its header"),
    "text of 2^60": (header(0, entry(b"k", 8, ENTRY.pack(2**60))), "in one text"),
    "text beyond the end": (header(0, entry(b"k", 8, ENTRY.pack(10**6))), "inside its header"),
    "array of 2^60": (header(0, entry(b"k", 9, struct.pack("<IQ", 0, 2**60))), "in one array"),
    "array beyond the end": (header(0, entry(b"k", 9, struct.pack("<IQ", 12, 10**6))), "inside its header"),
    "texts of no bytes": (header(0, entry(b"k", 9, struct.pack("<IQ", 8, 4 * 10**6))), "inside its header"),
    "array of arrays": (header(0, entry(b"k", 9, struct.pack("<IQ", 9, 3))), "unknown type 9"),
    "kind of value": (header(0, entry(b"k", 77, b"")), "unknown type 77"),
    "no architecture": (header(1, entry(b"k", 4, b"abcd") + TENSOR + bytes(200)), "general.architecture"),
    "the same key": (header(0, NAME + NAME, count=2), "twice"),
    "not UTF-8": (header(0, entry(b"\xff\xfe", 4, b"abcd")), "utf-8"),
    "a token that is not UTF-8": (header(0, entry(b"k", 9, struct.pack("<IQQ", 8, 1, 1) + b"\xff")), "utf-8"),
    "no tensors": (header(0, NAME), "no tensors"),
    "the same tensor": (header(2, NAME + TENSOR + TENSOR + bytes(200)), "twice"),
    "dimensions": (header(1, NAME + ENTRY.pack(1) + b"w" + struct.pack("<I", 2**32 - 1)), "dimensions"),
    "no dimensions": (header(1, NAME + tensor()), "0 dimensions"),
    "five dimensions": (header(1, NAME + tensor(2, 2, 2, 2, 2) + bytes(400)), "5 dimensions"),
    "no weights": (header(1, NAME + tensor(4, 0) + bytes(200)), "the shape (0, 4)"),
    "the larger one cut off": (header(2, NAME + tensor(64) + tensor(32, name=b"v") + bytes(160)), "cut off"),
    "shape of 2^60": (header(1, NAME + ENTRY.pack(1) + b"w" + struct.pack("<IQIQ", 1, 2**60, 0, 0)), "cut off"),
    "part of a block": (header(1, NAME + ENTRY.pack(1) + b"w" + struct.pack("<IQIQ", 1, 33, 3, 0)), "blocks of 32"),
    "kind of tensor": (header(1, NAME + ENTRY.pack(1) + b"w" + struct.pack("<IQIQ", 1, 32, 99, 0)), "type 99"),
    "alignment": (header(1, NAME + entry(b"general.alignment", 4, bytes(4)) + TENSOR, count=2), "alignment"),
    "alignment of 48": (header(1, NAME + ALIGNED_48 + tensor(32) + bytes(400), count=2), "power of two"),
    "offset": (header(1, NAME + ENTRY.pack(1) + b"w" + struct.pack("<IQIQ", 1, 32, 0, 2**60)), "cut off"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_hostile_file_is_one_line_at_once(name, tmp_path, error):
    content, reason = BAD[name]
    (file := tmp_path / "bad.gguf").write_bytes(content)
    began = time.monotonic()
    line = error(file, tmp_path / "out")
    assert time.monotonic() - began < 5
    assert reason in line
    assert str(file) in line
    assert sorted(tmp_path.iterdir()) == [file]


def test_any_damage_to_a_header_is_read_or_refused_in_bounded_time(write):
    content, seeded = write().read_bytes(), random.Random(0)
    file, refused = write(), 0
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(seeded.randint(1, 4)):
            changed[seeded.randrange(6000)] = seeded.randrange(256)
        file.write_bytes(changed[: seeded.choice([len(changed), seeded.randrange(len(changed))])])
        began = time.monotonic()
        try:
            read_header(file)
        except FetchError:  # anything else fails the test
            refused += 1
        assert time.monotonic() - began < 2
    assert refused > 200


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(share, write, error, tmp_path):
    file = write()
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "cut off" in error(file, tmp_path / "out") or share < 0.5
    assert not (tmp_path / "out").exists()


def test_only_a_regular_file_is_read(tmp_path, error):
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a file" in error(tmp_path / "pipe.gguf", tmp_path / "out")
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere")
    assert "nothing is there" in error(tmp_path / "gone.gguf", tmp_path / "out")


def test_a_header_says_what_was_written(write, model):
    read = read_header(write())
    assert read.architecture == "llama"
    assert read.values == sum(parameter.numel() for parameter in model.parameters())
    assert read.tensors["blk.1.ffn_down.weight"].shape == (64, 96)
    assert read.kinds() == "Q4_1, Q8_0, F32"
    assert read.metadata["tokenizer.ggml.tokens"] == model.config.vocab_size
