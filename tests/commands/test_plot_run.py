"""Plotting a run: repeated steps count once, half lines not at all; panels show what they say."""

import json
import sys

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import plot_run
from llava_next.model.folders.card import thinned
from llava_next.training.watch.metrics import JsonLines


def write_run(folder, steps, sources=("coco", "gqa"), shift=0.0):
    """A run folder whose loss is 10 / step + shift."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        for step in steps:
            record = {
                "step": step,
                "loss": 10 / step + shift,
                "grad_norm": 1.0,
                "tokens_per_s": 1000.0 + step,
                "rates": {"llm": 2e-5, "projector": 2e-5, "vision": 2e-6},
                "source_loss": {name: 10 / step + number for number, name in enumerate(sources)},
            }
            file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_steps_done_twice_count_once_as_done_last_and_half_lines_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", range(1, 9))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed while writing, then resumed from step 5 on the same line
    write_run(run, range(6, 12), shift=0.5)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "loss": 1')
    read = plot_run.read_run(run, "run")
    # step 6 after the crash shares its line with the half one: the first try's stands for it
    assert read.steps.tolist() == list(range(1, 12)) and read.unreadable == 2
    expected = [10 / s + (0.5 if s > 6 else 0) for s in range(1, 12)]
    np.testing.assert_allclose(read.values["loss"], expected, rtol=1e-12)
    assert read.values["rates/vision"].tolist() == [2e-6] * 11


def test_numbers_that_a_step_lacks_or_that_are_not_finite_leave_gaps(tmp_path):
    (tmp_path / "run").mkdir()
    lines = [
        '{"step": 1, "loss": 2.0, "mfu": 0.4}',
        '{"step": 2, "loss": NaN}',
        '{"step": 3, "loss": 1.0, "source_loss": {"a": 1}}',
    ]
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(lines))
    run = plot_run.read_run(tmp_path / "run", "run")
    np.testing.assert_array_equal(run.values["loss"], [2.0, np.nan, 1.0])
    np.testing.assert_array_equal(run.values["source_loss/a"], [np.nan, np.nan, 1.0])
    assert np.isfinite(plot_run.smooth(run.values["loss"], 5)).all()
    plot_run.draw([run])


def test_steps_whose_loss_was_not_finite_are_marked_and_named(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", range(1, 9))
    log = JsonLines(run / "metrics.jsonl")
    for step, loss in ((4, float("nan")), (6, float("inf"))):
        log.write({"step": step, "loss": loss, "grad_norm": float("inf"), "source_loss": {"coco": loss}})
    log.close()
    (run / "validation.jsonl").write_text('{"step": 4, "loss/all": null}\n{"step": 8, "loss/all": 1.5}\n')
    read = plot_run.read_run(run, "run")
    assert read.broken_steps().tolist() == [4, 6] and read.unreadable == 0
    lines = drawn(plot_run.draw([read], window=1).axes[0])
    assert lines["run, not finite"][0].tolist() == [4, 6]
    np.testing.assert_array_equal(lines["run, held out"][1], [np.nan, 1.5])
    np.testing.assert_array_equal(np.isnan(read.values["source_loss/coco"]), np.isin(read.steps, [4, 6]))
    sound = plot_run.read_run(write_run(tmp_path / "sound", [1]), "run")
    assert set(drawn(plot_run.draw([sound]).axes[0])) == {"run"}
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(run), "--out", str(tmp_path / "plot.png")])
    plot_run.main()
    assert "; loss not finite in 2 steps" in capsys.readouterr().out


def test_scores_are_drawn_at_their_steps_in_a_panel_of_their_own(tmp_path):
    run = write_run(tmp_path, range(1, 31))
    both = {"mine": {"value": 0.5, "noise": 0.1}, "mme": {"value": 1500.0, "noise": None}}
    for step, scores in ((10, {}), (20, both), (10, {"mine": {"value": 0.4, "noise": 0.1}})):  # 10 failed at first
        JsonLines(run / "metrics.jsonl").write({"step": step, "scores": scores})
    read = plot_run.read_run(run, "run")
    assert read.steps.tolist() == list(range(1, 31)) and np.isfinite(read.values["loss"]).all()
    *_, panel, right = plot_run.draw([read]).axes
    assert panel.get_title(loc="left").startswith("Scores")
    for axis, name, points in ((panel, "mine", [(10, 40), (20, 50)]), (right, "mme", [(20, 1500)])):
        (drawn,) = axis.containers
        assert drawn.get_label() == name and list(zip(*drawn[0].get_data(), strict=True)) == points
    assert [segment[:, 1].tolist() for segment in panel.containers[0][2][0].get_segments()] == [[20, 60], [30, 70]]


def test_a_run_of_nothing_but_broken_steps_is_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": null}\n')
    read = plot_run.read_run(tmp_path, "run")
    plot_run.draw([read]).savefig(tmp_path / "plot.png")
    assert read.broken_steps().tolist() == [1, 2] and np.isnan(read.values["loss"]).all()


def test_smoothing_keeps_a_constant_and_starts_without_bias():
    np.testing.assert_allclose(plot_run.smooth(np.full(50, 3.0), 20), 3.0, rtol=1e-12)
    values = np.array([4.0, 0.0, 0.0])
    # window 3: the newest weighs half
    np.testing.assert_allclose(plot_run.smooth(values, 3), [4.0, 1 / 0.75, 0.5 / 0.875], rtol=1e-12)
    assert plot_run.smooth(values, 1).tolist() == values.tolist()


def drawn(axis) -> dict[str, tuple]:
    """Label -> (x, y, colour) of the labelled lines of a panel."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): (line.get_xdata(), line.get_ydata(), line.get_color()) for line in lines}


