"""``alkn`` many times over at the price of one import: each call is a process of its own, forked from this one.

Reads one JSON object a line (``folder``, ``arguments``, ``out``, ``err``), forks, runs the command
line's own ``main`` with its output in those two files, and answers with the exit status.
"""

import json
import os
import sys

import flows.cli
import tasks.tracking
import tasks.versioning  # noqa: F401
from alkn import chain, estimate  # noqa: F401
from alkn.requests import intake  # noqa: F401


def child(folder: str, arguments: list[str], out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    os.chdir(folder)
    sys.argv = ["alkn", *arguments]
    flows.cli.main()


for line in sys.stdin:
    if (pid := os.fork()) == 0:
        # A traceback of what `main` lets through goes to the file too, and the status is 1, as in a shell.
        child(**json.loads(line))
        sys.exit(0)
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
    sys.stdout.flush()
