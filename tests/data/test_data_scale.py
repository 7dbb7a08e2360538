"""MetaMathQA's size, at a hundredth of it: tokenised once for all processes, streamed, and free of test questions."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from benchmarks import data_scale
from matrix_llm.base.errors import DataError
from matrix_llm.base.files import read_jsonl
from matrix_llm.data import cache
from matrix_llm.data.readers import Source
from matrix_llm.data.streaming import TokenStream, shuffled
from matrix_llm.data.tokens import Encoder
from matrix_llm.run import prepare
from matrix_llm.run.prepare import prepare_data
from matrix_llm.train import main
from tests.support.paths import ROOT
from tests.support.tiny import TINY


def quiet(_):
    pass


# -------------------------------------------------------------------------------------------------------------- the cache


def test_a_second_run_tokenises_nothing_and_gets_the_same(recipe, rows, tokenised):
    settings = {"dataset": rows(), "eval_dataset": "builtin", "builtin_eval_rows": 5}
    first = prepare_data(recipe(**settings), say=quiet)
    second = prepare_data(recipe(**settings), say=quiet)
    assert tokenised == ["train", "held out"]
    assert first[1][0].to_list() == second[1][0].to_list()
    assert first[1][1] == second[1][1]
    assert first[1][0]._fingerprint == second[1][0]._fingerprint  # TRL's packing is cached by it


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_template": "metamath"}, {"max_length": 30}, {"response_separator": ""}, {"seed": 1}, {"too_long": "truncate"},
        {"max_train_rows": 39},
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
    _, (dataset, _), _ = prepare_data(recipe(dataset=str(path)), say=quiet)
    assert tiny_tokenizer.decode(dataset[1]["labels"][-3:]).endswith("3</s>")
    again = recipe(dataset=str(path))
    changed = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    changed["post_processor"] = None  # no <s> in front any more
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(changed))
    prepare_data(again, say=quiet)
    assert tokenised == ["train"] * 3


def test_a_tokenizer_called_with_padding_is_still_the_same(tiny_tokenizer):
    before = cache.tokenizer_key(tiny_tokenizer)
    tiny_tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert cache.tokenizer_key(tiny_tokenizer) == before


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


def test_tokenising_in_two_processes_gives_the_same_rows(recipe, rows):
    one = prepare_data(recipe(dataset=rows(50)), say=quiet)[1]
    shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE))
    two = prepare_data(recipe(dataset=rows(50), dataset_num_proc=2), say=quiet)[1]
    assert one[0].to_list() == two[0].to_list()
    assert one[1] == two[1]


def test_what_was_cut_off_is_not_taken_for_whole(recipe, rows, monkeypatch, empty_cache):
    loaded = recipe(dataset=rows())
    original = prepare.tokenise

    def killed(*args, file, **options):
        original(*args, file=file, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "tokenise", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(loaded, say=quiet)
    assert not [each for each in empty_cache.iterdir() if each.name.startswith("tokens")]
    abandoned = empty_cache / ".building-x"  # as SIGKILL leaves it
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    monkeypatch.setattr(prepare, "tokenise", original)
    assert prepare_data(loaded, say=quiet)[1][1].rows_kept == 40
    assert not abandoned.exists()


def test_a_folder_that_another_process_has_just_finished_is_not_looked_at(recipe, rows, empty_cache):
    empty_cache.mkdir(parents=True, exist_ok=True)
    (empty_cache / ".building-y").symlink_to(empty_cache / "renamed since")  # listed, and gone when it is read
    assert prepare_data(recipe(dataset=rows()), say=quiet)[1][1].rows_kept == 40


def test_a_cache_that_cannot_be_written_is_said_and_done_without(recipe, rows, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    said = []
    assert prepare_data(recipe(dataset=rows()), say=said.append)[1][1].rows_kept == 40
    assert "nothing is cached" in said[0]
    assert "Set HF_DATASETS_CACHE" in said[0]


def test_a_full_disk_is_one_line_with_the_way_out(recipe, rows, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "tokenise", full)
    with pytest.raises(
        DataError, match=r"cannot be written: No space left on device. Make room, or set HF_DATASETS_CACHE"
    ):
        prepare_data(recipe(dataset=rows()), say=quiet)


def test_a_trained_tokenizer_is_kept_and_leaves_no_path_in_the_output(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**TINY, "max_steps": 1, "output_dir": str(tmp_path / "run")}))
    assert main([str(path)]) == 0
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr("matrix_llm.model.load.train_tokenizer", None)  # the second run must not call it
    assert main([str(path)]) == 0
    for file in (tmp_path / "run").glob("*.json"):
        assert str(tmp_path / "cache") not in file.read_text(), file


# --------------------------------------------------------------------------------------------------------------- measures


def test_length_statistics_are_numpys(recipe, rows):
    _, (whole, report), _ = prepare_data(recipe(dataset=rows(200), max_length=None), say=quiet)
    _, (dataset, cut), _ = prepare_data(recipe(dataset=rows(200), max_length=report.p50), say=quiet)
    lengths = [len(ids) for ids in whole["input_ids"]]
    assert report.mean_read == pytest.approx(np.mean(lengths))
    assert [report.p50, report.p90, report.p99] == [sorted(lengths)[i] for i in (99, 179, 197)]
    assert (cut.longest, cut.p99) == (report.longest, report.p99)  # of what was read, not of what was kept
    over = sum(length > report.p50 for length in lengths)
    assert 0 < over == cut.dropped_too_long == 200 - len(dataset)
    assert f"{over} rows dropped, longer than max_length ({over / 2:.2f} %)" in cut.lines()[2]


# -------------------------------------------------------------------------------------------------------------- streaming


def stream(path, tokenizer, buffer=1, **options):
    encoder = Encoder(tokenizer, "query/response", "plain", **options)
    return TokenStream(Source(path), encoder, seed=0, buffer=buffer)


def take(items, count):
    return list(itertools.islice(items, count))


def test_a_stream_in_order_is_the_cached_set_without_the_same_rows(recipe, rows, tiny_tokenizer):
    path = rows(40, {3: "long " * 60, 7: "x " * 45})
    for too_long in ("drop", "truncate"):
        cached = prepare_data(recipe(dataset=path, max_length=60, too_long=too_long), say=quiet)[1][0].to_list()
        assert 37 < len(cached) < 40
        streamed = take(stream(path, tiny_tokenizer, max_length=60, too_long=too_long), 2 * len(cached))
        assert streamed == [*cached, *cached]


def test_each_pass_has_every_row_once_in_an_order_of_its_own(rows, tiny_tokenizer):
    ids = [row["row_id"] for row in take(stream(rows(40), tiny_tokenizer, buffer=16), 80)]
    assert sorted(ids[:40]) == sorted(ids[40:]) == list(range(40))
    assert ids[:40] != ids[40:]
    assert ids == [row["row_id"] for row in take(stream(rows(40), tiny_tokenizer, buffer=16), 80)]
    assert ids[:40] != list(range(40))


def test_a_stream_starts_after_one_buffer():
    read = []
    rows = (read.append(i) or i for i in range(10_000))
    next(shuffled(rows, 50, random.Random(0)))
    assert len(read) == 51


def test_a_stream_without_a_usable_row_stops(rows, tiny_tokenizer):
    with pytest.raises(DataError, match=r"all 40 rows of .* are too long"):
        next(iter(stream(rows(40), tiny_tokenizer, max_length=3)))
    with pytest.raises(DataError, match=r"row 1 of .* tokens long, over max_length=3"):
        next(iter(stream(rows(40), tiny_tokenizer, max_length=3, too_long="error")))


STREAM = {
    **TINY, "builtin_rows": 20, "streaming": True, "max_steps": 8, "lr_scheduler_type": "constant", "save_strategy": "steps",
    "save_steps": 3,
}  # fmt: skip


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in read_jsonl(folder / "metrics.jsonl") if "loss" in entry}


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_stream_goes_on_as_the_unbroken_one(tmp_path, packing):
    """From step 3 of pass 1, over the end of the pass: five batches of 4 are 20 rows."""
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**STREAM, "packing": packing, "output_dir": str(tmp_path / "run")}))
    assert main([str(path)]) == 0
    whole = losses(tmp_path / "run")
    for each in (tmp_path / "run").iterdir():  # as if killed after step 4
        if each.name not in ("checkpoint-3", "recipe.yaml"):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    assert main([str(path), "--resume_from_checkpoint", "true"]) == 0
    resumed = losses(tmp_path / "run")
    assert min(resumed) == 4
    assert resumed == {step: loss for step, loss in whole.items() if step > 3}
    assert len(set(whole.values())) == 8


@pytest.mark.slow
def test_two_ranks_stream_different_rows_and_match_one(tmp_path):
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, batch in (("one", 4), ("two", 2)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            json.dumps({**STREAM, "per_device_train_batch_size": batch, "output_dir": str(tmp_path / name)})
        )
    assert main([str(tmp_path / "one.yaml")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "matrix_llm/train.py"), str(tmp_path / "two.yaml")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_plan_of_a_stream_measures_its_first_rows(recipe, capsys):
    recipe(streaming=True, max_steps=8, builtin_rows=1500)
    path = next(Path(datasets.config.HF_DATASETS_CACHE).parent.glob("recipe.yaml"))
    assert main([str(path), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "1,000 of the first 1,000 rows of the stream" in shown
    assert "optimizer steps  8 (of a stream)" in shown
    assert "TRAINED|" in shown


# ----------------------------------------------------------------------------------------------------------------- all of it


def test_five_thousand_rows_of_metamathqas_shape(tmp_path, tokenised):
    """What benchmarks/data_scale.py does with 395,000."""
    path, tests = data_scale.prepare(tmp_path, 5000, [])
    with path.open() as file:
        made = [json.loads(line) for line in file]
    assert list(made[0]) == ["query", "response", "type", "original_question"]
    assert 180 < np.mean([len(row["query"]) for row in made]) < 300
    assert 380 < np.mean([len(row["response"]) for row in made]) < 600
    assert 800 < path.stat().st_size / 5000 < 1000  # 350 MB at 395,000

    def run(phase):
        return data_scale.run_phase(phase, tmp_path, str(path), list(map(str, tests)), None)

    first, second = run("first run"), run("second run")
    assert tokenised == ["train"]
    assert first["rows_kept"] == second["rows_kept"] > 4800
    assert second["work_seconds"] < first["work_seconds"] / 2
    leaked = run("leakage check")
    assert leaked["dropped_leaked"] == 5000 // data_scale.PLANTED  # all that were planted, and none of the others
    assert tokenised == ["train"]
