"""Builds a data set for training: conversations and images become webdataset shards of ready-cut tiles.

    python data_tools/build_shards.py --json train.json --images ROOT --out DIR_OR_URL --tower clip-336

The input is a JSON list or JSONL file, a YAML mixture of those (--json), a Hugging Face data set (--hf) or webdataset
shards with raw images (--shards); records are in LLaVA's or any other usual form. Written are `shard-000000.tar`, ...,
`index.parquet`, `rejected.jsonl` (samples left out: id, file, reason) and last `dataset.json`. A folder without
`dataset.json` is not a data set.

The same input and arguments give the same bytes, whatever the number of workers or machines, and however often the
build was stopped: run again, it continues. data_tools/README.md describes options, format and the published data sets.
"""

import argparse
import os
import re
import sys
import time
from dataclasses import replace

from building.cutting import Cutter, add_geometry_arguments, geometry
from building.inputs import add_input_arguments, check_expected, list_input
from building.jobs import Job, Output, Plan, build_missing, check_share, finish
from llava_next.data.format.dataset import DatasetInfo
from llava_next.data.format.shards import CODECS
from llava_next.data.inputs.listing import Listing
from llava_next.data.inputs.samples import SYSTEM_CHOICES, common_reasons, model_template
from llava_next.data.inputs.text_lengths import fingerprints
from llava_next.data.inputs.unbuilt import MAX_REJECTED_SHARE, SEED, SHARD_SAMPLES
from llava_next.own_template import NAMES
from llava_next.paths import local_path
from llava_next.templates import OWN, get_template

TOLD = {
    "first_turns_left_out": "begin with a turn that is not human: training leaves it out, as the original does",
    "system_prompts": "have a system prompt of their own",
}


def make_cutter(options: argparse.Namespace) -> Cutter:
    """What makes samples of records, as the command line says. Raises ValueError."""
    template = model_template(options.model) if options.model is not None else None
    if options.template == OWN and (template is None or template.name != OWN):
        raise ValueError(f"--template {OWN}: give --model, a folder that was composed with it")
    if options.template not in (None, OWN):
        template = get_template(options.template)
    return Cutter(
        options.images,
        geometry(options),
        options.source,
        options.system,
        template,
        options.allow_text_image_token,
        options.codec,
        options.quality,
    )


def build(options: argparse.Namespace) -> None:
    """The whole build, or one part of it. Raises ValueError for what the user can mend."""
    started = time.monotonic()
    output = Output(options.out)
    cutter = make_cutter(options)
    plan = Plan(
        "",
        0,
        cutter.anyres,
        options.codec,
        options.quality,
        options.shard_samples,
        options.seed,
        options.source,
        fingerprints(options.tokenizers),
        options.system,
        cutter.template and cutter.template.name,
        options.allow_text_image_token,
    )
    output.check(plan)
    listing = list_input(options, options.seed)
    if options.source is not None:
        listing = listing.from_one_source(options.source)
    if options.expect is not None:
        check_expected(options.expect, listing)
    plan = replace(plan, input_sha256=listing.sha256, samples=len(listing))
    if output.is_complete(plan):
        print(f"{options.out} is complete already and was built from this input with these arguments; nothing to do")
        return
    with output.hold(*options.part, options.take_over):
        build_held(options, output, plan, listing, cutter, started)


def build_held(
    options: argparse.Namespace, output: Output, plan: Plan, listing: Listing, cutter: Cutter, started: float
) -> None:
    """The build, in a place that nobody else builds in. Raises ValueError."""
    output.begin(plan)
    part, parts = options.part
    numbers = list(range(plan.num_shards))[part - 1 :: parts]
    share = MAX_REJECTED_SHARE if options.max_rejected_share is None else options.max_rejected_share
    in_part = sum(min(plan.shard_samples, plan.samples - number * plan.shard_samples) for number in numbers)
    build_missing(
        output,
        plan,
        listing,
        Job(listing.reader, cutter, output.storage, output.folder, options.tokenizers),
        numbers,
        options.workers,
        lambda rejected: check_share(rejected, in_part, share, output, numbers),
    )
    if parts > 1:
        print(f"part {part}/{parts} is built: {len(numbers)} shards. When all are, run with --merge --out only")
        return
    info, rejected = finish(output, plan, share, keep=False)
    summarise(info, options.out, rejected, time.monotonic() - started)


