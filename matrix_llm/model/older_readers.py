"""What transformers 4.57 (and the serving stacks built on it) needs to read a saved folder as transformers 5 does.

transformers 5 renamed some of what it saves, and 4.57 takes its own default for a name it does not find, mostly in
silence: rope_theta 500,000 becomes 10,000. Here the older names are written next to the new ones, which transformers 5
goes on reading. Where transformers 5 itself would read the result differently, nothing is added.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from matrix_llm.base.files import write_text

# model_type -> the older names of (the base frequency, the rotated share of each head)
ROPE_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct")}
# model_type -> the older names of the base frequency of layers with (full, sliding) attention
LAYERED_ROPE_NAMES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),  # one for both
}
# (model_type, rope_type) -> all that 4.57 accepts in rope_scaling. It stops at any other key or kind of these models.
SCALING_KEYS = {
    ("olmo", "linear"): {"type", "factor"},
    ("olmo", "dynamic"): {"type", "factor"},
    ("olmo2", "linear"): {"type", "factor"},
    ("olmo2", "dynamic"): {"type", "factor"},
    ("phi3", "longrope"): {"type", "short_factor", "long_factor"},
    ("phi4_multimodal", "longrope"): {"type", "short_factor", "long_factor"},
}


def add_older_names(folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, use_cache: bool | None = None) -> None:
    """Rewrite config.json and tokenizer_config.json of a saved folder, where they exist.

    Args:
        tokenizer: the one that was saved there.
        use_cache: the base model's setting, which training switches off; None leaves what was saved.
    """
    if (file := folder / "config.json").is_file():
        saved = json.loads(file.read_text(encoding="utf-8"))
        _write(file, saved, older_config(saved, use_cache))
    file = folder / "tokenizer_config.json"
    if tokenizer is not None and file.is_file():
        saved = json.loads(file.read_text(encoding="utf-8"))
        _write(file, saved, older_tokenizer(saved, tokenizer))


def _write(file: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    if after != before:
        write_text(file, json.dumps(after, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------------------------------------- config


def older_config(saved: dict[str, Any], use_cache: bool | None = None) -> dict[str, Any]:
    """The content of config.json with the older names; `saved` itself is not changed."""
    # 1. rotary embeddings
    found, meaning = dict(saved), _read(saved)
    if _read(older := _with_rope(saved)) == meaning:
        found = older
    # 2. infinity, in a spelling that 4.57 takes for a mapping: left out where it is the default anyway
    finite = {key: value for key, value in found.items() if "__float__" not in json.dumps(value)}
    if finite != found and _read(finite) == meaning:
        found = finite
    # 3. what training has switched off
    if use_cache is not None and "use_cache" in found:
        found["use_cache"] = use_cache
    return found


def _read(saved: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers 5 makes of a config.json; None if it is not one of its own architectures, or refused."""
    if saved.get("model_type") not in CONFIG_MAPPING:
        return None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(saved), encoding="utf-8")
        try:
            read = CONFIG_MAPPING[saved["model_type"]].from_pretrained(folder)
        except Exception:  # each architecture checks itself, in its own way
            return None
    return _without_copies(read.to_dict())


def _without_copies(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` without the older names that transformers 5 keeps, and reads elsewhere."""
    copies = {"type"} if "rope_type" in settings else {"partial_rotary_factor"} if "rope_parameters" in settings else {}
    return {
        key: _without_copies(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in copies
    }


def _with_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` and its sub-configurations with the older names of rope_parameters."""
    found = {key: _with_rope(value) if key.endswith("_config") and isinstance(value, dict) else value
             for key, value in settings.items()}  # fmt: skip
    rope, model_type = settings.get("rope_parameters"), str(settings.get("model_type"))
    if not isinstance(rope, dict):
        return found
    if model_type in LAYERED_ROPE_NAMES:
        full, sliding = (rope.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        full_name, sliding_name = LAYERED_ROPE_NAMES[model_type]
        if "rope_theta" in full:
            found[full_name] = full["rope_theta"]
        if sliding_name is not None and "rope_theta" in sliding:
            found[sliding_name] = sliding["rope_theta"]
        return found | _scaling(full, model_type)
    theta, share = ROPE_NAMES.get(model_type, ("rope_theta", "partial_rotary_factor"))
    if "rope_theta" in rope:
        found[theta] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        found[share] = rope["partial_rotary_factor"]
    return found | _scaling(rope, model_type)


def _scaling(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """{"rope_scaling": ...} of scaled rotary embeddings, else {}."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if (model_type, kind) in SCALING_KEYS:
        allowed = SCALING_KEYS[model_type, kind]
        scaling = {key: value for key, value in (scaling | {"type": kind}).items() if key in allowed}
    return {"rope_scaling": scaling}


# -------------------------------------------------------------------------------------------------------- tokenizer


def older_tokenizer(saved: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of tokenizer_config.json with the older names; `saved` itself is not changed."""
    found = dict(saved)
    # 1. the class: 4.57 does not know this name
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    # 2. further special tokens: in 4.57 this key holds a mapping, and a list stops it
    if isinstance(extra := found.get("extra_special_tokens"), list):
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = extra
    # 3. what is put around a text: some classes of 4.57 decide that by these, and not by tokenizer.json
    has_class = found.get("tokenizer_class") != "PreTrainedTokenizerFast" and found.get("backend") == "tokenizers"
    if has_class and (ids := tokenizer("a")["input_ids"]):
        found["add_bos_token"] = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        found["add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    return found
