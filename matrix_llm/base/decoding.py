"""Neutral decoding settings: what greedy decoding needs of `generate`, whatever a model's own settings ask for. No torch here."""

from typing import Any

# A model's generation_config.json may hold settings that turn greedy decoding into something else, or that warn on every
# batch. `generate` fills in only what is left None, so each is named here with its neutral value.
NEUTRAL_DECODING: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
