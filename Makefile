# `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help install labels train pathpt test test-all first-hour lint format guide bench clean

COHORT ?= demo
# what of the encoder learns: one of configs/strategies, or as the cohort's config says
STRATEGY ?=
SEED ?= 0
RUN ?= runs/$(COHORT)
# the paper's aggregator and the default, each with its own frozen control; drop one where a run
# takes days
ARMS ?= tapfm tapfm_gated
# what `labels` reads: GDC's manifest, and mutations.tsv, .txt, .maf.gz or .csv
MANIFEST ?= data/$(COHORT)/manifest.txt
MUTATIONS ?= $(firstword $(wildcard data/$(COHORT)/mutations.*) data/$(COHORT)/mutations.txt)
PROFILED ?= $(wildcard data/$(COHORT)/cases_sequenced.txt)
# runs at a time: the demo's small model gains nothing from a second core, so each run takes one
JOBS ?= $(if $(filter demo,$(COHORT)),2,1)
# processes that the tests run in, of up to 3 GiB each
WORKERS ?= 2

# the first Python that is new enough; torch 2.15 and zarr 3 want 3.11
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG := --config configs/cohorts/$(COHORT).yaml \
	$(STRATEGY:%=--config configs/strategies/%.yaml)

help:      ## list the targets
	@grep -E '^[a-z-]+: *.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(READY) ## a virtual environment with pinned versions (5.5 GB, 2 to 3 minutes)

$(READY): setup.cfg constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

labels: $(READY) ## a cohort table from a GDC manifest and mutations: make labels COHORT=tcga_luad
	$(BIN)/tapfm labels --config configs/cohorts/$(COHORT).yaml --manifest $(MANIFEST) --mutations $(MUTATIONS) \
		$(PROFILED:%=--profiled %)

train: $(READY) ## the main job: make train [COHORT=demo] [STRATEGY=hiadapter] [SEED=0] [RUN=runs/demo]
	@if [ $(COHORT) = demo ]; then $(BIN)/tapfm demo; fi
	@if [ -f $(MANIFEST) ] && [ ! -f data/$(COHORT)/cohort.csv ]; then \
		$(MAKE) --no-print-directory labels; fi
	$(BIN)/tapfm index $(CONFIG)
	$(if $(filter-out 1,$(JOBS)),OMP_NUM_THREADS=1) $(MAKE) --no-print-directory -j $(JOBS) $(ARMS:%=fit-%)
	$(BIN)/tapfm test --run $(RUN)

pathpt: $(READY) ## name every tile by learned prompts, from few slides: make pathpt [COHORT=demo] [SEED=0]
	@if [ $(COHORT) = demo ]; then $(BIN)/tapfm demo; fi
	$(BIN)/tapfm pathpt --config configs/cohorts/$(COHORT).yaml \
		--question configs/pathpt/$(COHORT).yaml --out runs/$(COHORT)_pathpt --seed $(SEED)

fit-%: AGGREGATOR = $*
fit-tapfm: OWN = --model.steps.head_first 0
fit-%: $(READY)
	$(BIN)/tapfm fit $(CONFIG) --seed_everything $(SEED) --run_dir $(RUN) \
		--model.aggregator $(AGGREGATOR) $(OWN)

test: $(READY) ## lint, and every test that needs no GPU and no download (about 20 minutes on 2 cores)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m 'not gpu' -n $(WORKERS) --dist loadfile

test-all: $(READY) first-hour ## every test this machine can run, and the first hour
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

first-hour: $(READY) ## the wheel, in an environment and a folder of its own, to a report
	$(BIN)/python -m benchmarks.first_hour --borrow

lint: $(READY) ## what `test` checks of the code's form; changes nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY) ## fix what ruff can fix
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

guide: $(READY) ## the user guide as pages: build/guide/index.html
	$(BIN)/python -m mkdocs build --strict -f docs/mkdocs.yml

bench: $(READY) ## rewrite the tables in benchmarks/README.md on this machine
	$(BIN)/python -m benchmarks.peak_memory
	$(BIN)/python -m benchmarks.tile_throughput

clean:     ## remove what the targets above made, but for data/ and runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
