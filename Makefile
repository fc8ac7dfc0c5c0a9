# make demo   own virtual environment, install, then the main job on sample_data/
# make demo-classify  train a classifier on drawn images, and judge it on others
# make test   the test suite          make lint   ruff, pyright, import-linter
# make docs   write docs/columns.md, docs/options.md, docs/api.md
# make pictures  the pictures of README.md
# make bench  the benchmarks that need no other data or peer

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-classify test lint docs pictures bench clean

demo: $(INSTALLED)
	$(BIN)/python sample_data/demo.py --out demo_results

demo-classify: $(INSTALLED)
	$(BIN)/python sample_data/demo_classify.py --out demo_classify_results

# A process per core, of one thread each: more threads than cores wait for each other.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tests/house_words.py

docs: $(INSTALLED)
	$(BIN)/python docs/make_columns.py
	$(BIN)/python docs/make_quality.py
	$(BIN)/python docs/make_options.py
	$(BIN)/python docs/make_api.py

# Needs Chromium.
pictures: $(INSTALLED)
	$(BIN)/python docs/make_pictures.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/preprocess.py

# constraints.txt pins the versions that are tested together.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_results demo_classify_results
