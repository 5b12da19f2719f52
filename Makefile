# Every target works from a fresh clone: what it needs is installed first, with the exact versions of constraints.txt.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
QUIET := DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false MLFLOW_DISABLE_TELEMETRY=true DVC_NO_ANALYTICS=1
export ALKN_DATA ?= $(wildcard $(abspath ../shared/data))
STAMP := .venv/.installed

.PHONY: help install demo test lint bench bench-tofu bench-speed bench-gpu bench-evaluation clean distclean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## Make .venv and install the project with exact versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# 'prefect', 'mlflow' and 'dvc' typed by hand send nothing out either.
	@grep -q DO_NOT_TRACK .venv/bin/activate || echo 'export $(QUIET)' >> .venv/bin/activate
	@touch $@

demo: install  ## Unlearn the three pending requests of the embedded benchmark and show the chain
	@PATH="$(CURDIR)/$(BIN):$$PATH" alkn run

test: install  ## Lint, types, unit, flow and end-to-end tests, on every core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: install  ## Lint and types only
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

bench: install  ## All methods over TOFU, three seeds, into docs/RESULTS.md; hours, makes what is not on record there
	@PATH="$(CURDIR)/$(BIN):$$PATH" alkn compare configs/compare_tofu.yaml --folder .bench/tofu --page docs/RESULTS.md

bench-tofu: install  ## The TOFU protocol of docs/EXPERIMENTS.md, next to the published numbers
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m flows.bench_tofu

bench-speed: install  ## Speed, memory and cost as ratios measured in one run (docs/PERFORMANCE.md)
	$(BIN)/python -m flows.bench_speed

bench-gpu: install  ## 310 M parameters on a GPU: steps, memory, TOFU's five requests (docs/PERFORMANCE.md)
	$(BIN)/python -m flows.bench_speed --device cuda --part step --batch 32 --steps 12
	$(BIN)/python -m flows.bench_speed --device cuda --part memory --batch 16
	$(BIN)/python -m flows.bench_gpu

bench-evaluation: install  ## What a step's evaluation costs, on the base model of a TOFU comparison made here (docs/PERFORMANCE.md)
	$(BIN)/python -m flows.bench_evaluation .bench/tofu/base/seed0

clean:  ## Back to the three pending requests
	git checkout --quiet -- data/ledger.yaml
	rm -rf steps data/splits data/params.yaml data/certificate.pub data/requests dvc.lock mlflow.db* mlartifacts reports .prefect .alkn .dvc/cache .dvc/tmp

distclean: clean  ## Remove the virtual environment too
	rm -rf .venv
