"""`hici report` of training runs: from their logs, drawn and summed up. (Results: tests/report.)"""

import json
import shutil

import pytest

from hici.report.runs import read_run
from hici.report.training import plot_training, smoothed, smoothing_window, training_figure


def entries(steps=40, method="hici", visibility="all", resumed=(), ended=True):
    """What a run logs: the loss falls from 4 to 2, and the numbers are easy."""
    hici = method == "hici"
    yield {"event": "start", "step": 0, "method": method, "visibility": visibility if hici else None,
           "leaks_future": {"hici": hici and visibility != "past", "full": False},
           "clips": {"hici": 0.3, "other": None}, "total_steps": 40, "context_length": 64}  # fmt: skip
    yield {"event": "heldout", "step": 0, "losses": {"full": 4.5, **({"hici": 5.0} if hici else {})}}
    for i in range(1, steps + 1):
        entry = {"step": i, "loss": 4 - i / 20, "other_grad_norm": 2 / i, "learning_rate": 2e-5, "tokens": 100 * i,
                 "seconds": 0.5, "tokens_per_second": 200.0 * i, "peak_memory_bytes": 2**30}  # fmt: skip
        yield entry | ({"hici_grad_norm": 1 / i, "hici_learning_rate": 2e-4} if hici else {})
        if i in resumed:
            yield {"event": "resume", "step": i}
    if ended:
        yield {"event": "heldout", "step": steps, "losses": {"full": 2.25, **({"hici": 2.125} if hici else {})}}
        yield {"event": "end", "step": steps, "seconds": steps / 2}


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", **options):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        (directory / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries(**options)))
        return directory

    return make


@pytest.fixture
def drawn(monkeypatch):
    """Wide figures that the command draws, to look inside; no time goes into their pixels."""
    figures = []
    from hici.report.sections import training

    def draw(runs, *, narrow):
        figure = training_figure(runs, narrow=narrow)
        if not narrow:
            figures.append(figure)
        return figure

    monkeypatch.setattr(training, "training_figure", draw)
    monkeypatch.setattr("hici.report.write.png_bytes", lambda figure, narrow=False: bytes(24))
    return figures


def panels(figure):
    return dict(zip(("loss", "hici_norm", "other_norm", "rate", "speed", "memory"), figure.axes, strict=True))


