#!/usr/bin/env python3
"""Every public name, compared with public_names.txt: public_names.py PROGRAM [--update]

The names are those of the headers, of methods and options, of the environment, of the program's commands and their options,
and of the Python package. One that goes breaks somebody's program: it stays as an alias until the next minor version. One
that comes is written into the list by --update, so that a change shows what it promises.
"""

import ast
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
KEPT = ROOT / "tests/public_names.txt"
PYTHON = ROOT / "integrations/python/pbsattn"


# ---------------------------------------------------------------------------------------------- headers


def _tokens(text):
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    defined = [name for name, _ in re.findall(r"^#define (\w+)[ \t]+(\S+)", text, re.MULTILINE)]
    text = re.sub(r"^[ \t]*#[^\n]*", " ", text, flags=re.MULTILINE)
    text = re.sub(r'"[^"]*"', '""', text)
    return [name for name in defined if not name.endswith("_API")], re.findall(r"\w+|::|\"\"|[^\s\w]", text)


def _without_template(head):
    while head[:1] == ["template"]:
        depth = 0
        for i, token in enumerate(head):
            depth += (token == "<") - (token == ">")
            if token == ">" and depth == 0:
                head = head[i + 1 :]
                break
    return head


def _declared(statement):
    """The names that a statement declares, which is a list of tokens without what stood in braces."""
    statement = _without_template(statement)
    if not statement or statement[0] in ("friend", "static_assert") or "operator" in statement:
        return []
    if statement[0] == "using":
        return [statement[1]] if "=" in statement else []
    if statement[0] in ("class", "struct", "enum") and len(statement) == 2:
        return []  # announced, and declared elsewhere
    paren = statement.index("(") if "(" in statement else len(statement)
    assign = statement.index("=") if "=" in statement else len(statement)
    if paren < assign:
        if statement[paren + 1 : paren + 2] == ["*"]:  # a pointer to a function
            return [statement[paren + 2]]
        return [] if "~" in statement[:paren] else [statement[paren - 1]]
    names, depth, last, ended = [], 0, None, False
    for token in [*statement, ","]:
        depth += (token in "<([") - (token in ">)]")
        if token == "," and depth == 0:
            if last:
                names.append(last)
            last, ended = None, False
        elif token in ("=", "["):
            ended = True
        elif depth == 0 and not ended and re.fullmatch(r"[A-Za-z_]\w*", token):
            last = token
    return names


def header_names(path):
    """Names of a header of C or C++, with those of the structs and classes that they belong to, without private ones."""
    names, tokens = _tokens(path.read_text())
    scopes = []  # (kind, name or "", whether it is public here)
    statement, skipped = [], 0

    def add(found):
        if any((kind == "namespace" and name == "detail") or not public for kind, name, public in scopes):
            return
        place = "".join(f"{name}." for kind, name, _ in scopes if kind != "namespace" and name)
        owner = scopes[-1][1] if scopes else ""
        names.extend(place + name for name in found if name != owner or scopes[-1][0] == "namespace")

    for token in tokens:
        if skipped:
            skipped += (token == "{") - (token == "}")
            if not skipped and "(" in statement and "=" not in statement[: statement.index("(")]:
                add(_declared(statement))
                statement = []  # a function's body
            continue
        inside = scopes[-1][0] if scopes else ""
        if token == "{":
            head = _without_template(statement)
            kind = next((word for word in ("namespace", "enum", "struct", "class") if word in head), "")
            if head[:1] == ["extern"]:
                scopes.append(("namespace", "", True))
            elif kind and "(" not in head:
                after = [word for word in head[head.index(kind) + 1 :] if word not in ("class", "struct")]
                name = after[0] if after and after[0] != ":" else ""
                if "<" in after:  # a specialisation
                    name += "<" + after[after.index("<") + 1] + ">"
                if kind != "namespace":
                    add([name])
                scopes.append((kind, name, kind != "class" or head[0] == "enum"))
            else:
                skipped = 1
                continue
            statement = []
        elif token == "}":
            if inside == "enum":
                add(statement[:1])
            scopes.pop()
            statement = []
        elif inside == "enum" and token == ",":
            add(statement[:1])
            statement = []
        elif token == ";":
            # After a struct's brace stands the name of a typedef, which it has itself.
            if len(statement) > 1:
                add(_declared(statement))
            statement = []
        elif token == ":" and statement[-1:] in (["public"], ["private"], ["protected"]):
            kind, name, _ = scopes[-1]
            scopes[-1] = (kind, name, statement[-1] == "public")
            statement = []
        else:
            statement.append(token)
    return list(dict.fromkeys(names))


