"""`make fuzz`: requests drawn from the server's OpenAPI description against a real TorchServe.

    python tests/fuzz.py [--minutes 10] [--seed 0] [--callers 8]

The requests are valid, nearly valid, wrong, binary, huge or deep, with odd paths and headers; the
clients read, leave, dawdle or send half. Every text in them holds a canary. The exit status is 1 on
a finding: an answer that is not 2xx or 4xx in a documented shape (or the documented 503), a valid
body refused or a wrong one taken, a worker replaced, a server that no longer answers, a slot or
request left over, or text of a request, a stack trace or a control character in the log.
The same seed draws the same requests.
"""

import argparse
import collections
import http.client
import json
import re
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemas import Schemas
from serving import Server, tiny_model
from soak import left_over

CANARY = "xkanarix"
SECONDS_TO_ANSWER = 60
JSON = "application/json"
MAX_BODY = 1 << 20  # max_request_size of config.properties
METHODS = ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "X" + CANARY)
ODD_PATHS = (
    "",
    "/",
    "//",
    "/ping",
    "/predictions",
    "/predictions/",
    "/predictions/{name}/",
    "/predictions/{name}/2.0",
    "/predictions/{name}/2.0/v1/models",
    "/predictions/{name}/1.0/v1/models/{canary}",
    "/predictions/{name}/1.0/v1/chat/completions/",
    "/predictions/{name}/1.0/v1//completions",
    "/predictions/{name}/1.0/v1/embeddings",
    "/predictions/{name}/1.0/../1.0/v1/models",
    "/predictions/{canary}",
    "/predictions/{name}?{canary}=1&context=a",
    "/predictions/{name}%0a{canary}%0d%0a%1b[31m",
    "/predictions/{name}/1.0/%0a{canary}",
    "/predictions/{name}/1.0/%00{canary}",
    "/predictions/{name}/1.0/%zz{canary}",
    "/predictions/{name}/1.0/%ff%fe{canary}",
    "/explanations/{name}",
    "/v1/models/{name}:predict",
    "/models/{canary}",
    "/wfpredict/{canary}",
    "/%2e%2e/%2e%2e/{canary}",
    "http://{canary}/predictions/{name}",
    "/" + "{canary}" * 1500,
)
CONTENT_TYPES = (
    None,
    "",
    JSON + "; charset=utf-8",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=" + CANARY,
    "application/json+" + CANARY,
    CANARY,
)
ODD_HEADERS = (
    ("Expect", "100-continue"),
    ("Content-Encoding", "gzip"),
    ("Accept", "text/" + CANARY),
    ("Cookie", CANARY * 50),
    ("X-Long", CANARY * 2000),
    ("Url_path", "v1/" + CANARY),
    ("Origin", "http://" + CANARY),
    ("Connection", "upgrade"),
    ("Range", "bytes=0-1"),
)
MANNERS = ("reads",) * 8 + (
    "leaves",
    "leaves at once",
    "half",
    "dribbles",
    "dawdles",
    "half-closes",
)
ODD_JSON = (
    "null",
    "[]",
    "[[1]]",
    f'"{CANARY}"',
    "1e999",
    "NaN",
    "{",
    "",
    f'{{"context": "{CANARY}" "x"}}',
    f'{{"context": "{CANARY}", "context": 1}}',
    f'{{"context": "{CANARY}", "temperature": NaN}}',
    f'{{"context": "{CANARY}", "temperature": 1e999}}',
    f'{{"context": "{CANARY}", "top_k": 1{"0" * 400}}}',
    f'{{"context": "{CANARY}", "seed": 1{"0" * 5000}}}',
    f'{{"context": "\\ud800{CANARY}"}}',
    f'{{"{CANARY}\\u0000\\n": 1}}',
    '{"context": ' + "[" * 50_000 + "]" * 50_000 + "}",
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    f'{{"context": "{CANARY * 20_000}"}}',
    f'{{"context": "{CANARY * 140_000}"}}',  # above max_request_size
    f'{{"prompt": {json.dumps([CANARY] * 5000)}}}',
    json.dumps({"messages": [{"role": "user", "content": CANARY}] * 2000}),
)

NEVER_LOGGED = {
    "text of a request": CANARY,
    "a stack trace": r"Traceback|^\s+at [\w.$/]+\(|^(Caused by: )?[\w.]+Exception\b",
    "a control character": r"[\x00-\x08\x0b-\x1f\x7f]",
}


