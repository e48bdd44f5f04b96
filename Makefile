# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make demo    install, fine-tune the embedded model on drawn butterflies, show before and after
#   make test    install, lint, type check, test
#   make faults  kill, starve and damage runs, and compare what is left
#   make docs    build the documentation into site/, and fail for a broken link
#   make test-oldest    the tests again, with the lowest version of every dependency that is admitted
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test faults docs test-oldest lint types format clean

demo: $(VENV)/installed
	$(BIN)/finetune-unet --config configs/tiny-butterflies.toml $(DEMO)

test: lint types
	$(BIN)/python -m pytest -n logical --dist worksteal --ignore tests/faults

faults: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest -n logical --dist worksteal tests/faults

docs: $(VENV)/installed-for-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install uv
	$(VENV)-oldest/bin/uv pip install --python $(VENV)-oldest/bin/python --resolution lowest-direct -e '.[test]'
	$(VENV)-oldest/bin/python -m pytest -n logical --dist worksteal --ignore tests/faults

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-for-tests
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e .
	touch $@

$(VENV)/installed-for-tests: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-for-docs: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e '.[docs]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) $(VENV)-oldest site build dist *.egg-info
