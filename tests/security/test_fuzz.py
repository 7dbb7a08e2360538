"""Random input for everything that reads other people's files: whatever it is, the answer is a result or one line.

    python -m pytest tests/security/test_fuzz.py     # some dozens of inputs for each target, the same ones each time
    make fuzz                                        # an hour of new ones; SECONDS=600 make fuzz: ten minutes

A failure prints the smallest input that hypothesis finds. Put it into the file of its kind beside this one.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.answers import extract_answer, is_correct
from eval.files import read_rows
from matrix_llm.base.errors import MatrixLLMError
from matrix_llm.base.files import read_jsonl
from matrix_llm.base.safe_yaml import read_yaml
from matrix_llm.base.secrets import holds_secret, scrub
from matrix_llm.base.text import quoted_lines, visible
from matrix_llm.config import load_recipe
from matrix_llm.data.readers import Source
from matrix_llm.publish.command import main as hub
from matrix_llm.publish.finished_run import recipe_yaml
from matrix_llm.run.checkpoint_files import MANIFEST, read_manifest, what_is_damaged, what_is_missing
from tests.support.finished_run import write_run

SECONDS = float(os.environ.get("MATRIX_LLM_FUZZ", "0"))  # for each target
FEW = {"grader": 40, "card": 40, "recipe": 60}  # inputs in an ordinary run; 100 for the others

WORDS = [
    "The answer is: ", "\\boxed{", "}", "####", "\\frac", "\\sqrt", "$", "^{", "_", "\\text{", "1/2", "-", "3,000", "9^9^9", "°",
    "x", "(", ")", "[", "]", ",", " ", "\n", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "%", "\\infty", "0.5", "=", "½",
    "I hope it is correct.", "Final Answer: The final answer is", "\\pi", "\\cup", "e10", "99999999999999999999", "\x00", "\ud800",
]  # fmt: skip
MANY_DIGITS = "a number of 5,000 digits"  # hypothesis could not print the number itself
latex = st.one_of(st.lists(st.sampled_from(WORDS), max_size=25).map("".join), st.text(max_size=200))
plain = st.text(max_size=40)
numbers = st.one_of(st.integers(), st.floats(), st.just(MANY_DIGITS))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, plain, latex),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(plain, inner, max_size=4)),
    max_leaves=12,
)
KEYS = ["max_steps", "learning_rate", "dataset", "model_name_or_path", "prompt_template", "columns", "mce_solver", "output_dir",
        "deepspeed", "lora_target_modules", "model_config", "mce_top_k", "eval_dataset", "report_to", "bf16"]  # fmt: skip
FIELDS = ["query", "response", "question", "answer", "problem", "solution", "messages", "conversations", "prompt", "completion",
          "text", "tools", "instruction", "output", "role", "content", "from", "value", "type", "level", "id"]  # fmt: skip
rows = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), plain, latex),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)),
    max_leaves=10,
)


def fuzz(name, strategy, check):
    """Run `check` on inputs of `strategy`: a few that never change, or new ones for SECONDS."""

    @settings(
        max_examples=500 if SECONDS else FEW.get(name, 100),
        deadline=None,
        database=None,
        derandomize=not SECONDS,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value):
        counted.append(1)
        check(value)

    counted = []
    started = time.monotonic()
    run()
    while time.monotonic() - started < SECONDS:
        run()
    print(f"{name}: {len(counted):,} inputs in {time.monotonic() - started:.0f} s")


def dumped(value):
    """A value as JSON, where it can be written as such, with numbers that Python does not read back."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.dumps(value).replace(f'"{MANY_DIGITS}"', "9" * 5000)
    return "[" * 5000 + "9" * 5000


@pytest.fixture
def folder():
    """A folder of the test's own for hundreds of small files."""
    place = tempfile.mkdtemp(prefix="matrix_llm-fuzz-")
    yield Path(place)
    shutil.rmtree(place, ignore_errors=True)


def test_the_grader_gives_a_verdict_on_anything():
    conventions = st.sampled_from(["metamath", "llemma", "minerva", "strict", "flexible", "verified"])

    def check(case):
        response, gold, benchmark, convention = case
        found = extract_answer(response, convention=convention)
        assert found is None or isinstance(found, str)
        assert is_correct(response, gold, benchmark=benchmark, convention=convention) in (True, False)

    fuzz("grader", st.tuples(latex, latex, st.sampled_from(["gsm8k", "math"]), conventions), check)


def test_a_recipe_is_read_or_refused(folder):
    entries = st.dictionaries(st.one_of(st.sampled_from(KEYS), plain), json_values, max_size=5)
    texts = st.one_of(
        entries.map(dumped), st.text(max_size=300), entries.map(lambda each: dumped(each).replace('"', ""))
    )

    def check(text):
        path = folder / "recipe.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(MatrixLLMError):
            load_recipe(str(path), [], dry_run=True)

    fuzz("recipe", texts, check)


