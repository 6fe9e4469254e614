"""Measures what a build costs: the codecs' sizes and quality, and where the time of an image goes.

    python data_tools/measure_build.py            # needs scikit-image, for its photos

Photos are scikit-image's, resized to 640 x 480 and saved as JPEG; pages are drawn text and charts of the same size.
All are cut for CLIP-336. Times are CPU times of one thread, so that other work on the machine does not show.
"""

import io
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from skimage import data

from building.cutting import TOWERS
from llava_next.data.format.pictures import open_picture
from llava_next.data.format.shards import CODECS, RawSample, StripInfo, decode_strip, encode_strip
from llava_next.data.format.writer import ShardFile

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "cat")
SIZE = (640, 480)
ANYRES = TOWERS["clip-336"]
REPEATS = 5


def photos() -> list[Image.Image]:
    """Colour photographs."""
    return [Image.fromarray(getattr(data, name)()).resize(SIZE, Image.Resampling.BICUBIC) for name in PHOTOS]


def pages() -> list[Image.Image]:
    """A page of text, a bar chart, a line chart, a table."""
    images = [Image.new("RGB", SIZE, "white") for _ in range(4)]
    text, bars, lines, table = map(ImageDraw.Draw, images)
    for number in range(30):
        text.text((10, 16 * number), f"{number}: the quick brown fox jumps over the lazy dog, twice a day", "black")
    for number in range(12):
        height = 40 + (number * 137) % 360
        bars.rectangle((20 + 50 * number, 460 - height, 55 + 50 * number, 460), ("navy", "teal", "orange")[number % 3])
        bars.text((25 + 50 * number, 445 - height), str(height), "black")
    for number, color in enumerate(("crimson", "green", "blue")):
        points = [(x, 240 + (60 + 40 * number) * math.sin(x / (30 + 10 * number))) for x in range(0, 640, 4)]
        lines.line(points, color, 3)
    for row in range(20):
        table.line((0, 24 * row, 640, 24 * row), "grey")
        for column in range(6):
            table.text((10 + 105 * column, 24 * row + 6), str((row * 7919 + column * 104729) % 100000), "black")
    return images


def milliseconds(work: Callable) -> tuple[float, object]:
    """CPU time of one call, and what it gives."""
    work()
    start = time.process_time()
    for _ in range(REPEATS):
        result = work()
    return (time.process_time() - start) / REPEATS * 1e3, result


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Peak signal to noise in dB; infinite when equal."""
    error = np.mean((ours.astype(np.float64) - theirs) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def codec_table() -> None:
    """Size, quality and times of every codec, on photos and pages."""
    print("| codec | pictures | kB a strip | stored as | PSNR | encode ms | decode ms |\n|---|---|---|---|---|---|---|")
    for kind, images in (("photos", photos()), ("pages", pages())):
        stacks = [ANYRES.tiles(image) for image in images]
        for codec in CODECS:
            encoded = [milliseconds(lambda tiles=tiles, codec=codec: encode_strip(tiles, codec)) for tiles in stacks]
            decoded = [milliseconds(lambda strip=strip: decode_strip(strip, 336)) for _, (_, strip) in encoded]
            size = np.mean([len(strip) for _, (_, strip) in encoded]) / 1e3
            quality = np.mean([psnr(tiles, ours) for tiles, (_, ours) in zip(stacks, decoded, strict=True)])
            kinds = " and ".join(sorted({ext for _, (ext, _) in encoded}))
            times = (np.mean([spent for spent, _ in which]) for which in (encoded, decoded))
            exact = "exact" if math.isinf(quality) else f"{quality:.1f} dB"
            print(f"| {codec} | {kind} | {size:.0f} | {kinds} | {exact} | {' | '.join(f'{t:.1f}' for t in times)} |")


def stage_split(codec: str) -> None:
    """Where the time of a photo goes, from file to shard."""
    files = []
    for image in photos():
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=90)
        files.append(buffer.getvalue())
    stages = dict.fromkeys(("decode", "resize", "encode", "write"), 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        for number, file in enumerate(files):
            spent, image = milliseconds(lambda file=file: open_picture(file))
            stages["decode"] += spent
            spent, tiles = milliseconds(lambda image=image: ANYRES.tiles(image))
            stages["resize"] += spent
            spent, (ext, strip) = milliseconds(lambda tiles=tiles: encode_strip(tiles, codec))
            stages["encode"] += spent
            turns = [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": "A photograph."},
            ] * 4
            info = StripInfo(*image.size, *ANYRES.grid(*image.size), ext, strip)
            start = time.process_time()
            with ShardFile(Path(scratch) / f"{number}.tar") as shard:
                for row in range(100):
                    shard.write(RawSample(f"{row:09d}", "1", "photos", turns, [info]))
            stages["write"] += (time.process_time() - start) / 100 * 1e3
    total = sum(stages.values())
    split = ", ".join(f"{name} {spent / len(files):.1f}" for name, spent in stages.items())
    print(f"codec {codec}: {1e3 * len(files) / total:.0f} images/s a core; ms an image: {split}")


if __name__ == "__main__":
    codec_table()
    for codec in CODECS:
        stage_split(codec)
