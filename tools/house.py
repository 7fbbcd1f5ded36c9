"""Prints what the size and shape of this tree are, beside what is wanted: `python -m tools.house`.

It reads the files of the tree that it stands in, or of the one given as an argument, by their
syntax (`ast`); nothing is imported, and nothing but the standard library is needed. What the rows
count, where it does not speak for itself:

- files reached: modules of the project behind a file's import statements, those inside functions
  as well, followed from module to module. `import a.b` counts `a/b.py`, not also what
  `a/__init__.py` brings along.
- one importer: modules that exactly one other module imports. Not counted are those that are
  chosen by name, of which each is one of a kind (readers, filters, trackers, guards, attention
  backends), and what a command or a job starts.
- two homes: keys that a file of `conf/` gives the value that the dataclass field of the same name
  has as its default. Experiments, which say a whole run, are not counted.
- result lines: of the JSON files below `bench/results` that git has.
- names: each place where such a name stands as a variable, an argument or an attribute.
- functions over 60 lines: from `def` to the last line.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("tidar_common", "data_prep", "pipeline", "slurm")
OUTSIDE = ("bench", "tools")
VAGUE = ("found", "own", "one", "made", "told")
CHOSEN_BY_NAME = re.compile(
    r"data_prep/(corpora|filters)/|pipeline/training/(guards|trackers|callbacks)/"
    r"|pipeline/model/(flex|tiles|dense|dense_attention|attention)\.py|/__main__\.py|/__init__\.py"
)
LONG = 60
TRAIN = "pipeline/train.py"
SCHEMA = re.compile(r"(Config|Settings|Keys|Rules|Choice)$")
KEY = re.compile(r"^( *)([A-Za-z_]\w*):(?: +(.*))?$")


class Tree:
    """The Python files below `root`, parsed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {
            path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for top in (*CODE, *OUTSIDE)
            for path in sorted((root / top).rglob("*.py"))
        }
        self.modules = {self.module_name(file): file for file in self.files}
        self.imports = {file: self.imported_files(file) for file in self.files}

    @staticmethod
    def module_name(file: str) -> str:
        return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def imported_files(self, file: str) -> set[str]:
        """The files whose modules `file` names in import statements, wherever they stand."""
        names: set[str] = set()
        for node in ast.walk(self.files[file]):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        return {self.modules[name] for name in names if name in self.modules} - {file}

    def reached(self, start: str) -> set[str]:
        """All files behind the import statements of `start`, itself included."""
        todo, seen = [start], set()
        while todo:
            file = todo.pop()
            if file not in seen:
                seen.add(file)
                todo += self.imports[file]
        return seen

    def with_one_importer(self) -> list[str]:
        importers = self.importers()
        return sorted(
            f"{file} <- {importers[file][0]}"
            for file in importers.keys() - self.entry_points()
            if len(importers[file]) == 1 and not CHOSEN_BY_NAME.search(file)
        )

    def importers(self) -> dict[str, list[str]]:
        """By file, the files among what users run that import it."""
        importers: dict[str, list[str]] = {}
        for file in self.files:
            for target in self.imports[file] if file.startswith(CODE) else ():
                if target.startswith(CODE):
                    importers.setdefault(target, []).append(file)
        return importers

    def behind(self, start: str) -> list[str]:
        """The files that `start` reaches, each with those among them that import it."""
        reached, importers = self.reached(start), self.importers()
        return [
            f"{file} <- {' '.join(sorted(reached.intersection(importers.get(file, ()))))}"
            for file in sorted(reached)
        ]

    def entry_points(self) -> set[str]:
        """Files that a console script names, or that run as a program."""
        commands = console_scripts(self.root).values()
        scripts = {module.replace(".", "/") + ".py" for module in commands}
        programs = {
            file
            for file, tree in self.files.items()
            for node in tree.body
            if isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
        }
        return scripts | programs

    def lines(self, *tops: str) -> int:
        return sum(
            len((self.root / file).read_text(encoding="utf-8").splitlines())
            for file in self.files
            if file.split("/")[0] in tops
        )

    def vague_names(self) -> int:
        """Places where a name that says nothing stands in the code."""
        return sum(
            getattr(node, attribute, None) in VAGUE
            for file in self.files
            if file.startswith(CODE)
            for node in ast.walk(self.files[file])
            if isinstance(node, ast.Name | ast.arg | ast.Attribute)
            for attribute in ("id", "arg", "attr")
        )

    def long_functions(self) -> list[str]:
        return [
            f"{file}:{node.lineno} {node.name} {node.end_lineno - node.lineno + 1}"
            for file, tree in self.files.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno is not None
            and node.end_lineno - node.lineno + 1 > LONG
        ]

    def field_defaults(self) -> dict[str, set[str]]:
        """Literal defaults of the fields of config dataclasses, by field name."""
        defaults: dict[str, set[str]] = {}
        for tree in self.files.values():
            for node in ast.walk(tree):
                if not isinstance(node, ast.ClassDef) or not SCHEMA.search(node.name):
                    continue
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        value = default_of(field.value)
                        if value is not None:
                            defaults.setdefault(field.target.id, set()).add(value)
        return defaults

    def keys_with_two_homes(self) -> list[str]:
        defaults = self.field_defaults()
        return [
            f"{path.relative_to(self.root).as_posix()} {key}"
            for path in sorted((self.root / "conf").rglob("*.yaml"))
            if path.parent.name != "experiment"
            for key, value in yaml_values(path)
            if plain(value) in defaults.get(key.rpartition(".")[2], ())
        ]


