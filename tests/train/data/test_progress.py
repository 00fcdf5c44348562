from cp_gdn.train.data import progress
from cp_gdn.train.data.progress import Progress


def run(done):
    with Progress("counting", 4_000_000) as bar:
        for position in done:
            bar.to(position)


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    run([1_000_000, 4_000_000])
    told = capsys.readouterr().err
    assert "\r" in told and "counting: 100%" in told and "4.00M/4.00M" in told


def test_anything_else_gets_lines_now_and_then(capsys, monkeypatch):
    now = iter([0.0, 1.0, 31.0, 31.0, 40.0])  # a line resets the clock: two reads
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    run([1_000_000, 2_000_000, 3_000_000])
    assert capsys.readouterr().err.splitlines() == [
        "counting (4.0 MB)",
        "counting: 2.0 of 4.0 MB",
    ]
