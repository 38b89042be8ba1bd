# `make run` and `make test` need Python 3.10 to 3.13 and make, nothing else.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3.10 python3; do \
	$$p -c 'import sys; exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV = .venv
BIN = $(VENV)/bin/python

.PHONY: help run multi app test lint evaluate bench images space-test clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/installed: requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found. Install one, or run make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Creating $(VENV) with $(PYTHON): downloads about 3 GB and takes 2 to 5 minutes"
	$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing. On Debian or Ubuntu, run apt install python3-venv"; exit 1; }
	$(BIN) -m pip install --quiet --upgrade pip
	$(BIN) -m pip install --quiet --progress-bar on -r requirements-dev.txt
	@touch $@

run: $(VENV)/installed ## train on the synthetic data set and print the results: 4 minutes on 2 CPU cores
	$(BIN) -m tools.notebook run s13_assignment.ipynb runs/shapes/s13_assignment.ipynb

multi: $(VENV)/installed ## compare training at one and at several resolutions: 10 minutes on 2 CPU cores
	$(BIN) -m tools.notebook run multi_scale_s13_assignment.ipynb runs/shapes-multi/multi_scale_s13_assignment.ipynb

app: $(VENV)/installed ## serve the app with the shipped weights on localhost
	GRADIO_ANALYTICS_ENABLED=False $(BIN) -m src.serving.app

test: $(VENV)/installed ## run the tests in two processes
	OMP_NUM_THREADS=1 $(BIN) -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed ## check format and style
	$(BIN) -m ruff format --check src tests benchmarks tools
	$(BIN) -m ruff check src tests benchmarks tools *.ipynb

images: $(VENV)/installed ## update the README's images from the last runs (screenshots need Chromium and npm)
	$(BIN) -m tools.notebook images
	$(if $(wildcard space/app.py),$(BIN) -m tools.screenshots space)

space-test: $(VENV)/installed ## run the exported Space in a new environment with only its own requirements
	$(BIN) tests/space_alone.py

evaluate: $(VENV)/installed ## measure the shipped weights; needs PASCAL VOC (VOC_ROOT: the folder that contains VOCdevkit)
	$(BIN) -m src.training.report weights

bench: $(VENV)/installed ## measure speed, as ratios to straightforward implementations
	$(BIN) -m benchmarks

clean: ## delete runs, exported Spaces and caches, but not the environment
	rm -rf runs space static_space