# ----------------------------------------------------------------------------------------------- Python


def _members(node):
    """Public names of a class, and the parameters of a function."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        given = node.args
        yield from (each.arg for each in [*given.posonlyargs, *given.args, *given.kwonlyargs] if each.arg != "self")
    elif isinstance(node, ast.ClassDef):
        for each in node.body:
            for name in _targets(each):
                if not name.startswith("_"):
                    yield name
                    yield from (f"{name}({member})" for member in _members(each))


def _targets(node):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [each.id for each in node.targets if isinstance(each, ast.Name)]
    return []


def _defined(path):
    found = {}
    for node in ast.parse(path.read_text()).body:
        for name in _targets(node):
            found[name] = node
    return found


def python_names():
    """What the modules of `pbsattn` export, with parameters and members."""
    own = [path for path in [*sorted(PYTHON.glob("_*.py")), PYTHON / "_core.pyi"] if path.name != "__init__.py"]
    for module, path in (
        ("pbsattn", "__init__.py"),
        ("pbsattn.transformers", "transformers.py"),
        ("pbsattn.program", "program.py"),
    ):
        here = _defined(PYTHON / path)
        exported = ast.literal_eval(here["__all__"].value)
        nodes = {
            name: next(filter(None, (defined.get(name) for defined in (here, *map(_defined, own))))) for name in exported
        }
        for name, node in nodes.items():
            yield f"{module}.{name}"
            joined = "{}.{}({})" if isinstance(node, ast.FunctionDef) else "{}.{}.{}"
            yield from (joined.format(module, name, member) for member in _members(node))


# -------------------------------------------------------------------------------------------------- all


def program_names(program):
    """Commands and their options, as the program itself lists them."""

    def helped(*arguments):
        return subprocess.run([program, *arguments, "--help"], capture_output=True, text=True, check=True).stdout

    yield from flags(helped())
    for command in re.findall(r"^  (\w+) ", helped().partition("Subcommands:")[2], re.MULTILINE):
        yield command
        yield from (f"{command} {flag}" for flag in flags(helped(command)))


def flags(text):
    """Every spelling of every option in a help text."""
    listed = re.findall(r"^  ((?:-[\w-]+,?)+)", text, re.MULTILINE)
    return [flag for spellings in listed for flag in spellings.split(",") if flag.startswith("--")]


def public_names(program):
    """{section: names}."""
    listed = json.loads(subprocess.run([program, "methods", "--json"], capture_output=True, text=True, check=True).stdout)
    options = list(dict.fromkeys(name for method in listed for name in method["options"]))
    headers = {
        path.name: header_names(path)
        for path in [*sorted((ROOT / "include/pbsattn").iterdir()), ROOT / "integrations/ggml/ggml-pbsattn.h"]
    }
    sources = "".join(path.read_text() for path in sorted((ROOT / "integrations/ggml").glob("*.cc")))
    variables = set(re.findall(r'"(PBSATTN_\w+)"', sources))
    if '"PBSATTN_"' in sources:  # and an option's name in capitals
        variables |= {f"PBSATTN_{option.upper()}" for option in options}
    return {
        **headers,
        "methods": [method["name"] for method in listed],
        "options": options,
        "variables of the environment": sorted(variables),
        "the program": list(program_names(program)),
        "Python": list(python_names()),
    }


def written(sections):
    parts = ["Every public name. tests/public_names.py compares it with what there is, and writes it anew with --update.\n"]
    parts += [f"\n[{section}]\n" + "".join(f"{name}\n" for name in names) for section, names in sections.items()]
    return "".join(parts)


def read(text):
    sections = {}
    for part in re.split(r"^\[", text, flags=re.MULTILINE)[1:]:
        section, _, names = part.partition("]\n")
        sections[section] = names.split("\n")
    return {(section, name) for section, names in sections.items() for name in names if name}


def main(program, *rest):
    text = written(public_names(program))
    if rest == ("--update",):
        KEPT.write_text(text)
        return 0
    then, now = read(KEPT.read_text()), read(text)
    for section, name in sorted(then - now):
        print(f"gone: {section}: {name}")
    for section, name in sorted(now - then):
        print(f"new: {section}: {name}")
    if then != now:
        print(
            "What is gone stays as an alias of its new name until the next minor version. What is new, and what may go, "
            "is put into the list by: tests/public_names.py PROGRAM --update"
        )
    print(f"{len(now)} public names")
    return int(then != now)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
