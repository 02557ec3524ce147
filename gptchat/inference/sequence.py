"""What the engine keeps of a request: in the queue, and of each candidate that it decodes."""

from dataclasses import dataclass, field

from gptchat.inference.draw import Scored
from gptchat.inference.request import Ids, Output, Request
from gptchat.inference.sampling import Row


@dataclass
class Sequence(Row):
    """One candidate of a request. `ids` are its prompt and what has been drawn."""

    request_id: int
    request: Request
    max_length: int  # of ids, prompt and answer together

    @property
    def cached(self) -> tuple[Ids, Ids]:
        """Ids and types of what is in the cache; no types where the request has none."""
        ids, types = self.ids[:-1], list(self.request.types)
        types += types[-1:] * (len(ids) - len(types))  # of the drawn ids
        return ids, types[: len(ids)]


@dataclass
class QueuedRequest:
    """A request in the queue, and the sequences that it will become, which share a prefill."""

    request: Request
    sequences: list[Sequence]
    n_prefilled: int = 0  # tokens of its prompt in the cache
    n_cached: int = 0  # of these, the ones that were there before it
    prompt_logprobs: list[Scored] = field(default_factory=list)

    @property
    def is_prefilled(self) -> bool:
        return self.n_prefilled == len(self.request.input_ids)

    def next_chunk(self, size: int) -> tuple[Ids, Ids]:
        """Ids and types of the next prompt tokens, at most `size`; () for no types."""
        chunk = slice(self.n_prefilled, self.n_prefilled + size)
        return self.request.input_ids[chunk], self.request.types[chunk]


def accept(sequence: Sequence, drawn: Scored) -> Output:
    """Append the drawn token to its sequence, unless that has ended."""
    output = Output(sequence.request_id, sequence.candidate)
    if len(sequence.ids) >= sequence.max_length:  # max_new_tokens is 0
        output.finish_reason = "length"
    elif drawn.token < 0 or drawn.token in sequence.request.stop_ids:
        output.finish_reason = "stop"
        if drawn.token >= 0:
            output.logprob = drawn.logprob
    else:
        sequence.ids.append(drawn.token)
        output.token, output.logprob, output.top = drawn
        if len(sequence.ids) >= sequence.max_length:
            output.finish_reason = "length"
    return output
