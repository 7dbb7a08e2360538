"""What several measurements write: a Markdown table, and a picture that is complete or absent."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from matrix_llm.base.files import atomic_path


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every line has as many cells as the header.

    >>> print(markdown_table(["arm", "points"], [["mce", "+0.10"]]))
    | arm | points |
    | --- | --- |
    | mce | +0.10 |
    """
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write the picture in the format that the name of the file asks for."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
