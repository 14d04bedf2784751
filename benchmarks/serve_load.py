"""The server under load: many clients at once, rude ones among them, and every answer compared with its solo run.

usage: python benchmarks/serve_load.py [--clients 64] [--seconds 120] [--machine SLUG] [--out FILE]

`leadline serve` runs in a process of its own, with a tiny random model, in batch-invariant mode. First the questions:
for each, an engine in this process works out the answer alone and with a cold cache. Then clients ask them at random,
on a connection of their own each time, one behind the other. Prompts share beginnings, pages are so few that running
sequences push each other out, there are more clients than places, and some clients do not behave:

- they hang up after some tokens, before the first one, or in the middle of what they send;
- they read slowly, or one event and then nothing for a while;
- they send what is no JSON, no text or no request, prompts and bodies that are too large, or a wrong key.

At the end: *wrong* counts answers that differ in a character of the text or in a bit of a token's log-probability, also
those of which a client saw only the beginning, and replies with another status than the one due. *Leaked* counts slots
that are not free and pages that only a sequence can hold, once nothing runs any more; then one prompt asks for all
pages there are, and gets them only if nobody holds one. *Growth* is the resident memory of the server at the end,
above that after a quarter of the time. Server and clients share the machine; each computes with one thread. Linux only.

The result is one JSON object, as `tools/readme.py` wants it, in `benchmarks/results/<machine>/serve_load.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h11
import torch
from machine import commit, machine_slug, processor
from prometheus_client.parser import text_string_to_metric_families

from leadline.engine.engine import Engine, Settings
from leadline.engine.request import Request, Sampling, ThinkingBudget
from leadline.model.config import TINY
from leadline.model.transformer import Transformer
from leadline.serve.reply import PlainText
from leadline.text.chat import Mode, render
from leadline.text.events import message_of
from leadline.text.parse import TokenParser
from leadline.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from leadline.text.tools import DSML, THINK_END
from leadline.weights.load import load_checkpoint
from leadline.weights.save import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6

CONTEXT, PAGES = 3072, 24  # one sequence can have all pages
BODY_MIB = 1
KEYS = tuple(f"sk-load-{letter * 20}" for letter in "abc")
PATIENCE_S = 60.0
"""What a client waits for the next byte at most, and what the server has to come to rest."""
MOST_GROWTH_BYTES = 32 * MB
"""The allocator alone moves the figure by 20 MB up and down."""

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "rests", "né", "深い")


class LoadError(ValueError):
    """The load test cannot go on; the message says what was found."""


@dataclass(frozen=True)
class Load:
    """How much is asked of the server. slots, queue: its places."""

    clients: int = 64
    seconds: float = 120.0
    questions: int = 96
    slots: int = 16
    queue: int = 32
    seed: int = 0


# -- the model and the questions -----------------------------------------------------------------------------------


def write_checkpoint(folder: Path) -> Path:
    """A tiny model with random weights, large enough that its answers vary; returns its folder."""
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 20, 256 + len(SPECIAL_TOKENS) + 100)
    tokenizer.save(folder / "tokenizer")
    config = TINY.replace(vocab_size=tokenizer.vocab_size)
    model, generator = Transformer(config), torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.random_(0, config.n_routed_experts, generator=generator)
        elif "norm" in name:
            tensor.uniform_(0.8, 1.2, generator=generator)
        else:
            tensor.normal_(0, 0.3, generator=generator)
    save_checkpoint(model, config, folder / "model", tokenizer_files=sorted((folder / "tokenizer").iterdir()))
    return folder / "model"


@dataclass(frozen=True)
class Answer:
    """What a client can see of an answer. logprobs: of its tokens, in order, without those that have no text."""

    reasoning: str
    content: str
    logprobs: tuple[float, ...]
    finish: str


@dataclass(frozen=True)
class Question:
    """A request body, and the answer that is due."""

    path: str
    body: dict[str, Any]
    answer: Answer


def ask_alone(folder: Path, count: int, seed: int) -> list[Question]:
    """Questions and their answers, each from an engine that serves nothing else and knows no prefix."""
    rng = random.Random(seed)
    tokenizer = Tokenizer.load(folder)
    engine = Engine(load_checkpoint(folder), Settings(slots=1, pages=PAGES, max_tokens=CONTEXT, batch_invariant=True))
    beginnings = [_text(rng, words) for words in (30, 150, 300)]
    make = [_conversation, _continuation]
    return [make[number % 2](engine, tokenizer, beginnings, rng, number) for number in range(count)]


def _conversation(
    engine: Engine, tokenizer: Tokenizer, beginnings: Sequence[str], rng: random.Random, number: int
) -> Question:
    mode: Mode = rng.choice(("non-think", "high"))
    max_tokens, temperature, budget = _most_tokens(rng, number), rng.choice((0.0, 1.0)), rng.randint(1, 12)
    messages = [{"role": "system", "content": rng.choice(beginnings)}, {"role": "user", "content": _text(rng, 8)}]
    prompt = render(messages, mode)
    bias = {tokenizer.token_id(DSML): float("-inf")}  # as the server does where there are no tools
    thinking = ThinkingBudget(budget, tokenizer.token_id(THINK_END)) if mode == "high" else None
    sampling = Sampling(temperature, seed=number, logprobs=0, logit_bias=bias)
    stops = frozenset({tokenizer.eos_id})
    request = Request(
        tuple(prompt.ids(tokenizer)), max_tokens, sampling, stops, thinking=thinking, namespace=f"alone {number}"
    )
    assert prompt.opens is not None
    body = {
        "messages": messages,
        "reasoning_effort": {"non-think": "none", "high": "high"}[mode],
        "thinking_budget": budget,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": number,
        "logprobs": True,
    }
    return Question(CHAT_PATH, body, _alone(engine, tokenizer, request, TokenParser(tokenizer, prompt.opens)))


def _continuation(
    engine: Engine, tokenizer: Tokenizer, beginnings: Sequence[str], rng: random.Random, number: int
) -> Question:
    ids = [tokenizer.bos_id, *tokenizer.encode(f"{rng.choice(beginnings)} {_text(rng, 4)}")]
    max_tokens, temperature = _most_tokens(rng, number), rng.choice((0.0, 1.0))
    sampling = Sampling(temperature, seed=number, logprobs=0)
    request = Request(tuple(ids), max_tokens, sampling, frozenset({tokenizer.eos_id}), namespace=f"alone {number}")
    body = {"prompt": ids, "max_tokens": max_tokens, "temperature": temperature, "seed": number, "logprobs": 0}
    return Question(TEXT_PATH, body, _alone(engine, tokenizer, request, PlainText(tokenizer)))


def _alone(engine: Engine, tokenizer: Tokenizer, request: Request, parser: TokenParser | PlainText) -> Answer:
    engine.submit(request)
    events: list[Any] = []
    logprobs: list[float] = []
    finish = ""
    while engine.busy:
        for event in engine.step():
            events += parser.feed([token.id for token in event.tokens])
            seen = [token for token in event.tokens if tokenizer.token_bytes(token.id)]
            logprobs += [token.logprob for token in seen if token.logprob is not None]
            finish = event.finish.value if event.finish else finish
    message: dict[str, Any] = {**message_of(events + parser.finish())}
    return Answer(message.get("reasoning_content") or "", message["content"], tuple(logprobs), finish)


def _most_tokens(rng: random.Random, number: int) -> int:
    """Some answers take several pages more than there were when they began."""
    return rng.randint(1, 40) if number % 16 < 14 else rng.randint(200, 400)


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


# -- the server ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    host: str
    port: int
    pid: int

    @property
    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="utf8").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running_server(folder: Path, scratch: Path, load: Load) -> Iterator[Server]:
    """`leadline serve` on a free loopback port; it must end by itself when it is asked to."""
    (scratch / "keys").write_text("\n".join(KEYS) + "\n", encoding="utf8")
    settings = {
        "port": 0,
        "slots": load.slots,
        "queue": load.queue,
        "context": CONTEXT,
        "pages": PAGES,
        "body_mib": BODY_MIB,
        "batch_invariant": "yes",
        "api_key_file": scratch / "keys",
        "grace": 5,
    }
    command = [sys.executable, "-m", "leadline", "serve", str(folder), *(f"{k}={v}" for k, v in settings.items())]
    log = scratch / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            host, port = _address(process, log)
            yield Server(host, port, process.pid)
            process.terminate()
            status = process.wait(PATIENCE_S)
        finally:
            process.kill()
    if status not in (0, -signal.SIGTERM):  # uvicorn ends in order, and then by the signal that it was sent
        raise LoadError(f"the server ended with status {status}: {log.read_text(encoding='utf8')[-2000:]}")


def _address(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if match := re.search(r"^serving model at http://([\d.]+):(\d+)/v1$", log.read_text(encoding="utf8"), re.M):
            return match[1], int(match[2])
        time.sleep(0.05)
    raise LoadError(f"the server did not start: {log.read_text(encoding='utf8')[-2000:]}")


# -- one request ---------------------------------------------------------------------------------------------------


class Connection:
    """One request on a connection of its own, which can be broken off anywhere."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._server, self._reader, self._writer = server, reader, writer
        self._http = h11.Connection(h11.CLIENT)

    async def send(self, method: str, path: str, key: str, data: bytes = b"", most: int | None = None) -> None:
        """Send a request; with `most`, only so many bytes of its body."""
        headers = {
            "host": f"{self._server.host}:{self._server.port}",
            "authorization": f"Bearer {key}",
            "content-type": "application/json",
            "content-length": str(len(data)),
            "connection": "close",
        }
        wire = self._http.send(h11.Request(method=method, target=path, headers=list(headers.items()))) or b""
        wire += self._http.send(h11.Data(data=data[:most])) or b""
        if most is None:
            wire += self._http.send(h11.EndOfMessage()) or b""
        self._writer.write(wire)
        await self._writer.drain()

    async def response(self) -> tuple[int, dict[str, str]]:
        """Status and headers."""
        response = await self._next()
        if not isinstance(response, h11.Response):
            raise ConnectionError("the server hung up without an answer")
        return response.status_code, {name.decode(): value.decode() for name, value in response.headers}

    async def parts(self) -> AsyncIterator[bytes]:
        """The body of the response, as it comes."""
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)
        if not isinstance(event, h11.EndOfMessage):
            raise ConnectionError("the server hung up in the middle of an answer")

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def events(self) -> AsyncIterator[str]:
        """Data of the server-sent events."""
        rest = b""
        async for part in self.parts():
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event.removeprefix(b"data: ").decode()

    async def _next(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await asyncio.wait_for(self._reader.read(2**16), PATIENCE_S))
        return event


