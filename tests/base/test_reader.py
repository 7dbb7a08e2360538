"""How a recipe file and `--key value` become settings, and what is refused, with line and way out."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from matrix_llm.base import reader
from matrix_llm.base.errors import RecipeError
from matrix_llm.base.reader import Settings, find_from_repository, find_recipe
from matrix_llm.base.values import setting
from tests.support.paths import ROOT


@dataclass
class Model:
    path: str | None = None
    model_config: dict | None = None
    targets: list[str] | str | None = None


@dataclass
class Training:
    learning_rate: float = setting(1e-3, above=0)
    mce_steps: int | None = setting(None, at_least=1)
    packing: bool = False
    run_name: str | None = None
    separator: str = " "
    strategy: str = setting("no", choices=["no", "steps"])


SETTINGS = Settings({"model": Model, "training": Training}, {"lr": "it is called learning_rate"})


@pytest.fixture
def file(tmp_path):
    """file(text or bytes) writes tiny.yaml."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# ------------------------------------------------------------------------------------------------------------- files


def test_a_file_gives_its_keys_and_the_command_line_wins(file):
    path = file("# a comment\nlearning_rate: 2e-5\nstrategy: no\npacking: true\n")
    assert SETTINGS.read(path) == {"learning_rate": 2e-5, "strategy": "no", "packing": True}  # YAML 1.1: 2e-5 is a text
    assert SETTINGS.read(path, ["--packing", "false", "--run_name", "7"]) == {
        "learning_rate": 2e-5, "strategy": "no", "packing": False, "run_name": "7",
    }  # fmt: skip


def test_each_part_gets_its_own_settings():
    assert SETTINGS.split({"packing": True, "path": "x"}) == {"model": {"path": "x"}, "training": {"packing": True}}


def test_a_date_is_a_text(file):
    assert SETTINGS.read(file("run_name: 2026-13-01\n")) == {"run_name": "2026-13-01"}


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        ("", "is empty.*`key: value`"),
        ("# only a comment\n", "is empty.*`key: value`"),
        ("- a\n- b\n", "holds a list.*`key: value`"),
        ("seven\n", "holds a text.*`key: value`"),
        ("run_name: [1, 2\nx: 3\n", "line 2: this is not YAML"),
        ("run_name: b: c\n", "line 1: this is not YAML"),
        ("packing: true\n\trun_name: x\n", "line 2: this is not YAML"),
        ("packing: true\n---\npacking: false\n", "line 2: this is not YAML.*another document"),
        ("packing: true\nrun_name: a\x07b\n", r"line 2: the character U\+0007.*Remove it"),
        ("packing: true\nrun_name: \0\n", r"line 2: the character U\+0000.*Remove it"),
        (b"packing: true\nrun_name: caf\xe9\n", "line 2: byte 0xe9 is not UTF-8.*Save the file as UTF-8"),
        ("packing: true\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8.*Save the file as UTF-8"),
        ("packing: true\n[a, b]: 1\n", "line 2: a list cannot be a key.*`key: value`"),
        ("packing: true\n? {a: 1}\n: 2\n", "line 2: a mapping cannot be a key.*`key: value`"),
        ("model_config:\n  a: 1\n  ? [b]\n  : 2\n", "line 3: a list cannot be a key"),
        ("packing: true\nrun_name: a\npacking: true\n", "line 3: 'packing' is given twice, first on line 1.*Keep one"),
        ("model_config: {a: 1, a: 2}\n", "line 1: 'a' is given twice"),
        ("model_config: &a {b: *a}\n", "holds itself.*without an alias"),
        pytest.param(f"fsdp: {'[' * 3000}{']' * 3000}\n", "nested too deeply", id="brackets"),
    ],
)
def test_a_file_that_is_not_one_flat_mapping_is_refused_in_one_line(file, content, refusal):
    with pytest.raises(RecipeError, match=rf"tiny\.yaml.*{refusal}") as error:
        SETTINGS.read(file(content))
    assert "\n" not in str(error.value)


def test_a_missing_recipe_names_the_recipes_in_its_folder(file, tmp_path):
    file("packing: true\n")
    with pytest.raises(RecipeError, match=rf"{tmp_path}/tni\.yaml.*tiny\.yaml.*Did you mean tiny\.yaml"):
        SETTINGS.read(tmp_path / "tni.yaml")
    with pytest.raises(RecipeError, match=rf"{tmp_path}/no/such\.yaml.*Give the path"):
        SETTINGS.read(tmp_path / "no" / "such.yaml")


def test_a_folder_is_refused_with_the_recipes_in_it(file, tmp_path):
    with pytest.raises(RecipeError, match=rf"{tmp_path} is a folder.*Give the path"):
        SETTINGS.read(tmp_path)
    file("packing: true\n")
    with pytest.raises(RecipeError, match=rf"{tmp_path} is a folder.*tiny\.yaml"):
        SETTINGS.read(tmp_path)


