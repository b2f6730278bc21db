"""The dashboard: valid, of our metrics with the labels that they have, and bound to no data source of ours."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

METRICS = {
    "ep_shard_tokens_total": {"shard"},
    "ep_shard_pairs_total": {"shard"},
    "ep_shard_bytes_total": {"shard", "direction"},
    "ep_layer_imbalance": {"layer", "phase"},
    "ep_round_trip_seconds_bucket": {"shard", "le"},
    "ep_placement_generation": set(),
    "ep_shard_slots": {"shard"},
    "ep_rebalances_total": {"outcome"},
    "ep_shard_up": {"shard"},
}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    return json.loads((resources.files("ep") / "configs" / "grafana" / "ep.json").read_text(encoding="utf-8"))


def expressions(node: Any) -> list[str]:
    """Every value of a key `expr`, at any depth."""
    if isinstance(node, dict):
        own = [node["expr"]] if "expr" in node else []
        return own + [found for value in node.values() for found in expressions(value)]
    return [found for value in node for found in expressions(value)] if isinstance(node, list) else []


def datasources(node: Any) -> list[Any]:
    if isinstance(node, dict):
        own = [node["datasource"]] if "datasource" in node else []
        return own + [found for key, value in node.items() if key != "datasource" for found in datasources(value)]
    return [found for value in node for found in datasources(value)] if isinstance(node, list) else []


def test_every_metric_is_shown_and_no_other() -> None:
    found = {name for expr in expressions(dashboard()) for name in re.findall(r"\bep_\w+", expr)}
    assert found == METRICS.keys()


def test_labels_are_those_of_the_metric() -> None:
    for expr in expressions(dashboard()):
        (metric,) = set(re.findall(r"\bep_\w+", expr))
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expr) for label in group.split(",")}
        selected = {label for group in re.findall(r"\{([^}]*)\}", expr) for label in re.findall(r"(\w+)=", group)}
        assert grouped | selected <= METRICS[metric], expr
        assert expr.count("(") == expr.count(")")


def test_legends_name_labels_that_are_left() -> None:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            grouped = {
                label.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(",")
            }
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouped, panel["title"]


def test_the_data_source_is_the_reader_s_choice() -> None:
    (variable,) = dashboard()["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    found = datasources(dashboard())
    assert len(found) > 20 and all(source == DATASOURCE for source in found)


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _y in cells) == 23
    assert all(panel["title"] and panel["description"] for panel in panels)
