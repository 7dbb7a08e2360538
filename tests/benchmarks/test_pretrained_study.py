"""The study of a pretrained model: its runs, on a tiny model. The verdicts are in test_pretrained_analysis.py."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from benchmarks.pretrained_study import cache, one_run, run
from benchmarks.pretrained_study.command import main
from benchmarks.pretrained_study.design import CLIPPING, EPSILON, LARGER, WARMUP, WEIGHT_DECAY, make_arms
from benchmarks.pretrained_study.folder import RUNS, TUNING
from benchmarks.pretrained_study.measuring import number_spans, read
from benchmarks.pretrained_study.mechanism import Travel, compare_with_ce
from benchmarks.pretrained_study.one_run import make_run
from benchmarks.pretrained_study.rows import Tokens, draw
from benchmarks.pretrained_study.split import Split
from benchmarks.pretrained_study.training import loss_settings, rises, train, windows
from benchmarks.study.design import StudyError
from matrix_llm.base.files import read_jsonl
from matrix_llm.data.wordproblems import generate
from matrix_llm.model.tokenizer import train_tokenizer
from tests.support import tiny
from tests.support.tiny import rows, tiny_model

SIZES = {"rows": 8, "batch_rows": 4, "pool": 12, "tuning_pool": 8, "tuning_heldout": 4, "heldout": 6, "math_rows": 4}
SIZES |= {"trained_layers": 1, "greedy": 0, "max_length": 320}


def some_rows(count=8, seed=0):
    return [Tokens(list(row["input_ids"]), list(row["labels"])) for row in rows(count, seed)]


def cached(split, found, folder):
    list(cache.prepare(split, "pool", found, folder))
    return cache.CachedSet.open(folder, "pool")


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama_tied", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["llama_tied", "qwen3"])
def test_the_trained_part_over_cached_states_is_the_whole_model(tmp_path, name):
    tiny_model(name, num_hidden_layers=3).save_pretrained(tmp_path / "model")
    split, whole, found = Split(tmp_path / "model", 2), Split(tmp_path / "model", 0), some_rows()
    pool = cached(split, found, tmp_path / "cache")
    inputs = split.inputs(pool.rows, pool.states(range(8)))
    with torch.no_grad():
        logits = split.upper(**inputs.arguments, use_cache=False).logits
        expected = whole.full(input_ids=whole.inputs(found, None).arguments["input_ids"]).logits
        combined = split.full(input_ids=whole.inputs(found, None).arguments["input_ids"]).logits
    for i, row in enumerate(found):
        assert torch.allclose(logits[i, : len(row.ids)], expected[i, : len(row.ids)], atol=1e-5)
    list(train(split, pool, range(8), {"mce_weight": 0}, 1e-2, 4))
    with torch.no_grad():  # the whole model shares the trained weights; the embeddings are not trained
        assert not torch.allclose(
            split.full(input_ids=whole.inputs(found, None).arguments["input_ids"]).logits, combined, atol=1e-3
        )
    assert torch.equal(split.full.get_input_embeddings().weight, whole.full.get_input_embeddings().weight)


def test_a_run_of_the_whole_model_is_a_run_of_the_products_trainer(tmp_path, folder, tiny_tokenizer):
    """All rows in each batch, four times, so that the order of rows does not matter."""
    split, found = Split(folder, 0), some_rows(4)
    pool = cached(split, found, tmp_path / "cache")
    overrides = {"mce_weight": 1.0, "mce_top_k": 8, "mce_steps": 4}
    steps = list(train(split, pool, [0, 1, 2, 3] * 4, overrides, 1e-2, 4))

    data = Dataset.from_list([{"input_ids": r.ids, "labels": r.labels, "row_id": i} for i, r in enumerate(found)])
    changes = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": round(WARMUP * 4), **overrides}
    changes |= {"weight_decay": WEIGHT_DECAY, "max_grad_norm": CLIPPING, "max_steps": 4}
    product = tiny.train(tmp_path / "run", tiny_tokenizer, Split(folder, 0).full, data, **changes)
    logged = [entry for entry in product.state.log_history if "grad_norm" in entry]
    for step, entry in zip(steps, logged, strict=True):
        assert step.ce / step.tokens == pytest.approx(entry["ce"], rel=1e-4)
        assert step.gradient == pytest.approx(entry["grad_norm"], rel=1e-3)


def test_dividing_the_two_thresholds_is_multiplying_the_loss(tmp_path, folder):
    found, places, ends = some_rows(), list(range(8)), []
    larger = next(arm.overrides for arm in make_arms(8) if arm.name == "ce_larger")
    assert larger == {"mce_weight": 0, "max_grad_norm": CLIPPING / LARGER, "adam_epsilon": EPSILON / LARGER}
    clipping = 6.0  # of the four gradients, 9.2, 7.4, 2.9 and 4.9, CE clips two and LARGER times CE three
    epsilon = 1e-3  # large enough to be seen
    ce = {"mce_weight": 0, "max_grad_norm": clipping, "adam_epsilon": epsilon}
    scaled = larger | {"max_grad_norm": clipping / LARGER, "adam_epsilon": epsilon / LARGER}
    for overrides in (scaled, ce):
        split = Split(folder, 0)
        list(train(split, cached(split, found, tmp_path / "cache"), places, overrides, 1e-2, 2))
        ends.append(torch.cat([p.detach().flatten() for p in split.trained]))

    split = Split(folder, 0)
    groups = [[p for p in split.trained if (p.ndim > 1) == wanted] for wanted in (True, False)]
    decays = [WEIGHT_DECAY, 0.0]
    optimizer = torch.optim.AdamW(
        [{"params": g, "weight_decay": d} for g, d in zip(groups, decays, strict=True)], lr=1e-2, eps=epsilon
    )
    for step in range(4):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * (1 + np.cos(np.pi * step / 4)) / 2
        inputs = split.inputs(found[2 * step : 2 * step + 2], None)
        logits = split.full(**inputs.arguments).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, inputs.labels[:, 1:].flatten())
        (LARGER * loss).backward()
        torch.nn.utils.clip_grad_norm_(split.trained, clipping)
        optimizer.step()
        optimizer.zero_grad()
    literal = torch.cat([p.detach().flatten() for p in split.trained])
    start = torch.cat([p.detach().flatten() for p in Split(folder, 0).trained])
    moved = (literal - start).norm()
    assert (literal - ends[0]).norm() < 1e-3 * moved
    assert (literal - ends[1]).norm() > 1e-2 * moved  # clipping sees the factor


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A prepared study with a tiny model: 8 rows a seed, 2 steps a run."""
    root = tmp_path_factory.mktemp("pretrained")
    problems = generate(40, seed=5)
    for name, part in (("train", problems[:24]), ("test", problems[24:32]), ("math", problems[32:])):
        lines = [json.dumps({"query": p.query, "response": p.response}) for p in part]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = train_tokenizer([p.query + p.response for p in problems], 400)
    tokenizer.save_pretrained(root / "model")
    tiny_model("llama_tied", vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(root / "model")
    files = [word for name in ("train", "test", "math") for word in (f"--{name}", str(root / f"{name}.jsonl"))]
    words = ["prepare", "--output", str(root / "out"), "--model", str(root / "model"), *files]
    words += [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    assert main(words) == 0
    return root, words


@pytest.mark.parametrize("arm", [arm.name for arm in make_arms(8)])
def test_every_arm_makes_a_row(study, arm):
    root, _ = study
    row = make_run(root / "out", arm, 1, 1e-3, tuning=False)
    assert row["status"] == "done"
    assert row["steps"] == (1 if arm == "ce_fewer" else 2)  # 6 of 8 rows hold one whole batch of 4
    assert {"ce_heldout", "ce_math", "numbers_exact", "rank_head", "rank_hidden", "curve_ce", "rises"} <= set(row)
    assert np.isfinite([row["ce_heldout"], row["ce_math"]]).all()
    assert sum(row["row_ce"]) > 0
    gradient = row["curve_gradient"][0]
    if row["settings"] == {"mce_weight": 0}:
        assert gradient["cosine_hidden"] == pytest.approx(1, abs=1e-4)
    if arm == "mce":
        assert gradient["ratio_hidden"] > 1.01
    assert (root / "out" / "runs" / f"{arm}-s1.npy").is_file()


def test_a_run_that_was_killed_before_its_row_was_appended_is_not_trained_again(study):
    root, words = study
    one_run.main([str(root / "out"), "--arm", "ce", "--seed", "7", "--rate", "1e-3"])
    task, rows = run.Task("ce", 7, 1e-3), root / "out" / RUNS
    assert run.make_missing(root / "out", [task], workers=1) == 1  # from runs/ce-s7.json, without a process
    assert run.make_missing(root / "out", [task], workers=1) == 0
    (row,) = [row for row in read_jsonl(rows) if row["seed"] == 7]
    assert row == {**make_run(root / "out", "ce", 7, 1e-3, tuning=False), **_seconds(row)}
    assert not (root / "out" / "logs").exists()
    with pytest.raises(StudyError, match=r"rate 0\.001.*0\.0003"):
        run.make_one(root / "out", run.Task("ce", 7, 3e-4))
    assert main([*words, "--rows", "4"]) == 2
    rows.write_text(rows.read_text().replace('"mce_weight": 0', '"mce_weight": 2'))
    with pytest.raises(StudyError, match="other settings"):
        run.make_missing(root / "out", [task], workers=1)
    rows.unlink()


@pytest.mark.slow
def test_a_tuning_run_is_made_in_a_process_of_its_own(study):
    root, _ = study
    assert run.make_missing(root / "out", [run.Task("mce", 9, 1e-4, tuning=True)], workers=2) == 1
    (row,) = read_jsonl(root / "out" / TUNING)
    assert row["ce_tuning_heldout"] > 0
    assert "ce_heldout" not in row
    with pytest.raises(StudyError, match=r"nothing-s9 failed.*logs"):
        run.make_one(root / "out", run.Task("nothing", 9, 1e-4))


def _seconds(row):
    return {name: row[name] for name in ("train_seconds", "measure_seconds")}


def test_a_study_that_was_not_prepared_or_lacks_rows_is_refused_in_one_line(study, tmp_path, capsys):
    root, words = study
    assert main(["tune", "--output", str(tmp_path)]) == 2
    assert "prepare" in capsys.readouterr().err
    words = [str(tmp_path / "new") if word == str(root / "out") else word for word in words]
    assert main([*words, "--pool", "500"]) == 2
    error = capsys.readouterr().err
    assert "--pool" in error
    assert error.count("\n") == 1
    assert main([*words, "--trained_layers", "9"]) == 2
    assert "--trained_layers 9" in capsys.readouterr().err


def test_the_arms_of_a_seed_have_the_same_rows_and_the_control_the_first_of_them():
    first, second = draw(1, 40, 20), draw(2, 40, 20)
    assert first == draw(1, 40, 20)
    assert sorted(first) != sorted(second)
    assert len(set(first)) == 20
    fewer = next(arm for arm in make_arms(20) if arm.name == "ce_fewer")
    assert fewer.overrides["max_train_rows"] == 16
    with pytest.raises(StudyError, match="--rows 41"):
        draw(1, 40, 41)


def test_an_override_that_training_does_not_know_is_refused():
    with pytest.raises(StudyError, match="mce_solver='exact'"):
        loss_settings({"mce_solver": "exact"})


def test_a_loss_above_the_bases_counts_after_the_warm_up_only():
    assert not rises([[10, 1.3, 1.2], [20, 1.1, 1.2]], 20)
    assert rises([[10, 1.1, 1.2], [20, 1.3, 1.2]], 20)


def test_training_ce_is_compared_with_the_bases_on_the_same_rows(tmp_path, folder):
    split = Split(folder, 1)
    pool = cached(split, some_rows(), tmp_path / "cache")
    steps = list(train(split, pool, range(8), {"mce_weight": 0}, 0.0, 2))
    (window,) = windows(steps)
    assert window[1] == pytest.approx(window[2], rel=1e-4)  # at rate 0 the model is the base


def test_numbers_after_an_equals_sign_are_found_token_by_token():
    class Characters:
        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    text = "48/2 = 24 clips, 3+4=$1,250.5. The answer is: 72"
    spans = number_spans(Characters(), [ord(c) for c in text])
    assert [text[first:last] for first, last in spans] == ["24", "1,250.5"]


def test_the_sketch_of_the_way_keeps_cosines(folder):
    split = Split(folder, 1)
    travel = Travel(split)
    assert not travel.sketch(64).any()
    with torch.no_grad():
        for p in split.trained:
            p += 0.1
    one = travel.sketch(4096)
    with torch.no_grad():
        for p in split.trained:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    two = travel.sketch(4096)
    cosine = one @ two / np.sqrt((one @ one) * (two @ two))
    assert cosine == pytest.approx(1 / np.sqrt(2), abs=0.06)


def test_reading_a_set_gives_the_bases_ce_and_full_marks_to_a_sure_model(tmp_path, folder):
    split = Split(folder, 1)
    pool = cached(split, some_rows(), tmp_path / "cache")

    class Equals:
        def decode(self, ids, **_):
            return "=1 "

    reading = read(split, Equals(), pool)
    assert reading.row_ce == pytest.approx(pool.base_ce, rel=1e-4)
    assert reading.ce == pytest.approx(sum(pool.base_ce) / sum(row.trained for row in pool.rows), rel=1e-4)
    assert 0 <= reading.numbers < 1
    assert 1 <= reading.rank_hidden <= 32
    assert compare_with_ce(split, pool, {"mce_weight": 0}) == {
        "cosine_hidden": pytest.approx(1, abs=1e-4),
        "ratio_hidden": pytest.approx(1, abs=1e-4),
        "cosine_head": pytest.approx(1, abs=1e-4),
        "ratio_head": pytest.approx(1, abs=1e-4),
    }
