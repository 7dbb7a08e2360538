"""Prompt and answer, text and conversation become ids and labels; inference finds the very prompt ids of training."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.data.forms import Row
from matrix_llm.data.tokens import HAD_END, HAD_START, IGNORED, Encoder, row_texts
from tests.support.sentences import SENTENCES

MESSAGES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
CHAT = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
CHAT_MARKED = (
    CHAT + "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CHAT_UNMARKED = CHAT + "{{ m.content }}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}"


def encode(tokenizer, *rows, **options):
    """(ids, labels) of each row."""
    found = Encoder(tokenizer, rows[0].layout, **options).encode(rows, range(len(rows)))
    return list(zip(found["input_ids"], found["labels"], strict=True))


def with_chat(tokenizer, template):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


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


def text_of(tokenizer, ids):
    """The decoded ids. Llama tokenizers that put a space in front of a text decode with that space."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(" ")


# --- texts ------------------------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_used_verbatim():
    assert row_texts(Row("verbatim", "a", "b"), "plain") == ("a", "b")


def test_the_separator_stands_only_where_there_is_no_white_space():
    assert row_texts(Row(question="a", answer="b"), "Q {instruction}:", "\n") == ("Q a:", "\nb")
    assert row_texts(Row(question="a", answer="b"), "{instruction}\n", " ") == ("a\n", "b")
    assert row_texts(Row(question="a", answer=" b"), "Q {instruction}:", "\n") == ("Q a:", " b")


def test_messages_have_no_text_to_train_a_tokenizer_on():
    with pytest.raises(DataError, match=r"messages.*tokenizer_vocab_size.*tokenizer_name_or_path"):
        row_texts(Row("chat", messages=MESSAGES))


# --- prompt and answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["legacy", "first", "always", "never", "byte level"])
@pytest.mark.parametrize(
    ("template", "separator", "between"),
    [
        ("plain", " ", " "),
        ("plain", "", ""),
        ("plain", "\n", "\n"),
        ("plain", "\n\n", "\n\n"),
        ("{instruction}\n", " ", ""),
    ],
)
def test_ids_decode_to_prompt_separator_and_answer(kind, template, separator, between, tiny_tokenizer):
    tokenizer = tiny_tokenizer if kind == "byte level" else llama_style(kind)
    question, answer = "How many pens does Mia have?", "12 + 30 = 42.\nThe answer is: 42"
    row = Row(question=question, answer=answer)
    ((ids, labels),) = encode(tokenizer, row, prompt_template=template, response_separator=separator)
    prompt = f"Question: {question}\nAnswer:" if template == "plain" else f"{question}\n"
    assert text_of(tokenizer, ids) == prompt + between + answer

    masked = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    assert masked == tokenizer(prompt)["input_ids"]  # inference starts from the very ids of training
    assert ids[len(masked) :] == labels[len(masked) :]
    assert labels.count(tokenizer.eos_token_id) == 1
    assert labels[-1] == tokenizer.eos_token_id


