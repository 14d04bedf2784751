"""Continue a text with a checkpoint; the words appear as they are drawn.

usage: leadline generate CHECKPOINT PROMPT [max_tokens=256] [temperature=1.0] [seed=0] [key=value ...] [--show]

CHECKPOINT is a folder in the official or transformers' layout with a tokenizer.json. PROMPT is the text itself, @FILE
for the contents of a file, or - for standard input. The prompt is plain text: nothing in it acts as a control token.

The text goes to standard output. Standard error gets the progress of a long prompt, and at the end tokens per second,
the time to the first token, the bytes of the cache, and how many guesses were right, place by place.

  max_tokens=N      most tokens to add                step_tokens=N     tokens of the prompt per forward pass
  temperature=X     0 takes the most likely token     top_p, top_k, min_p   leave out unlikely tokens
  seed=N            the same seed, the same text      speculate=yes     guess with the MTP block or draft stages
  draft_cost=X      what one more token costs in a step, in steps: above 0, only sure guesses of draft stages are tried
  cache=FORMAT      exact, served or packed           dtype=KIND        file, float32, bfloat16 or float16
  device=NAME       cpu, cuda; default: the GPU if there is one
  disk_cache=FOLDER of prompts that were read before  disk_cache_gib=32 most of it
  compile_steps=no  on the CPU: decode in a C++ program, compiled first in a few seconds; needs a C++ compiler, float32
                    weights and cache=exact

  leadline generate runs/demo/checkpoint "def add(a, b):" max_tokens=64 temperature=0
"""

from __future__ import annotations

import codecs
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from leadline.cli import UsageError, resolve, show
from leadline.engine.engine import Engine
from leadline.engine.generate import GenerationError, engine_for
from leadline.engine.request import Request, Sampling
from leadline.engine.sequence import Usage
from leadline.recipes.disk_cache import GIB, open_disk_cache
from leadline.recipes.load_model import CacheName, DtypeName, load_model
from leadline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """What the command line may set."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    step_tokens: int = 512
    speculate: bool = False
    draft_cost: float = 0.0
    cache: CacheName = "exact"
    dtype: DtypeName = "file"
    device: str = "auto"
    disk_cache: Path | None = None
    disk_cache_gib: float = GIB
    compile_steps: bool = False


def main(arguments: list[str]) -> int:
    words = [word for word in arguments if word == "-" or not (word.startswith("--") or _is_assignment(word))]
    options, wants_show = resolve(Options(), [word for word in arguments if word not in words])
    if wants_show:
        print(show(options))
        return 0
    if len(words) != 2:
        raise UsageError(f"expected a checkpoint folder and a prompt, found {len(words)} of them: {' '.join(words)}")
    folder, prompt = Path(words[0]), read_prompt(words[1])
    tokenizer = Tokenizer.load(folder)
    model = load_model(
        folder, device=options.device, dtype=options.dtype, cache=options.cache, with_mtp=options.speculate
    )
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.min_p, seed=options.seed)
    request = Request(
        (tokenizer.bos_id, *tokenizer.encode(prompt)), options.max_tokens, sampling, frozenset({tokenizer.eos_id})
    )
    tokens = len(request.prompt) + options.max_tokens
    disk = open_disk_cache(
        options.disk_cache,
        options.disk_cache_gib,
        folder,
        model,
        dtype=options.dtype,
        cache=options.cache,
        others=f"speculate={options.speculate}",
        report=partial(Console(stderr=True).print, highlight=False, soft_wrap=True),
    )
    engine = engine_for(
        model,
        tokens,
        step_tokens=options.step_tokens,
        speculate=options.speculate,
        draft_cost=options.draft_cost,
        compile_steps=options.compile_steps,
        disk=disk,
    )
    try:
        say(engine, request, tokenizer)
    finally:
        if disk is not None:
            disk.close()
    return 0


def _is_assignment(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and key in Options.__dataclass_fields__


def read_prompt(word: str) -> str:
    """The text of a prompt argument."""
    try:
        if word == "-":
            return sys.stdin.read()
        return Path(word[1:]).read_text(encoding="utf8") if word.startswith("@") else word
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompt {word}: {error}") from None


@dataclass
class Clock:
    """When things happened, in seconds. first, last: the first and the last token."""

    start: float
    first: float | None = None
    last: float | None = None

    def tick(self) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last


def say(engine: Engine, request: Request, tokenizer: Tokenizer) -> None:
    """Stream the continuation to standard output, and what it took to standard error."""
    number = engine.submit(request)
    clock, cache_bytes = Clock(time.monotonic()), 0
    # A character can be spread over several tokens; it appears when its last byte has come.
    decoder = codecs.getincrementaldecoder("utf8")("replace")
    with _reading(len(request.prompt)) as progress:
        task = progress.task_ids[0]
        while engine.busy:
            for event in engine.step():
                if event.error:
                    raise GenerationError(event.error)
                if event.tokens and clock.first is None:
                    progress.stop()
                for token in event.tokens:
                    clock.tick()
                    print(decoder.decode(tokenizer.token_bytes(token.id)), end="", flush=True)
            progress.update(task, completed=engine.seen(number))
            cache_bytes = max(cache_bytes, engine.cache_bytes)
    print(decoder.decode(b"", final=True), flush=True)
    figures = summary(engine.usage(number), clock, cache_bytes, engine.compile_seconds)
    Console(stderr=True).print(figures, highlight=False, style="dim", soft_wrap=True)


def _reading(prompt_tokens: int) -> Progress:
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("reading {task.total:,} tokens"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    progress.add_task("", total=prompt_tokens)
    return progress


def summary(usage: Usage, clock: Clock, cache_bytes: int, compile_seconds: float = 0.0) -> str:
    """One line of figures."""
    parts = [f"{usage.prompt_tokens:,} + {usage.output_tokens:,} tokens"]
    if usage.cached_tokens:
        parts.append(f"{usage.cached_tokens:,} from the cache")
    if clock.first is not None and clock.last is not None:
        parts.append(f"first after {clock.first - clock.start:.2f} s")
        if usage.output_tokens > 1:
            seconds = clock.last - clock.first
            parts.append(f"then {(usage.output_tokens - 1) / seconds:,.1f} tokens/s")
    if compile_seconds:
        parts.append(f"steps compiled in {compile_seconds:.0f} s")
    parts.append(f"cache {cache_bytes / 2**20:,.1f} MiB")
    if usage.num_drafted:
        parts.append(guesses(usage))
    return ", ".join(parts)


def guesses(usage: Usage) -> str:
    """How many guesses were right, and, where they come in blocks, at each place of a block."""
    share = f"{usage.num_accepted / usage.num_drafted:.0%}"
    if len(usage.drafted) > 1:
        places = (f"{right / tried:.0%}" for right, tried in zip(usage.accepted, usage.drafted, strict=True))
        share += f"; by place {' '.join(places)}"
    return f"{usage.num_accepted} of {usage.num_drafted} guesses right ({usage.drafter}: {share})"
