# Two commands matter: `make run` (the demo) and `make test` (what CI checks; it goes on with `make types`, `make browser` and `make slow`).
# Each target installs what it needs into .venv, from the exact versions in constraints.txt.

PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONDONTWRITEBYTECODE  # pip compiles nothing: what is used is compiled once, on first use

.PHONY: help run test test-min types slow browser docs planner dist traces lab prepare bench gpu clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 12

run: .venv/run  ## the demo: a catalogue with broken files, embedded and validated; opens as demo/report.html
	devsky demo --out demo

test: .venv/dev  ## export and clean leave no diff, every notebook runs, pytest passes
	OMP_NUM_THREADS=1 python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10 -m "not slow"
	OMP_NUM_THREADS=1 python -m pytest -q --numprocesses 2 --dist worksteal -m device --pretend cuda $$(grep -rl --include='*.py' mark.device tests)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 nbdev_test --path nbs --n_workers 2 --timing

test-min: .venv-min/done  ## the tests with the oldest libraries that settings.ini allows
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest -q --numprocesses 2 --dist loadfile -m "not slow"

types: .venv/dev  ## a type checker over the package and over a program that uses the whole public API
	mypy

slow: .venv/slow  ## the tests that take long: killed clusters, the built wheel, memory that must come back, compiled code, every trace
	OMP_NUM_THREADS=1 python -m pytest -q --numprocesses 2 --dist loadfile --durations 5 -m slow
	printf '%s\n' cuda:2 mps | OMP_NUM_THREADS=1 xargs -P 2 -I GPU python -m pytest -q -m device --pretend GPU $$(grep -rl --include='*.py' mark.device tests)

docs: .venv/docs  ## the site, from the executed notebooks: _docs/index.html
	OMP_NUM_THREADS=1 python tools/docs.py

browser: .venv/browser docs  ## the site and the widgets in a real browser (Chromium must be on PATH)
	OMP_NUM_THREADS=1 DEVSKY_BROWSER=required python -m pytest -q --numprocesses 2 --dist loadfile -m browser

traces: .venv/dev  ## after a change to tracing or to the pinned libraries: take the traces that the package and its published figures carry anew
	python tools/traces.py
	python tools/published.py

planner: .venv/dev  ## after the same changes: predict the grid of the site's planner anew (half an hour; traces are kept in build/)
	OMP_NUM_THREADS=1 python tools/planner.py

dist: .venv/dev  ## wheel and source distribution, in dist/
	python -m build --no-isolation

lab: .venv/lab  ## JupyterLab on the notebooks
	jupyter lab nbs

prepare: .venv/dev  ## after editing notebooks: export modules, clean notebooks, write README.md
	python tools/export.py
	nbdev_clean
	python tools/outputs.py
	python tools/readme.py

bench: .venv/bench .venv-peers/done  ## the side-by-side measurements in benchmarks/
	python benchmarks/embedding.py --peers-python .venv-peers/bin/python
	python benchmarks/preprocessing.py
	python benchmarks/search.py
	python benchmarks/cluster.py
	python benchmarks/quantize_once.py
	python benchmarks/monitor.py
	python benchmarks/performance.py

gpu: .venv/run  ## what only a GPU can show, in ten minutes; benchmarks/gpu.md tells how to send the result in
	python benchmarks/gpu.py --out benchmarks/gpu.json

clean:  ## remove the environment and everything generated beside the sources
	rm -rf .venv .venv-min .venv-peers .mypy_cache demo build dist _proc _docs *.egg-info nbs/nbdev.yml nbs/sidebar.yml

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "devsky_nb needs Python 3.11 or newer with the venv module; none was found on PATH" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip

.venv/run: .venv/bin/python settings.ini setup.py constraints.txt
	$(PIP) --editable '.[diffusion]'
	@touch $@

.venv/dev: .venv/bin/python settings.ini setup.py constraints.txt
	$(PIP) --editable '.[diffusion,ui,dev]'
	@touch .venv/run $@

.venv/slow: .venv/dev
	$(PIP) --editable '.[diffusion,ui,dev,slow]'
	@touch $@

.venv/bench: .venv/dev
	$(PIP) --editable '.[diffusion,ui,dev,bench]'
	@touch $@

.venv/lab: .venv/dev
	$(PIP) --editable '.[diffusion,ui,dev,lab]'
	@touch $@

.venv/docs: .venv/dev
	$(PIP) --editable '.[diffusion,ui,dev,docs]'
	@touch $@

.venv/browser: .venv/dev
	$(PIP) --editable '.[diffusion,ui,dev,lab,docs,browser]'
	@touch .venv/lab .venv/docs $@

.venv-min/done: settings.ini setup.py constraints-min.txt
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip==26.3
	.venv-min/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints-min.txt --editable '.[diffusion,ui,dev]'
	@touch $@

.venv-peers/done: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/peers.txt
	@touch $@