@asynccontextmanager
async def connect(server: Server) -> AsyncIterator[Connection]:
    """A connection; it is closed at the end, whatever is still under way."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        yield Connection(server, reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):  # the server was first
            await writer.wait_closed()


async def figures(server: Server) -> dict[str, float]:
    """The server's metrics that have no labels of their own."""
    async with connect(server) as connection:
        await connection.send("GET", "/metrics", KEYS[0])
        await connection.response()
        text = (await connection.body()).decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name.removeprefix("leadline:"): sample.value for sample in samples if len(sample.labels) == 1}


# -- clients -------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What all clients have seen. first_s: times to first tokens. refused: how often, by status."""

    answers: int = 0
    hung_up: int = 0
    tokens: int = 0
    first_s: list[float] = field(default_factory=list[float])
    refused: Counter[int] = field(default_factory=Counter[int])
    wrong: list[str] = field(default_factory=list[str])

    @property
    def requests(self) -> int:
        return self.answers + self.hung_up + self.refused.total()


@dataclass
class Seen:
    """As much of an answer as a client has seen."""

    reasoning: str = ""
    content: str = ""
    logprobs: list[float] = field(default_factory=list[float])
    finish: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        """Take in a choice of a response, or what a chunk adds to it."""
        message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
        self.reasoning += message.get("reasoning_content") or ""
        self.content += message.get("content") or ""
        found = choice["logprobs"] or {}
        rows = [*(found.get("reasoning_content") or ()), *(found.get("content") or ())]
        self.logprobs += [row["logprob"] for row in rows] or found.get("token_logprobs") or []
        self.finish = choice["finish_reason"]

    def fits(self, answer: Answer) -> bool:
        """Whether this is the answer, or its beginning."""
        due = (answer.reasoning, answer.content, answer.logprobs)
        found = (self.reasoning, self.content, tuple(self.logprobs))
        if self.finish is not None:
            return (*found, self.finish) == (*due, answer.finish)
        return all(whole[: len(part)] == part for whole, part in zip(due, found, strict=True))

    def difference(self, answer: Answer) -> str:
        """Where this is not the answer."""
        due = (answer.reasoning, answer.content, answer.logprobs, answer.finish)
        found = (self.reasoning, self.content, tuple(self.logprobs), self.finish)
        names = ("reasoning", "content", "logprobs", "finish")
        return "; ".join(f"{n}: {f!r} instead of {d!r}" for n, d, f in zip(names, due, found, strict=True) if f != d)


