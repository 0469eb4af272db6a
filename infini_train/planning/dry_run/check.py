"""`infini-train plan --dry_run`: comparison of a dry run of one rank with the plan."""

from __future__ import annotations

from dataclasses import replace

from infini_train.planning.communication import stage_traffic
from infini_train.planning.dry_run.differences import message_differences
from infini_train.planning.dry_run.rank_run import DryRun, dry_run
from infini_train.planning.gpu_memory import stage_memory
from infini_train.planning.layout_plan import Plan
from infini_train.planning.parameter_counts import count, stage_parameters
from infini_train.planning.plan_text import GB, layout_text

TOLERANCES = {"activations": 0.02, "peak": 0.10}
"""Largest relative difference by memory category; 1% for all others."""
EXIT_DIFFERS = 1
"""Exit code if the dry run differs from the plan."""


def compare_dry_run(plan: Plan, rank: int) -> int:
    """Do a dry run of one rank and print the comparison with the plan.

    Returns:
        The exit code: 0 or EXIT_DIFFERS.
    """
    # The dry run has no Triton kernels. The PyTorch implementation of the memory saves more for the backward pass.
    plan = replace(plan, sizes=replace(plan.sizes, kernels=False))
    sizes = plan.sizes
    seen = dry_run(sizes.run, sizes.processes, rank)
    planned = stage_parameters(sizes, seen.stage)
    differences = [
        f"parameter {name}: planned {planned.get(name)}, seen {seen.parameters.get(name)}"
        for name in sorted(planned.keys() | seen.parameters.keys())
        if planned.get(name) != seen.parameters.get(name)
    ]
    differences += message_differences(sizes, seen.stage, seen.messages)
    print(f"dry run of rank {rank} of {sizes.processes} (stage {seen.stage}): {layout_text(plan)}")
    print("the compressive memory is computed in PyTorch here; the GPU kernels need less, see the plan without --dry_run")
    print(f"parameters      {len(seen.parameters)} tensors, {count(seen.parameters):,} numbers; planned {count(planned):,}")
    for name, (expected, found) in _memory(plan, seen).items():
        print(f"{name:<16}{found / GB:.3f} GB; planned {expected / GB:.3f} GB")
        if abs(expected - found) > TOLERANCES.get(name, 0.01) * found:
            differences.append(f"{name}: planned {expected:,} bytes, seen {found:,}")
    memory = stage_memory(sizes, seen.stage)
    print(f"in flight       {seen.in_flight} micro-batches; planned {memory.in_flight}")
    for item in stage_traffic(sizes, seen.stage):
        print(f"{item.kind:<16}{item.messages:,} × {item.operation} of {item.bytes / 1e6:.3f} MB: {item.what}")
    if memory.in_flight != seen.in_flight:
        differences.append(f"micro-batches in flight: planned {memory.in_flight}, seen {seen.in_flight}")
    print(*(f"differs: {line}" for line in differences), sep="\n", end="\n" if differences else "")
    if not differences:
        print("the real code agrees with the plan: shapes and messages are equal, memory parts within 2%, peak within 10%")
    return EXIT_DIFFERS if differences else 0


def _memory(plan: Plan, seen: DryRun) -> dict[str, tuple[int, int]]:
    """Return planned and observed bytes by category."""
    memory = stage_memory(plan.sizes, seen.stage)
    peak = memory.weights + memory.gradients + memory.optimizer + memory.constant_buffers
    peak += memory.memory_states + memory.activations + memory.backward_buffers
    return {
        "weights": (memory.weights, seen.weights),
        "gradients": (memory.gradients, seen.gradients),
        "optimizer": (memory.optimizer, seen.optimizer),
        "activations": (memory.activations, seen.activations),
        "memory states": (memory.memory_states, seen.memory_states),
        "peak": (peak, seen.peak),
    }
