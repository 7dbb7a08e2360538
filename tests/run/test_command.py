"""The exit status of a training command, what it prints, and that no error hides another."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from matrix_llm import train
from matrix_llm.base.errors import CheckpointError, DataError, NonFiniteLossError, PushError, RecipeError
from matrix_llm.run.command import Command, run_command
from matrix_llm.run.run_folder import NON_FINITE
from matrix_llm.ssl import pretrain


@dataclass
class Recipe:
    training: TrainingArguments
    resolved: dict = field(default_factory=dict)


def run(tmp_path, *arguments, begin=True, raises=None, at="train", stopped=False, destination="user/x"):
    """The exit status of a command that raises an error in one of its parts, and the parts that it reached."""
    reached = []

    def part(name, result=None):
        def reach(*_, **__):
            reached.append(name)
            if raises is not None and at == name:
                raise raises
            return result

        return reach

    def fake_train(recipe, stop, given):
        if begin:
            stop.on_train_begin(recipe.training, TrainerState(), TrainerControl())
        stop.stopped = stopped
        part("train")()

    recipe = Recipe(TrainingArguments(str(tmp_path / "run"), use_cpu=True))
    command = Command(
        usage="usage: fake RECIPE.yaml",
        load_recipe=part("load", recipe),
        find_destination=part("find", destination),
        remove_push_settings=part("remove"),
        print_plan=part("plan"),
        train=fake_train,
        push=part("push", "https://hub/user/x"),
    )
    return run_command(command, list(arguments or ["recipe.yaml"])), reached


def test_a_finished_run_is_pushed_and_a_stopped_one_is_not(tmp_path, capsys):
    assert run(tmp_path) == (0, ["load", "find", "remove", "train", "push"])
    assert "=> https://hub/user/x" in capsys.readouterr().out
    assert run(tmp_path, stopped=True) == (0, ["load", "find", "remove", "train"])
    assert run(tmp_path, destination=None) == (0, ["load", "find", "remove", "train"])


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run"])
def test_a_dry_run_plans_without_the_token_and_stops(flag, tmp_path):
    assert run(tmp_path, "recipe.yaml", flag) == (0, ["load", "find", "remove", "plan"])
    assert not (tmp_path / "run").exists()


def test_help_is_printed_with_status_0_and_without_a_recipe_with_status_2(capsys):
    assert run_command(Command("usage: fake", *[None] * 6), ["--help"]) == 0
    assert run_command(Command("usage: fake", *[None] * 6), []) == 2
    assert capsys.readouterr().out == "usage: fake\n" * 2


@pytest.mark.parametrize(
    ("error", "at", "begin", "status"),
    [
        (RecipeError("mce_weight='a' is not a number."), "load", False, 2),
        (PushError("hub_token is rejected."), "find", False, 2),
        (DataError("rows.jsonl line 3 has no text."), "train", False, 2),
        (DataError("rows.jsonl line 3 has no text."), "train", True, 1),
        (CheckpointError("checkpoint-2 could not be written."), "train", True, 1),
        (NonFiniteLossError("The loss is nan at step 3."), "train", True, 1),
        (PushError("the Hub is down."), "push", True, 1),
    ],
)
def test_an_error_that_a_user_can_correct_is_one_line_with_status_2_before_training_and_1_after(
    error, at, begin, status, tmp_path, capsys
):
    assert run(tmp_path, raises=error, at=at, begin=begin)[0] == status
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("at", ["load", "find", "train", "push"])
@pytest.mark.parametrize(
    "bug", [RuntimeError("a bug"), ValueError("a bug"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")]
)
def test_any_other_error_passes_through_as_itself(bug, at, tmp_path, capsys):
    with pytest.raises(type(bug)) as caught:
        run(tmp_path, raises=bug, at=at)
    assert caught.value is bug
    assert caught.value.__context__ is None  # not raised while another was handled
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("module", "loader"), [(train, "load_recipe"), (pretrain, "load_ssl_recipe")])
def test_both_scripts_pass_an_unforeseen_error_of_their_loader_through(module, loader, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug in the loader")

    monkeypatch.setattr(module, loader, fail)
    with pytest.raises(RuntimeError, match="a bug in the loader"):
        module.main(["recipe.yaml"])


def test_ctrl_c_is_status_130_wherever_it_comes(tmp_path, capsys):
    for at in ("load", "train"):
        assert run(tmp_path, raises=KeyboardInterrupt(), at=at)[0] == 130
        assert capsys.readouterr().err.startswith("error: aborted")


def test_a_hub_token_in_an_error_is_not_printed(tmp_path, capsys):
    run(tmp_path, raises=RecipeError("hub_token=hf_abcdefghijklmnopqrstuvwxyz is rejected."), at="load")
    assert "hf_***" in capsys.readouterr().err


def test_a_run_that_diverges_leaves_a_note_and_a_full_disk_does_not_hide_the_error(tmp_path, capsys, monkeypatch):
    error = NonFiniteLossError("The loss is nan at step 3.")
    assert run(tmp_path, raises=error)[0] == 1
    assert (tmp_path / "run" / NON_FINITE).read_text() == f"{error}\n"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matrix_llm.run.command.write_text", full)
    assert run(tmp_path, raises=error)[0] == 1
    assert capsys.readouterr().err == f"error: {error}\n" * 2


@pytest.mark.parametrize(
    ("error", "begin", "printed"),
    [
        (RecipeError("max_steps=0."), False, False),  # all processes raise it, and the first prints it
        (NonFiniteLossError("The loss is nan."), True, False),
        (CheckpointError("checkpoint-2 could not be written."), True, True),  # this process alone
        (DataError("line 3 has no text."), True, True),
    ],
)
def test_an_error_of_all_processes_is_printed_once_and_that_of_one_process_by_itself(
    error, begin, printed, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    run(tmp_path, raises=error, begin=begin)
    assert (capsys.readouterr().err != "") == printed
    assert not (tmp_path / "run" / NON_FINITE).exists()
