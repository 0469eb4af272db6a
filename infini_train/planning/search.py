"""Search over layouts of a run: the fastest layouts that fit, and changes that make a run fit."""

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
"""Largest number of GPUs that is suggested."""
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
"""Keys that `layouts` changes, by section of the configuration."""
SIMPLICITY = 0.01
"""Layouts whose step times differ by less than this fraction of the best time rank as equal. Then the simpler one is first."""


def layouts(run: RunConfig, gpus: int, gpus_per_node: int) -> Iterator[RunConfig]:
    """Yield runs that compute the same training step with other layouts.

    The runs combine all tensor, context and pipeline sizes that divide the number of GPUs, 1, 2 or 4 virtual stages, all ZeRO
    stages, and all values of `training.recompute`. A window is split into micro-batches of at most 16 segments, or of as
    many segments as the run has. The last item is the run's own layout, if it is not among the others. Some of the yielded
    runs may be invalid.
    """
    own = with_training(run, recompute_layers=0)
    window = run.training.segments_per_micro_batch * run.training.micro_batches_per_window
    cuts = [run.training.segments_per_micro_batch]
    if run.model.attention != "full":  # with full attention, the context is the micro-batch, so its length must stay
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
    """Return the fastest layouts that fit, best first. Among equal layouts, those with fewer kinds of parallelism come first.

    Args:
        run: the run whose layout is changed.
        gpus: number of GPUs; each has one process.
        gpu: a key of `infini_train.runtime.hardware.GPUS`.
        count: largest number of layouts to return.

    Raises:
        UserError: the GPU is not known, or the run is invalid in every layout.
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
    """Return a plan that recomputes as few layers as fit into GPU memory. `each` must fit."""
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
    """Return command-line options that make a run fit, one string for each alternative.

    The alternatives are single changes, or a different layout on the same GPUs if no single change helps. One more alternative
    is a larger number of GPUs. If none of these helps, the result is a larger number of GPUs with a different layout. The list
    is empty if nothing fits on up to MOST_GPUS GPUs. If the run recomputes only some layers, changes of other keys also set
    `training.recompute_layers` to 0 (all layers).
    """
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
    """Yield larger numbers of GPUs to try: `gpus` times 2, 4, 8 and so on, up to MOST_GPUS."""
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
    """Return the command-line options that change `run` to the layout of a plan."""
    found = []
    for section, keys in LAYOUT_OPTIONS.items():
        for key in keys:
            value, own = (getattr(getattr(of, section), key) for of in (each.sizes.run, run))
            # `recompute_layers` has an effect only with recompute "layer".
            if value != own and (key != "recompute_layers" or each.sizes.run.training.recompute == "layer"):
                found.append(f"--{section}.{key} {str(value).lower() if isinstance(value, bool) else value}")
    return found
