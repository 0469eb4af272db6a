"""Fork a process for each client, kill it if the client exits, and send the client its exit status."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
from typing import Any, NoReturn


def preload() -> None:
    """Import all modules that a rank imports at its start."""
    import torch

    from infini_train.runtime import platform

    platform.install()
    import deepspeed  # noqa: F401
    import torch.distributed.run

    import infini_train.cli.main
    import infini_train.evaluation.commands
    import infini_train.training.loop  # noqa: F401

    torch.set_num_threads(1)


def run_as_main(arguments: list[str]) -> None:
    """Run -m MODULE, -c CODE or a script with its arguments, as the interpreter does."""
    while arguments[0] in ("-u", "-S"):
        arguments = arguments[1:]
    first, *rest = arguments
    if first == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


class Server:
    """Accepts one request at a time; any number of forked processes run at once."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.clients: dict[int, socket.socket] = {}
        self.wakeup, self.woken = socket.socketpair()
        self.wakeup.setblocking(False)
        self.woken.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.asked_to_end = False
        signal.signal(signal.SIGTERM, self.ask_to_end)
        signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        self.selector.register(self.woken, selectors.EVENT_READ)

    def ask_to_end(self, *_: object) -> None:
        self.asked_to_end = True

    def serve(self) -> dict[str, Any] | None:
        """Serve clients until asked to end.

        Returns:
            In each forked process, the request to run; in the server, None.
        """
        parent = os.getppid()
        while os.getppid() == parent and not self.asked_to_end:
            for key, _ in self.selector.select(timeout=1.0):
                if key.fileobj is self.listener:
                    request = self.accept()
                    if request is not None:
                        return request
                elif key.fileobj is self.woken:
                    self.woken.recv(4096)
                else:
                    self.kill_process_of(key.fileobj)
            self.reap()
        # Also kill processes whose clients have exited unnoticed.
        for pid in self.clients:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return None

    def accept(self) -> dict[str, Any] | None:
        connection, _ = self.listener.accept()
        size, files, _, _ = socket.recv_fds(connection, 4, 3)
        if len(files) < 3:
            connection.close()
            return None
        request = json.loads(connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
        pid = os.fork()
        if pid == 0:
            self.become(files)
            return request
        for each in files:
            os.close(each)
        self.clients[pid] = connection
        self.selector.register(connection, selectors.EVENT_READ)
        connection.sendall(f"{pid}\n".encode())
        return None

    def become(self, files: list[int]) -> None:
        """Turn the forked process into the requested one: close all of the server's files and reset signals."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.selector.close()
        for each in (self.listener, self.wakeup, self.woken, *self.clients.values()):
            each.close()
        for target, source in enumerate(files):
            os.dup2(source, target)
            os.close(source)

    def kill_process_of(self, connection: object) -> None:
        for pid, each in self.clients.items():
            if each is connection:
                self.selector.unregister(each)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self.clients.pop(pid, None)
            if connection is None:
                continue
            with contextlib.suppress(KeyError):
                self.selector.unregister(connection)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(f"{status}\n".encode())
            connection.close()


def run_and_exit(arguments: list[str]) -> NoReturn:
    """Run a program and exit like an interpreter, but without the second that the teardown of so many modules takes."""
    code: object = 0
    try:
        run_as_main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is None or not isinstance(code, int):
        if code is not None:
            print(code, file=sys.stderr)
        code = int(code is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def main(address: str, python: str) -> None:
    preload()
    # Exclude these objects from garbage collection in forked processes, so that their pages stay shared.
    gc.collect()
    gc.freeze()
    request = Server(address).serve()
    if request is None:
        return
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None
    # Child processes started with sys.executable use the warm interpreter too.
    sys.executable = python
    run_and_exit(request["arguments"])


if __name__ == "__main__":
    main(*sys.argv[1:])
