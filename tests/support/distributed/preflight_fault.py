"""Run launch/preflight.py with a fault on this rank's node: `python -m tests.support.distributed.preflight_fault FAULT ...`.

The faults are a wrong clock, a stopped process and a slow network. The preflight must detect them without knowing of them.
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


def stop_process(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    fault = sys.argv.pop(1)
    if fault == "clock":
        clock = time.time
        time.time = lambda: clock() + 100.0
    elif fault == "hang_at_start":
        stop_process()
    elif fault == "hang_in_checks":
        from launch import preflight_node

        preflight_node.check_node = stop_process
    elif fault == "hang_in_all_reduce":
        from launch import preflight_bandwidth

        preflight_bandwidth.all_reduce_bandwidth = stop_process
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
