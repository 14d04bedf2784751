"""One console entry point: `leadline VERB [RECIPE] [key=value ...]`, a table from verb to module.

A verb's module has `main(arguments) -> exit code`, and its docstring is the text of `leadline VERB --help`. The module
is imported when the verb is called; help is read from the source text, so that it needs no import at all.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from leadline import __version__
from leadline.cli import INTERRUPTED_STATUS, UsageError, find

VERBS = {
    "demo": "leadline.recipes.demo",
    "train": "leadline.recipes.train",
    "plan": "leadline.recipes.plan",
    "generate": "leadline.recipes.generate",
    "serve": "leadline.recipes.serve",
    "pack": "leadline.recipes.pack",
    "chat": "leadline.recipes.chat",
    "verify": "leadline.recipes.verify",
    "weights": "leadline.recipes.weights",
    "bench": "leadline.recipes.bench",
}

# Verbs that need more than a plain installation: the extra that brings it.
EXTRAS = {"serve": "serve"}

HELP_WORDS = ("-h", "--help", "help")
USAGE_STATUS = 2


def docstring(module: str) -> str:
    """A module's docstring, read from its source without importing it."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""


def overview() -> str:
    """The text of `leadline --help`: one line per verb."""
    lines = [f"  {verb:<8} {docstring(module).splitlines()[0]}" for verb, module in VERBS.items()]
    return "\n".join(
        [
            f"leadline {__version__}: DeepSeek-V4, whole and exact, in Python.",
            "",
            "usage: leadline VERB [RECIPE] [key=value ...] [--show]",
            "       leadline VERB --help",
            "",
            *lines,
        ]
    )


def run(verb: str, arguments: list[str]) -> int:
    """Import the verb's module and call its `main`. Errors meant for the user become one line on stderr."""
    try:
        return importlib.import_module(VERBS[verb]).main(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except ModuleNotFoundError as error:
        if verb not in EXTRAS or (error.name or "leadline").startswith("leadline"):
            raise
        print(f"leadline {verb}: needs {error.name}; pip install 'leadline[{EXTRAS[verb]}]'", file=sys.stderr)
        return 1
    except ValueError as error:
        # The project's own error types speak to the user; any other ValueError is a bug and keeps its traceback.
        if not type(error).__module__.startswith("leadline."):
            raise
        print(f"leadline {verb}: {error}", file=sys.stderr)
        return 1


def dispatch(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    if not arguments or arguments[0] in HELP_WORDS:
        print(overview())
        return 0
    verb, *rest = arguments
    if verb == "--version":
        print(f"leadline {__version__}")
        return 0
    try:
        module = find(verb, VERBS, "verb")
    except UsageError as error:
        print(f"leadline: {error}", file=sys.stderr)
        return USAGE_STATUS
    if any(word in HELP_WORDS[:2] for word in rest):
        print(docstring(module))
        return 0
    return run(verb, rest)


def main(argv: Sequence[str] | None = None) -> int:
    """`dispatch`, for a reader that may close the pipe early, as in `leadline plan flash | head`."""
    try:
        status = dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more on exit; without this that flush would fail aloud.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
