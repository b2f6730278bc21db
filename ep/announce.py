"""What the terminal says while `ep serve` starts: experts loaded, the routers' phases, where the server answers."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from ep.cluster.members import SERVING
from ep.terminal import Terminal

if TYPE_CHECKING:
    from ep.cluster.launch import Launch
    from ep.serve_options import ServeOptions


def announce(options: ServeOptions, launch: Launch, terminal: Terminal, ended: threading.Event) -> None:
    """Say what the router is doing until the server answers, then where; gives up when the server has ended."""
    _show_loading(launch, terminal, ended)
    base = f"http://{options.host}:{options.port}"
    num_routers = launch.options.num_routers
    last = ""
    while not _answers(f"{base}/health"):
        phase = router_phase(launch.progress()["routers"], num_routers)
        if phase and phase != last:
            terminal.say(phase)
            last = phase
        if ended.wait(0.25):
            return
    launch.set_phase(SERVING)
    terminal.say(f"[green]serving {options.model} at {base}/v1[/green]  (Ctrl-C stops it)")
    if terminal.log is not None:
        terminal.say(f"log: {terminal.log}")
    if launch.options.trace is not None:
        parts = f", a part for each of {num_routers} routers" if num_routers > 1 else ""
        terminal.say(f"load is recorded in {launch.options.trace}{parts}")
    if options.check:
        _first_token(base, options)
        terminal.say("first token")
        os.kill(os.getpid(), signal.SIGINT)


def _show_loading(launch: Launch, terminal: Terminal, ended: threading.Event) -> None:
    """A bar over all experts of all shards, until every shard is up, one failed or the server ended."""
    if not launch.options.num_shard_actors:
        return
    states: set[str] = set()
    with terminal.progress(f"loading experts into {launch.options.placement.num_shards} shards") as (bar, task):
        while not ended.wait(0.1) and not (states and states <= {"up", "failed"}):
            shards = launch.progress()["shards"]
            done, total = (sum(shard["experts"][i] for shard in shards) for i in (0, 1))
            bar.update(task, completed=done, total=total or None)
            states = {shard["state"] for shard in shards}
    if states == {"up"}:
        terminal.say(f"{len(shards)} shards hold {total} experts")


def router_phase(phases: dict[int, str], num_routers: int) -> str:
    """What all routers are doing, by what each said last; "" while they differ."""
    said = {phases.get(rank, "") for rank in range(num_routers)}
    phase = said.pop() if len(said) == 1 else ""
    who = "router" if num_routers == 1 else f"{num_routers} routers"
    return f"{who}: {phase}" if phase else ""


def _first_token(base: str, options: ServeOptions) -> None:
    """Ask the server for one token."""
    body = {"model": options.model, "prompt": "Hello", "max_tokens": 1}
    headers = {"Content-Type": "application/json"}
    if options.api_key is not None:
        headers["Authorization"] = f"Bearer {options.api_key}"
    request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=options.deadline_s) as response:
        response.read()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
