"""From generations to a summary, a table and a page: counts, conventions, hostile text."""

import doctest
import html
import json
import random
import re
from html.parser import HTMLParser

import pytest

from eval import text as eval_text
from eval.answers import CONVENTIONS, answers_equal, is_correct
from eval.report import page as report_page
from eval.report import scores as report_scores
from eval.report import table as report_table
from eval.report.page import write_report
from eval.report.scores import grade_rows, summarise
from eval.report.table import score_table
from eval.statistics import majority_vote, pass_at_k, wilson_interval
from eval.text import visible

VERSIONS = {"python": "3.11", "engine": "test"}
SETTINGS = {"model": "org/name", "revision": "abc", "temperature": 0.0, "seed": 0}


def row(number, response, gold, *, sample=0, subject=None, level=None, **changes):
    return {
        "id": f"gsm8k/test/{number}",
        "sample": sample,
        "prompt_sha256": "0" * 64,
        "problem": f"Problem {number}?",
        "gold": gold,
        "subject": subject,
        "level": level,
        "response": response,
        "finish_reason": "stop",
        "stop_reason": None,
        "prompt_tokens": 10,
        "tokens": 7,
        **changes,
    }


def metamath(answer):
    return f"It follows.\n#### {answer}\nThe answer is: {answer}"


def summary_of(rows, *, benchmark="gsm8k", **extra):
    return summarise(rows, benchmark=benchmark, settings=SETTINGS, wall_seconds=2.0, versions=VERSIONS, **extra)


def page_of(folder, rows, *, benchmark="gsm8k", **extra):
    """The text of the page of a run that gave these rows."""
    graded = grade_rows(rows, benchmark=benchmark)
    summary = summary_of(rows, benchmark=benchmark, graded=graded, **extra)
    write_report(folder / "deep" / "r.html", summary, rows, graded)
    return (folder / "deep" / "r.html").read_text(encoding="utf-8")


THREE = [
    row(0, metamath(18), "18"),
    row(1, metamath(4), "5", finish_reason="length", stop_reason=None),
    row(2, "So she has 12 left.", "12", stop_reason="Question:"),
]


def test_the_docstrings_are_true():
    results = [doctest.testmod(module) for module in (eval_text, report_scores, report_table)]
    assert all(result.attempted and not result.failed for result in results)


def test_the_summary_holds_every_convention_and_the_counts_of_the_run():
    summary = summary_of(THREE, name="gsm8k", limit=None, generations="gsm8k.jsonl")
    assert tuple(summary["scores"]) == CONVENTIONS
    assert {
        key: summary[key]
        for key in ("benchmark", "model", "revision", "problems", "samples_per_problem", "convention", "name")
    } == {
        "benchmark": "gsm8k",
        "model": "org/name",
        "revision": "abc",
        "problems": 3,
        "samples_per_problem": 1,
        "convention": "verified",
        "name": "gsm8k",
    }
    assert (summary["truncated"], summary["stop_hits"]) == (1, 1)
    assert (summary["prompt_tokens"], summary["generated_tokens"], summary["tokens_per_second"]) == (30, 21, 10.5)
    assert summary["verdicts"] == {"gsm8k/test/0": True, "gsm8k/test/1": False, "gsm8k/test/2": True}
    verified = summary["scores"]["verified"]
    assert (verified["correct"], verified["total"], verified["accuracy"]) == (2, 3, 2 / 3)
    assert (verified["low"], verified["high"]) == wilson_interval(2, 3)
    assert summary["scores"]["metamath"]["correct"] == 1  # no "The answer is: " in the third
    assert summary["scores"]["metamath"]["extraction_failures"] == 1
    assert verified["extraction_failures"] == 0
    assert "pass_at_k" not in summary
    assert summary["limit"] is None
    json.dumps(summary, allow_nan=False)


def test_scores_are_is_correct_counted():
    draw = random.Random(0)
    rows = [
        row(i, draw.choice([metamath(i % 5), f"#### {i % 3}", "nothing", f"= {i % 4}"]), str(i % 4)) for i in range(41)
    ]
    summary = summary_of(rows)
    for convention, scores in summary["scores"].items():
        assert scores["correct"] == sum(
            is_correct(r["response"], r["gold"], benchmark="gsm8k", convention=convention) for r in rows
        )
        assert scores["total"] == 41