@dataclass(frozen=True)
class Probe:
    """One request: what is sent and how, and what is expected of the answer.

    `expected` is "valid" (a body that fits the schema), "wrong" (one that does not) or "any".
    """

    kind: str
    method: str
    path: str
    body: bytes = b""
    content_type: str | None = JSON
    header: tuple[str, str] | None = None
    manner: str = "reads"
    expected: str = "any"
    answer: str = ""  # the name of the answer's schema

    @property
    def raw(self) -> bytes:
        """What goes over the wire."""
        if self.kind == "garbage":
            return self.body
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
        if self.content_type is not None:
            lines.append(f"Content-Type: {self.content_type}")
        if self.header:
            lines.append(": ".join(self.header))
        if self.body or self.method == "POST":
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + self.body


@dataclass(frozen=True)
class Finding:
    what: str
    probe: Probe | None = None

    def __str__(self) -> str:
        if self.probe is None:
            return self.what
        shown = replace(self.probe, body=self.probe.body[:300])
        return f"{self.what}\n    {shown!r:.1500}"


# --- drawing requests


def texts() -> st.SearchStrategy[str]:
    """Texts with the canary, of any characters, now and then long."""
    return st.builds(
        lambda text, times: (CANARY + text) * times,
        st.text(max_size=12),
        st.sampled_from([1, 1, 1, 1, 3, 100]),
    )


def scalars() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(),
        texts(),
        st.just("\ud800" + CANARY),
        st.just([]),
        st.just({CANARY: {}}),
        st.just([[CANARY]]),
        st.just({"include_usage": CANARY, CANARY: 1}),
    )


