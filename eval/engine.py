"""Text from a model, by vLLM or by transformers, through one interface; the only file that imports vLLM.

1. A request is a prompt's token ids and a sample number. Both engines are given the same ids, so tokenisation cannot differ.
2. `engine.generate(requests, decoding)` yields each Generation as it finishes, so that the caller can save it at once.
3. Both engines only deliver token ids; `finish` turns them into text, cuts at the first stop string and names why it ended.
4. Sampling draws from a generator seeded by (seed, problem, sample): a sample does not depend on what it is batched with.

Shapes: B batch, T longest prompt of the batch, L longest continuation, V vocabulary.
"""

import bisect
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import queue
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.tasks import EvalError

Key = tuple[str, int]  # problem id, sample
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM has room for
CONTEXT_TOKENS = 8  # of the prompt, decoded with a response: whether its first token begins with a space depends on them


@dataclass(frozen=True)
class Request:
    id: str
    sample: int
    prompt_ids: tuple[int, ...]
    max_tokens: int

    @property
    def key(self) -> Key:
        return self.id, self.sample


@dataclass(frozen=True)
class Decoding:
    """How a text is drawn, and where it ends besides the end-of-text token."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    """True: the response ends with the stop string that ended it."""

    def seed_of(self, request: Request) -> int:
        """Independent of the batch and of the order, and the same on every machine."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{request.id}/{request.sample}".encode()).digest()[:7])


@dataclass(frozen=True)
class Generation:
    id: str
    sample: int
    response: str
    finish_reason: str
    """"stop": an end-of-text token or a stop string. "length": the limit of tokens."""
    stop_reason: str | None
    """The stop string; None for an end-of-text token or the limit."""
    tokens: int
    """Generated, the end-of-text token and a stop string's tokens included."""


# ------------------------------------------------------------------------------------------------------------ where a model is


@dataclass(frozen=True)
class Source:
    """A model's files: a folder or a Hub id, and where its weights are if it is a LoRA adapter."""

    model: str
    revision: str
    """Hub: the commit. Folder: "sampled-sha256:..." over config, sizes and samples of the weights, see `fingerprint`."""
    base: str
    """The model itself, or what the adapter adapts."""
    base_commit: str | None
    adapter: str | None = None
    """Folder with adapter_config.json."""

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """Folder or Hub id, and commit."""
        if self.adapter and Path(self.adapter, "tokenizer_config.json").is_file():
            return self.adapter, None
        return self.base, self.base_commit

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        return _json(Path(self.adapter, "adapter_config.json")) if self.adapter else {}


