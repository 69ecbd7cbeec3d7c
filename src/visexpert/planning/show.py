"""A plan as tables."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from visexpert.planning.counting import OTHER
from visexpert.planning.memory import OVERHEAD
from visexpert.planning.plan import Configured, Plan


def show(plan: Plan, console: Console) -> None:
    """Print a plan and what it assumes."""
    console.print(_parts(plan))
    console.print(_compute(plan), highlight=False, soft_wrap=True)
    console.print(f"{_strategy(plan)}, {plan.precision.name}, batch {plan.amount.batch_size} per GPU:", highlight=False)
    console.print(_memory(plan))
    console.print(_disk(plan), highlight=False, soft_wrap=True)
    console.print(
        "\n".join(["[bold]Assumptions[/bold]", *(f"- {line}" for line in assumptions(plan))]),
        highlight=False,
        soft_wrap=True,
    )


def _parts(plan: Plan) -> Table:
    table = Table(title=f"{plan.method}: parameters, and GFLOP per sample", box=SIMPLE)
    table.add_column("part", no_wrap=True)
    for column in ("trained", "frozen", "forward", "back", "train", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in plan.rows:
        name = f"{row.name} (stored)" if row.is_stored else row.name
        table.add_row(
            name,
            millions(row.trained),
            millions(row.frozen),
            figure(row.forward),
            figure(row.backward),
            figure(row.training),
            f"{row.training / plan.gflop_live:.1%}",
        )
    trained, frozen = (sum(getattr(row, key) for row in plan.rows) for key in ("trained", "frozen"))
    forward, backward = (sum(getattr(row, key) for row in plan.rows) for key in ("forward", "backward"))
    table.add_section()
    table.add_row(
        "all", millions(trained), millions(frozen), figure(forward), figure(backward), figure(plan.gflop_live), ""
    )
    return table


def _compute(plan: Plan) -> str:
    shares = ", ".join(f"{role} {share:.1%}" for role, share in plan.shares.items())
    teachers = plan.shares["teachers"]
    lines = [f"Shares of a training sample: {shares}."]
    if 0 < teachers < 1:
        lines.append(f"Reading teachers from a store would save at most a factor of {1 / (1 - teachers):.2f}.")
    if plan.gflop_stored:
        lines.append(
            f"As configured, {figure(plan.gflop_stored)} GFLOP are run once per image to fill the feature store, "
            f"{figure(plan.gflop)} at each step."
        )
    amount, asked = plan.amount, plan.asked
    machine = f"{asked.gpus} x {plan.gpu.label} at {asked.mfu:.0%} of {_peak(plan):g} TFLOP/s"
    if plan.hours is None:
        lines.append(f"Hours on {machine}: not known without the number of images; give --samples.")
    else:
        total = (plan.gflop * (amount.samples or 0) + plan.gflop_stored * (amount.rows or 0)) * 1e9
        read = f"{amount.samples:,} samples in {amount.steps:,} steps"
        lines.append(f"{read}: {total:.2e} FLOP, {duration(plan.hours)} on {machine}.")
    if amount.by_steps:
        lines.append(steps_in_epochs(plan))
    if plan.configured is not None:
        lines.append(other_gpus(plan, plan.configured))
    return "\n".join(lines)


def steps_in_epochs(plan: Plan) -> str:
    """What the number of steps comes to in epochs, and how many steps one epoch has."""
    amount, gpus = plan.amount, plan.asked.gpus
    each = f"max_steps: {amount.steps} of {amount.per_step} samples ({gpus} GPUs) are {amount.samples:,} samples"
    if amount.rows is None or amount.samples is None:
        return f"{each}; give --samples to see how many epochs that is."
    return (
        f"{each}, {amount.samples / amount.rows:.2f} epochs of {amount.rows:,}; one epoch is max_steps: "
        f"{amount.epoch_steps}."
    )


def other_gpus(plan: Plan, configured: Configured) -> str:
    """What another number of GPUs than the configuration's own changes: batch, steps, share of an epoch."""
    amount, own, gpus = plan.amount, configured.amount, plan.asked.gpus
    line = (
        f"The configuration asks for {configured.gpus} GPUs and {own.per_step} samples a step, not {gpus} and "
        f"{amount.per_step}"
    )
    if amount.by_steps and amount.samples is not None and own.samples is not None:
        read = f"; its {own.steps:,} steps would read {own.samples:,} samples, not {amount.samples:,}"
        if amount.rows is not None:
            read += f" ({own.samples / amount.rows:.2f} epochs, not {amount.samples / amount.rows:.2f})"
        line += read
    elif own.steps is not None and amount.steps is not None:
        line += f"; the same epochs are {own.steps:,} steps there, not {amount.steps:,}"
    if own.per_step % amount.per_step == 0:
        accumulated = amount.per_step // (amount.batch_size * gpus) * own.per_step // amount.per_step
        line += f"; --trainer.accumulate_grad_batches {accumulated} keeps its batch"
    return f"{line}."


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(box=SIMPLE)
    table.add_column("memory per GPU", no_wrap=True)
    table.add_column("GiB", justify="right")
    for name in ("weights", "gradients", "optimizer", "buffers", "activations", "overhead"):
        table.add_row(name, f"{getattr(memory, name) / 2**30:.2f}")
    table.add_section()
    verdict = "fits" if plan.fits else "does not fit"
    table.add_row(f"all ({verdict} in {plan.gpu.memory_bytes / 2**30:.1f})", f"{memory.total / 2**30:.2f}")
    return table


