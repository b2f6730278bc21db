"""The parts that several routers write, read as one trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ep.errors import TraceError
from ep.load import totals
from ep.report.numbers import ReportOptions, plain, report_numbers
from ep.trace import Trace
from ep.trace_parts import merge_parts, part_path, read_all_parts
from ep.trace_path import check_trace
from tests.traces import SMALL, make_trace, write_trace


def parts_of(trace: Trace, num_routers: int) -> list[Trace]:
    """The trace as so many routers would have written it, each every num_routers-th window."""
    header = replace(trace.header, node_of_router=("node-0",) * num_routers)
    return [
        replace(
            trace,
            source=part_path(trace.source, rank),
            header=header,
            windows=tuple(replace(window, router=rank) for window in trace.windows[rank::num_routers]),
            warnings=(),
        )
        for rank in range(num_routers)
    ]


def write_parts(parts: Sequence[Trace], path: Path) -> Path:
    for rank, part in enumerate(parts):
        write_trace(part, Path(part_path(path, rank)))
    return path


@pytest.mark.parametrize("num_routers", [1, 2, 3])
def test_the_sum_over_routers_is_the_whole(num_routers: int, tmp_path: Path) -> None:
    whole = make_trace(SMALL)
    merged = read_all_parts(write_parts(parts_of(whole, num_routers), tmp_path / "a.trace"))
    assert [window.start for window in merged.windows] == [window.start for window in whole.windows]
    assert [change.new_generation for change in merged.changes] == [change.new_generation for change in whole.changes]
    spec = whole.header.spec
    shape = (spec.num_moe_layers, spec.num_experts)
    np.testing.assert_array_equal(totals(merged.windows, shape), totals(whole.windows, shape))
    found, wanted = (plain(report_numbers(trace, ReportOptions())) for trace in (merged, whole))
    for part in ("phases", "layers", "shards"):
        assert found[part] == wanted[part]
    assert found["trace"]["num_routers"] == num_routers and found["trace"]["num_steps"] == wanted["trace"]["num_steps"]


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    path = write_parts(parts_of(make_trace(SMALL), 3), tmp_path / "a.trace")
    (tmp_path / "a.trace.2").unlink()
    with pytest.raises(TraceError, match=r"a\.trace\.2: No such file"):
        read_all_parts(path)


def test_a_part_of_another_instance_or_router() -> None:
    first, second = parts_of(make_trace(SMALL), 2)
    other = replace(second, source="other.trace.1", header=replace(second.header, model="mixtral-8x7b"))
    with pytest.raises(TraceError, match=r"other\.trace\.1: is of another instance than .*, expected its router 1"):
        merge_parts([first, other])
    with pytest.raises(TraceError, match="has windows of router 1, expected router 0 only"):
        merge_parts([second, first])


def test_every_router_s_path_must_be_free(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    check_trace(str(path), 3)
    Path(part_path(path, 2)).touch()
    check_trace(str(path), 2)
    with pytest.raises(TraceError, match=r"a\.trace\.2 exists already"):
        check_trace(str(path), 3)
