"""Overlaps of training and test questions: every real one is found, and none that only looks like one.

The last tests read the real MATH and GSM8K files where they are.
"""

import doctest
import json
import subprocess
import sys
import tracemalloc

import pytest

from eval import contamination, files
from eval.contamination import find_overlaps, main, questions
from matrix_llm.base.errors import EvalError
from matrix_llm.data.questions import normalise
from tests.support.blocked import without
from tests.support.paths import ROOT, SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the MATH and GSM8K files are not beside the repository")


def test_the_docstrings_are_true():
    result = doctest.testmod(contamination)
    assert result.attempted >= 2
    assert result.failed == 0


def plain(count, start=0):
    return [
        (f"row {i}", f"Person {i} has {i * 7 + start} pens and gives {i} of them to a friend. How many are left now?")
        for i in range(count)
    ]


def test_exact_overlaps_name_all_their_training_rows_up_to_a_limit():
    train = [*plain(30), *[(f"copy {i}", "WHAT is  $1 + 1$?") for i in range(25)]]
    found = find_overlaps(train, [("t0", "What is $1+1$?"), ("t1", "What is $1-1$?"), ("t2", "what is 1+1?")])
    names = [f"copy {i}" for i in range(contamination.LISTED)]
    assert found["exact"] == [{"test": name, "train": names, "train_rows": 25} for name in ("t0", "t2")]
    assert (found["train_rows"], found["test_rows"], found["too_short"]) == (55, 3, 3)


def test_n_gram_shares_are_counted_by_hand():
    """The test question has ten distinct 3-grams; the first row holds 4 of them, the second 6, the third all ten."""
    test = [("t", "a b c d e f g h i j k l")]
    train = [
        ("four", "a b c d e f x"),
        ("six", "x e f g h i j k l"),
        ("all", "well then: A b C d e f g h i j k, l! or not"),
    ]
    for share, expected in ((0.4, ("all", 1.0, 3)), (0.5, ("all", 1.0, 2)), (0.61, ("all", 1.0, 1))):
        found = find_overlaps(train, test, n=3, share=share)
        assert found["exact"] == []
        assert [(each["train"], each["share"], each["train_rows"]) for each in found["similar"]] == [expected]
    found = find_overlaps(train[:2], test, n=3, share=0.5)
    assert found["similar"] == [{"test": "t", "train": "six", "share": 0.6, "train_rows": 1}]
    assert find_overlaps(train[:2], test, n=3, share=0.7)["similar"] == []


def test_shares_are_within_one_row_and_count_distinct_n_grams():
    test = [("t", "a b c d e f g h i j k l")]
    halves = [("1", "a b c d e f g"), ("2", "f g h i j k l")]
    assert find_overlaps(halves, test, n=3, share=0.6)["similar"] == []
    assert find_overlaps([("loop", "a b c d " * 50)], test, n=3, share=0.5)["similar"] == []


def test_an_exact_overlap_is_not_repeated_as_similar():
    found = find_overlaps(plain(3), plain(3))
    assert [each["test"] for each in found["exact"]] == ["row 0", "row 1", "row 2"]
    assert found["similar"] == []


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(EvalError, match="--n 0"):
        find_overlaps([], [], n=0)
    for share in (0, 1.5):
        with pytest.raises(EvalError, match="--share"):
            find_overlaps([], [], share=share)


# --- files


def rows_of(path, field=None):
    return list(questions(path, field))


