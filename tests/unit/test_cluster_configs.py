"""The examples in configs/clusters, run or parsed as far as a machine without Slurm and GPUs can."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

import click
import yaml

from ep.cli import cli

FOLDER = Path(__file__).parents[2] / "configs" / "clusters"
RAY = """#!/usr/bin/env bash
line=$(printf '%q ' ray "$@")
echo "$line" >> "$CALLS"
exec sleep 60
"""
EP = """#!/usr/bin/env bash
until [[ $(grep -c ^ray "$CALLS") == 3 ]]; do sleep 0.05; done
line=$(printf '%q ' ep "$@")
echo "$line" >> "$CALLS"
"""
# As far as this script needs it: runs the command on this machine.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


def check_ep(words: list[str]) -> dict[str, object]:
    """`ep` must know the command and all of its options; returns their values."""
    assert words[0] == "ep"
    command: click.Command = cli
    names = words[1:]
    while isinstance(command, click.Group):
        command = command.commands[names.pop(0)]
    with command.make_context("ep", names) as context:
        return dict(context.params)


def check_ray(words: list[str]) -> None:
    """The same for `ray`."""
    from ray.scripts.scripts import cli as ray_cli

    assert words[0] == "ray"
    command = ray_cli.commands[words[1]]
    assert not [word for word in words[2:] if not word.startswith("--")], "`ray start` takes options only"
    with command.make_context("ray", words[2:]):
        pass


def test_the_slurm_script(tmp_path: Path) -> None:
    """With commands of Slurm that run everything here, and `ray` and `ep` that only say how they were called."""
    calls, tools = tmp_path / "calls", tmp_path / "bin"
    tools.mkdir()
    contents = {"srun": SRUN, "ray": RAY, "ep": EP, "scontrol": "#!/bin/sh\nprintf 'a1\\na2\\na3\\n'\n"}
    contents |= {"hostname": "#!/bin/sh\necho 127.0.0.1 10.9.9.9\n", "activate": ""}
    for name, text in contents.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as head:  # the script waits for the head's port
        port = str(head.getsockname()[1])
        done = subprocess.run(
            ["bash", FOLDER / "slurm.sbatch"],
            env={
                "PATH": f"{tools}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "ENVIRONMENT": str(tmp_path),
                "CHECKPOINT": "/some where/DeepSeek-V3",
                "PORT": port,
                "CALLS": str(calls),
                "SLURM_JOB_ID": "17",
                "SLURM_JOB_NODELIST": "a[1-3]",
                "SLURM_CPUS_PER_TASK": "32",
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    called = [shlex.split(line) for line in calls.read_text().splitlines()]
    starts = [words for words in called if words[0] == "ray"]
    assert len(starts) == 3 and sum("--head" in words for words in starts) == 1
    for words in starts:
        check_ray(words)
    (serve,) = (words for words in called if words[0] == "ep")
    options = check_ep(serve)
    assert (options["shards"], options["nodes"], options["address"]) == (23, 3, f"127.0.0.1:{port}")
    assert options["checkpoint"] == "/some where/DeepSeek-V3"


def test_the_mi300x_example() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (FOLDER / "mi300x.yaml").read_text()
    validate_config(prepare_config(yaml.safe_load(text)))
    config = yaml.safe_load(text)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for start in (command for command in starts if "ray start" in command):
        assert subprocess.run(["bash", "-n", "-c", start], check=False).returncode == 0
        check_ray(shlex.split(re.sub(r"\$\(.*?\)", "10.0.0.2", start[start.index("ray start") :])))
    commands = re.findall(r"^#   (ep .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    assert check_ep(shlex.split(commands[0]))["shards"] == 15
    assert check_ep(shlex.split(commands[1]))["nodes"] == (1, 2)
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])


