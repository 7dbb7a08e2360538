"""Failures that a user can act on become one line; bugs do not."""

import doctest
import errno
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.checkpoint import CheckpointException

from matrix_llm.base.errors import DataError
from matrix_llm.run import failures
from matrix_llm.run.failures import explain_failure, why_not_written


@pytest.fixture
def file_size_limit():
    """Sets a limit on the size of files in this process, which fails as a full disk does; lifts it afterwards."""
    handler, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_doctests():
    assert doctest.testmod(failures).failed == 0


STATE = {"a": torch.zeros(100_000), "b": torch.ones(50_000)}  # 600,000 bytes, and about 1,600 for the archive itself
TOKENIZER = Tokenizer(WordLevel({f"{number:030}": number for number in range(20_000)}, unk_token="0" * 30))
WRITERS = {
    "torch.save": lambda path: torch.save(STATE, path),
    "torch.save, old format": lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file(STATE, path),
    "tokenizers": lambda path: TOKENIZER.save(str(path)),
    "python": lambda path: path.write_bytes(bytes(600_000)),
}


@pytest.mark.parametrize("size", [1000, 150_000, 400_300, 599_999])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit_is_recognised_through_every_library(writer, size, tmp_path, file_size_limit):
    file_size_limit(size)
    with pytest.raises((OSError, RuntimeError, Exception)) as caught:
        WRITERS[writer](tmp_path / "weights")
    file_size_limit(resource.RLIM_INFINITY)
    assert why_not_written(caught.value), caught.value
    line = explain_failure(caught.value, tmp_path)
    assert str(tmp_path) in line
    assert "could not be written" in line


def test_an_archive_that_fails_only_when_it_is_closed_is_recognised(tmp_path, file_size_limit):
    torch.save(STATE, tmp_path / "weights")
    file_size_limit((tmp_path / "weights").stat().st_size - 1)
    with pytest.raises(RuntimeError) as caught:
        torch.save(STATE, tmp_path / "weights")
    file_size_limit(resource.RLIM_INFINITY)
    assert why_not_written(caught.value), caught.value


def test_one_process_of_a_sharded_checkpoint_that_could_not_write_is_enough():
    full = OSError(errno.ENOSPC, "No space left on device")
    error = CheckpointException("write", {0: (KeyError("x"), None), 1: (full, None)})
    assert why_not_written(error) == "No space left on device"


@pytest.mark.parametrize(
    "bug",
    [
        KeyError("x"),
        ValueError("shapes differ"),
        RuntimeError("CUDA error"),
        FileNotFoundError(errno.ENOENT, "gone", "x"),
    ],
)
def test_a_bug_has_no_explanation(bug, tmp_path):
    assert explain_failure(bug, tmp_path) is None


def test_a_disk_that_is_full_outside_the_run_keeps_its_traceback(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "cache" / "rows.arrow"))
    assert explain_failure(full, tmp_path / "run") is None
    assert explain_failure(full, tmp_path) is not None
    assert explain_failure(full, None) is None


GLOO_SAYS = [
    "Connection closed by peer [127.0.0.1]:4021",  # while waiting for it
    "writev [127.0.0.1]:4021: Broken pipe",  # while sending to it
    "Socket closed [127.0.0.1]:4021",
]


@pytest.mark.parametrize("words", GLOO_SAYS)
def test_a_lost_process_is_named_as_the_place_to_look(tmp_path, monkeypatch, words):
    monkeypatch.setenv("RANK", "3")
    lost = RuntimeError(f"[../third_party/gloo/pair.cc:534] {words}")
    assert "process 3" in explain_failure(lost, tmp_path)
    assert explain_failure(DataError("rows.jsonl line 3: no text."), tmp_path) == "rows.jsonl line 3: no text."
