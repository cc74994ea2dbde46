# K5 Studio. Every target makes .venv when it is missing, and updates it when the requirements changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lint bench torture docs clean

help:
	@echo "make run      start the app (make run ARGS=\"--port 7999\" hands options on)"
	@echo "make test     all tests that need no GPU and no patience"
	@echo "make lint     ruff (style, imports, traps) and pyright (types)"
	@echo "make bench    the measurements"
	@echo "make torture  kills, full disks, damage, long runs"
	@echo "make docs     write docs/options.md and docs/dataset.md anew from the definitions"
	@echo "make clean    remove .venv and the caches of the tools"

# The one rule of installation: .venv/.X.stamp is as new as X.txt. `run` and `docs` need requirements.txt only, the
# rest needs requirements-dev.txt, which includes it.
$(VENV)/.%.stamp: %.txt requirements.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || \
	  { echo "Python is missing: there is no '$(PYTHON)'. Install Python 3.11 or newer, or name it: make run PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make run PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing. On Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@$(RUN) -c '' 2>/dev/null || { echo "Making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing $< into $(VENV) (the first time this takes a few minutes)"
	@$(RUN) -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

run: $(VENV)/.requirements.stamp
	$(RUN) app.py $(ARGS)

# A file of tests stays in one process, for its tests share what they set up; four processes fit into 24 GB.
test: $(VENV)/.requirements-dev.stamp
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.requirements-dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

bench: $(VENV)/.requirements-dev.stamp
	$(RUN) -m pytest -m bench -s $(ARGS)

torture: $(VENV)/.requirements-dev.stamp
	$(RUN) -m pytest -m "torture or slow" $(ARGS)

docs: $(VENV)/.requirements.stamp
	$(RUN) -m backend.config.docs

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find app.py backend k5ui tests -type d -name __pycache__ -prune -exec rm -rf {} +