class Client:
    """Asks one thing after another, in one of many manners each time."""

    def __init__(self, server: Server, questions: Sequence[Question], tally: Tally, seed: int):
        self._server, self._questions, self._tally = server, questions, tally
        self._rng = random.Random(seed)
        self._key = self._rng.choice(KEYS)

    async def run(self, until: float) -> None:
        """Begin with an answer, as all clients do at once, and go on as it comes until a reading of the clock."""
        manner = Client.listen
        while time.monotonic() < until:
            try:
                await manner(self)
            except (OSError, TimeoutError, h11.ProtocolError) as error:
                self._tally.wrong.append(f"{manner.__name__}: {type(error).__name__}: {error}")
            (manner,) = self._rng.choices(list(MANNERS), list(MANNERS.values()))

    # -- those who want the answer ---------------------------------------------------------------------------------

    async def listen(self) -> None:
        """Read a stream to its end."""
        await self._stream()

    async def read_slowly(self) -> None:
        """Read a stream to its end, with pauses."""
        await self._stream(pause_s=self._rng.choice((0.02, 0.1)))

    async def wait(self) -> None:
        """Read an answer in one piece."""
        question = self._rng.choice(self._questions)
        async with connect(self._server) as connection:
            if not await self._asked(connection, question, stream=False):
                return
            (choice,) = json.loads(await connection.body())["choices"]
            seen = Seen()
            seen.add(choice)
            self._check(question, seen)

    # -- those who do not stay -------------------------------------------------------------------------------------

    async def hang_up(self) -> None:
        """Read some events of a stream."""
        await self._stream(most=self._rng.randint(0, 12))

    async def lose_patience(self) -> None:
        """Do not wait for the answer in one piece."""
        question = self._rng.choice(self._questions)
        async with connect(self._server) as connection:
            await connection.send("POST", question.path, self._key, _data(question.body))
            await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        self._tally.hung_up += 1

    async def break_off(self) -> None:
        """Send the beginning of a body."""
        question = self._rng.choice(self._questions)
        data = _data(question.body)
        async with connect(self._server) as connection:
            await connection.send("POST", question.path, self._key, data, most=self._rng.randrange(len(data)))
            await asyncio.sleep(self._rng.uniform(0.0, 0.2))
        self._tally.hung_up += 1

    # -- those who cannot be served --------------------------------------------------------------------------------

    async def talk_nonsense(self) -> None:
        path, data = self._rng.choice(NONSENSE)
        await self._refused(path, data, 400)

    async def ask_too_much(self) -> None:
        """A prompt that is longer than the context."""
        ids = self._rng.choices(range(256), k=CONTEXT + self._rng.randrange(1000))
        await self._refused(TEXT_PATH, _data({"prompt": ids}), 400)

    async def send_too_much(self) -> None:
        """Announce a body above the limit, and begin to send it."""
        await self._refused(TEXT_PATH, b" " * (BODY_MIB * 2**20 + 1), 413, most=1000)

    async def come_without_a_key(self) -> None:
        question = self._rng.choice(self._questions)
        await self._refused(question.path, _data(question.body), 401, key="sk-nobody-knows-this-key")

    async def _refused(self, path: str, data: bytes, status: int, key: str = "", most: int | None = None) -> None:
        async with connect(self._server) as connection:
            await connection.send("POST", path, key or self._key, data, most)
            found, _ = await connection.response()
            self._tally.refused[found] += 1
            if found not in (status, 429):  # a full server does not look any closer
                self._tally.wrong.append(f"{found} instead of {status} for {data[:100]!r}")

    # -- asking ----------------------------------------------------------------------------------------------------

    async def _stream(self, most: int | None = None, pause_s: float = 0.0) -> None:
        """Read a stream, at most so many events of it."""
        question, seen, start = self._rng.choice(self._questions), Seen(), time.monotonic()
        async with connect(self._server) as connection:
            if not await self._asked(connection, question, stream=True):
                return
            num_events = 0
            async for event in connection.events():
                num_events += 1
                if event == "[DONE]" or (most is not None and num_events > most):
                    break
                (choice,) = json.loads(event)["choices"]
                is_first = not seen.logprobs
                seen.add(choice)
                if is_first and seen.logprobs:
                    self._tally.first_s.append(time.monotonic() - start)
                await asyncio.sleep(pause_s)
        self._check(question, seen, left_early=most is not None)

    async def _asked(self, connection: Connection, question: Question, *, stream: bool) -> bool:
        """Whether the question was taken in. If not, because the server is full, come again when it says, or sooner."""
        await connection.send("POST", question.path, self._key, _data({**question.body, "stream": stream}))
        status, headers = await connection.response()
        if status == 200:
            return True
        self._tally.refused[status] += 1
        if status != 429 or "retry-after" not in headers:
            self._tally.wrong.append(f"{status} for a question: {(await connection.body())[:200]!r}")
            return False
        await asyncio.sleep(self._rng.uniform(0.0, float(headers["retry-after"])))
        return False

    def _check(self, question: Question, seen: Seen, left_early: bool = False) -> None:
        self._tally.tokens += len(seen.logprobs)
        if seen.finish is None:
            self._tally.hung_up += 1
        else:
            self._tally.answers += 1
        if (seen.finish is None and not left_early) or not seen.fits(question.answer):
            self._tally.wrong.append(f"seed {question.body['seed']}: {seen.difference(question.answer)}")


