"""Prompts are byte for byte those that published scores were measured with; problems and golds are read right."""

import hashlib
import json
import re
import subprocess
import sys

import pytest

from eval.files import read_rows
from eval.generate.prompts import METAMATH_STOP, PROMPTS, WIZARDMATH_STOP, choose_prompt
from eval.generate.tasks import choose, load_problems, problem_set_name
from eval.grader.text import last_boxed
from matrix_llm.base.errors import EvalError
from matrix_llm.data.wordproblems import generate
from tests.support.paths import ROOT, SHARED

DATA = SHARED / "data"
HAS_SHARED = (DATA / "prompts").is_dir()
needs_shared = pytest.mark.skipif(
    not HAS_SHARED, reason="shared/data, the reference copy of prompts and test sets, is not beside this checkout"
)

# Of the whole text before a problem and after it, as the sources build it.
SHA256 = {
    "metamath": "e15b2496495eee707e94e3c0b21e5c877a7d924b107d492f706dcbcc4bb3f2d8",
    "wizardmath": "e15b2496495eee707e94e3c0b21e5c877a7d924b107d492f706dcbcc4bb3f2d8",
    "gsm8k_8shot": "822bb6e04b04c01e632a36d6152f09268b3ce5a9d6373de662d16d260866b0d8",
    "minerva_4shot": "d01d561136e75e6118eabab3f2a2f80157eac4060d918b6cd3f6c31e96ec8078",
}


def choose_auto(benchmark="gsm8k", builtin=False, recipe=None, chat_template=False, name="auto"):
    return choose_prompt(name, benchmark=benchmark, builtin=builtin, recipe=recipe, chat_template=chat_template)


@pytest.mark.parametrize("name", SHA256)
def test_prompts_are_byte_exact(name):
    assert PROMPTS[name].sha256() == hashlib.sha256(PROMPTS[name].template.encode()).hexdigest() == SHA256[name]


@needs_shared
def test_prompts_equal_the_reference_copy():
    alpaca = json.loads((DATA / "prompts/alpaca_metamath.json").read_text())
    assert PROMPTS["metamath"].template == PROMPTS["wizardmath"].template == alpaca["metamath_eval"]
    assert PROMPTS["alpaca"].template == alpaca["metamath_train_no_input"]
    assert list(PROMPTS["metamath"].stop) == alpaca["metamath_stop"]
    assert list(PROMPTS["wizardmath"].stop) == alpaca["wizardmath_stop"]
    for name in ("metamath", "wizardmath"):
        assert dict(zip(("gsm8k", "math"), PROMPTS[name].max_tokens, strict=True)) == alpaca[f"{name}_max_tokens"]
    for name, file, ask in (
        ("gsm8k_8shot", "gsm8k_cot_8shot", "Q: What?\nA:"),
        ("minerva_4shot", "minerva_math_4shot", "Problem:\nWhat?\n\nSolution:"),
    ):
        reference = json.loads((DATA / f"prompts/{file}.json").read_text())["formats"]["llemma_harness"]
        assert PROMPTS[name].build("What?") == reference["exact_prefix"] + reference["separator"] + ask
        assert list(PROMPTS[name].stop) == reference["stop"]


def test_quirks_of_the_llemma_prefix_survive():
    text = PROMPTS["gsm8k_8shot"].template
    assert "Olivia has \\$23." in text
    assert "3 + 2 = 5.  The answer is 5." in text
    assert PROMPTS["minerva_4shot"].keep_stop
    assert [name for name, prompt in PROMPTS.items() if prompt.keep_stop] == ["minerva_4shot"]


def test_bare_stop_words_belong_to_the_metamath_family_alone():
    assert {name for name, prompt in PROMPTS.items() if "Response" in prompt.stop} == {"metamath", "wizardmath"}
    assert set(WIZARDMATH_STOP) < set(METAMATH_STOP)


