"""Cross-compiles every tile of the shipped AMD files and prints what it uses as JSON: a program of its own, because it
cannot share a process with Triton's interpreter."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

from ep.kernels.resources import Resources
from ep.kernels.shipped_amd import DEVICES, find_problem
from ep.kernels.tuning import SHIPPED, TileConfig, load_table


def main() -> None:
    compiled: dict[TileConfig, tuple[Resources, Resources]] = {}
    report = []
    for device in DEVICES:
        for path in sorted(SHIPPED.glob(f"E=*,device_name={device.name},*block_shape=?128,128?.json")):
            slots = int(re.match(r"E=(\d+)", path.name)[1])  # type: ignore[index]
            tiles = set(load_table(path, slots, "test").configs.values())
            problems = {str(tile): find_problem(tile, device, compiled) for tile in tiles}
            report.append({"file": path.name, "problems": {tile: p for tile, p in problems.items() if p is not None}})
    used = [{"tile": str(tile), "gemms": [asdict(gemm) for gemm in gemms]} for tile, gemms in compiled.items()]
    print(json.dumps({"files": report, "tiles": used}))


if __name__ == "__main__":
    main()
