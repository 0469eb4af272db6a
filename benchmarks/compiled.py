"""Registers, spills and shared memory of the Triton kernels, compiled without a GPU.

The targets are A100 (sm_80), H100 (sm_90) and, for the kernels that run on them, GPUs with less shared memory (sm_89). The
benchmark records the launches of one layer's forward and backward pass instead of running them, and compiles them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infini_kernels import infini_attention
from infini_kernels.triton import blocks
from infini_kernels.triton.gradient_sum import add_contiguous
from infini_kernels.triton.heads import join_heads
from infini_kernels.triton.swiglu import swiglu

SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448}
"""Maximum bytes of shared memory per thread block, by compute capability. Source: CUDA C++ Programming Guide, table of compute
capabilities (99 KB on 89)."""
SEGMENT = 2048
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int8: "i8"}
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, int], dict[str, Any]]


def launches(
    width: int, dtype: torch.dtype, update_rule: str, beyond_the_paper: bool = False, capability: int = 90
) -> list[Launch]:
    """Return the kernel launches of one layer, forward and backward, with 4 query heads and 2 key/value heads.

    Args:
        width: head width.
        dtype: type of queries, keys and values.
        update_rule: "linear" or "delta".
        beyond_the_paper: use learned write strengths, the softmax feature map and, with the delta rule, the corrected
            normaliser.
        capability: compute capability that the launches are made for.
    """
    T = 2 * SEGMENT
    q = torch.empty(1, T, 4, width, dtype=dtype, requires_grad=True)
    k, v = (torch.empty(1, T, 2, width, dtype=dtype, requires_grad=True) for _ in range(2))
    gate = torch.empty(4, requires_grad=True)
    angle = torch.empty(SEGMENT, width // 2)
    more: dict[str, Any] = {}
    if beyond_the_paper:
        more = {"write_gate": torch.empty(2, width, requires_grad=True), "feature_map": "softmax"}
        more["normaliser"] = "corrected" if update_rule == "delta" else "paper"
    found: list[Launch] = []
    blocks.observers.append(lambda *launch: found.append(launch))
    blocks.compiled_for.append(capability)
    # Use the longest loops, as with enough segments to fill a GPU.
    previous, blocks.WARPS_OF_A_FULL_CARD = blocks.WARPS_OF_A_FULL_CARD, 1
    try:
        out, memory = infini_attention(
            q, k, v, gate, segment_length=SEGMENT, update_rule=update_rule, rotary=(angle, angle), backend="triton", **more
        )
        (out.sum() + memory.M.sum()).backward()
        if dtype != torch.float32:
            add_contiguous(torch.empty(width * width), torch.empty(width * width, dtype=dtype))  # gradient of a weight
        join_heads(*(x.detach().transpose(0, 1) for x in (q, k, v)))
        swiglu(torch.empty(T, 16 * width, dtype=dtype, requires_grad=True)).sum().backward()
    finally:
        blocks.observers.pop()
        blocks.compiled_for.pop()
        blocks.WARPS_OF_A_FULL_CARD = previous
    return found


def compile_for(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile one launch and return its resource usage."""
    kernel, _, arguments, options, constants = launch
    signature, values, attributes = {}, dict(constants), {}
    for number, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:
            values[name] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
    for name in values:
        signature[name] = "constexpr"
    places = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(kernel, signature, places, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": kernel.__name__.strip("_").removesuffix("_kernel"),
        "sm": capability,
        **_resources(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Return registers and spilled bytes from the compiled binary. Spilled registers are on the stack or in local memory."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([str(program), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output))
    return {"registers": int(used["REG"]), "spilled_bytes": int(used["STACK"]) + int(used["LOCAL"])}


def measure(
    widths: tuple[int, ...] = (64, 128, 256), capabilities: tuple[int, ...] = (80, 89, 90)
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row for each kernel, head width, type and compute capability."""
    rows = []
    for width in widths:
        for dtype in (torch.bfloat16, torch.float32):
            for beyond in (False, True):
                for capability in capabilities:
                    if capability == 89 and blocks.needs_much_shared_memory(dtype, width):
                        continue
                    where = {"width": width, "type": TYPES[dtype], "beyond_the_paper": beyond}
                    for launch in launches(width, dtype, "delta", beyond, capability):
                        rows.append({**where, **compile_for(launch, capability)})
    spilled = [row for row in rows if row["spilled_bytes"]]
    large = [row for row in rows if row["shared_bytes"] > row["shared_limit"]]
    return rows, [f"{len(rows)} kernels compiled, {len(spilled)} spill, {len(large)} exceed the shared memory"]
