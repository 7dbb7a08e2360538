"""Rows are tokenised once for all processes and runs, and again when anything that decides the tokens has changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from trl import pack_dataset

from matrix_llm.base.errors import DataError
from matrix_llm.data import rowset
from matrix_llm.data.cache import code_digest, tokenizer_key
from matrix_llm.run.prepare import prepare_data
from matrix_llm.train import main
from tests.support.paths import ROOT
from tests.support.tiny import TINY


def quiet(_):
    pass


# --- what is found again ----------------------------------------------------------------------------------------------


def test_a_second_run_tokenises_nothing_and_gets_the_same(recipe, rows, tokenised):
    settings = {"dataset": rows(), "eval_dataset": "builtin", "builtin_eval_rows": 5}
    first = prepare_data(recipe(**settings), say=quiet)
    second = prepare_data(recipe(**settings), say=quiet)
    assert tokenised == ["train", "held out"]
    assert first.train.to_list() == second.train.to_list()
    assert first.report == second.report
    trained = [data.train.select_columns(["input_ids", "labels"]) for data in (first, second)]
    packed = [pack_dataset(each, seq_length=512) for each in trained]
    assert packed[0].cache_files
    assert packed[0].cache_files == packed[1].cache_files  # TRL packs once for both


def test_two_ranks_and_a_later_process_tokenise_once(tmp_path, rows, empty_cache):
    """The ranks of one launch, then another process: one of them tokenises, and what they read is one file."""
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**TINY, "dataset": rows(), "output_dir": str(tmp_path / "run")}))
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [str(ROOT / "matrix_llm/train.py"), str(path), "--dry_run"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    errors = []
    for launcher in (ranks, [sys.executable]):
        done = subprocess.run([*launcher, *script], env=env, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "40 of 40 rows kept" in done.stdout
        errors.append(done.stderr)
    assert errors[0].count("Tokenising train: 100%") == 1
    assert "Tokenising" not in errors[1]
    assert sorted(each.name.split("-")[0] for each in empty_cache.iterdir()) == ["rows", "tokenizer", "tokens"]


def test_a_trained_tokenizer_is_found_again_and_leaves_no_path_in_the_output(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**TINY, "max_steps": 1, "output_dir": str(tmp_path / "run")}))
    assert main([str(path)]) == 0
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr("matrix_llm.model.tokenizer.train_tokenizer", None)  # the second run must not call it
    assert main([str(path)]) == 0
    for file in (tmp_path / "run").glob("*.json"):
        assert str(tmp_path / "cache") not in file.read_text(), file


def test_a_tokenizer_called_with_padding_is_still_the_same(tiny_tokenizer):
    before = tokenizer_key(tiny_tokenizer)
    tiny_tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_key(tiny_tokenizer) == before


# --- what is made again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_template": "metamath"}, {"max_length": 30}, {"response_separator": ""}, {"seed": 1},
        {"too_long": "truncate"}, {"max_train_rows": 39}, {"train_on": "last"}, {"boxed_answers": "keep"},
        {"completion_only_loss": False},
    ],
    ids=str,
)  # fmt: skip
def test_a_changed_setting_tokenises_again(recipe, rows, tokenised, change):
    path = rows()
    prepare_data(recipe(dataset=path), say=quiet)
    prepare_data(recipe(dataset=path, **change), say=quiet)
    assert tokenised == ["train", "train"]


def test_a_changed_byte_or_a_changed_tokenizer_tokenises_again(recipe, rows, tokenised, tmp_path, tiny_tokenizer):
    path = Path(rows())
    prepare_data(recipe(dataset=str(path)), say=quiet)
    stamp = path.stat()
    path.write_bytes(path.read_bytes().replace(b'The answer is: 2"', b'The answer is: 3"'))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the content counts, not the date
    dataset = prepare_data(recipe(dataset=str(path)), say=quiet).train
    assert tiny_tokenizer.decode(dataset[1]["labels"][-3:]).endswith("3</s>")
    again = recipe(dataset=str(path))
    changed = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    changed["post_processor"] = None  # without <s> in front
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(changed))
    prepare_data(again, say=quiet)
    assert tokenised == ["train"] * 3


def test_a_changed_or_a_new_file_of_the_code_that_decides_tokens_is_another_key(tmp_path):
    package = tmp_path / "matrix_llm"
    shutil.copytree(ROOT / "matrix_llm", package, ignore=shutil.ignore_patterns("__pycache__"))
    digests = [code_digest(package)]
    assert digests == [code_digest(ROOT / "matrix_llm")]
    changes = [
        *(f"data/{path.name}" for path in (package / "data").glob("*.py")),
        "data/new_form.py",
        "model/tokenizer.py",
    ]
    for name in changes:
        with (package / name).open("a") as file:
            file.write("# changed\n")
        code_digest.cache_clear()  # a process reads its code once
        digests.append(code_digest(package))
    assert len(set(digests)) == len(changes) + 1
    (package / "trainer.py").write_text("")  # tokens do not depend on it
    code_digest.cache_clear()
    assert code_digest(package) == digests[-1]


# --- what is whole, or not there --------------------------------------------------------------------------------------


def test_what_was_cut_off_is_not_taken_for_whole(recipe, rows, monkeypatch, empty_cache):
    loaded = recipe(dataset=rows())
    original = rowset.tokenise

    def killed(*args, file, **options):
        original(*args, file=file, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(rowset, "tokenise", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(loaded, say=quiet)
    assert not [each for each in empty_cache.iterdir() if each.name.startswith("tokens")]
    abandoned = empty_cache / ".building-x"  # as SIGKILL leaves it
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    monkeypatch.setattr(rowset, "tokenise", original)
    assert prepare_data(loaded, say=quiet).report.rows_kept == 40
    assert not abandoned.exists()


def test_a_folder_that_another_process_has_just_finished_is_not_looked_at(recipe, rows, empty_cache):
    empty_cache.mkdir(parents=True, exist_ok=True)
    (empty_cache / ".building-y").symlink_to(empty_cache / "renamed since")  # listed, and gone when it is read
    assert prepare_data(recipe(dataset=rows()), say=quiet).report.rows_kept == 40


def test_a_cache_that_cannot_be_written_is_said_and_done_without(recipe, rows, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    said = []
    assert prepare_data(recipe(dataset=rows()), say=said.append).report.rows_kept == 40
    assert "nothing is cached" in said[0]
    assert "Set HF_DATASETS_CACHE" in said[0]


def test_a_full_disk_is_one_line_with_the_way_out(recipe, rows, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rowset, "tokenise", full)
    with pytest.raises(DataError, match=r"No space left on device.*HF_DATASETS_CACHE"):
        prepare_data(recipe(dataset=rows()), say=quiet)
