# `make run` and `make test` need Python 3.10 to 3.12 and make, nothing else.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV = .venv
BIN = $(VENV)/bin/python

.PHONY: help run multi app test evaluate bench images space-test clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.12 found: install one, or name it with make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Building $(VENV) with $(PYTHON): downloads about 3 GB, takes some minutes"
	$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing: on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN) -m pip install --quiet --upgrade pip
	$(BIN) -m pip install --quiet --progress-bar on -r requirements.txt
	@touch $@

run: $(VENV)/installed ## train on the built-in data set: 5 to 8 minutes on 2 cores, ends with the table
	$(BIN) -m tools.notebook run s13_assignment.ipynb runs/shapes/s13_assignment.ipynb

multi: $(VENV)/installed ## the multi-resolution notebook, after make run
	$(BIN) -m tools.notebook run multi_scale_s13_assignment.ipynb runs/shapes-multi/multi_scale_s13_assignment.ipynb

app: $(VENV)/installed ## the app of the last run (before any run: of the shipped weights) on localhost
	GRADIO_ANALYTICS_ENABLED=False $(BIN) $(if $(wildcard space/app.py),space/app.py,-m src.serving.app weights)

test: $(VENV)/installed ## the tests
	$(BIN) -m pytest

images: $(VENV)/installed ## draw the README's figures again, from the last runs (the app's with Chromium)
	$(BIN) -m tools.notebook images
	$(if $(wildcard space/app.py),$(BIN) tools/screenshots.py space)

space-test: $(VENV)/installed ## the exported Space alone, in a new environment with its own requirements only
	$(BIN) tests/space_alone.py

evaluate: $(VENV)/installed ## measure the shipped weights again; VOC_ROOT names the folder that holds VOCdevkit
	$(BIN) -m src.training.model_card check weights

bench: $(VENV)/installed ## speed, as ratios against the obvious way
	$(BIN) -m benchmarks

clean: ## remove what running made, not the environment
	rm -rf runs space data/cache
