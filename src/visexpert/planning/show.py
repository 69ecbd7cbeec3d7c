"""A plan as tables."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from visexpert.planning.counting import OTHER
from visexpert.planning.memory import OVERHEAD
from visexpert.planning.plan import Configured, Plan


def show(plan: Plan, console: Console) -> None:
    """Print a plan and its assumptions."""
    console.print(_parts(plan))
    console.print(_compute(plan), highlight=False, soft_wrap=True)
    console.print(f"{_strategy(plan)}, {plan.precision.name}, {_batch(plan)}:", highlight=False)
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
            number(row.forward),
            number(row.backward),
            number(row.training),
            f"{row.training / plan.gflop_live:.1%}",
        )
    trained, frozen = (sum(getattr(row, key) for row in plan.rows) for key in ("trained", "frozen"))
    forward, backward = (sum(getattr(row, key) for row in plan.rows) for key in ("forward", "backward"))
    table.add_section()
    table.add_row(
        "all", millions(trained), millions(frozen), number(forward), number(backward), number(plan.gflop_live), ""
    )
    return table


def _compute(plan: Plan) -> str:
    shares = ", ".join(f"{role} {share:.1%}" for role, share in plan.shares.items())
    teachers = plan.shares["teachers"]
    lines = [f"Shares of a training sample: {shares}."]
    if 0 < teachers < 1:
        lines.append(f"A feature store for the teachers would save at most a factor of {1 / (1 - teachers):.2f}.")
    if plan.gflop_stored:
        lines.append(
            f"As configured, filling the feature store takes {number(plan.gflop_stored)} GFLOP once per image, and a "
            f"step takes {number(plan.gflop)} per sample."
        )
    amount, asked = plan.amount, plan.asked
    machine = f"{asked.gpus} x {plan.gpu.label} at {asked.mfu:.0%} of {_peak(plan):g} TFLOP/s"
    if plan.hours is None:
        lines.append(f"Hours on {machine}: unknown without the number of images; give samples.")
    else:
        total = (plan.gflop * (amount.samples or 0) + plan.gflop_stored * (amount.rows or 0)) * 1e9
        read = f"{amount.samples:,} samples in {amount.steps:,} steps"
        lines.append(f"{read}: {total:.2e} FLOP, {duration(plan.hours)} on {machine}.")
    if amount.by_steps:
        lines.append(steps_in_epochs(plan))
    if plan.warning is not None:
        lines.append(f"Warning: {plan.warning}")
    if plan.configured is not None:
        lines.append(other_gpus(plan, plan.configured))
    return "\n".join(lines)


def steps_in_epochs(plan: Plan) -> str:
    """Return a line that gives the steps in epochs, and the steps of one epoch."""
    amount, gpus = plan.amount, plan.asked.gpus
    each = f"max_steps: {amount.steps} of {amount.per_step} samples ({gpus} GPUs) are {amount.samples:,} samples"
    if amount.rows is None or amount.samples is None:
        return f"{each}; give samples to see how many epochs that is."
    return (
        f"{each}, {amount.samples / amount.rows:.2f} epochs of {amount.rows:,}; one epoch is max_steps: "
        f"{amount.epoch_steps}."
    )


def other_gpus(plan: Plan, configured: Configured) -> str:
    """Return a line on what this number of GPUs changes against the configured one: batch, steps, epochs."""
    amount, own, gpus = plan.amount, configured.amount, plan.asked.gpus
    if own.per_step == amount.per_step:
        return f"The configuration asks for {configured.gpus} GPUs; a step has {own.per_step} samples there, too."
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
        accumulated = amount.accumulated(gpus) * own.per_step // amount.per_step
        line += f"; trainer.accumulate_grad_batches: {accumulated} keeps its batch"
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
        lines[0] += "; feature store unknown without samples"
    elif disk.store:
        lines[0] += f"; feature store {size(disk.store)}"
    for need in disk.data:
        lines.append(f"  data: {need.what}: {need.size}{'' if need.is_here else ' (not here)'}")
    return "\n".join(lines)


def assumptions(plan: Plan) -> list[str]:
    """Return the assumptions behind the numbers, one sentence each."""
    asked = plan.asked
    answers = asked.text_tokens // 2 if asked.answer_tokens is None else asked.answer_tokens
    return [
        "A multiply-add is 2 FLOP; matrix products, convolutions and attention (causal attention in full) are counted "
        "by running the step itself on shapes alone.",
        "Training a part costs about 3 times its forward pass: the pass, the gradient of its inputs, the gradient of "
        "its weights. It is 2 times if only the inputs need a gradient, and once if neither does; gradient "
        "checkpointing adds a forward pass to the backward pass.",
        f"An image has {plan.image_size} x {plan.image_size} px and {asked.text_tokens} tokens of text, {answers} of "
        "them supervised (text_tokens, answer_tokens).",
        f"Training reaches {asked.mfu:.0%} of the peak of {plan.precision.peak_bits}-bit products (mfu); data, "
        "validation and tests take no time.",
        f"Activations are the peak memory of the results of operations ({size(plan.activation_bytes)} for one sample, "
        f"{_bytes(plan)} bytes per number, fused attention) times the batch size; expect an error of 30 %.",
        f"Overhead is {OVERHEAD / 2**30:g} GiB for CUDA, libraries and fragmentation; buffers are for communication "
        "and for the 16-bit copies of autocast.",
        f"'{OTHER}' is everything outside the parts, such as losses."
        if any(row.name == OTHER for row in plan.rows)
        else "AdamW keeps two numbers for each trained weight.",
    ]


def _batch(plan: Plan) -> str:
    """Return how a step is divided."""
    amount, gpus = plan.amount, plan.asked.gpus
    accumulated = amount.accumulated(gpus)
    each = f"batch {amount.batch_size} per GPU"
    return each if accumulated == 1 else f"{each}, {accumulated} accumulated ({amount.per_step} samples a step)"


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


def _bytes(plan: Plan) -> str:
    autocast = plan.precision.mixed and plan.strategy.engine != "deepspeed"
    return "2 or 4" if autocast else str(plan.precision.compute)


def _peak(plan: Plan) -> float:
    return plan.gpu.tflops[plan.precision.peak_bits]


def millions(count: int) -> str:
    """Format a count as ``24.0 M``; small ones as they are."""
    return f"{count / 1e6:,.{0 if count >= 1e9 else 1}f} M" if count >= 1e5 else f"{count:,}"


def number(value: float) -> str:
    """Format a number: whole from 1000 on, else with three or four significant digits."""
    if value >= 100:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Format bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def duration(hours: float) -> str:
    """Format a duration in hours, below one in minutes."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else "under a minute"
