"""The plug-in in SGLang's scheduler and model runner: requests whose tokens are those of SGLang's own attention."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import engine


@pytest.fixture(scope="module", params=[1, 16, 128])
def served(request, model, tmp_path_factory):
    """What the scheduler made of the requests, in pages of so many tokens."""
    results = tmp_path_factory.mktemp("served") / "results.json"
    script = pathlib.Path(engine.__file__)
    ran = subprocess.run(
        [sys.executable, script, model, str(request.param), results],
        env={**os.environ, "PBSATTN_METHOD": "pbs:top_p=1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return request.param, json.loads(results.read_text())


@pytest.mark.parametrize("requests", engine.REQUESTS)
def test_tokens_are_those_of_its_own_attention(served, requests):
    _, told = served
    assert told["answers"]["pbs"][requests] == told["answers"]["torch_native"][requests]
    assert told["rows"][requests]


def test_chunks_and_prefixes_are_taken(served):
    page, told = served
    for layer in range(3):
        rows = {name: [each[1:] for each in of_name if each[0] == layer] for name, of_name in told["rows"].items()}
        assert rows["chunks"] == [[256, 256], [256, 512], [256, 768]], "the last chunk is too short"
        assert rows["prefix"] == [[250, 890]] and rows["whole"] == [[200, 200]]
    assert told["modes"] == ["DECODE", "EXTEND", "MIXED"] and told["mixed_calls"] > 0
    if page < 128:  # of larger pages the cache has fewer to grow into
        assert told["retractions"]["retracted"] > 0


def test_the_log_tells_what_is_taken(served):
    page, told = served
    pages = "gathered" if page < 16 else "in place"
    (line,) = told["log"]
    assert "SGLang 0.5.17: takes 3 of 3 layers (0 .. 2) by pbs:top_p=1, in prefills of 64 tokens or more" in line
    assert f"their pages {pages}" in line
