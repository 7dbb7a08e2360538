"""What an engine that measures accuracy during training can take: known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.vllm_server import is_server

if TYPE_CHECKING:
    from matrix_llm.config import DataArguments, ModelArguments

LARGEST_RANK = 512  # of an adapter that vLLM adds
# Settings of adapters that vLLM cannot add, with the value that asks for nothing
BEYOND_VLLM = {
    "use_dora": False, "lora_bias": "none", "lora_modules_to_save": None, "lora_trainable_token_indices": None,
    "lora_target_parameters": None,
}  # fmt: skip


def check_accuracy_engine(model: ModelArguments, data: DataArguments, given: Mapping[str, Any]) -> None:
    """Refuse an engine that cannot load what this run trains, and a share of memory that nobody takes.

    Raises:
        RecipeError: with the setting that it cannot take, and the way out.
    """
    engine = data.accuracy_engine
    if "accuracy_gpu_memory" in given and engine != "vllm":
        raise RecipeError(
            f"accuracy_gpu_memory={data.accuracy_gpu_memory} does nothing with accuracy_engine={engine!r}. Write "
            "`accuracy_engine: vllm`, or remove it."
        )
    if engine == "transformers" or not model.use_peft:
        return
    if is_server(engine):
        raise _refused(engine, "use_peft=True", "a server is given whole weights", "Set accuracy_engine to vllm")
    if model.model_config is not None:
        reason = "the weights under the adapters are saved nowhere"
        raise _refused(engine, "model_config", reason, "Set accuracy_engine to transformers")
    for key, nothing in BEYOND_VLLM.items():
        if (value := getattr(model, key)) != nothing:
            raise _refused(engine, f"{key}={value!r}", "vLLM cannot add it", "Set accuracy_engine to transformers")
    ranks = [model.lora_r, *(model.lora_rank_pattern or {}).values()]
    rank = max(ranks) * (2 if model.changes_base else 1)  # those adapters are saved with twice the rank
    if rank > LARGEST_RANK:
        reason = f"the adapters are saved with the rank {rank}, and vLLM has room for {LARGEST_RANK}"
        raise _refused(engine, f"lora_r={model.lora_r}", reason, "Set accuracy_engine to transformers")


def _refused(engine: str, what: str, reason: str, way_out: str) -> RecipeError:
    return RecipeError(f"accuracy_engine={engine!r} together with {what} cannot work: {reason}. {way_out}.")
