import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from matrix_llm.base.errors import DataError
from matrix_llm.data import readers as rows_module
from matrix_llm.data.readers import Source
from matrix_llm.data.tokens import build_dataset, gsm8k_response, load_rows, row_texts
from tests.conftest import SENTENCES

ROWS = [{"query": f"{i} + 1?", "response": f"The answer is: {i + 1}", "type": "x"} for i in range(5)]


def jsonl(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def refusal(source, **options) -> str:
    with pytest.raises(DataError) as error:
        load_rows(source, **options)
    return str(error.value)


def llama_style(kind: str) -> PreTrainedTokenizerFast:
    """The ways in which Llama tokenizers put a space in front of a text, on a vocabulary trained here."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# ------------------------------------------------------------------------------------------------------------ reading


def test_jsonl_json_parquet_and_a_folder_give_the_same_rows(tmp_path):
    expected = [{"query": row["query"], "response": row["response"]} for row in ROWS]
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder/train-0.jsonl", ROWS[:2])
    jsonl(tmp_path / "folder/train-1.jsonl", ROWS[2:])
    jsonl(tmp_path / "folder/test.jsonl", ROWS[:1])
    for source in (jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "a.json", tmp_path / "a.parquet", tmp_path / "folder"):
        assert load_rows(str(source)).to_list() == expected
    assert len(load_rows(str(tmp_path / "folder"), split="test")) == 1
    assert len(load_rows(str(tmp_path / "a.jsonl"), max_rows=3)) == 3


def test_a_folder_without_the_split_does_not_give_another(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    assert "files for train, but none for the split 'test'" in refusal(str(tmp_path), split="test")


def test_builtin_rows_differ_between_splits_and_repeat_with_the_seed():
    train, test = (
        load_rows("builtin", builtin_rows=20, seed=1),
        load_rows("builtin", builtin_rows=20, seed=1, split="test"),
    )
    assert train.column_names == ["query", "response", "type", "original_question", "answer"]
    assert train.to_list() == load_rows("builtin", builtin_rows=20, seed=1).to_list()
    assert not set(train["query"]) & set(test["query"])


@pytest.mark.parametrize(
    ("third", "said"),
    [
        ('{"query": "1", "response": ', "line 3: not JSON"),
        ("[1, 2]", "line 3: expected an object"),
        ({"query": "1 + 1?"}, "line 3: no `response`; the row has query"),
        ({"query": "1 + 1?", "response": None}, "line 3: `response` is null"),
        ({"query": "1 + 1?", "response": "  "}, "line 3: `response` is empty"),
        ({"query": "1 + 1?", "response": 2}, "line 3: `response` is int '2'"),
    ],
)
def test_a_bad_line_3_is_named_with_file_and_line(tmp_path, third, said):
    message = refusal(jsonl(tmp_path / "bad.jsonl", [*ROWS[:2], third, *ROWS[2:]]))
    assert f"bad.jsonl {said}" in message


def test_blank_lines_keep_the_line_numbers_true(tmp_path):
    assert "line 4: no `response`" in refusal(jsonl(tmp_path / "bad.jsonl", [ROWS[0], "", ROWS[1], {"query": "1"}]))


def test_first_row_without_a_known_form_names_what_is_missing(tmp_path):
    assert "line 1: the row has `query` but no `response`" in refusal(jsonl(tmp_path / "a.jsonl", [{"query": "1"}]))
    assert "has the fields problem, solution" in refusal(
        jsonl(tmp_path / "a.jsonl", [{"problem": "1", "solution": "2"}])
    )


def test_broken_files_are_named(tmp_path):
    (tmp_path / "bad.json").write_text('[{"query": "1",\n "response": }]')
    assert "bad.json line 2: not JSON" in refusal(str(tmp_path / "bad.json"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "bad.parquet: not a readable Parquet file" in refusal(str(tmp_path / "bad.parquet"))
    (tmp_path / "bad.jsonl").write_bytes(b'{"query": "\xff"}\n')
    assert "bad.jsonl line 1: not UTF-8" in refusal(str(tmp_path / "bad.jsonl"))
    pq.write_table(pa.Table.from_pylist([ROWS[0], {"query": "1", "response": None}]), tmp_path / "null.parquet")
    assert "null.parquet row 2: `response` is null" in refusal(str(tmp_path / "null.parquet"))


def test_empty_and_missing_data_are_refused(tmp_path):
    assert "holds no rows" in refusal(jsonl(tmp_path / "empty.jsonl", []))
    assert "nothing at" in refusal(str(tmp_path / "none.jsonl"))
    (tmp_path / "folder").mkdir()
    assert "holds no .jsonl, .json, .parquet file" in refusal(str(tmp_path / "folder"))
    (tmp_path / "rows.csv").write_text("a,b")
    assert "rows.csv: rows are read from" in refusal(str(tmp_path / "rows.csv"))


# ------------------------------------------------------------------------------------------------------------ texts


def test_gsm8k_answers_read_as_metamath_responses():
    answer = "48/2 = <<48/2=24>>24 clips.\nSo 48+24 = <<48+24=72>>72.\n#### 72"
    assert gsm8k_response(answer) == "48/2 = 24 clips.\nSo 48+24 = 72.\nThe answer is: 72"
    assert gsm8k_response("plain << text") == "plain << text"


def test_prompt_and_completion_are_used_verbatim():
    assert row_texts({"prompt": "a", "completion": "b"}, "plain") == ("a", "b")
    assert row_texts({"question": "a", "answer": "b"}, "{instruction}\n") == ("a\n", "b")


@pytest.mark.parametrize("kind", ["legacy", "first", "always", "never", "byte level"])
@pytest.mark.parametrize(("template", "between"), [("plain", " "), ("{instruction}\n", "")])
def test_exactly_one_space_between_prompt_and_response(kind, template, between, tiny_tokenizer):
    tokenizer = tiny_tokenizer if kind == "byte level" else llama_style(kind)
    question, answer = "How many pens does Mia have?", "12 + 30 = 42.\nThe answer is: 42"
    rows = datasets.Dataset.from_list([{"query": question, "response": answer}])
    row = build_dataset(rows, tokenizer, prompt_template=template)[0][0]
    prompt = template.replace("{instruction}", question) if template != "plain" else f"Question: {question}\nAnswer:"
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.removeprefix(" ") == prompt + between + answer
    masked = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert masked == tokenizer(prompt)["input_ids"]  # inference starts from the very ids of training
    assert row["input_ids"][len(masked) :] == row["labels"][len(masked) :]
    assert row["labels"].count(tokenizer.eos_token_id) == 1
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_a_tokenizer_that_appends_eos_does_not_end_the_row_twice(tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    appending = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    for rows in ([ROWS[0]], [{"text": "12 pens"}]):
        raw = datasets.Dataset.from_list(rows)
        assert build_dataset(raw, appending)[0].to_list() == build_dataset(raw, tiny_tokenizer)[0].to_list()


# ------------------------------------------------------------------------------------------------------------ tokens


def test_text_rows_train_on_every_token(tiny_tokenizer):
    dataset, report = build_dataset(datasets.Dataset.from_list([{"text": "12 pens"}]), tiny_tokenizer)
    assert dataset[0]["input_ids"] == [*tiny_tokenizer("12 pens")["input_ids"], 1]
    assert dataset[0]["labels"] == dataset[0]["input_ids"]
    assert report.trained_tokens == report.tokens - 1  # nothing predicts the first


def test_long_rows_are_dropped_cut_or_refused_and_counted(tiny_tokenizer):
    rows = datasets.Dataset.from_list(
        [
            {"prompt": "1", "completion": " 2"},
            {"prompt": "1", "completion": " 2" * 50},
            {"prompt": "1" * 50, "completion": " 2"},
            {"prompt": "3", "completion": " 4"},
        ]
    )
    dataset, report = build_dataset(rows, tiny_tokenizer, max_length=10)
    assert dataset["row_id"][:] == [0, 3]
    assert (report.rows_in, report.rows_kept, report.dropped_too_long, report.truncated) == (4, 2, 2, 0)
    assert report.longest > 50
    assert report.tokens == sum(map(len, dataset["input_ids"]))

    dataset, report = build_dataset(rows, tiny_tokenizer, max_length=10, too_long="truncate")
    assert dataset["row_id"][:] == [0, 1, 3]
    assert (report.truncated, report.dropped_all_masked, report.dropped_too_long) == (1, 1, 0)
    assert max(map(len, dataset["input_ids"])) == 10
    assert any("1 rows cut to max_length" in line for line in report.lines())

    with pytest.raises(DataError, match=r"row 2 is .* tokens long, over max_length=10, as are 2 rows in all"):
        build_dataset(rows, tiny_tokenizer, max_length=10, too_long="error")


def test_all_rows_too_long_names_the_longest(tiny_tokenizer):
    with pytest.raises(
        DataError, match=r"all 1 rows are longer than max_length.*the longest has 53 tokens, max_length=4"
    ):
        build_dataset(
            datasets.Dataset.from_list([{"prompt": "1" * 50, "completion": "2"}]), tiny_tokenizer, max_length=4
        )


MESSAGES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
CHAT = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
CHAT_MARKED = (
    CHAT + "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CHAT_UNMARKED = CHAT + "{{ m.content }}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}"


def with_chat(tokenizer, template):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


def test_messages_train_on_the_assistants_words_only(tiny_tokenizer):
    rows = datasets.Dataset.from_list([{"messages": MESSAGES}])
    tokenizer = with_chat(tiny_tokenizer, CHAT_MARKED)
    row = build_dataset(rows, tokenizer)[0][0]
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "2</s>"
    assert tokenizer.decode(row["input_ids"]).endswith("user:1 + 1?assistant:2</s>")


def test_messages_without_a_usable_chat_template_are_refused(tiny_tokenizer):
    rows = datasets.Dataset.from_list([{"messages": MESSAGES}])
    with pytest.raises(DataError, match="no chat template"):
        build_dataset(rows, tiny_tokenizer)
    with pytest.raises(DataError, match=r"\{% generation %\}"):
        build_dataset(rows, with_chat(tiny_tokenizer, CHAT_UNMARKED))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "must be a list"),
        ([{"role": "user"}], "message 1 has `content` = null"),
        (["hello"], "message 1 is str 'hello'"),
        ([{"role": "user", "content": "1"}], "no message has the role assistant"),
    ],
)
def test_malformed_messages_are_named(tmp_path, messages, said):
    assert said in refusal(jsonl(tmp_path / "m.jsonl", [{"messages": MESSAGES}, {"messages": messages}]))


def test_half_a_surrogate_pair_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a", "response": "b"}\n{"query": "\\ud83d", "response": "b"}\n')
    with pytest.raises(DataError, match=r"line 2: `query` holds half of a surrogate pair"):
        load_rows(str(path))


# ------------------------------------------------------------------------------------------------------------ separators


@pytest.mark.parametrize("kind", ["legacy", "first", "always", "never", "byte level"])
@pytest.mark.parametrize("separator", ["", " ", "\n", "\n\n"])
def test_the_response_separator_is_what_stands_between(kind, separator, tiny_tokenizer):
    tokenizer = tiny_tokenizer if kind == "byte level" else llama_style(kind)
    rows = datasets.Dataset.from_list([{"query": "1 + 1?", "response": "12 pens"}])
    row = build_dataset(rows, tokenizer, prompt_template="plain", response_separator=separator)[0][0]
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.removeprefix(" ") == f"Question: 1 + 1?\nAnswer:{separator}12 pens"
    masked = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert (
        masked == tokenizer("Question: 1 + 1?\nAnswer:")["input_ids"]
    )  # the prompt of inference, whatever the separator


# ------------------------------------------------------------------------------------------------------------ long files


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_whole_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(rows_module, "ARRAY_CHUNK", chunk)
    made = [{"query": f'say "{i}], [" \u00e9 {{', "response": "[1]"} for i in range(20)]
    (tmp_path / "a.json").write_text(" \n" + json.dumps(made, indent=indent) + "\n", encoding="utf-8-sig")
    assert load_rows(str(tmp_path / "a.json")).to_list() == made
    text = json.dumps(made, indent=1)
    (tmp_path / "b.json").write_text(text.replace('"response": "[1]"\n }\n]', '"response": \n }\n]'))
    assert f"b.json line {text.count(chr(10))}: not JSON" in refusal(str(tmp_path / "b.json"))


def test_memory_does_not_grow_with_a_json_array(tmp_path, monkeypatch):
    """MetaMathQA is one array of 400 MB, which as Python objects takes 2 GB."""
    monkeypatch.setattr(rows_module, "ARRAY_CHUNK", 1 << 14)
    peaks = []
    for count in (1000, 4000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps([{"query": f"{i}?", "response": "x" * 500} for i in range(count)]))
        tracemalloc.start()
        assert sum(1 for _ in Source(str(path)).read()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
