"""Measure one optimizer step of MoVE-KD's first stage at true sizes, with a language model of 1.1 B parameters.

    python -m benchmarks.whole_step               # minutes, and 15 GB of memory
    python -m benchmarks.whole_step --threads 1

The step is that of `configs/movekd/llava/stage1.yaml` with `configs/hubs/movekd-v1.0.yaml`, by visexpert's own trainer:
CLIP-L/336 with MoLE, EVA-02-L and ConvNeXt-XXL live at 1024 pixels, a Llama of TinyLlama's sizes in place of Vicuna,
one image with a caption. Weights are random, gradients are not clipped, and all is float32 on the CPU but the frozen
language model, which is bfloat16. `visexpert plan` counts the same configuration, without weights, before it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CONFIGS = ("movekd/llava/stage1", "hubs/movekd-v1.0")
WORDS = "a photo of two small dogs that run over wet grass behind an old red house near the sea".split()
TEXT_TOKENS = len(WORDS) + 2
"""The caption between the tokens for its begin and end."""

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
"""TinyLlama 1.1 B's published sizes."""


def write_llama(folder: Path) -> None:
    """Write random weights and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *WORDS]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(str(folder))


def write_data(root: Path) -> None:
    """Write one record in LLaVA's format, with its image."""
    import numpy as np
    from PIL import Image

    (root / "images").mkdir(parents=True)
    noise_HWC = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(noise_HWC).save(root / "images" / "0.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " ".join(WORDS)}]
    record = {"id": "0", "image": "0.png", "conversations": turns}
    (root / "blip_laion_cc_sbu_558k.json").write_text(json.dumps([record]), encoding="utf-8")


def arguments_of(folder: Path) -> list[str]:
    """Return what is laid over the shipped configurations: one image, one CPU, the small language model."""
    return [
        f"--model.init_args.language.init_args.source={folder / 'llama'}",
        f"--data.init_args.tokenizer={folder / 'llama'}",
        f"--data.init_args.root={folder / 'data'}",
        "--data.init_args.batch_size=1",
        "--data.init_args.global_batch_size=1",
        "--data.init_args.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.num_nodes=1",
        "--trainer.strategy=auto",
        "--trainer.precision=32-true",
        "--trainer.max_steps=1",
        "--trainer.gradient_clip_val=null",
    ]


def step(folder: Path, threads: int) -> dict[str, float]:
    """Take the step; return its seconds, of wall and processor, and the most memory that this process has held."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    from visexpert import shipped
    from visexpert.io.first_use import ReadsWeights
    from visexpert.training import build_cli

    torch.set_num_threads(threads)
    found: dict[str, float] = {}

    class Timer(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            found.update(wall=-time.perf_counter(), cpu=-time.process_time())

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            found["wall"] += time.perf_counter()
            found["cpu"] += time.process_time()
            found["loss"] = float(trainer.callback_metrics["train/loss"])

    files = [word for name in CONFIGS for word in ("--config", str(shipped.shipped(name)))]
    sys.argv = ["visexpert"]
    cli = build_cli([*files, *arguments_of(folder), f"--run={folder / 'run'}"], run=False)
    for part in cli.model.modules():
        if isinstance(part, ReadsWeights) and part is not cli.model.language:
            part.mark_weights_in_place()  # random ones are as good here
    cli.model.load_weights = cli.model.language.load_weights
    cli.trainer.callbacks.append(Timer())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "steps": cli.trainer.global_step, "peak_gib": peak / 2**30}


def planned(folder: Path) -> dict[str, Any]:
    """Return what `visexpert plan` says of the same configuration."""
    files = [word for name in CONFIGS for word in ("--config", name)]
    words = ["plan", *files, "--gpus=1", f"--text_tokens={TEXT_TOKENS}", "--json", *arguments_of(folder)]
    told = subprocess.run(
        [sys.executable, "-m", "visexpert.cli", *words], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def main() -> None:
    """Plan, take the step in a process of its own, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default: %(default)s)")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        (options.step / "step.json").write_text(json.dumps(step(options.step, options.threads)), encoding="utf-8")
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_llama(folder / "llama")
        write_data(folder / "data")
        plan = planned(folder)
        again = [sys.executable, "-m", "benchmarks.whole_step", "--step", name, "--threads", str(options.threads)]
        subprocess.run(again, check=True)
        report(plan, json.loads((folder / "step.json").read_text(encoding="utf-8")), threads=options.threads)


def report(plan: dict[str, Any], taken: dict[str, float], *, threads: int) -> None:
    """Print memory and time beside the plan's."""
    from visexpert.report.machine import describe_machine

    foreseen = plan["memory_per_gpu"]["total"] / 2**30
    print(f"{describe_machine()}, {threads} threads; {datetime.date.today()}")
    print(f"loss {taken['loss']:.3f} after {taken['steps']:.0f} step")
    print(f"time: {taken['wall']:.0f} s, {taken['cpu']:.0f} s of processor time")
    print(
        f"memory: peak {taken['peak_gib']:.1f} GiB, plan {foreseen:.1f} GiB ({foreseen / taken['peak_gib'] - 1:+.0%})"
    )


if __name__ == "__main__":
    main()