def default_of(value: ast.expr | None) -> str | None:
    """A field's default in plain form, None where it has none or it is not a literal.

    Read are `= 3`, `= key(3, ...)`, `= field(default=3)` and factories `lambda: [3]`.
    """
    if isinstance(value, ast.Call):
        by_name = {word.arg: word.value for word in value.keywords}
        factory = by_name.get("default_factory")
        if isinstance(factory, ast.Lambda):
            value = factory.body
        elif isinstance(factory, ast.Name):
            return {"list": "[]", "dict": "{}"}.get(factory.id)
        else:
            value = by_name.get("default", value.args[0] if value.args else None)
    try:
        literal = ast.literal_eval(value) if value is not None else ...
    except ValueError:
        return None
    return None if literal is ... else plain(repr(literal))


def plain(text: str) -> str:
    """A value in one spelling, whether YAML or Python wrote it."""
    text = text.strip().strip("\"'").replace("(", "[").replace(")", "]").replace(",]", "]")
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
    try:
        return repr(float(text.replace("_", "")))
    except ValueError:
        return re.sub(r"[\s\"']", "", text)


def yaml_values(path: Path) -> Iterator[tuple[str, str]]:
    """Dotted keys with a value on their line, those of Hydra left out."""
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = KEY.match(line)
        if match is None:
            continue
        indent, name, value = len(match[1]), match[2], (match[3] or "").split(" #")[0]
        parents = [pair for pair in parents if pair[0] < indent] + [(indent, name)]
        if parents[0][1] not in ("hydra", "defaults") and value:
            yield ".".join(parent for _, parent in parents), value


def console_scripts(root: Path) -> dict[str, str]:
    """Commands of pyproject.toml, each with its module."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.scripts]")[2].partition("\n[")[0]
    return dict(re.findall(r'^([\w-]+) = "([\w.]+):', section, re.MULTILINE))


def result_lines(root: Path) -> int:
    command = ["git", "-C", str(root), "ls-files", "bench/results"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return sum(len((root / name).read_text().splitlines()) for name in listed.stdout.split())


def words(root: Path) -> int:
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return sum(len(page.read_text(encoding="utf-8").split()) for page in pages)


def table(tree: Tree) -> list[tuple[str, str, str]]:
    """What is counted, how much it is here, and how much is wanted."""
    python = tree.lines("data_prep", "pipeline", "slurm")
    bench, results = tree.lines("bench"), result_lines(tree.root)
    return [
        (f"files behind {TRAIN}", str(len(tree.reached(TRAIN))), "<= 85"),
        ("modules with exactly one importer", str(len(tree.with_one_importer())), "<= 20"),
        ("lines of data_prep, pipeline, slurm", f"{python:,}", "<= 21,000"),
        ("lines of tidar_common", f"{tree.lines('tidar_common'):,}", ""),
        ("lines of bench; of its results in git", f"{bench:,}; {results:,}", "<= 2,200; newest"),
        ("keys with two homes", str(len(tree.keys_with_two_homes())), "0"),
        ("console commands", str(len(console_scripts(tree.root))), "7"),
        ("words of README and docs", f"{words(tree.root):,}", "<= 21,000"),
        (f"names {' '.join(VAGUE)}", str(tree.vague_names()), "< 60"),
        (f"functions over {LONG} lines", str(len(tree.long_functions())), "0"),
    ]


def main(arguments: list[str]) -> None:
    """Print the table; with `-v` also what is counted, and who imports it."""
    folders = [Path(word) for word in arguments if word != "-v"]
    tree = Tree(folders[0].resolve() if folders else ROOT)
    print(f"{'':<42}{'here':>16}  wanted")
    for name, here, wanted in table(tree):
        print(f"{name:<42}{here:>16}  {wanted}")
    if "-v" in arguments:
        for title, names in (
            (f"behind {TRAIN}", tree.behind(TRAIN)),
            ("one importer", tree.with_one_importer()),
            ("two homes", tree.keys_with_two_homes()),
            ("long functions", tree.long_functions()),
        ):
            print(f"\n{title}", *names, sep="\n  ")


if __name__ == "__main__":
    main(sys.argv[1:])
