"""What a run is given of its data: held-out rows read once for two uses, and a recipe that is left as it was."""

import copy
import itertools
import json

import datasets
import pytest

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import load_recipe
from matrix_llm.data.readers import Source
from matrix_llm.data.tokens import chat_prompt_ids
from matrix_llm.data.wordproblems import generate
from matrix_llm.run.prepare import HeldOutProblem, limit_max_length, prepare_data
from tests.support.chat_templates import with_template
from tests.support.tiny import TINY


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(key=value) loads the tiny recipe on 20 built-in rows, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**TINY, "builtin_rows": 20, "output_dir": str(tmp_path / "run"), **changes}))
        return load_recipe(path)

    return load


@pytest.fixture
def held_out(tmp_path):
    """A file of ten rows in which every third has no final answer."""
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}" if i % 3 else "No idea."} for i in range(10)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(recipe):
    return prepare_data(recipe, say=lambda _: None)


def decoded(prepared):
    return [prepared.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in prepared.held_out]


@pytest.mark.parametrize(("eval_rows", "accuracy_rows"), [(5, 8), (8, 5), (8, 0)])
def test_generated_problems_and_eval_rows_are_the_first_of_the_test_split(recipe, eval_rows, accuracy_rows):
    prepared = prepare(recipe(eval_dataset="builtin", builtin_eval_rows=eval_rows, accuracy_rows=accuracy_rows, seed=7))
    made = generate(8, seed=7, split="test")
    assert prepared.problems == [HeldOutProblem(each.query, each.answer) for each in made[:accuracy_rows]]
    assert decoded(prepared) == [f"Question: {each.query}\nAnswer: {each.response}" for each in made[:eval_rows]]


@pytest.mark.parametrize(("eval_rows", "accuracy_rows"), [(4, 8), (8, 4), (None, 8), (None, 99)])
def test_problems_of_a_file_are_those_of_the_first_rows_that_have_an_answer(recipe, held_out, eval_rows, accuracy_rows):
    limit = {} if eval_rows is None else {"max_eval_rows": eval_rows}
    prepared = prepare(recipe(eval_dataset=held_out, accuracy_rows=accuracy_rows, **limit))
    expected = [HeldOutProblem(f"{i} + 1?", str(i + 1)) for i in range(10) if i % 3 and i < accuracy_rows]
    assert prepared.problems == expected
    assert len(prepared.held_out) == (10 if eval_rows is None else eval_rows)
    assert prepared.held_out_report.rows_in == len(prepared.held_out)


def test_held_out_rows_are_read_once(recipe, held_out, monkeypatch):
    read, original = [], Source.read
    monkeypatch.setattr(Source, "read", lambda self, **options: read.append(self.name) or original(self, **options))
    prepared = prepare(recipe(eval_dataset=held_out, max_eval_rows=4, accuracy_rows=8))
    assert (len(prepared.held_out), len(prepared.problems)) == (4, 5)
    assert read == ["builtin", held_out]


def test_accuracy_on_builtin_problems_needs_no_eval_dataset(recipe):
    prepared = prepare(recipe(accuracy_rows=6))
    assert prepared.held_out is None
    assert prepared.held_out_report is None
    assert [problem.query for problem in prepared.problems] == [
        each.query for each in generate(6, seed=42, split="test")
    ]


def test_without_eval_dataset_and_accuracy_nothing_is_held_out(recipe):
    prepared = prepare(recipe())
    assert (prepared.held_out, prepared.held_out_report, prepared.problems) == (None, None, [])


@pytest.mark.parametrize("row", [{"query": "Why?", "response": "Because."}, {"text": "#### 7"}], ids=str)
def test_accuracy_rows_without_a_problem_are_refused(recipe, tmp_path, row):
    (tmp_path / "none.jsonl").write_text(json.dumps(row))
    with pytest.raises(RecipeError, match=r"accuracy_rows=3.*none\.jsonl.*final answer.*accuracy_rows: 0"):
        prepare(recipe(eval_dataset=str(tmp_path / "none.jsonl"), accuracy_rows=3))


