"""The picture of the house: its arrows are the imports, they point down, and they are drawn."""

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks import architecture
from benchmarks.architecture import House, Room
from tests.support.pictures import count_colour


def test_every_import_between_rooms_points_down():
    house = architecture.read_house()
    assert house.imports_upward() == []
    assert house.imports["trainer", "model"] > 0  # it did read imports


def test_every_room_of_the_package_stands_on_a_floor():
    house = architecture.read_house()
    package = architecture.ROOT / architecture.PACKAGE
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__"} == {room.name for room in house.rooms}


def small_house(imports):
    return House([Room("roof", 1, 1, 10, "Top."), Room("cellar", 0, 2, 20, "Bottom.")], imports)


def test_an_import_of_a_higher_floor_is_found_and_drawn_in_red(tmp_path):
    down, up = small_house({("roof", "cellar"): 2}), small_house({("roof", "cellar"): 2, ("cellar", "roof"): 1})
    assert (down.imports_upward(), up.imports_upward()) == ([], [("cellar", "roof")])
    pixels = []
    for name, house in (("down.png", down), ("up.png", up)):
        architecture.draw(house, tmp_path / name)
        picture = imread(tmp_path / name)
        pixels.append([int(count_colour(picture, colour).sum()) for colour in (architecture.DOWN, architecture.UP)])
    (blue, red), (_, red_upward) = pixels
    assert blue > 50
    assert red == 0
    assert red_upward > 50


def test_the_picture_of_the_house_has_a_stem_for_every_importing_room_and_is_the_same_each_time(tmp_path):
    house = architecture.read_house()
    for name in ("once.png", "again.png"):
        architecture.draw(house, tmp_path / name)
    assert (tmp_path / "once.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    blue = count_colour(imread(tmp_path / "once.png"), architecture.DOWN, tolerance=0.15).any(0)  # (width,)
    stems = int(np.count_nonzero(np.diff(blue.astype(int)) == 1))
    assert stems == len({above for above, _ in house.imports})


@pytest.mark.slow
def test_the_way_of_a_row_leads_from_the_recipe_through_the_data_to_the_loss():
    way = [line.split()[0] for line in architecture.trace_row(architecture.ROOT / "recipes" / "tiny.yaml")]
    order = [way.index(file) for file in ("train.py", "config.py", "run/prepare.py", "trainer.py", "loss/linear.py")]
    assert order == sorted(order)
    assert "publish/card.py" not in way  # it runs after training
