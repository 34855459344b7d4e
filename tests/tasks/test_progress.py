import io
import logging

from tasks import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use_terminal(monkeypatch):
    """Called within a test: pytest sets standard error anew between fixtures and the test."""
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    return shown


def test_a_terminal_sees_a_bar_with_amounts(monkeypatch):
    terminal = use_terminal(monkeypatch)
    with progress.track("merge r_tsvm", "bytes") as update:
        update(1_500_000, 3_000_000)
        progress._bars[0].display.refresh()
    assert "merge r_tsvm" in terminal.getvalue()
    assert "1.5 MB of 3.0 MB" in terminal.getvalue()


def test_several_steps_share_one_display(monkeypatch):
    terminal = use_terminal(monkeypatch)
    with progress.track("first") as first, progress.track("second") as second:
        first(1, 4)
        second(2, 5)
        assert len(progress._bars) == 1
        progress._bars[0].display.refresh()
    assert progress._bars == []
    assert "1 of 4" in terminal.getvalue()
    assert "2 of 5" in terminal.getvalue()


def test_elsewhere_there_are_plain_lines_with_an_estimate_and_not_too_many(monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "tripoise.progress"), progress.track("hash", "bytes") as update:
        for second in range(25):
            now = float(second)
            update(second * 1_000_000, 50_000_000)
    assert caplog.messages == [
        "hash: 10.0 MB of 50.0 MB, about 40 s left",
        "hash: 20.0 MB of 50.0 MB, about 30 s left",
    ]
