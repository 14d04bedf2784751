"""What the benchmarks say of the machine and of the revision that they measure."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """The processor in words."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit(*, short: bool = False) -> str:
    """The revision of this repository, "unknown" where git cannot tell it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", *(["--short"] if short else []), "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine_slug() -> str:
    """The default name of the result folder: cores and architecture, and nothing that names this machine."""
    architecture = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm"}.get(platform.machine(), platform.machine())
    return f"cpu-{len(os.sched_getaffinity(0))}core-{architecture}"
