from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep import wire
from ep.errors import WireError

uints = st.integers(0, 2**63 - 1)
texts = st.text(max_size=40)
dispatches = st.builds(
    lambda head, dtype, back, tokens, more: wire.Dispatch(*head, dtype, back, tokens, tokens + more),
    st.tuples(uints, uints, uints),
    st.sampled_from(list(wire.ROW_BYTES)),
    st.sampled_from(["bf16", "f32"]),
    st.integers(1, 2**40),
    st.integers(0, 2**40),
)
messages = st.one_of(
    st.builds(wire.Hello, uints, texts, texts, st.sampled_from(["shm", "stream"]), uints, uints, uints),
    st.builds(wire.Welcome, uints, uints, uints, uints),
    dispatches,
    st.builds(wire.Combine, uints, st.sampled_from(["bf16", "f32"]), st.integers(1, 2**40), uints),
    st.builds(wire.Failure, uints, st.text().map(wire.shorten)),
    st.builds(wire.Ping, uints),
    st.builds(wire.Pong, uints),
)


@given(messages, st.integers(0, 2**40))
def test_what_was_encoded_comes_back(message: wire.Message, payload_bytes: int) -> None:
    block = wire.encode(message, payload_bytes)
    assert len(block) == wire.BLOCK_BYTES
    assert wire.decode(block, payload_bytes) == wire.Frame(message, payload_bytes)


def test_the_largest_messages_fit_their_block() -> None:
    most, text = 2**63 - 1, "x" * wire.MAX_TEXT_BYTES
    for message in (
        wire.Dispatch(most, most, most, "bf16", "bf16", most, most),
        wire.Hello(most, text, "f" * 32, "stream", most, most, most),
        wire.Failure(most, text),
    ):
        assert wire.decode(wire.encode(message)).message == message


@given(messages, uints)
def test_a_payload_beyond_the_limit_is_refused(message: wire.Message, payload_bytes: int) -> None:
    with pytest.raises(WireError, match="payload"):
        wire.decode(wire.encode(message, payload_bytes + 1), payload_bytes)


@given(st.binary(min_size=wire.BLOCK_BYTES, max_size=wire.BLOCK_BYTES))
def test_random_blocks_are_refused(block: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(block)


@given(messages, st.data())
def test_changed_bytes_give_a_message_or_a_wire_error(message: wire.Message, data: st.DataObject) -> None:
    block = bytearray(wire.encode(message, 7))
    for _ in range(data.draw(st.integers(1, 8))):
        block[data.draw(st.integers(0, 120))] = data.draw(st.integers(0, 255))
    try:
        frame = wire.decode(block, 2**63)
    except WireError:
        return
    assert wire.decode(wire.encode(frame.message, frame.payload_bytes), 2**63) == frame


def block_of(values: object) -> bytes:
    """A block whose header is any msgpack value."""
    header = msgpack.packb(values)
    return (wire.PREFIX.pack(wire.MAGIC, len(header), 0) + header).ljust(wire.BLOCK_BYTES, b"\0")


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {"kind": 6, "seq": 1},
        [99, 1],
        ["6", 1],
        [True, 1],
        [6],
        [6, 1, 2],
        [6, -1],
        [6, True],
        [6, "1"],
        [6, 1.0],
        [6, 2**63],
        [5, 1, b"bytes"],
        [5, 1, "x" * 300],
        [3, 1, 0, 0, "bf16", "bf16", 0, 0],
        [3, 1, 0, 0, "bf16", "bf16", 2, 1],
        [3, 1, 0, 0, "bf16", "bf16", 2, [2]],
        [3, 1, 0, 0, "bf16", "fp8", 1, 1],
        [3, 1, 0, 0, "f16", "bf16", 1, 1],
        [3, *range(20)],
        [4, 1, "bf16", 0, 0],
        [4, 1, "fp8", 1, 0],
    ],
)
def test_malformed_headers_are_refused(values: object) -> None:
    with pytest.raises(WireError):
        wire.decode(block_of(values))


def test_a_header_longer_than_its_block_is_refused() -> None:
    prefix = wire.PREFIX.pack(wire.MAGIC, wire.MAX_HEADER_BYTES + 1, 0)
    with pytest.raises(WireError, match="header is"):
        wire.decode(prefix.ljust(wire.BLOCK_BYTES, b"\0"))
    with pytest.raises(WireError, match="header is"):
        wire.encode(wire.Failure(0, "x" * wire.BLOCK_BYTES))


@given(st.text())
def test_shorten_fits_and_keeps_short_texts(text: str) -> None:
    short = wire.shorten(text)
    assert len(short.encode("utf-8", "replace")) <= wire.MAX_TEXT_BYTES
    assert wire.decode(wire.encode(wire.Failure(1, short))).message == wire.Failure(1, short)


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 8192), st.sampled_from(list(wire.ROW_BYTES)))
def test_parts_of_a_payload_do_not_overlap_and_fit(num_tokens: int, top_k: int, hidden: int, dtype: str) -> None:
    num_pairs = num_tokens * top_k
    layout = wire.dispatch_layout(num_tokens, num_pairs, hidden, dtype)
    scale_bytes = 4 * num_tokens * wire.num_scales(hidden) if dtype == "fp8" else 0
    assert layout.counts + 4 * num_tokens <= layout.slot_ids
    assert layout.slot_ids + 4 * num_pairs <= layout.weights
    assert layout.weights + 4 * num_pairs <= layout.scales
    assert layout.scales + scale_bytes <= layout.rows
    assert layout.rows + num_tokens * hidden * wire.ROW_BYTES[dtype] == layout.total
    assert not any(start % wire.ALIGN for start in (layout.slot_ids, layout.weights, layout.scales, layout.rows))
    assert layout.total <= wire.max_dispatch_bytes(num_tokens, top_k, hidden)
