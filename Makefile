# make demo             set everything up and design RNA oligomers against two microRNAs (about two minutes of training)
# make demo-phylogeny   set everything up and learn the posterior over trees of 12 primates (about two)
# make demo-language    set everything up, make and teach a small language model, and post-train it (about six)
# make demo-posterior   set everything up, learn a diffusion prior from digits, and inpaint one (about four)
# make test             set everything up, then lint, types and all tests
# Each needs Python 3.11 or newer and nothing else; it installs into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo demo-phylogeny demo-language demo-posterior test check clean

demo: $(VENV)/.installed
	$(RUN)/headwater train rna --out runs/demo-$$(date +%Y%m%d-%H%M%S)

demo-phylogeny: $(VENV)/.installed
	$(RUN)/headwater train phylogeny --out runs/phylogeny-$$(date +%Y%m%d-%H%M%S)

demo-language: $(VENV)/.installed
	$(RUN)/headwater train tiny-math --out runs/language-$$(date +%Y%m%d-%H%M%S)

demo-posterior: $(VENV)/.installed
	$(RUN)/headwater train digits --out runs/digits-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.installed-dev check
	$(RUN)/python -m pytest

check: $(VENV)/.installed-dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

$(VENV)/bin/python:
	PYTHON="$(PYTHON)" sh scripts/make-venv.sh $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(RUN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable ".[rna,phylogeny,language,diffusion,ray]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable ".[rna,phylogeny,language,diffusion,ray,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
