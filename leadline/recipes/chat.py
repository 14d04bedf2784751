"""Talk with a checkpoint in the terminal, about a folder of files if you like.

usage: leadline chat CHECKPOINT [--with FOLDER|FILE ...] [key=value ...] [--show]

CHECKPOINT is a folder in the official or transformers' layout with a tokenizer.json. With --with, the files are packed
as `leadline pack` does and read before the first question; every question then begins where the cache ends. With
disk_cache=FOLDER the cache outlives the program: a second start with the same files has them at once.

Answers appear as Markdown while they are written, thinking dimmed before them. Ctrl-C stops an answer and keeps what
was said. A line that ends with a backslash goes on in the next. /help lists the commands: /mode, /budget, /think,
/file, /system, /retry, /new, /save, /load, /stats, /quit.

Without a terminal each line of standard input is a question or a command, and standard output holds the answers alone.

  context=N         most tokens of files, questions and answers; not given: the files and 16K, as far as the model goes
  max_tokens=N      most tokens of one answer            mode=MODE      non-think, high or max
  temperature=X     0 takes the most likely token        top_p, top_k, min_p   leave out unlikely tokens
  seed=N            of the first answer                  budget=N       most tokens of thinking
  system=TEXT       what the model is told               release=NAME   preview or 0731, which names modes otherwise
  disk_cache=FOLDER of the cache                         disk_cache_gib=32   most of it
  exclude=, file_bytes=, total_bytes=   as for `leadline pack`
  cache=, dtype=, device=, step_tokens=, speculate=, draft_cost=   as for `leadline generate`

  leadline chat runs/demo/checkpoint --with . exclude=tests disk_cache=~/.cache/leadline
  echo "What does this package do?" | leadline chat runs/demo/checkpoint --with src
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from leadline.cli import UsageError, resolve, show
from leadline.data.bundle import BundleError, Limits, bundle
from leadline.data.gather import GatherError
from leadline.engine.disk import DiskCache
from leadline.engine.engine import Engine, Settings
from leadline.engine.generate import GenerationError
from leadline.engine.request import RequestError, Sampling
from leadline.model.page_table import num_pages
from leadline.model.transformer import Transformer
from leadline.recipes.disk_cache import GIB, open_disk_cache
from leadline.recipes.load_model import CacheName, DtypeName, load_model
from leadline.recipes.pack import files_of, split_paths
from leadline.recipes.terminal.commands import run
from leadline.recipes.terminal.conversation import Conversation, ConversationError
from leadline.recipes.terminal.history import History, default_path
from leadline.recipes.terminal.screen import Pipe, Screen, Terminal
from leadline.recipes.terminal.session import Session
from leadline.text.chat import Mode, Release
from leadline.text.messages import ChatError
from leadline.text.tokenizer import Tokenizer, TokenizerError

# Beside the files, when context= does not say: a few questions and answers.
TALK_TOKENS = 2**14
WITH = "--with"
PROMPT, CONTINUED = "> ", "… "
# What one line can do wrong without an end of the session.
LINE_ERRORS = (
    *(UsageError, ConversationError, ChatError, TokenizerError, RequestError, GenerationError),
    *(GatherError, BundleError),
)


@dataclass(frozen=True)
class Options:
    """What the command line may set."""

    context: int | None = None
    max_tokens: int = 8192
    mode: Mode = "high"
    release: Release = "preview"
    budget: int | None = None
    system: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    disk_cache: Path | None = None
    disk_cache_gib: float = GIB
    exclude: tuple[str, ...] = ()
    file_bytes: int = 2**20
    total_bytes: int = 2**26
    step_tokens: int = 512
    speculate: bool = False
    draft_cost: float = 0.0
    cache: CacheName = "exact"
    dtype: DtypeName = "file"
    device: str = "auto"


def main(arguments: list[str]) -> int:
    folder, paths, assignments = split(arguments)
    options, wants_show = resolve(Options(), assignments)
    if wants_show:
        print(show(options))
        return 0
    if folder is None:
        raise UsageError("expected a checkpoint folder to talk with, found none")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Terminal(Console(highlight=False)) if interactive else Pipe()
    session = start(folder, paths, options, screen, interactive)
    try:
        session.read_files()
        return talk(session, typed(history(screen)) if interactive else piped())
    finally:
        if session.engine.memory.disk is not None:
            session.engine.memory.disk.close()


def split(arguments: Sequence[str]) -> tuple[Path | None, list[str], list[str]]:
    """The checkpoint, the paths behind --with, and everything else."""
    words, assignments = split_paths([word for word in arguments if word != WITH], Options)
    if WITH not in arguments:
        folder, paths = words[:1], []
        surplus = words[1:]
    else:
        behind, _ = split_paths(arguments[arguments.index(WITH) + 1 :], Options)
        before, _ = split_paths(arguments[: arguments.index(WITH)], Options)
        folder, paths, surplus = before[:1], [word for word in behind if word != WITH], before[1:]
        if not paths:
            raise UsageError(f"{WITH}: expected a folder or files behind it")
    if surplus:
        raise UsageError(f"expected one checkpoint folder, found {surplus[0]} as well; files come behind {WITH}")
    return Path(folder[0]) if folder else None, paths, assignments


def start(folder: Path, paths: Sequence[str], options: Options, screen: Screen, interactive: bool) -> Session:
    """Pack the files, load the model, and build its engine."""
    tokenizer = Tokenizer.load(folder)
    limits = Limits(options.file_bytes, options.total_bytes)
    conversation = Conversation(
        system=options.system, mode=options.mode, release=options.release, budget=options.budget
    )
    if paths:
        packed = bundle(paths, exclude=options.exclude, limits=limits)
        conversation.files = packed.text
        left_out = f", {len(packed.left_out):,} left out" if packed.left_out else ""
        screen.note(files_of(packed) + left_out)
    opening_tokens = len(conversation.opening().ids(tokenizer))
    model = load_model(
        folder, device=options.device, dtype=options.dtype, cache=options.cache, with_mtp=options.speculate
    )
    disk = open_disk_cache(
        options.disk_cache,
        options.disk_cache_gib,
        folder,
        model,
        dtype=options.dtype,
        cache=options.cache,
        others=f"speculate={options.speculate}",
        report=screen.note,
    )
    engine = engine_for_talk(model, opening_tokens, options, disk)
    return Session(
        engine,
        tokenizer,
        screen,
        conversation,
        Sampling(options.temperature, options.top_p, options.top_k, options.min_p, seed=options.seed),
        options.max_tokens,
        interactive,
        limits,
    )


def engine_for_talk(model: Transformer, opening_tokens: int, options: Options, disk: DiskCache | None) -> Engine:
    """An engine for one sequence at a time, with room for files, questions and answers."""
    longest = model.config.max_position_embeddings
    context = min(options.context or opening_tokens + TALK_TOKENS, longest)
    if opening_tokens >= context:
        raise UsageError(
            f"the files have {opening_tokens:,} tokens, and the context {context:,}: "
            + ("raise context=" if context < longest else "the model has no longer one; name fewer or exclude some")
        )
    pages = num_pages(context + 1)
    settings = Settings(
        slots=1,
        pages=pages,
        max_tokens=context,
        step_tokens=options.step_tokens,
        speculate=options.speculate,
        draft_cost=options.draft_cost,
    )
    return Engine(model, settings, disk)


def talk(session: Session, lines: Iterator[str]) -> int:
    """Act on lines until there are none; returns the exit code, 1 if one of them could not be acted on."""
    failed = False
    for line in lines:
        if not line.strip():
            continue
        try:
            # A terminal may send half a character, which has no place in a prompt.
            if not run(session, line.encode(errors="replace").decode()):
                break
        except LINE_ERRORS as error:
            failed = True
            session.screen.note(str(error))
    return int(failed and not session.stops_at_interrupt)


def piped() -> Iterator[str]:
    """The lines of standard input; bytes that are not UTF-8 are replaced."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for line in sys.stdin:
        yield line.rstrip("\n")


def history(screen: Screen) -> History | None:
    """The lines of earlier sessions; None where they have no place."""
    try:
        return History(default_path())
    except OSError as error:
        screen.note(f"No history: {error}")
        return None


def typed(kept: History | None) -> Iterator[str]:
    """Lines that a person types, until Ctrl-D; Ctrl-C empties the line."""
    while True:
        try:
            line = input(PROMPT)
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{input(CONTINUED)}"
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line.strip() and kept is not None:
            kept.add(line)
        yield line
