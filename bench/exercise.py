"""Ten exercises: what is to be written is taken out of the code, graded, and put back.

    python bench/exercise.py                # lists them
    python bench/exercise.py 3              # empties what exercise 3 wants written
    python bench/exercise.py 3 --check      # runs the tests that grade it
    python bench/exercise.py 3 --solution   # puts the original back, and keeps the attempt

EXERCISES.md says what to do, and is read here, too: below the heading of an exercise one paragraph
names the functions that are emptied, another one the tests.

Only these functions are exchanged: what else was changed in a file stays. Their originals lie in
.exercises/ until they are put back, and attempts come to lie there. Two calls at once wait for each
other. Git is not needed. Nothing of the project is imported: what an attempt has broken can be
mended from here.
"""

import argparse
import ast
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "EXERCISES.md"
TESTS = "test_tokenlake.py"
KEPT = ROOT / ".exercises"
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
BOM = "\ufeff"


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
    parts = re.split(r"^## (\d+)\. (.+)$", read_text(TEXT), flags=re.M)
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
    indent: str  # of the body
    is_kernel: bool  # Triton compiles it


def read_text(path) -> str:
    """With its line ends as they are. Raises ValueError if it is no text."""
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name}:{line}: this is no UTF-8; mend that first") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path.name}:{line}: a NUL character stands there; mend that first")
    return text


def read_lines(file) -> list[str]:
    """With their ends, which are those that Python knows: \\n, \\r\\n and \\r."""
    return io.StringIO(read_text(ROOT / file), newline="").readlines()


def write_file(path, lines):
    """All or nothing. To be called by one at a time, as `alone` sees to it."""
    path = path.resolve()
    new = KEPT / "new"
    try:
        new.write_bytes("".join(lines).encode())
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def parse(file, lines) -> ast.Module:
    """Raises ValueError if it is not Python."""
    try:
        return ast.parse("".join(lines).removeprefix(BOM))
    except SyntaxError as error:
        said = f"{file}:{error.lineno}: {error.msg}; mend that first"
    except (RecursionError, MemoryError):
        said = f"{file}: its expressions are nested too deeply to be read; mend that first"
    raise ValueError(said)


def definitions(node) -> list:
    """What it defines itself, also below an `if` or the like, but not what these define in turn."""
    found = []
    waiting = [node]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            (found if isinstance(child, DEFINITIONS) else waiting).append(child)
    return found


def find(function, lines) -> Place:
    """Raises ValueError if it is not there just once, or if nothing can be found in the file."""
    node = parse(function.file, lines)
    for name in function.name.split("."):
        found = [inner for inner in definitions(node) if inner.name == name]
        found.sort(key=lambda inner: inner.lineno)
        if not found:
            raise ValueError(f"{function.file}: {function.name} is expected there, and is not")
        if len(found) > 1:
            said = f"{function.name} is defined twice, in line {found[0].lineno} and here; leave one"
            raise ValueError(f"{function.file}:{found[1].lineno}: {said}")
        node = found[0]
    statement = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    return Place(
        first=min(part.lineno for part in (node, *node.decorator_list)) - 1,
        body=statement.end_lineno if has_docstring else statement.lineno - 1,
        end=node.end_lineno,
        indent=lines[statement.lineno - 1][: statement.col_offset],
        is_kernel=any("jit" in ast.unparse(part) for part in node.decorator_list),
    )


def make_hole(exercise, function, lines, place) -> list[str]:
    """Signature and docstring, and what fails when it is called, or compiled."""
    said = f'"exercise {exercise.number}: {function.name}"'
    fails = f"raise NotImplementedError({said})"
    if place.is_kernel:
        fails = f"tl.static_assert(False, {said})"
    # It ends as the function did: a \\r in front of an empty line would make one end of two.
    return [*lines[place.first : place.body], place.indent + fails + end_of(lines[place.end - 1])]


def bare(line) -> str:
    return line.rstrip("\r\n")


def end_of(line) -> str:
    return line[len(bare(line)) :]


def with_ends_of(lines, place, original, hole) -> list[str]:
    """The original, to stand at this place. It takes the line ends of the file if these are others
    since its function was emptied."""
    end = end_of(lines[place.first]) or "\n"
    if end != end_of(hole[0]):
        return [bare(line) + end for line in original]
    *others, last = original
    if not end_of(last):  # it was the last line of its file, and need not be any longer
        last += end_of(lines[place.end - 1])
    return [*others, last]


# ── originals ────────────────────────────────────────────────────────────────────────────────────


class Original(NamedTuple):
    """What stood at the place of a function, and what came there instead."""
    function: Function
    lines: list[str]
    hole: list[str]


