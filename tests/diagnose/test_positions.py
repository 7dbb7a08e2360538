"""The positions that are measured, drawn from the rows as they are trained."""

import pytest
import torch
from datasets import Dataset

from matrix_llm.base.errors import DataError, ModelError
from matrix_llm.diagnose.groups import by_cross_entropy, by_kind, kind_of, show_token
from matrix_llm.diagnose.positions import draw_positions
from tests.support.tiny import rows, tiny_model


def silent(line):
    pass


def test_hidden_states_and_labels_are_those_of_the_trained_positions():
    model, data = tiny_model().eval(), rows(n=5)
    found = draw_positions(model, data, 1000, seed=0, say=silent)
    wanted = []
    for row in data:
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
        wanted += [(states[i - 1], label) for i, label in enumerate(row["labels"]) if i and label != -100]
    assert found.trained == len(found.labels) == len(wanted)
    assert (found.rows, found.tokens) == (5, sum(map(len, data["input_ids"])))
    left = [label for _, label in wanted]
    for state, label in zip(found.hidden, found.labels.tolist(), strict=True):
        at = min(range(len(wanted)), key=lambda i: (wanted[i][0] - state).abs().max())
        torch.testing.assert_close(wanted[at][0], state)
        assert wanted[at][1] == label
        left.remove(label)
    assert left == []


def test_as_many_positions_as_asked_are_drawn_by_the_seed_from_32_rows():
    model, data = tiny_model(), rows(n=60)
    first, again, other = (draw_positions(model, data, 20, seed, silent) for seed in (0, 0, 1))
    assert len(first.labels) == 20
    assert first.rows == 32
    assert torch.equal(first.hidden, again.hidden)
    assert not torch.equal(first.labels, other.labels)


def test_a_stream_gives_its_first_rows():
    found = draw_positions(tiny_model(), rows(n=40).to_iterable_dataset(), 20, 0, silent)
    assert (len(found.labels), found.rows) == (20, 32)


def test_rows_without_a_trained_position_are_refused():
    data = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, -100], "row_id": 0}])  # the first is never predicted
    with pytest.raises(DataError, match="trained position"):
        draw_positions(tiny_model(), data, 20, 0, silent)


def test_a_label_that_is_no_token_is_refused():
    data = Dataset.from_list([{"input_ids": [3, 4], "labels": [-100, 96], "row_id": 0}])
    with pytest.raises(DataError, match="96"):
        draw_positions(tiny_model(), data, 20, 0, silent)


def test_hidden_states_that_are_not_finite_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="hidden states"):
        draw_positions(model, rows(), 20, 0, silent)


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" apples", "words"), ("é", "words"), ("x2", "words"), (" 12", "digits"), ("=2", "digits"), (" +", "operators"),
     ("<<", "operators"), ("\N{MULTIPLICATION SIGN}", "operators"), (".", "other"), ("\n\n", "other"), ("", "other"),
     ("$", "other")],
)  # fmt: skip
def test_a_token_is_of_the_first_kind_that_applies(text, kind):
    assert kind_of(text) == kind


def test_every_position_is_of_one_kind_and_in_one_range(tiny_tokenizer):
    labels = torch.tensor([1, 40, 41, 1, 99, 299])
    places = torch.cat(list(by_kind(labels, tiny_tokenizer).values()))
    assert sorted(places.tolist()) == list(range(6))
    assert by_kind(labels, tiny_tokenizer)["end"].tolist() == [0, 3]  # </s>
    found = by_cross_entropy(torch.tensor([0.0, 0.5, 1.9, 2.0, 5.0, 9.0], dtype=torch.float64))
    assert [at.tolist() for at in found.values()] == [[0], [1, 2], [3], [4, 5]]


def test_a_token_is_shown_so_that_nothing_can_hide(tiny_tokenizer):
    newline = tiny_tokenizer.encode("\n", add_special_tokens=False)[-1]
    assert show_token(tiny_tokenizer, newline) == r"'\n'"
    assert show_token(tiny_tokenizer, 300) == "<row 300>"
    parts = {show_token(tiny_tokenizer, i) for i in range(300)}
    assert len(parts) == 300  # bytes that are no character by themselves are told apart
