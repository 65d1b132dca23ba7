"""Runs a function on each of many cases, each in a forked process of its own with limits on memory and time."""

import contextlib
import json
import os
import resource
import selectors
import signal
import tempfile
import time
import traceback

MEMORY = 3 << 30  # bytes that a case may map beyond what the parent has mapped (PyTorch's libraries)
PROCESSOR = 20  # seconds of processor time of a case: a busy machine changes nothing
CLOCK = 300  # seconds after which a case that waits for ever is ended


def _mapped():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


class _Child:
    def __init__(self, case, function):
        self.case, self.started = case, time.monotonic()
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (open until the child has ended)
        self.answer = b""
        self.pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, write)
        os.close(write)

    def _run(self, function, write):
        """What the child does; it never returns, so that nothing of the parent's is done twice."""
        status = 0
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.close(self.pipe)
            for stream in (1, 2):
                os.dup2(self.said.fileno(), stream)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR + 1))
            answer = json.dumps(function(self.case))
            with open(write, "w") as file:
                file.write(answer)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            status = 1
        finally:
            os._exit(status)

    def end(self):
        """The answer of a child whose pipe is closed or whose time is over."""
        late = time.monotonic() - self.started > CLOCK
        if late:
            os.kill(self.pid, signal.SIGKILL)
        _, status, used = os.wait4(self.pid, 0)
        os.close(self.pipe)
        try:
            answer = json.loads(self.answer)
        except ValueError:
            answer = {"failed": f"waited for {CLOCK} s" if late else _how_it_ended(status)}
        if "failed" in answer:
            self.said.seek(0)
            answer["said"] = self.said.read()[-10000:].decode(errors="replace")
        self.said.close()
        return answer | {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_mib": used.ru_maxrss >> 10}

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _how_it_ended(status):
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return f"used more than {PROCESSOR} s of processor time"
        return f"ended by {signal.Signals(number).name}"
    return f"ended with status {os.waitstatus_to_exitcode(status)} and no answer"


def run_each(cases, function, jobs):
    """Yields (case, answer) as they come; function(case) gives what JSON can hold."""
    waiting, running = list(cases)[::-1], {}
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    child = _Child(waiting.pop(), function)
                    running[child.pipe] = child
                    selector.register(child.pipe, selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select(timeout=1)}
                for pipe, child in list(running.items()):
                    if pipe in ready and (some := os.read(pipe, 1 << 16)):
                        child.answer += some
                    elif pipe in ready or time.monotonic() - child.started > CLOCK:
                        selector.unregister(pipe)
                        del running[pipe]
                        yield child.case, child.end()
        finally:
            for child in running.values():
                child.kill()
