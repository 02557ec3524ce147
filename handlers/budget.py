"""How large answers may become: `check_answer` refuses a job before any of it is generated.

Whoever does not read an answer makes Java hold all of it in direct memory until the connection
ends, and a Java without memory drops its worker. Hence three limits of ServerSettings: one answer's
size (`max_answer_mb`), the sum over live requests (`max_answers_mb`), and Java's resident memory
(`max_java_mb`), which also counts answers that are finished but unread. Beyond the first a job gets
status 400, beyond the others 503: it may come again later. Answers of at most SMALL_ANSWER bytes
are exempt from the last two, so that they go on while others wait; `max_requests` bounds them.

Sizes are estimates in bytes of JSON, above the real ones for all but unusually long tokens.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from gptchat.config import ServerSettings
from handlers.fields import Refusal
from handlers.jobs import Job

MB = 2**20
SMALL_ANSWER = 2**16
TOKEN_BYTES = 16
LOGPROB_BYTES = 100  # a token with its log-probability
EVENT_BYTES = 320  # what stands around a token in a stream
FRAME_BYTES = 500  # what stands around a whole answer


def answer_bytes(job: Job) -> int:
    """How large the answer to a job can become."""
    n_prompt_tokens = 0
    if job.echo:
        n_prompt_tokens = job.n * sum(len(request.input_ids) for request in job.requests)
    n_new_tokens = job.n * len(job.requests) * job.sampling.max_new_tokens
    bytes_per_token = TOKEN_BYTES
    if job.sampling.logprobs is not None:
        bytes_per_token += (1 + job.sampling.logprobs) * LOGPROB_BYTES
    total = FRAME_BYTES + job.original_bytes
    total += (n_prompt_tokens + n_new_tokens) * bytes_per_token
    if job.stream:
        total += n_new_tokens * EVENT_BYTES
    return total


def check_answer(job: Job, live: Iterable[Job], settings: ServerSettings) -> None:
    """Raise Refusal if a job's answer is too large, by itself or beside the `live` ones."""
    own = answer_bytes(job)
    if own > settings.max_answer_mb * MB:
        message = f"the answer could have {own / MB:.1f} MB, wanted at most"
        message += f" {settings.max_answer_mb} MB: fewer prompts, tokens or log-probabilities"
        raise Refusal(message)
    if own <= SMALL_ANSWER:
        return
    together = own + sum(map(answer_bytes, live))
    held = java_bytes()
    if together > settings.max_answers_mb * MB or held + own > settings.max_java_mb * MB:
        raise Refusal("the server holds too many large answers; try later", 503)


def java_bytes() -> int:
    """Resident memory of Java, which is this process's parent; 0 where /proc does not tell."""
    try:
        pages = Path(f"/proc/{os.getppid()}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
