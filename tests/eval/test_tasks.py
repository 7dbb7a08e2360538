"""The benchmarks that --task names: rows as their data sets hold them, and runs that end as those of GSM8K do."""

import json
import os
import re
import sys
import types

import pytest

from eval.answers import grade
from eval.contamination import main as contamination
from eval.generate.options import Options
from eval.generate.run import main
from eval.generate.sources import HubData
from eval.generate.tasks import TASKS, load_problems, problem_set_name
from eval.regrade import regrade
from eval.score import main as score
from matrix_llm.base.errors import EvalError
from matrix_llm.publish.card import BENCHMARKS
from tests.support.paths import ROOT

# One or two rows of each data set's layout; the texts are ours.
AIME = [
    {"id": 60, "problem": "Find $x$.", "solution": r"\boxed{\text{(D)}}", "answer": "033", "url": "u", "year": "2024"},
    {"id": "0", "problem": "Find $y$.", "answer": r"336^\circ"},
    {"ID": "2024-II-4", "Problem": "Find $z$.", "Solution": r"so \boxed{025}", "Answer": 33},
    {"problem": "Find $w$.", "solution": r"\boxed{204}", "url": "u"},
]
AMC = [
    {"id": 0, "problem": "Find $x$.", "answer": 27.0, "url": "u"},
    {"id": 1, "question": "Find $y$.", "answer": "-1.0"},
]
OLYMPIAD = [
    {
        "id": 1606, "subfield": "Algebra", "context": None, "question": "Solve.", "solution": ["..."],
        "final_answer": [r"$a=2$, $a=-6-4 \sqrt{2}$"], "is_multiple_answer": True, "unit": None,
        "answer_type": "Numerical", "error": None,
    },
    {
        "id": "2592", "subfield": "Geometry", "context": "None", "question": "Find $r$.", "solution": "['...']",
        "final_answer": "['4.2']", "is_multiple_answer": "False", "unit": "%", "answer_type": "Numerical",
        "error": "1e-1",
    },
    {"id": 3, "context": "A cube.", "question": "Its volume?", "final_answer": ["$1$", "2"], "error": "None"},
]  # fmt: skip
PLUS = [
    {"question": "Ann has 3 pens and buys 0.5 more. How many?", "solution": "3.5\n#### 3.5", "answer": "3.5",
     "perturbation_type": "numerical substitution", "seed_question": "s", "seed_solution": "t", "seed_answer": "4"},
    {"question": "Ann buys pens. How many has she?", "solution": "#### None", "answer": "None",
     "perturbation_type": "critical thinking", "seed_question": "s", "seed_solution": "t", "seed_answer": "4"},
]  # fmt: skip
SYMBOLIC = [
    {"id": 3, "instance": instance, "question": f"{instance} + 1?", "answer": f"so\n#### {instance + 1}",
     "original_id": 473, "original_question": "q", "original_answer": "a\n#### 2", "canary": "c"}
    for instance in range(2)
]  # fmt: skip
MATH500 = [
    {"problem": "Find.", "solution": r"\boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}", "subject": "Algebra",
     "level": 2, "unique_id": "test/algebra/1.json"}
]  # fmt: skip


def written(path, rows, name="rows.jsonl"):
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path / name)


@pytest.mark.parametrize(
    ("task", "rows", "read"),
    [
        ("aime24", AIME, [("60", "33"), ("0", "336"), ("2024-II-4", "33"), ("aime24/rows/3", "204")]),
        ("aime25", [{"problem": "p", "answer": "070", "id": "1"}], [("1", "70")]),
        ("amc23", AMC, [("0", "27"), ("1", "-1")]),
        (
            "olympiadbench",
            OLYMPIAD,
            [("1606", r"a=2, a=-6-4 \sqrt{2}"), ("2592", "4.2 (to within 0.1)"), ("3", "1, 2")],
        ),
        ("gsm_plus", PLUS, [("gsm_plus/rows/0", "3.5"), ("gsm_plus/rows/1", "None")]),
        ("gsm_symbolic_p1", SYMBOLIC, [("3/0", "1"), ("3/1", "2")]),
        ("math500", MATH500, [("test/algebra/1", r"\frac{1}{2}")]),
        ("math", [{"problem": "p", "answer": 27.0, "id": 0}], [("0", "27")]),
        ("gsm8k", [{"Question": "p", "Answer": 0.5}], [("gsm8k/rows/0", "0.5")]),
    ],
)
def test_rows_are_read_as_their_data_set_holds_them(tmp_path, task, rows, read):
    problems = load_problems(task, data=written(tmp_path, rows))
    assert [(problem.id, problem.gold) for problem in problems] == read


