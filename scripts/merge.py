"""Puts an adapter into its base: the model folder that training itself writes, and stock transformers loads.

    python scripts/merge.py --model runs/lora/base --adapter runs/lora/adapter --out merged

Tensor by tensor, added in float32; a 7B model is never in memory as a whole.
"""

import argparse
import sys

from llava_next.model.folders.check import check_folder
from llava_next.model.folders.merging import merge_adapter
from llava_next.paths import local_path, new_folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=local_path, required=True, help="base: the model folder it was trained on")
    parser.add_argument("--adapter", type=local_path, required=True, help="adapter folder, such as RUN_DIR/adapter")
    parser.add_argument("--out", type=new_folder, required=True, help="new folder")
    args = parser.parse_args(arguments)
    try:
        merge_adapter(args.model, args.adapter, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    failed = [finding for finding in check_folder(args.out) if not finding.ok]
    for finding in failed:
        print(finding)
    print(f"{args.out}: merged{f', but {len(failed)} checks FAILED' if failed else ' and sound'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
