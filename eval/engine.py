"""Text from a model, by vLLM or by transformers, through one interface; the only file that imports vLLM.

1. A request is a prompt's token ids and a sample number. Both engines are given the same ids, so tokenisation cannot differ.
2. `engine.generate(requests, decoding)` yields each Generation as it finishes, so that the caller can save it at once.
3. Both engines only deliver token ids; `finish` turns them into text, cuts at the first stop string and names why it ended.
4. Sampling draws from a generator seeded by (seed, problem, sample): a sample does not depend on what it is batched with.

Shapes: B batch, T longest prompt of the batch, L longest continuation, V vocabulary.
"""

import contextlib
import importlib
import multiprocessing
import os
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eval.generation import Decoding, Generation, Key, Request, finish, first_stop, response_text
from eval.models import Source, first_line, load_tokenizer, lora_rank
from matrix_llm.base.errors import EvalError

# ------------------------------------------------------------------------------------------------------------ transformers

# Settings that a model's generation_config.json may hold and that would change what is drawn. `generate` fills only what is left None.
NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}


class TransformersEngine:
    """transformers' `generate` on batches of like length, padded on the left with an attention mask. Runs anywhere; vLLM is faster.

    Takes a model and tokenizer that are already loaded, for instance in the middle of training: neither is changed.
    """

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def load(cls, source: Source, *, dtype: str, batch_size: int = 32) -> "TransformersEngine":
        import torch
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.base, revision=source.base_commit, dtype=getattr(torch, dtype)
            )
            if source.adapter:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, source.adapter)  # type: ignore[assignment]
            model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        except Exception as error:
            raise EvalError(
                f"--model {source.model} cannot be loaded: {type(error).__name__}: {first_line(error)}."
            ) from None
        model.eval()
        return cls(model, load_tokenizer(source), batch_size=batch_size)

    def close(self) -> None:
        """Nothing: the model may be the caller's."""

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()
    ) -> Iterator[Generation]:
        """Yields batch by batch, longest prompts first: running out of memory then shows at once.

        Requests in `skip` keep their place in a batch, and a batch is left out when all of it is skipped. So a run that goes on after
        a crash forms the same batches, and gives the same text also where rounding depends on the batch.
        """
        order = sorted(requests, key=lambda request: -len(request.prompt_ids))  # stable: ties stay in the order given
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if any(request.key not in skip for request in batch):
                for generation in self._batch(batch, decoding):
                    if (generation.id, generation.sample) not in skip:
                        yield generation

    def _batch(self, batch: list[Request], decoding: Decoding) -> list[Generation]:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        stops = self._end_tokens
        pad = next(
            token for token in (self.tokenizer.pad_token_id, *stops, 0) if token is not None
        )  # masked: any token will do
        length = max(len(request.prompt_ids) for request in batch)
        padding = [length - len(request.prompt_ids) for request in batch]
        rows = [[pad] * n + list(request.prompt_ids) for request, n in zip(batch, padding, strict=True)]
        device = next(self.model.parameters()).device
        input_ids = torch.tensor(rows, device=device)  # (B, T)
        attention_mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding], device=device)  # (B, T)
        limit = max(request.max_tokens for request in batch)
        settings = GenerationConfig(
            **NEUTRAL, max_new_tokens=limit, use_cache=True, pad_token_id=pad, eos_token_id=list(stops) or None
        )
        criteria = StoppingCriteriaList([self._stopping(batch, decoding, length)] if decoding.stop else [])
        sampler = (
            [_sampler([decoding.seed_of(request) for request in batch], decoding)] if decoding.temperature > 0 else []
        )
        with (
            _evaluation_mode(self.model),
            torch.no_grad(),
        ):  # no inference_mode: its tensors could stay in a rotary cache
            try:
                output = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=settings,
                    stopping_criteria=criteria,
                    logits_processor=sampler,
                )
            except torch.OutOfMemoryError:
                raise EvalError(
                    f"the GPU ran out of memory with --batch_size {len(batch)}, {length} prompt tokens and up to {limit} new ones. "
                    "What is done is kept: run the same command with a smaller --batch_size."
                ) from None
        generations = []
        for request, new_ids in zip(batch, output[:, length:].tolist(), strict=True):  # (B, L)
            new_ids = new_ids[: request.max_tokens]
            end = next((place for place, token in enumerate(new_ids) if token in stops), None)
            kept = new_ids if end is None else new_ids[: end + 1]
            generations.append(finish(self.tokenizer, request, kept, decoding, ended=end is not None))
        return generations

    @cached_property
    def _end_tokens(self) -> tuple[int, ...]:
        """The tokenizer's end-of-text token, and those of the model's generation config (chat models have several)."""
        extra = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        tokens = [self.tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])]
        return tuple(sorted({token for token in tokens if token is not None}))

    def _stopping(self, batch: list[Request], decoding: Decoding, length: int) -> Any:
        """Ends a row once its text holds a stop string, so that a batch does not run on to the limit. The cut itself is `finish`'s."""
        import torch

        done = [False] * len(batch)
        window = (
            max(map(len, decoding.stop)) + 4
        )  # tokens; each holds a byte at least, and the last ones may be half a letter

        def criterion(input_ids, scores, **kwargs):  # (B, T + L), -
            new = input_ids[:, max(length, input_ids.shape[1] - window) :].tolist()
            for row, ids in enumerate(new):
                done[row] = (
                    done[row]
                    or first_stop(response_text(self.tokenizer, batch[row].prompt_ids, ids), decoding.stop) is not None
                )
            return torch.tensor(done, device=input_ids.device)

        return criterion


