"""A checkpoint's pickles, read so that none of them can run code, whoever wrote the checkpoint.

- torch.save files: torch's `weights_only` loader, also where an engine asks torch for the other one
- the index of FSDP2 (`.metadata`, a plain pickle): an unpickler that knows only the index's own classes
"""

from __future__ import annotations

import contextlib
import enum
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from matrix_llm.base.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

INDEX = ".metadata"  # of a folder of FSDP2 shards
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Within the block, every torch.load refuses pickles that hold more than tensors, numbers and texts.

    That includes the calls of DeepSpeed and of torch.distributed.checkpoint, which ask for `weights_only=False`. Only
    DeepSpeed's own classes are let through, where it is in use.
    """
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        getters = [(_member, f"{module}.getattr") for module in ("builtins", "__builtin__")]
        with torch.serialization.safe_globals([*_deepspeed_classes(), *getters]):
            yield
    finally:
        os.environ.pop(FORCED) if before is None else os.environ.update({FORCED: before})


def _member(kind: Any, name: Any) -> Any:
    """What stands for `getattr` in a pickle: a member of an enumeration, and nothing else.

    Python 3.11.0 to 3.11.3 pickles a member as getattr(class, name), others as class(value).
    """
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which is not a member of an enumeration")


def _deepspeed_classes() -> list[Any]:
    """What a checkpoint of ZeRO holds besides tensors: plain data, none of which does anything when it is made."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of torch.distributed.checkpoint: its own classes, sizes and dtypes, nothing that runs code."""

    ALLOWED = {  # noqa: RUF012
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "PurePosixPath", "Path"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which does not belong in a checkpoint")


def read_index(shards: Path) -> Metadata:
    """The index of a folder of FSDP2 shards. Its entries name files of that folder and no other.

    Raises:
        CheckpointError: it is damaged, names a class that does not belong there, or a file outside the folder.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with (shards / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        files = {str(entry.relative_path) for entry in (index.storage_data or {}).values()}
        names = set(index.state_dict_metadata)
    except Exception as error:  # a pickle that is damaged, or made up, fails in any way
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{shards / INDEX} could not be read: {reason}. Give another checkpoint.") from error
    if not isinstance(index, Metadata) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{shards / INDEX} could not be read: it is not an index. Give another checkpoint.")
    for name in sorted(files):
        if not (shards / name).resolve().is_relative_to(shards.resolve()):
            raise CheckpointError(f"{shards / INDEX} names {name!r}, outside its folder. Give another checkpoint.")
    return index


def check_indexes(checkpoint: Path) -> None:
    """Read every index of a checkpoint before an engine does, whose own reader would run what it names.

    Raises:
        CheckpointError: see `read_index`.
    """
    for index in sorted(checkpoint.rglob(f"*{INDEX}")):
        if index.name != INDEX:
            raise CheckpointError(f"{index} is an index of several processes. Give another checkpoint.")
        read_index(index.parent)
