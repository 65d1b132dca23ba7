"""One of transformers' classes for each way to attend, by the model sweep (tests/models), each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from conftest import SWEEP

transformers = pytest.importorskip("transformers", reason="an optional dependency; ./dev test installs it")

import cases  # noqa: E402
import forks  # noqa: E402
import table  # noqa: E402
import trial  # noqa: E402


class Answers:
    """Starts the sweep of the classes to test, and reads its answers as they come."""

    def __init__(self, names):
        # It is about which calls are whose, in f32, whatever path the environment forces.
        self.process = subprocess.Popen(
            [sys.executable, str(SWEEP), "--json", "-", *names],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PBSATTN_CPU_PATH": ""},
        )
        self.come = {}

    def __getitem__(self, name):
        while name not in self.come:
            line = self.process.stdout.readline()
            assert line, f"the sweep ended with {self.process.wait()} before it came to {name}"
            answer = json.loads(line)
            self.come[answer["name"]] = answer
        return self.come[name]


@pytest.fixture(scope="module")
def answers(request):
    names = [
        item.callspec.params["name"] for item in request.session.items if "answers" in getattr(item, "fixturenames", ())
    ]
    answers = Answers(names)
    yield answers
    answers.process.terminate()
    answers.process.communicate()


@pytest.mark.parametrize("name", cases.FAMILIES)
def test_logits_are_the_models_own(answers, name):
    answer = answers[name]
    assert table.untested(answer) is None, answer.get("said")
    assert table.faults(answer) == {}, table.line(answer)


@pytest.mark.parametrize("name", cases.CARRYING)
def test_what_layers_carry_is_taken_in_every_layer(answers, name):
    assert name in cases.FAMILIES
    answer = answers[name]
    for run in ("whole", "chunks", "static", "shared"):
        assert answer["runs"][run].items() >= {"left": 0, "layers": 2}.items(), table.line(answer)


def allocate(case):
    return {"bytes": len(bytearray(case))}


def spin(case):
    while True:
        pass


@pytest.mark.parametrize(
    "case, function, what",
    [
        (100, allocate, {"bytes": 100}),
        (2 * forks.MEMORY, allocate, {"failed": "ended with status 1 and no answer"}),
        (0, spin, {"failed": "used more than 1 s of processor time"}),
    ],
)
def test_a_case_has_limits(case, function, what, monkeypatch):
    monkeypatch.setattr(forks, "PROCESSOR", 1)
    ((got, answer),) = forks.run_each([case], function, jobs=1)
    assert got == case
    assert answer.items() >= what.items()
    assert ("MemoryError" in answer.get("said", "")) == (case > 100)


def test_what_is_wrong_is_called_so():
    run = {"taken": 2, "left": 0, "reasons": [], "error": 2e-7, "after": 0.0}
    answer = {"name": "A", "kind": "decoder", "noise": 1e-7, "matters": 0.1, "runs": {"whole": run}}
    assert table.faults(answer) == {} and table.untested(answer) is None
    for change in (dict(error=2e-4), dict(error=float("inf")), dict(error=float("nan")), dict(after=2e-4)):
        assert set(table.faults(answer | {"runs": {"whole": run | change}})) == {"whole"}
    assert table.faults(answer | {"runs": {"whole": {"raises": "TypeError: no"}}}) == {"whole": "TypeError: no"}
    assert table.faults(answer | {"runs": {"whole": {"raises": "NotImplementedError: sinks"}}}) == {}
    assert table.untested(answer | {"matters": 1e-5}) is not None
    assert table.faults({"failed": "ended by SIGSEGV", "said": "..."}) == {}  # a class that can't be built
    assert table.faults({"failed": "ended by SIGSEGV", "said": trial.WORKS}) == {"whole": "ended by SIGSEGV"}
    refused = {"name": "A", "kind": "decoder", "noise": 1e-7, "refused": "A: no", "after": 0.0}
    assert table.faults(refused) == {} and set(table.faults(refused | {"after": 0.1})) == {"whole"}
