# make demo: answers a question about a video.  make test: the tests, but for those that take minutes
# (make slow-test).  make serve: the server on port 8000.  All set up .venv first.
.PHONY: install demo serve test slow-test lint docs clean

PYTHON ?= python3.12
BIN := .venv/bin
# Extras to install; a GPU machine wants EXTRAS=cuda12,dev or EXTRAS=cuda13,dev.
EXTRAS ?= dev
# Of the demo's video.
SEED ?= 1
# The shell gets it as a variable, never as part of a command.
export SEED

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
	@mkdir -p build
	@$(BIN)/python -m xl2jax demo-clip build/demo.mp4 --seed "$$SEED" > build/demo.txt
	@echo "Questions and their right answers (SEED=2 or any other number makes another video):" >&2 && cat build/demo.txt >&2
	@cut -f1 build/demo.txt | sed 's/.*/--question "&"/' | xargs $(BIN)/python infer.py --video build/demo.mp4 --plot build/demo.png
	@echo "wrote build/demo.png: a timeline of the video that shows which parts each answer looked at" >&2

serve: install
	@mkdir -p build/serve
	$(BIN)/python -m xl2jax serve --media-root build --cache-dir build/serve

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

slow-test: install
	JAX_DISABLE_MOST_OPTIMIZATIONS=$${JAX_DISABLE_MOST_OPTIMIZATIONS:-0} $(BIN)/python tools/slow_tests.py $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in build/site, and docs/cli.md anew from the flags.
docs: install
	@if command -v uv >/dev/null 2>&1; then \
	  uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[docs]'; \
	else \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'; \
	fi
	$(BIN)/python tools/cli_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv build .pytest_cache .ruff_cache .mypy_cache
