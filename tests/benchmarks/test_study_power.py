"""What a study could have found: power, equivalence and sample sizes, against simulations and SciPy."""

import json
import math

import numpy as np
import pytest
from scipy.stats import chi2, ttest_1samp

from benchmarks.study import power
from benchmarks.study.limits import rise_table
from benchmarks.study.rereport import rewrite
from benchmarks.study.statistics import minimum_detectable_effect
from matrix_llm.base.files import read_jsonl
from tests.support.paths import ROOT

DOCS = ROOT / "docs"


def test_power_is_how_often_the_t_test_finds_the_effect():
    d = np.random.default_rng(0).normal(0.9, 1.0, (20_000, 6))
    found = np.mean(ttest_1samp(d, 0.0, axis=1).pvalue < 0.05)
    assert power.power_of_t(0.9, 1.0, 6) == pytest.approx(found, abs=0.012)
    assert power.power_of_t(-0.9, 1.0, 6) == power.power_of_t(0.9, 1.0, 6)
    assert math.isnan(power.power_of_t(0.9, 1.0, 1))


def test_the_interval_of_the_detectable_difference_covers_the_true_one_as_often_as_it_says():
    rng, true = np.random.default_rng(1), minimum_detectable_effect(1.0, 5)
    ends = [power.detectable_interval(float(rng.normal(0, 1, 5).std(ddof=1)), 5) for _ in range(800)]
    assert np.mean([low <= true <= high for low, high in ends]) == pytest.approx(0.95, abs=0.025)


def test_tost_calls_a_difference_at_its_margin_equal_at_most_as_often_as_alpha():
    rng = np.random.default_rng(2)
    at_margin = [power.equivalence(rng.normal(1.0, 0.5, 8), 1.0) for _ in range(1000)]
    assert np.mean([found.equal for found in at_margin]) == pytest.approx(0.05, abs=0.02)
    assert all(found.equal == (found.p < 0.05) for found in at_margin)
    equal = np.mean([power.equivalence(rng.normal(0, 0.5, 8), 0.5).equal for _ in range(1000)])
    assert power.equivalence_power(0.5, 8, 0.5) == pytest.approx(equal, abs=0.045)
    assert power.equivalence([0.2, 0.2], 0.3).equal
    assert not power.equivalence([0.2], 0.3).equal


def test_the_papers_gain_is_carried_in_points_in_odds_and_relatively():
    gain = power.paper_gain(0.5)
    odds = (0.723 / 0.277) / (0.692 / 0.308)
    assert gain["points"] == pytest.approx(0.031)
    assert gain["odds"] == pytest.approx(odds / (1 + odds) - 0.5)
    assert gain["relative"] == pytest.approx(0.5 * 0.031 / 0.692)


def test_sample_sizes_have_the_power_they_promise():
    gain, discordant, rng = 0.05, 0.2, np.random.default_rng(3)
    n = power.problems_for_mcnemar(gain, discordant)
    both = rng.multinomial(n, [(discordant + gain) / 2, (discordant - gain) / 2, 1 - discordant], size=20_000)
    won, lost = both[:, 0], both[:, 1]
    assert np.mean((won - lost) ** 2 / (won + lost) > chi2.ppf(0.95, 1)) == pytest.approx(0.8, abs=0.015)
    seeds = power.seeds_for_gain(0.031, 1319, 0.18, 0.01)
    sd = math.sqrt(0.01**2 + (0.18 - 0.031**2) / 1319)
    assert power.power_of_t(0.031, sd, seeds) >= 0.8 > power.power_of_t(0.031, sd, seeds - 1)
    with pytest.raises(ValueError, match=r"discordant=0\.02.*0\.031"):
        power.problems_for_mcnemar(0.031, 0.02)


def test_a_loss_that_rises_first_is_said_to_rise():
    curves = {"ce": [[10, 1.0], [20, 1.5], [30, 1.2], [40, 0.9]], "mce": [[10, 1.0], [20, 0.9], [30, 0.8]]}
    table = rise_table([{"arm": arm, "curve_ce": curve} for arm, curve in curves.items()])
    assert "| ce | 1.000 (step 10) | 1.500 (step 20) | 40 | 0.900 (step 40) |" in table
    assert "| mce | 1.000 (step 10) | does not rise |  | 0.800 (step 30) |" in table


def _paired(rows, metric):
    """The differences mce - ce by seed, by code of this test's own."""
    by = {(row["arm"], row["seed"]): row.get(metric) for row in rows}
    return np.array([by["mce", s] - by["ce", s] for s in range(1, 9) if ("mce", s) in by and ("ce", s) in by])


@pytest.mark.parametrize(("stem", "peak"), [("results", 40), ("results_100m", 30)])
def test_the_prose_of_the_results_pages_quotes_the_rows(stem, peak):
    """A second calculation, of the figures that stand outside the generated tables."""
    rows, page = read_jsonl(DOCS / f"{stem}_rows.jsonl"), (DOCS / f"{stem}.md").read_text()
    main = (DOCS / "results.md").read_text().split("<!--")[0]
    curves = np.mean([[ce for _, ce in row["curve_ce"]] for row in rows if row["arm"] == "ce"], axis=0)
    for figure in (f"{curves[0]:.3f}", f"{curves.max():.3f}", f"step {peak}"):
        assert figure in page.split("<!--")[0]
        assert figure in main
    assert 10 * (int(curves.argmax()) + 1) == peak

    accuracy = _paired(rows, "accuracy_heldout")
    n, sd = len(accuracy), accuracy.std(ddof=1)
    low, high = (math.sqrt((n - 1) / chi2.ppf(q, n - 1)) * sd for q in (0.975, 0.025))
    scale = 100 * minimum_detectable_effect(1.0, n)
    assert f"{scale * low:.2f} to {scale * high:.2f}" in main
    text = _paired(rows, "ce_gsm8k_test")
    interval = ttest_1samp(text, 0).confidence_interval(0.95)
    assert f"{text.mean():+.4f} ({interval.low:+.4f} to {interval.high:+.4f})" in main
    assert f"p = {ttest_1samp(text, 0).pvalue:.{2 if stem == 'results' else 3}f}" in main
    norms = [np.mean([row["grad_norm"] for row in rows if row["arm"] == arm]) for arm in ("mce", "ce")]
    assert f"{norms[0] / norms[1]:.2f}" in main


def test_harm_on_other_text_is_quoted_with_its_sign_in_every_contrast():
    rows, main = read_jsonl(DOCS / "results_sensitivity.jsonl"), (DOCS / "results.md").read_text().split("<!--")[0]
    for study, p in (("max_grad_norm 1e9", "0.004"), ("learning_rate 1.5e-3", "0.15")):
        d = _paired([row for row in rows if row["study"] == study], "ce_gsm8k_test")
        assert f"{d.mean():+.2f}" in main
        assert f"{ttest_1samp(d, 0).pvalue:.{len(p) - 2}f}" == p
        assert f"p = {p}" in main


def test_a_page_is_written_again_from_the_raw_files_next_to_it(tmp_path):
    for file in DOCS.glob("results_100m*"):
        if file.suffix != ".png":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    page = tmp_path / "results_100m.md"
    before = page.read_text()
    page.write_text(before.replace("71.42 %", "99.99 %"))
    assert all(file.is_file() for file in rewrite(page))
    assert "99.99" not in page.read_text().split("<!--")[1]
    rows = (tmp_path / "results_100m_rows.jsonl").read_text()
    assert rows == (DOCS / "results_100m_rows.jsonl").read_text()
    assert json.loads((tmp_path / "results_100m_setup.json").read_text())["base"]
