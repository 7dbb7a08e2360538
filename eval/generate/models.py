"""Where a model is, found and checked before its weights are loaded: a folder or a Hub id, and a LoRA adapter's
base.
"""

import contextlib
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matrix_llm.base.decoding import end_tokens
from matrix_llm.base.errors import EvalError, ModelError
from matrix_llm.base.files import parse_json
from matrix_llm.base.weights import WAY_OUT, check_adapter, check_files_finite, check_weights

from ..text import first_line, say

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the sizes that vLLM can make room for
BEYOND_VLLM = ("modules_to_save", "use_dora", "bias", "lora_bias", "trainable_token_indices")  # refused or left out


@dataclass(frozen=True)
class Source:
    """A model's files: a folder or a Hub id, and where its weights are if it is a LoRA adapter."""

    model: str
    """The folder or Hub id that was given."""
    revision: str
    """Hub: the commit. Folder: "sampled-sha256:..." over config, sizes and samples of the weights, see
    `fingerprint`.
    """
    base: str
    """Folder or Hub id of the model itself, or of the adapter's base model."""
    base_commit: str | None
    """Commit of the base on the Hub; None for a folder."""
    adapter: str | None = None
    """Folder with adapter_config.json; None without an adapter."""
    trust_remote_code: bool = False
    """Whether the Python code that came with the model may run; only if that was asked for."""

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """Folder or Hub id, and commit."""
        if self.adapter and Path(self.adapter, "tokenizer_config.json").is_file():
            return self.adapter, None
        return self.base, self.base_commit

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        return _json(Path(self.adapter, "adapter_config.json")) if self.adapter else {}


