# Everything but the repository, which is mounted: docker run --rm -it -v $PWD:/workspace -w /workspace gptchat make lm
# A CPU image (several GB smaller): docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t gptchat .
FROM python:3.11-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*

# The Makefile takes the virtual environment from here, instead of making one in the mounted folder.
ENV VENV=/opt/gptchat PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN python -m venv $VENV
ENV PATH=$VENV/bin:$PATH

ARG TORCH_INDEX=
COPY pyproject.toml /tmp/
RUN python -c "import tomllib; project = tomllib.load(open('/tmp/pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['serve'], sep='\n')" > /tmp/requirements.txt \
 && if [ -n "$TORCH_INDEX" ]; then pip install "$(grep ^torch== /tmp/requirements.txt)" --index-url "$TORCH_INDEX"; fi \
 && pip install -r /tmp/requirements.txt \
 && touch $VENV/installed

WORKDIR /workspace
CMD ["make"]
