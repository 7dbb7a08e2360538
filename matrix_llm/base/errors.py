"""One family for every error that a user can correct.

The message is one line: the setting or place, the value found, the reason, and how to fix it. Commands print that line
and exit with status 2, or 1 once training has begun. Any other exception is a bug in this package and keeps its
traceback.
"""

from matrix_llm.base.secrets import scrub as scrub  # whoever words an error may have to


class MatrixLLMError(Exception):
    """Base class: a mistake or a failure that the user can correct."""


class RecipeError(MatrixLLMError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class ModelError(RecipeError):
    """A model whose loss cannot be computed, or that would silently train wrongly."""


class DataError(MatrixLLMError, ValueError):
    """A row or a file that cannot be read or trained on."""


class ImageDataError(DataError):
    """Images or labels that cannot be read or used."""


class ProbeError(MatrixLLMError, ValueError):
    """Features or labels that an evaluation protocol cannot use."""


class ExportError(MatrixLLMError, ValueError):
    """A network that another library cannot represent, or a file that the export cannot read or write."""


class EvalError(MatrixLLMError, ValueError):
    """An evaluation that cannot start or continue."""


class LimitError(MatrixLLMError, RuntimeError):
    """Something that came with other people's files, such as a chat template, takes too much time or memory."""


class CheckpointError(MatrixLLMError, RuntimeError):
    """A checkpoint that could not be written, read or consolidated."""


class PushError(MatrixLLMError, RuntimeError):
    """The Hub could not be reached, or refused the request."""


class FetchError(MatrixLLMError, RuntimeError):
    """A model that could not be downloaded, or a file that cannot be made into a folder for `from_pretrained`."""


class NonFiniteRowsError(MatrixLLMError, ValueError):
    """NaN or infinity in the rows that an image loss or a metric reads: the run has diverged."""


class NonFiniteLossError(MatrixLLMError, RuntimeError):
    """The loss became NaN or infinite. The weights are those of the previous step."""


def one_line(error: BaseException) -> str:
    """What another library's error says, in one line without a full stop; its type where it says nothing.

    >>> one_line(ValueError("no such key:\\n  'a'.")), one_line(KeyError())
    ("no such key: 'a'", 'KeyError')
    """
    return (" ".join(str(error).split()) or type(error).__name__).removesuffix(".")
