# The commands of the project. Everything runs in .venv, which `make setup` builds.
SHELL := bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
VENV_BENCH ?= .venv-bench
TORCH_CPU ?= torch==2.13.0
# The interpreter needs an older numpy than the rest.
KERNELS := .venv-kernels
FAULTS := tests/integration/faults tests/contract/test_sync_faults.py
NO_FAULTS := $(addprefix --ignore=,$(FAULTS))
export VENV_BENCH

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-recovery test-faults test-long test-kernels test-gpu check bench-setup bench bench-docs format docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## Build .venv with everything that the demo and the tests need

$(VENV)/.ready: pyproject.toml
	@PYTHON="$(PYTHON)" TORCH_CPU="$(TORCH_CPU)" VENV="$(VENV)" bash scripts/setup.sh
	@touch $@

demo: setup ## Watch PPO teach a small model to add (ALGO=ppo|grpo, REWARD=rule|model, SEED=0)
	@$(BIN)/python -m scripts.demo.run --algo "$(or $(ALGO),ppo)" --reward "$(or $(REWARD),rule)" \
		--seed "$(or $(SEED),0)" $(ARGS)

test test-recovery test-faults test-long test-kernels: export OMP_NUM_THREADS ?= 1

test: setup ## Run the tests (no GPU needed), but for those of test-recovery
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long and not alone" $(NO_FAULTS) tests
	@$(BIN)/python -m pytest -m "alone and not long" $(NO_FAULTS) tests
endif

test-recovery: setup ## Run the tests of what goes wrong in a run: deaths, hangs, resumes, bad numbers
	@$(BIN)/python -m pytest $(FAULTS) $(ARGS)

test-faults: setup ## Let twelve faults happen to a tiny PPO run, at every stage
	@$(BIN)/python -m scripts.soak --short $(ARGS)

test-long: setup ## Run the long forms of the tests: faults in every mode, thousands of random plans
	@$(BIN)/python -m pytest -m long --timeout 900 $(ARGS)
	@CHATLEARN_TEST_EXAMPLES=3000 $(BIN)/python -m pytest --timeout 1800 tests/unit/sync $(ARGS)

test-kernels: setup ## Run the kernels for GPUs on the CPU, by Triton's interpreter
	@[ -d $(KERNELS)/triton ] || $(BIN)/python -m pip install --quiet --no-deps --target $(KERNELS) \
		'triton==3.6.0' 'numpy<2.4'
	@TRITON_INTERPRET=1 PYTHONPATH=$(KERNELS) $(BIN)/python -m pytest --timeout 600 \
		tests/contract/test_kernels.py tests/contract/test_megatron_generation.py \
		-k "test_kernels or (full_forward and not bf16)" $(ARGS)

test-gpu: setup ## Run what needs a GPU
	@$(BIN)/python -m pytest -m gpu tests $(ARGS)

check: setup ## Lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/pyright

bench-setup: $(VENV_BENCH)/.ready ## Build .venv-bench with the peers: TRL and transformers

$(VENV_BENCH)/.ready: scripts/bench/peers.txt
	@[ -x $(VENV_BENCH)/bin/python ] || $(PYTHON) -m venv $(VENV_BENCH)
	@$(VENV_BENCH)/bin/python -m pip install --quiet $(TORCH_CPU)
	@$(VENV_BENCH)/bin/python -m pip install --quiet --requirement scripts/bench/peers.txt
	@touch $@

bench: setup bench-setup ## Run the benchmarks of scripts/bench/ one by one, alone on the machine (ARGS)
	@for file in $$(grep -l '^if __name__ == "__main__":' scripts/bench/*.py 2>/dev/null); do \
		echo "== $$file"; $(BIN)/python -m "scripts.bench.$$(basename "$$file" .py)" $(ARGS) || exit $$?; \
	done

bench-docs: setup bench-setup ## Measure beside TRL and transformers, and write docs/performance.md
	@mkdir -p runs/bench
	@for name in limits grpo_vs_trl generate_vs_transformers train_vs_transformers; do \
		echo "== $$name"; set -o pipefail; \
		$(BIN)/python -m "scripts.bench.$$name" --json | tee "runs/bench/$$name.txt" || exit $$?; \
	done
	@$(BIN)/python -m scripts.write_performance_docs runs/bench/{limits,grpo_vs_trl,generate_vs_transformers,train_vs_transformers}.txt

format: setup ## Format and fix what ruff can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup ## Write the generated pages of docs/
	@$(BIN)/python scripts/generate_config_docs.py

clean: ## Remove caches and .venv
	rm -rf $(VENV) $(KERNELS) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
