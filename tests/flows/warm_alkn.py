"""``alkn`` many times over at the price of one import: each call is a process of its own, forked from this one.

Reads one JSON object a line (``folder``, ``arguments``, ``api``, ``out``, ``err``), forks, runs the command
line's own ``main`` with its output in those two files, and answers with the exit status. ``api`` is the Prefect
server to speak to, if there is one: Prefect is not imported before the fork.
"""

import gc
import json
import os
import sys
import traceback

import flows.cli
import tasks.tracking
import tasks.versioning  # noqa: F401
from alkn import chain, estimate, registry  # noqa: F401
from alkn.requests import intake  # noqa: F401


def child(folder: str, arguments: list[str], api: str | None, out: str, err: str) -> int:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    os.chdir(folder)
    if api is not None:
        os.environ["PREFECT_API_URL"] = api
    sys.argv = ["alkn", *arguments]
    try:
        flows.cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for known in (registry.methods, registry.metrics, registry.gates, registry.benchmarks):
    list(known)
gc.freeze()
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        status = child(**json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: taking a forked interpreter with torch apart costs a second.
        os._exit(status)
    sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
    sys.stdout.flush()
