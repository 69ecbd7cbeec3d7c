"""``visexpert extract [plan | verify] --config YAML``: store the tokens of frozen encoders before a fit needs them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visexpert import shipped
from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, DataError, require_numbers, shown
from visexpert.interruption import stoppable

if TYPE_CHECKING:
    from visexpert.commands.extraction import Extraction
    from visexpert.experts import FeatureCache
    from visexpert.store import Place
    from visexpert.types import ImageSource

ACTIONS = ("plan", "verify")

GO_ON = "give the same command again, which makes what is missing"

EPILOG = """\
examples:
  visexpert extract plan --config tove/tabletop
  visexpert extract --config tove/tabletop
  torchrun --nproc_per_node 8 -m visexpert.cli extract --config movekd/llava/stage1 --store /scratch/tokens
  visexpert extract --engine ray --workers 8 --config movekd/llava/stage1 --store s3://bucket/tokens
  visexpert extract verify --repair --config tove/tabletop

Which encoders and images are stored follows from the configuration, as in `visexpert fit` with a store; any argument
of fit may follow. Ranks of torchrun, tasks and array jobs of Slurm share the work without talking to one another: each
shard is made by one of them. Call it again after a kill: what is there is not made again.
  plan     bytes, and the time by a few timed batches; nothing is stored
  verify   read every shard of the store and compare it with its checksum; with --repair make damaged ones again
"""


def run(arguments: list[str]) -> Ending | None:
    """Store tokens, plan it, or verify what is stored.

    Raises:
        ConfigError: A setting does not exist, or the configuration stores nothing.
        DataError: Data is missing, the store cannot be written, or shards are damaged.
        WeightsError: Weights are missing.
    """
    action, rest = (arguments[0], arguments[1:]) if arguments[:1] and arguments[0] in ACTIONS else (None, arguments)
    reader = _options()
    options, overrides = reader.parse_known_args(rest)
    reader.refuse_abbreviations(overrides)
    if overrides and not overrides[0].startswith("-"):
        raise ConfigError(
            f"visexpert extract: '{overrides[0]}' is neither plan nor verify; see visexpert extract --help."
        )
    require_numbers(
        "visexpert extract", above=0, batch_size=options.batch_size, shard_mb=options.shard_mb, workers=options.workers
    )
    if options.repair and action != "verify":
        raise ConfigError("visexpert extract: --repair belongs to verify; type visexpert extract verify --repair.")
    if options.json and action != "plan":
        raise ConfigError("visexpert extract: --json belongs to plan; type visexpert extract plan --json.")
    if not options.config and (action != "verify" or options.repair):
        raise ConfigError("visexpert extract: no configuration was given; name YAML files by --config.")
    if options.engine == "ray" and action is not None:
        raise ConfigError(f"visexpert extract: --engine ray stores tokens, and does not {action}; leave it out.")
    if options.workers is not None and options.engine != "ray":
        raise ConfigError("visexpert extract: --workers belongs to --engine ray; add it, or start ranks by torchrun.")
    if action == "verify":
        with stoppable(go_on=GO_ON):
            return _verify(options, overrides)
    if action == "plan":
        from visexpert.commands.extract_plan import plan

        return plan(_extraction(options, overrides), as_json=options.json)
    if options.engine == "ray":
        from visexpert.commands.extract_ray import fill_by_ray

        return fill_by_ray(_part, rest, workers=options.workers)
    with stoppable(go_on=GO_ON):
        return _fill(_extraction(options, overrides))


def parser() -> Parser:
    """Return the command's parser, for help and completion."""
    parser = _options()
    parser.add_argument("action", nargs="?", choices=ACTIONS, help="what to do instead of storing tokens")
    return parser