class Drawer:
    """Draws probes from a model's description."""

    def __init__(self, name: str, description: dict[str, Any]):
        self.name = name
        self.schemas = Schemas(description, texts())
        self.posts: dict[str, tuple[str, str]] = {}  # path -> names of its request and answer
        self.gets: dict[str, str] = {}  # path -> the name of its answer
        for path, methods in description["paths"].items():
            for method, operation in methods.items():
                content = operation["responses"]["200"]["content"]
                if method == "post":
                    body = operation["requestBody"]["content"][JSON]["schema"]
                    answer = content[JSON]["schema"]
                    self.posts[path] = name_of(body), name_of(answer)
                elif JSON in content:
                    self.gets[path] = name_of(content[JSON]["schema"])

    def probes(self) -> st.SearchStrategy[Probe]:
        return st.one_of(
            self.bodies("valid"),
            self.bodies("valid"),
            self.bodies("nearly"),
            self.bodies("nearly"),
            self.odd_bodies(),
            self.odd_paths(),
            self.known_gets(),
            st.binary(min_size=1, max_size=200).map(
                lambda raw: Probe("garbage", "", "", raw + CANARY.encode() + b"\r\n\r\n")
            ),
        )

    @st.composite
    @staticmethod
    def _body(draw: st.DrawFn, drawer: "Drawer", kind: str) -> Probe:
        path = draw(st.sampled_from(sorted(drawer.posts)))
        request, answer = drawer.posts[path]
        schema = drawer.schemas.named[request]
        body = draw(drawer.schemas.objects(schema))
        if kind == "nearly":
            names = [*schema["properties"], CANARY, "max_token"]
            body[draw(st.sampled_from(names))] = draw(scalars())
            for name in draw(st.lists(st.sampled_from(names), max_size=1)):
                body.pop(name, None)
        expected = "valid"
        if not drawer.schemas.fits(schema, body):
            expected = "wrong"
        elif kind == "nearly":  # two names of one setting, half a surrogate
            expected = "any"
        return Probe(
            kind=kind,
            method="POST",
            path=path,
            body=json.dumps(body).encode(),
            manner=draw(st.sampled_from(MANNERS)),
            expected=expected,
            answer=answer,
        )

    def bodies(self, kind: str) -> st.SearchStrategy[Probe]:
        return self._body(self, kind)

    def odd_bodies(self) -> st.SearchStrategy[Probe]:
        """Binary and broken JSON, other content types, odd headers."""
        good = json.dumps({"context": CANARY + "%0a%zz\x1b[31m\n", "n": 1}, ensure_ascii=False)
        form = f"context={CANARY}%zz%0a&%%%{CANARY}=%"
        contents = st.one_of(
            st.sampled_from(ODD_JSON).map(str.encode),
            st.binary(max_size=300).map(lambda raw: raw + CANARY.encode()),
            st.sampled_from([good.encode(), form.encode(), b"\x1f\x8b" + good.encode()]),
        )
        return st.builds(
            Probe,
            kind=st.just("odd body"),
            method=st.sampled_from(["POST", "POST", "POST", "PUT"]),
            path=st.sampled_from(sorted(self.posts)),
            body=contents,
            content_type=st.sampled_from([JSON, JSON, *CONTENT_TYPES]),
            header=st.none() | st.sampled_from(ODD_HEADERS),
            manner=st.sampled_from(MANNERS),
        )

    def odd_paths(self) -> st.SearchStrategy[Probe]:
        odd = [path.format(name=self.name, canary=CANARY) for path in ODD_PATHS]
        return st.builds(
            Probe,
            kind=st.just("odd path"),
            method=st.sampled_from(["GET", "POST", *METHODS]),
            path=st.sampled_from(odd + sorted(self.posts) + sorted(self.gets)),
            body=st.sampled_from([b"", json.dumps({"context": CANARY}).encode()]),
            content_type=st.sampled_from([JSON, *CONTENT_TYPES]),
            header=st.none() | st.sampled_from(ODD_HEADERS),
        )

    def catalogue(self) -> list[Probe]:
        """Each odd body, path, content type and header once."""
        path = f"/predictions/{self.name}"
        plain = Probe("listed", "POST", path, json.dumps({"context": CANARY, "n": 1}).encode())
        probes = [replace(plain, body=text.encode()) for text in ODD_JSON]
        probes += [replace(plain, content_type=name) for name in CONTENT_TYPES]
        probes += [replace(plain, header=header) for header in ODD_HEADERS]
        probes += [replace(plain, method=method) for method in METHODS]
        probes += [replace(plain, manner=manner) for manner in sorted(set(MANNERS))]
        for odd in ODD_PATHS:
            odd = odd.format(name=self.name, canary=CANARY)
            probes += [replace(plain, path=odd), Probe("listed", "GET", odd)]
        form = "application/x-www-form-urlencoded"
        probes.append(replace(plain, content_type=form, body=f"a={CANARY}%zz&%%0a=%".encode()))
        probes.append(replace(plain, content_type="text/plain", body=b"\xff" + CANARY.encode()))
        return probes

    def known_gets(self) -> st.SearchStrategy[Probe]:
        return st.sampled_from(sorted(self.gets.items())).map(
            lambda item: Probe("get", "GET", item[0], expected="valid", answer=item[1])
        )


def name_of(schema: dict[str, str]) -> str:
    return schema["$ref"].rpartition("/")[2]


# --- sending them


@dataclass
class Reply:
    """What came back, as far as the client read it; `status` 0: nothing."""

    status: int = 0
    content_type: str = ""
    body: bytes = b""
    whole: bool = False


def send(port: int, probe: Probe) -> Reply | None:
    """Send a probe in its manner; None if the client left. Raises TimeoutError."""
    raw, manner = probe.raw, probe.manner
    patience = SECONDS_TO_ANSWER
    if probe.kind == "garbage":  # TorchServe may wait for more of it
        patience = 1
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        try:
            write(connection, raw, manner)
            if manner == "half-closes":
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before it was read to its end; the answer may be there
        if manner in ("half", "leaves at once"):
            return None
        try:
            return read(connection, probe)
        except TimeoutError:
            if probe.kind != "garbage":
                raise
            return Reply()