def test_groups_templates_and_contexts_are_kept(tmp_path):
    plus = load_problems("gsm_plus", data=written(tmp_path, PLUS))
    assert [problem.subject for problem in plus] == ["numerical substitution", "critical thinking"]
    assert plus[0].template == plus[1].template is not None
    assert [problem.template for problem in load_problems("gsm_symbolic", data=written(tmp_path, SYMBOLIC))] == [
        "3"
    ] * 2
    olympiad = load_problems("olympiadbench", data=written(tmp_path, OLYMPIAD))
    assert [problem.subject for problem in olympiad] == ["Algebra", "Geometry", None]
    assert [problem.problem for problem in olympiad] == ["Solve.", "Find $r$.", "A cube.\nIts volume?"]
    (math500,) = load_problems("math500", data=written(tmp_path, MATH500))
    assert (math500.subject, math500.level) == ("Algebra", 2)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("aime24", {"problem": "p", "answer": "1/2"}, "row 2 has the answer '1/2'"),
        ("aime24", {"problem": "p", "answer": None}, "row 2 has no gold answer"),
        ("aime24", {"problem": "", "answer": 1}, "row 2 has no text"),
        ("amc23", {"problem": "p", "answer": 0.5}, "row 2 has the answer '0.5'"),
        ("amc23", {"problem": "p", "answer": float("nan")}, "row 2 has no gold answer"),
        ("olympiadbench", {"question": "p", "answer": "1"}, "row 2 has no gold answer"),
        ("olympiadbench", {"question": "p", "final_answer": []}, "row 2 has no gold answer"),
        ("olympiadbench", {"question": "p", "final_answer": ["1", "$$"]}, "row 2 has an empty text"),
        (
            "olympiadbench",
            {"question": "p", "final_answer": ["1"], "error": "1e-1,1"},
            "row 2 has the 'error' '1e-1,1'",
        ),
        ("olympiadbench", {"question": "p", "final_answer": ["1"], "error": "-1"}, "row 2 has the 'error' '-1'"),
        ("gsm_plus", {"question": "p", "solution": "#### 3"}, "row 2 has no gold answer"),
        ("gsm_symbolic", {"question": "p", "answer": "so\n#### "}, "row 2 has no gold answer"),
        ("math500", {"problem": "p", "answer": ["1", "2"]}, "row 2 has a list as its 'answer'"),
        ("gsm8k", {"question": "p", "answer": True}, "row 2 has a bool as its 'answer'"),
        ("gsm8k", {"question": "p", "answer": float("nan")}, "row 2 has no gold answer"),
        ("gsm8k", {"question": "p", "answer": float("inf")}, "row 2 has the number inf as its 'answer'"),
        ("olympiadbench", {"question": "p", "final_answer": [None]}, "row 2 has a NoneType as its 'final_answer'"),
        ("gsm8k", {"question": "a\ud800", "answer": "1"}, "row 2 has half of a surrogate pair in its question"),
    ],
)
def test_a_row_that_cannot_be_read_is_one_line_with_its_number(tmp_path, task, row, message):
    whole = {"id": "w", "problem": "p", "question": "p", "answer": "1", "final_answer": ["1"]}
    with pytest.raises(EvalError, match=re.escape(message)) as caught:
        load_problems(task, data=written(tmp_path, [whole, row]))
    assert "\n" not in str(caught.value)
    assert "rows.jsonl" in str(caught.value)


def test_names_may_be_capitalised_and_whole_numbers_end_in_point_zero(tmp_path):
    row = {"Unique_ID": "a", "Question": "p", "Answer": "18.0", "Subject": "s", "Level": "Level 3"}
    (problem,) = load_problems("gsm8k", data=written(tmp_path, [row]))
    assert (problem.id, problem.gold, problem.subject, problem.level) == ("a", "18", "s", 3)
    (problem,) = load_problems("gsm_plus", data=written(tmp_path, [{"question": "p", "answer": float("nan")}]))
    assert problem.gold == "None"  # pandas reads "None" as NaN


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ('[["a"]]', "each a text or a whole number"),
        ("[null]", "each a text or a whole number"),
        ('["a", "a"]', "lists the id 'a' twice"),
        ("[7]", "1 of 1 ids are not in"),
    ],
)
def test_a_list_of_ids_that_cannot_be_followed_is_one_line(tmp_path, ids, message):
    (tmp_path / "ids.json").write_text(ids)
    data = written(tmp_path, [{"id": "a", "question": "p", "answer": "1"}])
    with pytest.raises(EvalError, match=re.escape(message)):
        load_problems("gsm8k", data=data, ids=str(tmp_path / "ids.json"))


