"""MetaMathQA's size, at a hundredth of it: tokenised once for all processes, streamed, and free of test questions."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest

from benchmarks import data_scale
from matrix_llm.base.errors import DataError
from matrix_llm.base.files import read_jsonl
from matrix_llm.config import load_recipe
from matrix_llm.data import cache
from matrix_llm.data.leakage import QuestionIndex, find_leaks
from matrix_llm.data.readers import Source
from matrix_llm.data.streaming import TokenStream, shuffled
from matrix_llm.data.tokens import Encoder
from matrix_llm.run import prepare
from matrix_llm.run.prepare import prepare_data, question_source
from matrix_llm.train import main
from tests.support.paths import ROOT
from tests.support.tiny import TINY

QUESTION = "Ana buys 3 pens at 4 dollars each and pays with a note of 20 dollars. How many dollars does she get back?"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "matrix_llm"


@pytest.fixture
def rows(tmp_path):
    """rows(n, **planted) writes n rows, with the given queries at given places, and returns the path."""

    def write(count=40, planted=None):
        path = tmp_path / "rows.jsonl"
        queries = {i: f"{i} + {i}?" for i in range(count)} | (planted or {})
        path.write_text(
            "".join(
                json.dumps({"query": queries[i], "response": f"The answer is: {2 * i}"}) + "\n" for i in range(count)
            )
        )
        return str(path)

    return write


@pytest.fixture
def recipe(tmp_path, tiny_tokenizer, rows):
    """recipe(key=value) loads a recipe on rows() with a saved tokenizer."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def load(**changes):
        settings = {
            **TINY, "tokenizer_vocab_size": None, "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
            "output_dir": str(tmp_path / "run"), **changes,
        }  # fmt: skip
        settings.setdefault("dataset", "builtin")
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
        return load_recipe(path)

    return load


@pytest.fixture
def tokenised(monkeypatch):
    """The names of the sets that were tokenised, rather than found."""
    names = []
    original = prepare.tokenise
    monkeypatch.setattr(prepare, "tokenise", lambda *a, name, **k: names.append(name) or original(*a, name=name, **k))
    return names


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
    monkeypatch.setattr("matrix_llm.model.tokenizer.train_tokenizer", None)  # the second run must not call it
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


# ---------------------------------------------------------------------------------------------------------------- leakage


@pytest.fixture
def test_set(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(
        json.dumps({"question": QUESTION, "answer": "#### 8"}) + "\n" + json.dumps({"problem": "1 + 1?"})
    )
    return str(tmp_path / "gsm8k.jsonl")


PLANTED = {
    5: QUESTION.replace("Ana", "Zoe"),
    9: "$1+1$?",
    20: f"Read this. {QUESTION.upper()}",
    30: QUESTION[:60] + " How much is that?",
}


def test_leaked_rows_are_reported_and_kept(recipe, rows, test_set, tmp_path):
    said = []
    loaded = recipe(dataset=rows(40, PLANTED), leakage_check=[test_set])
    _, (_, report), _ = prepare_data(loaded, say=said.append)
    written = json.loads((tmp_path / "run/leakage.json").read_text())
    assert written["leaked"] == [
        1,
        5,
        9,
        20,
    ]  # row 1 asks "1 + 1?" as well; row 30 holds less than half of the question's sequences
    assert (written["exact"], written["rows"], written["test_questions"], written["too_short"]) == (2, 40, 2, 1)
    assert {each["row"]: each["test"] for each in written["examples"]} == {
        1: f"{test_set}:2", 5: f"{test_set}:1", 9: f"{test_set}:2", 20: f"{test_set}:1",
    }  # fmt: skip
    assert "4 rows hold one of 2 test questions: 2 are equal to it" in said[0]
    assert "row 5 ~" in said[0]
    assert report.rows_kept == 40


@pytest.mark.parametrize("streaming", [False, True])
def test_leaked_rows_are_dropped_with_a_count(recipe, rows, test_set, streaming):
    more = {"streaming": True, "max_steps": 4} if streaming else {}
    loaded = recipe(dataset=rows(40, PLANTED), leakage_check=[test_set], leakage="drop", **more)
    _, (dataset, report), _ = prepare_data(loaded, say=quiet)
    ids = [row["row_id"] for row in take(dataset, 36)]
    assert sorted(ids) == sorted(set(range(40)) - {1, 5, 9, 20})
    assert (report.dropped_leaked, report.rows_kept) == (4, 36)
    assert any("4 rows dropped, found among the questions of leakage_check" in line for line in report.lines())


def test_stop_names_the_first_row_and_trains_nothing(tmp_path, rows, test_set, capsys):
    path = tmp_path / "r.yaml"
    settings = {
        **TINY,
        "dataset": rows(40, PLANTED),
        "leakage_check": [test_set],
        "leakage": "stop",
        "output_dir": str(tmp_path / "run"),
    }
    path.write_text(json.dumps(settings))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert f"4 of 40 training rows hold test questions, the first is row 1 ({test_set}:2)" in error
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["leakage.json"]
    path.write_text(json.dumps({**settings, "dataset": rows(40, {1: "2 + 1?"})}))
    assert main([str(path)]) == 0  # nothing found, nothing stopped


def test_a_dry_run_reports_leaks_and_writes_nothing(recipe, rows, test_set, tmp_path):
    said = []
    prepare_data(recipe(dataset=rows(40, PLANTED), leakage_check=[test_set]), say=said.append, dry_run=True)
    assert "4 rows hold" in said[0]
    assert not (tmp_path / "run").exists()


def test_the_check_is_cached_by_the_content_of_both_sides(recipe, rows, test_set, monkeypatch):
    calls = []
    monkeypatch.setattr(prepare, "find_leaks", lambda *a: calls.append(1) or find_leaks(*a))

    def found(**changes):
        loaded = recipe(dataset=rows(40, PLANTED), leakage_check=[test_set], leakage="drop", **changes)
        return prepare_data(loaded, say=quiet)[1][1].dropped_leaked

    assert (found(), found(), len(calls)) == (4, 4, 1)
    assert (found(leakage_share=0.1), len(calls)) == (5, 2)
    Path(test_set).write_text(json.dumps({"problem": "1 + 1?"}))
    assert (found(), len(calls)) == (2, 3)


def test_short_questions_match_as_a_whole_only():
    index = QuestionIndex([("t", "What is 1 + 1?")])
    assert find_leaks(["So, what is 1 + 1? And 2 + 2?", "what is $1+1$?"], index, ["t"]).leaked == [1]


def test_a_test_set_without_questions_is_refused(recipe, rows, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"answer": "1"}\n')
    with pytest.raises(
        DataError, match=r"odd.jsonl line 1: leakage_check finds no question. A row needs one of: problem, question"
    ):
        prepare_data(recipe(dataset=rows(), leakage_check=[str(tmp_path / "odd.jsonl")]), say=quiet)


def test_a_hub_test_set_names_its_configuration(tmp_path, monkeypatch):
    assert question_source("openai/gsm8k:main") == Source("openai/gsm8k", "main", split="test")
    assert question_source("openai/gsm8k") == Source("openai/gsm8k", split="test")
    (tmp_path / "a:b.jsonl").write_text("")
    assert question_source(str(tmp_path / "a:b.jsonl")).config is None


def test_memory_of_the_check_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for count in (2000, 8000):
        texts = (
            f"Person {i} has {i * 7} pens and gives {i} of them to a friend. How many are left now, if any?"
            for i in range(count)
        )
        tracemalloc.start()
        find_leaks(texts, QuestionIndex([("t", QUESTION)]), ["t"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 10_000


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