def test_problems_have_a_number_as_their_answer(recipe, tmp_path):
    rows = [
        {"problem": "1 + 1?", "solution": r"It is $\boxed{2}$."},
        {"problem": "1 / 2?", "solution": r"It is $\boxed{\frac{1}{2}}$."},
        {"problem": "x?", "solution": r"It is $\boxed{x^2 + 3}$."},
        {"problem": "2 + 2?", "solution": r"\boxed{4}", "weight": 0},
        {"problem": "3 + 3?", "solution": r"\boxed{1,006.50}"},
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare(recipe(eval_dataset=str(tmp_path / "math.jsonl"), accuracy_rows=6)).problems
    assert found == [HeldOutProblem("1 + 1?", "2"), HeldOutProblem("3 + 3?", "1006.5")]
    with pytest.raises(RecipeError, match="accuracy_rows=6"):  # "keep": no sentence, so no final answer
        prepare(recipe(eval_dataset=str(tmp_path / "math.jsonl"), accuracy_rows=6, boxed_answers="keep"))


@pytest.mark.parametrize("streaming", [False, True])
def test_questions_in_the_chat_template_of_a_tokenizer(recipe, tmp_path, tiny_tokenizer, held_out, streaming):
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = with_template(tiny_tokenizer, template, "</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chosen = {"tokenizer_vocab_size": None, "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    settings = {"dataset": held_out, "prompt_template": "chat", **({"streaming": True} if streaming else {})}
    loaded = recipe(**chosen, **settings, max_steps=2)
    row = next(iter(prepare(loaded).train))
    prompt = chat_prompt_ids(tokenizer, "0 + 1?")
    ids = {tuple(each["input_ids"][: len(prompt)]) for each in itertools.islice(prepare(loaded).train, 10)}
    assert tuple(prompt) in ids
    assert "assistant:" not in tokenizer.decode([label for label in row["labels"] if label != -100])


def test_settings_that_say_nothing_about_the_rows_are_named(recipe, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Two is even."}))
    said = []
    prepare_data(recipe(dataset=str(tmp_path / "text.jsonl"), prompt_template="plain"), say=said.append)
    assert any("prompt_template='plain'" in line and "text" in line for line in said)
    prepare_data(recipe(dataset="builtin", prompt_template="plain"), say=(said := []).append)
    assert not any("prompt_template" in line for line in said)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("tokenizer_vocab_size", 300, "tokenizer_name_or_path"), ("response_separator", " ", "Remove response_separator")],
)
def test_prompt_template_chat_needs_a_chat_template_and_no_separator(recipe, tmp_path, key, value, named):
    chosen = {"tokenizer_vocab_size": None, "tokenizer_name_or_path": str(tmp_path), "prompt_template": "chat"}
    if key == "tokenizer_vocab_size":
        chosen = {"prompt_template": "chat"}
    with pytest.raises(RecipeError, match=rf"'chat'.*{key}|{key}.*'chat'") as error:
        recipe(**{**chosen, key: value})
    assert named in str(error.value)


def test_the_recipe_is_left_as_it_was(recipe):
    loaded = recipe(eval_dataset="builtin", builtin_eval_rows=3, accuracy_rows=3)
    before = copy.deepcopy((vars(loaded.data), vars(loaded.model), loaded.training.to_dict()))
    prepare(loaded)
    assert (vars(loaded.data), vars(loaded.model), loaded.training.to_dict()) == before


@pytest.mark.parametrize("key", ["packing", "shuffle_dataset"])
def test_trl_prepares_the_rows_only_where_it_packs_or_shuffles_them(recipe, key):
    assert prepare(recipe()).dataset_kwargs == {"skip_prepare_dataset": True}
    assert prepare(recipe(**{key: True})).dataset_kwargs is None


def test_the_rows_end_in_the_recipes_eos_token_and_it_is_trained_even_where_it_pads(recipe):
    """From a tokenizer that the cache already holds, with and without a chat template and an eos_token of its own."""
    assert prepare(recipe()).tokenizer.eos_token == "</s>"
    for changes, end in (({"eos_token": "<pad>", "pad_token": "<pad>"}, "<pad>"), ({}, "</s>")):
        prepared = prepare(recipe(**changes))
        assert prepared.tokenizer.eos_token == end
        for row in prepared.train:
            assert row["input_ids"][-1] == row["labels"][-1] == prepared.tokenizer.convert_tokens_to_ids(end)
        assert prepared.tokenizer.pad_token == "<pad>"


def test_a_chat_template_does_not_stay_in_the_cached_tokenizer(recipe, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert prepare(recipe(chat_template_path=str(tmp_path / "chat.jinja"))).tokenizer.chat_template
    assert prepare(recipe()).tokenizer.chat_template is None


def positions(count):
    return {"model_config": {**TINY["model_config"], "max_position_embeddings": count}}


def test_a_max_length_beyond_the_models_positions_is_refused_and_an_open_one_is_set(recipe, capsys):
    with pytest.raises(
        RecipeError, match=r"max_length=256, but the model has 100 positions.*at most 100.*model_config"
    ):
        limit_max_length(recipe(**positions(100)), say=print)
    for given in ({"max_length": None}, {"max_length": 100}):
        loaded = recipe(**positions(100), **given)
        limit_max_length(loaded, say=print)
        assert loaded.training.max_length == 100
        assert ("100, the number of positions of the model, instead of no limit" in capsys.readouterr().out) == (
            given["max_length"] is None
        )
    loaded = recipe(**positions(160), max_length=None)
    limit_max_length(loaded, say=print)
    prepared = prepare(loaded)
    assert prepared.report.rows_kept < prepared.report.rows_in == 20
    assert max(len(row["input_ids"]) for row in prepared.train) <= 160


def test_padding_stays_within_the_models_positions_too(recipe):
    with pytest.raises(RecipeError, match=r"pad_to_multiple_of=128, but the model has 100 positions.*Remove it"):
        limit_max_length(recipe(**positions(100), max_length=64, pad_to_multiple_of=128), say=print)
    with pytest.raises(RecipeError, match=r"max_length=97, but the model has 100 positions.*at most 96.*multiple"):
        limit_max_length(recipe(**positions(100), max_length=97, pad_to_multiple_of=16), say=print)
    loaded = recipe(**positions(100), max_length=None, pad_to_multiple_of=16)
    limit_max_length(loaded, say=print)
    assert loaded.training.max_length == 96


def test_rows_stay_within_the_teachers_positions_too(recipe, tmp_path, capsys):
    config = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 48}
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    taught = {"token_loss": "kd", "teacher_model_name_or_path": str(tmp_path / "teacher")}
    with pytest.raises(RecipeError, match=r"max_length=64, but teacher_model_name_or_path=.* 48 positions.*most 48\.$"):
        limit_max_length(recipe(**positions(100), max_length=64, **taught), say=print)
    loaded = recipe(**positions(100), max_length=None, **taught)
    limit_max_length(loaded, say=print)
    assert loaded.training.max_length == 48
    assert "48, the number of positions of teacher_model_name_or_path=" in capsys.readouterr().out
    loaded = recipe(**positions(40), max_length=None, **taught)
    limit_max_length(loaded, say=print)
    assert loaded.training.max_length == 40


@pytest.mark.parametrize("key", ["assistant_only_loss", "completion_only_loss"])
def test_texts_have_no_part_to_train_on_alone(recipe, tmp_path, key):
    rows = tmp_path / "texts.jsonl"
    rows.write_text('{"text": "Two is even."}\n')
    with pytest.raises(RecipeError, match=f"{key}=True, but the rows of .*texts.jsonl are texts.*Remove it"):
        prepare(recipe(dataset=str(rows), **{key: True}))


def test_the_default_max_length_gives_way_to_the_models_positions(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({k: v for k, v in {**TINY, **positions(512)}.items() if k != "max_length"}))
    loaded = load_recipe(path)
    limit_max_length(loaded, say=print)
    assert loaded.training.max_length == 512
    assert "instead of 1024" in capsys.readouterr().out


def test_answers_beyond_the_models_positions_are_refused_with_what_fits(recipe):
    with pytest.raises(
        RecipeError, match=r"accuracy_max_new_tokens=250 after a prompt of \d+ tokens.*256 positions.*most"
    ):
        prepare(recipe(**positions(256), accuracy_rows=4, accuracy_max_new_tokens=250))
    assert prepare(recipe(**positions(256), accuracy_rows=4, accuracy_max_new_tokens=20)).problems


SPOKEN = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_prompt_template_that_conversations_do_not_use_is_named_unless_it_is_chat(
    recipe, tmp_path, tiny_tokenizer, template
):
    with_template(tiny_tokenizer, SPOKEN, "</s>").save_pretrained(tmp_path / "chatml")
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    said = []
    given = {"dataset": str(tmp_path / "a.jsonl"), "tokenizer_name_or_path": str(tmp_path / "chatml")}
    prepare_data(recipe(**given, tokenizer_vocab_size=None, prompt_template=template), say=said.append)
    assert any("prompt_template='plain'" in line for line in said) == (template == "plain")
    assert not any("prompt_template='chat'" in line for line in said)


def test_fields_of_the_rows_that_are_not_read_are_named(recipe, tmp_path):
    row = {"question": "1 + 1?", "answer": "2", "source": "a", "level": None, "train": True, "system": "Be brief."}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    said = []
    prepare_data(recipe(dataset=str(tmp_path / "a.jsonl"), columns={"id": "system"}), say=said.append)
    (line,) = (line for line in said if "not read" in line)
    assert line.endswith("a.jsonl: fields that are not read: source")
