"""A push sends the run's own files: whatever leads out of its folder is refused before the Hub is asked."""

import json
from pathlib import Path

import pytest

from matrix_llm.publish.client import HubClient
from matrix_llm.publish.command import main
from tests.support.finished_run import write_run


@pytest.fixture
def run(tmp_path, model):
    """A finished run whose files can all be sent."""
    run = write_run(tmp_path)
    for file in model.iterdir():
        file.rename(run / file.name)
    return run


@pytest.fixture(autouse=True)
def no_requests(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HubClient, "request", lambda *_, **__: pytest.fail("the Hub was asked"))


def move_out(run, name):
    """Move a file or folder of the run next to it."""
    outside = run.parent / "outside"
    outside.mkdir()
    (run / name).rename(outside / Path(name).name)
    return outside / Path(name).name


def absolute(run, name):
    (run / name).symlink_to(move_out(run, name))


def relative(run, name):
    move_out(run, name)
    (run / name).symlink_to(Path(*[".."] * len(Path(name).parts), "outside", Path(name).name))


def chain(run, name):
    """A link inside the run to a link that leads out."""
    (run / "inner").symlink_to(move_out(run, name))
    (run / name).symlink_to(run / "inner")


def through_a_folder(run, name):
    """A link to a file of a folder in the run that is itself a link."""
    target = move_out(run, name)
    (run / "folder").symlink_to(target.parent)
    (run / name).symlink_to(run / "folder" / target.name)


@pytest.mark.parametrize("link", [absolute, relative, chain, through_a_folder])
@pytest.mark.parametrize(
    "name",
    ["results.json", "metrics.jsonl", "recipe.yaml", "model.safetensors", "config.json", "tokenizer.json", "eval",
     "eval/gsm8k.json"],
)  # fmt: skip
def test_what_leads_out_of_the_run_is_not_sent(link, name, run, capsys):
    link(run, name)
    assert main(["push", str(run), "--repo", "user/x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "outside the run" in error
    assert Path(name).name in error


def test_a_card_that_is_kept_is_the_runs_own(run, capsys):
    (run / "README.md").write_text("# card")
    absolute(run, "README.md")
    assert main(["push", str(run), "--repo", "user/x", "--keep-card"]) == 2
    assert "outside the run" in capsys.readouterr().err


def test_a_folder_of_templates_is_the_runs_own(run, capsys):
    (run.parent / "templates").mkdir()
    (run.parent / "templates" / "secret.jinja").write_text("secret")
    (run / "additional_chat_templates").symlink_to(run.parent / "templates")
    assert main(["push", str(run), "--repo", "user/x"]) == 2
    assert "outside the run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "eval/../x.safetensors", 3, None, ["a"]])
def test_an_index_lists_files_of_the_run_only(name, run, capsys):
    (run / "model.safetensors").rename(run.parent / "outside.safetensors")
    (run / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert main(["push", str(run), "--repo", "user/x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.safetensors.index.json" in error


def test_a_link_that_leads_to_itself_is_one_line(run, capsys):
    (run / "results.json").unlink()
    (run / "results.json").symlink_to(run / "results.json")
    assert main(["push", str(run), "--repo", "user/x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "results.json" in error


def test_links_within_the_run_and_a_run_that_is_reached_by_a_link_are_fine(run, monkeypatch):
    (run / "results.json").rename(run / "the_results.json")
    (run / "results.json").symlink_to("the_results.json")
    (run.parent / "link").symlink_to(run)
    from matrix_llm.publish.checks import check_run

    _, files = check_run(run.parent / "link")
    assert {"results.json", "model.safetensors", "gsm8k.json"} <= {file.name for file in files}
