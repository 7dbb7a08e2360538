"""A plain chat template; and tokenizers with those of published models, as TRL ships them, on a tiny vocabulary."""

import re
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from matrix_llm.data.tokens import IGNORED

PLAIN_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
FOLDER = Path(trl.__file__).parent / "chat_templates"
# What looks like a special token in a template, and which of them ends a text. DeepSeek's have a bar of full width.
BAR = "\uff5c"
SPECIAL = re.compile(
    rf"<\|[^|<>\s]+\|>|<{BAR}[^{BAR}<>]+{BAR}>|</?(?:think|tool_call)>|<\w+_of_\w+>|<\|\w+>|<\w+\|>|<sop>"
)
END_OF_SENTENCE = f"<{BAR}end▁of▁sentence{BAR}>"
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", END_OF_SENTENCE, "<|END_OF_TURN_TOKEN|>", "<|return|>", "<turn|>",
    "<|end|>", "<|eot|>", "<|user|>",
)  # fmt: skip


def with_template(tokenizer, template, eos=None):
    """A copy of the tokenizer with this template, which knows the special tokens in it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    tokens = sorted({*SPECIAL.findall(template), *([eos] if eos else [])})
    backend.add_tokens(
        [
            AddedToken(token, special=not re.fullmatch("</?(think|tool_call)>", token), normalized=False)
            for token in tokens
        ]
    )
    eos = eos or next((each for each in ENDS if each in template), "</s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, chat_template=template)


def published(tokenizer, name):
    """The template of this name, as its authors published it."""
    return with_template(tokenizer, (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def trained_texts(tokenizer, encoded):
    """The text of each run of trained tokens of the first row."""
    runs, is_open = [], False
    for label in encoded["labels"][0]:
        if label != IGNORED:
            runs = [*runs, []] if not is_open else runs
            runs[-1].append(label)
        is_open = label != IGNORED
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