@contextmanager
def alone():
    """Waits until no other call exchanges functions."""
    KEPT.mkdir(exist_ok=True)
    with open(KEPT / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


def read_originals(exercise) -> list[Original]:
    """Raises ValueError if this file is not what `begin` wrote."""
    path = exercise.originals
    try:
        originals = json.loads(read_text(path))
        if not is_written_here(originals):
            raise ValueError
    except (ValueError, RecursionError):
        files = " and ".join(sorted({function.file for function in exercise.functions}))
        said = f"no originals are left there; take {files} from a fresh copy, and remove it"
        raise ValueError(f"{path.relative_to(ROOT)}: {said}") from None
    return [Original(Function(file, name), *both) for file, name, *both in originals]


def is_written_here(originals) -> bool:
    """[[file, name, lines, lines of the hole], ...]"""
    if not isinstance(originals, list) or not originals:
        return False
    if not all(isinstance(entry, list) and len(entry) == 4 for entry in originals):
        return False
    texts = [text for file, name, *_ in originals for text in (file, name)]
    for *_, original, hole in originals:
        for lines in (original, hole):
            if not isinstance(lines, list) or not lines:
                return False
            texts += lines
    return all(isinstance(text, str) for text in texts)


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
    before = {file: [*lines] for file, lines in files.items()}
    originals = []
    for function in exercise.functions:
        lines = files[function.file]
        place = find(function, lines)
        hole = make_hole(exercise, function, lines, place)
        originals.append([*function, lines[place.first : place.end], hole])
        lines[place.first : place.end] = hole
    places = [find(function, files[function.file]) for function in exercise.functions]
    try:
        write_file(exercise.originals, [json.dumps(originals)])
        for file, lines in files.items():
            write_file(ROOT / file, lines)
    except BaseException:  # a full disk or Ctrl-C, say: it is not begun, then
        for file, lines in before.items():
            if read_lines(file) == files[file]:
                write_file(ROOT / file, lines)
        exercise.originals.unlink(missing_ok=True)
        raise
    command = f"python bench/exercise.py {exercise.number}"
    print(f"Exercise {exercise.number}: {exercise.title}. EXERCISES.md says more.\n")
    for function, place in zip(exercise.functions, places):
        print(f"  write    {function.name}, {function.file}:{place.first + 1}")
    print(f"  grade    {command} --check\n  give up  {command} --solution")


def check(exercise) -> int:
    """The exit status of its graders: 0 if all pass."""
    if not exercise.originals.exists():
        print(f"Exercise {exercise.number} is not begun: this grades the original.", flush=True)
    tests = [f"{TESTS}::{grader}" for grader in exercise.graders]
    # A line for each that fails: pytest's longer forms take most of a second for each.
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "--tb=line", *tests]
    output = None if sys.stdout else subprocess.DEVNULL  # pytest wants one
    status = subprocess.run(command, cwd=ROOT, stdout=output).returncode
    if status:
        print(f"\nMore about one of them: python -m pytest {TESTS}::NAME")
    return status


def put_back(exercise):
    """Its functions as they were; what stood there in their place is kept, unless it is nothing.
    Raises ValueError if it is not begun, or where a file cannot be read as Python."""
    if not exercise.originals.exists():
        said = f"exercise {exercise.number} is not begun: the original is in place"
        raise ValueError(said)
    originals = read_originals(exercise)
    files = {function.file: read_lines(function.file) for function, *_ in originals}
    attempt = []
    for function, original, hole in originals:
        lines = files[function.file]
        place = find(function, lines)
        current = lines[place.first : place.end]
        if [*map(bare, current)] not in ([*map(bare, original)], [*map(bare, hole)]):
            attempt += [f"# {function}\n", *current, "\n"]
        lines[place.first : place.end] = with_ends_of(lines, place, original, hole)
    if attempt:
        path = exercise.free_attempt()
        write_file(path, attempt)
    for file, lines in files.items():
        write_file(ROOT / file, lines)
    for file, lines in files.items():
        if read_lines(file) != lines:
            said = "something else changed it meanwhile; see that nothing is lost, and repeat this"
            raise ValueError(f"{file}: {said}")
    exercise.originals.unlink()
    print(f"Exercise {exercise.number}: the original is back.")
    if attempt:
        print(f"Your attempt is kept in {path.relative_to(ROOT)}.")


class Parser(argparse.ArgumentParser):
    """Brief with what it refuses, as bench/options.py is, which would import the project."""
    def error(self, message):
        said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        said = said if len(said) <= 200 else said[:199] + "…"
        # Not by `exit`, which needs a stderr: `print` does without, if that is closed.
        print(f"{self.prog}: error: {said}", file=sys.stderr)
        self.exit(2)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="exercise.py", description="Ten exercises: EXERCISES.md")
    parser.add_argument("number", nargs="?", help="of the exercise that is emptied (else: a list)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="run the tests that grade it")
    said = "put the original back; an attempt is kept"
    instead.add_argument("--solution", action="store_true", help=said)
    options = parser.parse_args(arguments)
    try:
        return do(options, read_exercises())
    except ValueError as error:
        parser.error(str(error))


def do(options, exercises) -> int:
    """What they ask for → the exit status. Raises ValueError for what cannot be done."""
    if options.number is None and not (options.check or options.solution):
        list_exercises(exercises)
        return 0
    by_number = {str(exercise.number): exercise for exercise in exercises}
    if options.number not in by_number:
        given = "no number" if options.number is None else repr(options.number)
        raise ValueError(f"{given[:80]}: an exercise from 1 to {len(exercises)} is expected")
    exercise = by_number[options.number]
    if options.check:
        return check(exercise)
    with alone():
        if options.solution:
            put_back(exercise)
        else:
            begin(exercise)
    return 0


def run() -> int:
    """`main` for a process → its exit status, whatever becomes of its output."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream]  # None: it is closed
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # if its encoding lacks a character
    try:
        status = main(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads the output left early, as `head` does
        return 1
    except OSError as error:  # a full disk, say
        said = f"error: {error}"
    except KeyboardInterrupt:
        said = "stopped by Ctrl-C"
    print(f"exercise.py: {said}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    status = run()
    if status == 0:
        sys.exit()
    os._exit(status)  # what could not be written is not tried again