def _sampler(seeds: list[int], decoding: Decoding) -> Any:
    """A logits processor that draws each row's token with a generator of its own, then leaves only that token.

    Inverse transform: the first token where the cumulative probability passes u, for one uniform u a row and step.
    """
    import torch

    generators = [random.Random(seed) for seed in seeds]

    def process(input_ids, scores):  # (B, T + L), (B, V)
        probabilities = torch.softmax(scores.double() / decoding.temperature, dim=-1)
        sorted_probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = sorted_probabilities.cumsum(dim=-1)
        if decoding.top_p < 1:  # the smallest set of likeliest tokens that holds top_p
            kept = cumulative - sorted_probabilities < decoding.top_p
            cumulative = (sorted_probabilities * kept).cumsum(dim=-1)
        uniform = torch.tensor(
            [[generator.random()] for generator in generators], dtype=torch.double, device=scores.device
        )
        place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, place), 0.0)

    return process


@contextlib.contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Every module in eval mode inside, and as it was after, also when the caller had mixed them."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True  # not .train(): that would switch the children too


# ------------------------------------------------------------------------------------------------------------ vLLM


@dataclass(frozen=True)
class VLLMOptions:
    """What one vLLM process is started with."""

    source: Source
    dtype: str
    max_model_len: int
    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.9
    gpu: bool = True


class VLLMEngine:
    """vLLM in this process: all requests at once, so that its continuous batching is never short of work."""

    name = "vllm"

    def __init__(self, options: VLLMOptions, tokenizer: Any = None):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if not options.gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is a large part of all memory
        source = options.source
        self.tokenizer = tokenizer or load_tokenizer(source)
        lora: dict[str, Any] = {}
        self.lora_request = None
        before = set(multiprocessing.active_children())
        try:
            from vllm import LLM

            if source.adapter:
                from vllm.lora.request import LoRARequest

                self.lora_request = LoRARequest("adapter", 1, source.adapter)
                lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(source)}
            self.llm = LLM(
                model=source.base,
                revision=source.base_commit,
                tokenizer=source.tokenizer[0],
                tokenizer_revision=source.tokenizer[1],
                dtype=options.dtype,  # type: ignore[arg-type]
                max_model_len=options.max_model_len,
                tensor_parallel_size=options.tensor_parallel,
                gpu_memory_utilization=options.gpu_memory_utilization,
                enable_prefix_caching=True,
                enforce_eager=not options.gpu,
                seed=0,  # sampling takes each request's own
                **lora,
            )
        except EvalError:
            raise
        except Exception as error:
            raise EvalError(
                f"vLLM cannot start with --model {source.model}: {type(error).__name__}: {first_line(error)}. Use --engine transformers."
            ) from None

        self.watcher = _watcher([child.pid for child in multiprocessing.active_children() if child not in before])

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()
    ) -> Iterator[Generation]:
        """Yields in the order of finishing."""
        from vllm import SamplingParams

        todo = [request for request in requests if request.key not in skip]
        if not todo:
            return
        sampling = [
            SamplingParams(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seed=decoding.seed_of(request) if decoding.temperature > 0 else None,
                max_tokens=request.max_tokens,
                stop=list(decoding.stop),
                detokenize=bool(
                    decoding.stop
                ),  # the text is made by `finish`; vLLM's own is needed to see a stop string
            )
            for request in todo
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in todo]
        # LLM.generate is enqueue, then this loop, then all results at once. Here each result leaves when it is done.
        names = self.llm.enqueue(prompts, sampling, lora_request=self.lora_request, use_tqdm=False)  # type: ignore[arg-type]
        first = int(names[0].split("-")[0])  # requests are numbered in the order they are added
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    result, request = output.outputs[0], todo[int(output.request_id) - first]  # type: ignore[index]
                    yield finish(
                        self.tokenizer, request, result.token_ids, decoding, ended=result.finish_reason == "stop"
                    )

    def close(self) -> None:
        """Ends vLLM's own processes and frees their memory. A spawned process that does not call this never ends."""
        self.llm.llm_engine.engine_core.shutdown()
        self.watcher.kill()
        self.watcher.communicate()


