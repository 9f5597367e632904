# make demo: a virtual environment, then the demo cohort from data to held-out metrics.
# make test: the suite with lint, types and doctests; make test-slow: what takes longer, for CI and before a release.
# make docs: the documentation as a site, in site/. make gallery: its pictures anew, from the demo, some minutes.
# make notebooks: its notebooks executed anew, some minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs gallery notebooks clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python embed.py
	$(BIN)/python train.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict

gallery: $(VENV)/installed-dev
	$(BIN)/python docs/gallery.py
	$(BIN)/python docs/pictures.py --terminal

notebooks: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[notebooks]"
	$(BIN)/python docs/notebooks.py

clean:
	rm -rf $(VENV) cache runs multirun outputs site
