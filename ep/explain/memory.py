"""What lies on the GPUs: a router's weights and KV cache, a shard's slots; and how many requests that leaves room for.

Shape legend: H hidden, V vocabulary, T tokens of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep.explain.parameters import Part
from ep.kernels.fused_moe import ExpertWeights, Workspace
from ep.model import ModelSpec
from ep.wire import max_combine_bytes, max_dispatch_bytes

MEMORY_SHARE = 0.92
"""vLLM's gpu_memory_utilization unless it is given."""
BLOCK_TOKENS = 16
"""vLLM's KV cache block unless the attention backend asks for another."""
MESSAGE_TOKENS = 8192
"""ep.transport.handshake.MAX_TOKENS: the largest pass of a shard, and what a link's buffers hold."""
KV_ITEMSIZE = {"auto": 2, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class KvCache:
    """Bytes of one token; values: of one layer, as vLLM stores them."""

    bytes_per_token: int
    bytes_per_layer: int
    values: int
    why: str


@dataclass(frozen=True)
class ShardMemory:
    """One shard's GPU. workspace: buffers of the kernels. link: host memory of one router's link, both directions."""

    slot_bytes: int
    layer_bytes: int
    slots: int
    workspace: int
    link_host: int
    total: int
    device: int
    fits: bool


@dataclass(frozen=True)
class RouterMemory:
    """The router's GPU: vLLM takes `share` of it, less where shards are there too.

    absorbed: MLA's copy of kv_b_proj in bf16, that decode multiplies with. activations is estimated. shards: bytes of
    those that share this GPU. kv_tokens: what the KV cache holds; requests: of the batch's length; longest_requests: of
    max_model_len.
    """

    device: int
    share: float
    weights: int
    absorbed: int
    activations: int
    shards: int
    kv_bytes: int
    kv_tokens: int
    requests: int
    longest_requests: float
    fits: bool
    why: str


def kv_cache(spec: ModelSpec, dtype: str) -> KvCache:
    """dtype: auto (bf16), bf16 or fp8."""
    size = KV_ITEMSIZE[dtype]
    if spec.mla is not None:
        values = spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim
        why = f"MLA: ({spec.mla.kv_lora_rank} + {spec.mla.qk_rope_head_dim}) x {size} B x {spec.num_layers} layers"
    else:
        values = 2 * spec.num_kv_heads * spec.head_dim
        why = f"K and V: 2 x {spec.num_kv_heads} heads x {spec.head_dim} x {size} B x {spec.num_layers} layers"
    return KvCache(values * size * spec.num_layers, values * size, values, why)


def shard_memory(spec: ModelSpec, slots: int, fp8_dtype: torch.dtype, device_bytes: int) -> ShardMemory:
    """slots: per layer. fp8_dtype: the device's, for a quantised checkpoint."""
    layers, weights = spec.num_moe_layers, _slots_on_meta(spec, slots, fp8_dtype)
    stacks = (weights.gate_up, weights.down, weights.gate_up_scale_inv, weights.down_scale_inv)
    slot_bytes = sum(stack.nbytes for stack in stacks if stack is not None) // (layers * slots)
    space = Workspace.allocate(weights, MESSAGE_TOKENS, spec.top_k)
    workspace = sum(part.nbytes for part in vars(space).values() if part is not None)
    link = max_dispatch_bytes(MESSAGE_TOKENS, spec.top_k, spec.hidden_size)
    link += max_combine_bytes(MESSAGE_TOKENS, spec.hidden_size)
    total = slot_bytes * layers * slots + workspace
    return ShardMemory(
        slot_bytes=slot_bytes,
        layer_bytes=slot_bytes * slots,
        slots=slot_bytes * layers * slots,
        workspace=workspace,
        link_host=link,
        total=total,
        device=device_bytes,
        fits=total <= device_bytes,
    )


def router_memory(
    spec: ModelSpec,
    parts: Sequence[Part],
    kv: KvCache,
    *,
    device_bytes: int,
    shard_bytes: int,
    budget: int,
    max_num_seqs: int,
    request_tokens: int,
    max_model_len: int,
) -> RouterMemory:
    """shard_bytes: of shards on the same GPU. budget, max_num_seqs: tokens and requests of the largest step."""
    weights = sum(part.bytes for part in parts if part.holder == "router")
    absorbed = 0
    if spec.mla is not None:
        absorbed = 2 * sum(part.params for part in parts if part.name == "kv_b_proj" and part.holder == "router")
    activations = _activations(spec, budget, max_num_seqs)
    share = math.floor(100 * (MEMORY_SHARE - shard_bytes / device_bytes)) / 100 if shard_bytes else MEMORY_SHARE
    free = int(device_bytes * share) - weights - absorbed - activations
    blocks = max(0, free) // (kv.bytes_per_token * BLOCK_TOKENS)

    def held(tokens: int) -> float:
        return blocks / -(-tokens // BLOCK_TOKENS)

    fits = held(max_model_len) >= 1
    return RouterMemory(
        device=device_bytes,
        share=share,
        weights=weights,
        absorbed=absorbed,
        activations=activations,
        shards=shard_bytes,
        kv_bytes=blocks * BLOCK_TOKENS * kv.bytes_per_token,
        kv_tokens=blocks * BLOCK_TOKENS,
        requests=int(held(request_tokens)),
        longest_requests=held(max_model_len),
        fits=fits,
        why=_why(fits, free, blocks * BLOCK_TOKENS, max_model_len, share),
    )


def _why(fits: bool, free: int, tokens: int, max_model_len: int, share: float) -> str:
    if free <= 0:
        return f"does not fit: {-free / 1e9:.1f} GB too little for the weights and a step"
    if not fits:
        return f"vLLM would not start: one request of {max_model_len:,} tokens does not fit, one of {tokens:,} does"
    if share < MEMORY_SHARE:
        return f"fits beside the shard with --gpu-memory-utilization {share:g}"
    return "fits"


def _activations(spec: ModelSpec, budget: int, max_num_seqs: int) -> int:
    """An estimate: residual, a normed copy and the widest values between two matrices in bf16, logits in float32."""
    mla = spec.mla
    heads, hidden = spec.num_heads, spec.hidden_size
    if mla is None:
        attention = heads * spec.head_dim * 2 + 2 * spec.num_kv_heads * spec.head_dim
    else:
        attention = heads * (spec.head_dim + mla.qk_nope_head_dim + 2 * mla.v_head_dim)
    dense = 3 * spec.intermediate_size if len(spec.moe_layers) < spec.num_layers else 0
    return budget * 2 * (2 * hidden + max(attention, dense)) + max_num_seqs * spec.vocab_size * 4


def _slots_on_meta(spec: ModelSpec, slots: int, fp8_dtype: torch.dtype) -> ExpertWeights:
    layers, hidden, inter = spec.num_moe_layers, spec.hidden_size, spec.moe_intermediate_size
    up, down = (layers, slots, 2 * inter, hidden), (layers, slots, hidden, inter)
    if spec.quant_block is None:
        bf16 = torch.bfloat16
        return ExpertWeights(torch.empty(up, dtype=bf16, device="meta"), torch.empty(down, dtype=bf16, device="meta"))
    rows, cols = spec.scale_shape((inter, hidden))
    return ExpertWeights(
        torch.empty(up, dtype=fp8_dtype, device="meta"),
        torch.empty(down, dtype=fp8_dtype, device="meta"),
        torch.empty((layers, slots, 2 * rows, cols), device="meta"),
        torch.empty((layers, slots, cols, rows), device="meta"),
    )
