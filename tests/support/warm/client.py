"""Proxy of a forked process: forwards signals to it, and ends with its exit code or signal. Starts often, so imports little."""

import json
import os
import select
import signal
import socket
import sys


def main() -> None:
    address = os.environ.get("WARM_PYTHON_SOCKET")
    if address is None:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    forwarded = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
    # Block signals until there is a process to forward them to.
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
    request = json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(4, "little")], [0, 1, 2])
    connection.sendall(request)
    answers = connection.makefile()
    pid = int(answers.readline())
    # Receive signals through a pipe: a Python handler would not run for a signal that arrives just before a blocking read.
    received, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)
    for number in forwarded:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
    while connection not in select.select([connection, received], [], [])[0]:
        for number in os.read(received, 64):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break  # The process has just ended; its status comes next.
    status = answers.readline()
    if not status:
        os._exit(120)
    code = os.waitstatus_to_exitcode(int(status))
    if code >= 0:
        os._exit(code)
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


main()