def test_what_is_no_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for suffix in (".jsonl", ".csv", ".parquet"):
        (tmp_path / f"broken{suffix}").symlink_to("/proc/self/mem")  # a file whose disk cannot read it
    for name, message in (
        ("pipe.jsonl", "is a pipe or a device"),
        ("broken.jsonl", "cannot be read (Input/output error)"),
        ("broken.csv", "cannot be read (Input/output error)"),
        ("broken.parquet", "cannot be read"),
        ("x" * 300 + ".jsonl", "cannot be read (File name too long)"),
    ):
        with pytest.raises(EvalError, match=re.escape(message)):
            load_problems("gsm8k", data=str(tmp_path / name))


def test_rows_of_templates_under_another_task_name_the_right_one(tmp_path):
    with pytest.raises(EvalError, match=r"'3' occurs twice.*--task gsm_symbolic"):
        load_problems("gsm8k", data=written(tmp_path, SYMBOLIC))


def test_csv_is_read_and_a_broken_one_refused(tmp_path):
    (tmp_path / "aime.csv").write_text('\ufeffid,problem,answer\n1,"Find $x$,\nplease.",033\n\n', encoding="utf-8")
    (problem,) = load_problems("aime24", data=str(tmp_path / "aime.csv"))
    assert (problem.id, problem.problem, problem.gold) == ("1", "Find $x$,\nplease.", "33")
    for text, message in (
        ("problem,answer\np,1,2\n", "line 2, has 3 values where the head line names 2"),
        ("problem,answer\np\n", "line 2, has 1 values"),
        ("problem,answer,answer\np,1,2\n", "names 'answer' twice"),
        ('problem,answer\n"p"q,1\n', "line 2, is not CSV"),
        ("", "no rows"),
    ):
        (tmp_path / "broken.csv").write_text(text)
        with pytest.raises(EvalError, match=re.escape(message)):
            load_problems("aime24", data=str(tmp_path / "broken.csv"))


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets`, which no test may let onto the network: {(name, config, split, revision): rows}."""
    sets, asked = {}, []

    def load_dataset(name, config=None, *, split, revision=None):
        asked.append((name, config, split, revision))
        if (name, config, split) not in sets:
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")
        return sets[name, config, split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return types.SimpleNamespace(sets=sets, asked=asked)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"math"}))
def test_a_task_reads_its_own_data_set_with_its_configuration_split_and_commit(hub, task):
    data = TASKS[task].data
    row = {"id": "i", "question": "p", "problem": "p", "answer": "1", "final_answer": ["1"]}
    hub.sets[data.name, data.configs[0], data.split] = [row]
    assert len(load_problems(task)) == len(load_problems(task, data=data.name)) == 1
    assert hub.asked == [(data.name, data.configs[0], data.split, data.revision)] * 2


def test_any_data_set_on_the_hub_can_stand_in(hub):
    hub.sets["org/set", None, "test"] = hub.sets["org/set", None, "train"] = hub.sets["org/set", "big", "train"] = AMC
    for data, asked in (
        ("org/set", ("org/set", None, "test", None)),
        ("org/set:train", ("org/set", None, "train", None)),
        ("org/set:big:train", ("org/set", "big", "train", None)),
        ("org/set@abc:big:train", ("org/set", "big", "train", "abc")),
    ):
        assert [problem.gold for problem in load_problems("amc23", data=data)] == ["27", "-1"]
        assert hub.asked[-1] == asked
    with pytest.raises(EvalError, match=r"org/set cannot be loaded .*Should be one of \['train'\]"):
        load_problems("amc23", data="org/set:validation")
    with pytest.raises(EvalError, match=r"neither a file nor a data set .*ORG/NAME:CONFIG:SPLIT"):
        load_problems("amc23", data="a/b/c")
    with pytest.raises(EvalError, match=r"amc\.jsonl does not exist"):
        load_problems("amc23", data="my/amc.jsonl")


def test_the_library_of_the_hub_takes_what_is_asked_of_it(tmp_path, monkeypatch):
    """With the real `datasets`, which reads a folder of this name as it would the repository."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org/set"
    (folder / "big").mkdir(parents=True)
    for name, rows in (("big/train.jsonl", AMC), ("big/test.jsonl", AMC[:1])):
        written(folder, [{"problem": "p", "answer": row["answer"]} for row in rows], name)
    splits = "".join(f"\n  - split: {split}\n    path: big/{split}.jsonl" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: big\n  data_files:{splits}\n---\n")
    assert len(HubData("org/set", "train", ("big",), "abc").read()) == 2
    assert len(HubData("org/set").read()) == 1
    assert [row["id"] for row in HubData("org/set", "train", ("big", "big")).read()][:2] == [
        "big/train/0",
        "big/train/1",
    ]
    with pytest.raises(EvalError, match=r"cannot be loaded .*validation"):
        HubData("org/set", "validation", ("big",)).read()


def test_names_of_files_tell_tasks_and_data_sets_apart():
    assert problem_set_name("aime24", data=None, subset=None) == "aime24"
    assert problem_set_name("aime24", data="x/aime24.csv", subset=None) == "aime24"
    assert problem_set_name("aime24", data="HuggingFaceH4/aime_2024", subset=None) == "aime24"
    assert problem_set_name("aime24", data="org/set:train", subset=None) == "aime24_org_set_train"
    assert problem_set_name("gsm_plus", data="x/hard.jsonl", subset=None) == "gsm_plus_hard"


def test_the_model_card_names_every_task_with_its_data_set():
    assert {task.name: (task.title, task.data.name) for task in TASKS.values()} == BENCHMARKS


def test_the_table_of_tasks_is_as_documented():
    table = (ROOT / "docs/evaluation.md").read_text().partition("## Tasks")[2].partition("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines() if "| `" in line]
    documented = {name: (data, place.split(", ")[-1], count, rule) for name, data, place, count, rule, *_ in rows}
    assert documented == {
        task.name: (task.data.name, task.data.split, f"{task.problems:,}", task.rule) for task in TASKS.values()
    }


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer, tiny_llama):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    (path / "recipe.yaml").write_text("prompt_template: plain\n")
    return path


