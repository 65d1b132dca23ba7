"""What every run of methods on items has: what it was asked for, and the loop over what is left to measure."""

import datetime
import hashlib
import pathlib
import platform
import shlex
import sys

from . import kind

# Options that say how and where, and not what: run.json has them elsewhere or not at all.
_SHARED = {"kind", "model", "methods", "out", "engine", "program", "device", "dtype", "yarn", "json", "page", "commit", "to"}


_HEAD = 8 << 20  # bytes at the beginning of a model's file: headers, with a GGUF's vocabulary
_PIECES, _PIECE = 8, 1 << 20  # of its data, evenly spread up to the end


def _model(path):
    """Returns a model as run.json holds it: name, bytes of a GGUF file, and a hash of its configuration, of headers and of
    samples of the data, which fine-tuning or another quantisation changes everywhere."""
    files = [path]
    if path.is_dir():
        files = [path / "config.json", path / "tokenizer.json", *sorted(path.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for each in files:
        if each.is_file():
            size = each.stat().st_size
            digest.update(f"{each.name if each != path else ''} {size}\n".encode())
            with open(each, "rb") as file:
                digest.update(file.read(_HEAD))
                for piece in range(1, _PIECES + 1):
                    file.seek(max(size * piece // _PIECES - _PIECE, 0))
                    digest.update(file.read(_PIECE))
    return {"name": path.name, "bytes": path.stat().st_size if path.is_file() else None, "sha256": digest.hexdigest()[:16]}


def header(given, the_kind, attentions, argv):
    """run.json of a run."""
    from . import engines
    from .bench import records

    own = {name: the_kind.identity(name, value) for name, value in sorted(vars(given).items()) if name not in _SHARED}
    return {
        "kind": given.kind,
        "command": shlex.join(["python", "-m", "pbsattn_eval", *argv]),
        "commit": given.commit or records.commit(),
        "date": datetime.date.today().isoformat(),
        "model": _model(pathlib.Path(given.model)),
        "engine": given.engine,
        "options": {"dtype": given.dtype, "yarn": given.yarn, **own},
        "methods": {each.name: engines.options_of(each) for each in attentions},
        "versions": {**engines.versions(), "python": platform.python_version()},
        "device": engines.device_name(given.device),
    }


def measure(run, name, the_kind, engine, items, attentions):
    """Measures each item under each attention, but for the records that the run has."""
    import tqdm

    wanted = [(item.id, each.name) for item in items for each in attentions]
    done = sum(each in run.done for each in wanted)
    with tqdm.tqdm(total=len(wanted), initial=done, unit="", file=sys.stderr, dynamic_ncols=True) as bar:
        left = ((item, [each for each in attentions if (item.id, each.name) not in run.done]) for item in items)
        for item, those, state in the_kind.prepared(engine, ((item, those) for item, those in left if those)):
            bar.set_description_str(item.id)
            for attention in those:
                bar.set_postfix_str(attention.name)
                record = {
                    "kind": name,
                    "item": item.id,
                    "group": item.group,
                    "method": attention.name,
                    "params": item.params,
                }
                try:
                    if isinstance(state, kind.Unsupported):
                        raise state
                    record.update(the_kind.measure(engine, item, attention, state))
                except (kind.Unsupported, NotImplementedError) as reason:
                    record["error"] = str(reason)
                run.add(record)
                bar.update()
