"""The folder of a run: run.json (what was asked for), items.jsonl (what is done), summary.json (the table)."""

import errno
import fcntl
import json
import os
import pathlib

from pbsattn.program import write_whole

FORMAT = 1
# Of run.json: what may differ when a run goes on.
FREE = ("command", "commit", "date")
REQUIRED = {"kind": str, "item": str, "group": str, "method": str, "params": dict}


class FolderError(ValueError):
    """Something about the run's folder: the message names it, the rule and the way out."""


class RunFolder:
    """An open run, locked against others. `done` holds the records of items.jsonl by (item, method)."""

    def __init__(self, path, header):
        self.path = pathlib.Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._check_header({"format": FORMAT, **header})
            items = self.path / "items.jsonl"
            kept = _cut_torn_line(items)
            self.done = {(r["item"], r["method"]): r for r in read_items(items)} if kept else {}
            self._items = os.open(items, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._items)
        self._lock.close()

    def _take_lock(self):
        lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the run is)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise FolderError(
                f"{self.path}: another run (process {owner}) is writing to it; wait for it, or pass another --out"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        return lock

    def _check_header(self, header):
        path = self.path / "run.json"
        if not path.exists():
            if (self.path / "items.jsonl").exists():
                raise FolderError(
                    f"{self.path}: has items.jsonl but no run.json, so nobody knows whose items they are; pass another --out"
                )
            write_whole(path, json.dumps(header, indent=1) + "\n")
            return
        found = read_header(self.path)
        changes = sorted(_differences(json.loads(json.dumps(header)), found))
        if changes:
            raise FolderError(
                f"{path}: belongs to another run: {'; '.join(changes[:4])}"
                f"{f'; and {len(changes) - 4} more' if len(changes) > 4 else ''}; pass another --out, or what "
                "that run had"
            )

    def add(self, record):
        """Writes a finished record; when it returns the record is on disk, and when it raises nothing of it is."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
        size = os.fstat(self._items).st_size
        try:
            written = os.write(self._items, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / "items.jsonl"))
            os.fsync(self._items)
        except OSError as error:
            os.ftruncate(self._items, size)
            raise OSError(
                error.errno,
                f"{error.strerror}: the {len(self.done)} finished records are kept; free some space "
                "and run the same command again",
                str(self.path / "items.jsonl"),
            ) from None
        self.done[record["item"], record["method"]] = record

    def drop(self, unwanted):
        """Drops the records that unwanted(record) is true of, so that they are measured again."""
        kept = {key: record for key, record in self.done.items() if not unwanted(record)}
        if len(kept) == len(self.done):
            return
        items = self.path / "items.jsonl"
        write_whole(items, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept.values()))
        os.close(self._items)
        self._items = os.open(items, os.O_WRONLY | os.O_APPEND)
        self.done = kept


def _differences(wanted, found, where=""):
    for key in {*wanted, *found}:
        name = f"{where}{key}"
        if not where and key in FREE:
            continue
        new, old = wanted.get(key), found.get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            yield from _differences(new, old, name + ".")
        elif new != old:
            yield f"{name} is {_short(old)} there and {_short(new)} here"


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _cut_torn_line(path):
    """Drops a last line without an end, which a killed run may leave. False if there is no file."""
    if not path.exists():
        return False
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)
    return True


def read_header(path):
    """run.json of a folder."""
    path = pathlib.Path(path) / "run.json"
    if not path.exists():
        raise FolderError(f"{path}: no such file; name the folder of a run (--out of pbsattn_eval)")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FolderError(f"{path}: is not JSON ({error}); pass another --out") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise FolderError(f'{path}: "format" is not {FORMAT}, which this version writes; pass another --out')
    return header


def read_jsonl(path, required):
    """Objects of a JSONL file, with their line numbers. `required`: {field: type}, which each must have."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise FolderError(f"{path}, line {number}: is not JSON ({error}); mend or delete the line") from None
            if not isinstance(record, dict):
                raise FolderError(f"{path}, line {number}: is not a JSON object; mend or delete the line")
            for field, kind in required.items():
                if not isinstance(record.get(field), kind):
                    state = "is missing" if field not in record else f"is {_short(record[field])}"
                    names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                    raise FolderError(f'{path}, line {number}: field "{field}" {state}; it has to be of type {names}')
            yield number, record


def read_items(path):
    """Records of items.jsonl."""
    for number, record in read_jsonl(path, REQUIRED):
        if "error" not in record and not isinstance(record.get("metrics"), dict):
            raise FolderError(f'{path}, line {number}: field "metrics" is missing; it has to be of type dict')
        yield record
