"""Text output of `infini-train plan`."""

from __future__ import annotations

from infini_train.parallel.schedule import pipeline_bubble
from infini_train.planning import estimate
from infini_train.planning.disk_space import checkpoint_bytes, kept_checkpoints
from infini_train.planning.layout_plan import USABLE_MEMORY, Plan

GB = 1e9


def layout_text(plan: Plan) -> str:
    """Return the layout in one line."""
    sizes, layout, training = plan.sizes, plan.sizes.run.layout, plan.sizes.run.training
    text = f"tp {sizes.tp}" + " with sequence parallelism" * layout.sequence_parallel
    text += f", cp {sizes.cp}, pp {sizes.pp}" + f" × {layout.virtual_stages} chunks" * (layout.virtual_stages > 1)
    text += f", dp {sizes.dp}, ZeRO {layout.zero_stage}, recompute {training.recompute}"
    again = sizes.recomputed_chunk_layers
    return text + f", {again} of {sizes.chunk_layers}" * (training.recompute == "layer" and again < sizes.chunk_layers)


def plan_lines(plan: Plan) -> list[str]:
    """Return the lines that `infini-train plan` prints."""
    return [
        *_head(plan),
        "",
        *_memory(plan),
        "",
        *_communication(plan),
        "",
        *_time(plan),
        "",
        *_assumptions(plan),
    ]


def headline(plan: Plan) -> str:
    """Return GPU memory, speed and MFU in one line. The head comments of the files in configs/ quote this line."""
    return (
        f"{plan.memory.total / GB:.1f} GB of {plan.gpu.memory / GB:.0f} GB per GPU, {plan.tokens_per_second:,.0f} tokens/s, "
        f"MFU {plan.mfu:.0%}, {plan.days:.1f} days"
    )


def _head(plan: Plan) -> list[str]:
    sizes, run = plan.sizes, plan.sizes.run
    budget = run.training.steps * run.tokens_per_step
    return [
        "planned, not measured (GB are 10^9 bytes)",
        f"{sizes.processes} × {plan.gpu.name}: {layout_text(plan)}",
        f"parameters            {plan.parameters:,}",
        f"FLOPs per token       {plan.flops_per_token:.4g}, forward and backward: 6 × matrix parameters, causal attention in a "
        "segment, memory",
        f"tokens                {run.tokens_per_step:,} a step × {run.training.steps:,} steps = {budget / 1e9:,.4g} billion",
        f"micro-batches         {run.micro_batches_per_step} a step, windows of {run.training.micro_batches_per_window}; on "
        f"one process each is {sizes.rows} rows × {run.micro_batch_tokens // sizes.cp:,} tokens",
        f"checkpoints           {_format_bytes(checkpoint_bytes(run))} each; {kept_checkpoints(run)} stay at the end: "
        f"{_format_bytes(checkpoint_bytes(run) * kept_checkpoints(run))}; one more while it is written",
    ]


def _format_bytes(size: int) -> str:
    return f"{size / 1e12:,.1f} TB" if size >= 1e12 else f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.1f} MB"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    categories = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "memory states": memory.memory_states,
        "buffers": memory.buffers,
        "total": memory.total,
    }
    notes = {
        "activations": f"{memory.in_flight} in flight × {memory.per_micro_batch / GB:.3f} GB",
        "buffers": "gradients and logits inside a backward, what is computed again, buckets, rotary tables",
        "total": f"of {plan.gpu.memory / GB:.0f} GB, of which {plan.usable_memory / GB:.1f} GB may be planned",
    }
    lines = [f"memory per GPU, in GB, of stage {memory.stage}, which needs most"]
    return lines + [f"  {name:<20}{size / GB:>9.3f}  {notes.get(name, '')}".rstrip() for name, size in categories.items()]


