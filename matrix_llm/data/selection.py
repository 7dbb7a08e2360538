"""Which tokenised rows can be trained on, and a report of what became of the others.

- too long: longer than max_length; dropped, cut or refused, depending on `too_long`
- without a trained token: the prompt alone fills max_length, or the assistant is silent; dropped, since such a row
  has no loss
- weight 0: the row says that it is not to be trained on
- leaked: its question is a test question (leakage.py), and the recipe has `leakage: drop`
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields

import datasets
import numpy as np

from matrix_llm.base.errors import DataError
from matrix_llm.data.tokens import HAD_END, HAD_START, LEFT_OUT, MEASURES, Encoder


@dataclass
class DataReport:
    """What became of the rows; printed before training, so that nothing is dropped or cut silently."""

    name: str
    """ "train" or "held out"."""
    rows_in: int
    """Rows read."""
    rows_kept: int
    """Rows to train or evaluate on."""
    dropped_too_long: int
    """Rows longer than max_length, with too_long: drop."""
    truncated: int
    """Rows cut to max_length and kept, with too_long: truncate."""
    dropped_all_masked: int
    """Rows dropped because none of their labels is trained."""
    tokens: int
    """Tokens in the rows kept, after the cut."""
    trained_tokens: int
    """Labels in the rows kept that are predicted."""
    longest: int
    """Tokens of the longest row read, before any cut."""
    mean_length: float
    """Tokens per row kept, after the cut."""
    mean_read: float = 0.0
    """Tokens per row read, before any cut."""
    p50: int = 0
    """Median length of the rows read, before any cut."""
    p90: int = 0
    """90 % of the rows read are no longer than this, before any cut."""
    p99: int = 0
    """99 % of the rows read are no longer than this, before any cut."""
    dropped_leaked: int = 0
    """Rows dropped because their question is a test question."""
    dropped_weight_zero: int = 0
    """Rows dropped because their `weight` is 0."""
    had_start: int = 0
    """Rows kept that began with <s> already; one is kept."""
    had_end: int = 0
    """Rows kept that ended in the end-of-text or end-of-turn token already; one is kept."""
    sampled: bool = False
    """True for a stream, of which only the first rows are measured."""
    weight: float = 1
    """Of one data set among several: how often its rows are taken."""
    rows_taken: int = 0
    """Of one data set among several: rows that an epoch takes of it, by its weight."""
    tokens_taken: int = 0
    """Tokens in the rows taken, after the cut."""
    trained_taken: int = 0
    """Labels in the rows taken that are predicted."""
    first_id: int = 0
    """Of one data set among several: the id of its first row."""
    parts: "list[DataReport]" = field(default_factory=list)
    """One report for each data set, if there are several; `rows_kept` is then the sum of their `rows_taken`."""

    def lines(self) -> list[str]:
        if self.parts:
            return [*self._sum_lines(), *(line for part in self.parts for line in (*part.lines(), part._taken_line()))]
        return self._own_lines()

    def _sum_lines(self) -> list[str]:
        of = "the first rows of the stream" if self.sampled else "an epoch"
        return [
            f"{self.name}: {self.rows_kept:,} rows in {of}, of {self.rows_in:,} read from {len(self.parts)} data "
            f"set{'s' if len(self.parts) > 1 else ''}, "
            f"{self.tokens:,} tokens, {self.trained_tokens:,} trained"
        ]

    def _taken_line(self) -> str:
        last_id = f"{self.first_id:,} to {self.first_id + self.rows_in - 1:,}"
        ids = "" if self.sampled else f"; row ids {last_id}"
        return f"{self.name}: weight {self.weight:g}: {self.rows_taken:,} rows taken{ids}"

    def _own_lines(self) -> list[str]:
        of = f"of the first {self.rows_in:,} rows of the stream" if self.sampled else f"of {self.rows_in:,} rows kept"
        kept = f"{self.name}: {self.rows_kept:,} {of}, {self.tokens:,} tokens, {self.trained_tokens:,} trained"
        size = (
            f"{self.name}: tokens per row, before any cut: mean {self.mean_read:.1f}, p50 {self.p50:,}, "
            f"p90 {self.p90:,}, p99 {self.p99:,}, longest {self.longest:,}; "
            f"mean of the rows kept {self.mean_length:.1f}"
        )
        lost = {
            "dropped, longer than max_length": self.dropped_too_long,
            "cut to max_length": self.truncated,
            "dropped, no trained token left": self.dropped_all_masked,
            "dropped, found among the questions of leakage_check": self.dropped_leaked,
            "dropped, weight 0": self.dropped_weight_zero,
            "began with the token that begins every row; one is kept": self.had_start,
            "ended in the token that ends every row; one is kept": self.had_end,
        }
        percent = 100 / max(self.rows_in, 1)
        return [
            kept,
            size,
            *(f"{self.name}: {n:,} rows {what} ({n * percent:.2f} %)" for what, n in lost.items() if n),
        ]


def combine_reports(name: str, parts: list[DataReport], lengths: np.ndarray) -> DataReport:
    """One report for several data sets, of the rows that are taken of them.

    Args:
        lengths: (rows,), of all rows read, before any cut.
    """
    # What is counted for each set is summed; what is not a count is replaced below
    counts = {
        each.name: sum(getattr(part, each.name) for part in parts) for each in fields(DataReport) if each.type is int
    }
    rows, tokens = counts["rows_taken"], counts["tokens_taken"]
    return DataReport(
        **counts
        | _quantiles(lengths)
        | {
            "name": name,
            "rows_kept": rows,
            "tokens": tokens,
            "trained_tokens": counts["trained_taken"],
            "mean_length": tokens / max(rows, 1),
            "first_id": 0,
            "sampled": any(part.sampled for part in parts),
            "parts": parts,
        }
    )


def _quantiles(lengths: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = (int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99))
    return {
        "longest": int(lengths.max()),
        "mean_read": float(lengths.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
    }


@dataclass(frozen=True)
class Verdicts:
    """One boolean per row."""

    is_over: np.ndarray
    """Longer than max_length."""
    is_dropped: np.ndarray
    """Over, and too_long is "drop"."""
    is_masked: np.ndarray
    """Not dropped for its length, but without any trained token."""


def judge(lengths: np.ndarray, trained: np.ndarray, encoder: Encoder) -> Verdicts:
    """Decide from the MEASURES of each row.

    Args:
        lengths, trained: (rows,), integers.
    """
    never = np.zeros(len(lengths), dtype=bool)
    is_over = never if encoder.max_length is None else lengths > encoder.max_length
    is_dropped = is_over if encoder.too_long == "drop" else never
    return Verdicts(is_over, is_dropped, (trained == 0) & ~is_dropped)


def drop_unusable(
    tokens: datasets.Dataset, encoder: Encoder, name: str, leaked: Collection[int] = ()
) -> tuple[datasets.Dataset, DataReport]:
    """The rows that can be trained on, without their MEASURES, and a report that counts the others.

    Args:
        tokens: as `tokenise` returns them.
        name: starts each line of the report and each error message.
        leaked: row ids to drop in any case.

    Raises:
        DataError: no row is left, or one is too long and too_long is "error".
    """
    lengths, trained = tokens.data.column("length").to_numpy(), tokens.data.column("trained").to_numpy()
    max_length, too_long = encoder.max_length, encoder.too_long

    # 1. Which rows to drop, each counted for one reason only: leaked, else weight 0, else too long, else masked
    verdicts = judge(lengths, trained, encoder)
    if verdicts.is_over.any() and too_long == "error":
        first = int(verdicts.is_over.argmax())
        raise DataError(
            f"{name}: row {first + 1} is {lengths[first]} tokens long, over max_length={max_length}, "
            f"as are {verdicts.is_over.sum()} rows in all. Raise max_length, or set too_long to drop or truncate."
        )
    is_leaked = np.zeros(len(lengths), dtype=bool)
    is_leaked[list(leaked)] = True
    notes = tokens.data.column("notes").to_numpy()
    is_left_out = (notes & LEFT_OUT > 0) & ~is_leaked
    is_dropped = verdicts.is_dropped & ~is_leaked
    is_masked = verdicts.is_masked & ~is_leaked & ~is_left_out
    kept = np.flatnonzero(~(is_dropped | is_masked | is_leaked | is_left_out))
    if not len(kept):
        if is_left_out.all():
            raise DataError(
                f"{name}: all {len(lengths)} rows have the weight 0, so nothing is left to train on. Remove their "
                "weights."
            )
        reasons = "longer than max_length"
        if not is_dropped.all():
            reasons += ", without a trained token, of weight 0, or dropped as leaked"
        raise DataError(
            f"{name}: all {len(lengths)} rows are {reasons}, so nothing is left to train on: the longest has "
            f"{max(lengths, default=0)} tokens, max_length={max_length}. Raise max_length."
        )

    # 2. The report
    cut = encoder.cut(lengths[kept])
    report = DataReport(
        name=name,
        rows_in=len(lengths),
        rows_kept=len(kept),
        dropped_too_long=int(is_dropped.sum()),
        truncated=int(verdicts.is_over[kept].sum()),  # an over-long row that is kept has been cut
        dropped_all_masked=int(is_masked.sum()),
        tokens=int(cut.sum(dtype=np.int64)),
        trained_tokens=int(trained[kept].sum(dtype=np.int64)),
        mean_length=float(cut.mean()),
        dropped_leaked=len(leaked),
        dropped_weight_zero=int(is_left_out.sum()),
        had_start=int((notes[kept] & HAD_START > 0).sum()),
        had_end=int((notes[kept] & HAD_END > 0).sum()),
        **_quantiles(lengths[~is_left_out]),  # type: ignore[arg-type]
    )

    # 3. The rows that stay; selecting all of them would only add a table of indices
    tokens = tokens.remove_columns([*MEASURES])
    return (tokens if len(kept) == len(lengths) else tokens.select(kept)), report
