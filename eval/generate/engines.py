"""Which engine generates, and what every engine must do.

1. A request is a prompt's token ids and a sample number. All engines are given the same ids, so tokenisation cannot
differ.
2. `engine.generate(requests, decoding)` yields each Generation as it finishes, so that the caller can save it at once.
3. Engines deliver token ids; `generation.finish` turns them into text, cuts at the first stop string and says why it
ended.
"""

import importlib
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from matrix_llm.base.errors import EvalError
from matrix_llm.base.vllm_server import is_server

from ..text import first_line
from .generation import Decoding, Generation, Key, Request

SERVER = "vllm server"  # the name under which a run remembers an engine given by its address


class Engine(Protocol):
    """What `eval.generate.run` needs from TransformersEngine, VLLMEngine, DataParallelVLLM and ServerEngine."""

    name: str

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()
    ) -> Iterator[Generation]:
        """One Generation for each request that is not in `skip`, in any order."""

    def close(self) -> None:
        """Release what the engine holds, except a model that belongs to the caller."""


def choose_engine(name: str) -> tuple[str, str]:
    """ "vllm", "transformers" or SERVER, and why. "auto" takes vLLM if it can be imported."""
    if name == "transformers":
        return name, "as asked"
    if is_server(name):
        return SERVER, f"at {name}"
    try:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        importlib.import_module("vllm")
    except Exception as error:  # a broken installation raises anything
        reason = (
            "it is not installed"
            if isinstance(error, ModuleNotFoundError) and error.name == "vllm"
            else first_line(error)
        )
        if name == "vllm":
            raise EvalError(
                f"--engine vllm cannot be used: {reason}. Install it (pip install vllm), or use --engine transformers."
            ) from None
        return "transformers", f"vLLM cannot be imported ({reason}); it would be faster"
    return "vllm", "as asked" if name == "vllm" else "vLLM is installed"
