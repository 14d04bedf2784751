"""History: the lines that were typed, for the arrow keys of this run and the next, in a file of the user's alone."""

from __future__ import annotations

import os
import readline
from pathlib import Path

MAX_LINES = 2000


def default_path() -> Path:
    """Where programs keep such things: below XDG_STATE_HOME."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "leadline" / "history"


class History:
    """Each line reaches the file when it is typed. Raises OSError where the file cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        os.chmod(path, 0o600)  # it may have been there with more rights
        readline.set_history_length(MAX_LINES)
        readline.set_auto_history(False)
        readline.read_history_file(path)

    def add(self, line: str) -> None:
        """Remember a line."""
        readline.add_history(line)
        readline.append_history_file(1, self.path)
