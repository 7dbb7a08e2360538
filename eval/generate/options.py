"""The options of an evaluation run: what eval/gsm8k.py and eval/hendrycks_math.py take on their command line."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from matrix_llm.base.errors import EvalError
from matrix_llm.base.vllm_server import is_server, what_is_wrong

from .prompts import PROMPTS
from .tasks import BUILTIN

DTYPES = ("auto", "bfloat16", "float16", "float32")
ENGINES = ("auto", "vllm", "transformers")
SUBSETS = ("math500",)


@dataclass
class Options:
    """Each field is a flag of the same name."""

    model: str
    """Folder of a model or LoRA adapter, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    data: str | None = None
    """File with the problems, or a key of BUILTIN (GSM8K only); None: the test set on the Hub."""
    subset: str | None = None
    """One of SUBSETS, for MATH; None: all problems."""
    ids: str | None = None
    """File with a JSON list of the ids to take from `data`."""
    limit: int | None = None
    """How many problems, 1 or more; None: all."""
    shuffle_seed: int | None = None
    """Seed of the random choice that `limit` makes; None: the first problems."""
    prompt: str = "auto"
    """"auto" (what the model was trained with), a name of PROMPTS, or a text that holds {instruction} once."""
    max_tokens: int | None = None
    """Maximum length of a response, 1 or more; None: the prompt's published limit."""
    n: int = 1
    """Samples per problem, 1 or more; more than one needs a temperature."""
    temperature: float = 0.0
    """0 is greedy; else positive and finite."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this much probability; above 0, at most 1."""
    seed: int = 0
    """Seed of sampling."""
    trust_remote_code: bool = False
    """Whether to run the Python code that came with the model."""
    engine: str = "auto"
    """One of ENGINES, or the address of a vLLM server (http://...); "auto" is vLLM if it is installed."""
    dtype: str = "auto"
    """One of DTYPES; "auto" is bfloat16 on a GPU and float32 on a CPU, or what the server has."""
    tensor_parallel: int = 1
    """GPUs that one copy of the model is sharded over, 1 or more (vLLM)."""
    data_parallel: int = 1
    """Copies of the model that share the problems, 1 or more (vLLM)."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory to take; above 0, at most 1 (vLLM)."""
    batch_size: int = 32
    """Sequences at a time, 1 or more (transformers)."""
    output_dir: str | None = None
    """None: MODEL/eval for a folder, runs/eval/ORG--NAME for a Hub id."""
    overwrite: bool = False
    """Whether to discard earlier generations of this benchmark in the output directory."""

    def check(self) -> None:
        """Raises EvalError for a value that cannot work."""
        self._check_engine()
        for name in ("limit", "max_tokens", "n", "tensor_parallel", "data_parallel", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvalError(f"--{name} {value} must be 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            raise EvalError(f"--temperature {self.temperature} must be 0 (greedy) or a positive number.")
        for name in ("top_p", "gpu_memory_utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise EvalError(f"--{name} {getattr(self, name)} must be above 0 and at most 1.")
        if self.n > 1 and self.temperature == 0:
            raise EvalError(
                f"--n {self.n} at --temperature 0 would draw the same text {self.n} times. "
                "Give a temperature, such as 0.7."
            )
        if self.subset not in (None, *SUBSETS):
            raise EvalError(f"--subset {self.subset} is not known. Known: {', '.join(SUBSETS)}.")
        if self.ids and (self.data is None or self.data in BUILTIN):
            raise EvalError("--ids picks problems from a file, so it needs --data FILE.")

    def _check_engine(self) -> None:
        if not is_server(self.engine):
            if self.engine not in ENGINES:
                raise EvalError(f"--engine {self.engine} must be one of {', '.join(ENGINES)}, or http://HOST:PORT.")
            return
        if wrong := what_is_wrong(self.engine):
            raise EvalError(f"--engine {self.engine} {wrong}.")
        own = {"dtype": "auto", "tensor_parallel": 1, "data_parallel": 1, "gpu_memory_utilization": 0.9}
        for name, default in own.items():
            if getattr(self, name) != default:
                raise EvalError(
                    f"--{name} {getattr(self, name)} cannot be asked of the server {self.engine}. Start the server "
                    "with it, and leave it out here."
                )


def parse_options(benchmark: str, description: str, arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line; argparse prints its own errors and ends the process."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # the model
    add("--model", required=True, help="folder of a model or LoRA adapter, or a Hub id")
    add("--revision", help="branch, tag or commit of a Hub model")
    add("--trust_remote_code", action="store_true", help="run the Python code that came with the model")
    # the problems
    columns = "question, answer" if benchmark == "gsm8k" else "problem, solution or answer"
    generated = " Or 'builtin', generated word problems, or 'builtin_new_kinds', of kinds that no recipe trains on."
    builtin = generated if benchmark == "gsm8k" else ""
    add("--data", help=f".jsonl, .json or .parquet file with {columns}; default: the test set from the Hub.{builtin}")
    if benchmark == "math":
        add("--subset", choices=SUBSETS, help="MATH-500 instead of all 5,000")
        add("--ids", help="JSON list of the ids to take from --data")
    add("--limit", type=int, help="only so many problems")
    add("--shuffle_seed", type=int, help="which ones --limit takes: a random choice instead of the first")
    # the prompt and the decoding
    add("--prompt", help=f"auto (what the model was trained with), {', '.join(PROMPTS)}, or a text")
    add("--max_tokens", type=int, help="longest response; default: the prompt's published limit")
    add("--n", type=int, help="samples per problem, for pass@k and majority vote")
    add("--temperature", type=float, help="0 is greedy")
    add("--top_p", type=float, help="sample from the likeliest tokens that hold this much probability")
    add("--seed", type=int, help="of sampling")
    # the engine
    add("--engine", help="auto (vLLM if it is installed), vllm, transformers, or the address of a vLLM server")
    add("--dtype", choices=DTYPES, help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--tensor_parallel", type=int, help="GPUs a model is spread over (vLLM)")
    add("--data_parallel", type=int, help="copies of the model that share the problems (vLLM)")
    add("--gpu_memory_utilization", type=float, help="share of a GPU's memory (vLLM)")
    add("--batch_size", type=int, help="sequences at a time (transformers)")
    # the files
    add("--output_dir", help="default: MODEL/eval for a folder, runs/eval/ORG--NAME for a Hub id")
    add("--overwrite", action="store_true", help="throw away earlier generations of this benchmark there")
    fields = dataclasses.fields(Options)
    parser.set_defaults(**{field.name: field.default for field in fields if field.name != "model"})
    return Options(**vars(parser.parse_args(arguments)))
