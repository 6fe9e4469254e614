"""The model card: README.md, what a folder says of itself on the hub, with its losses as a table or a picture.

All that its text is made of stands in its front matter too (`parts`, `stages`), so that the next stage, a merge and
scores that come later go on from the card alone. Nothing in it depends on the time or on where a run lies: the same run
writes the same bytes. A licence stands in it only where the parts state one, and the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from llava_next.repositories import hub_name
from llava_next.templates import TEMPLATES

CARD, CURVE = "README.md", "loss.png"
CARD_FILES = (CARD, CURVE)
POINTS, COLUMNS = 60, 10  # of a stage's losses: kept, and shown where there is no picture
DRAWN_STEPS = 100  # a picture is made of runs with at least so many
LICENCE = ("license", "license_name", "license_link")
PLACE = "PATH/TO/THIS/FOLDER"
TASK = "image-text-to-text"
TRAINED = "trained.safetensors"  # of an adapter's base, see `adapters.write_base`
KINDS = {
    "model": ("model", ", which also vLLM loads"),
    "adapter": ("adapter (LoRA)", ", to be put on its base"),
    "base": (
        "base of an adapter (LoRA)",
        f": the model that training started from, with what trained in full beside the adapter in `{TRAINED}`. Without "
        "the adapter it answers as nobody has trained it",
    ),
}
BEGINNING = """
A LLaVA-NeXT (LLaVA-1.6) {kind} in the layout of stock `transformers`{how}. It sees a picture as a base tile and a grid
of tiles (AnyRes).
"""


@dataclass
class Story:
    """What a card tells.

    Args:
        parts: what it was made of: `role`, `name`, `on_hub` (the name is a repository), and `LICENCE` as it states it.
        stages: trainings, oldest first: `title`; `data`: rows of `name`, `samples`, `weight`, `index` (`Index.hash`);
            `recipe` and `versions`: label -> text; `loss`: as `thinned` gives; `steps`.
        datasets: hub names of what was trained on, as far as known.
        scores: name -> `value`, and `metric`, `samples`, `noise`, `published` where they are known.
    """

    parts: list[dict] = field(default_factory=list)
    stages: list[dict] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    scores: dict[str, dict] = field(default_factory=dict)


def part_of(role: str, given: str, folder: Path | None) -> dict:
    """A part as `Story.parts` has it.

    Args:
        given: what the user named: a folder or a repository.
        folder: where it lies; None: it has random weights, and `given` is its architecture.
    """
    if folder is None:
        return {"role": role, "name": f"{given} (random weights)", "on_hub": False}
    name = hub_name(folder) or (given if given.count("/") == 1 and not Path(given).exists() else "")
    stated = {key: value for key, value in _metadata(folder).items() if key in LICENCE and isinstance(value, str)}
    return {"role": role, "name": name or folder.resolve().name, "on_hub": bool(name), **stated}


def read_story(folder: Path) -> Story:
    """What a model folder's card tells, for what is made of it next; of a card that others wrote its licence."""
    found = _metadata(folder)
    parts, stages, datasets = (found.get(key) for key in ("parts", "stages", "datasets"))
    if not (_are(parts, dict, ("role", "name")) and _are(stages, dict, ("title", "data", "recipe"))):
        return Story([part_of("start", folder.name, folder)])
    return Story(parts, stages, datasets if _are(datasets, str) else [])


def _are(values, kind: type, keys: Iterable[str] = ()) -> bool:
    """Whether `values` is a list of objects of a kind that have these keys."""
    return isinstance(values, list) and all(isinstance(v, kind) and all(key in v for key in keys) for v in values)


def _metadata(folder: Path) -> dict:
    """Front matter of a folder's card; empty when there is none that can be read."""
    try:
        return metadata_load(folder / CARD) or {}
    except Exception:  # whatever others wrote there: a card is no reason to fail
        return {}


def thinned(points: Sequence[tuple[int, float]], count: int = POINTS) -> str:
    """(step, loss) points as text, `10 2.31, 20 1.9`: at most `count`, last step and mean loss of equal stretches."""
    ends = [round(len(points) * k / count) for k in range(count + 1)] if len(points) > count else range(len(points) + 1)
    groups = [points[a:b] for a, b in pairwise(ends)]
    return ", ".join(f"{group[-1][0]} {sum(loss for _, loss in group) / len(group):.5g}" for group in groups)


