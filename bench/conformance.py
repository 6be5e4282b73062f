"""Does a port decide and compute what TokenLake does? Small fixed cases, in files for any language.

    python bench/conformance.py write DIR            # writes the cases; bench/vectors has them
    python bench/conformance.py check DIR            # compares this implementation with them
    python bench/conformance.py check DIR --answers FILE_OR_DIR     # compares a port's answers
    python bench/conformance.py check DIR --kind eviction,merge     # some kinds only
    python bench/conformance.py check DIR --case "merge/two parts"  # some cases only

A case needs nothing but its input: read it, decide, compare. A port may begin with any kind; of
`iteration` with `iteration/the plan of the docstring`, in which no KV moves. `check` says of each
kind how many cases agree, then of ten fields (with --all: of all) the first value that differs, and
how many do. This is format 1. A directory of vectors has

    README.md           this text, and a section for each kind
    format.json         {"format": 1, "cases": {KIND: number of cases}}
    KIND.json           {"format": 1, "kind": KIND, "cases": [case, ...]}
    KIND.safetensors    tensors of its cases, if there are any

and a case has

    name       KIND/what it is about; no two cases have the same
    shows      a sentence: what it is there for
    input      complete; the kind's section says what the fields are
    output     what is expected
    compare    of each field of the output how: "exactly"; "cost" (several answers are right, and
               cost the same: the kind's section says what costs); or {"within": t}: no number is
               farther than t from what is expected, infinite ones are the same
    because    where tolerances come from
    paged      true of cases of `partial_attention` that a kernel over paged blocks can do

**Numbers.** An integer of more than 53 bits is a string of its decimal digits; only tokens are so
large. A float is written so that it is the same again when it is read as a float64. A tensor is
`{"tensor": name, "dtype": "F32" or "BF16", "shape": [...]}`, and has this name in the safetensors
file: 8 bytes with the length n of the header, little-endian; n bytes of JSON, from name to dtype,
shape and data_offsets [begin, end), counted from behind the header; the data, row-major and
little-endian. BF16 is the upper half of a float32. NaN in a tensor stands for what must not be
used. A dimension may be 0.

**Units and index spaces.** There are N instances with S slots each, and C tokens in a segment. A
*global slot* is instance · S + slot, from 0 to N·S - 1. A *position* counts a request's tokens from
0; segment i of a request is positions i·C to (i + 1)·C - 1. Runs, shares, requests, parts and
batches are numbered from 0. Times are in ps, sizes in bytes of one layer, loads in rows · tokens. A
table is an object of columns, lists of one length; [n][N] is a list of n lists of N. T rows, H
query heads, Hkv KV heads, D values of a head. Sections (§) are of arXiv 2508.17219.

**A pool** is what a decision begins with:

    instances, slots, segment_tokens    N, S, C
    placement           "stripe" or "hash"
    replicate_factor    how many heavy hitters may be copied, see replication
    free                [N] lists of free global slots; the last of a list is taken first
    segments            published ones, parents first: id; parent, its id, null for a first one;
                        slots of its replicas, in the order made, one per instance at most; heat,
                        how often it was hit, less for what is long ago (see admission); touched,
                        the clock when it was last accessed
    lru                 ids of segments that nobody pins, oldest first
    extras              slots of replicas but for the first ones of segments, oldest first
    hits                sum of the heat of all hits, also those of segments that have left
    load                [N] attention done recently

A segment is in `lru` exactly if no request pins it. Those that pin the others need not be in the
case: what is not in `lru` keeps its first replica, whoever needs it. Only in `eviction` and
`admission` requests come and go; there nobody pins anything at first. A slot that is neither free
nor a segment's nor in the table of a request of the case is somebody else's, and stays so.

**A request** that runs:

    id
    length, prompt      its tokens in all, and those of its prompt
    ids                 of its full segments
    published           how many of these, the first ones, are in the pool; it pins them
    shared              how many of these, the first ones, other running requests pin, too
    table               global slots of its segments so far
    done                tokens whose KV is in the pool (one less than all of a prompt that is
                        cached entirely, whose last row is computed again)

**Answers** of a port are JSON lines, `{"case": name, "output": {field: value}}`, in a file, or in
all *.jsonl files of a directory. A tensor is a list of its numbers, nested or flat and row-major,
with "-inf", "inf" and "nan" as strings; or `{"tensor": name}`, of a *.safetensors file in that
directory, of real numbers. 1 and 1.0 are the same, true is neither. Fields that are not compared
may be there, too; cases that are not here may not, nor anything twice. The exit status is 0 if
all agree, 1 if something is missing or differs, 2 if the input is no good.

**Left out** is the digest of a plan, by which ranks find out that one has planned otherwise: it
hashes shapes, types and the order of this implementation's arrays (`pool.plan_digest`), so nobody
else can have the same, and nobody needs it: the ranks of a port may hash what they have. The plan
itself is compared, table by table, by `iteration`.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from inspect import cleandoc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import conformance_attention  # noqa: E402
import conformance_balance  # noqa: E402
import conformance_iteration  # noqa: E402
import conformance_placement  # noqa: E402
from conformance_cases import Case  # noqa: E402
from model import dtype_name, one_line, shown  # noqa: E402
from options import Parser, file_name, run_main  # noqa: E402

FORMAT = 1
KINDS = conformance_placement.KINDS | conformance_balance.KINDS
KINDS |= conformance_attention.KINDS | conformance_iteration.KINDS
WIDTH = 110  # of a line of JSON, where it can be cut
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
MOST_SAID = 10  # differences of a kind that are printed
# What an implementation raises on inputs that make no sense to it.
WRONG_INPUT = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Refused(Exception):
    """What is wrong with files that were given."""


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def expected_cases(name: str) -> list[Case]:
    """The cases of a kind, under full names, with what is expected."""
    kind = KINDS[name]
    expect = kind.expect or kind.answer
    return [
        case._replace(name=f"{name}/{case.name}", output=expect(case.input))
        for case in kind.cases()
    ]


def set_apart(value, name: str, tensors: dict):
    """The value with a reference in place of each tensor, which goes into `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.contiguous()
        return dict(tensor=name, dtype=DTYPES[value.dtype], shape=list(value.shape))
    if isinstance(value, dict):
        return {
            key: set_apart(part, f"{name}.{key}", tensors) for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [set_apart(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    return value


def layout(value, indent=0) -> str:
    """JSON that people read: what fits a line is one; else each part has one, or, of plain values,
    as many as fit."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(text) + indent <= WIDTH or not isinstance(value, (dict, list)):
        return text
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        lines = [
            f"{json.dumps(key)}: {layout(part, indent + 1)}"
            for key, part in value.items()
        ]
    else:
        lines = fill_lines([layout(part, indent + 1) for part in value], WIDTH - indent)
    opening, closing = text[0], text[-1]
    body = ",\n".join(inner + line for line in lines)
    return f"{opening}\n{body}\n{' ' * indent}{closing}"


def fill_lines(parts: list[str], width: int) -> list[str]:
    """Parts of a list, several in a line if they are plain."""
    lines: list[str] = []
    for part in parts:
        is_plain = part[0] not in "[{"
        if lines and is_plain and len(lines[-1]) + len(part) < width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return lines


def write_text(path: Path, text: str):
    path.write_text(text, encoding="utf-8", newline="\n")


def write_kind(folder: Path, name: str) -> int:
    """Its files; how many cases there are."""
    tensors: dict[str, torch.Tensor] = {}
    cases = []
    for case in expected_cases(name):
        fields = dict(
            name=case.name, shows=case.shows, input=case.input, output=case.output
        )
        listed = set_apart(fields, case.name, tensors) | dict(compare=case.compare)
        listed |= dict(because=case.because) if case.because else {}
        cases.append(listed | (dict(paged=True) if case.paged else {}))
    document = dict(format=FORMAT, kind=name, cases=cases)
    write_text(folder / f"{name}.json", layout(document) + "\n")
    if tensors:
        (folder / f"{name}.safetensors").write_bytes(save(tensors))
    return len(cases)


def readme() -> str:
    """This module's docstring, and that of each kind's answer."""
    pages = [
        f"## {name}\n\n{cleandoc(kind.answer.__doc__)}\n" for name, kind in KINDS.items()
    ]
    return "\n".join([f"# TokenLake's conformance vectors\n\n{__doc__}", *pages])


def write(folder: Path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        counts = {name: write_kind(folder, name) for name in KINDS}
        write_text(
            folder / "format.json", layout(dict(format=FORMAT, cases=counts)) + "\n"
        )
        write_text(folder / "README.md", readme())
    except OSError as error:
        raise Refused(f"{error.filename or folder}: {error.strerror}") from None
    print(
        f"{sum(counts.values())} cases of {len(counts)} kinds are in {one_line(folder)}"
    )


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Refused(f"{path}: not UTF-8; text is expected") from None


def parse(text: str, where) -> dict:
    try:
        value = json.loads(text, object_pairs_hook=object_of)
    except Refused as refused:
        raise Refused(f"{where}: {refused}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise Refused(f"{where}: a JSON object is expected")
    return value


def object_of(pairs: list[tuple]) -> dict:
    """Of JSON. Of two fields with the same name Python would take the last one."""
    value = {}
    for name, part in pairs:
        if name in value:
            raise Refused(f"{shown(name)} is twice in an object; once is expected")
        value[name] = part
    return value


def read_tensors(path: Path) -> dict:
    try:
        path.open("rb").close()  # safetensors does not say why it cannot
        return load_file(path)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise Refused(f"{path}: no safetensors ({error})") from None


def check_format(document: dict, path: Path):
    if document.get("format") != FORMAT:
        said = f"format {shown(document.get('format'))}; format {FORMAT} is expected"
        raise Refused(f"{path}: {said}")


def put_back_fields(fields: dict, tensors: dict, where: str) -> dict:
    """With their tensors. One may be named `tensor`."""
    return {field: put_back(value, tensors, where) for field, value in fields.items()}


def put_back(value, tensors: dict, where: str):
    """The value with its tensors."""
    if isinstance(value, list):
        return [put_back(part, tensors, where) for part in value]
    if not isinstance(value, dict):
        return value
    if "tensor" not in value:
        return {key: put_back(part, tensors, where) for key, part in value.items()}
    name = value["tensor"]
    if not isinstance(name, str) or name not in tensors:
        raise Refused(
            f"{where}: no safetensors file beside it has a tensor {shown(name)}"
        )
    return tensors[name]


def read_kind(folder: Path, name: str) -> list[Case]:
    path = folder / f"{name}.json"
    document = parse(read_text(path), path)
    check_format(document, path)
    beside = folder / f"{name}.safetensors"
    tensors = read_tensors(beside) if beside.exists() else {}
    cases = document.get("cases")
    if not isinstance(cases, list):
        raise Refused(f"{path}: no cases; a list of them is expected")
    return [
        case_of(listed, tensors, f"{path}: case {i}") for i, listed in enumerate(cases)
    ]


def case_of(listed, tensors: dict, where: str) -> Case:
    is_case = isinstance(listed, dict) and isinstance(listed.get("name"), str)
    fields = (
        [listed.get(field) for field in ("input", "output", "compare")] if is_case else []
    )
    if not fields or not all(isinstance(field, dict) for field in fields):
        raise Refused(
            f"{where}: an object with name, input, output and compare is expected"
        )
    given, output, compare = (put_back_fields(part, tensors, where) for part in fields)
    for field, how in compare.items():
        if field not in output or not can_be_compared(output[field], how):
            raise Refused(f"{where}: {shown(field)} cannot be compared by {shown(how)}")
    shows, because = (str(listed.get(field, "")) for field in ("shows", "because"))
    return Case(listed["name"], shows, given, compare, because, output=output)


def can_be_compared(expected, how) -> bool:
    if not isinstance(how, dict):
        return how in ("exactly", "cost")
    tensors = expected if isinstance(expected, list) else [expected]
    within = how.get("within")
    is_number = isinstance(within, (int, float)) and 0 <= within < math.inf
    return is_number and all(isinstance(each, torch.Tensor) for each in tensors)


def kind_of(case: Case) -> str:
    return case.name.partition("/")[0]


def read_vectors(folder: Path) -> dict[str, list[Case]]:
    """All cases, by kind."""
    path = folder / "format.json"
    document = parse(read_text(path), path)
    check_format(document, path)
    cases = {name: read_kind(folder, name) for name in KINDS}
    counts = {name: len(its) for name, its in cases.items()}
    if document.get("cases") != counts:
        raise Refused(f"{path}: the files have other numbers of cases: {shown(counts)}")
    names = set()
    for kind, its in cases.items():
        for case in its:
            if kind_of(case) != kind or case.name in names:
                said = f"{shown(case.name)}; names {kind}/NAME, each once, are expected"
                raise Refused(f"{folder / kind}.json: {said}")
            names.add(case.name)
    return cases


def read_answers(path: Path) -> dict[str, dict]:
    """Outputs by the names of their cases."""
    files = [path]
    tensors = {}
    if os.path.isdir(path):  # unlike Path's, it takes any name
        files = sorted(path.glob("*.jsonl"))
        tensors = read_all_tensors(sorted(path.glob("*.safetensors")))
    if not files:
        raise Refused(f"{path}: no *.jsonl file is there")
    answers: dict[str, dict] = {}
    for file in files:
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if line.strip():
                name, output = answer_of(line, tensors, f"{file}:{number}")
                if name in answers:
                    raise Refused(f"{file}:{number}: {shown(name)} has an answer already")
                answers[name] = output
    return answers


def read_all_tensors(paths: list[Path]) -> dict:
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise Refused(f"{path}: another file has a tensor {shown(name)}, too")
            tensors[name] = tensor
    return tensors


def answer_of(line: str, tensors: dict, where: str) -> tuple[str, dict]:
    """The name of a case, and the output that a line has for it."""
    answer = parse(line, where)
    name = answer.get("case")
    output = answer.get("output")
    if not isinstance(name, str) or not isinstance(output, dict):
        raise Refused(f'{where}: {{"case": name, "output": {{...}}}} is expected')
    return name, put_back_fields(output, tensors, where)


# ── comparing ────────────────────────────────────────────────────────────────────────────────────


class Unlike(Exception):
    """Where two values do not have the same parts."""


def places_of(path: str, expected, found) -> Iterator[tuple]:
    """Of each plain value of `expected`: its path, itself, and what `found` has there."""
    if isinstance(expected, torch.Tensor):
        yield from numbers_at(path, expected, found)
        return
    found = listed(path, found)
    if not isinstance(expected, (dict, list, tuple)):
        yield path, expected, found
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key, part in expected.items():
            if key not in found:
                raise Unlike(f"{path}.{key} is missing")
            yield from places_of(f"{path}.{key}", part, found[key])
    elif isinstance(expected, dict) or not isinstance(found, (list, tuple)):
        kind = "an object" if isinstance(expected, dict) else "a list"
        raise Unlike(f"{path} is {shown(found)}; {kind} of {len(expected)} is expected")
    elif len(expected) != len(found):
        raise Unlike(f"{path} has {len(found)} entries; {len(expected)} are expected")
    else:
        for i, parts in enumerate(zip(expected, found)):
            yield from places_of(f"{path}[{i}]", *parts)


def listed(path: str, found):
    """A tensor as lists; what is none, as it is."""
    if not isinstance(found, torch.Tensor):
        return found
    said = f"{path} is a tensor of {dtype_name(found.dtype)}; real numbers are expected"
    if found.is_complex():
        raise Unlike(said)
    try:
        return found.tolist()
    except RuntimeError:  # two numbers in a byte, say
        raise Unlike(said) from None


def numbers_at(path: str, expected: torch.Tensor, found) -> Iterator[tuple]:
    """The same of a tensor, which may be a list, flat or of its shape."""
    found = listed(path, found)
    is_nested = isinstance(found, list) and any(isinstance(part, list) for part in found)
    values = flatten(path, found, expected.shape if is_nested else [expected.numel()])
    try:
        numbers = [number_of(value) for value in values]
    except (TypeError, OverflowError):
        raise Unlike(f"{path} is {shown(found)}; numbers are expected") from None
    rights = expected.double().flatten().tolist()
    for index, right, number in zip(np.ndindex(expected.shape), rights, numbers):
        yield f"{path}[{', '.join(map(str, index))}]", right, number


def flatten(path: str, found, shape: Sequence[int]) -> list:
    """What is in a list that is nested by the shape."""
    if not shape:
        return [found]
    if not isinstance(found, list):
        raise Unlike(f"{path} is {shown(found)}; a list of numbers is expected")
    if len(found) != shape[0]:
        parts = "numbers" if len(shape) == 1 else "entries"
        raise Unlike(f"{path} has {len(found)} {parts}; {shape[0]} are expected")
    parts = [flatten(f"{path}[{i}]", part, shape[1:]) for i, part in enumerate(found)]
    return [value for part in parts for value in part]


def number_of(value) -> float:
    """Of JSON, which has no infinite ones. Raises TypeError."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number and value not in ("inf", "-inf", "nan"):
        raise TypeError(f"{shown(value)} is no number")
    return float(value)


def is_same(right, value) -> bool:
    """1 is 1.0, but not true, though it is so in Python."""
    return right == value and isinstance(right, bool) == isinstance(value, bool)


def difference(path: str, how, expected, found) -> str | None:
    """The first place where a field is not as expected, and how many there are; None: it is."""
    try:
        places = list(places_of(path, expected, found))
    except Unlike as unlike:
        return str(unlike)
    if how == "exactly":
        wrong = [
            f"{place} is {shown(value)}; {shown(right)} is expected"
            for place, right, value in places
            if not is_same(right, value)
        ]
    else:
        within = how["within"]
        wrong = [
            f"{place} is {number:.9g}; {right:.9g} is expected, within {within:g}"
            for place, right, number in places
            if not (right == number or abs(right - number) <= within)
        ]
    if not wrong:
        return None
    count = f" ({len(wrong)} of {len(places)} values differ)" if len(places) > 1 else ""
    return wrong[0] + count


def cost_difference(path: str, case: Case, field: str, found) -> str | None:
    """Whether an answer costs something else than what is expected, or is not allowed."""
    cost = KINDS[kind_of(case)].cost
    try:
        least = cost(case.input, case.output[field])
    except WRONG_INPUT as error:
        raise Refused(f"case {shown(case.name)}: {field} has no cost ({error})") from None
    try:
        costs = cost(case.input, listed(path, found))
    except Unlike as unlike:
        return str(unlike)
    except WRONG_INPUT as error:
        return f"{path} is {shown(found)} ({error})"
    return None if costs == least else f"{path} costs {costs}; {least} is expected"


def problems_of(case: Case, output: dict) -> dict[str, str]:
    """A line for each field that is not as expected."""
    problems = {}
    for field, how in case.compare.items():
        path = f"{case.name}: {field}"
        if field not in output:
            problem = f"{path} is missing"
        elif how == "cost":
            problem = cost_difference(path, case, field, output[field])
        else:
            problem = difference(path, how, case.output[field], output[field])
        problems |= {field: problem} if problem else {}
    return problems


def our_problems(case: Case) -> dict[str, str]:
    """With this implementation's answer, if it has any."""
    try:
        output = KINDS[kind_of(case)].answer(case.input)
    except WRONG_INPUT as error:
        return {"": f"{case.name}: no answer ({type(error).__name__}: {error})"}
    return problems_of(case, output)


def notes_on(case: Case, problems: dict[str, str]) -> list[str]:
    """What may help whoever looks for the reason."""
    notes = [f"shows: {case.shows}"]
    has_tolerance = any(isinstance(case.compare.get(field), dict) for field in problems)
    if has_tolerance and case.because:
        notes.append(f"because: {case.because}")
    return notes


class Compared(NamedTuple):
    """Of a kind."""
    cases: int
    missing: list[str]  # names of cases
    wrong: list[tuple[Case, dict[str, str]]]  # and their problems

    @property
    def agree(self) -> int:
        return self.cases - len(self.missing) - len(self.wrong)


def compare_kind(cases: list[Case], answers: dict[str, dict] | None) -> Compared:
    """With our answers, if there are no others."""
    missing = []
    wrong = []
    for case in cases:
        if answers is None:
            problems = our_problems(case)
        elif case.name in answers:
            problems = problems_of(case, answers[case.name])
        else:
            missing.append(case.name)
            continue
        if problems:
            wrong.append((case, problems))
    return Compared(len(cases), missing, wrong)


def print_compared(kind: str, compared: Compared, most: int):
    """most: differences that are said."""
    missing = f", {len(compared.missing)} missing" if compared.missing else ""
    print(
        f"{kind.replace('_', ' ')}: {compared.agree} of {compared.cases} agree{missing}"
    )
    said = 0
    for case, problems in compared.wrong:
        lines = [*problems.values()][: most - said]
        said += len(lines)
        for line in lines:
            print(f"  {one_line(line)}")
        for note in notes_on(case, problems) if lines else []:
            print(f"    {one_line(note)}")
    names = compared.missing[: most - said]
    for name in names:
        print(f"  {one_line(name)} is missing")
    every = sum(len(problems) for _, problems in compared.wrong) + len(compared.missing)
    left = every - said - len(names)
    if left:
        print(f"  and {left} more; --all shows them")


def select_cases(cases: dict, kinds: list[str], names: list[str]) -> dict:
    """Cases of these kinds, by kind; of these names, if there are any."""
    chosen = {kind: cases[kind] for kind in kinds}
    if not names:
        return chosen
    known = [case.name for its in chosen.values() for case in its]
    unknown = [name for name in names if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, 1, 0)
        such = "".join(f", as {shown(name)}" for name in near)
        raise Refused(f"--case {shown(unknown[0])}: a case's name is expected{such}")
    chosen = {
        kind: [case for case in its if case.name in names] for kind, its in chosen.items()
    }
    return {kind: its for kind, its in chosen.items() if its}


def check(folder: Path, kinds, names, answers_at: Path | None, most: int) -> int:
    """Exit status. kinds, names, most: see `select_cases` and `print_compared`."""
    cases = read_vectors(folder)
    chosen = select_cases(cases, kinds, names)
    answers = read_answers(answers_at) if answers_at else None
    every = {case.name for its in cases.values() for case in its}
    unknown = [name for name in answers or () if name not in every]
    if unknown:
        raise Refused(f"{answers_at}: {shown(unknown[0])} is no case of {folder}")
    status = 0
    for kind, its in chosen.items():
        compared = compare_kind(its, answers)
        print_compared(kind, compared, most)
        if compared.agree < compared.cases:
            status = 1
    return status


# ── the program ──────────────────────────────────────────────────────────────────────────────────


def split_list(text: str) -> list[str]:
    """Of an option: what stands between its commas."""
    return [part.strip() for part in text.split(",")]


def kinds_of(text: str) -> list[str]:
    """What --kind says."""
    unknown = [kind for kind in split_list(text) if kind not in KINDS]
    if unknown:
        raise Refused(
            f"--kind {shown(unknown[0])}: some of {', '.join(KINDS)} are expected"
        )
    return split_list(text)


def main(arguments: list[str]) -> int:
    parser = Parser(description="Write conformance vectors, or compare with them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="write|check")
    writes = commands.add_parser("write", help="write the cases into DIR")
    writes.add_argument("folder", metavar="DIR", type=file_name)
    checks = commands.add_parser("check", help="compare with the cases in DIR")
    checks.add_argument("folder", metavar="DIR", type=file_name)
    answers = "a port's, in place of this implementation's: JSON lines, or a directory"
    checks.add_argument("--answers", type=file_name, metavar="FILE_OR_DIR", help=answers)
    every = ",".join(KINDS)
    checks.add_argument("--kind", default=every, help=f"some of {every}")
    one = "a case by its name, or several, with commas between; may be given again"
    checks.add_argument("--case", default=[], action="append", metavar="NAME", help=one)
    most = f"say all that differs, not only {MOST_SAID} differences of a kind"
    checks.add_argument("--all", action="store_true", help=most)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = Path(options.folder)
    try:
        if options.command == "check":
            answers_at = options.answers and Path(options.answers)
            names = [name for text in options.case for name in split_list(text)]
            most = sys.maxsize if options.all else MOST_SAID
            return check(folder, kinds_of(options.kind), names, answers_at, most)
        write(folder)
    except Refused as refused:
        parser.refuse(refused)
    except RecursionError:
        parser.refuse("a value of the cases or answers is nested too deep")
    return 0


if __name__ == "__main__":
    run_main(main)
