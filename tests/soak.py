"""`make soak`: clients of several kinds against a real TorchServe for minutes.

It states the memory of Java and worker, and the slots and requests that are left over.

    python tests/soak.py [--minutes 10] [--clients 64]

Exits with 1 if an answer was wrong or lost, a slot is left, or the memory of a process grew by
more than 5 % between the second fifth of the time and the last.
"""

import argparse
import collections
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from serving import Server, configs, tiny_model

TEXT = "good morning how are you where do you live in a small town by the sea thank you おはよう 😀"
WORDS = TEXT.split()


class Crowd:
    """Clients that ask, leave and err until `until`; `count` says how often each thing happened."""

    def __init__(self, server: Server, until: float):
        self.server = server
        self.until = until
        self.count: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()
        self.slowest: dict[str, float] = {}  # seconds
        self.known: list[tuple[dict[str, object], str]] = []

    def client(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            kind = draw.choice(["greedy", "greedy", "stream", "chat", "leave", "nonsense"])
            begin = time.monotonic()
            try:
                outcome = getattr(self, kind)(draw)
            except Exception as error:
                outcome = f"WRONG {type(error).__name__}: {error}"
            with self.lock:
                self.count[f"{kind}: {outcome}"] += 1
                self.slowest[kind] = max(self.slowest.get(kind, 0), time.monotonic() - begin)
            time.sleep(draw.random() * 0.05)

    def prepare(self) -> None:
        """Greedy answers given alone: what the crowd's must equal."""
        for seed in range(40):
            body = self.body(random.Random(seed)) | {"temperature": 0}
            self.known.append((body, self.server.post("chatlm", body)[1]["response"]))

    def body(self, draw: random.Random) -> dict[str, object]:
        context = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        return {"context": context, "n": 1, "max_tokens": draw.randint(1, 80)}

    def greedy(self, draw: random.Random) -> str:
        body, expected = draw.choice(self.known)
        answer = self.server.post("chatlm", body)[1]
        return "right" if answer["response"] == expected else "WRONG text"

    def stream(self, draw: random.Random) -> str:
        body = self.body(draw) | {"stream": True, "temperature": 1.2}
        events = self.server.events("chatlm", body)
        text = "".join(event.get("token", "") for _, event in events)
        return "right" if text == events[-1][1]["response"] else "WRONG text"

    def chat(self, draw: random.Random) -> str:
        message = {"role": "user", "content": self.body(draw)["context"]}
        body = {"messages": [message], "n": 2, "max_tokens": 20}
        status, answer = self.server.post("chatlm/1.0/v1/chat/completions", body)
        return "right" if status == 200 and len(answer["choices"]) == 2 else f"WRONG {status}"

    def leave(self, draw: random.Random) -> str:
        body = self.body(draw) | {"stream": True, "max_tokens": 100}
        connection, response = self.server.open("chatlm", body)
        response.read1(draw.randint(1, 200))
        response.close()
        connection.close()
        return "left"

    def nonsense(self, draw: random.Random) -> str:
        body = draw.choice(
            [b"{", b"[]", {"context": 1}, {"context": "a", "max_tokens": -1}, {"messages": 3}]
        )
        status, _ = self.server.post("chatlm", body)
        return "refused" if status == 400 else f"WRONG {status}"


def memory(server: Server) -> dict[str, float]:
    """Resident MB by role."""
    roles: dict[str, float] = {}
    for process in server.family():
        line = " ".join(process.cmdline())
        role = "launcher"
        if "model_service_worker" in line:
            role = "worker"
        elif "ModelServer" in line:
            role = "java"
        roles[role] = roles.get(role, 0) + process.memory_info().rss / 2**20
    return roles


def watch(server: Server, until: float) -> list[dict[str, float]]:
    samples = []
    while time.monotonic() < until:
        time.sleep(5)
        samples.append(memory(server))
        seconds = max(until - time.monotonic(), 0)
        rounded = {role: round(megabytes) for role, megabytes in samples[-1].items()}
        print(f"{seconds:4.0f} s left:", rounded, flush=True)
    return samples


def growth(samples: list[dict[str, float]], role: str) -> float:
    """From the second fifth of the samples to the last fifth, as a share; medians."""
    fifth = max(1, len(samples) // 5)
    early = statistics.median_high(sample[role] for sample in samples[fifth : 2 * fifth])
    late = statistics.median_high(sample[role] for sample in samples[-fifth:])
    return late / early - 1


def left_over(server: Server) -> list[str]:
    """The gauges that are not 0, after a round in which the last leavers go."""
    server.post("chatlm", {"context": "last", "n": 1, "max_tokens": 1})
    gauges = [
        line
        for line in server.metrics().splitlines()
        if line.startswith(("gptchat_live", "gptchat_queued"))
    ]
    return [line for line in gauges if not line.endswith(" 0.0")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder, "chatlm"), "chatlm", n_embd=128, n_layer=4)
        # In float32, in which the greedy answers do not depend on the load.
        arguments = ("--configs", str(configs(Path(folder, "configs"))))
        server = Server(Path(folder, "run"), {"chatlm": model}, *arguments).wait_until_ready()
        try:
            crowd = Crowd(server, 0)
            crowd.prepare()
            crowd.until = time.monotonic() + 60 * args.minutes
            threads = [
                threading.Thread(target=crowd.client, args=(seed,)) for seed in range(args.clients)
            ]
            for thread in threads:
                thread.start()
            samples = watch(server, crowd.until)
            for thread in threads:
                thread.join(60)
            left = left_over(server)
        finally:
            server.stop()
    grown = {role: growth(samples, role) for role in samples[0]}
    shares = {role: f"{share:+.1%}" for role, share in grown.items()}
    print(*sorted(f"{count:7d} {what}" for what, count in crowd.count.items()), sep="\n")
    print("slowest, s:", {kind: round(seconds, 1) for kind, seconds in crowd.slowest.items()})
    print("growth:", shares, "| left over:", left or "nothing")
    wrong = any("WRONG" in what for what in crowd.count)
    hanging = any(thread.is_alive() for thread in threads)
    too_large = any(share > 0.05 for share in grown.values())
    return int(wrong or hanging or bool(left) or too_large)


if __name__ == "__main__":
    sys.exit(main())
