"""Every error that a user can mend, in one family, and the scrubbing of secrets from what is printed.

    try: ...
    except MatrixLLMError as error: print(f"error: {error}"); exit 2, or 1 once training has begun

The message of each is one line that names the key or the place, the value found, the reason and the way out. Any other
exception is a fault of this package, and keeps its traceback.
"""

import re


class MatrixLLMError(Exception):
    """Base class: something that the person who started the command can put right."""


class RecipeError(MatrixLLMError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class ModelError(RecipeError):
    """A model that the loss cannot be computed on, or that would train wrongly in silence."""


class DataError(MatrixLLMError, ValueError):
    """A row or a file that cannot be read or trained on."""


class ImageDataError(DataError):
    """Images or labels that cannot be read or used."""


class ProbeError(MatrixLLMError, ValueError):
    """Features or labels that an evaluation protocol cannot use."""


class ExportError(MatrixLLMError, ValueError):
    """A network that another library cannot represent, or a file that the export cannot read or write."""


class EvalError(MatrixLLMError, ValueError):
    """An evaluation that cannot start or go on."""


class CheckpointError(MatrixLLMError, RuntimeError):
    """A checkpoint that could not be written, read or consolidated."""


class PushError(MatrixLLMError, RuntimeError):
    """The Hub could not be reached, or refused."""


class NonFiniteRowsError(MatrixLLMError, ValueError):
    """NaN or infinity in the rows that an image loss or a metric reads: the run has diverged."""


class NonFiniteLossError(MatrixLLMError, RuntimeError):
    """The loss became NaN or infinite; the weights are those of the step before."""


SECRET = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")


def scrub(text: str, *tokens: str | None) -> str:
    """`text` without the given tokens, and without anything that looks like a Hub token.

    >>> scrub("Bearer hf_abcdefghijklmnopqrstuvwxyz")
    'Bearer hf_***'
    """
    for token in filter(None, tokens):
        text = text.replace(token, "***")
    return SECRET.sub(r"\1_***", text)