def test_each_row_is_graded_once_for_each_convention(monkeypatch, tmp_path):
    calls = []
    real = report_scores.grade

    def counted(response, gold, **how):
        calls.append((response, how["convention"]))
        return real(response, gold, **how)

    monkeypatch.setattr(report_scores, "grade", counted)
    rows = [
        row(i, metamath(f"{i}.{s}"), str(i), sample=s, level=i % 2 + 1, subject="Algebra")
        for i in range(4)
        for s in range(3)
    ]
    graded = grade_rows(rows, benchmark="gsm8k")
    summary = summary_of(rows, graded=graded)
    write_report(tmp_path / "r.html", summary, rows, graded)
    score_table(summary)
    assert len(calls) == len(set(calls)) == 4 * 3 * len(CONVENTIONS)


def test_ungraded_is_wrong_counted_and_shown(monkeypatch, tmp_path):
    verdict = report_scores.Verdict(None, "9^{9^9}", "3 seconds were not enough")
    monkeypatch.setattr(report_scores, "grade", lambda response, gold, **how: verdict)
    rows = [row(0, "x", "1")]
    summary = summary_of(rows)
    assert summary["scores"]["verified"]["ungraded"] == 1
    assert summary["scores"]["verified"]["correct"] == 0
    assert summary["verdicts"] == {"gsm8k/test/0": None}
    page = page_of(tmp_path, rows)
    assert "<summary>Ungraded, counted as wrong: 1</summary>" in page
    assert "ungraded: 3 seconds were not enough" in page


def test_groups_are_of_the_verified_convention_in_order_and_add_up():
    rows = [
        row(i, r"so \boxed{1}", str(1 + i % 3), subject=["Geometry", "Algebra"][i % 2], level=5 - i % 5)
        for i in range(29)
    ]
    rows.append(row(99, r"\boxed{1}", "1", subject=None, level=None))
    summary = summary_of(rows, benchmark="math")
    assert list(summary["by_subject"]) == ["Algebra", "Geometry"]
    assert list(summary["by_level"]) == ["1", "2", "3", "4", "5"]
    for field in ("by_subject", "by_level"):
        assert sum(scores["total"] for scores in summary[field].values()) == 29
        assert (
            sum(scores["correct"] for scores in summary[field].values()) == summary["scores"]["verified"]["correct"] - 1
        )


def test_several_samples_give_pass_at_k_for_powers_of_two_and_n_and_a_majority():
    answers = {
        0: ["18", "18.0", "3", "4", "3", "5"],
        1: ["7", "7", "5", "5", "5", "6"],
        2: ["2", "2", "2", "2", "2", "2"],
    }
    golds = {0: "18", 1: "7", 2: "9"}
    rows = [row(i, metamath(a), golds[i], sample=s) for i, given in answers.items() for s, a in enumerate(given)]
    random.Random(0).shuffle(rows)
    summary = summary_of(rows)
    assert summary["samples_per_problem"] == 6
    assert list(summary["pass_at_k"]) == ["1", "2", "4", "6"]
    right = [2, 2, 0]
    for k, share in summary["pass_at_k"].items():
        assert share == pytest.approx(sum(pass_at_k(6, c, int(k)) for c in right) / 3)
    assert (
        summary["scores"]["verified"]["accuracy"] == pytest.approx(summary["pass_at_k"]["1"]) == pytest.approx(4 / 18)
    )
    assert (summary["scores"]["verified"]["correct"], summary["scores"]["verified"]["samples"]) == (4, 18)
    assert answers_equal("18.0", "18")
    assert (summary["majority"]["correct"], summary["majority"]["k"]) == (
        1,
        6,
    )  # 18 (2 votes with 18.0, before 3), 5 and 2
    assert summary["verdicts"]["gsm8k/test/0"] == [True, True, False, False, False, False]


def test_the_order_of_samples_in_the_file_does_not_matter():
    rows = [row(i, metamath(i + s), str(i), sample=s) for i in range(5) for s in range(4)]
    shuffled = rows[:]
    random.Random(3).shuffle(shuffled)
    first, second = summary_of(rows), summary_of(shuffled)
    assert first["scores"] == second["scores"]
    assert first["majority"] == second["majority"]
    assert first["verdicts"] == second["verdicts"] == {f"gsm8k/test/{i}": [True, *[False] * 3] for i in range(5)}


