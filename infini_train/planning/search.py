"""Other layouts of the same run: the best of those that fit, and the smallest change that makes a run fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import product

from infini_train.config import RunConfig
from infini_train.config.validation import validate_data, validate_model, validate_optimizer, validate_task
from infini_train.planning.layout_plan import Plan, plan, with_layout, with_training
from infini_train.runtime.errors import UserError
from infini_train.runtime.hardware import find_gpu

MOST_GPUS = 8192
"""More are not suggested."""
LAYOUT_OPTIONS = {
    "layout": (
        "tensor_parallel_size",
        "sequence_parallel",
        "context_parallel_size",
        "pipeline_parallel_size",
        "virtual_stages",
        "zero_stage",
    ),
    "training": ("recompute", "recompute_layers", "segments_per_micro_batch", "micro_batches_per_window"),
}
"""What `layouts` changes, by section of the configuration."""
SIMPLICITY = 0.01
"""Layouts within this share of the best time are equals; the simpler one comes first."""


def layouts(run: RunConfig, gpus: int, gpus_per_node: int) -> Iterator[RunConfig]:
    """The same training spread in other ways: every layout with one, two or four virtual stages, every recomputation, and cuts
    of a window into micro-batches of up to 16 segments or as many as the run has, as far as they fit the processes; and last
    the run's own layout, where it is none of these. What a step computes is the same in all of them."""
    own = with_training(run, recompute_layers=0)
    window = run.training.segments_per_micro_batch * run.training.micro_batches_per_window
    cuts = [run.training.segments_per_micro_batch]
    if run.model.attention != "full":  # its context is the micro-batch
        cuts = sorted({*cuts, *(segments for segments in _divisors(window) if segments <= 16)})
    own_is_new = True
    for tp, cp, pp in product(_divisors(gpus_per_node), _divisors(window), _divisors(run.model.num_layers)):
        if gpus % (tp * cp * pp):
            continue
        precision = run.training.precision
        for zero, virtual, recompute, segments in product(
            [1] if precision == "bfloat16" else [0, 1, 2, 3], (1, 2, 4), ("none", "layer", "stage"), cuts
        ):
            changed = with_layout(
                run,
                tensor_parallel_size=tp,
                context_parallel_size=cp,
                pipeline_parallel_size=pp,
                virtual_stages=virtual,
                sequence_parallel=tp > 1,
                zero_stage=zero,
            )
            changed = with_training(
                changed,
                recompute=recompute,
                recompute_layers=0,
                segments_per_micro_batch=segments,
                micro_batches_per_window=window // segments,
            )
            own_is_new = own_is_new and changed != own
            yield changed
    if own_is_new:
        yield own


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _powers(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent <= limit]


def _valid(runs: Iterable[RunConfig], gpus: int, gpu: str) -> Iterator[Plan]:
    for run in runs:
        try:
            yield plan(run, gpus, gpu)
        except UserError:
            continue


def search(run: RunConfig, gpus: int, gpu: str, count: int = 10) -> list[Plan]:
    """The fastest layouts that fit, best first; among equals, the one with fewer kinds of parallelism.

    Raises:
        UserError: the GPU is not known, or the run is wrong in every layout.
    """
    validate_model(run)
    validate_data(run)
    validate_task(run)
    validate_optimizer(run)
    candidates = layouts(run, gpus, find_gpu(gpu).gpus_per_node)
    fitting = [_with_fewest_recomputed(each) for each in _valid(candidates, gpus, gpu) if each.fits]
    if not fitting:
        return []
    best = min(each.time.total for each in fitting)
    fitting.sort(key=lambda each: (int((each.time.total / best - 1) / SIMPLICITY), _complexity(each), each.time.total))
    return fitting[:count]


