"""A picture of the rooms of matrix_llm as floors, with the imports between them; and the path of one row.

    python benchmarks/architecture.py --out docs/architecture.png
    python benchmarks/architecture.py --row recipes/tiny.yaml

The floors are those of the import-linter contract in pyproject.toml, and the arrows are the imports that
import-linter sees, so that the picture and `make lint` cannot disagree. --out draws, and prints the same as text.
--row trains one step of a recipe in a temporary folder and lists the modules that run between the recipe and the
first loss, in the order in which a reader meets them; without it no model is made. Needs the dev extra
(import-linter).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import ast
import re
import subprocess
import tempfile
import tomllib
from collections import Counter
from dataclasses import dataclass

import grimp
from matplotlib.figure import Figure

from benchmarks.output import save_figure

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "matrix_llm"
DOWN, UP = "#1f77b4", "#d62728"  # an arrow that points up breaks the contract


@dataclass(frozen=True)
class Room:
    """A folder of the package, or one of its top-level files."""

    name: str
    """Name of the folder, or of the file without its suffix."""
    floor: int
    """0 is the ground floor."""
    files: int
    """Number of Python files."""
    lines: int
    """Lines in these files."""
    purpose: str
    """The first line of its docstring."""


@dataclass(frozen=True)
class House:
    rooms: list[Room]
    """From the top floor down."""
    imports: dict[tuple[str, str], int]
    """(importing room, imported room) -> number of imports."""

    def floor_of(self, name: str) -> int:
        return next(room.floor for room in self.rooms if room.name == name)

    def imports_upward(self) -> list[tuple[str, str]]:
        """Imports of a room that is not on a lower floor; there should be none."""
        return [pair for pair in self.imports if self.floor_of(pair[0]) <= self.floor_of(pair[1])]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_floors(root: Path = ROOT) -> list[list[str]]:
    """Names of the rooms on each floor, the top floor first, from pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers" and contract["layers"][0].startswith(f"{PACKAGE}."):
            return [re.findall(rf"{PACKAGE}\.(\w+)", layer) for layer in contract["layers"]]
    raise SystemExit(f"error: pyproject.toml has no import-linter contract of type layers over {PACKAGE}.")


def read_house(root: Path = ROOT) -> House:
    """Rooms and imports, as import-linter counts them: imports for type checkers alone do not count."""
    floors = read_floors(root)
    names = [(name, len(floors) - 1 - place) for place, floor in enumerate(floors) for name in floor]
    rooms = [make_room(name, floor, root) for name, floor in names]
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    imports: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = room_of(module), room_of(imported)
            if all(pair) and pair[0] != pair[1]:
                imports[pair] += 1
    return House(rooms, dict(sorted(imports.items())))


def room_of(module: str) -> str:
    """`loss` for matrix_llm.loss.krylov; "" for the package itself.

    >>> room_of("matrix_llm.loss.krylov")
    'loss'
    """
    return module.split(".")[1] if "." in module else ""