def test_answers_that_no_sample_gives_have_no_majority():
    rows = [row(0, "no idea", "3", sample=s) for s in range(2)] + [row(1, metamath(4), "4", sample=s) for s in range(2)]
    assert summary_of(rows)["majority"]["correct"] == 1
    assert summary_of(rows)["majority"]["extraction_failures"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to score"),
        ([row(0, "a", "1"), row(0, "b", "1")], "two rows of one sample"),
        ([row(0, "a", "1"), row(0, "b", "1", sample=1), row(1, "a", "1")], "unfinished"),
    ],
)
def test_files_that_no_run_writes_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        summary_of(rows)


def test_the_table_names_conventions_and_intervals():
    table = score_table(summary_of(THREE, name="gsm8k"))
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert lines[0].split("|")[1].strip() == "convention"
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(CONVENTIONS)
    verified = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    low, high = wilson_interval(2, 3)
    assert verified == ["verified", "66.67 %", f"{100 * low:.1f} to {100 * high:.1f}", "2 / 3", "0", "0"]
    assert len({len(line) for line in lines}) == 1  # also aligned as plain text


def test_the_table_has_groups_and_several_samples():
    rows = [row(i, metamath(i), str(i), sample=s, subject="a|b", level=2) for i in range(3) for s in range(2)]
    table = score_table(summary_of(rows))
    for name in ("pass@1", "pass@2", "maj@2"):
        assert re.search(rf"\| {name} +\| 100.00 % \| +43.9 to 100.0 \|", table)
    assert r"| a\|b" in table
    assert "by level (verified)" in table


