"""The command line: overrides, the verb table, exit codes, and help without imports."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline import __main__ as entry
from leadline import __version__, cli


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-3
    kind: Literal["muon", "adamw"] = "muon"


@dataclass(frozen=True)
class Run:
    steps: int = 10
    data: Path | None = None
    name: str = "run"
    resume: bool = False
    ratios: tuple[int, ...] = (0, 4)
    limit: float | None = None
    anything: object = None
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: must be at least 1")


@pytest.mark.parametrize(
    ("assignment", "attribute", "value"),
    [
        ("steps=25", "steps", 25),
        ("steps=2K", "steps", 2048),
        ("steps=1M", "steps", 1048576),
        ("data=some/folder", "data", Path("some/folder")),
        ("data=none", "data", None),
        ("name=none", "name", "none"),
        ("name=", "name", ""),
        ("name=a=b", "name", "a=b"),
        ("resume=yes", "resume", True),
        ("resume=False", "resume", False),
        ("ratios=0,4,128", "ratios", (0, 4, 128)),
        ("ratios=", "ratios", ()),
        ("limit=2.5e-1", "limit", 0.25),
        ("limit=None", "limit", None),
        ("optimizer.lr=0.5", "optimizer", Optimizer(lr=0.5)),
        ("optimizer.kind=adamw", "optimizer", Optimizer(kind="adamw")),
    ],
)
def test_override_converts_to_the_annotated_type(assignment, attribute, value):
    found = getattr(cli.override(Run(), [assignment]), attribute)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stepss=3", r"unknown key 'stepss': did you mean 'steps'\?"),
        ("optimizer.lrr=3", r"unknown key 'optimizer.lrr': did you mean 'lr'\?"),
        ("optimizer.zzz=3", "unknown key 'optimizer.zzz': expected one of lr, kind"),
        ("steps.more=3", "'steps' holds a int, which has no fields"),
        ("steps", "'steps' is not understood: expected key=value"),
        ("=3", "'=3' is not understood"),
        ("steps=1.5", "steps=1.5: expected a whole number"),
        ("steps=", "steps=: expected a whole number"),
        ("steps=K", "steps=K: expected a whole number"),
        ("limit=much", "limit=much: expected a number or none"),
        ("resume=maybe", "resume=maybe: expected true or false"),
        ("ratios=0,x", "ratios=0,x: expected values separated by commas, each a whole number"),
        ("optimizer.kind=sgd", "optimizer.kind=sgd: expected one of muon, adamw"),
        ("optimizer=fast", "optimizer=fast: expected a value that only a recipe can set"),
        ("anything=1", "anything=1: expected a value that only a recipe can set"),
    ],
)
def test_override_refuses_with_the_reason(assignment, message):
    with pytest.raises(cli.UsageError, match=message):
        cli.override(Run(), [assignment])


def test_override_leaves_the_original_and_applies_left_to_right():
    original = Run()
    assert cli.override(original, ["steps=3", "steps=4"]).steps == 4
    assert original.steps == 10


def test_override_runs_the_dataclass_checks():
    with pytest.raises(ValueError, match="steps = 0"):
        cli.override(Run(), ["steps=0"])


def test_resolve_finds_show_anywhere():
    assert cli.resolve(Run(), ["--show", "steps=3"]) == (Run(steps=3), True)
    assert cli.resolve(Run(), ["steps=3"]) == (Run(steps=3), False)


def test_show_lists_every_key_with_its_value():
    assert "optimizer.lr = 0.001" in cli.show(Run()).splitlines()
    assert "ratios = (0, 4)" in cli.show(Run()).splitlines()


@given(
    steps=st.integers(1, 10**12),
    limit=st.none() | st.floats(allow_nan=False),
    name=st.text(),
    ratios=st.lists(st.integers()).map(tuple),
    resume=st.booleans(),
)
def test_override_reads_back_what_it_is_given(steps, limit, name, ratios, resume):
    listed = ",".join(map(str, ratios))
    texts = [f"steps={steps}", f"limit={limit}", f"name={name}", f"ratios={listed}", f"resume={resume}"]
    assert cli.override(Run(), texts) == Run(steps=steps, limit=limit, name=name, ratios=ratios, resume=resume)


def test_find():
    assert cli.find("pro", {"pro": 1, "flash": 2}, "preset") == 1
    with pytest.raises(cli.UsageError, match=r"unknown preset 'flahs': did you mean 'flash'\?"):
        cli.find("flahs", {"pro": 1, "flash": 2}, "preset")


# -- __main__ ----------------------------------------------------------------------------------------------------


class NamedError(ValueError):
    """As a library module would define it."""


NamedError.__module__ = "leadline.somewhere"


@pytest.fixture
def verb(monkeypatch, tmp_path):
    """A verb 'fake' whose module calls the function that the test installs."""
    (tmp_path / "fake_verb.py").write_text("def main(arguments):\n    return behave(arguments)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(entry.VERBS, "fake", "fake_verb")
    sys.modules.pop("fake_verb", None)

    def install(behave):
        import fake_verb  # pyright: ignore[reportMissingImports]

        fake_verb.behave = behave

    yield install
    sys.modules.pop("fake_verb", None)


def test_verb_gets_the_arguments_and_gives_the_exit_code(verb):
    seen = []
    verb(lambda arguments: seen.append(arguments) or 7)
    assert entry.main(["fake", "a=1", "--show"]) == 7
    assert seen == [["a=1", "--show"]]


def test_own_errors_are_one_line_and_exit_1(verb, capsys):
    def fail(arguments):
        raise NamedError("the thing is bent: straighten it")

    verb(fail)
    assert entry.main(["fake"]) == 1
    assert capsys.readouterr().err == "leadline fake: the thing is bent: straighten it\n"


def test_foreign_value_errors_keep_their_traceback(verb):
    def fail(arguments):
        raise ValueError("a bug")

    verb(fail)
    with pytest.raises(ValueError, match="a bug"):
        entry.main(["fake"])


def test_interrupt_exits_130(verb):
    def interrupt(arguments):
        raise KeyboardInterrupt

    verb(interrupt)
    assert entry.main(["fake"]) == 130


def test_unknown_verb_names_the_nearest_and_exits_2(capsys):
    assert entry.main(["paln"]) == 2
    assert capsys.readouterr().err == "leadline: unknown verb 'paln': did you mean 'plan'?\n"


def test_version(capsys):
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"leadline {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_overview_has_a_line_for_every_verb(arguments, capsys):
    assert entry.main(arguments) == 0
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  " and line[2:3].strip()}
    assert words == set(entry.VERBS)


@pytest.mark.parametrize("verb_name", entry.VERBS)
def test_help_is_the_module_docstring(verb_name, capsys):
    assert entry.main([verb_name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"leadline {verb_name}" in text
    assert len(text.splitlines()) > 2


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in entry.VERBS)])
def test_help_imports_no_library(arguments):
    code = (
        "import sys; from leadline.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'rich', 'tokenizers'} & sys.modules.keys(); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("form", [["--json"], []])
def test_module_entry_and_closed_pipe(form):
    """`python -m leadline plan flash | head -1`: the reader closes early, and no traceback appears."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "leadline", "plan", "flash", *form]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""
