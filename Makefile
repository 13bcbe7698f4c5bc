# Set-up, tests and the demonstration on Debian with Python 3.11; the README gives the plain pip equivalents.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= outputs/demo
TRAIN_OUT ?= outputs/demo-train

.PHONY: demo demo-train test test-comfyui lint clean

$(VENV)/.installed: pyproject.toml requirements.txt constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/kandinsky5 demo --out $(OUT)

# Teaches nano-video a shape and a colour and makes a soup of both; TRAIN_FLAGS=--star-only for the shape alone.
demo-train: $(VENV)/.installed
	$(BIN)/python -m train.recipes.nano_concepts --out $(TRAIN_OUT) $(TRAIN_FLAGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadgroup

# Fails, where `make test` skips, if there is no ComfyUI ($COMFYUI_PATH, else ~/comfy/ComfyUI).
test-comfyui: $(VENV)/.installed
	K5_REQUIRE_COMFYUI=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/nodes tests/web

lint: $(VENV)/.installed
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) outputs build *.egg-info