def write(connection: socket.socket, raw: bytes, manner: str) -> None:
    if manner == "half":
        raw = raw[: len(raw) // 2]
    if manner == "dribbles" and len(raw) < 4000:
        for start in range(0, len(raw), 200):
            connection.sendall(raw[start : start + 200])
            time.sleep(0.01)
    else:
        connection.sendall(raw)


def read(connection: socket.socket, probe: Probe) -> Reply | None:
    """Read an answer as the probe's client does. Raises TimeoutError."""
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    reply = Reply()
    slow = probe.manner in ("leaves", "dawdles")
    try:
        response = http.client.HTTPResponse(connection, method=probe.method)
        response.begin()
        reply.status = response.status
        reply.content_type = response.headers.get("content-type", "")
        while chunk := response.read1(100 if slow else 65536):
            reply.body += chunk
            if time.monotonic() > deadline:
                raise TimeoutError
            if probe.manner == "leaves":
                return None
            if slow and len(reply.body) < 5000:
                time.sleep(0.02)
        reply.whole = not response.length  # of Content-Length, what is missing
    except (http.client.HTTPException, ConnectionError, ValueError):
        pass
    return reply


# --- judging the answers


def judge(schemas: Schemas, probe: Probe, reply: Reply) -> str:
    """What is wrong with an answer that a client has read; "" if nothing is."""
    if reply.status == 0:
        lost = probe.kind == "garbage" or probe.manner == "half-closes" or probe.header
        too_large = len(probe.raw) > MAX_BODY or len(probe.path) > 4000
        odd_path = not probe.path.startswith("/predictions/") or "%" in probe.path
        return "" if lost or too_large or odd_path else "no answer"
    if not reply.whole:
        if probe.manner == "half-closes":  # TorchServe takes it for a client that has left
            return ""
        return f"an answer cut short, status {reply.status}"
    if reply.status == 500 and is_form(probe) and b"DecoderException" in reply.body:
        return ""  # documented: TorchServe's own answer to a broken form, before any worker
    if not (200 <= reply.status < 500 or reply.status == 503 or reply.status == 100):
        return f"status {reply.status}: {reply.body[:200]!r}"
    if reply.status >= 400:
        return error_problem(schemas, probe, reply)
    if probe.expected == "wrong":
        return f"a wrong body got status {reply.status}"
    if probe.expected == "valid":
        return answer_problem(schemas, probe, reply)
    return ""


def is_form(probe: Probe) -> bool:
    forms = ("application/x-www-form-urlencoded", "multipart/form-data")
    return (probe.content_type or "").startswith(forms)


def error_problem(schemas: Schemas, probe: Probe, reply: Reply) -> str:
    if probe.method == "HEAD" or not probe.path.startswith("/predictions/"):
        return ""  # TorchServe's own pages
    if reply.status == 413:
        return "" if len(probe.body) > MAX_BODY else "a 413 for a small body"
    try:
        body = json.loads(reply.body)
    except ValueError:
        return f"a {reply.status} without JSON: {reply.body[:100]!r}"
    names = ("Error", "TorchServeError") if reply.status < 500 else ("Error",)
    options = {"anyOf": [schemas.named[name] for name in names]}
    problem = schemas.problem(options, body)
    if not problem and probe.expected == "valid" and reply.status != 503:
        error = body.get("error", {})
        may_refuse = error.get("code") == "context_length_exceeded" or error.get("param") == "n"
        problem = "" if may_refuse else "a valid body was refused"
    return f"{problem}, status {reply.status}: {reply.body[:200]!r}" if problem else ""


def answer_problem(schemas: Schemas, probe: Probe, reply: Reply) -> str:
    body = reply.body
    if reply.content_type == "text/event-stream":
        events = body.decode().split("\n\n")
        if events[-2:] != ["data: [DONE]", ""]:
            return f"a stream without its end: {body[-100:]!r}"
        parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        return "an error within a stream" if any("error" in event for event in parsed) else ""
    try:
        return schemas.problem(schemas.named[probe.answer], json.loads(body), "answer")
    except ValueError:
        return f"a {reply.status} without JSON: {body[:100]!r}"


def log_findings(log: str) -> list[Finding]:
    """Text of requests, stack traces and control characters in the log: a finding for each kind."""
    lines_of = collections.defaultdict(list)
    for number, line in enumerate(log.split("\n"), 1):
        for what, pattern in NEVER_LOGGED.items():
            if re.search(pattern, line):
                lines_of[what].append(f"line {number}: {line[:300]!r}")
    return [
        Finding(f"log: {what} in {len(lines)} lines, the first is {lines[0]}")
        for what, lines in lines_of.items()
    ]


class Fuzz:
    """Sends probes to a server and gathers what happened."""

    def __init__(self, server: Server, names: list[str], seed: int, callers: int):
        self.server = server
        self.seed = seed
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.slowest: dict[str, float] = {}  # seconds, by kind
        self.findings: list[Finding] = []
        self.lock = threading.Lock()
        self.pids = self.worker_pids()
        self.pool = ThreadPoolExecutor(callers)
        self.callers = callers
        self.drawers = {}
        for name in names:
            _, description = server.post(f"{name}/1.0/v1/openapi.json", method="GET")
            self.drawers[name] = Drawer(name, description)

    def worker_pids(self) -> set[int]:
        return {process.pid for process in self.server.workers()}

    def one(self, drawer: Drawer, probe: Probe) -> None:
        begin, problem, status = time.monotonic(), "", "left"
        try:
            reply = send(self.server.port, probe)
            if reply:
                problem = judge(drawer.schemas, probe, reply)
                status = str(reply.status or "closed")
        except TimeoutError:
            problem = f"no answer within {SECONDS_TO_ANSWER} s"
        except OSError as error:
            problem = f"{type(error).__name__} after {time.monotonic() - begin:.1f} s"
        seconds = time.monotonic() - begin
        with self.lock:
            self.counts[probe.kind, "FINDING" if problem else status] += 1
            self.slowest[probe.kind] = max(self.slowest.get(probe.kind, 0), seconds)
            if problem:
                self.findings.append(Finding(problem, probe))

    def batch(self, drawer: Drawer, probes: list[Probe]) -> None:
        """Send probes at the same time; then the same workers must answer as ever."""
        list(self.pool.map(lambda probe: self.one(drawer, probe), probes))
        if self.worker_pids() != self.pids:
            self.findings.append(Finding("a worker was replaced", probes[-1]))
            self.pids = self.worker_pids()
        plain = Probe("check", "POST", f"/predictions/{drawer.name}", b'{"context": "a", "n": 1}')
        self.one(drawer, replace(plain, expected="valid", answer="OriginalAnswer"))

    def run(self, examples: int, until: float = float("inf")) -> None:
        """Send each model the catalogue, then draw batches, `examples` at a time, until the time
        is up."""
        for drawer in self.drawers.values():
            probes = drawer.catalogue()
            for start in range(0, len(probes), self.callers):
                self.batch(drawer, probes[start : start + self.callers])
        round = 0
        while round == 0 or time.monotonic() < until:
            for drawer in self.drawers.values():
                self._draw(drawer, examples, until, round)
            round += 1
            if until == float("inf"):
                return

    def _draw(self, drawer: Drawer, examples: int, until: float, round: int) -> None:
        batches = st.lists(drawer.probes(), min_size=self.callers, max_size=2 * self.callers)

        @hypothesis.seed(self.seed * 1_000_003 + round)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(batches)
        def send_batch(probes: list[Probe]) -> None:
            if time.monotonic() < until and len(self.findings) < 200:
                self.batch(drawer, probes)

        send_batch()

    def finish(self) -> list[Finding]:
        """All findings, with what is left over and what the log holds."""
        self.pool.shutdown()
        deadline = time.monotonic() + 30
        while (left := left_over(self.server)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.findings += [Finding(f"left over: {line}") for line in left]
        return self.findings + log_findings(self.server.log.read_text(errors="replace"))

    def table(self) -> str:
        """How often each kind of request had each outcome."""
        outcomes = sorted({outcome for _, outcome in self.counts})
        lines = ["".join(f"{word:>9}" for word in ["", *outcomes, "slowest"])]
        for kind in sorted({kind for kind, _ in self.counts}):
            numbers = [self.counts[kind, outcome] for outcome in outcomes]
            counted = "".join(f"{number:9d}" for number in numbers)
            lines.append(f"{kind:>9}{counted}{self.slowest[kind]:7.1f} s")
        return "\n".join(lines)


def start_server(folder: Path) -> Server:
    """A server of two tiny models, `chatlm` and `lm`."""
    models = {task: tiny_model(folder / task, task) for task in ("chatlm", "lm")}
    return Server(folder / "run", models).wait_until_ready()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--callers", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(Path(folder))
        try:
            fuzz = Fuzz(server, ["chatlm", "lm"], args.seed, args.callers)
            fuzz.run(examples=50, until=time.monotonic() + 60 * args.minutes)
            findings = fuzz.finish()
        finally:
            server.stop()
    print(fuzz.table())
    for text, number in collections.Counter(map(str, findings)).most_common(60):
        print(f"FINDING ({number} times): {text}")
    print(f"{sum(fuzz.counts.values())} requests, {len(findings)} findings, seed {args.seed}")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
