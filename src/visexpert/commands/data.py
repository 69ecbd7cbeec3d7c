"""``visexpert data check CONFIG``: what of a configuration's data is missing, and where to get it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visexpert.checking import built, check_config_file, check_settings
from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, DataError, UserError, shown
from visexpert.io.run_folder import blamed_on_version, is_of_run
from visexpert.overlays import are_related
from visexpert.shipped import find
from visexpert.shipped import shown as name_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from visexpert.data.rows import RowData
    from visexpert.data.source import SourceData

OK, MISSING, BROKEN = "ok", "MISSING", "BROKEN"

SHARDS, RECORDS = 16, 16
"""Shards of each part that are looked into, unless all are asked for, and records read at the beginning of each."""

EPILOG = """\
Nothing is downloaded and nothing is started. Each thing that the data needs is listed with its place; what is missing
comes with its source and size. Where the annotations are there, the images that they name are looked for, too: 2000 of
each part, spread evenly, or every one with --images all; 100 are decoded. Images inside a data set of Hugging Face are
decoded, 100 of each part or all. Of the shards here 16 of each part, or every one with --images all, are counted, and
the first 16 records of each are read. The pretrained weights of the model are listed, too. Other images may still be
damaged: that shows in training, where they are skipped and listed in the run's folder (skipped.jsonl).

  visexpert data check configs/tove/paper/vit-b16.yaml
  visexpert data check base.yaml overlay.yaml --parts test
"""


def run(arguments: list[str]) -> Ending:
    """List what is there and what is missing.

    Raises:
        ConfigError: The configuration names no data, or data that cannot be built.
        DataError: Something is missing.
    """
    options = parser().parse_args(arguments)
    missing = 0
    for label, source, parts in sources_of(build_data(options.config), options.parts):
        print(shown(label))
        for state, line in findings(source, parts, images=options.images):
            missing += state != OK
            print(f"  {state:7}  {shown(line)}")
    model = merged(options.config).get("model")
    if options.weights and isinstance(model, dict):
        from visexpert.commands.weights_check import weight_findings

        print("pretrained weights")
        for is_there, line in weight_findings(model, foreign=foreign_of(options.config)):
            missing += not is_there
            print(f"  {OK if is_there else MISSING:7}  {shown(line)}")
    if missing:
        things = "1 thing that the data needs is" if missing == 1 else f"{missing} things that the data needs are"
        raise DataError(f"{things} missing or broken; get them as said above and check again.")
    is_overlay = not (isinstance(model, dict) and "class_path" in model)
    layers = [*(["BASE"] if is_overlay else []), *map(name_of, options.config)]
    names = [word for layer in layers for word in ("--config", layer)]
    return Ending("nothing is missing.", (("plan", *names), ("fit", *names)))


def findings(source: SourceData, parts: Sequence[str], *, images: str) -> Iterator[tuple[str, str]]:
    """What a source needs: whether it is there (``ok``, ``MISSING``, ``BROKEN``), and a line that says what it is.

    Args:
        source: The source.
        parts: Parts to look at.
        images: ``sample``, ``all`` or ``none`` of the images that the annotations name.
    """
    needs = source.all_needs(parts)
    for _, alike in groupby(needs, key=lambda need: (getattr(need, "what", ""), need.found is not None)):
        first, *others = alike  # hundreds of shards are one line
        line = first.sentence if first.found is None else str(first.found)
        yield OK if first.found is not None else MISSING, line + (f" And {len(others)} more like it." if others else "")
    if any(need.found is None for need in needs) or images == "none":
        return
    for part in parts:
        try:
            yield from _of_part(source, part, every=images == "all")
        except UserError as error:
            yield BROKEN, str(error)


def _of_part(source: SourceData, part: str, *, every: bool) -> Iterator[tuple[str, str]]:
    """Whether a part's annotations can be read and its images are there."""
    from visexpert.data import ImageShards
    from visexpert.data.rows import RowData

    before = len(source.fault_logs)
    source.open(part)
    if isinstance(source, ImageShards):
        faults = source.faults_found(part, shards=None if every else SHARDS, records=RECORDS)
        for fault in faults:
            yield BROKEN, f"{part}: {fault}"
        if not faults:
            yield OK, f"{part}: {source.records(part)} records in {len(source.shards(part))} shards"
    if not isinstance(source, RowData):
        return
    yield from _images_of(source, part, every=every)
    for log in source.fault_logs[before:]:  # of an earlier part, that is told with it
        if len(log) or log.parts:
            parts = f", {log.parts} more in part" if log.parts else ""
            yield (
                BROKEN if len(log) else OK,
                f"{log.source}: {len(log)} of {log.total} records cannot be used{parts}: {log.last}",
            )


