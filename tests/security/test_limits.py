"""Templates and YAML that would take for ever, or all memory, are stopped in seconds and one line."""

import contextlib
import signal
import time

import pytest
import yaml

from eval.gsm8k import main as evaluate
from matrix_llm.base.errors import LimitError, RecipeError
from matrix_llm.base.limits import limited
from matrix_llm.base.safe_yaml import read_yaml
from matrix_llm.config import load_recipe
from matrix_llm.data.chat import ChatLayout, prompt_text
from matrix_llm.publish.finished_run import read_settings
from matrix_llm.train import main as train
from tests.support.finished_run import write_run
from tests.support.tiny import TINY

NESTED = "".join("{% for i in range(99999) %}" for _ in range(3)) + "{% endfor %}" * 3
TEMPLATES = {
    "nested loops": NESTED,
    "a loop over the text": "{% for a in messages[0].content * 999 %}{% for b in messages[0].content * 999 %}"
    "{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a large power": "{{ 9 ** (9 ** 9) }}",
    "a text of a terabyte": "{{ 'a' * 10 ** 12 }}",
    "a doubled text": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a wide filter": "{{ 'x' | center(10 ** 11) }}",
    "a doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a format": "{{ '%0100000000000d' % 1 }}",
    "fifty million characters": "{{ 'a b ' * 12500000 }}",
    "only with a question": "{% if messages[0].content | length > 20 %}"
    + NESTED
    + "{% endif %}{% for m in messages %}<s>"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}",
}


@pytest.fixture(params=TEMPLATES)
def template(request):
    return TEMPLATES[request.param]


@pytest.fixture
def short(monkeypatch):
    """Less patience than a run has: the tests wait for it."""
    monkeypatch.setattr("matrix_llm.base.limits.limited.__wrapped__.__defaults__", (0.5,))


def lay_out(tokenizer, messages):
    return ChatLayout(tokenizer).segments(messages)


def test_a_template_is_stopped_in_time_and_memory(template, short, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    started = time.process_time()
    with pytest.raises(LimitError, match="chat template"):
        prompt_text(tiny_tokenizer, "How many pens does Mia have?")
    assert time.process_time() - started < 10
    with pytest.raises(LimitError, match="chat template"):
        lay_out(tiny_tokenizer, [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y"}])


def test_the_limits_are_gone_after_the_block():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    for block in (lambda: None, lambda: "a" * 10**12, lambda: sum(range(10**12))):
        try:
            with limited("it", 0.2):
                block()
        except LimitError:
            pass
        assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_time_that_passes_without_work_does_not_count():
    with limited("it", 0.2):
        time.sleep(0.5)


@pytest.mark.parametrize("name", ["nested loops", "a doubled text"])
def test_a_command_says_so_in_one_line(name, model, tmp_path, capsys):
    (model / "chat_template.jinja").write_text(TEMPLATES[name])
    few = ("--prompt", "chat", "--data", "builtin", "--limit", "1", "--engine", "transformers")
    assert evaluate(["--model", str(model), "--output_dir", str(tmp_path / "scores"), *few]) == 1
    recipe = {k: v for k, v in TINY.items() if k not in ("model_config", "tokenizer_vocab_size")}
    settings = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "run"), "prompt_template": "chat"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **settings, "builtin_rows": 4}))
    assert train([str(tmp_path / "recipe.yaml")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("chat template" in line for line in errors)


# -------------------------------------------------------------------------------------------------------------- YAML

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGED = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: 1}}\n" for n in range(1, 12)
)
YAMLS = {
    "lists of aliases": BOMB,
    "mappings of aliases": BOMB.replace("[", "{y: [").replace("]", "]}"),
    "merged mappings": MERGED,
    "a key of aliases": BOMB + "? *a11\n: 1\n",
    "a value that holds itself": "a: &a [*a]",
    "two that hold each other": "a: &a {b: &b [*a, *b]}",
    "a number without end": "max_steps: " + "9" * 100_000,
    "a hexadecimal number": "max_steps: 0x" + "f" * 100_000,
    "a number to the base 60": "max_steps: 1" + ":59" * 100_000,
    "brackets": "a: " + "[" * 100_000,
    "megabytes": "a: 1\n" * 1_000_000,
    "a date that there is not": "output_dir: 2026-13-45",
    "a tag": "a: !!python/object/apply:os.system [id]",
    "another tag": "a: !!int [1]",
    "not YAML": "a: [1",
    "a byte": "a: \x00",
}


@pytest.fixture(params=YAMLS)
def text(request):
    return YAMLS[request.param]


def test_a_yaml_that_stands_for_too_much_is_an_error_of_yaml_soon(text):
    started = time.process_time()
    with contextlib.suppress(yaml.YAMLError):  # and no other error
        read_yaml(text)
    assert time.process_time() - started < 5


def test_a_recipe_of_that_kind_is_refused_soon_and_briefly(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(RecipeError) as error:
        load_recipe(str(tmp_path / "recipe.yaml"), [])
    assert time.process_time() - started < 5
    assert "recipe.yaml" in str(error.value)
    assert len(str(error.value)) < 2500


def test_a_stored_recipe_of_that_kind_is_refused_by_card_and_resumption(text, tmp_path, capsys):
    run = write_run(tmp_path)
    (run / "recipe.yaml").write_text(text)
    started = time.process_time()
    with contextlib.suppress(RecipeError):
        read_settings(run)
    assert time.process_time() - started < 5


def test_resuming_reads_a_stored_recipe_with_the_same_care(tmp_path, capsys):
    settings = {**TINY, "output_dir": str(tmp_path / "run"), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert train([str(tmp_path / "recipe.yaml"), "--builtin_rows", "8"]) == 0
    for file in (tmp_path / "run").glob("model*"):
        file.unlink()
    (tmp_path / "run" / "recipe.yaml").write_text(BOMB)
    started = time.process_time()
    assert train([str(tmp_path / "recipe.yaml"), "--builtin_rows", "8", "--resume_from_checkpoint", "true"]) == 2
    assert time.process_time() - started < 30
    assert "aliases" in capsys.readouterr().err


def test_aliases_that_save_writing_are_read():
    assert read_yaml("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}") == {
        "a": {"x": [1, 2]},
        "b": {"x": [1, 2]},
        "c": {"x": [1, 2], "y": 3},
    }