def test_braces_of_a_problem_survive():
    problem = r"Is $\frac{1}{2} = {instruction}$ or {0}?"
    for name, prompt in PROMPTS.items():
        if not prompt.chat:
            assert problem in prompt.build(problem), name


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("metamath", {"recipe": {"prompt_template": "metamath"}}),
        ("metamath", {"recipe": {}}),  # what training uses when the recipe names none
        ("metamath", {"recipe": {"prompt_template": "metamath"}, "chat_template": True}),
        ("alpaca", {"recipe": {"prompt_template": "metamath"}, "builtin": True}),
        ("plain", {"recipe": {"prompt_template": "plain"}, "benchmark": "math"}),
        ("custom", {"recipe": {"prompt_template": "Ask: {instruction} Say:"}}),
        ("chat", {"recipe": {"chat_template_path": "x.jinja"}, "chat_template": True}),
        ("chat_question", {"recipe": {"prompt_template": "chat"}, "chat_template": True}),
        ("chat", {"chat_template": True}),
        ("gsm8k_8shot", {}),
        ("minerva_4shot", {"benchmark": "math"}),
    ],
)
def test_auto_asks_as_the_model_was_trained(expected, arguments):
    prompt, why = choose_auto(**arguments)
    assert prompt.name == expected
    assert why


def test_a_template_from_a_recipe_is_used_as_it_is():
    assert choose_auto(recipe={"prompt_template": "Ask: {instruction} Say:"})[0].build("{1}") == "Ask: {1} Say:"


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Did you mean 'metamath'", {"name": "metamth"}),
        ("worked gsm8k problems", {"name": "gsm8k_8shot", "benchmark": "math"}),
        ("no chat template", {"name": "chat"}),
        ("recipe.yaml says", {"recipe": {"prompt_template": "unheard of"}}),
        ("holds {instruction} once", {"name": "{instruction} and {instruction}"}),
    ],
)
def test_a_prompt_that_cannot_work_is_refused_in_one_line(message, arguments):
    with pytest.raises(EvalError, match=re.escape(message)) as caught:
        choose_auto(**arguments)
    assert "\n" not in str(caught.value)


def test_chat_asks_through_the_template_for_a_box():
    class Tokenizer:
        def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
            assert (tokenize, add_generation_prompt) == (False, True)
            return f"<user>{messages[0]['content']}<model>"

    assert PROMPTS["chat_question"].build("1+1?", Tokenizer()) == "<user>1+1?<model>"
    assert PROMPTS["chat"].build("1+1?", Tokenizer()) == (
        "<user>1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.<model>"
    )


# ---- problems


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"so $\boxed 5$ it is", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1 \\{2}}", r"1 \\{2}"),
        (r"\boxed{never closed", None),
        (r"\boxedx{1}", None),
        ("nothing", None),
    ],
)
def test_gold_of_math_is_the_last_box(solution, gold):
    assert last_boxed(solution) == gold


@needs_shared
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_of_math_equals_the_reference_answer(split):
    rows = list(read_rows(DATA / f"math/{split}.jsonl"))
    assert [last_boxed(row["solution"]) for row in rows] == [row["answer"] for row in rows]


@needs_shared
def test_both_test_sets_load_whole():
    gsm8k = load_problems("gsm8k", data=str(DATA / "gsm8k/test.jsonl"))
    assert (len(gsm8k), gsm8k[0].id, gsm8k[0].gold) == (1319, "gsm8k/test/0", "18")
    assert sum("," in problem.gold for problem in gsm8k) == 14
    math = load_problems("math", data=str(DATA / "math/test.jsonl"))
    assert len(math) == 5000
    assert (math[0].id, math[0].level, math[0].subject) == ("test/algebra/1", 3, "Algebra")
    ids = DATA / "math/math500_ids.json"
    subset = load_problems("math", data=str(DATA / "math/test.jsonl"), subset="math500", ids=str(ids))
    assert [problem.id for problem in subset] == json.loads(ids.read_text())
    with pytest.raises(EvalError, match="--ids FILE"):
        load_problems("math", data=str(DATA / "math/test.jsonl"), subset="math500")


