"""Stands for scripts/evaluate.py: a model's score is the number in the folder's file `value`, else made of its weights.

In the place of a number `value` may say `crash`, `hang`, or `stop`: then it asks the run to stop, and hangs once.
"""

import json
import os
import sys
import time
import zlib
from pathlib import Path

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
model, out = Path(words["--model"]), Path(words["--out"])
if "--check_only" in words:
    print('["held_out"]')
    sys.exit()
(out / "started.json").write_text(json.dumps({"process": os.getpid(), "words": sys.argv[1:], **os.environ}))
told = (model / "value").read_text() if (model / "value").exists() else words.get("--name", "")
if told == "stop" and not (out / "stopped").exists():
    (out / "stopped").touch()
    (out.parents[1] / "stop").touch()
if told == "hang" or (told == "stop" and (out.parents[1] / "stop").exists()):
    time.sleep(120)
print("asked 3/3", flush=True)
if told == "crash":
    sys.exit("error: no such thing")
if not told or told == "stop":
    told = zlib.crc32((model / "model.safetensors").read_bytes()) / 2**32
score = {"value": float(told), "metric": "exact_match", "samples": 3, "noise": 0.1, "published": None}
(out / "scores.json").write_text(json.dumps({"scores": {"held_out": score}}))
