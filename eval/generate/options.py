"""The options of an evaluation run: what eval/score.py, eval/gsm8k.py and eval/hendrycks_math.py take on their command
line.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from matrix_llm.base.errors import EvalError
from matrix_llm.base.vllm_server import is_server, what_is_wrong

from ..files import FORMATS
from .prompts import PROMPTS
from .tasks import BUILTIN, GREEDY, SUBSETS, TASKS, Task

DTYPES = ("auto", "bfloat16", "float16", "float32")
ENGINES = ("auto", "vllm", "transformers")


@dataclass
class Options:
    """Each field is a flag of the same name."""

    model: str
    """Folder of a model or LoRA adapter, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    task: str | None = None
    """A key of TASKS; None: the command's own."""
    data: str | None = None
    """File with the problems, a data set on the Hub, or a key of BUILTIN (GSM8K only); None: the task's own, on the
    Hub."""
    subset: str | None = None
    """One of SUBSETS, for the task math; None: all problems."""
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
    n: int | None = None
    """Samples per problem, 1 or more; more than one needs a temperature. None: the task's; 1 at temperature 0."""
    temperature: float | None = None
    """0 is greedy; else positive and finite. None: the task's."""
    top_p: float | None = None
    """Sample from the likeliest tokens that hold this much probability; above 0, at most 1. None: the task's."""
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

    def for_task(self, task: Task) -> "Options":
        """These options with the task's sampling where none was asked for. An explicit temperature of 0 asks for
        greedy texts, of which there is one.
        """
        default = GREEDY if self.temperature == 0 else task.sampling
        given = {name: getattr(self, name) for name in ("n", "temperature", "top_p")}
        chosen = {name: getattr(default, name) if value is None else value for name, value in given.items()}
        return dataclasses.replace(self, **chosen)

    def check(self) -> None:
        """Raises EvalError for a value that cannot work. After `for_task`."""
        self._check_engine()
        for name in ("limit", "max_tokens", "n", "tensor_parallel", "data_parallel", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvalError(f"--{name} {value} must be 1 or more.")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise EvalError(f"--temperature {self.temperature} must be 0 (greedy) or a positive number.")
        for name in ("top_p", "gpu_memory_utilization"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise EvalError(f"--{name} {value} must be above 0 and at most 1.")
        if self.n is not None and self.n > 1 and self.temperature == 0:
            raise EvalError(
                f"--n {self.n} at --temperature 0 would draw the same text {self.n} times. "
                "Give a temperature, such as 0.7."
            )
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


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of each option, except where it is None and the help says in words what happens then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_options(task: str | None, description: str, arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line; argparse prints its own errors and ends the process.

    Args:
        task: the command's own, which --task replaces; None: --task must be given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpWithDefaults, allow_abbrev=False)
    add = parser.add_argument
    # the model
    add("--model", required=True, help="folder of a model or LoRA adapter, or a Hub id")
    add("--revision", help="branch, tag or commit of a Hub model; default: its main branch")
    add("--trust_remote_code", action="store_true", help="run the Python code that came with the model")
    # the problems
    add("--task", choices=TASKS, required=task is None, metavar="NAME", help=f"one of {', '.join(TASKS)}")
    add(
        "--data",
        help=f"{FORMATS} file with the task's columns, or ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG:SPLIT on the "
        "Hub; default: the task's own, from the Hub. For gsm8k also 'builtin', generated word problems, or "
        "'builtin_new_kinds', of kinds that no recipe trains on",
    )
    add("--subset", choices=SUBSETS, help="MATH-500 instead of all 5,000 of the task math")
    add("--ids", help="JSON list of the ids to take from --data")
    add("--limit", type=int, help="only so many problems; default: all")
    add("--shuffle_seed", type=int, help="which ones --limit takes: a random choice instead of the first (default)")
    # the prompt and the decoding
    add("--prompt", help=f"auto (what the model was trained with), {', '.join(PROMPTS)}, or a text")
    add("--max_tokens", type=int, help="longest response; default: the prompt's published limit")
    add("--n", type=int, help="samples per problem, for pass@k and majority vote; default: 1, or the task's")
    add("--temperature", type=float, help="0 is greedy; default: 0, or the task's")
    add(
        "--top_p",
        type=float,
        help="sample from the likeliest tokens that hold this much probability; default: 1, or the task's",
    )
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
    parser.set_defaults(**{field.name: field.default for field in fields if field.name != "model"} | {"task": task})
    return Options(**vars(parser.parse_args(arguments)))
