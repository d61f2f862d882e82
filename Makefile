# make demo | make demo IMAGES=DIR | make test | make check | make lock

PYTHON ?= $(shell command -v python3.11 || command -v python3)
IMAGES ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# pip looks at newer releases of what is locked, where another package asks for an extra of it,
# and then refuses the lock. uv does not.
UV := 0.13.9

.PHONY: venv demo test test-clusters check dataflow-check lock clean

venv: $(VENV)/complete

# The stamp is written last: an interrupted installation starts again.
$(VENV)/complete: requirements.lock setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: venv
	$(BIN)/python -m demo $(if $(IMAGES),--images "$(IMAGES)") $(ARGS)

test: venv
	$(BIN)/python -m pytest -m "not cluster"

# Prism and Flink; what there is no Go or no Java for is skipped, and says so.
test-clusters: venv
	$(BIN)/python -m pytest -m cluster

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dataflow-check: venv
	scripts/dataflow check

lock:
	$(BIN)/python -m pip install --quiet uv==$(UV)
	$(BIN)/uv pip compile setup.py --extra gcs --extra keras --extra dev --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --custom-compile-command "make lock" \
	  --output-file requirements.lock
	$(BIN)/uv pip compile setup.py --extra gcs --extra keras --extra gpu --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --custom-compile-command "make lock" \
	  --constraint requirements.lock --output-file deploy/dataflow/requirements.lock

clean:
	rm -rf $(VENV) .cache out
