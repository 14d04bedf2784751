"""Compiles the kernels of sparse attention for GPUs that are not there; a program of its own, because a process that
interprets kernels cannot compile them. What a layer has not is None, as in a launch. Prints one JSON object for each:
name, GPU generation, bytes of shared memory and of spilled registers, and whether the assembler runs products one by
one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from leadline.ops.sparse_attention import hopper_backward, hopper_forward, kernel

# Shared memory of a program on an A100, an RTX 4090 and an H100.
ROOM = {80: 166912, 89: 101376, 90: 232448}
INTEGERS = {"T", "H", "M", "X", "part", "start", "stop", "items", "stride"}
FLOATS = {"sink_H", "lse_TH", "inner_TH"}
RUNS = {
    "picked_TM",
    "first_key_T",
    "last_key_T",
    "first_entry_T",
    "visible_T",
    "first_T",
    "last_T",
    "start_X",
    "stop_X",
}
ABSENT = {
    "none": ("entries_CK", "first_entry_T", "visible_T", "picked_TM", "rows_tMBK"),
    "visible": ("picked_TM", "rows_tMBK"),
    "picked": (),
}


def kind(argument: str) -> str:
    if argument == "scale":
        return "fp32"
    if argument in INTEGERS:
        return "i32"
    return "*i64" if argument in RUNS else "*fp32" if argument in FLOATS else "*bf16"


def compiled(function: Any, arch: int, constants: dict[str, Any], options: dict[str, int]) -> dict[str, Any]:
    names = function.arg_names
    if "ENTRIES" in names:
        constants = constants | {name: None for name in ABSENT[constants["ENTRIES"]] if name in names}
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    even = ("H", "M", "stride")
    aligned = [place for place, name in enumerate(names) if name in even or signature[name].startswith("*")]
    source = GluonASTSource if function.is_gluon() else ASTSource
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source(function, signature, constants, attributes), target=target, options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", f"-arch=sm_{arch}{'a' * (arch == 90)}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": function.__name__,
        "arch": arch,
        "entries": constants.get("ENTRIES"),
        "shared": binary.metadata.shared,
        "room": ROOM[arch],
        "spilled": int(report.split(" bytes spill stores")[0].split()[-1]),
        "serialized": "instructions are serialized" in report,
    }


def for_hopper() -> None:
    functions = [
        hopper_forward.sparse_attention_fwd_hopper_kernel,
        hopper_backward.sparse_attention_bwd_queries_hopper_kernel,
        hopper_backward.sparse_attention_bwd_columns_hopper_kernel,
    ]
    for function in functions:
        for entries in ABSENT if "ENTRIES" in function.arg_names else (None,):
            constants = {"K": 512, **({} if entries is None else {"ENTRIES": entries})}
            print(json.dumps(compiled(function, 90, constants, {"num_warps": 4})))


def for_any_gpu() -> None:
    q_THK = torch.empty(1, 64, 512, dtype=torch.bfloat16)
    tables = {
        "fwd": kernel.FORWARD,
        "bwd_queries": kernel.BACKWARD_QUERIES,
        "bwd_columns": kernel.BACKWARD_COLUMNS,
    }
    for arch, room in ROOM.items():
        kernel.shared_bytes = lambda device, room=room: room
        for name, shapes in tables.items():
            function = getattr(kernel, f"sparse_attention_{name}_kernel")
            options = kernel._blocks(q_THK, shapes, 1).options
            launch = {key: options.pop(key) for key in ("num_warps", "num_stages")}
            constants = {"K": 512, **options, **({"ENTRIES": "picked"} if "ENTRIES" in function.arg_names else {})}
            print(json.dumps(compiled(function, arch, constants, launch)))


if __name__ == "__main__":
    for_hopper()
    for_any_gpu()
