"""A stream gives the rows of the cached set, in an order that two ranks and a resumed run repeat."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.base.files import read_jsonl
from matrix_llm.data.readers import Source
from matrix_llm.data.streaming import StreamedSet, TokenStream, shuffle_through_buffer
from matrix_llm.data.tokens import Encoder
from matrix_llm.run.prepare import prepare_data
from matrix_llm.train import main
from tests.support.paths import ROOT
from tests.support.tiny import TINY


def quiet(_):
    pass


def stream(path, tokenizer, buffer=1, **options):
    encoder = Encoder(tokenizer, "template", prompt_template="plain", **options)
    return TokenStream([StreamedSet(Source(path), encoder)], seed=0, buffer=buffer)


def take(items, count):
    return list(itertools.islice(items, count))


def test_a_stream_in_order_is_the_cached_set_without_the_same_rows(recipe, rows, tiny_tokenizer):
    path = rows(40, {3: "long " * 60, 7: "x " * 45})
    for too_long in ("drop", "truncate"):
        cached = prepare_data(recipe(dataset=path, max_length=60, too_long=too_long), say=quiet).train.to_list()
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
    next(shuffle_through_buffer(rows, 50, random.Random(0)))
    assert len(read) == 51


def test_a_stream_without_a_usable_row_stops(rows, tiny_tokenizer):
    with pytest.raises(DataError, match=r"all 40 rows of .* are too long"):
        next(iter(stream(rows(40), tiny_tokenizer, max_length=3)))
    with pytest.raises(DataError, match=r"row 1 of .* tokens long, over max_length=3"):
        next(iter(stream(rows(40), tiny_tokenizer, max_length=3, too_long="error")))


STREAM = {
    **TINY, "builtin_rows": 20, "streaming": True, "max_steps": 8, "lr_scheduler_type": "constant",
    "save_strategy": "steps", "save_steps": 3,
}  # fmt: skip


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in read_jsonl(folder / "metrics.jsonl") if "loss" in entry}


SEVERAL = ["builtin", {"path": "builtin", "split": "test", "weight": 0.5, "max_rows": 10}]


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"dataset": SEVERAL, "builtin_rows": 12}], ids=str)
def test_a_resumed_stream_goes_on_as_the_unbroken_one(tmp_path, changes):
    """From step 3 of pass 1, over the end of the pass: five batches of 4 are 20 rows."""
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**STREAM, **changes, "output_dir": str(tmp_path / "run")}))
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
