"""Training steps whose memory operations run in the kernels under Triton's interpreter, as on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from infini_kernels import backend, local, operation
from infini_train.config import RunConfig
from infini_train.runtime import platform
from infini_train.runtime.errors import AgreedError

platform.install()

from infini_train.model import self_attention  # noqa: E402 (Megatron-core is imported after `install`)
from infini_train.parallel.layout import initialize_process_group  # noqa: E402
from infini_train.resilience.stop_request import StopRequest  # noqa: E402
from infini_train.training import self_test  # noqa: E402
from infini_train.training.step import train_step  # noqa: E402
from infini_train.training.training_run import build_training_run  # noqa: E402


@contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Return a context in which backend 'auto' uses the kernels, as on CUDA."""
    places = (backend, local, operation, self_attention)
    originals = [place.uses_triton for place in places]
    for place in places:
        place.uses_triton = lambda *_: True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place, original in zip(places, originals, strict=True):
            place.uses_triton = original  # type: ignore[attr-defined]


def steps(run: RunConfig, ways: list[tuple[str, int]], count: int) -> dict[str, list[tuple[float, float]]]:
    """Return loss and gradient norm of a few steps: with plain PyTorch, and with kernels for each recompute setting."""

    def trained(run: RunConfig) -> list[tuple[float, float]]:
        training = build_training_run(run)
        records = [train_step(training, StopRequest())[0] for _ in range(count)]
        return [(record["loss"], record["grad_norm"]) for record in records]

    found = {"plain": trained(run)}
    with kernels_everywhere():
        for recompute, layers in ways:
            training = replace(run.training, recompute=recompute, recompute_layers=layers)  # type: ignore[arg-type]
            found[f"{recompute} {layers}"] = trained(replace(run, training=training))
    return found


def found_by_self_test(run: RunConfig, precision: str) -> str | None:
    """Return the error that the self-test finds with the kernels in this process's layout, or None."""
    initialize_process_group()
    with kernels_everywhere():
        try:
            self_test._test_precision(run, precision)  # type: ignore[arg-type]
        except AgreedError as error:
            return str(error)
    return None
