"""Layouts and options that must not change a run, chosen so that every pair of option values occurs at least once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import combinations, product

from infini_train.config import LayoutConfig, RunConfig
from infini_train.config.validation import validate
from infini_train.runtime.errors import UserError


@dataclass(frozen=True)
class Case:
    """A layout and the options that must not change a run."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    virtual: int = 1
    dp: int = 1
    zero: int = 1
    sequence_parallel: bool = False
    window: tuple[int, int] = (2, 2)
    """Segments per micro-batch, micro-batches per window."""
    recompute: str = "none"
    """`training.recompute`, optionally followed by the number of recomputed layers per chunk."""
    rule: str = "linear"
    ageing: int = 1
    """`training.memory_ageing`: upper bound of the number of times that a memory update is applied."""
    loss_chunk: int = 1024
    """Number of positions whose logits exist at one time."""

    @property
    def processes(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def name(self) -> str:
        return "-".join(
            [f"tp{self.tp}", f"cp{self.cp}", f"pp{self.pp}", f"v{self.virtual}", f"dp{self.dp}", f"zero{self.zero}"]
            + ["sp"] * self.sequence_parallel
            + [f"{self.window[0]}x{self.window[1]}", self.recompute.replace(" ", ""), self.rule]
            + [f"ageing{self.ageing}"] * (self.ageing != 1)
            + [f"loss{self.loss_chunk}"] * (self.loss_chunk != 1024)
        )

    def apply(self, run: RunConfig) -> RunConfig:
        """Return the run with this layout and these options."""
        segments, micro_batches = self.window
        recompute, _, recomputed = self.recompute.partition(" ")
        return replace(
            run,
            model=replace(run.model, update_rule=self.rule),
            layout=LayoutConfig(
                tensor_parallel_size=self.tp,
                sequence_parallel=self.sequence_parallel,
                context_parallel_size=self.cp,
                pipeline_parallel_size=self.pp,
                virtual_stages=self.virtual,
                zero_stage=self.zero,
            ),
            training=replace(
                run.training,
                segments_per_micro_batch=segments,
                micro_batches_per_window=micro_batches,
                recompute=recompute,
                recompute_layers=int(recomputed or 0),
                memory_ageing=self.ageing,
                memory_ageing_rise=0.0,
                loss_chunk_tokens=self.loss_chunk,
            ),
        )

    def reference(self) -> Case:
        """Return the case that computes the same run in one process."""
        return Case(window=self.window, rule=self.rule, ageing=self.ageing)


VALUES = {
    "tp": (1, 2),
    "cp": (1, 2),
    "pp": (1, 2, 4),
    "virtual": (1, 2),
    "dp": (1, 2),
    "zero": (0, 1, 2, 3),
    "sequence_parallel": (False, True),
    "window": ((2, 2), (4, 1), (2, 4)),
    "recompute": ("none", "layer", "stage"),
    "rule": ("linear", "delta"),
    "loss_chunk": (1024, 13),
    "ageing": (1, 40),
}
MAX_PROCESSES = 8


def allowed_cases(run: RunConfig) -> list[Case]:
    """Return every combination that validation accepts on at most MAX_PROCESSES processes."""
    cases = []
    for values in product(*VALUES.values()):
        case = Case(**dict(zip(VALUES, values, strict=True)))
        if case.processes > MAX_PROCESSES:
            continue
        try:
            validate(case.apply(run), case.processes)
        except UserError:
            continue
        cases.append(case)
    return cases


def _pairs(case: Case) -> set[tuple[tuple[str, object], ...]]:
    return set(combinations(sorted(asdict(case).items()), 2))


def pairwise_cases(run: RunConfig) -> list[Case]:
    """Choose few cases that cover every pair of values of the allowed cases. Smaller process counts are preferred."""
    candidates = sorted(allowed_cases(run), key=lambda case: case.processes)
    missing = set().union(*(_pairs(case) for case in candidates))
    pairs = {case: _pairs(case) for case in candidates}
    chosen = []
    while missing:
        best = max(candidates, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen, key=lambda case: case.processes)
