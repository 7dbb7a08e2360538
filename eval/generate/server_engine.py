"""Generation by a running vLLM server, which is told to load the model's weights first.

The score is that of the folder given: the server's weights are replaced by the folder's, no key or value cached from
other weights can be used (each load has a salt of its own), and weights that another run has put there meanwhile are an
error. The text comes from token ids, as with every other engine.
"""

import secrets
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from matrix_llm.base.errors import EvalError
from matrix_llm.base.vllm_server import VLLMServer

from ..text import first_line
from .engines import SERVER
from .generation import Decoding, Generation, Key, Request, finish
from .models import Source, load_tokenizer, stop_tokens

AT_ONCE = 64  # requests under way; the server batches them
NEUTRAL = {  # what generation_config.json would otherwise set on the server
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": 0, "min_p": 0.0,
    "min_tokens": 0,
}  # fmt: skip
# Settings of a configuration that decide the shapes of the weights: others would end the server
SHAPES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
TEXT = "Ana's 12 pens cost $3.50; é, 数.\n\tHow many?"  # tokenised by both tokenizers


class ServerEngine:
    """A vLLM server, with the weights of one folder."""

    name = SERVER

    def __init__(self, source: Source, address: str, tokenizer: Any = None, *, longest: int = 0) -> None:
        """
        Args:
            longest: tokens of the longest prompt and its response together.

        Raises:
            EvalError: the server serves another model, or cannot load this one.
        """
        folder = Path(source.base).absolute()
        if source.adapter:
            raise EvalError(
                f"--engine {address} takes whole weights, and --model {source.model} is an adapter. Merge it first "
                f"(python -m matrix_llm.merge {source.adapter} OUT), or use --engine vllm."
            )
        if not folder.is_dir():
            raise EvalError(
                f"--engine {address} loads weights from a folder, and --model {source.model} is on the Hub. Fetch it "
                f"first: matrix-llm fetch {source.model} FOLDER"
            )
        self.server, self.source = VLLMServer(address), source
        self.tokenizer = tokenizer or load_tokenizer(source)
        self.stop_tokens = stop_tokens(source, self.tokenizer)
        # 1. the same model, as far as its weights and its texts go
        described = self.server.describe()
        self._check_shapes(described["model"])
        self._check_tokenizer()
        if longest > described["max_model_len"]:
            raise EvalError(
                f"the longest prompt and its response have {longest} tokens, and the server {address} holds "
                f"{described['max_model_len']}. Start it with --max-model-len {longest}, or lower --max_tokens."
            )
        # 2. its weights
        self.version = secrets.token_hex(16)
        self.model = self.server.served_name()
        self.server.load(str(folder), self.version)

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, *, skip: Collection[Key] = ()
    ) -> Iterator[Generation]:
        """Yield generations in the order in which they finish, the last ones once the weights are known to be ours."""
        todo = [request for request in requests if request.key not in skip]
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for done in as_completed([pool.submit(self._complete, request, decoding) for request in todo]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if todo and self.server.version() != self.version:
            raise EvalError(
                f"another run has put its weights into the server {self.server.address} meanwhile, so these responses "
                "are worth nothing. Give each run a server of its own, then run again with --overwrite."
            )

    def close(self) -> None:
        """Do nothing: the server goes on, with these weights."""

    def _complete(self, request: Request, decoding: Decoding) -> Generation:
        settings = {
            **NEUTRAL,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": request.max_tokens,
            "stop": list(decoding.stop),
            "stop_token_ids": self.stop_tokens,
            "cache_salt": self.version,
        }
        if decoding.temperature > 0:
            settings["seed"] = decoding.seed_of(request)
        ids, reason = self.server.complete(self.model, list(request.prompt_ids), settings)
        if reason == "length" and len(ids) < request.max_tokens:
            raise EvalError(
                f"the server {self.server.address} ended a response after {len(ids)} of {request.max_tokens} tokens. "
                "Start it with --generation-config vllm."
            )
        return finish(self.tokenizer, request, ids, decoding, ended=reason == "stop")

    def _check_shapes(self, served: str) -> None:
        from transformers import AutoConfig

        trusted = self.source.trust_remote_code
        ours = AutoConfig.from_pretrained(self.source.base, trust_remote_code=trusted).get_text_config()
        try:
            theirs = AutoConfig.from_pretrained(served, trust_remote_code=trusted).get_text_config()
        except Exception as error:
            raise EvalError(
                f"the server {self.server.address} serves {served}, whose configuration cannot be read here "
                f"({first_line(error)}), so whether it fits --model {self.source.model} is not known. Serve a folder "
                "that both see."
            ) from None
        for name in SHAPES:
            if getattr(ours, name, None) != getattr(theirs, name, None):
                raise EvalError(
                    f"the server {self.server.address} serves {served} with {name}={getattr(theirs, name, None)!r}, "
                    f"and --model {self.source.model} has {getattr(ours, name, None)!r}. Serve one of the same shapes."
                )

    def _check_tokenizer(self) -> None:
        ours = self.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        if self.server.tokenize(TEXT, special_tokens=False) != list(ours):
            raise EvalError(
                f"the server {self.server.address} has another tokenizer than --model {self.source.model}. Serve the "
                "model that is trained."
            )
