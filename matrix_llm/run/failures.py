"""Failures that are not bugs, recognised and reported in one line: a full or read-only disk, a process that is gone."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from matrix_llm.base.errors import CheckpointError, MatrixLLMError
from matrix_llm.run.checkpoint_files import last_complete_checkpoint

# What the operating system answers when a disk or a folder cannot take a file. Other errors are not about writing.
CANNOT_WRITE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
}

# For the failures below torch raises a plain RuntimeError, so only its words tell them apart.
TORCH_SAVE_FAILED = (
    "unexpected pos",  # the archive has fewer bytes than were written to it
    "PytorchStreamWriter failed",
    "iostream error",  # the file cannot be closed
    "write(): fd",  # torch.save's older format
)
PEER_IS_GONE = (
    "Connection closed by peer",  # gloo
    "Connection reset by peer",
    "Broken pipe",  # written to, where the two above are read from
    "Socket closed",
    "remote worker crashing",
    "remote process exited",  # NCCL
)


def why_not_written(error: BaseException) -> str | None:
    """The reason, if `error` means that a file could not be written, from any library; None for other errors.

    >>> why_not_written(OSError(errno.ENOSPC, "No space left on device"))
    'No space left on device'
    >>> why_not_written(KeyError("x")) is None
    True
    """
    if isinstance(error, OSError):
        return error.strerror if error.errno in CANNOT_WRITE else None
    is_from_rust = isinstance(error, SafetensorError) or type(error) is Exception  # the latter from tokenizers
    if is_from_rust and (number := re.search(r"os error (\d+)", str(error))):
        return os.strerror(int(number[1]))
    if isinstance(error, CheckpointException):  # holds one error for each process that failed
        reasons = (why_not_written(failure) for failure, _ in error.failures.values())
        return next((reason for reason in reasons if reason), None)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_SAVE_FAILED):
        return "torch.save could not write the whole file (no space left, or a limit on its size)"
    return None


def cannot_write(path: Path, reason: str, output_dir: Path) -> CheckpointError:
    """The error to raise when `path` could not be written; it names the checkpoint to resume from."""
    last = last_complete_checkpoint(output_dir)
    resume = f"{last} is complete: resume with --resume_from_checkpoint true" if last else "no checkpoint was saved yet"
    return CheckpointError(f"{path} could not be written: {reason}. Free space, or make the folder writable; {resume}.")


def explain_failure(error: Exception, output_dir: Path | None) -> str | None:
    """The one line to print for an error that the user can act on; None for a bug, which keeps its traceback.

    Args:
        output_dir: the run's folder; None as long as no recipe has been read.
    """
    if isinstance(error, MatrixLLMError):
        return str(error)
    # Outside the run's folder (in a cache, for example) a full disk keeps its traceback, which names the place
    if output_dir is not None and (reason := why_not_written(error)) is not None:
        path = Path(getattr(error, "filename", None) or output_dir)
        if path.absolute().is_relative_to(output_dir.absolute()):
            return str(cannot_write(path, reason, output_dir))
    if isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_IS_GONE):
        rank = os.environ.get("RANK", "0")
        return f"process {rank} lost contact with another process, which printed the reason or was killed."
    return None
