"""A folder gives the rows of one configuration and one split, and never others along with them."""

import json

import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data.readers import Source


@pytest.fixture
def folder(tmp_path):
    """folder(*names) writes files that each hold one row, {"text": its name}, and returns the folder."""

    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(json.dumps({"text": name}) if "json" in name else name)
        return tmp_path

    return write


def found(folder, config=None, split="train"):
    return [each["text"] for _, each in Source(str(folder), config=config, split=split).read()]


def refusal(folder, config=None, split="train") -> str:
    with pytest.raises(DataError) as error:
        found(folder, config, split)
    assert "\n" not in str(error.value)
    return str(error.value)


GSM = ("main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl", "socratic/test.jsonl")


def test_a_configuration_is_chosen_and_two_are_never_mixed(folder):
    gsm = folder(*GSM)
    assert found(gsm, "main") == ["main/train.jsonl"]
    assert found(gsm, "socratic", "test") == ["socratic/test.jsonl"]
    assert "main, socratic" in refusal(gsm)
    assert "dataset_config" in refusal(gsm)
    assert "Did you mean main?" in refusal(gsm, "mian")
    assert "test, train" in refusal(gsm, "main", "dev")


def test_a_configuration_may_be_part_of_the_files_names(folder):
    gsm = folder("main_train.jsonl", "main_test.jsonl", "socratic_train.jsonl")
    assert found(gsm, "main") == ["main_train.jsonl"]
    assert found(gsm, "socratic") == ["socratic_train.jsonl"]
    assert "nothing for the configuration 'other'" in refusal(gsm, "other")


@pytest.mark.parametrize(
    "names",
    [
        ("a/rows.jsonl", "b/rows.jsonl"),
        ("data/main/train-00000-of-00001.jsonl", "data/socratic/train-00000-of-00001.jsonl"),
        ("main/train/0.jsonl", "socratic/train/0.jsonl"),
        ("train.jsonl", "extra/train.jsonl"),
    ],
    ids=str,
)
def test_rows_of_several_folders_are_refused_wherever_the_folders_stand(folder, names):
    assert "several configurations" in refusal(folder(*names))


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (("gsm8k_train.jsonl", "gsm8k_test.jsonl"), "train", ["gsm8k_train.jsonl"]),
        (("gsm8k_train.jsonl", "gsm8k_test.jsonl"), "test", ["gsm8k_test.jsonl"]),
        (("train/algebra/1.json", "train/geometry/1.json", "test/algebra/1.json"), "train",
         ["train/algebra/1.json", "train/geometry/1.json"]),
        (("train/0.jsonl", "test/0.jsonl"), "test", ["test/0.jsonl"]),
        (("test.jsonl", "backward_test.jsonl"), "test", ["test.jsonl"]),
        (("train-0.jsonl", "train-1.jsonl"), "train", ["train-0.jsonl", "train-1.jsonl"]),
        (("train.jsonl", "dev.jsonl"), "validation", ["dev.jsonl"]),
        (("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
         "train", ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
        (("train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"), "train_sft",
         ["train_sft-00000-of-00001.jsonl"]),
        (("a.jsonl", "b.jsonl", "dataset_info.json", "notes.txt"), "train", ["a.jsonl", "b.jsonl"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_split_is_found_by_the_names_of_files_and_folders(folder, names, split, read):
    assert found(folder(*names), split=split) == read


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (("gsm8k_test.jsonl",), "train", "files for test"),
        (("train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"), "train", "train_gen, train_sft"),
        (("train.jsonl", "train_socratic.jsonl"), "train", "train.jsonl, train_socratic.jsonl.*list of them"),
        (("main_train.jsonl", "socratic_train.jsonl"), "train", "main_train.jsonl, socratic_train.jsonl"),
        (("dev.jsonl", "valid.jsonl"), "validation", "dev, valid"),
        (("train.jsonl", "train.jsonl.gz"), "train", "both train.jsonl and train.jsonl.gz"),
        (("train-0.jsonl", "train-1.jsonl.bz2"), "train", r"train-1.jsonl.bz2.*is not read"),
        (("train-0.jsonl", "train-1.arrow"), "train", r"train-1.arrow.*is not read"),
        (("rows.xlsx",), "train", r"holds no .jsonl.*\.csv"),
    ],
    ids=str,
)
def test_rows_that_would_be_missed_or_read_twice_are_refused(folder, names, split, said):
    with pytest.raises(DataError, match=said):
        found(folder(*names), split=split)


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/tr*}
  - {split: test, path: [main/test.jsonl]}
- config_name: socratic
  data_files: socratic/train.jsonl
---
# A data set
"""


def test_the_data_card_decides_as_on_the_hub(folder):
    gsm = folder(*GSM, "main/tr-extra.jsonl")
    (gsm / "README.md").write_text(CARD)
    assert found(gsm, "main") == ["main/tr-extra.jsonl", "main/train.jsonl"]
    assert found(gsm, "main", "test") == ["main/test.jsonl"]
    assert found(gsm, "socratic") == ["socratic/train.jsonl"]
    assert "main, socratic" in refusal(gsm)
    assert "lists main, socratic, but not 'other'. Correct dataset_config" in refusal(gsm, "other")
    assert "none for the split 'test'" in refusal(gsm, "socratic", "test")
    (gsm / "README.md").write_text(CARD.replace("config_name: main", "config_name: main\n  default: true"))
    assert found(gsm) == ["main/tr-extra.jsonl", "main/train.jsonl"]
    (gsm / "README.md").write_text(CARD.replace("main/tr*", "main/none*"))
    assert "no file that is here" in refusal(gsm, "main")
    (gsm / "README.md").write_text("---\nlicense: mit\n---\n")  # says nothing of files
    assert "several configurations" in refusal(gsm)