@pytest.fixture
def run(model, tmp_path, capsys):
    def call(task, rows, *extra, command=score):
        data = written(tmp_path, rows, f"{task}.jsonl")
        given = ["--task", task, "--model", str(model), "--data", data, "--output_dir", str(tmp_path / "out")]
        code = command([*given, "--engine", "transformers", "--max_tokens", "4", *map(str, extra)])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("error:")]

    return call


def test_a_small_set_is_sampled_unless_the_user_says_otherwise(run, tmp_path):
    settings = tmp_path / "out/aime24.settings.json"
    for extra, expected in (
        ((), (16, 0.6, 0.95)),
        (("--n", 2), (2, 0.6, 0.95)),
        (("--n", 2, "--temperature", 1, "--top_p", 1), (2, 1.0, 1.0)),
        (("--temperature", 0), (1, 0.0, 1.0)),
    ):
        code, out, _ = run("aime24", AIME[:1], *extra, "--overwrite")
        assert code == 0
        stored = json.loads(settings.read_text())
        assert (stored["n"], stored["temperature"], stored["top_p"]) == expected
        assert f"{expected[0]} sample" in out
        assert ("top_p 0.95" in out) == (expected[2] == 0.95)
    assert run("aime24", AIME[:1], "--n", 2, "--temperature", 0)[2] == [
        "error: --n 2 at --temperature 0 would draw the same text 2 times. Give a temperature, such as 0.7."
    ]
    code, out, _ = run("gsm_plus", PLUS)
    assert code == 0
    assert json.loads((tmp_path / "out/gsm_plus.settings.json").read_text())["n"] == 1


def test_a_run_of_a_task_leaves_files_that_are_resumed_graded_again_and_checked_for_contamination(
    run, tmp_path, capsys
):
    code, out, _ = run("olympiadbench", OLYMPIAD, "--limit", 2)
    assert code == 0
    code, out, _ = run("olympiadbench", OLYMPIAD)
    assert code == 0
    assert "2 of 3 samples are on file" in out
    summary = json.loads((tmp_path / "out/olympiadbench.json").read_text())
    assert (summary["benchmark"], summary["name"], summary["problems"]) == ("math", "olympiadbench", 3)
    assert set(summary["by_subject"]) == {"Algebra", "Geometry"}
    file = tmp_path / "out/olympiadbench.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers = (r"\boxed{-6-4\sqrt 2, 2}", r"\boxed{4.15\%}", r"\boxed{2}")
    written(file.parent, [{**row, "response": answer} for row, answer in zip(rows, answers, strict=True)], file.name)
    assert regrade(file, "math")["scores"]["verified"]["correct"] == 2
    assert contamination(["--train", written(tmp_path, [{"query": "find r."}]), "--test", str(file)]) == 0
    assert "exact:   1 test questions" in capsys.readouterr().out


