"""Greedy decoding: its neutral settings, and the tokens that end a text. See base/modes.py for a model's own settings.

No torch here, so that `eval` can import it without loading torch.
"""

from typing import Any

from matrix_llm.base.errors import ModelError

# What `generate` is given; its own defaults, written out because a score depends on them
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


def end_tokens(eos_token_id: Any, tokenizer: Any, vocabulary: int) -> list[int]:
    """The tokens that end a text: the tokenizer's end-of-text token, and those of a model's generation settings.

    Chat models have several. An id without an embedding, such as -1 for none, is never drawn, and left out.

    Args:
        eos_token_id: what the generation settings say: a number, a list of numbers, or None.
        vocabulary: number of the model's embeddings.

    Raises:
        ModelError: something that is not the number of a token.
    """
    several = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    found = [each for each in (tokenizer.eos_token_id, *several) if each is not None]
    if strange := [each for each in found if type(each) is not int]:
        raise ModelError(
            f"generation_config.json: eos_token_id={eos_token_id!r} holds {strange[0]!r}, which is not the number of a "
            "token. Correct the file."
        )
    return sorted({token for token in found if 0 <= token < vocabulary})