def points_of(stage: dict) -> list[tuple[int, float]]:
    """The points of a stage's losses."""
    pairs = [point.split() for point in stage.get("loss", "").split(", ") if point]
    return [(int(step), float(loss)) for step, loss in pairs]


def write_card(folder: Path, story: Story, repo: str | None = None) -> None:
    """Writes README.md, and loss.png where matplotlib is installed and a stage has `DRAWN_STEPS`.

    Args:
        folder: whole but for the card: config, tokenizer, chat template.
        repo: `ORG/NAME` where it will lie on the hub.
    """
    marks = {"adapter": "adapter_config.json", "base": TRAINED}
    kind = next((name for name, file in marks.items() if (folder / file).exists()), "model")
    drawn = max((stage["steps"] for stage in story.stages), default=0) >= DRAWN_STEPS and find_spec("matplotlib")
    if drawn:
        draw_losses(story.stages, folder / CURVE)
    sections = {
        "Made of": made_of(story),
        "Data": data_table(story),
        "Recipe": stage_table(story, "recipe"),
        "Loss": f"![Loss of each stage]({CURVE})" if drawn else loss_tables(story),
        "Versions": stage_table(story, "versions"),
        "Scores": score_table(story.scores),
        "Use": usage(folder, repo or PLACE, kind),
        "Prompt": prompt(folder),
    }
    names = list(dict.fromkeys(part["name"].rpartition("/")[2] for part in story.parts))
    title = repo or f"LLaVA-NeXT{' of ' if names else ''}{' and '.join(names)}"
    text = "\n\n".join(f"## {name}\n\n{body}" for name, body in sections.items() if body)
    head = front_matter(story, "peft" if kind == "adapter" else "transformers", title)
    about = " ".join(BEGINNING.format(kind=KINDS[kind][0], how=KINDS[kind][1]).split())
    (folder / CARD).write_text(f"---\n{head}\n---\n\n# {title}\n\n{about}\n\n{text}\n", encoding="utf-8")


def add_scores(folder: Path, scores: dict[str, dict]) -> None:
    """Puts scores into the card that a folder has, in the place of those it had. Raises ValueError: it is not ours."""
    path, story = folder / CARD, read_story(folder)
    found = re.fullmatch(r"---\n.*?\n---\n(.*)", path.read_text(encoding="utf-8"), re.S) if path.exists() else None
    if not found or not re.search(r"^## Scores$", found[1], re.M):
        raise ValueError(f"{path} is no card of this project's: scores have no place in it")
    story.scores, metadata = scores, _metadata(folder)
    title = re.search(r"^# (.*)$", found[1], re.M)[1]
    head = front_matter(story, metadata["library_name"], title)
    table = f"## Scores\n\n{score_table(scores)}\n\n"
    body = re.sub(r"^## Scores\n.*?(?=^## )", lambda _: table, found[1], flags=re.S | re.M)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(f"---\n{head}\n---\n{body}", encoding="utf-8")
    os.replace(aside, path)


def front_matter(story: Story, library: str, title: str) -> str:
    """YAML of what the hub reads, and of what `read_story` does."""
    stated = [{key: part[key] for key in LICENCE if key in part} for part in story.parts]
    licences = [licence for number, licence in enumerate(stated) if licence and licence not in stated[:number]]
    results = [
        EvalResult(TASK, name, name, found.get("metric") or name, found["value"])
        for name, found in story.scores.items()
    ]
    more = licences[0] if len(licences) == 1 else {}
    data = ModelCardData(
        base_model=[part["name"] for part in story.parts if part.get("on_hub")] or None,
        pipeline_tag=TASK,
        library_name=library,
        datasets=story.datasets or None,
        model_name=title if results else None,
        eval_results=results or None,
        tags=["llava-next"],
        **more,
        parts=story.parts,
        stages=story.stages,
    )
    return data.to_yaml(line_break="\n")


def made_of(story: Story) -> str:
    """A table of the parts and their licences."""
    rows = [(part["role"], part["name"], licence_of(part)) for part in story.parts]
    text = table(("part", "name", "licence that it states"), rows)
    if len({row[2] for row in rows}) > 1:
        text += "\n\nThis card's licence is the one that the parts state, where those that state one agree."
    return text


def licence_of(part: dict) -> str:
    """A part's licence in a word."""
    return " ".join(part[key] for key in LICENCE if key in part) or "none"


