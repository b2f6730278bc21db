"""What a host's link does to its packets: rate by tc's tbf, delay and loss by netem or, without it, by a relay."""

from __future__ import annotations

from dataclasses import dataclass

_BURST_MS, _QUEUE_MS = 4.0, 50.0
_MIN_BURST_BYTES = 16_384


@dataclass(frozen=True)
class LinkQuality:
    """Of both directions alike. delay_ms: one way. loss: share of packets that vanish. rate_mbit: None for no limit."""

    delay_ms: float = 0.0
    loss: float = 0.0
    rate_mbit: float | None = None

    @property
    def needs_delay(self) -> bool:
        """Whether a queue that only limits the rate is not enough."""
        return self.delay_ms > 0 or self.loss > 0

    def describe(self) -> str:
        parts = [f"{self.delay_ms:g} ms delay" if self.delay_ms else "", f"{self.loss:.1%} loss" if self.loss else ""]
        parts.append(f"{self.rate_mbit:g} Mbit/s" if self.rate_mbit is not None else "")
        return ", ".join(part for part in parts if part) or "nothing"

    def netem(self) -> tuple[str, ...]:
        """The queue discipline of one end, where the kernel has netem."""
        rate = ("rate", f"{self.rate_mbit:g}mbit") if self.rate_mbit is not None else ()
        return ("netem", "delay", f"{self.delay_ms:g}ms", "loss", f"{100 * self.loss:g}%", *rate)

    def tbf(self) -> tuple[str, ...]:
        """The queue discipline of one end that only limits its rate."""
        assert self.rate_mbit is not None
        burst = max(_MIN_BURST_BYTES, round(self.rate_mbit * 1e6 / 8 * _BURST_MS / 1e3))
        return ("tbf", "rate", f"{self.rate_mbit:g}mbit", "burst", f"{burst}b", "latency", f"{_QUEUE_MS:g}ms")
