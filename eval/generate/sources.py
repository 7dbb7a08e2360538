"""Where the rows of a benchmark come from: a file, or a data set on the Hub written as ORG/NAME:CONFIG:SPLIT."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import EvalError

from ..files import FORMATS, SUFFIXES, read_rows
from ..text import first_line

HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w.-]+))?(?::([\w.-]+))?")


@dataclass(frozen=True)
class HubData:
    """Rows of a data set on the Hub."""

    name: str
    """ORG/NAME."""
    split: str = "test"
    """The split to read."""
    configs: tuple[str | None, ...] = (None,)
    """The configurations to read, one after another; None is the default one."""
    revision: str | None = None
    """A commit, so that the problems stay the same; None: the newest."""

    def __str__(self) -> str:
        return self.name

    def read(self) -> list[dict[str, Any]]:
        """The rows of all configurations. Rows of several get ids ("algebra/test/0"): MATH's have none.

        Raises:
            EvalError: the data set cannot be loaded.
        """
        from datasets import load_dataset

        rows: list[dict[str, Any]] = []
        try:
            for config in self.configs:
                read = load_dataset(self.name, config, split=self.split, revision=self.revision)
                several = len(self.configs) > 1
                rows += [
                    {**row, "id": f"{config}/{self.split}/{index}"} if several else row
                    for index, row in enumerate(read)
                ]
        except Exception as error:  # the Hub's client raises a dozen kinds
            raise EvalError(
                f"{self.name} cannot be loaded from the Hub ({first_line(error)}). Offline, give the file yourself: "
                "--data FILE.jsonl."
            ) from None
        return rows


def find_source(data: str) -> HubData | Path:
    """What --data names: a file, or a data set on the Hub.

    >>> find_source("math-ai/aime25:test")
    HubData(name='math-ai/aime25', split='test', configs=(None,), revision=None)
    >>> find_source("apple/GSM-Symbolic:p1:test").configs
    ('p1',)

    Raises:
        EvalError: it is neither.
    """
    path = Path(data)
    try:
        exists = path.exists()
    except OSError as error:  # a name too long, a folder closed to us
        raise EvalError(f"--data {data} cannot be read ({error.strerror}). Give another {FORMATS} file.") from None
    if exists or path.suffix in SUFFIXES:
        return path
    found = HUB.fullmatch(data)
    if found is None:
        raise EvalError(
            f"--data {data} is neither a file nor a data set on the Hub. Give a {FORMATS} file, or "
            "ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG:SPLIT."
        )
    name, revision, first, second = found.groups()
    config, split = (first, second) if second else (None, first)
    return HubData(name, split or "test", (config,), revision)


def read_source(source: HubData | Path) -> list[dict[str, Any]]:
    """All rows of a file, or of a data set on the Hub."""
    return source.read() if isinstance(source, HubData) else list(read_rows(source))