def _images_of(source: RowData, part: str, *, every: bool) -> Iterator[tuple[str, str]]:
    """Whether images of a part are there, and those of some rows can be used."""
    total = len(source.table(part))
    line = f"{part}: {total} rows"
    if source.has_files:
        few = _spread(total, None if every else source.looked_for)
        gone = source.images_missing(part, few)
        line += f"; images of {len(few)} looked for"
        yield MISSING if gone else OK, line + (f", {len(gone)} not there, such as {gone[0]}" if gone else "")
    few = _spread(total, None if every and not source.has_files else source.looked_into)
    broken = source.images_broken(part, few)
    if broken:
        yield BROKEN, f"{part}: images of {len(few)} rows read, {len(broken)} cannot be used, such as: {broken[0]}"
    elif not source.has_files:
        yield OK, f"{line}; images of {len(few)} read"


def _spread(total: int, most: int | None) -> list[int]:
    """Return up to ``most`` rows of ``total``, spread evenly."""
    few = total if most is None else min(total, most)
    return [number * total // few for number in range(few)]


def sources_of(data: LightningDataModule, parts: Sequence[str]) -> Iterator[tuple[str, SourceData, list[str]]]:
    """The sources of a data module with the parts of them that are in use.

    Args:
        data: The data module.
        parts: Parts that are meant to be used.
    """
    from visexpert.data import MixedData, SourceData

    if isinstance(data, MixedData):
        for name, source in data.sources.items():
            used = [part for part in parts if name in data.names[part]]
            if used:
                yield f"{name} ({type(source).__name__}): {', '.join(used)}", source, used
    elif isinstance(data, SourceData):
        used = [part for part in parts if part in data.parts]
        yield f"{type(data).__name__}: {', '.join(used)}", data, used
    else:
        print(f"{type(data).__name__} makes its own data on first use.")


def build_data(paths: Sequence[Path]) -> LightningDataModule:
    """Build the data module of a configuration, without its model.

    Raises:
        ConfigError: A file cannot be read, names no data, or data that cannot be built.
    """
    from jsonargparse import ArgumentError, ArgumentParser
    from lightning.pytorch import LightningDataModule

    from visexpert.parse_errors import explain
    from visexpert.trust import guarded, refuse_strangers

    named = " + ".join(map(str, paths))
    for path in paths:
        check_config_file(path)
    config = merged(paths)
    if not isinstance(config.get("data"), dict):
        raise ConfigError(f"{named} names no data; give the configuration of a run, with a class_path under data.")
    foreign = foreign_of(paths)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            if foreign is not None:
                refuse_strangers(config["data"], foreign)
            with guarded(foreign):
                parsed = parser.parse_object({"data": config["data"]})
            if foreign is not None:
                refuse_strangers(parsed, foreign)
        except ArgumentError as error:
            raise blamed_on_version(ConfigError(f"{named}: {explain(str(error), [])}"), paths) from error
        check_settings(parsed.as_dict())
        data: LightningDataModule = built(lambda: parser.instantiate_classes(parsed), who=named).data
    return data


def foreign_of(paths: Sequence[Path]) -> Path | None:
    """The first configuration that lies in a run's folder, which may be anyone's."""
    return next(filter(is_of_run, paths), None)


def _laid_over(below: Any, above: Any) -> Any:
    """As `visexpert fit` lays files over one another: settings of a class are merged, their values replaced whole."""
    if not all(isinstance(part, dict) and {"class_path", "init_args"} & part.keys() for part in (below, above)):
        return above
    new_class, old_class = (str(part.get("class_path", "")) for part in (above, below))
    if new_class and new_class != old_class and not are_related(new_class, old_class):
        return above
    old, new = below.get("init_args") or {}, above.get("init_args") or {}
    arguments = {**old, **{name: _laid_over(old.get(name), value) for name, value in new.items()}}
    return {**below, **above, "init_args": arguments}


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """Several files laid over one another, with their ``${...}`` filled in."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = [OmegaConf.load(path) for path in paths]
        raw: list[Any] = [OmegaConf.to_container(part, resolve=False) for part in loaded]
        together: Any = OmegaConf.merge(*loaded)
        for key in ("data", "model"):
            if told := [part[key] for part in raw if isinstance(part, dict) and key in part]:
                together[key] = reduce(_laid_over, told)
        config = OmegaConf.to_container(together, resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{' + '.join(map(str, paths))} cannot be read ({reason}); check path and YAML.") from error
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(prog="visexpert data", description="Look for the data that a configuration needs.", epilog=EPILOG)
    parser.add_argument("action", choices=["check"], help="look for records, images and weights")
    parser.add_argument(
        "config", nargs="+", type=find, metavar="CONFIG", help="YAML file or shipped name; later ones win"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["train", "val", "test"],
        default=["train", "val", "test"],
        metavar="PART",
        help="parts that you mean to use: train, val, test (default: all that the sources have)",
    )
    parser.add_argument(
        "--images",
        choices=["sample", "all", "none"],
        default="sample",
        help="which images to look for (default: sample)",
    )
    parser.add_argument(
        "--no_weights", dest="weights", action="store_false", help="look for data alone, not for pretrained weights"
    )
    return parser
