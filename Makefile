# Plain commands: see README.md. PY is the interpreter of the environment that `make install` builds.
VENV ?= .venv
PY := $(VENV)/bin/python
TORCH ?= torch==2.13.0

.PHONY: demo test lab book docs export readme check install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install        ## a real chest CT through the embedded VAE, a SYNTHETIC one drawn from masks, and their reports
	$(VENV)/bin/fvae samples
	$(VENV)/bin/fvae run reconstruct -p cases=sample --run runs/demo
	$(VENV)/bin/fvae run generate -p phantoms=1 --run runs/demo-drawn
	@echo "open runs/demo/report.html and runs/demo-drawn/report.html"

test: install        ## everything that CI runs
	$(PY) -m pytest tests

lab: install         ## read and run the book
	$(VENV)/bin/jupyter lab nbs

book: install        ## execute chapters whose code changed
	$(PY) -m fvae_nb.running.book execute

DOCS ?= build/docs
docs: $(DOCS)/.installed ## the book as a static site, build/site/index.html; in an environment of its own, without torch
	$(DOCS)/bin/python -m fvae_nb.running.site

$(DOCS)/.installed: pyproject.toml
	python3 -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check $$($(DOCS)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

export: install      ## notebooks -> fvae_nb/
	$(PY) -m fvae_nb.running.book export

readme: install
	$(PY) -m fvae_nb.running.book readme

check: install       ## is everything in step?
	$(PY) -m fvae_nb.running.book check

clean:
	rm -rf build dist *.egg-info .pytest_cache