# In how many of 100 visits, roughly.
MANNERS: dict[Callable[[Client], Awaitable[None]], int] = {
    Client.listen: 40,
    Client.wait: 10,
    Client.read_slowly: 10,
    Client.hang_up: 15,
    Client.lose_patience: 5,
    Client.break_off: 5,
    Client.talk_nonsense: 5,
    Client.ask_too_much: 4,
    Client.send_too_much: 3,
    Client.come_without_a_key: 3,
}


def _data(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


NONSENSE = [
    (CHAT_PATH, b""),
    (CHAT_PATH, b"{"),
    (CHAT_PATH, b"\xff\xfe\x00"),
    (CHAT_PATH, b"[" * 10_000),
    (CHAT_PATH, _data({"messages": []})),
    (CHAT_PATH, _data({"messages": [{"role": "nobody", "content": "a"}]})),
    (CHAT_PATH, _data({"messages": [{"role": "user", "content": "\ud800"}]})),
    (CHAT_PATH, _data({"messages": [{"role": "user", "content": "a"}], "max_tokens": -1})),
    (CHAT_PATH, _data({"messages": [{"role": "user", "content": "a"}], "temperature": "hot"})),
    (TEXT_PATH, _data({"prompt": []})),
    (TEXT_PATH, _data({"prompt": [10**9]})),
    (TEXT_PATH, _data({"prompt": "a", "n": 10**6})),
    (TEXT_PATH, _data({"prompt": "a", "top_p": 0})),
]


# -- the test ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of a load. leaked: slots and pages that nobody holds and nobody can have. resident_bytes: after each
    quarter of the time."""

    seconds: float
    tally: Tally
    leaked: int
    resident_bytes: tuple[int, ...]
    preemptions: int

    @property
    def growth_bytes(self) -> int:
        return self.resident_bytes[-1] - self.resident_bytes[0]

    def failures(self, load: Load) -> list[str]:
        """What must not be."""
        found = [f"wrong: {each}" for each in self.tally.wrong]
        if self.leaked:
            found.append(f"{self.leaked} slots or pages have leaked")
        if self.growth_bytes > MOST_GROWTH_BYTES:
            found.append(f"the server has grown by {self.growth_bytes / MB:.1f} MB")
        if load.clients > load.slots + load.queue and not self.tally.refused[429]:
            found.append("there were more clients than places, and nobody was told to come again")
        return found


async def run_clients(server: Server, questions: Sequence[Question], load: Load) -> Result:
    """Let the clients loose, wait until all is quiet, and count."""
    tally, start = Tally(), time.monotonic()
    clients = [Client(server, questions, tally, load.seed + number) for number in range(load.clients)]
    visits = asyncio.gather(*(client.run(start + load.seconds) for client in clients))
    resident_bytes: list[int] = []
    for _ in range(3):
        await asyncio.sleep(load.seconds / 4)
        resident_bytes.append(server.resident_bytes)
    await visits
    seconds = time.monotonic() - start
    resident_bytes.append(server.resident_bytes)
    leaked = await count_leaks(server, load)
    preemptions = int((await figures(server))["num_preemptions_total"])
    return Result(seconds, tally, leaked, tuple(resident_bytes), preemptions)


async def count_leaks(server: Server, load: Load) -> int:
    """Slots and pages that are gone once nothing runs any more; 1 if only a prompt that needs all pages finds out."""
    deadline = time.monotonic() + PATIENCE_S
    found = await figures(server)
    while found["num_requests_running"] or found["num_requests_waiting"]:
        if time.monotonic() > deadline:
            raise LoadError(f"{found['num_requests_running']:.0f} sequences still run, and nobody listens to them")
        await asyncio.sleep(0.1)
        found = await figures(server)
    leaked = load.slots - int(found["num_free_slots"])
    leaked += int(found["kv_cache_pages"] - found["prefix_cache_pages"])
    return leaked or int(not await can_have_all_pages(server))


async def can_have_all_pages(server: Server) -> bool:
    """Whether a prompt that fills the context is answered."""
    body = {"prompt": random.Random(0).choices(range(256), k=CONTEXT - 2), "max_tokens": 1}
    async with connect(server) as connection:
        await connection.send("POST", TEXT_PATH, KEYS[0], _data(body))
        try:
            status, _ = await connection.response()
        except TimeoutError:
            return False
    return status == 200


def run(load: Load) -> Result:
    """Questions, server, clients, result."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name))
        questions = ask_alone(folder, load.questions, load.seed)
        with running_server(folder, Path(name), load) as server:
            return asyncio.run(run_clients(server, questions, load))


# -- the result ----------------------------------------------------------------------------------------------------


def record(result: Result, load: Load) -> dict[str, Any]:
    """The line of the result file."""
    tally = result.tally
    first_ms = sorted(1000 * seconds for seconds in tally.first_s)
    bad = sum(tally.refused[status] for status in tally.refused if status != 429)
    return {
        "benchmark": "serve_load",
        "title": f"{load.clients} clients on a server with {load.slots} slots, tiny random model, batch-invariant",
        "command": "python benchmarks/serve_load.py",
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(short=True),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "fastapi", "uvicorn")},
        "load": asdict(load),
        "first_token_ms": {"p50": _quantile(first_ms, 0.5), "p99": _quantile(first_ms, 0.99)},
        "resident_bytes": list(result.resident_bytes),
        "refused": {str(status): number for status, number in sorted(tally.refused.items())},
        "wrong": tally.wrong[:10],
        "row": {
            "seconds": f"{result.seconds:.0f}",
            "requests": f"{tally.requests:,}",
            "answered": f"{tally.answers:,}",
            "hung up": f"{tally.hung_up:,}",
            "refused as full": f"{tally.refused[429]:,}",
            "refused as bad": f"{bad:,}",
            "tokens/s": f"{tally.tokens / result.seconds:,.0f}",
            "first token p50, p99": f"{_quantile(first_ms, 0.5):,.0f}, {_quantile(first_ms, 0.99):,.0f} ms",
            "states given up": f"{result.preemptions:,}",
            "wrong": f"{len(tally.wrong)}",
            "leaked": f"{result.leaked}",
            "growth": f"{result.growth_bytes / MB:+.1f} of {result.resident_bytes[-1] / MB:,.0f} MB",
        },
    }


def _quantile(values: Sequence[float], part: float) -> float:
    return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")


def main(arguments: list[str]) -> int:
    """Run, write the result, print it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=Load.clients, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=Load.seconds, help="default: %(default)s")
    parser.add_argument("--machine", default=machine_slug(), help="name of the result folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file, if not in the result folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = Load(clients=options.clients, seconds=options.seconds)
    try:
        result = run(load)
    except LoadError as error:
        print(f"serve_load: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("serve_load: stopped", file=sys.stderr)
        return 130
    line = record(result, load)
    for name, value in line["row"].items():
        print(f"{name:>22}  {value}")
    failures = result.failures(load)
    print("\n".join(failures[:10]), file=sys.stderr, end="\n" if failures else "")
    out = options.out or ROOT / "benchmarks" / "results" / options.machine / "serve_load.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf8")
    os.replace(partial, out)
    print(f"results: {out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
