# Two commands for newcomers: `make demo` and `make test`. `make help` lists the rest.
PY ?= python3
BIN := .venv/bin
TORCH_CPU := https://download.pytorch.org/whl/cpu
THREADS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(nproc 2>/dev/null || echo 2)}

.DEFAULT_GOAL := help
.PHONY: help demo test check docs notebooks lab clean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z]+:.*##/ { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Everything below needs the virtual environment; it is made once, and again when the pins change.
# On a machine without a GPU the small CPU build of PyTorch will do; where its index is out of reach,
# the next line takes PyTorch from the usual place.
.venv/ready: constraints.txt settings.ini setup.py pyproject.toml
	@$(PY) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"segquant_nb needs Python 3.11 or later, {sys.executable} is {v[0]}.{v[1]}: try make PY=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PY) -m venv --clear .venv || { echo 'Python cannot make virtual environments here. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	command -v nvidia-smi >/dev/null || $(BIN)/pip install -q --retries 0 --no-deps -c constraints.txt --index-url $(TORCH_CPU) torch || true
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,docs]'
	@touch $@

demo: .venv/ready  ## quantize a small pipeline; write pictures, a report and numbers to demo/
	$(THREADS) $(BIN)/segquant demo

test: .venv/ready  ## run every notebook and every test
	$(BIN)/python -m pytest

check: .venv/ready  ## do notebooks, modules and README agree?
	$(BIN)/python tools/check.py

docs: .venv/ready  ## build the site into docs/_site
	$(THREADS) $(BIN)/python tools/site.py

notebooks: .venv/ready  ## export the modules, run the notebooks, store their outputs, write the README
	$(BIN)/nbdev_export
	$(BIN)/python tools/nbrun.py
	$(BIN)/python tools/readme.py

lab: .venv/ready  ## open the notebooks in JupyterLab
	$(BIN)/pip install -q -c constraints.txt -e '.[lab]'
	$(BIN)/jupyter lab nbs

clean:  ## remove what the other commands made, the virtual environment included
	rm -rf .venv _proc _docs build dist demo docs/_site *.egg-info