def test_a_tokenizer_that_appends_eos_does_not_end_the_row_twice(tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    appending = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    for row in (Row(question="1 + 1?", answer="2"), Row("text", answer="12 pens")):
        assert encode(appending, row) == encode(tiny_tokenizer, row)


def test_a_row_does_not_depend_on_the_others_of_its_batch(tiny_tokenizer):
    rows = [Row("verbatim", "a", text) for text in ("b", " b", "  b", "\nb", " 2 + 2")]
    for tokenizer in (tiny_tokenizer, llama_style("legacy")):
        assert encode(tokenizer, *rows) == [encode(tokenizer, row)[0] for row in rows]


# --- texts and conversations ------------------------------------------------------------------------------------------


def test_text_rows_train_on_every_token(tiny_tokenizer):
    ((ids, labels),) = encode(tiny_tokenizer, Row("text", answer="12 pens"))
    assert ids == labels == [*tiny_tokenizer("12 pens")["input_ids"], tiny_tokenizer.eos_token_id]
    found = Encoder(tiny_tokenizer, "text").encode([Row("text", answer="12 pens")], [0])
    assert found["trained"] == [len(ids) - 1]  # nothing predicts the first


def test_messages_train_on_the_assistants_words_only(tiny_tokenizer):
    tokenizer = with_chat(tiny_tokenizer, CHAT_MARKED)
    ((ids, labels),) = encode(tokenizer, Row("chat", messages=MESSAGES))
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "2</s>"
    assert tokenizer.decode(ids).endswith("user:1 + 1?assistant:2</s>")


def test_messages_without_a_usable_chat_template_are_refused(tiny_tokenizer):
    with pytest.raises(DataError, match=r"no chat template.*chat_template_path"):
        Encoder(tiny_tokenizer, "chat")
    with pytest.raises(DataError, match=r"\{% generation %\}.*chat_template_path"):
        Encoder(with_chat(tiny_tokenizer, CHAT_UNMARKED), "chat")


def test_messages_that_the_chat_template_refuses_are_named_by_their_row(tiny_tokenizer):
    refusing = with_chat(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}" + CHAT_MARKED)
    with pytest.raises(DataError, match=r"row 8.*roles must alternate.*Correct the row"):
        Encoder(refusing, "chat").encode([Row("chat", messages=MESSAGES)], [7])


# --- written once, though twice asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "same", "notes"),
    [
        (Row("text", answer="<s>12 pens</s>\n"), Row("text", answer="12 pens"), HAD_START | HAD_END),
        (Row("text", answer="\n <s><s>12 pens"), Row("text", answer="12 pens"), HAD_START),
        (Row("text", answer="12 pens</s> </s>"), Row("text", answer="12 pens"), HAD_END),
        (Row("verbatim", "<s>1 + 1 =", " 2</s>\n"), Row("verbatim", "1 + 1 =", " 2"), HAD_START | HAD_END),
        (Row("template", "1 <s> 1", "2 </s> 2"), Row("template", "1 <s> 1", "2 </s> 2"), 0),
    ],
    ids=str,
)
def test_a_start_or_an_end_that_the_text_has_already_is_kept_once(tiny_tokenizer, given, same, notes):
    found = Encoder(tiny_tokenizer, given.layout).encode([given], [0])
    expected = Encoder(tiny_tokenizer, given.layout).encode([same], [0])
    assert found == expected | {"notes": [notes]}
    if notes:
        assert (found["input_ids"][0].count(0), found["input_ids"][0].count(1)) == (1, 1)


def test_a_start_that_the_tokenizer_does_not_write_stays(tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ((ids, _),) = encode(silent, Row("text", answer="<s>12 pens"))
    assert ids == encode(tiny_tokenizer, Row("text", answer="12 pens"))[0][0]


# --- all rows ---------------------------------------------------------------------------------------------------------


def test_a_row_over_max_length_is_cut_or_emptied_and_its_whole_length_is_kept(tiny_tokenizer):
    row = Row("verbatim", "1", " 2" * 50)
    ((whole, _),) = encode(tiny_tokenizer, row)
    for too_long, kept in (("truncate", 10), ("drop", 0)):
        found = Encoder(tiny_tokenizer, "verbatim", max_length=10, too_long=too_long).encode([row], [0])
        assert found["input_ids"] == [whole[:kept]]
        assert found["length"] == [len(whole)]
        assert found["trained"] == [max(kept - 2, 0)]  # all but <s> and the prompt's one token
    ((exact, _),) = encode(tiny_tokenizer, row, max_length=len(whole))
    assert exact == whole


def test_the_prompt_is_trained_as_well_where_that_is_asked_for(tiny_tokenizer):
    for row in (Row(question="1 + 1?", answer="2"), Row("verbatim", "1 + 1 =", " 2")):
        ((ids, labels),) = encode(tiny_tokenizer, row, train_prompt=True)
        assert ids == labels == encode(tiny_tokenizer, row)[0][0]
    with pytest.raises(DataError, match=r"completion_only_loss=False.*Remove completion_only_loss"):
        Encoder(with_chat(tiny_tokenizer, CHAT_MARKED), "chat", train_prompt=True)


def test_rows_of_several_layouts_are_each_encoded_in_their_own(tiny_tokenizer):
    tokenizer = with_chat(tiny_tokenizer, CHAT_MARKED)
    rows = [Row("text", answer="12 pens"), Row("chat", messages=MESSAGES), Row(question="1", answer="2")]
    assert encode(tokenizer, *rows) == [encode(tokenizer, row)[0] for row in rows]


def test_an_unknown_way_with_long_rows_and_a_tokenizer_without_an_end_are_refused(tiny_tokenizer):
    with pytest.raises(RecipeError, match=r"too_long='cut'.*drop, truncate, error"):
        Encoder(tiny_tokenizer, too_long="cut")
    with pytest.raises(RecipeError, match=r"train_on='first'.*all, last"):
        Encoder(tiny_tokenizer, train_on="first")
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    with pytest.raises(DataError, match=r"no end-of-text token.*eos_token"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