class Page(HTMLParser):
    """The tags and the text of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


HOSTILE = (
    "</pre></details><script>alert(1)</script><img src=x onerror=alert(1)> & \" ' \x1b[2J \x00 \u202e \u200b \ud800 "
    "\\boxed{<b>7</b>}"
)


def test_hostile_text_is_shown_and_never_run(tmp_path):
    rows = [row(0, HOSTILE, "<i>1</i>", subject="<s>", level=1, problem=HOSTILE, id="<u>id</u>"), row(1, "7", "7")]
    settings = {**SETTINGS, "model": HOSTILE, "<k>": HOSTILE}
    graded = grade_rows(rows, benchmark="gsm8k")
    summary = summarise(
        rows, benchmark="gsm8k", settings=settings, wall_seconds=1, versions={"<v>": HOSTILE}, name=HOSTILE
    )
    write_report(tmp_path / "r.html", summary, rows, graded)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "b", "i", "s", "u", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\ud800-\udfff]", text)
    assert "".join(page.texts).count("<script>alert(1)</script>") >= 6  # visible as text wherever it stands
    assert "␛[2J ␀ ⟨U+202E⟩ ⟨U+200B⟩ ⟨U+D800⟩" in html.unescape(text)
    assert page.tags.count("details") == 1 + 2 + 2  # the settings, and two groups of one answer: no text closed one


def test_the_table_shows_no_control_characters():
    table = score_table(summary_of([row(0, "1", "1", subject="\x1b[31mred")], name="\x1b[2Jgsm8k"))
    assert "\x1b" not in table
    assert "␛[31mred" in table


def test_visible_keeps_what_can_be_read():
    text = "π ≤ ½\tÄ 漢字 \u00a0😀\n$x^2$"
    assert visible(text) == text
    assert visible("a\r\n\x7f\x85\ufeff\u2028") == "a␍\n⟨U+007F⟩⟨U+0085⟩⟨U+FEFF⟩⟨U+2028⟩"


def test_the_page_is_one_file_with_a_plot_and_the_answers(tmp_path):
    rows = [row(i, rf"so \boxed{{{i}}}", "3", subject=f"Subject {i % 2}", level=1 + i % 3) for i in range(7)]
    text = page_of(tmp_path, rows, benchmark="math", name="math")
    page = Page(text)
    assert page.tags.count("svg") == 2
    assert text.count('class="whisker"') == 2 + 3  # one a bar
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert page.tags.count("details") == 1 + (1 + 6) + (1 + 1)
    assert (
        text.index("Wrong answers") < text.index("Problem 6?") < text.index("Right answers") < text.index("Problem 3?")
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.html"]


def test_answers_stand_in_groups_and_right_ones_that_are_not_written_as_the_gold_come_first(tmp_path):
    given = {0: r"\boxed{0.5}", 1: r"\boxed{\frac{1}{2}}", 2: r"\boxed{3}", 3: "no idea at all", 4: r"\boxed{2^{2}}"}
    rows = [
        row(i, response, "4" if i == 4 else r"\frac{1}{2}", problem="What is $2^{2}$?") for i, response in given.items()
    ]
    text = html.unescape(page_of(tmp_path, rows, benchmark="math"))
    places = [
        text.index(each)
        for each in (
            "<summary>Another answer than the gold: 2</summary>", "gsm8k/test/2: <code>3", "gsm8k/test/4: <code>2^{2}",
            "<summary>No answer found: 1</summary>", "gsm8k/test/3: no answer found",
            "<h2>Right answers</h2>", "<summary>Not written as the gold is: 1</summary>", "gsm8k/test/0: <code>0.5",
            "<summary>The gold as written: 1</summary>", "gsm8k/test/1: <code>",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "(the question copied)" in text  # why 2^2 is not 4


def test_without_subjects_the_plot_is_by_convention(tmp_path):
    text = page_of(tmp_path, THREE)
    assert Page(text).tags.count("svg") == 1
    assert text.count('class="whisker"') == len(CONVENTIONS)


def test_bars_and_whiskers_stand_where_the_numbers_say(tmp_path):
    text = page_of(tmp_path, [row(i, metamath(i % 2), "1", subject="s") for i in range(8)])
    assert '<rect x="0" y="25" width="50.00%"' in text
    low, high = wilson_interval(4, 8)
    assert f'<line x1="{100 * low:.2f}%" x2="{100 * high:.2f}%"' in text


def test_on_a_narrow_screen_no_figure_loses_its_name_and_text_keeps_its_size(tmp_path):
    """Columns become lines that name themselves, and the chart is laid out in percent: nothing scales its letters."""
    rows = [row(i, metamath(i), "1", subject="Counting & Probability", sample=s) for i in range(3) for s in range(2)]
    text = page_of(tmp_path, rows)
    cells = re.findall(r"<td[^>]*>", re.sub(r'<table class="facts">.*?</table>', "", text, flags=re.S))
    assert len(cells) == 5 * (len(CONVENTIONS) + 1) + 2 * 3
    assert all(re.fullmatch(r'<td data-name="[^"]+">', cell) for cell in cells)
    assert "overflow-x" not in text
    assert "viewBox" not in text
    assert [int(size) for size in re.findall(r'font-size="(\d+)"', text)] == [13]


def test_a_page_of_very_many_and_very_long_answers_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "SHOWN_WRONG", 30)
    monkeypatch.setattr(report_page, "SHOWN_RIGHT", 20)
    rows = [row(i, "x" * 100_000 + metamath(1 + i // 50), "2") for i in range(100)]
    text = page_of(tmp_path, rows, generations="gsm8k.jsonl")
    for shown in (30, 20):
        assert f"The first {shown} are shown, all of them are in gsm8k.jsonl" in text
    assert Page(text).tags.count("details") == 1 + (1 + 30) + (1 + 20)
    assert len(text) < 1.1 * 50 * report_page.SHOWN_CHARACTERS
    assert "characters left out" in text
    assert "The answer is: 1" in text  # the end, where the answer stands


def test_a_perfect_run_has_no_wrong_answers(tmp_path):
    assert "<h2>Wrong answers</h2>\n<p>None.</p>" in page_of(tmp_path, [row(0, metamath(1), "1")])


# --- votes


def test_votes_ties_and_silence():
    assert majority_vote(["3", "4", "4"]) == "4"
    assert majority_vote(["4", "3", "3", "4"]) == "4"  # a tie: the first to appear
    assert majority_vote([None, None, None, "7"]) == "7"  # None entries never vote, however many
    assert majority_vote([None, None]) is None
    assert majority_vote([]) is None
    assert majority_vote(["", "", "1"]) == ""  # an empty string is an answer; a failed extraction is None


def test_equivalent_answers_vote_together_and_the_first_spelling_is_returned():
    def same(a, b):
        return abs(float(a) - float(b)) < 1e-9

    assert majority_vote(["2", "0.5", "2", ".5", "0.50"]) == "2"
    assert majority_vote(["2", "0.5", "2", ".5", "0.50"], equal=same) == "0.5"


def test_a_vote_compares_distinct_answers_only():
    calls = []

    def same(a, b):
        calls.append((a, b))
        return False

    assert majority_vote(["1", "2", "3"] * 1000, equal=same) == "1"
    assert len(calls) == 3