def _communication(plan: Plan) -> list[str]:
    node = plan.gpu.gpus_per_node
    lines = [
        f"communication per step, by one GPU of stage {plan.time.stage}, the slowest",
        f"  {'group':<10}{'operation':<16}{'link':<10}{'messages':>9}{'MB each':>10}{'GB sent':>10}{'seconds':>9}  what",
    ]
    for item in plan.traffic:
        seconds = estimate.traffic_seconds(item, plan.gpu)
        lines.append(
            f"  {item.kind:<10}{item.operation:<16}{item.link(node):<10}{item.messages:>9,}{item.bytes / 1e6:>10.3f}"
            f"{item.wire_bytes / GB:>10.3f}{seconds:>9.3f}  {item.what}"
        )
    return lines if len(lines) > 2 else ["communication per step: none between model processes"]


def _time(plan: Plan) -> list[str]:
    sizes, time, layout = plan.sizes, plan.time, plan.sizes.run.layout
    bubble = pipeline_bubble(sizes.pp, sizes.run.micro_batches_per_step, virtual_stages=layout.virtual_stages)
    rows = {
        "computation": (time.compute, _computation_note(time)),
        "communication": (time.communication, "tensor, context and pipeline groups; none of it overlaps"),
        "pipeline bubble": (time.bubble, f"{bubble:.1%} of the pipeline's time"),
        "data parallel": (time.data, "reducing gradients, gathering weights"),
        "optimizer": (time.optimizer, ""),
        "step": (time.total, ""),
    }
    lines = ["time per step, in seconds"]
    lines += [f"  {name:<20}{seconds:>9.3f}  {note}".rstrip() for name, (seconds, note) in rows.items()]
    return [*lines, f"expected: {headline(plan)}"]


def _computation_note(time: estimate.StepTime) -> str:
    if time.host > time.device:
        return f"held up by the host, the GPU alone would take {time.device:.3f}; larger micro-batches help"
    return f"the host launches it in {time.host:.3f} beside it"


def _assumptions(plan: Plan) -> list[str]:
    attention = estimate.ATTENTION_SHARE[plan.gpu.cuda_name]
    links = ", ".join(f"{share:.0%} of {name}" for name, share in estimate.LINK_SHARE.items())
    return [
        f"assumed: matrix products reach {estimate.MATMUL_SHARE:.0%} of the peak, attention {attention:.0%}, memory "
        f"{estimate.MEMORY_SHARE:.0%} of the float32 peak; {links}; {USABLE_MEMORY:.0%} of the memory may be used;",
        f"  a host launches one layer of one micro-batch, forward and backward, in {estimate.HOST_SECONDS * 1e3:.0f} ms;",
        f"  {plan.gpu.gpus_per_node} GPUs a node, consecutive ranks, one {plan.gpu.network_bandwidth * 8 / GB:.0f} Gb/s "
        "adapter a GPU. Sources: infini_train/planning/estimate.py and infini_train/runtime/hardware.py",
    ]


def _recomputed(plan: Plan) -> str:
    sizes, recompute = plan.sizes, plan.sizes.run.training.recompute
    again = sizes.recomputed_chunk_layers
    return f"{again} layers" if recompute == "layer" and again < sizes.chunk_layers else recompute


def search_lines(plans: list[Plan]) -> list[str]:
    """Return the table that `infini-train plan --search` prints, best layout first."""
    head = f"{'':>3} {'tokens/s':>10} {'MFU':>5} {'GB':>6} {'tp':>3} {'cp':>3} {'pp':>3} {'chunks':>6} {'dp':>4} {'ZeRO':>4} "
    lines = [f"{head}{'recompute':>9} {'segments × micro-batches':>25}"]
    for number, each in enumerate(plans, 1):
        sizes, layout, training = each.sizes, each.sizes.run.layout, each.sizes.run.training
        lines.append(
            f"{number:>3} {each.tokens_per_second:>10,.0f} {each.mfu:>5.0%} {each.memory.total / GB:>6.1f} {sizes.tp:>3} "
            f"{sizes.cp:>3} {sizes.pp:>3} {layout.virtual_stages:>6} {sizes.dp:>4} {layout.zero_stage:>4} "
            f"{_recomputed(each):>9} {training.segments_per_micro_batch:>13} × {training.micro_batches_per_window}"
        )
    return lines
