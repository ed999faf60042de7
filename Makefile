# Two commands for a bare machine with Python 3.11, pip and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
NAME ?=
DATA ?=
SEED ?= 0
JOBS ?= 2

.PHONY: demo test chaos check bench plan clean help

help: ## show the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== building the virtual environment $(VENV) (torch, ray and tools; some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[launch,plots,dev]'
	@$(BIN)/python -m compileall -q hethub
	@$(BIN)/python -m hethub.simulate.compiled
	@touch $@

demo: $(VENV)/installed ## plan a mixed cluster of emulated devices and train a model on it, against the best even split
	@echo "== the plan for cluster_specs/laptop.yaml (emulated devices)"
	@mkdir -p runs
	@$(BIN)/hethub plan cluster_specs/laptop.yaml --output runs/laptop-plan.yaml
	@echo "== training cluster_specs/laptop-job.yaml on a local Ray, one worker per emulated device"
	@$(BIN)/hethub launch cluster_specs/laptop-job.yaml
	@echo "== where the time went, predicted and measured"
	@$(BIN)/hethub timeline runs/demo
	@echo "== open runs/demo/timeline.html in a browser: one step, predicted above measured"

check: $(VENV)/installed ## lint and types
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy --strict"
	@$(BIN)/mypy

test: $(VENV)/installed check ## lint, types and all tests
	@echo "== pytest"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

chaos: $(VENV)/installed ## kill workers and damage checkpoints for half an hour; SEED=... repeats one
	@echo "== pytest -m chaos"
	@HETHUB_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -s tests/chaos -m "chaos or not chaos"

bench: $(VENV)/installed ## run the benchmarks (one: NAME=...); DATA=... is the folder of published tables that two of them need
	@for file in $(if $(NAME),benchmarks/$(NAME).py,$(wildcard benchmarks/*.py)); do \
		echo "== $$file"; data=; \
		if [ -n "$(DATA)" ] && grep -q -e '"--data"' $$file; then data="--data $(DATA)"; fi; \
		$(BIN)/python $$file $$data || exit 1; done

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
