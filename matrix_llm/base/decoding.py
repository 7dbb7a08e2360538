"""Neutral decoding settings: what `generate` must be given to decode greedily, whatever the model's own settings say.

No torch here, so that `eval` can import it without loading torch.
"""

from typing import Any

# A model's generation_config.json may turn greedy decoding into something else, or cause a warning in every batch.
# `generate` takes from it whatever it is not given, so each setting is named here with its neutral value.
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