def _options() -> Parser:
    """Return a parser of our own options; further ones are for ``fit``, and a value of theirs is no action."""
    parser = Parser(
        prog="visexpert extract",
        usage="visexpert extract [plan | verify] --config YAML [options]",
        description="Store the tokens of frozen encoders on disk, before a fit needs them and on as many processes as "
        "there are.\nEach image is encoded once; a kill loses at most one shard.",
        epilog=EPILOG,
    )
    parser.add_argument("--config", action="append", default=[], type=Path, metavar="YAML", help="may be repeated")
    parser.add_argument(
        "--store",
        metavar="FOLDER",
        help="folder or URL of the store, or auto (default: the configuration's, else auto)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: %(default)s, a GPU per rank)"
    )
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="images per call of an encoder (default: the configuration's, 64)"
    )
    parser.add_argument(
        "--shard_mb", type=float, metavar="X", help="size of new shards in MB (default: the configuration's, 256)"
    )
    parser.add_argument(
        "--engine",
        choices=("ranks", "ray"),
        default="ranks",
        help="who starts the processes: ranks of torchrun or Slurm, or Ray Data (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="ray: tasks at a time (default: one per GPU, or per CPU without any)"
    )
    parser.add_argument("--repair", action="store_true", help="verify: make damaged shards again")
    parser.add_argument("--json", action="store_true", help="plan: print JSON instead of a table")
    return parser


def _extraction(options: Any, overrides: Sequence[str]) -> Extraction:
    from visexpert.commands.extraction import Extraction  # heavy: after --help

    return Extraction(options, overrides)


def _fill(extraction: Extraction) -> Ending | None:
    """Store what no other process stores, then wait for the others."""
    cache = extraction.cache
    sources = _make(extraction, cache)
    if cache.unfinished:
        cache.waits = True
        extraction.method.read_features(cache, sources)
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0):
        return None  # the first one tells
    return _ending(extraction, cache, sources)


def _part(arguments: Sequence[str]) -> Ending | None:
    """Store what no other process stores, without waiting; return how the command ends if the store is whole."""
    from visexpert.store import processes

    extraction = _extraction(*_options().parse_known_args(arguments))
    cache = extraction.cache
    sources = _make(extraction, cache)
    is_last = not cache.unfinished and not (
        cache.root.is_remote and processes()[0]
    )  # only the first finishes its cards
    return _ending(extraction, cache, sources) if is_last else None


def _make(extraction: Extraction, cache: FeatureCache) -> Mapping[str, ImageSource]:
    cache.waits, cache.fill = False, True
    return extraction.use(cache)


def _ending(extraction: Extraction, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> Ending:
    names = ", ".join(extraction.method.stored_tokens())
    made = f"the tokens of {sum(map(len, sources.values())):,} images are in {cache.root} ({names})."
    folder = extraction.store.folder
    fit = ("fit", *extraction.words, "--model.init_args.store.folder", folder)
    return Ending(made, (fit, ("extract", "verify", "--store", folder)))


def _verify(options: Any, overrides: Sequence[str]) -> Ending:
    from tqdm.auto import tqdm

    from visexpert.store import verify

    root = _root_of(options, overrides)
    count, damaged = 0, []
    for found in tqdm(verify(root), desc="shards", unit="shard", mininterval=1.0):
        count += 1
        if found.fault is not None:
            rows = f"images {found.rows.start} to {found.rows.stop - 1}"
            print(shown(f"{found}: {found.owner}, {rows}: {found.fault}"))
            damaged.append(found)
    if damaged and not options.repair:
        raise DataError(
            f"{len(damaged)} of {count} shards in {root} are damaged; make them again with visexpert extract verify "
            "--repair --config YAML."
        )
    for found in damaged:
        found.remove()
    if damaged:
        _fill(_extraction(options, overrides))
    gone = [found for found in damaged if not found.exists()]
    if gone:
        raise DataError(
            f"{len(gone)} damaged shards, such as {gone[0]}, are not of this configuration; they are removed, and the "
            "next fit or extract that needs them makes them again."
        )
    made = (
        f"{count} shards in {root} are as they were written" if not damaged else f"{len(damaged)} shards are made again"
    )
    words = [word for path in options.config for word in ("--config", shipped.shown(path))] or ["--config", "YAML"]
    return Ending(f"{made}.", (("fit", *words, "--model.init_args.store.folder", options.store or "auto"),))


def _root_of(options: Any, overrides: Sequence[str]) -> Place:
    """Return the store to verify: that of ``--store``, else the configuration's, else the usual one."""
    from visexpert.commands.extraction import opened, store_settings
    from visexpert.methods import StoreSettings
    from visexpert.planning.read import parse_configs

    store = StoreSettings(folder=options.store or "auto")
    if options.config:
        store = store_settings(parse_configs(options.config, overrides, command="extract"), options.store)
    return opened(store).root