def merge(options: argparse.Namespace) -> None:
    """Makes the data set of the parts that were built. Raises ValueError."""
    started = time.monotonic()
    output = Output(options.out)
    plan = output.plan()
    share = 1.0 if options.max_rejected_share is None else options.max_rejected_share  # each part kept to its own
    with output.hold(take_over=options.take_over):
        info, rejected = finish(output, plan, share, keep=True)
    summarise(info, options.out, rejected, time.monotonic() - started)


def summarise(info: DatasetInfo, out: str, rejected: list[dict], seconds: float) -> None:
    """Prints what was built."""
    size = sum(shard.bytes for shard in info.shards)
    print(
        f"{out}: {info.samples} samples, {info.images} images, {info.tiles} tiles in {len(info.shards)} shards, "
        f"{size / 1e6:.1f} MB ({size / info.samples / 1e3:.1f} kB a sample), in {seconds:.0f} s "
        f"({info.images / seconds:.1f} images/s)"
    )
    print("sources: " + ", ".join(f"{name} {count}" for name, count in info.sources.items()))
    for name, told in TOLD.items():
        if info.build[name]:
            print(f"{info.build[name]} samples {told}")
    if rejected:
        print(f"{len(rejected)} samples rejected, see {out}/rejected.jsonl; most often:")
        print("\n".join(f"  {line}" for line in common_reasons(rejected)))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_input_arguments(parser)
    add("--system", choices=SYSTEM_CHOICES, default="keep", help="a sample's own system prompt (default: %(default)s)")
    add("--template", choices=NAMES, help="chat template of the training (default: that of --model, else any)")
    add("--allow_text_image_token", action="store_true", help="without a picture, <image> in a question is characters")
    add("--out", required=True, help="folder or URL (s3://, gs://, az://) to write")
    add_geometry_arguments(parser)
    add("--codec", choices=CODECS, default="auto", help="of the strips (default: the smaller of jpeg and webp)")
    add("--quality", type=int, default=95, help="of JPEG (default: %(default)s)")
    add("--shard_samples", type=int, default=SHARD_SAMPLES, help="samples a shard (default: %(default)s)")
    add("--seed", type=int, default=SEED, help="of the order in the shards (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes; 0: none (default: the number of CPUs)")
    add(
        "--max_rejected_share",
        type=float,
        help=f"of the samples (default: {MAX_REJECTED_SHARE}; --merge: the parts' own)",
    )
    add("--source", help="name for the source of all samples (default: what each names, else its first image folder)")
    add("--expect", type=local_path, help="JSON file of expected counts, checked before the build (data_tools/expect/)")
    add(
        "--tokenizer", action="append", default=[], help="NAME_OR_FOLDER:template: store exact text lengths; repeatable"
    )
    add("--part", default="1/1", help="i/n: build every n-th shard only, from the i-th; then --merge")
    add("--merge", action="store_true", help="join the parts that lie in --out")
    add("--take_over", action="store_true", help="end another build that holds --out")
    options = parser.parse_args(arguments)
    for name, least in (("quality", 1), ("shard_samples", 1), ("seed", 0), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be {least} or more")
    inputs = [name for name in ("json", "hf", "shards") if getattr(options, name) is not None]
    if len(inputs) != (0 if options.merge else 1):
        parser.error("give no input with --merge" if options.merge else "give one of --json, --hf and --shards")
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", options.part)
    if match is None or int(match[1]) > int(match[2]):
        parser.error(f"--part {options.part}: expected i/n with i from 1 to n")
    options.part, options.tokenizers = (int(match[1]), int(match[2])), tuple(options.tokenizer)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        merge(options) if options.merge else build(options)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a worker process was killed
        sys.exit(f"build_shards: {error}")
    except KeyboardInterrupt:
        sys.exit("build_shards: interrupted; no data set written. Run the same command again to continue")


if __name__ == "__main__":
    main()