def test_several_runs_have_a_colour_each_and_sources_a_panel(tmp_path):
    write_run(tmp_path / "a/run", range(1, 41))
    write_run(tmp_path / "b/run", range(1, 21))
    (tmp_path / "a/run/validation.jsonl").write_text('{"step": 20, "loss/all": 1.25, "loss/coco": 1.0}\n')
    folders = [tmp_path / "a/run", tmp_path / "b/run"]
    names = plot_run.labels(folders)
    assert names == ["a/run", "b/run"]
    figure = plot_run.draw([plot_run.read_run(f, n) for f, n in zip(folders, names, strict=True)], window=1)
    loss, sources, speed, rates = figure.axes
    lines = drawn(loss)
    assert set(lines) == {"a/run", "a/run, held out", "b/run"} and lines["a/run"][2] != lines["b/run"][2]
    np.testing.assert_allclose(lines["b/run"][1], 10 / np.arange(1, 21))
    assert (lines["a/run, held out"][0], lines["a/run, held out"][1]) == ([20], [1.25])
    assert set(drawn(sources)) == {f"{run}: {source}" for run in names for source in ("coco", "gqa")}
    assert "a/run: median 1,020" in drawn(speed)
    # modules with one rate share a line
    assert set(drawn(rates)) == {f"{run}: {m}" for run in names for m in ("llm, projector", "vision")}
    again = plot_run.read_run(folders[0], "again")  # and runs, where it is the same in all their steps
    shared = drawn(plot_run.draw([plot_run.read_run(folders[0], "one"), again]).axes[3])
    assert set(shared) == {"one and 1 more: llm, projector", "one and 1 more: vision"}


@pytest.mark.parametrize("count", [1, 7])
def test_gradient_norm_takes_the_panel_when_there_is_one_source_or_too_many(tmp_path, count):
    run = plot_run.read_run(write_run(tmp_path / "run", range(1, 9), [f"s{n}" for n in range(count)]), "run")
    assert plot_run.draw([run]).axes[1].get_title(loc="left") == "Gradient norm"


def test_one_spike_does_not_flatten_the_loss(tmp_path):
    run = write_run(tmp_path / "run", range(1, 2001))
    write_run(run, [1000], shift=500.0)
    assert plot_run.draw([plot_run.read_run(run, "run")]).axes[0].get_ylim()[1] < 20


def test_command_writes_a_picture_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    run, out = write_run(tmp_path / "run", range(1, 101)), tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(run), "--out", str(out)])
    plot_run.main()
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape[0] > 900 and picture.shape[1] > 1500 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert "run: steps 1 to 100" in capsys.readouterr().out and [p.name for p in tmp_path.glob(".*")] == []
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(tmp_path / "nothing"), "--out", str(out)])
    with pytest.raises(SystemExit, match=r"nothing has no metrics.jsonl"):
        plot_run.main()
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(run), "--out", str(tmp_path / "plot.webp")])
    plot_run.main()
    assert Image.open(tmp_path / "plot.webp").format == "WEBP"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(run), "--out", str(tmp_path / "plot.txt")])
    with pytest.raises(SystemExit):
        plot_run.main()
    assert "ends in .png or .webp" in capsys.readouterr().err


def test_runs_of_a_ledger_are_a_table_and_a_picture_of_losses_and_scores(tmp_path, monkeypatch, capsys):
    line = {
        **{"title": "stage 2", "date": "2026-01-02", "steps": 40, "hours": 0.05, "code": "0123", "result": "r"},
        "data": [{"name": "train", "samples": 16000}],
        "hardware": {"name": "2 CPU process(es)"},
        "loss": thinned([(step, 4 / step) for step in range(1, 41)]),
    }
    scores = {"exact": {"value": 0.91, "metric": "exact match", "samples": 500, "noise": 0.0128}}
    lines = [{**line, "name": "digits", "scores": scores}, {**line, "name": "vicuna-7b", "scores": {}, "loss": ""}]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss, places = plot_run.draw_ledger(lines).axes
    assert [drawn.get_label() for drawn in loss.get_lines()] == ["digits, stage 2, 2026-01-02"]
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), [4 / s for s in range(1, 41)], rtol=1e-4)
    assert [text.get_text() for text in places.get_xticklabels()] == ["exact"]
    given = ["plot_run.py", "--ledger", str(tmp_path / "ledger.jsonl"), "--out", str(tmp_path / "out.png")]
    monkeypatch.setattr(sys, "argv", given)
    plot_run.main()
    rows = capsys.readouterr().out.splitlines()
    assert Image.open(tmp_path / "out.png").width > 1000 and rows[0].startswith("| run | date | data |")
    assert rows[2:4] == [
        "| digits, stage 2 | 2026-01-02 | train 16,000 | 40 | 2 CPU process(es) | 0.05 | 0.1 | 0.91 ± 0.013 | 0123 |",
        "| vicuna-7b, stage 2 | 2026-01-02 | train 16,000 | 40 | 2 CPU process(es) | 0.05 |  | - | 0123 |",
    ]
    for words in ([], ["run", "--ledger", "x"]):
        monkeypatch.setattr(sys, "argv", ["plot_run.py", *words])
        with pytest.raises(SystemExit):
            plot_run.main()
    assert "give run folders, or --ledger" in capsys.readouterr().err