def data_table(story: Story) -> str:
    """What each stage was trained on; `weight`: how often each sample was seen in an epoch."""
    rows = [
        (stage["title"], row["name"], f"{row['samples']:,}", f"{row['weight']:g}", f"`{row['index']}`")
        for stage in story.stages
        for row in stage["data"]
    ]
    return table(("stage", "source", "samples", "weight", "sha256 of its dataset.json"), rows) if rows else ""


def stage_table(story: Story, key: str) -> str:
    """A column for each stage, a row for each label."""
    if not story.stages:
        return ""
    labels = list(dict.fromkeys(label for stage in story.stages for label in stage[key]))
    rows = [(label, *(stage[key].get(label, "-") for stage in story.stages)) for label in labels]
    return table(("", *(stage["title"] for stage in story.stages)), rows)


def loss_tables(story: Story) -> str:
    """Losses as tables, one a stage."""
    tables = []
    for stage in story.stages:
        shown = [point.split() for point in thinned(points_of(stage), COLUMNS).split(", ") if point]
        if shown:
            steps, losses = zip(*shown, strict=True)
            tables.append(f"{stage['title']}\n\n" + table(("step", *steps), [("loss", *losses)]))
    return "\n\n".join(tables)


def draw_losses(stages: list[dict], path: Path) -> None:
    """A panel for each stage. The same losses give the same bytes."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures

    figure = Figure(figsize=(4.2 * len(stages), 3), layout="constrained", dpi=90)
    for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        axis.plot(*zip(*points_of(stage), strict=True), color="#0072B2")
        axis.set(title=stage["title"], xlabel="step", ylabel="loss")
        axis.grid(color="#e4e4e4")
    figure.savefig(path, format="png", metadata={"Software": None})


def score_table(scores: dict[str, dict]) -> str:
    """A row for each score."""
    if not scores:
        return "None yet."
    rows = []
    for name, found in scores.items():
        noise = f" ± {found['noise']:.2g}" if found.get("noise") else ""
        value, published = f"{found['value']:.4g}{noise}", found.get("published")
        published = published.get("value") if isinstance(published, dict) else published
        rows.append((name, found.get("metric") or "", value, found.get("samples") or "", published or "-"))
    return table(("benchmark", "metric", "score", "samples", "published"), rows)


def usage(folder: Path, place: str, kind: str) -> str:
    """How to load it."""
    base, over = {"model": (place, ""), "adapter": ("BASE", place), "base": (place, "ADAPTER")}[kind]
    adapter = f'model = PeftModel.from_pretrained(model, "{over}")\n' if over else ""
    imports = "from peft import PeftModel\n" if over else ""
    serve = f"vllm serve {base}"
    said, rank = "", "RANK"
    if kind == "adapter":
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        said = "`BASE` is the folder that `base_model_name_or_path` in `adapter_config.json` names.\n\n"
    elif kind == "base":
        said = (
            "`ADAPTER` is the folder that names this one as its base, `RANK` is `r` in its `adapter_config.json`.\n\n"
        )
    if over:
        serve += f" --enable-lora --max-lora-rank {rank} --lora-modules mine={over}"
    return f"""{said}```python
{imports}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto")
{adapter}processor = AutoProcessor.from_pretrained("{place}")
question = [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]
chat = processor.apply_chat_template([{{"role": "user", "content": question}}], add_generation_prompt=True)
inputs = processor(images=[Image.open("photo.jpg").convert("RGB")], text=chat, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

By vLLM:

    {serve}"""


def prompt(folder: Path) -> str:
    """What the saved chat template does: system prompt, end token."""
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    template = next(
        (t for t in TEMPLATES.values() if t.jinja == saved.get("chat_template") and not t.caption_only), None
    )
    if template is None:
        return "The saved chat template is the start model's own." if saved.get("chat_template") else ""
    lines = [f"The saved chat template (`{template.name}`) renders token for token what training saw."]
    if template.system:
        lines.append(
            f'It begins with the system prompt of the training, "{template.system}" A system message takes its place; '
            "an empty one leaves it out."
        )
    elif template.system_turn is None:
        lines.append("The format has no place for a system prompt.")
    lines.append(
        f"An answer ends with `{template.stop}`, the end token of tokenizer and generation config; decoding is greedy "
        "unless asked otherwise. Each `<image>` stands for one picture."
    )
    return " ".join(lines)


def table(head: Sequence, rows: Iterable[Sequence]) -> str:
    """Markdown."""
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])
