# Two targets, each with its own set-up on a machine that has python3 (3.10-3.13), venv and make:
#   make demo   draws a video from a prompt with sparse attention, and the dense one beside it
#   make test   runs the whole suite
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check

.PHONY: demo test
demo: $(VENV)/.demo
	$(VENV)/bin/vision-attn generate "a red circle moves right" --attention radial --compare --overwrite -o out
	@echo "The rest is in the browser: $(VENV)/bin/vision-attn app"

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=80" wheel

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e ".[apps]"
	@touch $@

# natten comes as source and looks for torch while it builds, so it goes last and without build isolation.
$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e ".[all]" cmake ninja packaging
	$(PIP) --no-build-isolation natten
	$(PIP) -e ".[all,test]"
	@touch $@
