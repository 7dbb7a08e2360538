"""What our vLLM engine costs compared with a bare `LLM.generate`: the same prompts in the same process, in turns.

    python benchmarks/engine_overhead.py --model runs/gsm8k_small --data gsm8k/test.jsonl \\
        [--problems 1000] [--repeats 4]

Ours delivers each text as soon as it is done, cuts it at stop strings and appends it to a file, as eval/gsm8k.py does;
the bare call returns them all at the end. The prefix cache is emptied before each turn; the first bare call is warm-up.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import statistics
import tempfile
import time

from eval.generate.generation import Decoding, Request, tokenize
from eval.generate.models import context_limit, load_tokenizer, locate
from eval.generate.prompts import PROMPTS
from eval.generate.run import ProgressBar, make_row
from eval.generate.run_files import RunFiles
from eval.generate.tasks import load_problems
from eval.generate.vllm_engine import VLLMEngine, VLLMOptions

STOP = ("\nQuestion:",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="GSM8K-style file")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--max_tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()

    import torch
    from vllm import SamplingParams

    # 1. The model and the requests: problems whose prompt and response fit the model's positions
    source = locate(options.model)
    tokenizer = load_tokenizer(source)
    limit = context_limit(source) or 4096
    problems = load_problems("gsm8k", data=options.data)
    prompt_ids = tokenize(
        tokenizer, [PROMPTS["plain"].build(problem.problem, tokenizer) for problem in problems], special_tokens=True
    )
    fitting = [(p, ids) for p, ids in zip(problems, prompt_ids, strict=True) if len(ids) + options.max_tokens <= limit][
        : options.problems
    ]
    requests = [Request(problem.id, 0, ids, options.max_tokens) for problem, ids in fitting]
    by_id = {problem.id: problem for problem, _ in fitting}
    gpu = torch.cuda.is_available()
    engine = VLLMEngine(VLLMOptions(source, "bfloat16" if gpu else "float32", limit, gpu=gpu), tokenizer)
    sampling = SamplingParams(temperature=0, max_tokens=options.max_tokens, stop=list(STOP))

    # 2. The two ways to generate, each returning its seconds and its tokens
    def bare() -> tuple[float, int]:
        start = time.perf_counter()
        outputs = engine.llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests], sampling
        )
        return time.perf_counter() - start, sum(len(output.outputs[0].token_ids) for output in outputs)

    def ours() -> tuple[float, int]:
        tokens = 0
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            with RunFiles(Path(folder), "x").appending() as file, ProgressBar(len(requests), 0) as bar:
                for generation in engine.generate(requests, Decoding(stop=STOP)):
                    tokens += generation.tokens
                    file.append(make_row(by_id[generation.id], generation, "0" * 64, 0))
                    bar.advance(generation.tokens)
            return time.perf_counter() - start, tokens

    # 3. Turns, after a warm-up
    bare()
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    tokens: dict[str, int] = {}
    for repeat in range(options.repeats):
        for name, run in (("bare", bare), ("ours", ours))[:: 1 if repeat % 2 == 0 else -1]:
            engine.llm.reset_prefix_cache()
            spent, tokens[name] = run()
            seconds[name].append(spent)
    for name, spent in seconds.items():
        times = ", ".join(f"{s:.2f}" for s in spent)
        print(f"{name}: {tokens[name]:,} tokens, seconds {times}, median {statistics.median(spent):.2f}")
    ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["bare"])
    print(f"overhead of ours: {100 * (ratio - 1):+.1f} % ({len(requests)} prompts, {'GPU' if gpu else 'CPU'})")


if __name__ == "__main__":
    main()
