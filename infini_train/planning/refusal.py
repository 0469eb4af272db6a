"""Error messages for a run that does not fit into GPU memory, or that has no valid layout on the given GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NoReturn

from infini_train.config import RunConfig
from infini_train.planning.layout_plan import Plan, plan, with_training
from infini_train.planning.plan_text import GB
from infini_train.planning.search import doubled, layouts, remedies, search
from infini_train.runtime.errors import UserError
from infini_train.runtime.hardware import GPUS, find_gpu


def refuse_too_large(planned: Plan) -> None:
    """Refuse a run that does not fit into GPU memory.

    Raises:
        UserError: the run does not fit. The message lists changes that make it fit.
    """
    if planned.fits:
        return
    memory, changes = planned.memory, remedies(planned)
    largest = max(
        ("weights", "gradients", "optimizer", "activations", "memory_states", "buffers"), key=lambda name: getattr(memory, name)
    )
    category = largest.replace("_", " ")
    raise UserError(
        f"the run needs {memory.total / GB:.1f} GB on a GPU of stage {memory.stage}, but {planned.gpu.name} has "
        f"{planned.usable_memory / GB:.1f} GB to plan with ({category} take {getattr(memory, largest) / GB:.1f} GB); it fits "
        f"with {', or '.join(changes) if changes else 'no layout on any number of GPUs: make the model smaller'}"
    )


def refuse_no_layout(run: RunConfig, gpus: int, gpu: str) -> NoReturn:
    """Report why `search` found no layout.

    Raises:
        UserError: always. The message lists changes with which `search` finds a layout.
    """
    valid, refused = _check_layouts(run, gpus, gpu)
    # Validation checks the rows last, so a layout that it refuses because of the rows is valid in everything else.
    uneven = sorted({each.data_parallel_size(gpus) for each, why in refused if why.startswith("training.rows ")})
    sizes = " or ".join(", ".join(map(str, uneven)).rsplit(", ", 1))
    rows = f"training.rows is {run.training.rows}, which a data-parallel size of {sizes} does not divide"
    other_rows = _other_rows(run, gpus, gpu) if uneven else []
    if valid:
        least = min(each.memory.total for each in valid) / GB
        raise UserError(
            f"no layout of this run fits {gpus} × {gpu}: of {len(valid)} valid ones the smallest needs {least:.1f} GB, and "
            f"{valid[0].usable_memory / GB:.1f} GB may be planned"
            + (f"; in others {rows}" if other_rows else "")
            + _suggestion(other_rows + _other_gpus(doubled(gpus), run, gpu) + _larger_gpus(run, gpus, gpu))
        )
    if uneven:
        node = find_gpu(gpu).gpus_per_node
        step = node if gpus > node else 1
        fewer = range((gpus - 1) // step * step, 0, -step)
        # For a larger number of GPUs, try powers of two: they divide the rows more often than multiples of this number.
        changes = other_rows + _other_gpus(fewer, run, gpu) or _other_gpus(doubled(1 << gpus.bit_length() - 1), run, gpu)
        raise UserError(f"no layout of this run works on {gpus} GPUs: {rows}{_suggestion(changes)}")
    raise UserError(f"no layout of this run works on {gpus} GPUs; of the simplest: {refused[0][1]}")


def _check_layouts(run: RunConfig, gpus: int, gpu: str) -> tuple[list[Plan], list[tuple[RunConfig, str]]]:
    """Return plans of all valid layouts, and the refused layouts with the error of the validation."""
    valid, refused = [], []
    for each in layouts(run, gpus, find_gpu(gpu).gpus_per_node):
        try:
            valid.append(plan(each, gpus, gpu))
        except UserError as error:
            refused.append((each, str(error)))
    return valid, refused


def _suggestion(changes: list[str]) -> str:
    return f"; layouts fit with {', or '.join(changes)}" if changes else "; make the model smaller"


def _other_rows(run: RunConfig, gpus: int, gpu: str) -> list[str]:
    """Suggest the next multiple of the number of GPUs, which every data-parallel size divides, if a layout fits with it."""
    rows = -(-run.training.rows // gpus) * gpus
    return [f"--training.rows {rows}"] if search(with_training(run, rows=rows), gpus, gpu, count=1) else []


def _other_gpus(numbers: Iterable[int], run: RunConfig, gpu: str) -> list[str]:
    """Suggest the first of these numbers of GPUs on which a layout fits."""
    return [f"--gpus {number}" for number in islice((each for each in numbers if search(run, each, gpu, count=1)), 1)]


def _larger_gpus(run: RunConfig, gpus: int, gpu: str) -> list[str]:
    """Suggest the smallest GPU type with more memory on which a layout fits."""
    larger = sorted((each for each in GPUS.values() if each.memory > find_gpu(gpu).memory), key=lambda each: each.memory)
    return [f"--gpu {each.name}" for each in larger if search(run, gpus, each.name, count=1)][:1]
