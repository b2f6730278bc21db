"""What routers and shards of one node must agree on before they meet over ipc."""

from __future__ import annotations

from dataclasses import replace

import torch

from ep.ipc_jobs import IpcLimits
from ep.ipc_options import IpcOptions
from ep.kernels.p2p_layout import MessageShape
from ep.model import ModelSpec
from ep.transport.host_device import HostDevice
from ep.transport.ipc_device import GpuDevice, IpcDevice

MESSAGE_TOKENS = 4096
"""Tokens of one message, and of one job, at most: larger batches go out in parts, and the buffers of every pair are
sized for these."""
HOST_NAP_S = 1e-4
"""An idle shard on a CPU leaves its core to the others, which a shard beside a GPU need not."""
DEPTH, LINGER_S, PATIENCE = 8, 5e-3, 1 << 13
"""Jobs that wait on a GPU, all of them captured graphs: their launch has the interpreter for less time than a kernel's.
And for how long: from one step to the next, not from one request to another."""
LOOK_S = 4e-7
"""One look on an H200, while there is a message."""
HOSTED_NAP_S = 5e-5
"""A shard in a router's process leaves the interpreter to the router; meanwhile jobs that wait on the GPU serve, and
each of them lets it rest longer (IpcServer)."""


def message_shape(spec: ModelSpec, options: IpcOptions, device: torch.device) -> MessageShape:
    """fp8 is the flavour of e4m3 that the device multiplies, bf16 where it multiplies none."""
    rows = torch.bfloat16
    if options.dispatch_dtype == "fp8":
        rows = torch.float8_e4m3fn
        if device.type == "cuda":
            from ep.kernels.devices import current_device

            rows = current_device(device.index).fp8_dtype or torch.bfloat16
    partials = torch.float32 if options.combine_dtype == "f32" else torch.bfloat16
    return MessageShape(MESSAGE_TOKENS, spec.hidden_size, spec.top_k, rows, partials)


def open_device(device: torch.device, own_stream: bool = False) -> IpcDevice:
    """own_stream: beside what else this process launches there."""
    return HostDevice() if device.type == "cpu" else GpuDevice(device.index, own_stream)


def limits(device: torch.device, is_hosted: bool = False, layer_bytes: float = 0.0, whole_rows: int = 1) -> IpcLimits:
    """Of a shard that computes there. is_hosted: in a router's process. layer_bytes: of the experts of one layer, which
    a job of whole_rows reads; 0: it is not worth waiting for a router."""
    if device.type == "cpu":
        return IpcLimits(MESSAGE_TOKENS, graph_tokens=0, nap_s=HOST_NAP_S)
    from ep.kernels.devices import memory_bytes_per_s

    seconds = layer_bytes / memory_bytes_per_s(torch.cuda.get_device_properties(device))
    waiting = IpcLimits(MESSAGE_TOKENS, MESSAGE_TOKENS, DEPTH, LINGER_S, PATIENCE, round(seconds / LOOK_S), whole_rows)
    return replace(waiting, spin_s=0.0, nap_s=HOSTED_NAP_S) if is_hosted else waiting


def whole_rows(spec: ModelSpec) -> int:
    """Of a job that reads nearly all experts: so many rows choose all but 2% of them, if all are as likely, for they
    make 4 choices for each (1 - e^-4)."""
    return -(-4 * spec.num_experts // spec.top_k)
