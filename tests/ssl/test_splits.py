"""Classes matched by name, and files that list a split (evaluation/splits.py)."""

import pytest
import torch
from PIL import Image

from matrix_llm.base.errors import ProbeError
from matrix_llm.ssl.data import Images
from matrix_llm.ssl.evaluation.passes import labels_of
from matrix_llm.ssl.evaluation.splits import aligned, read_split
from tests.support.ssl_features import striped


def test_classes_of_two_folders_are_matched_by_name():
    train = striped(8)
    test = Images("other", ["a", "b"], lambda i: Image.new("L", (8, 8)), torch.tensor([0, 1]), ["class1", "class3"])
    assert labels_of(aligned(train, test)[1]).tolist() == [1, 3]
    with pytest.raises(ProbeError, match="lacks: owl"):
        aligned(train, Images("other", ["a"], lambda i: Image.new("L", (8, 8)), torch.tensor([0]), ["owl"]))
    with pytest.raises(ProbeError, match="are the same"):
        aligned(train, striped(8))
    with pytest.raises(ProbeError, match="has no labels"):
        aligned(train, Images("flat", ["a"], lambda i: Image.new("L", (8, 8))))


def test_split_files_name_images_by_path_or_by_file_name(tmp_path):
    images = striped(8)
    file = tmp_path / "1percent.txt"
    file.write_text("5.png\nclass2/2.png\n\n")
    assert read_split(file, images).tolist() == [2, 5]
    file.write_text("5.png\nclass1/5.png\n")
    with pytest.raises(ProbeError, match="twice"):
        read_split(file, images)
    file.write_text("5.png\nowl.png\n")
    with pytest.raises(ProbeError, match=r"1 of its 2 names .* e.g. owl.png"):
        read_split(file, images)
    file.write_text("0.png\n")
    with pytest.raises(ProbeError, match="or of several"):
        read_split(file, Images("x", ["a/0.png", "b/0.png"], lambda i: Image.new("L", (8, 8)), torch.tensor([0, 1])))