def locate(model: str, revision: str | None = None) -> Source:
    """Finds a model without loading its weights: a folder, or a Hub id at `revision`."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise EvalError(f"--model {model} is a file. Give the folder that holds config.json, or a Hub id.")
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise EvalError(f"--model {model}: no such folder.")
        return _locate_on_hub(model, revision)
    if revision is not None:
        raise EvalError(f"--revision {revision} names a version on the Hub, but --model {model} is a folder. Leave --revision out.")
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        saved = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
        hint = f" It holds {', '.join(saved[-3:])}: give one of them." if saved else ""
        raise EvalError(f"--model {model} has neither config.json nor adapter_config.json, so it is no saved model.{hint}")
    if adapter:
        return _adapter(model, str(folder), fingerprint(folder))
    return Source(model, fingerprint(folder), str(folder), None)


def _adapter(model: str, folder: str, revision: str) -> Source:
    config = _json(Path(folder, "adapter_config.json"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise EvalError(f"{folder}/adapter_config.json names no base_model_name_or_path, so there is nothing to put the adapter on.")
    if not Path(base).is_dir() and (Path(folder, base) / "config.json").is_file():
        base = str(Path(folder, base))  # relative to the adapter
    try:
        under = locate(base, config.get("revision"))
    except EvalError as error:
        raise EvalError(f"--model {model} is an adapter of {base}, which cannot be found: {error}") from None
    if under.adapter:
        raise EvalError(f"--model {model} is an adapter of {base}, which is itself an adapter. Merge that one first.")
    return Source(model, f"{revision} on {under.revision}", under.base, under.base_commit, folder)


def _locate_on_hub(model: str, revision: str | None) -> Source:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with contextlib.suppress(EntryNotFoundError):  # also raised when a cache without network lacks it
            hf_hub_download(model, "adapter_config.json", revision=revision)
            folder = snapshot_download(model, revision=revision, ignore_patterns=["checkpoint-*", "*.bin.index.json", "optimizer*"])
            return _adapter(model, folder, Path(folder).name)
        commit = Path(hf_hub_download(model, "config.json", revision=revision)).parent.name  # .../snapshots/COMMIT/config.json
    except EvalError:
        raise
    except Exception as error:  # the Hub's client raises a dozen kinds
        raise EvalError(f"--model {model} is not a folder here, and cannot be found on the Hub: {first_line(error)}.") from None
    return Source(model, commit, model, commit)


def fingerprint(folder: Path) -> str:
    """Names the weights in a folder without reading all of them: another training run gives another name.

    SHA-256 over config.json or adapter_config.json and, for each weight file, its name, size, header and 64 samples of 4 KiB. Also finds
    a .safetensors that was cut off.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and path.name != "training_args.bin")
    if not weights:
        raise EvalError(f"{folder} holds no weights (.safetensors or .bin). Give the folder that the training run saved.")
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                digest.update(_header(file, path, size))
            for sample in range(64):
                file.seek(max(0, size - 4096) * sample // 63)
                digest.update(file.read(4096))
    return f"sampled-sha256:{digest.hexdigest()}"


def _header(file: Any, path: Path, size: int) -> bytes:
    """8 bytes: length of the header; the header, JSON with the place of each tensor; the tensors."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    try:
        if length + 8 > size:
            raise ValueError
        header = file.read(length)
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError):
        raise EvalError(f"{path} is not a readable .safetensors file. Save or download it again.") from None
    if 8 + length + max(ends, default=0) != size:
        raise EvalError(
            f"{path} has {size} bytes where its header asks for {8 + length + max(ends, default=0)}. Save or download it again."
        )
    return header


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"{path} cannot be read as JSON: {first_line(error)}.") from None


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0].strip().rstrip(".") if lines else "") or type(error).__name__


# ------------------------------------------------------------------------------------------------------------ tokens and text


def load_tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    path, commit = source.tokenizer
    try:
        return AutoTokenizer.from_pretrained(path, revision=commit)
    except Exception as error:
        raise EvalError(f"the tokenizer of {path} cannot be loaded: {first_line(error)}.") from None


def context_limit(source: Source) -> int | None:
    """Positions the model has, prompt and response together; None if its config does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.base, revision=source.base_commit)
    except Exception as error:
        raise EvalError(f"the config of {source.base} cannot be loaded: {first_line(error)}.") from None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def tokenize(tokenizer: Any, prompts: Sequence[str], *, special_tokens: bool) -> list[tuple[int, ...]]:
    """Token ids of each prompt. A closing end-of-text token, which some tokenizers add, is dropped: the model is to go on from here.

    `special_tokens` is False for a chat template, whose text already holds them: a second <s> lowers scores.
    """
    if not prompts:
        return []
    closes = special_tokens and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    rows = tokenizer(list(prompts), add_special_tokens=special_tokens)["input_ids"]
    return [tuple(row[:-1] if closes else row) for row in rows]


