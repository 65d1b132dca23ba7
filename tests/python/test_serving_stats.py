"""What a server's plug-in logs of rows that it computed."""

import logging
import types

from pbsattn.serving.rows import Row
from pbsattn.serving.stats import Recorder

A, B = Row(0, 0, 300, 300), Row(1, 300, 500, 900)


def stats(visited, seconds=0.002):
    return types.SimpleNamespace(visited_blocks=visited, causal_blocks=100, seconds=seconds)


def test_rows_are_told_when_the_last_layer_has_them(caplog):
    recorder = Recorder(logging.getLogger("pbsattn"))
    recorder.last_layer = 2
    with caplog.at_level(logging.INFO, "pbsattn"):
        for layer in (0, 2):
            assert caplog.messages == []
            recorder.add(A, layer, stats(20))
            recorder.add(B, layer, stats(40 + layer))
    start = "pbsattn: row of 200 tokens over 900: density 0.410, 4.0 ms of attention; "
    assert caplog.messages[1] == f"{start}layer density ms: 0 0.400 2.00, 2 0.420 2.00"
    assert "row of 300 tokens over 300: density 0.200" in caplog.messages[0] and len(caplog.messages) == 2


def test_rows_that_the_last_layer_left_are_told_in_the_next_step(caplog):
    recorder = Recorder(logging.getLogger("pbsattn"))
    recorder.last_layer = 1
    with caplog.at_level(logging.INFO, "pbsattn"):
        for row in (A, B, A):
            recorder.add(row, 0, stats(90))
            if row is A:
                recorder.add(row, 1, stats(10))
        recorder.add(B, 0, stats(20))
        recorder.add(B, 1, stats(20))
        assert len(caplog.messages) == 4
        for _ in range(2):  # the same row at the first layer alone
            assert len(caplog.messages) == 4
            recorder.add(A, 0, stats(30))
        recorder.add(A, 1, stats(40))
    density = [line.split("density ")[1].split(",")[0] for line in caplog.messages]
    assert density == ["0.500", "0.500", "0.900", "0.200", "0.300", "0.350"]
    assert caplog.messages[2].startswith("pbsattn: row of 200 tokens") and caplog.messages[2].endswith(": 0 0.900 2.00")