def test_every_form_of_file_gives_the_same_questions(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [{"query": f"Question {i}: π?\u2028", "response": "x" * 50, "id": f"id/{i}"} for i in range(2500)]
    expected = [(row["id"], row["query"]) for row in rows]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    (tmp_path / "lines.json").write_text("\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "compact.json").write_text(json.dumps(rows, separators=(",", ":")))
    (tmp_path / "indented.json").write_text(
        "\ufeff \n" + json.dumps(rows, indent=4, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    for name in ("a.jsonl", "lines.json", "compact.json", "indented.json", "a.parquet"):
        assert rows_of(tmp_path / name) == expected, name


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_list_is_read_whole_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    rows = [{"question": f'say "{i}], [" \\u00e9 {{'} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert [text for _, text in rows_of(tmp_path / "a.json")] == [row["question"] for row in rows]
    (tmp_path / "c.json").write_text(json.dumps(rows)[:-30])
    with pytest.raises(EvalError, match=r"c\.json, line 1, .*value 20"):
        rows_of(tmp_path / "c.json")


def test_questions_are_found_under_the_usual_names_and_in_messages(tmp_path):
    path = tmp_path / "a.jsonl"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "six?"},
        {"role": "assistant", "content": "6"},
    ]
    rows = [
        {"problem": "one?"},
        {"question": "two?"},
        {"query": "three?"},
        {"instruction": "four?"},
        {"prompt": "five?"},
        {"messages": messages},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert rows_of(path) == [
        (f"a.jsonl:{i}", f"{word}?") for i, word in enumerate(("one", "two", "three", "four", "five", "six"), 1)
    ]
    path.write_text(json.dumps({"text": "seven?", "problem": "no"}))
    assert rows_of(path, "text") == [("a.jsonl:1", "seven?")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"query": "a"}\n{"query": ', "line 2, is not JSON"),
        (
            "a.jsonl",
            b'{"query": "a"}\n{"q": "b"}\n',
            "row 2 has no text under problem or question.*fields are q.*--field",
        ),
        ("a.jsonl", b'{"query": "a"}\n{"query": "  "}\n', "row 2 has no text"),
        ("a.jsonl", b"[1, 2]", "row 1 is of type int"),
        ("a.jsonl", b'{"query": "\xff"}', "not UTF-8"),
        ("a.json", b'[{"query": "a"} {', "line 1, .*value 2"),
        ("a.parquet", b"PAR1 no", "cannot be read as parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvalError, match=message) as error:
        rows_of(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(EvalError, match="does not exist"):
        rows_of(tmp_path / "none.jsonl")
    with pytest.raises(EvalError, match="is a folder"):
        rows_of(tmp_path)


def test_memory_does_not_grow_with_the_training_data(tmp_path, monkeypatch):
    """Four times the rows, the same peak: nothing of a training row is kept, be it a list or lines."""
    monkeypatch.setattr(files, "CHUNK", 1 << 14)
    for form in ("json", "jsonl"):
        peaks = []
        for count in (1500, 6000):
            rows = [{"query": text, "response": "x" * 300} for _, text in plain(count)]
            path = tmp_path / f"{count}.{form}"
            path.write_text(json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows)))
            del rows
            tracemalloc.start()
            found = find_overlaps(questions(path), plain(50, start=3))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert found["train_rows"] == count
        assert peaks[1] < 1.3 * peaks[0], form


# --- command


def write(path, rows):
    path.write_text("\n".join(json.dumps({"id": name, "question": text}) for name, text in rows))
    return str(path)


def test_the_command_lists_overlaps_and_writes_them(tmp_path, capsys):
    train = [write(tmp_path / "a.jsonl", plain(40)), write(tmp_path / "b.jsonl", [("b0", "What is\x1b[31m $1 + 1$?")])]
    test = write(
        tmp_path / "t.jsonl",
        [("t0", "what is\x1b[31m 1+1?"), ("t1", plain(8)[7][1].replace("7 of", "7 more of")), ("t2", "new?")],
    )
    assert (
        main(["--train", *train, "--test", test, "--n", "5", "--share", "0.4", "--out", str(tmp_path / "o.json")]) == 0
    )
    printed = capsys.readouterr().out
    assert "3 test questions against 41 training rows" in printed
    assert "exact:   1 test questions" in printed
    assert "  t0 = b0" in printed
    assert "  t1 ~ row 7 (" in printed
    assert "\x1b" not in printed
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["exact"] == [{"test": "t0", "train": ["b0"], "train_rows": 1}]
    assert [each["test"] for each in written["similar"]] == ["t1"]
    assert written["files"] == {"train": train, "test": [test]}


def test_errors_are_one_line_and_exit_1(tmp_path, capsys):
    test = write(tmp_path / "t.jsonl", plain(2))
    (tmp_path / "empty.jsonl").write_text("\n")
    for train, message in ((tmp_path / "none.jsonl", "does not exist"), (tmp_path / "empty.jsonl", "holds no rows")):
        assert main(["--train", str(train), "--test", test]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1


def test_the_script_runs_from_another_folder_without_torch(tmp_path):
    test = write(tmp_path / "t.jsonl", plain(2))
    script = ROOT / "eval/contamination.py"
    code = without("torch", "transformers", "vllm", "numpy", "pandas", "pyarrow") + (
        f"import runpy; sys.argv = ['x', '--train', {test!r}, '--test', {test!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    for command in ([str(script), "--train", test, "--test", test], ["-c", code]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "exact:   2 test questions" in done.stdout


# --- the real files


@needs_data
def test_math_has_its_four_overlaps_and_none_of_the_seven_false_ones():
    found = find_overlaps(questions(DATA / "math/train.jsonl"), questions(DATA / "math/test.jsonl"))
    assert {each["test"]: each["train"] for each in found["exact"]} == {
        "test/algebra/636": ["train/algebra/517"],
        "test/precalculus/24307": ["train/geometry/6032"],
        "test/algebra/1674": ["train/algebra/777"],
        "test/intermediate_algebra/965": ["train/algebra/2197"],
    }
    assert (found["train_rows"], found["test_rows"]) == (7500, 5000)


@needs_data
def test_gsm8k_has_none():
    found = find_overlaps(questions(DATA / "gsm8k/train.jsonl"), questions(DATA / "gsm8k/test.jsonl"))
    assert found["exact"] == []
    assert (found["train_rows"], found["test_rows"]) == (7473, 1319)


@needs_data
@pytest.mark.parametrize(
    ("name", "repeats"),
    [
        ("gsm8k/test.jsonl", []),
        ("math/test.jsonl", [("test/algebra/598", "test/intermediate_algebra/1449")]),
        (
            "math/train.jsonl",
            [
                ("train/algebra/2681", "train/intermediate_algebra/1777"),
                ("train/algebra/27", "train/algebra/2794"),
                ("train/intermediate_algebra/1163", "train/intermediate_algebra/506"),
                ("train/precalculus/1225", "train/precalculus/8013"),
            ],
        ),
    ],
)
def test_the_normal_form_merges_no_two_questions_of_one_set_but_true_repeats(name, repeats):
    """Read by eye: these pairs ask the same question in another layout. Any further pair would be a fault."""
    forms, verbatim = {}, {}
    for row, text in questions(DATA / name):
        first = verbatim.setdefault(" ".join(text.split()).lower(), row)
        forms.setdefault(normalise(text), {}).setdefault(first)
    assert sorted(tuple(rows) for rows in forms.values() if len(rows) > 1) == repeats
