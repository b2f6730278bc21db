"""What a long-running command shows: phases and progress on the terminal; what libraries print goes to a log file."""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


def state_dir() -> Path:
    """Where log files go: $XDG_STATE_HOME/ep or ~/.local/state/ep."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "ep"


class Terminal:
    """The user's terminal, kept apart from the process's own stdout and stderr once `quiet` points those at a log."""

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self.log: Path | None = None
        self.console = Console(stderr=True, highlight=False)
        self._since = time.monotonic()

    def say(self, text: str) -> None:
        """One line, with the seconds since the start."""
        self.console.print(f"[dim]{time.monotonic() - self._since:5.1f} s[/dim]  {text}")

    @contextmanager
    def quiet(self, name: str) -> Iterator[None]:
        """Inside, what this process and its children print goes to a log file, unless verbose."""
        if self.verbose:
            yield
            return
        folder = state_dir() / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        config = _vllm_logging(self.log)
        before = os.environ.get("VLLM_LOGGING_CONFIG_PATH")
        if before is None:
            os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(config)
        saved_out, saved_err = os.dup(1), os.dup(2)
        console = self.console
        self.console = Console(file=os.fdopen(os.dup(saved_err), "w", buffering=1), highlight=False)
        target = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _redirect(target)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved_out, 1)
            os.dup2(saved_err, 2)
            for fd in (saved_out, saved_err):
                os.close(fd)
            # Libraries have last words when the interpreter ends (nanobind's leak reports): to the log as well.
            atexit.register(_redirect, target)
            self.console = console
            config.unlink(missing_ok=True)
            if before is None:
                os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None)

    @contextmanager
    def progress(
        self, label: str, total: int | None = None, per_second: float = 10
    ) -> Iterator[tuple[Progress, TaskID]]:
        """A progress bar that leaves one finished line behind. per_second: how often it is drawn, which takes time from
        what is measured meanwhile."""
        bar = Progress(
            TextColumn("         {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=per_second,
        )
        with bar:
            yield bar, bar.add_task(label, total=total)


def _redirect(target: int) -> None:
    """Point stdout and stderr of this process at the file descriptor `target`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)


def _vllm_logging(log: Path) -> Path:
    """A logging config by which every vLLM process appends to `log`."""
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "line"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    fd, path = tempfile.mkstemp(prefix="ep-logging-", suffix=".json")
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        json.dump(config, stream)
    return Path(path)