WATCH = """
import contextlib, os, signal, sys
sys.stdin.read()
for pid in sys.argv[1:]:
    with contextlib.suppress(OSError):
        os.kill(int(pid), signal.SIGKILL)
"""


def _watcher(pids: Sequence[int | None]) -> subprocess.Popen:
    """A process that ends vLLM's engine when this one is gone: after a kill it would keep the GPU for ever.

    It waits for the end of its standard input, which the system closes however this process ends. The engine's workers follow the engine.
    """
    command = [sys.executable, "-I", "-c", WATCH, *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


class DataParallelVLLM:
    """Several vLLM processes, each with GPUs of its own and every n-th problem. No Ray: a spawned process and one queue."""

    name = "vllm"

    def __init__(self, options: VLLMOptions, processes: int):
        self.options, self.processes = options, processes
        self.devices = _share_devices(options, processes)

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()
    ) -> Iterator[Generation]:
        todo = [request for request in requests if request.key not in skip]
        ids: dict[str, int] = {}
        for request in todo:
            ids.setdefault(
                request.id, len(ids)
            )  # all samples of a problem in one process: they share the prompt's cache
        shares = [
            [request for request in todo if ids[request.id] % self.processes == rank] for rank in range(self.processes)
        ]
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        workers = [
            context.Process(target=_work, args=(self.options, environment, share, decoding, results), daemon=False)
            for environment, share in zip(self.devices, shares, strict=True)
            if share
        ]
        for worker in workers:
            worker.start()
        running = len(workers)
        try:
            while running:
                try:
                    result = results.get(timeout=1)
                except queue.Empty:
                    dead = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
                    if dead:
                        raise EvalError(
                            f"one of {len(workers)} vLLM processes ended with exit code {dead[0]}. What is done is kept: run again."
                        ) from None
                    continue
                if isinstance(result, Generation):
                    yield result
                elif result is None:
                    running -= 1
                else:
                    raise EvalError(result)
        finally:
            for worker in workers:
                if running:
                    worker.terminate()
                worker.join(timeout=60)

    def close(self) -> None:
        """Its processes end with `generate`."""


def _work(
    options: VLLMOptions, environment: dict[str, str], requests: list[Request], decoding: Decoding, results: Any
) -> None:
    """One process of DataParallelVLLM: puts Generations, then None; a text if it fails."""
    os.environ.update(environment)  # before torch or vLLM look for GPUs
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        engine = VLLMEngine(options)
        try:
            for generation in engine.generate(requests, decoding):
                results.put(generation)
        finally:
            engine.close()
        results.put(None)
    except EvalError as error:
        results.put(str(error))
    except Exception as error:
        results.put(f"a vLLM process failed: {type(error).__name__}: {first_line(error)}.")


def _end_with_parent() -> None:
    """A parent that was killed reads no results, and its user wants the GPU back."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _share_devices(options: VLLMOptions, processes: int) -> list[dict[str, str]]:
    """The environment of each process: its GPUs, or its share of the CPU's cores."""
    if not options.gpu:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        shares = [",".join(map(str, cores[rank::processes])) for rank in range(processes)]
        return [{"VLLM_CPU_OMP_THREADS_BIND": share or "nobind"} for share in shares]
    visible = visible_gpus()
    needed = processes * options.tensor_parallel
    if needed > len(visible):
        raise EvalError(
            f"--data_parallel {processes} x --tensor_parallel {options.tensor_parallel} needs {needed} GPUs; {len(visible)} are visible."
        )
    each = options.tensor_parallel
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[rank * each : (rank + 1) * each])} for rank in range(processes)]


def visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        named.split(",")[: torch.cuda.device_count()]
        if named
        else [str(index) for index in range(torch.cuda.device_count())]
    )


def choose_engine(name: str) -> tuple[str, str]:
    """ "vllm" or "transformers", and why. "auto" takes vLLM if it can be imported."""
    if name == "transformers":
        return name, "as asked"
    try:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        importlib.import_module("vllm")
    except Exception as error:  # a broken installation raises anything
        reason = (
            "it is not installed"
            if isinstance(error, ModuleNotFoundError) and error.name == "vllm"
            else first_line(error)
        )
        if name == "vllm":
            raise EvalError(
                f"--engine vllm cannot be used: {reason}. Install it (pip install vllm), or use --engine transformers."
            ) from None
        return "transformers", f"vLLM cannot be imported ({reason}); it would be faster"
    return "vllm", "as asked" if name == "vllm" else "vLLM is installed"
