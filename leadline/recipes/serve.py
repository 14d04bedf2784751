"""Serve a checkpoint over HTTP, to clients of OpenAI's and Anthropic's protocols.

usage: leadline serve CHECKPOINT [host=127.0.0.1] [port=8000] [key=value ...] [--show]

CHECKPOINT is a folder in the official or transformers' layout with a tokenizer.json. Point a client at
http://127.0.0.1:8000/v1 and any API key. Ctrl-C or SIGTERM lets running answers finish, for at most `grace` seconds.

  host=ADDRESS      0.0.0.0 lets the network in: set keys then
  api_key_file=FILE one key on each line; each has a prefix cache of its own
  name=NAME         of the model, default: the folder's; aliases=A,B are accepted too, * is any
  mode=high         non-think, low, high or max, for requests that do not say
  release=preview   preview or 0731: which modes there are
  slots=8           answers at once                   queue=64          requests that wait beyond them
  context=8K        most tokens, prompt and answer    pages=N           of 128 tokens, for all; default: slots x context
  step_tokens=512   tokens per forward pass           speculate=yes     guess with the MTP block or draft stages
  draft_cost=X      what one more token costs in a step, in steps: above 0, only sure guesses of draft stages are tried
  cache=FORMAT      exact, served or packed           dtype=KIND        file, float32, bfloat16 or float16
  device=NAME       cpu, cuda; default: the GPU if there is one
  body_mib=32       most of a request                 origins=URL,URL   web pages that may call the server
  grace=60          seconds for running answers at the end
  keep=FOLDER       answers that do not end within it are kept here, prompts included, and go on at the next start;
                    GET /v1/responses/ID fetches them. Answers with background=true are kept here too
  keep_hours=24     after which they are forgotten
  log_prompts=no    prompts are logged only if asked  allow_short_max=no   mode max with less than 384K of context
  disk_cache=FOLDER of prompts, outlives the server   disk_cache_gib=32 most of it
  window_policy=periodic   full, periodic or zero: how much of each prefix is kept, and how little is computed again
  batch_invariant=no   the same bits whatever else is served; slower, on a GPU much slower
  compile_steps=no  on the CPU: decode in a C++ program, compiled first in a few seconds; needs a C++ compiler, float32
                    weights and cache=exact
  replicas=1        servers behind this address, each with a GPU to itself; needs `pip install 'leadline[ray]'`
  cluster=ADDRESS   of a Ray cluster that they are spread over, default: this machine

  leadline serve runs/demo/checkpoint port=8080
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from leadline.cli import UsageError, resolve, show
from leadline.engine.disk import DiskCache
from leadline.engine.engine import Engine, Settings
from leadline.engine.prefix import WindowPolicy
from leadline.model.config import ModelConfig
from leadline.model.page_table import num_pages
from leadline.model.transformer import Transformer
from leadline.recipes.disk_cache import GIB, open_disk_cache
from leadline.recipes.load_model import CacheName, DtypeName, load_model
from leadline.serve.app import create_app
from leadline.serve.kept import Kept
from leadline.serve.limits import Keys, Limits
from leadline.serve.relay import create_relay
from leadline.serve.service import Policy, Service
from leadline.text.chat import Mode, Release
from leadline.text.tokenizer import Tokenizer
from leadline.weights.fingerprint import fingerprint

LAST_WORDS_S = 5
"""For clients to read that their answer ends."""


@dataclass(frozen=True)
class Options:
    """What the command line may set."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    name: str = ""
    aliases: tuple[str, ...] = ()
    mode: Mode = "high"
    release: Release = "preview"
    slots: int = 8
    queue: int = 64
    context: int = 8192
    pages: int = 0
    step_tokens: int = 512
    speculate: bool = False
    draft_cost: float = 0.0
    cache: CacheName = "exact"
    dtype: DtypeName = "file"
    device: str = "auto"
    body_mib: int = 32
    origins: tuple[str, ...] = ()
    log_prompts: bool = False
    allow_short_max: bool = False
    batch_invariant: bool = False
    disk_cache: Path | None = None
    disk_cache_gib: float = GIB
    window_policy: Literal["full", "periodic", "zero"] = "periodic"
    compile_steps: bool = False
    replicas: int = 1
    cluster: str = ""
    grace: int = 60
    keep: Path | None = None
    keep_hours: float = 24.0


def main(arguments: list[str]) -> int:
    words = [word for word in arguments if not word.startswith("--") and "=" not in word]
    options, wants_show = resolve(Options(), [word for word in arguments if word not in words])
    if wants_show:
        print(show(options))
        return 0
    if len(words) != 1:
        raise UsageError(f"expected one checkpoint folder, found {len(words)} of them: {' '.join(words)}")
    if options.keep is not None and (options.replicas > 1 or options.cluster):
        raise UsageError("keep= goes with one server, not with replicas=; leave one of them out")
    if options.replicas < 1:
        raise UsageError(f"replicas={options.replicas}: expected 1 or more")
    folder = Path(words[0])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    keys = Keys.from_file(options.api_key_file) if options.api_key_file else Keys([])
    console = Console(stderr=True)
    if not keys.needed and not is_loopback(options.host):
        console.print(
            f"warning: {options.host} is open to the network and there are no API keys; set api_key_file=FILE",
            highlight=False,
            soft_wrap=True,
        )
    hosts = [options.host, "localhost"] if is_loopback(options.host) else []
    if options.replicas > 1 or options.cluster:
        _serve_replicas(folder.resolve(), options, keys, hosts, console)
        return 0
    service = build(folder, options, keys)
    app = create_app(service, origins=options.origins, hosts=hosts)
    _listen(app, options, service.policy.name, capacity(service), console, suspend=service.suspend)
    return 0


