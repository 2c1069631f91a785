# Every target sets up what it needs: a .venv with the exact versions of requirements*.lock.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help train explore experiments test test-elsewhere test-long lint kernels-report doctor bench-cpu bench-scaling bench-trace bench-explore bench-recovery test-gpu bench-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

train: $(VENV)/train.stamp ## train a small Phi-3.5-MoE on the text of this machine's Python
	$(RUN) launch/prepare_data.py
	$(RUN) launch/train.py

explore: $(VENV)/explore.stamp ## a local page: what the newest run's experts do; also run=FOLDER, trace=FOLDER, compare=FOLDER
	$(RUN) launch/explore.py $(foreach key,run trace compare,$(if $($(key)),$(key)=$($(key))))

experiments: $(VENV)/train.stamp ## four comparisons over three seeds, with reports: about an hour and a half on two cores
	for name in dense_and_sparse routers shapes upcycling; do $(RUN) launch/compare.py comparison=$$name || exit; done

# tests of arithmetic alone run beside the others, and give way to them: those kill, hang and time out
STEADY := $(addprefix tests/,analysis conf kernels parity gpu moe/convert moe/data moe/model moe/plan moe/sparse)
test: $(VENV)/dev.stamp lint ## lint, check types, run the tests
	@nice -n 10 $(RUN) -m pytest -m "not long" --timeout 900 $(STEADY) > $(VENV)/steady.log 2>&1 & steady=$$!; \
	trap 'kill $$steady' INT TERM; \
	$(RUN) -m pytest -m "not long" --durations 80 $(addprefix --ignore=,$(STEADY)); code=$$?; \
	wait $$steady; steady=$$?; cat $(VENV)/steady.log; \
	test $$code -eq 0 -a $$steady -eq 0

# what a session may find: other instruction sets, SIGINT and SIGHUP ignored, another order, no core free
test-elsewhere: $(VENV)/dev.stamp ## the tests as other machines see them, seven times: three hours
	ATEN_CPU_CAPABILITY=default PHI_KERNELS_AVX512=0 $(MAKE) test
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(MAKE) test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(MAKE) test
	OMP_NUM_THREADS=2 $(MAKE) test
	trap '' INT HUP; $(MAKE) test < /dev/null
	PYTEST_ADDOPTS=--random-order $(MAKE) test
	$(RUN) tests/keep_cores_busy.py $(MAKE) test

test-long: $(VENV)/dev.stamp ## every pair of layouts, 50 kills, thousands of damages: an hour
	$(RUN) -m pytest -m long

lint: $(VENV)/dev.stamp ## formatter, linter and type checker
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(RUN) -m basedpyright

kernels-report: $(VENV)/train.stamp ## compile every kernel for GPUs that are not here
	$(RUN) kernels/bench/compiled_kernels.py

doctor: $(VENV)/train.stamp ## say what this machine can do
	$(RUN) launch/doctor.py

bench-cpu: $(VENV)/dev.stamp ## tests of the CPU's experts, then their speed beside transformers'
	$(RUN) kernels/bench/cpu_experts.py --json kernels/bench/results/cpu_experts_cpu.json

bench-scaling: $(VENV)/dev.stamp ## bytes, memory and time of every layout on real ranks, beside the plan
	$(RUN) launch/measure_scaling.py

bench-trace: $(VENV)/dev.stamp ## what recording 10 million tokens costs a model, and analysing them
	$(RUN) launch/measure_trace.py

bench-explore: $(VENV)/dev.stamp ## the page on a trace of 10 million tokens, in a real Chromium
	$(RUN) launch/measure_explore.py

bench-recovery: $(VENV)/dev.stamp ## a run killed every 20 seconds for five minutes
	$(RUN) launch/measure_recovery.py

# these two need a GPU and no network: PYTHON has torch, triton, numpy and pytest already
test-gpu: ## the expert layer on this machine's GPU against float64
	$(PYTHON) kernels/bench/green_tests.py

bench-gpu: ## tests on the GPU, then its speed, tiles and targets: about eight minutes
	$(PYTHON) kernels/bench/moe_layer.py --tune

clean: ## remove the environment; data and runs stay
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "error: Python 3.11 or newer is needed, this is %d.%d; run: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: $(VENV)/bin/python requirements.lock pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/explore.stamp: $(VENV)/train.stamp requirements-explore.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-explore.lock
	@touch $@

$(VENV)/dev.stamp: $(VENV)/explore.stamp requirements-dev.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	@touch $@
