# make demo: answers a question about a video.  make test: the tests.  Both set up .venv first.
.PHONY: install demo test lint clean

PYTHON ?= python3.12
BIN := .venv/bin
# Extras to install; a GPU machine wants EXTRAS=cuda12,dev or EXTRAS=cuda13,dev.
EXTRAS ?= dev

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv -q --clear --python 3.12 .venv && \
	  uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'; \
	else \
	  { command -v $(PYTHON) >/dev/null 2>&1 && $(PYTHON) --version >/dev/null 2>&1 && $(PYTHON) -m venv --clear .venv || python3 -m venv --clear .venv; } && \
	  $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed")' && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'; \
	fi
	@touch $@

demo: install
	@$(BIN)/python -m xl2jax.demo clip build/clip.mp4
	@echo "The bundled checkpoint holds random weights: expect noise, not an answer." >&2
	$(BIN)/python infer.py --video build/clip.mp4 --question "Which shape is red?" --max-new-tokens 16

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build .pytest_cache .ruff_cache .mypy_cache
