"""What a build is given on its command line: where its samples lie, and how many of which source are expected."""

import json
from collections import Counter
from pathlib import Path

from llava_next.data.inputs.listing import Listing, list_json
from llava_next.paths import folder_or_name, local_path


def add_input_arguments(parser) -> None:
    """The options that `list_input` reads, and `--images`."""
    add = parser.add_argument
    add("--json", type=local_path, help="JSON list or JSONL of records in any form; .yaml: a mixture of such files")
    add("--hf", type=folder_or_name, help="instead of --json: data set id on the Hugging Face hub, or parquet files")
    add("--split", default="train", help="of --hf (default: train)")
    add("--shards", help="instead of --json: folder or URL of webdataset shards with raw images")
    add("--images", type=local_path, help="folder that image paths are relative to; none: all pictures are embedded")


def list_input(options, seed: int = 0) -> Listing:
    """Lists the samples of the input that the command line names. Raises ValueError."""
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"--images {options.images} is not a folder")
    if options.json is not None:
        try:
            return list_json(options.json, seed, options.images)
        except ValueError as error:
            raise ValueError(f"--json {error}") from None
    from building.embedded import list_hub, list_shards

    return list_hub(options.hf, options.split) if options.hf is not None else list_shards(options.shards)


def check_expected(path: Path, listing: Listing) -> None:
    """Compares the samples of an input with a file of expected counts, before anything is built.

    The file: `{"total": N or null, "about": N or absent, "sources": {name: N or null}, "complete": bool}`. A count of
    null asks only that the source is there; `about` holds within 1 %; `complete`: no other source may appear.

    Raises:
        ValueError: naming every difference.
    """
    try:
        expected, found = json.loads(path.read_bytes()), Counter(listing.source_counts())
        sources, is_complete = expected["sources"], expected["complete"]
    except OSError as error:
        raise ValueError(f"--expect {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--expect {path}: no file of expected counts ({type(error).__name__}: {error})") from None
    wrong = []
    if expected.get("total") is not None and expected["total"] != len(listing):
        wrong.append(f"{len(listing)} samples, expected {expected['total']}")
    if abs(len(listing) - (expected.get("about") or len(listing))) > 0.01 * len(listing):
        wrong.append(f"{len(listing)} samples, expected about {expected['about']}")
    for name, count in sources.items():
        if not found[name] or count not in (None, found[name]):
            wrong.append(f"source {name}: {found[name]}, expected {'some' if count is None else count}")
    others = sorted(set(found) - set(sources)) if is_complete else []
    wrong += [f"source {name}: {found[name]}, expected none" for name in others[:10]]
    if wrong:
        raise ValueError(f"--expect {path}: the input is not what the file says: {'; '.join(wrong)}")