def test_one_row_reads_the_same_from_every_format(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"problem": "a\u2028b", "solution": r"\boxed{1}", "level": "Level ?"},
        {"problem": "c", "answer": 2, "level": 4},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "b").mkdir()
    table = {
        key: [None if row.get(key) is None else str(row[key]) for row in rows]
        for key in ("problem", "solution", "level", "answer")
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    read = [load_problems("math", data=str(tmp_path / name)) for name in ("a.json", "a.jsonl", "a.parquet")]
    assert read[0] == read[1] == read[2]
    assert [(row.problem, row.gold, row.level) for row in read[0]] == [("a\u2028b", "1", None), ("c", "2", 4)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"question": "x"}\n', "no gold answer"),
        ("a.jsonl", '{"text": "x", "answer": "1"}\n', "its columns are text, answer"),
        ("a.jsonl", '{"question": "x", "answer": "1"}\n{"quest', "line 2"),
        ("a.jsonl", '{"question": "x", "answer": "1", "id": "i"}\n' * 2, "occurs twice"),
        ("a.jsonl", "[1]\n", "not an object"),
        ("a.tsv", "question\tanswer\n", ".jsonl, .json, .parquet or .csv"),
        ("a.parquet", "no parquet", "as parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(EvalError, match=re.escape(message)) as caught:
        load_problems("gsm8k", data=str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_without_a_hub_the_way_out_is_named():
    with pytest.raises(EvalError, match=r"--data FILE\.jsonl"):
        load_problems("gsm8k")


def test_builtin_problems_are_fixed_and_held_out():
    problems = load_problems("gsm8k", data="builtin")
    assert len(problems) == 512
    assert load_problems("gsm8k", data="builtin", limit=600)[:512] == problems
    unseen = load_problems("gsm8k", data="builtin_new_kinds")
    assert len(unseen) == 512
    assert not {problem.id for problem in unseen} & {problem.id for problem in problems}
    assert [problem.problem for problem in unseen] == [row.query for row in generate(512, seed=0, split="new_kinds")]
    with pytest.raises(EvalError, match=r"builtin_new_kind: .*Did you mean builtin_new_kinds"):
        load_problems("gsm8k", data="builtin_new_kind")
    for name in ("builtin", "builtin_new_kinds"):
        with pytest.raises(EvalError, match=rf"{name} .*gsm8k\.py"):
            load_problems("math", data=name)


def test_limit_and_shuffle_keep_the_order_of_the_data():
    problems = load_problems("gsm8k", data="builtin")
    assert choose(problems, limit=5, shuffle_seed=None) == problems[:5]
    shuffled = choose(problems, limit=50, shuffle_seed=1)
    assert shuffled == [problem for problem in problems if problem in shuffled] != problems[:50]
    assert shuffled == choose(problems, limit=50, shuffle_seed=1) != choose(problems, limit=50, shuffle_seed=2)


def test_names_tell_data_sets_apart():
    assert (
        problem_set_name("gsm8k", data=None, subset=None)
        == problem_set_name("gsm8k", data="x/test.jsonl", subset=None)
        == "gsm8k"
    )
    assert problem_set_name("gsm8k", data="builtin", subset=None) == "gsm8k_builtin"
    assert problem_set_name("gsm8k", data="builtin_new_kinds", subset=None) == "gsm8k_builtin_new_kinds"
    assert problem_set_name("math", data="x/test.jsonl", subset="math500") == "math500"
    assert problem_set_name("gsm8k", data="x/backward test.jsonl", subset=None) == "gsm8k_backward_test"


def test_prompts_and_tasks_import_nothing_heavy():
    heavy = ["torch", "transformers", "vllm", "datasets", "numpy", "scipy", "jinja2"]
    code = (
        "import sys; import eval.generate.prompts, eval.generate.run; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
