"""Commands: what a line that starts with a slash does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from leadline.cli import UsageError, find, integer
from leadline.data.bundle import bundle
from leadline.model import accounting, v32
from leadline.recipes.generate import summary
from leadline.recipes.pack import files_of
from leadline.recipes.plan import V32_NAME, size
from leadline.recipes.terminal.conversation import Conversation
from leadline.recipes.terminal.session import Session
from leadline.text.chat import EFFORT, Mode

# The model's card asks for this much context in the deepest mode: in less, thoughts are cut off in the middle.
MAX_MODE_TOKENS = 384 * 1024


def run(session: Session, line: str) -> bool:
    """Act on one line, a command or a question; returns whether the session goes on. Two slashes begin a question that
    starts with one."""
    if not line.startswith("/") or line.startswith("//"):
        session.ask(line[1:] if line.startswith("//") else line)
        return True
    name, _, argument = line[1:].partition(" ")
    find(name, COMMANDS, "command")(session, argument.strip())
    return name != "quit"


def mode(session: Session, argument: str) -> None:
    """/mode MODE      how hard the model thinks: non-think, high or max"""
    conversation = session.conversation
    modes: dict[str, Mode] = {name: name for name in EFFORT[conversation.release]}
    if argument:
        conversation.mode = find(argument, modes, "mode")
    context = session.engine.max_tokens
    short = conversation.mode == "max" and context < MAX_MODE_TOKENS
    session.screen.note(
        f"mode {conversation.mode}"
        + (f": made for a context of {MAX_MODE_TOKENS:,} tokens, here are {context:,}" if short else "")
    )


def budget(session: Session, argument: str) -> None:
    """/budget N       think for at most N tokens; off takes the limit away"""
    if argument:
        session.conversation.budget = None if argument == "off" else _tokens(argument)
    tokens = session.conversation.budget
    session.screen.note("no limit on thinking" if tokens is None else f"at most {tokens:,} tokens of thinking")


def _tokens(text: str) -> int:
    try:
        tokens = integer(text)
    except ValueError:
        tokens = -1
    if tokens < 0:
        raise UsageError(f"/budget {text}: expected a number of tokens, or off")
    return tokens


def think(session: Session, argument: str) -> None:
    """/think          show what was thought before the latest answer"""
    session.screen.show(session.conversation.reasoning or "Nothing was thought.")


def file(session: Session, argument: str) -> None:
    """/file PATH      put a file or a folder in front of the next question"""
    packed = bundle([_path(argument, "/file")], limits=session.limits)
    session.conversation.attached += packed.text
    tokens = len(session.tokenizer.encode(packed.text))
    session.screen.note(f"{files_of(packed)}, {tokens:,} tokens, in front of the next question")


def system(session: Session, argument: str) -> None:
    """/system TEXT    what the model is told before everything; without a text, nothing"""
    session.conversation.system = argument
    session.screen.note("system text set" if argument else "no system text")


def retry(session: Session, argument: str) -> None:
    """/retry          answer the latest question again"""
    session.conversation.reopen()
    session.reply()


def new(session: Session, argument: str) -> None:
    """/new            forget what was said; files and settings stay"""
    session.conversation.turns.clear()
    session.conversation.attached = ""
    session.screen.note("a new conversation")


def save(session: Session, argument: str) -> None:
    """/save FILE      store the conversation"""
    session.conversation.save(_path(argument, "/save"))
    session.screen.note(f"saved: {argument}")


def load(session: Session, argument: str) -> None:
    """/load FILE      go on with a stored conversation"""
    session.conversation = Conversation.load(_path(argument, "/load"))
    session.latest = None
    session.screen.note(f"loaded: {argument}, {len(session.conversation.turns):,} turns")


def stats(session: Session, argument: str) -> None:
    """/stats          tokens and times of the latest answer, and what its cache takes"""
    found = session.latest
    if found is None:
        session.screen.show("Nothing was answered yet.")
        return
    config = session.engine.runner.model.config
    tokens = found.usage.prompt_tokens + found.usage.output_tokens
    ours, theirs = accounting.kv_cache_bytes(config, tokens), v32.kv_cache_bytes(tokens)
    session.screen.show(
        f"{summary(found.usage, found.clock, found.cache_bytes)}\n"
        f"context: {tokens:,} of {session.engine.max_tokens:,} tokens\n"
        f"KV cache of these in served formats: {size(ours)}; {V32_NAME}: {size(theirs)}"
    )


def help(session: Session, argument: str) -> None:
    """/help           these lines"""
    lines = [command.__doc__ or "" for command in COMMANDS.values()]
    session.screen.show("\n".join([*lines, "Ctrl-C stops an answer and keeps what was said; Ctrl-D ends."]))


def quit(session: Session, argument: str) -> None:
    """/quit           end"""


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise UsageError(f"{command}: expected a path behind it")
    return Path(argument).expanduser()


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "mode": mode,
    "budget": budget,
    "think": think,
    "file": file,
    "system": system,
    "retry": retry,
    "new": new,
    "save": save,
    "load": load,
    "stats": stats,
    "help": help,
    "quit": quit,
}