def test_samples_of_one_question_are_one_test_question(run, tmp_path, capsys):
    assert run("aime24", AIME[:1], "--n", 3)[0] == 0
    file = str(tmp_path / "out/aime24.jsonl")
    assert contamination(["--train", written(tmp_path, [{"query": "Find x."}]), "--test", file]) == 0
    assert "1 test questions against 1 training rows" in capsys.readouterr().out


def test_rows_of_a_template_say_so_and_the_interval_is_clustered_by_it(run, tmp_path):
    code, out, _ = run("gsm_symbolic", SYMBOLIC)
    assert code == 0
    assert "2 problems are made from 1 templates" in out
    assert "warning: the 95 % interval is" in out
    assert json.loads((tmp_path / "out/gsm_symbolic.json").read_text())["templates"]["templates"] == 1
    assert [json.loads(line)["template"] for line in (tmp_path / "out/gsm_symbolic.jsonl").open()] == ["3", "3"]


def test_the_two_older_commands_take_a_task_too(run, tmp_path):
    code, _, _ = run("amc23", AMC, "--n", 1, command=lambda given: main("math", "test", given))
    assert code == 0
    assert (tmp_path / "out/amc23.json").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--subset", "math500"), "--subset math500 is a part of MATH, but --task is amc23"),
        (("--data", "builtin"), "--data builtin makes grade-school problems, so it cannot stand in for AMC 2023"),
    ],
)
def test_what_does_not_fit_the_task_is_refused_in_one_line(run, extra, message):
    code, _, errors = run("amc23", AMC, *extra)
    assert code == 1
    assert len(errors) == 1
    assert message in errors[0]


def test_an_unknown_task_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        score(["--task", "aime", "--model", "m"])
    assert "aime24" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score(["--model", "m"])
    assert "--task" in capsys.readouterr().err
    with pytest.raises(EvalError, match=r"--task aime is not known: .*aime24"):
        load_problems("aime")


def test_options_of_a_library_user_keep_what_was_given():
    chosen = Options(model="m", n=4).for_task(TASKS["aime24"])
    assert (chosen.n, chosen.temperature, chosen.top_p) == (4, 0.6, 0.95)
    chosen = Options(model="m").for_task(TASKS["gsm8k"])
    assert (chosen.n, chosen.temperature, chosen.top_p) == (1, 0.0, 1.0)


# --- golds that say more than a value ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("The problem does not say how much a pen costs, so the total cannot be determined.", True),
        ("We don't have enough information.\n#### None", True),
        ("The answer is: None", True),
        (r"\boxed{\text{Not enough information}}", True),
        ("She has 3 pens.\nBut we don't know how many pencils.\nSo we need to ask her.", True),
        ("<think>so 5</think>The number of people was never mentioned.", True),
        ("The price is not given. Assuming 5 dollars, 3 cost 15.\n#### 15", False),
        ("#### 15 (the price is not specified)", False),
        ("We can't determine the total. However, if we assume 10, the total is 30.", False),
        ("None of the apples were eaten. 5 + 3 = 8 apples.", False),
        ("The answer is that none of the pens are blue, so 0.", False),
        (r"so \boxed{12}. The number was not given.", False),
        ("3 * 5 = 15. The answer is 15.", False),
        ("I like pens.", False),
        ("<think>we cannot determine", False),
        ("", False),
    ],
)
def test_an_unanswerable_question_is_answered_by_saying_so(response, right):
    assert grade(response, "None").correct is right


def test_a_tolerance_is_kept_to_and_only_by_the_convention_that_reads_golds():
    gold = "4.2 (to within 0.1)"
    for answer, right in (("4.2", True), ("4.3", True), (r"r = 4.1\%", True), (r"\frac{25}{6}", True), ("4.31", False)):
        assert grade(rf"The answer is $\boxed{{{answer}}}$.", gold, benchmark="math").correct is right
    assert grade(r"\boxed{4.2}", gold, benchmark="math", convention="strict").correct is True
    assert grade(r"\boxed{4.3}", gold, benchmark="math", convention="strict").correct is False
