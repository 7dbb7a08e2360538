"""The verdicts of the study of a pretrained model, on rows whose truth is known."""

import numpy as np
import pytest

from benchmarks.pretrained_study.analysis import choose_rates, choose_seeds, judge, travel_cosines
from benchmarks.pretrained_study.design import MARGIN, PILOT_SEEDS, RATES, SEED_CHOICES, TUNING_SEEDS, Sizes, make_arms
from benchmarks.pretrained_study.folder import RUNS, TUNING
from benchmarks.pretrained_study.report import BEGIN, END, headline, write_report
from benchmarks.study.design import StudyError
from benchmarks.study.folder import append_row
from benchmarks.study.statistics import minimum_detectable_effect
from tests.support.paths import ROOT

TUNED = [arm.name for arm in make_arms(8) if arm.group != "control"]


def tuning_rows(**changes):
    """The second rate is best for every arm. changes: {ARM: fields of its rows at that rate}."""
    rows = []
    for arm in TUNED:
        for seed in TUNING_SEEDS:
            for place, rate in enumerate(RATES):
                row = {"arm": arm, "seed": seed, "rate": rate, "status": "done", "rises": False, "settings": {}}
                row["ce_tuning_heldout"] = 1.0 + 0.1 * abs(place - 1)
                rows.append(row | (changes.get(arm, {}) if place == 1 else {}))
    return rows


def study_rows(effects, seeds=8, spread=0.001, of_seed=0.05, **fields):
    """CE 1.0, plus an effect of the arm, plus one of the seed that all arms share, plus an arm's own spread."""
    rng, rows = np.random.default_rng(0), []
    shared = rng.normal(0, of_seed, seeds)
    for arm, effect in effects.items():
        own = rng.normal(0, spread / np.sqrt(2), seeds)
        for seed in range(seeds):
            row = {"arm": arm, "seed": seed + 1, "rate": 1e-4, "status": "done", "rises": False, "settings": {}}
            row["ce_heldout"] = 1.0 + effect + shared[seed] + own[seed] - own.mean()
            rows.append(row | {"train_seconds": 60.0, "grad_norm": 1.0, **fields})
    return rows


CONTROLLED = {"ce": 0.0, "mce": 0.0, "ce_fewer": 0.01}


def test_each_arm_has_its_own_best_rate_and_a_rate_that_makes_the_loss_rise_is_refused():
    rows = tuning_rows(mce={"rises": True}, emo={"status": "diverged"}, ce_larger={"ce_tuning_heldout": 9.0})
    rates = choose_rates(rows)
    assert set(rates) == set(TUNED)
    assert rates["ce"] == rates["mce_centred"] == RATES[1]
    assert {rates["mce"], rates["emo"], rates["ce_larger"]} <= {RATES[0], RATES[2]}
    with pytest.raises(StudyError, match="tuning of ce is not complete"):
        choose_rates(rows[1:])
    with pytest.raises(StudyError, match=r"every rate of ce .*RATES"):
        choose_rates([row | {"rises": True} for row in rows])


def test_the_pilots_spread_and_not_its_mean_chooses_the_number_of_seeds():
    few, many = (study_rows(CONTROLLED, seeds=3, spread=spread) for spread in (0.001, 0.5))
    assert choose_seeds(few) == SEED_CHOICES[0]
    assert choose_seeds(many) == SEED_CHOICES[-1]
    assert choose_seeds(study_rows(CONTROLLED | {"mce": -0.3}, seeds=3, spread=0.001)) == SEED_CHOICES[0]
    rows = study_rows(CONTROLLED, seeds=3, spread=0.005)
    pairs = np.diff(np.reshape([row["ce_heldout"] for row in rows if row["arm"] != "ce_fewer"], (2, 3)), axis=0)[0]
    chosen = choose_seeds(rows)
    detectable = {n: minimum_detectable_effect(float(pairs.std(ddof=1)), n) for n in SEED_CHOICES}
    assert [n for n in SEED_CHOICES if detectable[n] <= 0.005 * 1.0 * 1.05][:1] == [chosen]
    with pytest.raises(StudyError, match="pilot"):
        choose_seeds([row for row in few if row["seed"] in PILOT_SEEDS[:2]])


@pytest.mark.parametrize(
    ("effect", "said"),
    [(-0.01, "MCE lowers held-out CE**"), (0.01, "MCE raises held-out CE**"), (0.0, "no difference larger than 0.5 %")],
)
def test_a_planted_effect_gets_its_verdict(effect, said):
    verdicts = judge(study_rows(CONTROLLED | {"mce": effect}))
    assert verdicts.complete
    assert said in headline(verdicts)
    assert verdicts.primary.equal.margin == pytest.approx(MARGIN, rel=0.1)
    assert verdicts.primary.test.mean == pytest.approx(effect, abs=1e-9)


