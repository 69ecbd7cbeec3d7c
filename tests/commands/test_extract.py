"""``visexpert extract``: what it stores is what a fit reads; what plan and verify say; faults in one sentence."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.two_processes import in_two_processes
from visexpert.cli import main
from visexpert.experts import FeatureCache, VisionExpert
from visexpert.names import EncoderName
from visexpert.store import EncodeRows, FeatureKey, verify

SMOKE = ["--config", "tove/smoke"]
SHARDS = 9
"""CLIP, semantic and depth, each for training, validation and test images."""


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that experts encode, by call; calls on one image are checks of weights that were just loaded."""
    sizes: list[int] = []
    forward = VisionExpert.forward

    def counted(self: VisionExpert, images: torch.Tensor) -> object:
        sizes.extend([len(images)] if len(images) > 1 else [])
        return forward(self, images)

    monkeypatch.setattr(VisionExpert, "forward", counted)
    return sizes


def shards(store: Path) -> list[Path]:
    return sorted(store.glob("*/shard-*"))


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(["extract", *arguments])
    return capsys.readouterr().out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        run(arguments, capsys)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_fit_reads_what_was_extracted_and_runs_no_expert(
    tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image is encoded once by each of the two experts; then nothing is stored anymore."""
    store = tmp_path / "store"
    out = run([*SMOKE, "--store", str(store), "--batch_size", "16"], capsys)
    assert sum(encoded) == 2 * (32 + 8 + 16) and max(encoded) == 16
    assert (
        "Done: the tokens of 56 images" in out
        and str(store) in out
        and "Next: visexpert fit --config tove/smoke" in out
    )
    assert len(shards(store)) == SHARDS
    monkeypatch.setattr("visexpert.experts.cache.write_features", None)
    run([*SMOKE, "--store", str(store)], capsys)
    short = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--test_after_fit", "false"]
    main(["fit", *SMOKE, "--model.init_args.store.folder", str(store), "--run", str(tmp_path / "run"), *short])


def test_two_ranks_encode_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that share nothing but the folder; both have work, and both end when all is there.

    Each holds its first shard until the other holds one too: else a process that starts late may find all done.
    """
    fork = multiprocessing.get_context("fork")
    counts = [fork.Value("i", 0) for _ in range(2)]
    forward, first_shard = VisionExpert.forward, fork.Barrier(2)

    def extract(rank: int) -> None:
        def counted(self: VisionExpert, images: torch.Tensor) -> object:
            if len(images) > 1:  # no check of weights
                if not counts[rank].value:
                    first_shard.wait(60)
                counts[rank].value += len(images)
            return forward(self, images)

        monkeypatch.setattr(VisionExpert, "forward", counted)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        main(["extract", *SMOKE, "--store", str(tmp_path), "--shard_mb", "0.0034"])  # no shard of one image

    workers = [fork.Process(target=extract, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sum(count.value for count in counts) == 2 * (32 + 8 + 16)
    assert all(count.value for count in counts)
    assert len(list(verify(tmp_path))) > SHARDS and not any(found.fault for found in verify(tmp_path))


COUNTING = """
import os, time
from visexpert.tabletop import TinyExpert

class Counting(TinyExpert):
    def encode(self, pixels_BCHW):
        if len(pixels_BCHW) > 1:  # no check of weights
            with open("calls.txt", "a") as calls:
                calls.write(f"{os.getpid()} {len(pixels_BCHW)}\\n")
            started = time.monotonic()  # holds its first shard until the other worker has one
            while len({line.split()[0] for line in open("calls.txt")}) < 2 and time.monotonic() < started + 60:
                time.sleep(0.1)
        return super().encode(pixels_BCHW)
"""


@pytest.mark.long
def test_two_workers_of_ray_encode_each_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting.py").write_text(COUNTING)
    network = {"widths": [8, 16], "token_dim": 16, "outputs": {"depth": 1}}
    arch = {"kind": "conv", "image_size": 32, "network": network}
    expert = {"class_path": "counting.Counting", "init_args": {"arch": arch}}
    (tmp_path / "mine.yaml").write_text(json.dumps({"model": {"init_args": {"experts": {"depth": expert}}}}))
    config = [*SMOKE, "--config", "mine.yaml", "--store", "tokens", "--shard_mb", "0.0034"]
    out = run(["--engine", "ray", "--workers", "2", *config], capsys)
    calls = [line.split() for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert sum(int(count) for _, count in calls) == 32 + 8 + 16 and len({pid for pid, _ in calls}) == 2
    assert "Done: the tokens of 56 images are in tokens" in out
    assert not any(found.fault for found in verify(tmp_path / "tokens"))
    told = refused(["--engine", "ray", "--workers", "2", *SMOKE, "--store", "tokens", "--model.blind", "7"], capsys)
    assert "blind" in told and "Traceback" not in told


def count_in_a_fit(rank: int, folder: Path) -> int:
    """Fit on two processes with a store, and return how many images this one encoded for it."""
    counted: list[int] = []
    take = FeatureCache.take

    def count(self: FeatureCache, name: EncoderName, split: str, key: FeatureKey, encode: EncodeRows) -> None:
        def encoded(rows: range) -> Iterable[torch.Tensor]:
            counted.append(len(rows))
            return encode(rows)

        take(self, name, split, key, encoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCache, "take", count)
        patch.setattr("sys.argv", ["visexpert"])
        short = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--test_after_fit", "false"]
        two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        store = ["--model.init_args.store.folder", str(folder / "store")]
        main(["fit", *SMOKE, *store, "--run", str(folder / "run"), *short, *two])
    return sum(counted)


def test_a_fit_on_two_processes_encodes_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    assert sum(in_two_processes(count_in_a_fit, tmp_path)) == 3 * (32 + 8)
    assert not any(found.fault for found in verify(tmp_path / "store"))


def test_a_flipped_bit_is_found_and_that_shard_alone_is_made_again(
    tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    small = [*SMOKE, "--store", str(store), "--shard_mb", "0.01", "--data.init_args.num_val", "20"]
    run(small, capsys)
    whole = {path: path.read_bytes() for path in shards(store)}
    assert len(whole) > SHARDS
    assert f"{len(whole)} shards in {store} are as they were written" in run(["verify", "--store", str(store)], capsys)
    victim = next(path for path in whole if path.name != "shard-000000.safetensors")
    content = bytearray(whole[victim])
    content[-5] ^= 16
    victim.write_bytes(content)
    told = refused(["verify", "--store", str(store)], capsys)
    assert f"1 of {len(whole)} shards" in told and "--repair" in told
    assert "--config" in refused(["verify", "--repair", "--store", str(store)], capsys)
    encoded.clear()
    out = run(["verify", "--repair", *small], capsys)
    assert str(victim) in out and "1 shards are made again" in out
    assert victim.read_bytes() == whole[victim]
    assert sum(encoded) <= 10_000 // 1000
    assert {path: path.read_bytes() for path in shards(store)} == whole


def test_the_plan_counts_bytes_and_stores_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    found = json.loads(run(["plan", *SMOKE, "--store", str(store), "--json"], capsys))
    assert not store.exists()
    assert {(each["encoder"], each["split"], each["images"]) for each in found["tokens"]} == {
        (encoder, split, images)
        for encoder in ("encoder", "expert semantic", "expert depth")
        for split, images in (("train", 32), ("val", 8), ("test", 16))
    }
    assert all(each["stored"] == 0 and each["seconds_per_image"] > 0 for each in found["tokens"])
    training = [each["seconds_per_image"] for each in found["tokens"] if each["split"] == "train"]
    assert found["saved"]["seconds_per_epoch"] == pytest.approx(32 * sum(training))
    assert found["saved"]["seconds_per_step"] == pytest.approx(found["saved"]["batch_size"] * sum(training))
    run([*SMOKE, "--store", str(store)], capsys)
    size = sum(path.stat().st_size - 1024 for path in shards(store))
    assert found["bytes"] == size
    again = json.loads(run(["plan", *SMOKE, "--store", str(store), "--json"], capsys))
    assert all(each["stored"] == each["images"] for each in again["tokens"]) and again["seconds"] == 0
    assert "per image" in run(["plan", *SMOKE, "--store", str(store)], capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("--config",)),
        (["plan"], ("--config",)),
        (["verfy"], ("verfy", "verify")),
        ([*SMOKE, "--repair"], ("--repair", "verify")),
        ([*SMOKE, "--json"], ("--json", "plan")),
        ([*SMOKE, "--batch_size", "0"], ("batch_size", "0")),
        ([*SMOKE, "--device", "tpu9"], ("tpu9", "cpu")),
        (["--config", "movekd/smoke", "--model.init_args.kd_weight", "0"], ("MoVEKD", "stores no tokens")),
        ([*SMOKE, "--workers", "2"], ("--workers", "--engine ray")),
        (["plan", *SMOKE, "--engine", "ray"], ("--engine ray", "plan")),
        ([*SMOKE, "--engine", "ray", "--workers", "0"], ("workers", "0")),
        ([*SMOKE, "--stor", "x"], ("--stor",)),
        ([*SMOKE, "--store", "s33://bucket/x"], ("s33://bucket/x", "s3://", "fsspec")),
        ([*SMOKE, "--model.init_args.store.folder", "gs://bucket"], ("gs://bucket", "visexpert[remote]")),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(arguments, capsys).strip().splitlines()[-1]
    assert all(word in told for word in words), told


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in refused(["verify", "--store", str(tmp_path)], capsys)