def make_room(name: str, floor: int, root: Path) -> Room:
    place = root / PACKAGE / name
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    first = place / "__init__.py" if place.is_dir() else files[0]
    purpose = ast.get_docstring(ast.parse(first.read_text(encoding="utf-8"))) or ""
    return Room(name, floor, len(files), lines, purpose.partition("\n")[0])


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(house: House, path: Path) -> None:
    """A line for each room, in bands by floor; under each importing room a stem with an arrow into each it imports."""
    importing = [room.name for room in house.rooms if any(pair[0] == room.name for pair in house.imports)]
    column = {name: place + 0.5 for place, name in enumerate(importing)}
    line = {room.name: len(house.rooms) - 1 - place for place, room in enumerate(house.rooms)}
    figure = Figure(figsize=(12, 1.0 + 0.5 * len(house.rooms)), layout="constrained")
    axes = figure.subplots()

    # 1. Floors as bands, rooms as labels to the left of them.
    for room in house.rooms:
        shade = "#eef2f7" if room.floor % 2 else "#dde5ee"
        axes.axhspan(line[room.name] - 0.5, line[room.name] + 0.5, color=shade, linewidth=0)
        axes.text(-0.1, line[room.name], room.name, ha="right", va="center", weight="bold", fontsize=11)
        size = f"{room.files} files, {room.lines:,} lines" if room.files > 1 else f"{room.lines:,} lines"
        axes.text(-2.25, line[room.name], size, ha="right", va="center", fontsize=8, color="#555555")

    # 2. A stem under each importing room, with an arrow and a count at each room that it imports.
    for (above, below), count in house.imports.items():
        x, start, end = column[above], line[above], line[below]
        arrow = {"arrowstyle": "-|>", "color": DOWN if house.floor_of(above) > house.floor_of(below) else UP}
        axes.annotate("", (x, end), (x, start), arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
        axes.text(x + 0.1, end, str(count), va="center", fontsize=9)
    for name, x in column.items():
        axes.plot(x, line[name], "o", color=DOWN, markersize=7)

    axes.set(xlim=(-4.2, len(importing)), ylim=(-0.5, len(house.rooms) - 0.5))
    axes.set_title(f"{PACKAGE}: each dot is a room, the arrows under it are its imports, with their number")
    axes.set_axis_off()
    save_figure(figure, path)


def describe(house: House) -> str:
    """The picture in words: a line for each room, from the top floor down."""
    lines = []
    for room in house.rooms:
        below = [f"{name} {count}" for (above, name), count in house.imports.items() if above == room.name]
        lines.append(f"{room.floor:2}  {room.name:12} {room.files:3} files {room.lines:6,} lines  {room.purpose}")
        lines.append(f"    imports {', '.join(below)}" if below else "    imports no other room")
    return "\n".join(lines)


# --- the way of one row ----------------------------------------------------------------------------------------------

# Runs in a separate process: it follows every call, and ends with os._exit at the first loss.
TRACE = """
import inspect, os, runpy, sys
package, script, recipe, output = sys.argv[1:]
met, importing = {}, 0

def follow(frame, event, argument):
    global importing
    code = frame.f_code
    if not code.co_filename.startswith(package):
        return
    if code.co_name == "<module>" and code.co_filename != script:
        importing += {"call": 1, "return": -1}.get(event, 0)
    elif event == "call" and not importing and code.co_flags & inspect.CO_OPTIMIZED:  # a function, not a class's body
        met.setdefault(os.path.relpath(code.co_filename, package), code.co_name)
    elif event == "return" and code.co_name == "compute_loss":
        sys.setprofile(None)
        print("".join(f"way: {file} ({name})\\n" for file, name in met.items()), flush=True)
        os._exit(0)

sys.argv = [script, recipe, "--output_dir", output, "--use_cpu", "true", "--bf16", "false", "--dataset_num_proc", "1"]
sys.path[0] = os.path.dirname(os.path.dirname(script))
sys.setprofile(follow)
runpy.run_path(script, run_name="__main__")
"""


def trace_row(recipe: Path, root: Path = ROOT) -> list[str]:
    """Files of the package that run between the start of the command and the first loss, in order.

    Each is followed by its first function. What runs while a module is imported does not count.
    """
    package = root / PACKAGE
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-c", TRACE, str(package), str(package / "train.py"), str(recipe), output]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    way = [line.removeprefix("way: ") for line in done.stdout.splitlines() if line.startswith("way: ")]
    if not way:
        raise SystemExit(f"error: training {recipe} ended before its first loss:\n{done.stderr[-2000:]}")
    return way


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the PNG to write")
    parser.add_argument("--row", type=Path, metavar="RECIPE", help="list the files on the way of a row of this recipe")
    options = parser.parse_args()
    if not options.out and not options.row:
        parser.error("nothing to do: give --out PICTURE.png, --row RECIPE, or both.")
    if options.out:
        house = read_house()
        draw(house, options.out)
        print(describe(house))
    if options.row:
        way = trace_row(options.row.absolute())
        print(f"{len(way)} files run between {options.row} and its first loss, in this order:")
        print("\n".join(f"  {PACKAGE}/{file}" for file in way))
    return 0


if __name__ == "__main__":
    sys.exit(main())