def test_a_wide_spread_shows_neither_a_difference_nor_equality():
    verdicts = judge(study_rows(CONTROLLED | {"ce_fewer": 0.5}, seeds=16, spread=0.1))
    assert "No difference found, and equality not shown" in headline(verdicts)
    low, high = verdicts.primary.detectable_range
    assert low < verdicts.primary.detectable < high


def test_without_its_positive_control_the_study_is_void():
    for control in (0.0, -0.01):  # not found, or in the wrong direction
        assert "void" in headline(judge(study_rows(CONTROLLED | {"ce_fewer": control})))
    risen = study_rows(CONTROLLED)
    risen[3]["rises"] = True
    assert "ce seed 4" in headline(judge(risen))
    broken = [*study_rows(CONTROLLED), {"arm": "emo", "seed": 2, "status": "diverged", "rate": 1e-4, "settings": {}}]
    assert "non-finite in emo seed 2" in headline(judge(broken))


def test_nothing_is_concluded_before_all_seeds_are_there():
    rows = study_rows(CONTROLLED | {"mce": -0.05})
    early = [row for row in rows if row["seed"] < 8]
    assert "Interim**: 7 of 8 seeds" in headline(judge(early))
    without_control = [row for row in rows if row["arm"] != "ce_fewer"]
    assert "Interim" in headline(judge(without_control))
    assert "pilot is not complete" in headline(judge([row for row in rows if row["seed"] < 3]))


def test_the_secondary_contrasts_are_corrected_together():
    verdicts = judge(study_rows(CONTROLLED | {"ce_larger": 0.0, "mce_centred": -0.01, "emo": 0.0}))
    by = {(c.arm, c.reference): c for c in verdicts.secondary}
    assert set(by) == {("ce_larger", "ce"), ("mce", "ce_larger"), ("mce_centred", "ce"), ("emo", "ce")}
    assert by["mce_centred", "ce"].differs
    assert by["mce_centred", "ce"].adjusted_p == pytest.approx(4 * by["mce_centred", "ce"].test.p)
    assert not by["emo", "ce"].differs


def test_the_way_of_two_arms_is_compared_with_that_of_two_seeds():
    of_seed = {1: np.array([1.0, 0, 0]), 2: np.array([0, 1.0, 0])}
    sketches = {
        (arm, seed): way + np.array([0, 0, shift])
        for arm, shift in (("ce", 0), ("mce", 1.0))
        for seed, way in of_seed.items()
    }
    found = travel_cosines(sketches)
    assert found["ce and mce, one seed"] == pytest.approx(1 / np.sqrt(2))
    assert found["ce, two seeds"] == 0
    assert found["mce, two seeds"] == pytest.approx(0.5)


def test_the_page_is_valid_whatever_is_done_and_keeps_what_stands_around_it(tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(StudyError, match="no rows yet"):
        write_report(tmp_path, page)
    for row in tuning_rows(mce={"rises": True}):
        append_row(tmp_path / TUNING, row)
    write_report(tmp_path, page)
    assert "(1.0000)" in page.read_text()  # the refused rate
    page.write_text("before\n" + page.read_text() + "after\n")
    gradient = [{"step": 0, "cosine_hidden": 0.99, "ratio_hidden": 1.8, "cosine_head": 0.98, "ratio_head": 1.7}]
    for row in study_rows(CONTROLLED, curve_gradient=gradient, ce_math=2.0):
        append_row(tmp_path / RUNS, row)
    files = write_report(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "MCE makes no difference larger than 0.5 %" in text
    assert "| mce | 0 | 0.9900 | 1.8000 | 0.9800 | 1.7000 |" in text
    assert [len(file.read_text().splitlines()) for file in files[1:]] == [24, 40]
    page.write_text("no markers")
    with pytest.raises(StudyError, match=r"page\.md.*markers"):
        write_report(tmp_path, page)
    assert BEGIN != END


def test_the_preregistration_names_the_design():
    text = (ROOT / "benchmarks/pretrained_study/preregistration.md").read_text()
    for arm in make_arms(1600):
        assert f"`{arm.name}`" in text
    for rate in RATES:
        assert f"{rate:g}" in text
    sizes = Sizes()
    steps = sizes.rows // sizes.batch_rows
    numbers = [f"{n:,}" for n in (sizes.pool, sizes.rows, sizes.tuning_pool, sizes.tuning_heldout, sizes.heldout)]
    for words in (*numbers, f"{steps} steps", f"{round(0.8 * steps)} steps", f"last {sizes.trained_layers} of 30"):
        assert words in text
    for word in ("TOST", "0.5 %", "8, 12 or 16", "void"):
        assert word in text
