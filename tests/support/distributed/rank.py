"""One rank of a job of `processes.Ranks`: python -m tests.support.distributed.rank FOLDER."""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path


def main(folder: Path, rank: str) -> int:
    stacks = (folder / f"stacks{rank}").open("w")
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
    from infini_train.runtime import platform

    platform.install()
    try:
        module, function, arguments = pickle.loads((folder / "job").read_bytes())
        answer = pickle.dumps(getattr(importlib.import_module(module), function)(*arguments))
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        return 1
    (folder / f"writing{rank}").write_bytes(answer)
    (folder / f"writing{rank}").rename(folder / f"answer{rank}")
    # Keep this rank's sockets open: the other ranks may still need them.
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), os.environ["RANK"]))
