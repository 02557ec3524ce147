"""`make soak`: clients against a real TorchServe for minutes, and the memory of its processes.

    python tests/soak.py [--minutes 10] [--clients 64]

Exits with 1 if an answer was wrong or lost, a slot is left, or the memory of Java or a worker grew
by more than 5 % between the second fifth of the time and the last.
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

WORDS = "good morning how are you where do you live in a small town by the sea おはよう 😀".split()


def body(draw: random.Random) -> dict[str, object]:
    context = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
    return {"context": context, "n": 1, "max_tokens": draw.randint(1, 80), "temperature": 0}


def ask(server: Server, draw: random.Random, known: list[tuple[dict, str]]) -> str:
    """One request of some kind; what came of it."""
    kind = draw.choice(["whole", "stream", "leave", "nonsense"])
    asked, expected = draw.choice(known)
    if kind == "whole":
        right = server.post("chatlm", asked)[1]["response"] == expected
    elif kind == "stream":
        events = server.events("chatlm", asked | {"stream": True})
        right = "".join(event.get("token", "") for _, event in events) == expected
    elif kind == "leave":
        connection, response = server.open("chatlm", asked | {"stream": True})
        response.read1(draw.randint(1, 200))
        response.close()
        connection.close()
        right = response.status == 200
    else:
        right = server.post("chatlm", {"context": 1})[0] == 400
    return kind if right else f"WRONG {kind}"


def client(
    server: Server, seed: int, until: float, known: list, count: collections.Counter
) -> None:
    draw = random.Random(seed)
    while time.monotonic() < until:
        try:
            outcome = ask(server, draw, known)
        except Exception as error:
            outcome = f"WRONG {error!r}"
        count[outcome] += 1


def memory(server: Server) -> dict[str, float]:
    """Resident MB of Java and worker."""
    (java,) = [p for p in server.family() if "ModelServer" in " ".join(p.cmdline())]
    (worker,) = server.workers()
    return {"java": java.memory_info().rss / 2**20, "worker": worker.memory_info().rss / 2**20}


def left_over(server: Server) -> list[str]:
    """The gauges that are not 0, after a round in which the last leavers go."""
    server.post("chatlm", {"context": "last", "n": 1, "max_tokens": 1})
    gauges = ("gptchat_live", "gptchat_queued")
    lines = [line for line in server.metrics().splitlines() if line.startswith(gauges)]
    return [line for line in lines if not line.endswith(" 0.0")]


def soak(server: Server, minutes: float, clients: int) -> bool:
    known = []
    for seed in range(40):
        asked = body(random.Random(seed))
        known.append((asked, server.post("chatlm", asked)[1]["response"]))
    count: collections.Counter[str] = collections.Counter()
    until = time.monotonic() + 60 * minutes
    threads = [
        threading.Thread(target=client, args=(server, seed, until, known, count))
        for seed in range(clients)
    ]
    for thread in threads:
        thread.start()
    samples = []
    while time.monotonic() < until:
        time.sleep(5)
        samples.append(memory(server))
    for thread in threads:
        thread.join(60)
    left = left_over(server)
    fifth = max(1, len(samples) // 5)
    growth = {}
    for role in samples[0]:
        early, late = samples[fifth : 2 * fifth], samples[-fifth:]
        before, after = [statistics.median(s[role] for s in part) for part in (early, late)]
        growth[role] = after / before - 1
        print(f"{role}: {before:.0f} MB, then {after:.0f} MB")
    print(dict(count), "left over:", left)
    hanging = any(thread.is_alive() for thread in threads)
    wrong = any("WRONG" in outcome for outcome in count)
    return not (hanging or wrong or left or max(growth.values()) > 0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder, "chatlm"), "chatlm", n_embd=128, n_layer=4)
        # In float32, in which greedy answers do not depend on the load.
        settings = configs(Path(folder, "configs"))
        server = Server(Path(folder, "run"), {"chatlm": model}, "--configs", str(settings))
        try:
            return int(not soak(server.wait_until_ready(), args.minutes, args.clients))
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