def facts(out):
    """{name: value} of the table that is printed."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return {name: values[0] if len(values) == 1 else values for name, *values in rows}


def test_one_run(make_run, hici_command):
    run = make_run(resumed=(20,))
    done = hici_command("report", run)
    assert (done.status, done.err) == (0, "")
    assert (run / "report" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert facts(done.out) == {
        "method": "hici, visibility all (not causal)",
        "steps done": "40 of 40",
        "resumed at step": "20",
        "last loss": "2.0000",
        "mean loss at the end": "2.1000 (5 steps)",
        "tokens a second": "4,100",  # of all tokens and all seconds, not a mean of speeds
        "seconds a step": "0.50",
        "peak memory": "1.00 GiB",
        "held-out, full attention": "4.5000 (step 0) -> 2.2500 (step 40)",
        "held-out, hici attention (not causal: visibility all)": "5.0000 (step 0) -> 2.1250 (step 40)",
    }
    assert (
        "not causal: with this visibility a token's loss in hici attention, in training too, sees its future"
        in done.out
    )
    assert f"report: {run / 'report' / 'index.html'}" in done.out
    page = (run / "report" / "index.html").read_text()
    assert "held-out, hici attention (not causal: visibility all)" in page
    assert "4.5000 (step 0) -&gt; 2.2500 (step 40)" in page
    assert hici_command("report", run).status == 0  # its own report is drawn anew


def test_a_run_that_goes_on(make_run, hici_command, drawn):
    run = make_run(steps=12, visibility="past", ended=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    done = hici_command("report", run, "--out", run.parent / "other" / "now")
    assert done.status == 0, done.err
    assert (run.parent / "other" / "now" / "training.png").is_file()
    assert not (run / "report").exists()
    assert facts(done.out)["steps done"] == "12 of 40 (goes on, or was stopped)"
    assert facts(done.out)["held-out, hici attention"] == "5.0000"
    assert "not causal" not in done.out


def test_several_runs_are_laid_over_one_another(make_run, hici_command, drawn, tmp_path):
    runs = [make_run("one/hici"), make_run("two/hici", visibility="past"), make_run("full", method="full", steps=30)]
    done = hici_command("report", *runs, "--out", tmp_path / "all")
    assert done.status == 0, done.err
    table = facts(done.out)
    assert table["method"] == ["hici, visibility all (not causal)", "hici, visibility past", "full"]
    assert table["steps done"] == ["40 of 40", "40 of 40", "30 of 40"]
    assert table["held-out, hici attention"] == ["-", "5.0000 (step 0) -> 2.1250 (step 40)", "-"]
    axes = panels(drawn[0])
    labels = [text.get_text() for text in axes["loss"].get_legend().get_texts()]
    assert labels[:3] == ["one/hici (training loss not causal)", "two/hici", f"{tmp_path.name}/full"]
    lines = [line for line in axes["loss"].lines if line.get_label() in labels[:3]]
    assert len({line.get_color() for line in lines}) == len({line.get_linestyle() for line in lines}) == 3
    assert sum(len(line.get_xdata()) == 40 for line in axes["hici_norm"].lines) == 4  # two runs, raw and smoothed


def test_what_is_drawn(make_run):
    axes = panels(training_figure([read_run(make_run(resumed=(20, 30)))]))
    lines = {line.get_label(): line for line in axes["loss"].lines}
    assert list(lines["training"].get_ydata()) == [4 - i / 20 for i in range(1, 41)]
    mean = lines["training, mean of 5 steps"].get_ydata()
    assert mean[20] == pytest.approx(4 - 21 / 20)
    leaking = "held-out, hici attention (not causal: visibility all)"
    assert lines["held-out, full attention"].get_markerfacecolor() != "white"
    assert lines[leaking].get_markerfacecolor() == "white"
    points = [list(zip(*line.get_data(), strict=True)) for line in axes["loss"].lines]
    assert [(0, 4.5), (40, 2.25)] in points
    assert [(0, 5.0), (40, 2.125)] in points
    for axis in axes.values():
        assert [line.get_xdata()[0] for line in axis.lines if list(line.get_ydata()) == [0, 1]] == [20, 30]
    assert [line.get_label() for line in axes["hici_norm"].lines if list(line.get_ydata()) == [0.3, 0.3]] == [
        "clip 0.3"
    ]
    assert axes["other_norm"].get_legend() is None  # no clip
    rates = {line.get_label(): line.get_ydata()[0] for line in axes["rate"].lines if len(line.get_xdata()) == 40}
    assert rates == {"HiCI modules": 2e-4, "the rest": 2e-5}
    assert list(axes["memory"].lines[0].get_ydata()) == [1.0] * 40
    assert list(axes["speed"].lines[0].get_ydata()) == [200.0 * i for i in range(1, 41)]
    assert all(text.get_fontsize() >= 10 for axis in axes.values() for text in axis.get_xticklabels())


def test_narrow(make_run, tmp_path):
    runs = [read_run(make_run())]
    wide, narrow = (training_figure(runs, narrow=each) for each in (False, True))
    assert narrow.get_figwidth() < 5 < 10 < wide.get_figwidth()
    for name, axis in panels(narrow).items():
        assert [list(line.get_ydata()) for line in axis.lines] == [
            list(line.get_ydata()) for line in panels(wide)[name].lines]  # fmt: skip
    assert panels(narrow)["loss"].get_legend() is None  # it would hide the losses
    assert [text.get_text() for text in narrow.legends[0].get_texts()] == [
        text.get_text() for text in panels(wide)["loss"].get_legend().get_texts()]  # fmt: skip
    assert plot_training(runs, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_recorded_is_said(make_run):
    axes = panels(training_figure([read_run(make_run(method="full"))]))
    assert [name for name, axis in axes.items() if any(t.get_text() == "not recorded" for t in axis.texts)] == [
        "hici_norm"
    ]


def test_numbers_that_are_null_are_passed_over(make_run, hici_command, drawn):
    run = make_run(steps=3)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    broken = [json.loads(line) | {"loss": None} if '"step": 2' in line else json.loads(line) for line in lines]
    broken += [{"event": "heldout", "step": 3, "losses": {"full": None}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in broken))
    done = hici_command("report", run)
    assert done.status == 0, done.err
    assert list(panels(drawn[0])["loss"].lines[0].get_xdata()) == [1, 3]
    assert facts(done.out)["held-out, full attention"].endswith("2.2500 (step 3)")


def test_a_loss_measured_again_after_a_resume_counts_once(make_run):
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "heldout", "step": 40, "losses": {"full": 2.0}}) + "\n")
    assert read_run(run).heldout["full"] == [(0, 4.5), (40, 2.0)]


def test_train_json_alone(make_run, hici_command, drawn):
    """As runs before metrics.jsonl left it."""
    run = make_run()
    steps = [entry for entry in entries() if "event" not in entry]
    for entry in steps:
        del entry["tokens"], entry["seconds"], entry["tokens_per_second"], entry["peak_memory_bytes"]
    result = {
        "recipe": {"hici_max_grad_norm": 0.3, "max_grad_norm": 1.0, "max_steps": 40},
        "attention": "hici",
        "visibility": "all",
        "leaks_future": {"hici": True, "full": False},
        "steps": steps,
        "heldout_loss": {"before": {"hici": 5.0, "full": 4.5}, "after": {"hici": 2.125, "full": 2.25}},
    }
    expected = read_run(run)
    (run / "metrics.jsonl").unlink()
    (run / "train.json").write_text(json.dumps(result))
    done = hici_command("report", run)
    assert done.status == 0, done.err
    again = read_run(run)
    assert (again.heldout, again.leaks_future, again.method, again.visibility, again.total_steps, again.ended) == (
        expected.heldout, expected.leaks_future, "hici", "all", 40, True)  # fmt: skip
    assert again.clips == {"hici": 0.3, "other": 1.0}
    assert "tokens a second" not in facts(done.out)


def test_one_step_shows_something(make_run):
    assert panels(training_figure([read_run(make_run(steps=1))]))["loss"].lines[0].get_marker() == "."


@pytest.mark.parametrize("name", ["_hidden", "a$b$c"])
def test_names_that_matplotlib_would_read_otherwise(make_run, name, hici_command, tmp_path, drawn):
    done = hici_command("report", make_run(name), make_run("plain"), "--out", tmp_path / "x")
    assert done.status == 0, done.err
    text = panels(drawn[0])["loss"].get_legend().get_texts()[0].get_text()
    assert text.strip().replace("\\", "") == f"{name} (training loss not causal)"
    training_figure([read_run(tmp_path / name)]).draw_without_rendering()


def test_smoothing_is_a_mean_around_each_step():
    assert smoothed([1.0, 2.0, 3.0, 10.0], 3) == [1.5, 2.0, 5.0, 6.5]
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    assert smoothed([4.0] * 7, 5) == [4.0] * 7
    assert [smoothing_window(n) for n in (1, 9, 10, 1000)] == [1, 1, 5, 40]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gone"], "gone does not exist; give a result's JSON, a directory with results, or the output_dir"),
        (["file", "--out", "x"], "file is not valid JSON"),
        (["file"], "file is a file, so there is no directory for the report yet; give --out DIR"),
        (["empty"], "empty holds no result, no training comparison, and neither metrics.jsonl nor train.json"),
        (["fresh"], "the run in fresh has no optimizer step yet"),
        (["nothing"], "the run in nothing has no optimizer step yet"),
        (["foreign"], "foreign/train.json has no list of steps, so `hici train` did not write it"),
        (["broken"], "broken/metrics.jsonl, line 2 is not JSON"),
        (["run", "run", "--out", "x"], "run is given twice; give each result and each run once"),
        (["run", "./run", "--out", "x"], "run is given twice; give each result and each run once"),
        (["run", "other"], "2 results have no one place for the report; give --out DIR"),
        (["run", "--out", "there"], "there holds no .hici-report.json, so it is no directory of this kind"),
        (["run", "--out", "there", "--overwrite"], "there holds no .hici-report.json"),
        (["run", "--out", "file"], "file is a file, but a directory is to be written there"),
        (["run", "--out", "file/x"], "nothing can be written in"),
        (["run", "--out", "run"], "run is or holds run, which is read"),
    ],
    ids=str,
)
def test_bad_input(arguments, message, make_run, hici_command, tmp_path, monkeypatch):
    make_run("run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for name in ("empty", "fresh", "nothing", "foreign", "broken", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "there" / "index.html").write_text("precious")
    (tmp_path / "nothing" / "metrics.jsonl").write_text("")
    (tmp_path / "fresh" / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n')
    (tmp_path / "foreign" / "train.json").write_text('{"loss": 1.0}')
    (tmp_path / "broken" / "metrics.jsonl").write_text('{"step": 1}\nwhat?\n{"step": 2}\n')
    monkeypatch.chdir(tmp_path)
    done = hici_command("report", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert (tmp_path / "there" / "index.html").read_text() == "precious"
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "lines, expected",
    [
        ('{"step": 1, "loss": null}\n', 0),  # every loss of the run was no number
        ('{"step": 1, "loss": 2.0, "tokens": "x", "seconds": 1}\n', 0),
        ('{"event": "heldout", "step": 1, "losses": 5}\n{"step": 1, "loss": 1.0}\n', "line 1 has losses 5, but it is"),
    ],
    ids=["no-loss", "text", "losses"],
)
def test_odd_entries_are_drawn_or_named(hici_command, tmp_path, lines, expected):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    done = hici_command("report", tmp_path / "run")
    if expected == 0:
        assert (done.status, done.err) == (0, "")
        assert facts(done.out)["steps done"].startswith("1")
        assert "tokens a second" not in done.out
    else:
        assert done.status == 2
        assert expected in done.err