def _disk(plan: Plan) -> str:
    disk = plan.disk
    lines = [f"Disk: 2 checkpoints of {size(disk.checkpoint)}; frozen weights {size(disk.frozen)}"]
    if disk.store is None:
        lines[0] += "; feature store not known without --samples"
    elif disk.store:
        lines[0] += f"; feature store {size(disk.store)}"
    for need in disk.data:
        lines.append(f"  data: {need.what}: {need.size}{'' if need.is_here else ' (not here)'}")
    return "\n".join(lines)


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on, one sentence each."""
    asked = plan.asked
    answers = asked.text_tokens // 2 if asked.answer_tokens is None else asked.answer_tokens
    return [
        "1 multiply-add is 2 FLOP; products, convolutions and attention are counted (causal attention in full), from "
        "the code of the step itself on shapes alone.",
        "Training a part costs about 3 times its forward pass: the pass, the gradient of its inputs, the gradient of "
        "its weights. Where only inputs need a gradient it is 2 times, with neither 1; gradient checkpointing adds a "
        "forward pass to the backward pass.",
        f"An image has {plan.image_size} x {plan.image_size} px and {asked.text_tokens} tokens of text, {answers} of "
        "them supervised (--text_tokens, --answer_tokens).",
        f"{asked.mfu:.0%} of the peak is reached (--mfu) and data, validation and tests take no time; the peak is that "
        f"of {plan.precision.peak_bits}-bit products.",
        f"Activations are the most that results of operations take at once ({size(plan.activation_bytes)} for one "
        f"sample, in {plan.precision.compute} bytes a number, attention fused), times the batch; expect 30 % either "
        "way.",
        f"Overhead is {OVERHEAD / 2**30:g} GiB for CUDA, libraries and fragmentation; buffers are what the strategy "
        "gathers or sends and what autocast keeps in 16 bits.",
        f"'{OTHER}' is what happens in no part, such as losses."
        if any(row.name == OTHER for row in plan.rows)
        else "AdamW keeps two numbers for each trained weight.",
    ]


def _strategy(plan: Plan) -> str:
    kind = plan.strategy
    if kind.engine == "ddp":
        return "ddp" if plan.asked.gpus > 1 else "one process"
    shared = [
        name
        for name, is_shared in (
            ("weights", kind.shards_weights),
            ("gradients", kind.shards_gradients),
            ("optimizer", kind.shards_optimizer),
        )
        if is_shared
    ]
    return f"{kind.engine} ({', '.join(shared)} shared by {kind.shares(plan.asked.gpus)})"


def _peak(plan: Plan) -> float:
    return plan.gpu.tflops[plan.precision.peak_bits]


def millions(count: int) -> str:
    """``24.0 M``; small numbers as they are."""
    return f"{count / 1e6:,.{0 if count >= 1e9 else 1}f} M" if count >= 1e5 else f"{count:,}"


def figure(value: float) -> str:
    """Whole from 1000 on, else three or four digits that count."""
    if value >= 100:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
    return f"{value:.3g}"


def size(number: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} TB"


def duration(hours: float) -> str:
    """Hours, or what is readable below one."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else "under a minute"
