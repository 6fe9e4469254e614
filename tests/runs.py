"""What a run folder says of a run."""

import json
from pathlib import Path


def losses(folder: Path) -> list[float]:
    """Of steps 1, 2, ..., each of which stands in the log once."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]