def test_command_line_words_are_read_or_refused():
    words = st.lists(
        st.one_of(st.sampled_from([f"--{key}" for key in KEYS]), plain, latex, plain.map("--".__add__)), max_size=5
    )

    def check(arguments):
        with contextlib.suppress(MatrixLLMError):
            load_recipe("recipes/tiny.yaml", arguments, dry_run=True)

    fuzz("recipe", words, check)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_rows_are_read_or_refused(suffix, folder):
    """By training's reader, which checks their form, and by that of evaluation."""
    lines = st.lists(st.one_of(rows.map(dumped), st.text(max_size=80)), max_size=4).map("\n".join)
    arrays = st.lists(rows, max_size=4).map(dumped)
    texts = st.one_of(lines, arrays, rows.map(dumped)).map(lambda text: text.encode("utf-8", "surrogatepass"))

    def check(content):
        path = folder / f"rows{suffix}"
        path.write_bytes(content)
        with contextlib.suppress(MatrixLLMError):
            list(Source(str(path)).rows())
        with contextlib.suppress(MatrixLLMError):
            list(read_rows(path))

    fuzz("rows", st.one_of(texts, st.binary(max_size=200)), check)


def test_a_card_is_written_or_refused(folder):
    run = write_run(folder)
    files = st.sampled_from(["recipe.yaml", "results.json", "metrics.jsonl", "eval/gsm8k.json", "README.md"])
    known = st.sampled_from(["accuracy_after", "accuracy_before", "steps", "scores", "name", "settings", "limit", "ce", "step",
                             "mce_weight", "dataset", "model_name_or_path", "mce_solver", "license", *KEYS])  # fmt: skip
    contents = st.one_of(
        st.dictionaries(known, json_values, max_size=5).map(dumped),
        json_values.map(dumped),
        st.text(max_size=200),
        st.dictionaries(known, json_values, max_size=3).map(lambda each: f"---\n{dumped(each)}\n---\n"),
    )

    def check(case):
        name, text = case
        before = (run / name).read_bytes() if (run / name).is_file() else None
        (run / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        assert hub(["card", str(run)]) in (0, 2)
        (run / name).unlink()
        if before is not None:
            (run / name).write_bytes(before)

    fuzz("card", st.tuples(files, contents), check)


def test_text_is_cleaned_whatever_it_is():
    def check(text):
        for clean in (visible, quoted_lines, scrub):
            once = clean(text)
            assert isinstance(once, str)
        assert visible(visible(text)) == visible(text)
        if not holds_secret(text):
            assert scrub(text) == text

    pieces = st.lists(
        st.one_of(st.sampled_from(["hf_", "\\u0068", "sk-", "://", ":", "@", "\n", "a1B2" * 9]), plain), max_size=9
    )
    fuzz("text", st.one_of(st.text(max_size=400), pieces.map("".join)), check)


def test_yaml_is_a_value_or_an_error_of_yaml():
    pieces = ["a: ", "&x ", "*x", "[", "]", "{", "}", "\n", "  ", "- ", "<<: ", "!!int ", "!!set ", "? ", "1:2:3", "0x", "'", '"',
              "|\n", "2026-13-13", "1e9", "~", "---\n", "%YAML 1.1\n", "\t", "#"]  # fmt: skip
    texts = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(pieces), max_size=30).map("".join))

    def check(text):
        with contextlib.suppress(yaml.YAMLError):
            read_yaml(text)

    fuzz("yaml", texts, check)


def test_a_published_recipe_says_the_same():
    def check(settings_given):
        assert yaml.safe_load(recipe_yaml(settings_given)) == settings_given

    encodable = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
    values = st.recursive(
        st.one_of(encodable, st.booleans(), st.integers(-9, 9)), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    )
    fuzz("published recipe", st.dictionaries(encodable.filter("hub_token".__ne__), values, max_size=4), check)


def test_a_checkpoint_is_whole_or_the_reason_is_said(folder):
    manifests = st.one_of(
        st.dictionaries(st.sampled_from(["files", "step", "processes", "checksums"]), json_values, max_size=4),
        st.fixed_dictionaries(
            {"files": st.dictionaries(plain, st.one_of(numbers, plain), max_size=3), "processes": st.integers()}
        ),
        json_values,
    )

    def check(content):
        (folder / MANIFEST).write_text(dumped(content))
        (folder / "metrics.jsonl").write_text(dumped(content), encoding="utf-8")
        assert isinstance(read_manifest(folder), dict)
        assert isinstance(what_is_missing(folder), str | None)
        assert isinstance(what_is_damaged(folder), str | None)
        assert all(isinstance(entry, dict) for entry in read_jsonl(folder / "metrics.jsonl"))

    fuzz("checkpoint", manifests, check)
