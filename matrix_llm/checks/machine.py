"""What a recipe needs of this machine: packages and a GPU. A plan for another machine does without them."""

import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

from accelerate.utils import DynamoBackend
from torch._inductor import list_mode_options
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.training_args import ParallelMode

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import check_choice


class MissingOnThisMachineError(RecipeError):
    """A run cannot start here, for want of a package or a device; --dry_run plans it all the same."""


# What pip calls a package, where its module or the service has another name
_PIP = {
    "comet_ml": "comet-ml", "azure_ml": "azureml-mlflow", "flyte": "flytekit", "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
}  # fmt: skip
_FLASH = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn"}


def check_reports(report_to: list[str]) -> None:
    """Refuse a service that transformers does not report to, and one whose package is missing."""
    available = get_available_reporting_integrations()
    for name in report_to:
        check_choice("report_to", name, [*INTEGRATION_TO_CALLBACK, "all", "none"])
        if name not in (*available, "azure_ml", "flyte", "all", "none"):
            raise _missing(f"report_to={name!r}", name)


def check_attention(attention: str | None) -> None:
    """Refuse an attention that transformers does not have, or only has for decoding."""
    if attention is None or "/" in attention:  # user/name: a kernel of the Hub
        return
    known = [name for name in ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()] if not name.startswith("paged")]
    check_choice("attn_implementation", attention, known, also="a kernel of the Hub, such as kernels-community/...")


def check_loader(training: TrainingArguments) -> None:
    """Refuse settings of the data loader that torch would refuse at the first step."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # more workers than this machine has cores; the run will say so
            DataLoader(
                [0],  # type: ignore[arg-type]
                num_workers=training.dataloader_num_workers,
                multiprocessing_context=training.dataloader_multiprocessing_context,
                persistent_workers=training.dataloader_persistent_workers,
                prefetch_factor=training.dataloader_prefetch_factor,
            )
    except ValueError as error:
        raise RecipeError(
            f"dataloader_num_workers={training.dataloader_num_workers} does not fit the other dataloader_ settings: "
            f"{str(error).removesuffix('.')}. Set dataloader_num_workers to 1 or more, or remove them."
        ) from None


def check_compile(training: TrainingArguments) -> None:
    """Refuse a backend or a mode of torch.compile that does not exist."""
    if training.torch_compile_backend is not None:
        names = [each.value.lower() for each in DynamoBackend if each.value != "NO"]
        check_choice("torch_compile_backend", training.torch_compile_backend.lower(), names)
    if training.torch_compile_mode is not None:
        check_choice("torch_compile_mode", training.torch_compile_mode, list(list_mode_options()))


def check_machine(model: Any, training: TrainingArguments) -> None:
    """Refuse what needs a package or a device that is not here.

    Args:
        model: the recipe's ModelArguments.

    Raises:
        MissingOnThisMachineError: the first thing that is missing.
    """
    # 1. Packages
    for key, value, package in _needed_packages(model, training):
        require(package, f"{key}={value!r}")
    # 2. Processes and devices
    if training.fsdp and training.parallel_mode != ParallelMode.DISTRIBUTED:
        raise MissingOnThisMachineError(
            f"fsdp={training.fsdp!r} shards over several processes, and this is one. Start it with `accelerate launch "
            "--num_processes 2`, or remove fsdp."
        )
    if training.device.type != "cpu":
        return
    attention = model.attn_implementation or ""
    for key, value, is_given in (
        ("attn_implementation", attention, attention.startswith("fl") or "/" in attention),
        ("activation_offloading", True, getattr(training, "activation_offloading", False)),
    ):
        if is_given:
            raise MissingOnThisMachineError(f"{key}={value!r} needs a GPU, and none is used here. Remove {key}.")


def _needed_packages(model: Any, training: TrainingArguments) -> Iterator[tuple[str, Any, str]]:
    """Key, value and the module that it needs."""
    if model.use_peft:
        yield "use_peft", True, "peft"
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, key, False):
            yield key, True, "bitsandbytes"
    if training.use_liger_kernel:
        yield "use_liger_kernel", True, "liger_kernel"
    if training.deepspeed:
        yield "deepspeed", training.deepspeed, "deepspeed"
    attention = model.attn_implementation or ""
    if attention.startswith("flash_attention_") and importlib.util.find_spec("kernels") is None:
        yield "attn_implementation", attention, _FLASH.get(int(attention[-1]), "kernels")
    elif "/" in attention:
        yield "attn_implementation", attention, "kernels"


def require(package: str, what: str) -> None:
    """Refuse `what`, a setting or a command, where the package that it needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise _missing(what, package)


def _missing(what: str, package: str) -> MissingOnThisMachineError:
    pip = _PIP.get(package, package.replace("_", "-"))
    return MissingOnThisMachineError(f"{what} needs the package {pip}, which is not installed. Run: pip install {pip}")