def locate(model: str, revision: str | None = None) -> Source:
    """Find a model without loading its weights: a folder, or a Hub id at `revision`."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            if model.endswith(".gguf"):
                raise EvalError(_gguf(model))
            raise EvalError(f"--model {model} is a file. Give the folder that holds config.json, or a Hub id.")
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise EvalError(f"--model {model}: no such folder.")
        return _locate_on_hub(model, revision)
    if revision is not None:
        raise EvalError(
            f"--revision {revision} names a version on the Hub, but --model {model} is a folder. Leave --revision out."
        )
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        if any(folder.glob("*.gguf")):
            raise EvalError(_gguf(model))
        saved = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
        hint = f" It holds {', '.join(saved[-3:])}: give one of them." if saved else ""
        raise EvalError(
            f"--model {model} has neither config.json nor adapter_config.json, so it is not a saved model.{hint}"
        )
    if adapter:
        return _adapter(model, str(folder), fingerprint(folder))
    return Source(model, fingerprint(folder), str(folder), None)


def _gguf(model: str) -> str:
    return (
        f"--model {model} is a .gguf file, or a folder with one. Make a plain folder of it first, and give that: "
        f"matrix-llm fetch {model} FOLDER"
    )


def _adapter(model: str, folder: str, revision: str) -> Source:
    config = _json(Path(folder, "adapter_config.json"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise EvalError(
            f"{folder}/adapter_config.json names no base_model_name_or_path, so there is nothing to put the adapter on."
        )
    if not Path(base).is_dir() and (Path(folder, base) / "config.json").is_file():
        base = str(Path(folder, base))  # relative to the adapter
    try:
        under = locate(base, config.get("revision"))
    except EvalError as error:
        raise EvalError(f"--model {model} is an adapter of {base}, which cannot be found: {error}") from None
    if under.adapter:
        raise EvalError(
            f"--model {model} is an adapter of {base}, which is itself an adapter. Merge that one first: "
            f"{_merge_command(base)}"
        )
    return Source(model, f"{revision} on {under.revision}", under.base, under.base_commit, folder)


def _locate_on_hub(model: str, revision: str | None) -> Source:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with contextlib.suppress(EntryNotFoundError):  # also raised when a cache without network lacks it
            hf_hub_download(model, "adapter_config.json", revision=revision)
            folder = snapshot_download(
                model, revision=revision, ignore_patterns=["checkpoint-*", "*.bin.index.json", "optimizer*"]
            )
            return _adapter(model, folder, Path(folder).name)
        commit = Path(
            hf_hub_download(model, "config.json", revision=revision)
        ).parent.name  # .../snapshots/COMMIT/config.json
    except EvalError:
        raise
    except Exception as error:  # the Hub's client raises a dozen kinds
        raise EvalError(
            f"--model {model} is not a folder here, and cannot be found on the Hub: {first_line(error)}."
        ) from None
    return Source(model, commit, model, commit)


def fingerprint(folder: Path) -> str:
    """A name for the weights in a folder that another training run would change, without reading all of them.

    SHA-256 over config.json or adapter_config.json and, for each weight file, its name, size, header and 64 samples
    of 4 KiB. Also finds a .safetensors that was cut off.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    weights = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".bin") and path.name != "training_args.bin"
    )
    if not weights:
        raise EvalError(
            f"{folder} holds no weights (.safetensors or .bin). Give the folder that the training run saved."
        )
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                digest.update(_header(file, path, size))
            for sample in range(64):
                file.seek(max(0, size - 4096) * sample // 63)
                digest.update(file.read(4096))
    return f"sampled-sha256:{digest.hexdigest()}"


def _header(file: Any, path: Path, size: int) -> bytes:
    """8 bytes: length of the header; the header, JSON with the place of each tensor; the tensors."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    try:
        if length + 8 > size:
            raise ValueError
        header = file.read(length)
        ends = [entry["data_offsets"][1] for name, entry in parse_json(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError):
        raise EvalError(f"{path} is not a readable .safetensors file. Save or download it again.") from None
    if 8 + length + max(ends, default=0) != size:
        raise EvalError(
            f"{path} has {size} bytes where its header asks for {8 + length + max(ends, default=0)}. "
            "Save or download it again."
        )
    return header


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"{path} cannot be read as JSON: {first_line(error)}.") from None


def load_tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    path, commit = source.tokenizer
    try:
        return AutoTokenizer.from_pretrained(path, revision=commit, trust_remote_code=source.trust_remote_code)
    except Exception as error:
        refuse_code(path, error)
        raise EvalError(f"the tokenizer of {path} cannot be loaded: {first_line(error)}.") from None


def check_files(source: Source) -> None:
    """Refuse weights that are not whole or not finite, before an engine that loads them by itself.

    Raises:
        EvalError: it names the tensor.
    """
    check_names(source)
    check_values(source)


def check_values(source: Source) -> None:
    """Refuse weights with NaN or infinity."""
    from huggingface_hub import snapshot_download

    for place in filter(None, (source.base, source.adapter)):
        try:
            folder = Path(place)
            if not folder.is_dir():  # on the Hub; the engine takes them from the same cache
                folder = Path(snapshot_download(place, revision=source.base_commit, allow_patterns="*.safetensors"))
            check_files_finite(folder)
        except Exception as error:
            raise EvalError(f"--model {source.model}: {first_line(error)}.") from None


def check_names(source: Source) -> None:
    """Refuse weights that lack a tensor, or hold one that the model has no place for.

    transformers compares the names with those of a model without memory. A model that it cannot build may still be
    known to the engine, so that is only said.
    """
    from transformers import AutoModelForCausalLM

    model: Any
    info: Any
    try:
        with _without_table():
            model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                source.base,
                revision=source.base_commit,
                device_map="meta",
                ignore_mismatched_sizes=True,  # they are refused below, by name
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
            )
        for name, *_ in info["mismatched_keys"]:
            raise ModelError(f"--model {source.base} holds {name} in another shape than config.json says. {WAY_OUT}")
        for sentence in check_weights(model, info, f"--model {source.base}"):
            say(sentence)
        if source.adapter:
            from peft import PeftConfig, get_peft_model

            adapted = get_peft_model(model, PeftConfig.from_pretrained(source.adapter))
            check_adapter(adapted, Path(source.adapter), f"the adapter {source.adapter}")
    except ModelError as error:
        raise EvalError(str(error)) from None
    except Exception as error:
        refuse_code(source.base, error)
        say(f"whether {source.model} holds every tensor was not checked: {first_line(error)}")


@contextlib.contextmanager
def _without_table() -> Iterator[None]:
    """Without transformers' progress bar and its table of missing tensors, which are an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def stop_tokens(source: Source, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's end-of-text token, and those that the model's files name.

    Of generation_config.json nothing else is used: its other settings would change a greedy text.
    """
    from transformers import AutoConfig, GenerationConfig

    options: dict[str, Any] = {"revision": source.base_commit, "trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.base, **options).get_text_config()
        try:
            said = GenerationConfig.from_pretrained(source.base, revision=source.base_commit or "main").eos_token_id
        except OSError:
            if Path(source.base, "generation_config.json").is_file():  # and cannot be read
                raise
            said = getattr(config, "eos_token_id", None)
        return end_tokens(said, tokenizer, config.vocab_size)
    except Exception as error:  # a file that came with the model may hold anything
        raise EvalError(f"the generation settings of {source.base} cannot be used: {first_line(error)}.") from None


def refuse_code(path: str, error: Exception) -> None:
    """Say how to ask for it, if `error` means that a model needs Python code of its own."""
    if "trust_remote_code" in str(error):
        raise EvalError(
            f"{path} comes with Python code of its own, which is not run unless that is asked for. Read the code, then "
            "add --trust_remote_code."
        ) from None


def context_limit(source: Source) -> int | None:
    """Positions the model has for prompt and response together; None if its config does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            source.base, revision=source.base_commit, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:
        refuse_code(source.base, error)
        raise EvalError(f"the config of {source.base} cannot be loaded: {first_line(error)}.") from None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _merge_command(adapter: str | None) -> str:
    return f"python -m matrix_llm.merge {adapter} OUT"


def lora_rank(source: Source) -> int:
    """The smallest rank that vLLM supports and that fits the adapter's."""
    config = source.adapter_config
    way_out = f"Use --engine transformers, or merge it: {_merge_command(source.adapter)}"
    for key in BEYOND_VLLM:
        if (value := config.get(key)) and value != "none":
            raise EvalError(f"the adapter {source.adapter} has {key}={value!r}, which vLLM cannot add. {way_out}")
    needed = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    rank = next((rank for rank in LORA_RANKS if rank >= needed), None)
    if rank is None:
        raise EvalError(f"the adapter has rank {needed}, and vLLM has room for {LORA_RANKS[-1]}. {way_out}")
    return rank