def _serve_replicas(folder: Path, options: Options, keys: Keys, hosts: list[str], console: Console) -> None:
    # Ray reads both when it is imported: it reports nothing to anybody, and obeys nobody but this process.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not options.cluster:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        from leadline.recipes.replicas import running_replicas
    except ModuleNotFoundError as error:
        if (error.name or "leadline").startswith("leadline"):
            raise
        raise UsageError(f"replicas={options.replicas}: needs {error.name}; pip install 'leadline[ray]'") from None
    ModelConfig.from_file(folder / "config.json")  # what is wrong with the folder is better said here than far away
    Tokenizer.load(folder)
    on_gpu = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    with running_replicas(
        partial(build, folder, options, keys),
        options.replicas,
        busy=options.slots,
        gpus=int(on_gpu),
        grace_s=options.grace,
        cluster=options.cluster,
    ) as replicas:
        app = create_relay(replicas, keys, limits_of(options), origins=options.origins, hosts=hosts)
        name, where = options.name or folder.name, options.cluster or "this machine"
        _listen(app, options, name, f"{options.replicas} replicas on {where}", console, lifespan="off")


class GracefulServer(uvicorn.Server):
    """A server that lets running answers finish for a while, and then ends the others in words."""

    def __init__(self, config: uvicorn.Config, grace_s: float, suspend: Callable[[], Awaitable[None]]):
        super().__init__(config)
        self._grace_s, self._suspend = grace_s, suspend

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(self._end_after_grace())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_after_grace(self) -> None:
        await asyncio.sleep(self._grace_s)
        await self._suspend()


async def _nothing() -> None:
    """Replicas end what they say themselves."""


def _listen(
    app: ASGIApp,
    options: Options,
    name: str,
    note: str,
    console: Console,
    *,
    suspend: Callable[[], Awaitable[None]] = _nothing,
    lifespan: Literal["auto", "off"] = "auto",
) -> None:
    """Serve until a signal comes, and let running answers finish. suspend: ends those that do not."""
    with bound(options.host, options.port) as listening:
        host, port = listening.getsockname()[:2]
        console.print(f"serving {name} at http://{host}:{port}/v1", highlight=False, soft_wrap=True)
        console.print(note, highlight=False, soft_wrap=True, style="dim")
        config = uvicorn.Config(
            app,
            timeout_graceful_shutdown=options.grace + LAST_WORDS_S,
            server_header=False,
            log_level="info",
            lifespan=lifespan,
        )
        GracefulServer(config, options.grace, suspend).run(sockets=[listening])


def build(folder: Path, options: Options, keys: Keys) -> Service:
    """Load a checkpoint and put an engine around it."""
    kept, tokenizer = kept_of(folder, options), Tokenizer.load(folder)
    model = load_model(
        folder, device=options.device, dtype=options.dtype, cache=options.cache, with_mtp=options.speculate
    )
    policy = Policy(
        options.name or folder.resolve().name,
        options.aliases,
        options.release,
        options.mode,
        options.allow_short_max,
        options.log_prompts,
        limits_of(options),
    )
    disk = open_disk_cache(
        options.disk_cache,
        options.disk_cache_gib,
        folder,
        model,
        dtype=options.dtype,
        cache=options.cache,
        others=f"speculate={options.speculate} batch_invariant={options.batch_invariant}",
        report=logging.getLogger("leadline.serve").warning,
    )
    return Service(engine_of(model, options, disk), tokenizer, policy, keys, kept)


def kept_of(folder: Path, options: Options) -> Kept | None:
    if not options.keep_hours > 0:
        raise UsageError(f"keep_hours={options.keep_hours}: expected more than 0")
    if options.keep is None:
        return None
    report = logging.getLogger("leadline.serve").warning
    return Kept(options.keep.expanduser(), fingerprint(folder), options.keep_hours * 3600, report)


def limits_of(options: Options) -> Limits:
    return Limits(body_bytes=options.body_mib * 2**20, queue=options.queue)


def engine_of(model: Transformer, options: Options, disk: DiskCache | None) -> Engine:
    context = min(options.context, model.config.max_position_embeddings)
    pages = options.pages or options.slots * num_pages(context + 1)
    return Engine(
        model,
        Settings(
            slots=options.slots,
            pages=pages,
            max_tokens=context,
            step_tokens=options.step_tokens,
            policy=WindowPolicy(options.window_policy),
            speculate=options.speculate,
            draft_cost=options.draft_cost,
            batch_invariant=options.batch_invariant,
            compile_steps=options.compile_steps,
        ),
        disk,
    )


def capacity(service: Service) -> str:
    """What the server can hold, in one line."""
    engine = service.worker.engine
    state, settings = engine.memory.state, engine.settings
    mib = (settings.pages * state.bytes_per_page + settings.slots * state.bytes_per_slot) / 2**20
    queue, drafter = service.limits.queue, engine.drafter
    drafts = f", {drafter.name} guesses {drafter.length} at a time" if drafter else ""
    return (
        f"context {service.context_tokens:,} tokens, {settings.slots} answers at once and {queue} waiting, "
        f"cache {mib:,.0f} MiB{drafts}"
    )


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; before anything says that it does."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"{host}:{port}: {error.strerror or error}; choose another with host= or port=") from None