def test_a_file_that_may_not_be_read_is_refused(file, monkeypatch):
    path = file("packing: true\n")

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)  # chmod does not stop root, who runs CI containers
    with pytest.raises(RecipeError, match=r"tiny\.yaml.*Permission denied.*Give a readable"):
        SETTINGS.read(path)


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("key", "refusal"),
    [
        ("learning_rat", "'learning_rat' is not a setting.*Did you mean learning_rate"),
        ("lr", "'lr' is not a setting.*it is called learning_rate"),
        ("training", "'training' is not a setting.*one flat mapping"),
        ("loss", "'loss' is not a setting.*one flat mapping"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_the_right_one(file, key, refusal):
    with pytest.raises(RecipeError, match=rf"tiny\.yaml line 2: {refusal}"):
        SETTINGS.read(file(f"packing: true\n{key}: 1\n"))
    with pytest.raises(RecipeError, match=f"on the command line: {refusal}"):
        SETTINGS.read_overrides([f"--{key}", "1"])


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["--packing", "--run-name", "x"], {"packing": True, "run_name": "x"}),
        (["--packing", "false"], {"packing": False}),
        (["--separator="], {"separator": ""}),
        (["--run_name", "7"], {"run_name": "7"}),
        (["--mce_steps", "null"], {"mce_steps": None}),
        (["--mce_steps", "None"], {"mce_steps": None}),
        (["--mce_steps", "3", "--mce_steps", "4"], {"mce_steps": 4}),
        (["--targets", "q_proj,v_proj"], {"targets": ["q_proj", "v_proj"]}),
        (["--targets", "[q_proj]"], {"targets": ["q_proj"]}),
        (["--targets", r".*\.(q|v)_proj"], {"targets": r".*\.(q|v)_proj"}),
        (['--model_config={"a": 2}'], {"model_config": {"a": 2}}),
    ],
)
def test_words_of_the_command_line_become_values(words, settings):
    assert SETTINGS.read_overrides(words) == settings


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--mce_steps=3", "5"], "'5' belongs to no setting.*--key value"),
        (["--mce_steps", "--packing"], "--mce_steps has no value.*--mce_steps value"),
        (["--mce_steps"], "--mce_steps has no value"),
        (["--packing", "maybe"], "packing='maybe' .*true or false"),
        (["--model_config", "{a: [}"], "model_config=.*must be a mapping"),
    ],
)
def test_words_that_make_no_setting_are_refused(words, refusal):
    with pytest.raises(RecipeError, match=f"on the command line: {refusal}"):
        SETTINGS.read_overrides(words)


# ------------------------------------------------------------------------------------------------------------- paths


def test_a_relative_path_is_found_from_the_recipes_repository(tmp_path, monkeypatch):
    recipe = tmp_path / "recipes" / "r.yaml"
    for folder in ("recipes", "data", ".git", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_from_repository("data", recipe) == str(tmp_path / "data")
    assert find_from_repository("openai/gsm8k", recipe) == "openai/gsm8k"
    (tmp_path / "elsewhere" / "data").mkdir()
    assert find_from_repository("data", recipe) == "data"  # the current folder comes first


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "recipes/tiny.yaml", Path("./recipes/tiny.yaml")])
def test_a_shipped_recipe_is_found_by_its_name_and_said(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder is no recipe, and hides none
    assert find_recipe(name) == ROOT / "recipes" / "tiny.yaml"
    assert str(ROOT / "recipes" / "tiny.yaml") in capsys.readouterr().out
    (tmp_path / "recipes").mkdir()
    for own in (tmp_path / "tiny.yaml", tmp_path / "recipes/tiny.yaml"):
        own.write_text("dataset: builtin")
    assert name == "tiny" or find_recipe(name) == Path(name)  # one's own comes first
    assert find_recipe("digits", "recipes/ssl") == ROOT / "recipes" / "ssl" / "digits.yaml"


@pytest.mark.parametrize(
    "name", ["tinny", "tinny.yaml", "~no-such-user/tinny", "recipes/tinny.yaml", "nowhere/tinny.yaml"]
)
def test_a_recipe_of_no_name_is_refused_with_the_nearest_that_is_shipped(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"no recipe at .*tinny.* Did you mean tiny.*llemma7b"):
        find_recipe(name)


def test_a_file_of_ds_configs_is_found_among_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "mine.yaml"
    assert find_from_repository("ds_configs/zero3.json", own) == str(ROOT / "ds_configs" / "zero3.json")
    for absent in ("ds_configs/zero9.json", "eval", "docs", "zero3.json"):  # a data set may be called eval
        assert find_from_repository(absent, own) == absent
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text("{}")
    assert find_from_repository("ds_configs/zero3.json", own) == "ds_configs/zero3.json"


def test_a_repository_around_an_installed_package_is_not_the_recipes(tmp_path, monkeypatch):
    """A .venv lies inside its user's repository, which may have folders of the same names."""
    package = tmp_path / "repository" / ".venv" / "matrix_llm"
    for folder in (package / "recipes", package / "ds_configs", tmp_path / "repository" / "ds_configs", tmp_path / "x"):
        folder.mkdir(parents=True)
    (tmp_path / "repository" / "pyproject.toml").touch()
    for folder in (package, tmp_path / "repository"):
        (folder / "ds_configs" / "zero3.json").touch()
    monkeypatch.setattr(reader, "_PACKAGE", package)
    monkeypatch.setattr(reader, "SHIPPED", package)
    monkeypatch.chdir(tmp_path / "x")
    found = find_from_repository("ds_configs/zero3.json", package / "recipes" / "r.yaml")
    assert found == str(package / "ds_configs" / "zero3.json")
