"""Numbers and shapes as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def params(value: float) -> str:
    """671.03 B, 44.04 M, 7,168."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:,.2f} {unit}"
    return f"{value:,.0f}"


def size(num_bytes: float) -> str:
    """Decimal units, as data sheets and disks have them: 43.43 GB, 44.05 MB, 1,152 B."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e5, "kB")):
        if abs(num_bytes) >= limit:
            return f"{num_bytes / (1e3 if unit == 'kB' else limit):,.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def micros(us: float) -> str:
    return f"{us / 1e3:,.1f} ms" if us >= 1e4 else f"{us:,.1f} µs"


def shape(sizes: Sequence[int]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def scales(sizes: Sequence[int] | None) -> str:
    return "none" if sizes is None else f"({', '.join(map(str, sizes))})"


def span(bounds: tuple[int, int]) -> str:
    """1,025..1,151, or the one number."""
    low, high = bounds
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"


def ids(pci_ids: Sequence[int | None]) -> str:
    return ", ".join("hidden" if pci_id is None else f"{pci_id:04x}" for pci_id in pci_ids)


def sizes_list(sizes: Sequence[int]) -> str:
    """1, 2, 4, then every 8 to 256: the steps of a list that goes up evenly for long."""
    words: list[str] = []
    index = 0
    while index < len(sizes):
        step = sizes[index + 1] - sizes[index] if index + 1 < len(sizes) else 0
        end = index
        while end + 1 < len(sizes) and sizes[end + 1] - sizes[end] == step:
            end += 1
        if end - index >= 3:
            words.append(f"{sizes[index]}, {sizes[index + 1]} .. {sizes[end]} (every {step})")
            index = end + 1
        else:
            words.append(str(sizes[index]))
            index += 1
    return ", ".join(words)
