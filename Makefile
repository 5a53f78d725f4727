# make train    set everything up and run the default recipe
# make test     set everything up and run the tests, a process a core
# make bench    time the layer beside plain-torch loops
# make lint     what the style is held to
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Processes that the tests are shared out to, a file at a time, in order: those of tests/cpp, which are few and long, early.
# 0: none but this one. Each has one thread, beside which others would only wait; tests of threads ask for more.
WORKERS ?= auto
# pip compiles no bytecode (--no-compile), which is half of its time and mostly for what is never imported; what is
# imported is compiled and kept then, also where the environment says that it should not be.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test bench lint clean

train: .venv/installed
	$(BIN)/python train.py $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: .venv/installed
	$(BIN)/hmm-speech bench $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Debian keeps venv's pip in a package of its own, so a bare python3 may lack it.
.venv/bin/pip:
	rm -rf .venv
	$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "python3-venv is missing; installing it with apt-get"; \
	  SUDO=$$(test "$$(id -u)" = 0 || echo sudo); \
	  $$SUDO apt-get update && $$SUDO apt-get install -y python3-venv && $(PYTHON) -m venv .venv; }

# What .[dev] depends on, a line each. Python 3.10 has no reader of TOML but pip's.
LIST := import sys; \
  toml = __import__("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli", fromlist=["load"]); \
  project = toml.load(open("pyproject.toml", "rb"))["project"]; \
  print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")

# One core unpacks packages, minutes for torch, while the others compile the library.
.venv/installed: .venv/bin/pip pyproject.toml $(wildcard csrc/CMakeLists.txt csrc/*/*)
	$(BIN)/python -c '$(LIST)' > .venv/requirements.txt
	$(BIN)/pip install --no-compile --no-deps --editable . & library=$$!; \
	$(BIN)/pip install --no-compile --requirement .venv/requirements.txt; packages=$$?; \
	wait $$library || { echo "the library was not built; why is said above, among the packages" >&2; exit 1; }; \
	exit $$packages
	touch $@

clean:
	rm -rf .venv build
