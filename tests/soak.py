"""`make soak`: ragged clients against a real TorchServe for minutes; memory of Java and worker, slots and jobs, stated.

    python tests/soak.py [--minutes 10] [--clients 64]

Exits with 1 if an answer was wrong or lost, a slot is left, or the memory of a process grew by more than 5 % between
the second fifth of the time and the last.
"""

import argparse
import collections
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from serving import Server, tiny_model

WORDS = "good morning how are you where do you live in a small town by the sea thank you おはよう 😀".split()


class Crowd:
    """Clients that ask, leave and err until `until`; `count` says how often each thing happened."""

    def __init__(self, server: Server, until: float):
        self.server, self.until, self.count, self.lock = (
            server,
            until,
            collections.Counter(),
            threading.Lock(),
        )
        self.slowest: dict[str, float] = {}  # seconds
        self.known: list[tuple[dict[str, object], str]] = []

    def client(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            kind, begin = (
                draw.choice(["greedy", "greedy", "stream", "chat", "leave", "nonsense"]),
                time.monotonic(),
            )
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
        return (
            "right" if self.server.post("chatlm", body)[1]["response"] == expected else "WRONG text"
        )

    def stream(self, draw: random.Random) -> str:
        events = self.server.events(
            "chatlm", self.body(draw) | {"stream": True, "temperature": 1.2}
        )
        text = "".join(event.get("token", "") for _, event in events)
        return "right" if text == events[-1][1]["response"] else "WRONG text"

    def chat(self, draw: random.Random) -> str:
        message = {"role": "user", "content": self.body(draw)["context"]}
        status, answer = self.server.post(
            "chatlm/1.0/v1/chat/completions", {"messages": [message], "n": 2, "max_tokens": 20}
        )
        return "right" if status == 200 and len(answer["choices"]) == 2 else f"WRONG {status}"

    def leave(self, draw: random.Random) -> str:
        connection, response = self.server.open(
            "chatlm", self.body(draw) | {"stream": True, "max_tokens": 100}
        )
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
        role = (
            "worker"
            if "model_service_worker" in line
            else "java"
            if "ModelServer" in line
            else "launcher"
        )
        roles[role] = roles.get(role, 0) + process.memory_info().rss / 2**20
    return roles


def watch(server: Server, until: float) -> list[dict[str, float]]:
    samples = []
    while time.monotonic() < until:
        time.sleep(5)
        samples.append(memory(server))
        print(
            f"{max(until - time.monotonic(), 0):4.0f} s left:",
            {k: round(v) for k, v in samples[-1].items()},
            flush=True,
        )
    return samples


def growth(samples: list[dict[str, float]], role: str) -> float:
    """From the second fifth of the samples to the last fifth, as a share; medians."""
    fifth = max(1, len(samples) // 5)
    early, late = (
        sorted(s[role] for s in part)[len(part) // 2]
        for part in (samples[fifth : 2 * fifth], samples[-fifth:])
    )
    return late / early - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder, "chatlm"), "chatlm", n_embd=128, n_layer=4)
        server = Server(Path(folder, "run"), {"chatlm": model}).wait_until_ready()
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
            server.post(
                "chatlm", {"context": "last", "n": 1, "max_tokens": 1}
            )  # a round, in which the last leavers go
            left = [
                line
                for line in server.metrics().splitlines()
                if line.startswith(("gptchat_live", "gptchat_queued")) and not line.endswith(" 0.0")
            ]
        finally:
            server.stop()
    grown = {role: growth(samples, role) for role in samples[0]}
    print(*sorted(f"{count:7d} {what}" for what, count in crowd.count.items()), sep="\n")
    print("slowest, s:", {kind: round(seconds, 1) for kind, seconds in crowd.slowest.items()})
    print(
        "growth:",
        {role: f"{share:+.1%}" for role, share in grown.items()},
        "| left over:",
        left or "nothing",
    )
    wrong = any("WRONG" in what for what in crowd.count) or any(
        thread.is_alive() for thread in threads
    )
    return int(wrong or bool(left) or any(share > 0.05 for share in grown.values()))


if __name__ == "__main__":
    sys.exit(main())
