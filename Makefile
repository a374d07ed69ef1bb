# make demo: the main job on the embedded data. make test: every test. Each sets up its own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check clean

demo: $(VENV)/.ready
	$(BIN)/beitctl run demo
	@echo "report: runs/demo/report.html   numbers: runs/demo/summary.json"

test: $(VENV)/.ready $(VENV)/.references
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	touch $@

# What the parity tests compare with and nothing else needs; without their own pins, which are years old.
$(VENV)/.references: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps torchscale==0.3.0 fairscale==0.4.13 einops==0.8.2 \
		mistral-common==1.13.1 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth protobuf==7.36.2
	touch $@

clean:
	rm -rf $(VENV) runs dist
