"""Runs commands of rekindle in forked processes, which start fast because torch is loaded here.

Prints "ready", then reads jobs from stdin and prints results to stdout, one JSON object per line:
{"arguments": [...], "fault": "...", "signal": 9, "after": 0.3}
{"arguments": [...], "signal": 15, "until": "run/metrics.jsonl"}
{"status": 0, "out": "...", "err": ""}
`fault` and `trace` are passed to fault.c. `signal` is sent after `after` seconds, or once the file
`until` is not empty, and again `again` seconds later. A negative status is the signal that killed
the process. Saving a checkpoint is retried after milliseconds here instead of seconds.
"""

import json
import os
import select
import sys
import tempfile
import traceback
from typing import Any

import torch

from rekindle.checkpoint import writer
from rekindle.cli import main


def work(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ["FAULT"] = job.get("fault", "")
        os.environ["TRACE"] = job.get("trace", "")
        torch.set_num_threads(1)  # recreate torch's thread pool before several threads try to
        status = 1
        try:
            status = main(job["arguments"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if job.get("signal"):
        descriptor = os.pidfd_open(pid)
        while (file := job.get("until")) and not (os.path.exists(file) and os.path.getsize(file)):
            if select.select([descriptor], [], [], 0.005)[0]:
                break
        for pause in filter(None, (job.get("after", 0.001), job.get("again"))):
            select.select([descriptor], [], [], pause)  # returns early if it has ended
            os.kill(pid, job["signal"])
        os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def serve() -> None:
    writer.RETRY_DELAYS = (0.01, 0.04)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # loads the compiler
    results = os.fdopen(os.dup(1), "w")
    print("ready", file=results, flush=True)  # so that times of jobs do not include the start
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = work(json.loads(line))
            printed = []
            for file in (out, err):
                file.seek(0)
                printed.append(file.read())
        result = {"status": status, "out": printed[0], "err": printed[1]}
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    serve()
