# `make demo` and `make test` make a virtual environment in .venv the first time. The demo needs fewer packages.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLOORS := peer dht expert_server trainer_client talkoot
PAGES := $(wildcard *.md docs/*.md)
SOURCES := $(FLOORS) tests benchmarks docs deploy examples tools
# macOS comes with GNU Make 3.81, which can't keep together what each check prints
TOGETHER := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
CHECKS := types types-on-darwin types-on-win32 prose spelling imports rules format

.PHONY: demo test lint $(CHECKS) figures proto vectors settings picture recording release-fixture clean

demo: $(VENV)/runs
	$(BIN)/talkoot demo

test: $(VENV)/installed lint
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# The checks run side by side; mypy, which takes longest, first.
lint: $(VENV)/installed
	@$(MAKE) --no-print-directory --jobs $(shell getconf _NPROCESSORS_ONLN) $(TOGETHER) $(CHECKS)

$(CHECKS): $(VENV)/installed

types:
	$(BIN)/mypy

types-on-darwin types-on-win32: types-on-%:
	$(BIN)/mypy --platform $* --cache-dir .mypy_cache/$* $(FLOORS)

prose:
	$(BIN)/proselint check $(PAGES)

spelling:
	$(BIN)/codespell $(SOURCES) $(PAGES) proto

imports:
	$(BIN)/lint-imports

rules:
	$(BIN)/ruff check $(SOURCES)

format:
	$(BIN)/ruff format --check $(SOURCES)

# Prints statistics of the code; AGAINST=REVISION compares them with those of a commit.
figures:
	@$(PYTHON) tools/figures.py $(if $(AGAINST),--against $(AGAINST))

# Generates peer/wire/ from proto/; `-Ipeer/wire=proto` maps the folder to the package.
proto: $(VENV)/installed
	$(BIN)/python -m grpc_tools.protoc -Ipeer/wire=proto --python_out=. --pyi_out=. --grpc_python_out=. \
		$(patsubst proto/%,peer/wire/%,$(wildcard proto/*.proto))
	rm -f $(addprefix peer/wire/,admission_pb2_grpc.py contact_pb2_grpc.py dht_pb2_grpc.py records_pb2_grpc.py)
	$(BIN)/python tools/grpc_types.py peer/wire

# Writes test vectors for clients in other languages.
vectors: $(VENV)/installed
	$(BIN)/python -W ignore tools/protocol_vectors.py > proto/vectors.new
	mv proto/vectors.new proto/vectors.json

# Generates the page of all settings from the code.
settings: $(VENV)/installed
	$(BIN)/python -W ignore docs/settings_page.py > docs/settings.md

# Draws the floors and their modules, as docs/architecture.md lists them, and the README's chart from docs/benchmarks.md.
picture: $(VENV)/installed
	$(BIN)/python docs/architecture_picture.py > docs/img/architecture.svg
	$(BIN)/python docs/headline_picture.py > docs/img/headline.svg

# Runs the demo and records the terminal, in a minute or two. Close other programs first.
recording: $(VENV)/runs
	$(BIN)/python docs/recording.py > docs/img/demo.svg

# Records this code as release VERSION for the tests of upgrades: `make release-fixture VERSION=0.2.0`.
release-fixture: $(VENV)/installed
	$(BIN)/python -W ignore tests/releases/make_release.py $(VERSION)

# Installs what Talkoot needs, and what its checks and tests need in addition.
$(VENV)/runs: pyproject.toml tools/install.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python tools/install.py .
	touch $@

$(VENV)/installed: $(VENV)/runs
	$(BIN)/python tools/install.py '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
