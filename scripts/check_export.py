"""Proves a model folder, whose weights, configuration, processor, tokenizer and chat template agree, or an adapter.

Of an adapter it proves keys, shapes and pattern, and the base that it names.

    python scripts/check_export.py runs/finetune/model

Prints a line for each check; ends with exit code 1 when one failed. Loads no weights.
"""

import argparse
import sys

from transformers.utils import logging

from llava_next.model.folders.check_adapter import check_any
from llava_next.paths import local_path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=local_path, help="model or adapter folder")
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        sys.exit(f"error: {args.folder} is no folder; give a model folder, such as RUN_DIR/model")
    logging.set_verbosity_error()

    findings = check_any(args.folder)
    for finding in findings:
        print(finding)
    failed = sum(not finding.ok for finding in findings)
    print(f"{args.folder}: {f'{failed} of {len(findings)} checks FAILED' if failed else 'sound'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
