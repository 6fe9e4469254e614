"""The report as one page: a single HTML file that opens from disk and asks the network for nothing.

All text of the data set is data: escaped here, or put into the embedded JSON, from which `report_page.js` takes it as
text and never as HTML. A content security policy inside the page forbids everything else.
"""

import html
import json
from pathlib import Path

HERE = Path(__file__).parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
MARKS = {"good": "✓", "fair": "!", "bad": "✕"}
_BAR_WIDTH, _CHART_HEIGHT, _CHART_WIDTH = 0.82, 96, 320


def render(report: dict) -> str:
    """The page of a report as made by inspect_shards.py."""
    sections = (
        _header(report),
        _figures(report["totals"], report["recipe"], report["exact"]),
        _problems(report),
        _charts(report),
        _sources(report["sources"]),
        _recipe(report["recipe"]),
        _browser(report["samples"], report["with_model"]),
    )
    style, script = ((HERE / f"report_page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(report['name'])}: data report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + '\n</main>\n<script type="application/json" id="report">'
        + embedded(report)
        + f"</script>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def embedded(report: dict) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(report, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(value) -> str:
    return html.escape(str(value))


def _header(report: dict) -> str:
    verdict = report["verdict"]
    read = "every sample was read" if report["is_verified"] else f"{report['read']:,} samples were read"
    return (
        f'<header>\n<p class="eyebrow">Data report</p>\n<h1>{_text(report["name"])}</h1>\n'
        f'<p class="where">{_text(report["url"])} · {read}</p>\n'
        f'<div class="verdict {verdict["level"]}" id="verdict"><span class="mark" aria-hidden="true">'
        f"{MARKS[verdict['level']]}</span><p>{_text(verdict['headline'])}</p></div>\n</header>"
    )


def _figures(totals: dict, recipe: dict, exact: bool) -> str:
    samples = max(totals["samples"], 1)
    about = "" if exact else "about "
    figures = (
        (f"{totals['samples']:,}", "samples", f"in {totals['shards']:,} shard{'s' * (totals['shards'] != 1)}"),
        (f"{totals['images']:,}", "pictures", f"{totals['tiles']:,} tiles"),
        (
            short(totals["tokens"]),
            "tokens",
            f"{about}{totals['tokens'] / samples:,.0f} a sample, "
            f"{100 * totals['image_tokens'] / max(totals['tokens'], 1):.0f} % from pictures",
        ),
        (_size(totals["bytes"]), "on disk", f"{totals['bytes'] / samples / 1e3:,.1f} kB a sample"),
        (f"{recipe['steps']:,}", "steps", _batches(recipe)),
    )
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd><dd class=more>{more}</dd></div>" for value, name, more in figures
    )
    return f'<dl class="figures">{cells}</dl>'


def short(count: float) -> str:
    """A number in three digits: 950, 12.3 k, 4.56 M, 1.20 G."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{letter}"
    return f"{count:,.0f}"


def _batches(recipe: dict) -> str:
    epochs = "one epoch" if recipe["epochs"] == 1 else f"{recipe['epochs']} epochs"
    return f"of {recipe['batch_size']} samples, {epochs}"


def _size(count: int) -> str:
    return f"{short(count)}B" if count >= 1000 else f"{count} B"


def _problems(report: dict) -> str:
    what = '<div class="what"><span><b>1 shard</b>: not as indexed</span></div>'
    cards = [f'<li class="problem fault">{what}<p>{_text(reason)}</p></li>' for reason in report["shards_wrong"]]
    for entry in report["problems"]:
        examples = "".join(
            f"<li><code>{_text(e['key'])}</code> (row {e['row']:,}): {_text(e['reason'])}</li>"
            for e in entry["examples"]
        )
        count = f"<b>{entry['count']:,} sample{'s' * (entry['count'] != 1)}</b>: {_text(entry['title'])}"
        cards.append(
            f'<li class="problem {entry["level"]}" data-kind="{entry["kind"]}"><div class="what"><span>{count}</span>'
            f'<button type="button" data-show="{entry["kind"]}">Show</button></div><p>{_text(entry["advice"])}</p>'
            f"<details><summary>Examples</summary><ul>{examples}</ul></details></li>"
        )
    notes = "".join(f"<li>{_text(note)}</li>" for note in report["notes"])
    problems = f'<ul class="problems">{"".join(cards)}</ul>' if cards else ""
    return (
        f'<section><h2>{"What to look at" if cards else "Notes"}</h2>{problems}<ul class="notes">{notes}</ul></section>'
    )


def _charts(report: dict) -> str:
    limit = report["recipe"].get("max_length")
    charts = "".join(chart(h, limit if number == 0 else None) for number, h in enumerate(report["histograms"]))
    return f"<section><h2>Distributions</h2><div class=charts>{charts}{_grids(report['grids'])}</div></section>"


def chart(histogram: dict, limit: int | None = None) -> str:
    """A histogram as SVG; `limit` is marked when it lies inside."""
    counts, start, width = histogram["counts"], histogram["start"], histogram["width"]
    head = f"<figcaption><b>{_text(histogram['title'])}</b></figcaption>"
    if not counts:
        return f"<figure class=chart>{head}<p class=empty>none</p></figure>"
    bar, most, marks = _CHART_WIDTH / len(counts), max(counts), []
    for place, count in enumerate(counts):
        low = start + place * width
        values = f"{low:,}" if width == 1 else f"{low:,}–{low + width - 1:,}"
        if place == len(counts) - 1 and histogram["is_open"]:
            values = f"{low:,} and more"
        height = max(count / most * _CHART_HEIGHT, 1.5 if count else 0)
        marks.append(
            f'<g><rect class="catch" x="{place * bar:.2f}" y="0" width="{bar:.2f}" height="{_CHART_HEIGHT}"/>'
            f'<rect class="bar" x="{place * bar + bar * (1 - _BAR_WIDTH) / 2:.2f}" y="{_CHART_HEIGHT - height:.2f}" '
            f'width="{bar * _BAR_WIDTH:.2f}" height="{height:.2f}"/>'
            f"<title>{values} {_text(histogram['unit'])}: {count:,}</title></g>"
        )
    if limit is not None and start < limit < start + width * len(counts):
        x = (limit - start) / width * bar
        line = f'<line class="limit" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{_CHART_HEIGHT}">'
        marks.append(f"{line}<title>cut at {limit:,}</title></line>")
    end = start + width * len(counts) - (1 if width == 1 else 0)
    stats = (
        f"median {histogram['median']:,.0f} · mean {histogram['mean']:,.1f} · most {histogram['most']:,} "
        f"{histogram['unit']}"
    )
    return (
        f'<figure class="chart">{head}<svg viewBox="0 0 {_CHART_WIDTH} {_CHART_HEIGHT + 1}" preserveAspectRatio="none" '
        f'role="img" aria-label="{_text(histogram["title"])}">{"".join(marks)}</svg>'
        f'<div class="axis"><span>{start:,}</span><span>{end:,}{"+" if histogram["is_open"] else ""}</span></div>'
        f"<p>{_text(stats)}</p></figure>"
    )


def _grids(grids: list[dict]) -> str:
    if not grids:
        return ""
    most, rows = max(entry["count"] for entry in grids), []
    for entry in grids[:8]:
        r, c = entry["rows"], entry["cols"]
        cells = "".join(
            f'<rect x="{x * 8 + 0.5}" y="{y * 8 + 0.5}" width="7" height="7" rx="1"/>'
            for y in range(min(r, 6))
            for x in range(min(c, 6))
        )
        rows.append(
            f'<li><svg class="grid" viewBox="0 0 {8 * min(max(c, 1), 6)} {8 * min(max(r, 1), 6)}">{cells}</svg>'
            f"<span>{f'{r} × {c}' if r * c else 'base only'}</span><span class=meter><i style='width:"
            f"{100 * entry['count'] / most:.1f}%'></i></span><span class=n>{entry['count']:,}</span></li>"
        )
    return (
        "<figure class=chart><figcaption><b>Grid of a picture</b></figcaption><ul class=grids>"
        f"{''.join(rows)}</ul><p>rows × columns of tiles, besides the base tile</p></figure>"
    )


def _sources(sources: list[dict]) -> str:
    samples = sum(entry["samples"] for entry in sources)
    tokens = max(sum(entry["tokens"] for entry in sources), 1)
    columns = {
        "samples": lambda s: f"{s['samples']:,}",
        "share": lambda s: f"{100 * s['samples'] / samples:.1f} %",
        "pictures": lambda s: f"{s['images']:,}",
        "tiles each": lambda s: f"{s['tiles'] / s['samples']:.1f}",
        "tokens each": lambda s: f"{s['tokens'] / s['samples']:,.0f}",
        "of all tokens": lambda s: f"{100 * s['tokens'] / tokens:.1f} %",
        "messages each": lambda s: f"{s['turns'] / s['samples']:.1f}",
        "size": lambda s: _size(s["bytes"]),
    }
    heads = "".join(f"<th scope=col>{name}</th>" for name in ("source", *columns))
    rows = ""
    for source in sources:
        cells = "".join(f"<td>{show(source)}</td>" for show in columns.values())
        rows += f'<tr><th scope=row title="{_text(source["name"])}">{_text(source["name"])}</th>{cells}</tr>'
    return (
        f"<section><h2>Sources</h2><div class=scroll><table id=sources><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _recipe(recipe: dict) -> str:
    if "ranks" not in recipe:
        return ""
    lengths = "exact lengths" if recipe["exact"] else "lengths estimated from the index"

    def row(name: str, value: str, share: float | None = None) -> str:
        meter = "" if share is None else f"<span class=meter><i style='width:{100 * share:.1f}%'></i></span>"
        return f"<div><dt>{name}</dt><dd>{value}{meter}</dd></div>"

    rows = (
        row("steps", f"{recipe['steps']:,} {_batches(recipe)}"),
        row("micro-batches a step", f"{recipe['micro_batches']:.1f} on each of {recipe['ranks']} ranks"),
        row("filled", f"{100 * recipe['fill']:.1f} % of {recipe['token_budget']:,} tokens", recipe["fill"]),
        row("balance", f"{100 * recipe['balance']:.1f} % (mean over slowest rank)", recipe["balance"]),
        row(
            "largest micro-batch",
            f"{recipe['most_tokens']:,} tokens, {recipe['most_tiles']} tiles of {recipe['tile_budget']}",
        ),
        row("maximum length", f"{recipe['max_length']:,} tokens"),
    )
    return (
        f"<section><h2>In training</h2><p class=lead>Template {_text(recipe['template'])}; the first "
        f"{recipe['dealt_steps']} steps dealt, with {lengths}.</p><dl class=recipe>{''.join(rows)}</dl></section>"
    )


def _browser(samples: list[dict], with_model: bool) -> str:
    seen = "what the model sees" if with_model else "pictures as the model sees them, texts as stored"
    return (
        f"<section id=browser><h2>Samples</h2><p class=lead>{len(samples)} samples, {seen}; those with problems first. "
        "<span class=keys><kbd>←</kbd> <kbd>→</kbd> next, <kbd>/</kbd> search</span></p>\n"
        "<div class=filters><label>Source <select id=source></select></label>"
        "<label>Problem <select id=problem></select></label>"
        "<label>Find <input id=search type=search placeholder='id, key or row' autocomplete=off></label>"
        "<span id=matches role=status></span></div>\n<div class=split><nav id=list aria-label='Samples'></nav>"
        "<article id=sample tabindex=-1></article></div>\n<div class=pager><button type=button id=previous>← Previous"
        "</button><span id=place></span><button type=button id=next>Next →</button></div></section>"
    )