def response_text(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """What `new_ids` add to the text. Decoded behind the last tokens of the prompt, or a Llama tokenizer would drop a leading space."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    context = list(prompt_ids[-CONTEXT_TOKENS:])
    before, whole = tokenizer.decode(context, **options), tokenizer.decode([*context, *new_ids], **options)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(new_ids), **options)


def first_stop(text: str, stops: Collection[str]) -> tuple[int, str] | None:
    """Place and string of the stop that is complete first, as if the text came letter by letter.

    >>> first_stop("18\\n\\nQuestion: 2", ("Question:", "Question", "USER"))
    (4, 'Question')
    """
    found = [(text.find(stop), stop) for stop in stops]
    return min(((place, stop) for place, stop in found if place >= 0), key=lambda hit: hit[0] + len(hit[1]), default=None)


def finish(tokenizer: Any, request: Request, new_ids: Sequence[int], decoding: Decoding, *, ended: bool) -> Generation:
    """The Generation of the tokens `new_ids`; `ended` says that the model, and not the limit, ended them."""
    text = response_text(tokenizer, request.prompt_ids, new_ids)
    hit = first_stop(text, decoding.stop)
    if hit is None:
        return Generation(*request.key, text, "stop" if ended else "length", None, len(new_ids))
    place, stop = hit

    def complete(count: int) -> bool:
        return stop in response_text(tokenizer, request.prompt_ids, new_ids[:count])

    needed = bisect.bisect_left(range(len(new_ids)), True, key=complete)  # tokens until the stop was written
    return Generation(*request.key, text[: place + len(stop) * decoding.keep_stop], "stop", stop, needed)


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
            model = AutoModelForCausalLM.from_pretrained(source.base, revision=source.base_commit, dtype=getattr(torch, dtype))
            if source.adapter:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, source.adapter)  # type: ignore[assignment]
            model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        except Exception as error:
            raise EvalError(f"--model {source.model} cannot be loaded: {type(error).__name__}: {first_line(error)}.") from None
        model.eval()
        return cls(model, load_tokenizer(source), batch_size=batch_size)

    def close(self) -> None:
        """Nothing: the model may be the caller's."""

    def generate(self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()) -> Iterator[Generation]:
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
        pad = next(token for token in (self.tokenizer.pad_token_id, *stops, 0) if token is not None)  # masked: any token will do
        length = max(len(request.prompt_ids) for request in batch)
        padding = [length - len(request.prompt_ids) for request in batch]
        rows = [[pad] * n + list(request.prompt_ids) for request, n in zip(batch, padding, strict=True)]
        device = next(self.model.parameters()).device
        input_ids = torch.tensor(rows, device=device)  # (B, T)
        attention_mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding], device=device)  # (B, T)
        limit = max(request.max_tokens for request in batch)
        settings = GenerationConfig(**NEUTRAL, max_new_tokens=limit, use_cache=True, pad_token_id=pad, eos_token_id=list(stops) or None)
        criteria = StoppingCriteriaList([self._stopping(batch, decoding, length)] if decoding.stop else [])
        sampler = [_sampler([decoding.seed_of(request) for request in batch], decoding)] if decoding.temperature > 0 else []
        with _evaluation_mode(self.model), torch.no_grad():  # no inference_mode: its tensors could stay in a rotary cache
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
        window = max(map(len, decoding.stop)) + 4  # tokens; each holds a byte at least, and the last ones may be half a letter

        def criterion(input_ids, scores, **kwargs):  # (B, T + L), -
            new = input_ids[:, max(length, input_ids.shape[1] - window) :].tolist()
            for row, ids in enumerate(new):
                done[row] = done[row] or first_stop(response_text(self.tokenizer, batch[row].prompt_ids, ids), decoding.stop) is not None
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
        uniform = torch.tensor([[generator.random()] for generator in generators], dtype=torch.double, device=scores.device)
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

    def generate(self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()) -> Iterator[Generation]:
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
                detokenize=bool(decoding.stop),  # the text is made by `finish`; vLLM's own is needed to see a stop string
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
                    yield finish(self.tokenizer, request, result.token_ids, decoding, ended=result.finish_reason == "stop")

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

    def generate(self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()) -> Iterator[Generation]:
        todo = [request for request in requests if request.key not in skip]
        ids: dict[str, int] = {}
        for request in todo:
            ids.setdefault(request.id, len(ids))  # all samples of a problem in one process: they share the prompt's cache
        shares = [[request for request in todo if ids[request.id] % self.processes == rank] for rank in range(self.processes)]
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


def _work(options: VLLMOptions, environment: dict[str, str], requests: list[Request], decoding: Decoding, results: Any) -> None:
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
    return named.split(",")[: torch.cuda.device_count()] if named else [str(index) for index in range(torch.cuda.device_count())]


def lora_rank(source: Source) -> int:
    """Room for the adapter's rank, in a size vLLM has."""
    config = source.adapter_config
    if config.get("modules_to_save"):
        raise EvalError(
            f"the adapter {source.adapter} also holds whole modules (modules_to_save={config['modules_to_save']}), which vLLM cannot add. "
            "Merge it into its base, or use --engine transformers."
        )
    needed = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    rank = next((rank for rank in LORA_RANKS if rank >= needed), None)
    if rank is None:
        raise EvalError(f"the adapter has rank {needed}, and vLLM has room for {LORA_RANKS[-1]}. Use --engine transformers, or merge it.")
    return rank


def choose_engine(name: str) -> tuple[str, str]:
    """ "vllm" or "transformers", and why. "auto" takes vLLM if it can be imported."""
    if name == "transformers":
        return name, "as asked"
    try:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        importlib.import_module("vllm")
    except Exception as error:  # a broken installation raises anything
        reason = "it is not installed" if isinstance(error, ModuleNotFoundError) and error.name == "vllm" else first_line(error)
        if name == "vllm":
            raise EvalError(
                f"--engine vllm cannot be used: {reason}. Install it (pip install vllm), or use --engine transformers."
            ) from None
        return "transformers", f"vLLM cannot be imported ({reason}); it would be faster"
    return "vllm", "as asked" if name == "vllm" else "vLLM is installed"
