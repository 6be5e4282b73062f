"""Ten exercises: what is to be written is taken out of the code, graded, and put back.

    python bench/exercise.py                # lists them
    python bench/exercise.py 3              # empties what exercise 3 wants written
    python bench/exercise.py 3 --check      # runs the tests that grade it
    python bench/exercise.py 3 --solution   # puts the original back, and keeps the attempt

EXERCISES.md says what to do, and is read here, too: below the heading of an exercise one paragraph
names the functions that are emptied, another one the tests.

Only these functions are exchanged: what else was changed in a file stays. Their originals lie in
.exercises/ until they are put back, and attempts come to lie there. Git is not needed. Nothing of
the project is imported: what an attempt has broken can be mended from here.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "EXERCISES.md"
TESTS = "test_tokenlake.py"
KEPT = ROOT / ".exercises"
DEFINITIONS = ast.FunctionDef, ast.ClassDef


class Function(NamedTuple):
    """A function to be written."""
    file: str
    name: str  # of a method: Class.method

    def __str__(self):
        return f"{self.name} in {self.file}"


class Exercise(NamedTuple):
    """What EXERCISES.md says of it."""
    number: int
    title: str
    functions: list[Function]
    graders: list[str]  # tests, some with one of their cases in brackets

    @property
    def originals(self) -> Path:
        """This file is there as long as the exercise is begun."""
        return KEPT / f"{self.number}-originals.json"

    def free_attempt(self) -> Path:
        """A file that is not there yet."""
        attempts = (KEPT / f"{self.number}-attempt-{number}.py" for number in count(1))
        return next(path for path in attempts if not path.exists())


# ── what EXERCISES.md says ───────────────────────────────────────────────────────────────────────


def read_exercises() -> list[Exercise]:
    parts = re.split(r"^## (\d+)\. (.+)$", TEXT.read_text(encoding="utf-8"), flags=re.M)
    sections = zip(parts[1::3], parts[2::3], parts[3::3])
    return [
        Exercise(
            int(number),
            title,
            read_functions(names_in(section, "Empties")),
            names_in(section, "Graded by"),
        )
        for number, title, section in sections
    ]


def names_in(section, word) -> list[str]:
    """What stands in backticks in the paragraph that begins with this word in bold."""
    _, _, rest = section.partition(f"\n**{word}** ")
    paragraph, _, _ = rest.partition("\n\n")
    return re.findall("`([^`]+)`", paragraph)


def read_functions(names) -> list[Function]:
    """Of names in the order of "`f` and `g` in `a.py`, `h` in `b.py`"."""
    functions = []
    waiting = []  # for their file
    for name in names:
        waiting.append(name)
        if name.endswith(".py"):
            functions += [Function(name, function) for function in waiting[:-1]]
            waiting = []
    return functions


# ── functions in files ───────────────────────────────────────────────────────────────────────────


class Place(NamedTuple):
    """Lines of a function in its file, counted from 0."""
    first: int  # its decorators and signature,
    body: int  # behind these and its docstring,
    end: int  # and behind its last line
    indent: int  # of the body
    is_kernel: bool  # Triton compiles it


def read_lines(file) -> list[str]:
    """Without the line breaks, but with what else stands there: so they can be written as they
    were."""
    return (ROOT / file).read_bytes().decode().split("\n")


def write_lines(file, lines):
    """All or nothing."""
    path = ROOT / file
    new = path.with_name(f"{path.name}.new")
    new.write_bytes("\n".join(lines).encode())
    shutil.copymode(path, new)
    os.replace(new, path)


def find(function, lines) -> Place:
    """Raises ValueError if it is not there, or if nothing can be found in the file."""
    try:
        node = ast.parse("\n".join(lines))
    except SyntaxError as error:
        said = f"{function.file}:{error.lineno}: {error.msg}; mend that first"
        raise ValueError(said) from None
    for name in function.name.split("."):
        inner = (x for x in ast.walk(node) if isinstance(x, DEFINITIONS) and x.name == name)
        node = next(inner, None)
        if node is None:
            raise ValueError(f"{function.file}: {function.name} is expected there, and is not")
    statement = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    return Place(
        first=min(part.lineno for part in (node, *node.decorator_list)) - 1,
        body=statement.end_lineno if has_docstring else statement.lineno - 1,
        end=node.end_lineno,
        indent=statement.col_offset,
        is_kernel=any("jit" in ast.unparse(part) for part in node.decorator_list),
    )


def make_hole(exercise, function, lines, place) -> list[str]:
    """Signature and docstring, and what fails when it is called, or compiled."""
    said = f'"exercise {exercise.number}: {function.name}"'
    fails = f"raise NotImplementedError({said})"
    if place.is_kernel:
        fails = f"tl.static_assert(False, {said})"
    ending = "\r" if lines[place.first].endswith("\r") else ""
    return [*lines[place.first : place.body], " " * place.indent + fails + ending]


# ── what a learner asks for ──────────────────────────────────────────────────────────────────────


def list_exercises(exercises):
    print("Ten exercises, by difficulty. EXERCISES.md says what each is about.\n")
    for exercise in exercises:
        begun = "  (begun)" if exercise.originals.exists() else ""
        print(f"{exercise.number:>3}  {exercise.title}{begun}")
    print("\npython bench/exercise.py 1 empties what the first one wants written.")


def begin(exercise):
    """Empties its functions. Raises ValueError if that is done already, or cannot be."""
    if exercise.originals.exists():
        said = f"exercise {exercise.number} is begun; --solution puts its original back"
        raise ValueError(said)
    files = {function.file: read_lines(function.file) for function in exercise.functions}
    originals = []
    for function in exercise.functions:
        lines = files[function.file]
        place = find(function, lines)
        hole = make_hole(exercise, function, lines, place)
        originals.append([*function, lines[place.first : place.end], hole])
        lines[place.first : place.end] = hole
    KEPT.mkdir(exist_ok=True)
    exercise.originals.write_text(json.dumps(originals), encoding="utf-8")
    for file, lines in files.items():
        write_lines(file, lines)
    command = f"python bench/exercise.py {exercise.number}"
    print(f"Exercise {exercise.number}: {exercise.title}. EXERCISES.md says more.\n")
    for function in exercise.functions:
        at = find(function, files[function.file]).first + 1
        print(f"  write    {function.name}, {function.file}:{at}")
    print(f"  grade    {command} --check\n  give up  {command} --solution")


def check(exercise) -> int:
    """The exit status of its graders: 0 if all pass."""
    if not exercise.originals.exists():
        print(f"Exercise {exercise.number} is not begun: this grades the original.", flush=True)
    tests = [f"{TESTS}::{grader}" for grader in exercise.graders]
    # A line for each that fails: pytest's longer forms take most of a second for each.
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "--tb=line", *tests]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        print(f"\nMore about one of them: python -m pytest {TESTS}::NAME")
    return status


def put_back(exercise):
    """Its functions as they were; what stood there in their place is kept, unless it is nothing.
    Raises ValueError if it is not begun, or where a file cannot be read as Python."""
    if not exercise.originals.exists():
        said = f"exercise {exercise.number} is not begun: the original is in place"
        raise ValueError(said)
    originals = json.loads(exercise.originals.read_text(encoding="utf-8"))
    files = {file: read_lines(file) for file, *_ in originals}
    attempt = []
    for *names, original, hole in originals:
        function = Function(*names)
        lines = files[function.file]
        place = find(function, lines)
        current = lines[place.first : place.end]
        if current not in (original, hole):
            attempt += [f"# {function}", *current, ""]
        lines[place.first : place.end] = original
    if attempt:
        path = exercise.free_attempt()
        path.write_text("\n".join(attempt), encoding="utf-8")
    for file, lines in files.items():
        write_lines(file, lines)
    exercise.originals.unlink()
    print(f"Exercise {exercise.number}: the original is back.")
    if attempt:
        print(f"Your attempt is kept in {path.relative_to(ROOT)}.")


class Parser(argparse.ArgumentParser):
    """Brief with what it refuses, as bench/options.py is, which would import the project."""
    def error(self, message):
        said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        self.exit(2, f"{self.prog}: error: {said if len(said) <= 200 else said[:199] + '…'}\n")


def main(arguments: list[str]) -> int:
    exercises = read_exercises()
    parser = Parser(prog="exercise.py", description="Ten exercises: EXERCISES.md")
    parser.add_argument("number", nargs="?", help="of the exercise that is emptied (else: a list)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="run the tests that grade it")
    said = "put the original back; an attempt is kept"
    instead.add_argument("--solution", action="store_true", help=said)
    options = parser.parse_args(arguments)
    if options.number is None and not (options.check or options.solution):
        list_exercises(exercises)
        return 0
    by_number = {str(exercise.number): exercise for exercise in exercises}
    if options.number not in by_number:
        given = "no number" if options.number is None else repr(options.number)
        parser.error(f"{given[:80]}: an exercise from 1 to {len(exercises)} is expected")
    exercise = by_number[options.number]
    if options.check:
        return check(exercise)
    try:
        if options.solution:
            put_back(exercise)
        else:
            begin(exercise)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # who reads the output left early, as `head` does
        os._exit(1)
    except OSError as error:  # a full disk, say
        sys.exit(f"exercise.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("exercise.py: stopped by Ctrl-C")
