"""Generation by vLLM, in this process or in several. The only file that imports vLLM."""

import logging
import multiprocessing
import os
import queue
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import EvalError
from matrix_llm.base.processes import kill_with_this_process

from ..text import first_line
from .generation import Decoding, Generation, Key, Request, finish
from .models import Source, load_tokenizer, lora_rank, stop_tokens
from .vllm_start import start_logged, why_not_started

QUIET = "ERROR"  # vLLM's level in this process, unless the user has set another: its warnings would stand among ours


@dataclass(frozen=True)
class VLLMOptions:
    """The settings of one vLLM process."""

    source: Source
    """The model's files."""
    dtype: str
    """bfloat16, float16 or float32."""
    max_model_len: int
    """Tokens of the longest prompt and its response together."""
    tensor_parallel: int = 1
    """GPUs that one copy of the model is sharded over."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory to take; above 0, at most 1."""
    gpu: bool = True
    """Whether it runs on GPUs; False for vLLM's CPU build."""
    log: Path | None = None
    """File for all that vLLM and its processes write; None: it is thrown away."""


class VLLMEngine:
    """vLLM in this process: all requests are submitted at once, so that its continuous batching is never idle."""

    name = "vllm"

    def __init__(self, options: VLLMOptions, tokenizer: Any = None, *, shows_start: bool = True):
        """
        Args:
            shows_start: whether the stage of the start is shown; False where another process shows it.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", QUIET)
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if not options.gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is a large part of all memory
        source = options.source
        self.tokenizer = tokenizer or load_tokenizer(source)
        self.stop_tokens = stop_tokens(source, self.tokenizer)
        self.lora_request: Any = None
        before = set(multiprocessing.active_children())
        try:
            with start_logged(options.log, shown=shows_start):
                self.llm = self._start(options)
        except EvalError:
            raise
        except Exception as error:
            reason = why_not_started(options.log) or f"{type(error).__name__}: {first_line(error)}"
            where = f" Its log is {options.log}." if options.log else ""
            raise EvalError(
                f"vLLM cannot start with --model {source.model}: {reason.removesuffix('.')}. Use --engine transformers."
                f"{where}"
            ) from None
        children = [child.pid for child in multiprocessing.active_children() if child not in before]
        self.watcher = kill_with_this_process(children)  # an engine whose parent was killed would keep the GPU forever

    def _start(self, options: VLLMOptions) -> Any:
        from vllm import LLM

        source, lora = options.source, {}
        if source.adapter:
            from vllm.lora.request import LoRARequest

            self.lora_request = LoRARequest("adapter", 1, source.adapter)
            lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(source)}
        level = os.environ["VLLM_LOGGING_LEVEL"]
        if level == QUIET:
            os.environ["VLLM_LOGGING_LEVEL"] = "INFO"  # of the engine's own process, whose output is in the log
        try:
            return LLM(
                model=source.base,
                revision=source.base_commit,
                tokenizer=source.tokenizer[0],
                tokenizer_revision=source.tokenizer[1],
                trust_remote_code=source.trust_remote_code,
                generation_config="vllm",  # the model's own would change the text; what ends it is in stop_tokens
                dtype=options.dtype,  # type: ignore[arg-type]
                max_model_len=options.max_model_len,
                tensor_parallel_size=options.tensor_parallel,
                gpu_memory_utilization=options.gpu_memory_utilization,
                enable_prefix_caching=True,
                enforce_eager=not options.gpu,
                seed=0,  # sampling uses each request's own seed
                **lora,  # type: ignore[arg-type]
            )
        finally:
            os.environ["VLLM_LOGGING_LEVEL"] = level
            logging.getLogger("vllm").setLevel(level)  # vLLM has set it again, for this process as well

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()
    ) -> Iterator[Generation]:
        """Yield generations in the order in which they finish."""
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
                stop_token_ids=self.stop_tokens,
                detokenize=bool(decoding.stop),  # to see a stop string; the text itself is made by `finish`
            )
            for request in todo
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in todo]
        # LLM.generate enqueues, runs this loop and returns all results at once. Here each is yielded as it finishes.
        lora = self.lora_request
        names = self.llm.enqueue(prompts, sampling, lora_request=lora, use_tqdm=False)  # type: ignore[arg-type]
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
        """End vLLM's own processes and free their memory. Without this call a spawned process never ends."""
        self.llm.llm_engine.engine_core.shutdown()
        self.watcher.kill()
        self.watcher.communicate()


class DataParallelVLLM:
    """Several vLLM processes, each with its own GPUs and every n-th problem. No Ray: a spawned process and one
    queue.
    """

    name = "vllm"

    def __init__(self, options: VLLMOptions, processes: int):
        self.options, self.processes = options, processes
        self.devices = _share_devices(options, processes)

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()
    ) -> Iterator[Generation]:
        # 1. Deal out the requests.
        todo = [request for request in requests if request.key not in skip]
        ids: dict[str, int] = {}
        for request in todo:
            ids.setdefault(request.id, len(ids))
        # All samples of a problem go to one process, where they share the prompt's cache.
        shares = [
            [request for request in todo if ids[request.id] % self.processes == rank] for rank in range(self.processes)
        ]
        # 2. Start a process for each share.
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        workers = [
            context.Process(
                target=_run_worker, args=(self._options_of(rank), environment, share, decoding, results, rank == 0)
            )
            for rank, (environment, share) in enumerate(zip(self.devices, shares, strict=True))
            if share
        ]
        for worker in workers:
            worker.start()
        # 3. Yield results as they arrive, and watch for processes that died silently.
        running = len(workers)
        try:
            while running:
                try:
                    result = results.get(timeout=1)
                except queue.Empty:
                    dead = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
                    if dead:
                        raise EvalError(
                            f"one of {len(workers)} vLLM processes ended with exit code {dead[0]}. "
                            "What is done is kept: run again."
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

    def _options_of(self, rank: int) -> VLLMOptions:
        """The first process has the log's own name, the others a number in it."""
        log = self.options.log
        return self.options if log is None or rank == 0 else replace(self.options, log=log.with_suffix(f".{rank}.log"))

    def close(self) -> None:
        """Do nothing: the processes end with `generate`."""


def _run_worker(
    options: VLLMOptions,
    environment: dict[str, str],
    requests: list[Request],
    decoding: Decoding,
    results: Any,
    shows_start: bool,
) -> None:
    """One process of DataParallelVLLM: puts Generations, then None; or an error message if it fails."""
    os.environ.update(environment)  # before torch or vLLM look for GPUs
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        engine = VLLMEngine(options, shows_start=shows_start)
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
    """End this process when its parent is killed: nobody reads the results any more, and the GPU should be freed."""
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
            f"--data_parallel {processes} x --tensor_parallel {options.tensor_parallel} needs {needed} GPUs; "
            f"{len(visible)} are visible."
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
