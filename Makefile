# make demo: hear it.  make test: all checks.  make lint, make bench, make clean, make distclean.
#
# Variables: PYTHON (3.11 or newer), VENV, TORCH (installed only where torch is missing; for a CPU or another CUDA build
# give the name of that build, or install torch into $(VENV) first), JOBS (processes of make test, one thread each),
# TEST_SET and CORPUS (for make bench).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
TORCH ?= torch==2.13.0
CORPUS ?= corpus
JOBS ?= 2
TEST_SET ?= benchmarks/sets/enhance-test.jsonl
SCORED := announcement-in-a-crowd.flac
NEAR := talker-under-a-loudspeaker.flac
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
STAMPS := $(VENV)/.stamps

.PHONY: help demo test lint base-install bench clean distclean

help:
	@echo "make demo   clean the recordings of demo/noisy into out/, cancel the echo of demo/echo, part the talkers of demo/talkers; with reports and scores"
	@echo "make test   lint, base install, all tests"
	@echo "make lint   ruff, import-linter, pyrefly"
	@echo "make bench  run the benchmarks and write benchmarks/results/"
	@echo "make clean  remove what was generated; make distclean removes $(VENV) too"

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(PY) -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	touch $@

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml
	@echo "installing allears with what the scores need into $(VENV)"
	$(PIP) install --quiet --editable ".[eval]"
	touch $@

$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml
	@echo "installing allears with everything that the checks need into $(VENV)"
	$(PIP) install --quiet --editable ".[dev,eval,train,media,text,serve]"
	touch $@ $(STAMPS)/demo

demo: $(STAMPS)/demo
	$(BIN)/allears enhance demo/noisy -o out --report --overwrite
	@echo "against the clean recording, before:"
	$(BIN)/allears eval files demo/noisy/$(SCORED) -r demo/clean/$(SCORED)
	@echo "after:"
	$(BIN)/allears eval files out/$(SCORED) -r demo/clean/$(SCORED)
	@echo "echo: what the loudspeaker plays is taken out of what the microphone hears; before and after:"
	$(BIN)/allears cancel-echo demo/echo/microphone.flac demo/echo/loudspeaker.flac -o out/echo/near.flac --report --overwrite
	$(BIN)/allears eval files demo/echo/microphone.flac -r demo/clean/$(NEAR) --metrics pesq_wb si_sdr_db estoi
	$(BIN)/allears eval files out/echo/near.flac -r demo/clean/$(NEAR) --metrics pesq_wb si_sdr_db estoi
	@echo "two people at once, each to a file:"
	$(BIN)/allears separate demo/talkers/two-at-once.flac -o out/talkers --report --overwrite
	$(BIN)/allears video "a red ball rolls left behind a blue box" -o out/video.png --overwrite
	@echo "listen: out/, look at out/video.png, and open out/report.html, out/echo/report.html and out/talkers/report.html in a browser"

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyrefly check

base-install: $(STAMPS)/dev
	$(PY) .ci/base_install.py

test: lint base-install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

$(STAMPS)/peers: $(STAMPS)/dev benchmarks/requirements-peers.txt
	$(PIP) install --quiet --requirement benchmarks/requirements-peers.txt
	touch $@

bench: $(STAMPS)/peers
	$(PY) -m benchmarks enhance_speed
	@test -f $(CORPUS)/manifest.jsonl || { echo "make: scores need the corpus: $(BIN)/allears data prepare $(CORPUS)" >&2; exit 2; }
	$(PY) -m benchmarks enhance $(TEST_SET) --corpus $(CORPUS)

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .pyrefly_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
