# An image with all that gptchat needs but the repository itself, which is mounted:
#   docker run --rm -it -v $PWD:/workspace -w /workspace gptchat make tokenizer lm chatlm
# Several GB smaller, for CPUs: docker build --build-arg TORCH_INDEX=URL_OF_PYTORCH'S_CPU_INDEX -t gptchat .
FROM python:3.11-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends make tini && rm -rf /var/lib/apt/lists/*

# The Makefile finds its set-up done in here; the package itself is the mounted one.
ENV VENV=/opt/gptchat PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /workspace
COPY pyproject.toml Makefile README.md ./
COPY gptchat gptchat
COPY handlers handlers
COPY configs configs
ARG TORCH_INDEX=
RUN python3.11 -m venv $VENV \
 && if [ -n "$TORCH_INDEX" ]; then $VENV/bin/pip install torch==2.13.* --index-url "$TORCH_INDEX"; fi \
 && make $VENV/.serve

# As PID 1 make would pass SIGTERM on, but then could not end by it.
ENTRYPOINT ["tini", "--"]
CMD ["make"]