def _with_fewest_recomputed(each: Plan) -> Plan:
    """A plan that fits and whose layers are computed again: with as few of them as fit."""
    sizes = each.sizes
    if sizes.run.training.recompute != "layer":
        return each

    def other(layers: int) -> Plan:
        return plan(with_training(sizes.run, recompute_layers=layers), sizes.processes, each.gpu.name)

    least = bisect_left(range(1, sizes.chunk_layers), True, key=lambda layers: other(layers).fits) + 1
    return other(least) if least < sizes.chunk_layers else each


def _complexity(each: Plan) -> int:
    sizes = each.sizes
    kinds = sum(size > 1 for size in (sizes.tp, sizes.cp, sizes.pp, sizes.run.layout.virtual_stages))
    return kinds + (sizes.run.training.recompute != "none")


def remedies(refused: Plan) -> list[str]:
    """What makes a run fit that does not: single changes, or else another layout on as many GPUs; and more GPUs, or else more
    GPUs in another layout. Empty if nothing up to MOST_GPUS does. Where only some layers are computed again, changes other than
    of their number go with all of them."""
    run, gpus, gpu = refused.sizes.run, refused.sizes.processes, refused.gpu.name
    layout, some, also = run.layout, "", ""
    found = []
    if refused.sizes.recomputed_chunk_layers < refused.sizes.chunk_layers and run.training.recompute == "layer":
        some, also = "--training.recompute_layers", " --training.recompute_layers 0"
    run = with_training(run, recompute_layers=0)
    if some and _fits(run, gpus, gpu):
        fewest = _with_fewest_recomputed(plan(run, gpus, gpu))
        found.append(f"{some} {fewest.sizes.run.training.recompute_layers}")
    for recompute in ("layer", "stage"):
        if recompute != run.training.recompute and _fits(with_training(run, recompute=recompute), gpus, gpu):
            all_layers = recompute == "layer" and refused.sizes.run.training.recompute_layers > 0
            found.append(f"--training.recompute {recompute}" + " --training.recompute_layers 0" * all_layers)
            break
    if run.training.precision == "float32":
        for zero in range(layout.zero_stage + 1, 4):
            if _fits(with_layout(run, zero_stage=zero), gpus, gpu):
                found.append(f"--layout.zero_stage {zero}{also}")
                break
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        for size in _powers(gpus):
            if size > getattr(layout, key) and _fits(with_layout(run, **{key: size}), gpus, gpu):
                found.append(f"--layout.{key} {size}{also}")
                break
    if not found:
        found += _best_layout(refused.sizes.run, gpus, gpu)
    more = next((number for number in doubled(gpus) if _fits(run, number, gpu)), None)
    if more is not None:
        found.append(f"--gpus {more}{also}")
    return found or _layout_on_more(refused.sizes.run, gpus, gpu)


def _fits(run: RunConfig, gpus: int, gpu: str) -> bool:
    return any(each.fits for each in _valid([run], gpus, gpu))


def doubled(gpus: int) -> Iterator[int]:
    """Numbers of GPUs to try where so many are too few."""
    while (gpus := 2 * gpus) <= MOST_GPUS:
        yield gpus


def _best_layout(run: RunConfig, gpus: int, gpu: str) -> list[str]:
    return [" ".join(layout_options(each, run)) for each in search(run, gpus, gpu, count=1)]


def _layout_on_more(run: RunConfig, gpus: int, gpu: str) -> list[str]:
    for number in doubled(gpus):
        if best := _best_layout(run, number, gpu):
            return [f"--gpus {number} {best[0]}"]
    return []


def layout_options(each: Plan, run: RunConfig) -> list[str]:
    """What to write on the command line of a run to get this layout."""
    found = []
    for section, keys in LAYOUT_OPTIONS.items():
        for key in keys:
            value, own = (getattr(getattr(of, section), key) for of in (each.sizes.run, run))
            # Without recompute "layer" it does not matter how many layers that would take.
            if value != own and (key != "recompute_layers" or each.sizes.run.training.recompute == "layer"):
                found.append(f"--{section}.{key} {str(value).lower() if isinstance(value, bool) else value}")
    return found
