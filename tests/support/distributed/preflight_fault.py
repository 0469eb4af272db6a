"""launch/preflight.py on a rank whose node has a fault: `python -m tests.support.distributed.preflight_fault FAULT ...`.

The fault is real to the preflight, which knows nothing of it: a clock that is off, a process that stands still, a slow network.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

PREFLIGHT = Path(__file__).parents[3] / "launch" / "preflight.py"


def stand_still(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    fault = sys.argv.pop(1)
    if fault == "clock":
        clock = time.time
        time.time = lambda: clock() + 100.0
    elif fault == "hang_at_start":
        stand_still()
    elif fault == "hang_in_checks":
        from launch import preflight_node

        preflight_node.check_node = stand_still
    elif fault == "hang_in_all_reduce":
        from launch import preflight_bandwidth

        preflight_bandwidth.all_reduce_bandwidth = stand_still
    elif fault == "slow":
        import torch.distributed as dist

        all_reduce = dist.all_reduce

        def slow_all_reduce(*arguments: Any, **keywords: Any) -> Any:
            time.sleep(0.4)
            return all_reduce(*arguments, **keywords)

        dist.all_reduce = slow_all_reduce
    sys.argv[0] = str(PREFLIGHT)
    runpy.run_path(str(PREFLIGHT), run_name="__main__")


if __name__ == "__main__":
    main()
