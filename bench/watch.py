"""A lake to look at: plans.jsonl, which `run_cluster.py --record` has written, as a page.

    torchrun --standalone --nproc-per-node=4 run_cluster.py --record 40 --output out
    python bench/watch.py out          # writes out/lake.html, for any browser

The page is one file, watch.html beside this program with the data in it: no network, no library. It
shows iteration by iteration what lies in each slot, what is read, and what travels. Here the plans
are packed, as a line of plans.jsonl says for each request in full what it reads, and the page has
to open at once:

    slots      what changes from one iteration to the next (the page keeps copies of all to step back)
    reads      how many segments, and the last one that is published: the tree has those before it,
               and only slots other than a segment's first are listed
    trips      rows, by kind, request, source and target: bytes follow from these
"""

import json
import math
import sys
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from options import MOST_SEGMENTS, Parser, file_name, run_main, warn, wording  # noqa: E402
from record import FILE_NAME, VERSION, WHY, plural  # noqa: E402

PAGE = "lake.html"
TEMPLATE = HERE / "watch.html"
MARK = '"the data"'  # in the template: where they go
KINDS = list(WHY)  # trips name theirs by its number
# Of the first line: what has to be an integer above 0, and what is text.
COUNTS = "instances slots segment_tokens layers query_bytes kv_bytes".split()
TEXTS = "model dtype scheduler placement trace command".split()
MOST_COUNTED = 2**53 - 1  # JavaScript's numbers have all integers up to here
FREE = 0  # what a slot holds; a segment: its number; a request's own: −1 − its id


def read_plans(path: Path) -> tuple[dict, list[dict]]:
    """The first line, and those of the iterations. A torn last line is dropped, with a warning.
    Raises ValueError."""
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except OSError as error:
        said = "run_cluster.py --record K --output DIR writes it"
        raise ValueError(f"{path}: {error.strerror} ({said})") from None
    torn_at = f"{path}:{len(lines) + 1}: the line is torn"
    if torn and len(lines) < 2:
        missing = "an iteration, at least one," if lines else "a whole one for the run"
        raise ValueError(f"{torn_at}; {missing} is expected")
    parsed = [parse_line(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]
    if not parsed:
        raise ValueError(f"{path}: it is empty; a line for the run is expected")
    header, *records = parsed
    check_header(header, f"{path}:1")
    for number, record in enumerate(records, 1):
        if record.get("iteration") != number:
            raise ValueError(f"{path}:{number + 1}: iteration {number} is expected")
    if not records:
        raise ValueError(f"{path}: it has no iteration; one at least is expected")
    if torn:
        warn(f"{torn_at}, and dropped")
    return header, records


def parse_line(line: bytes, where: str) -> dict:
    try:
        value = json.loads(line, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object of finite numbers")
    return value


def finite(text: str) -> float:
    """Python reads NaN and 1e999, but no browser reads what is made of them."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def check_header(header: dict, where: str):
    """Raises ValueError if it is not what record.describe_run gives."""
    shown = wording().shown
    version = header.get("version")
    if version != VERSION:
        said = f"version {shown(version)}; {VERSION} is expected (record it again)"
        raise ValueError(f"{where}: {said}")
    for field in COUNTS:
        count = header.get(field)
        if type(count) is not int or not 1 <= count <= MOST_COUNTED:
            said = f"{field} {shown(count)}; an integer from 1 to {MOST_COUNTED} is expected"
            raise ValueError(f"{where}: {said}")
    for field in TEXTS:
        if not isinstance(header.get(field), str):
            raise ValueError(f"{where}: {field} {shown(header.get(field))}; text is expected")
    slots = header["instances"] * header["slots"]
    if slots > MOST_SEGMENTS:
        said = f"the pool has {slots:,} slots; at most {MOST_SEGMENTS:,} are expected"
        raise ValueError(f"{where}: {said}")


# ── packed: what the page needs, in few bytes ────────────────────────────────────────────────────


class Slots:
    """What lies in the slots, from iteration to iteration."""
    def __init__(self):
        self.held: dict[int, int] = {}  # by global slot, of those that were ever filled
        self.copies: set[int] = set()  # slots of replicas but the first
        self.first_slot: dict[int, int] = {}  # by segment

    def apply(self, record) -> dict[int, int]:
        """The slots that change, and what they hold then."""
        changes = dict.fromkeys(record["freed"], FREE)
        for event in record["published"]:
            changes[event["slot"]] = event["segment"]
            self.first_slot[event["segment"]] = event["slot"]
        self._fill(changes)
        changes |= dict.fromkeys((event["slot"] for event in record["evicted"]), FREE)
        for event in record["reserved"]:
            changes[event["slot"]] = -1 - event["request"]
        self._fill(changes)
        for move in record["moves"]:
            if move["kind"] == "replica":
                copied, filled = move["slots"]
                changes[filled] = self.held[copied]
                self.held[filled] = self.held[copied]
                self.copies.add(filled)
        return changes

    def _fill(self, changes):
        self.held.update(changes)
        self.copies -= changes.keys()


def pack(header: dict, records: list[dict]) -> dict:
    """The page's data. Lists of numbers are flat: entries of a few numbers one after another."""
    slots = Slots()
    parents = [0]  # of each segment, by number
    depths = [0]
    iterations = []
    for record in records:
        for event in record["published"]:
            # A segment that comes back after its eviction is there already.
            if event["segment"] == len(parents):
                parents.append(event["parent"] or 0)
                depths.append(event["depth"])
        changes = slots.apply(record)
        iterations.append(pack_iteration(record, changes, slots, depths))
    used = max((slot % header["slots"] for slot in slots.held), default=0) + 1
    return dict(
        run=header,
        kinds=[dict(key=key, name=name, why=why) for key, (name, why) in WHY.items()],
        used=used,  # slots of an instance: no later one is ever filled
        parents=parents,
        requests=[
            [came["request"], came["prompt"], came["most"]]
            for record in records
            for came in record["arrived"]
        ],
        iterations=iterations,
    )


def pack_iteration(record, changes, slots, depths) -> dict:
    filled = [slot for slot in changes if slot in slots.copies]
    trips = [dict(trip, kind="query") for trip in record["queries"]] + record["moves"]
    return dict(
        clock=round(record["clock_s"], 4),
        slots=flat(changes.items()),
        copies=filled,
        evicted=[event["slot"] for event in record["evicted"]],
        evictions=record["evictions"],
        published=[event["segment"] for event in record["published"]],
        running=record["running"],
        waiting=record["waiting"],
        came=[event["request"] for event in record["arrived"]],
        admitted=flat((event["request"], event["done"]) for event in record["admitted"]),
        ended=record["ended"],
        preempted=record["preempted"],
        runs=flat(map(pack_run, record["runs"])),
        reads=[pack_read(read, slots, depths) for read in record["reads"]],
        trips=flat(map(pack_trip, trips)),
        balance=flat((b["rows"], b["reads"], b["free"]) for b in record["balance"]),
    )


def flat(entries) -> list[int]:
    return list(chain.from_iterable(entries))


def pack_run(run) -> tuple:
    flags = run["puts"] + 2 * run["decode"]
    return *(run[key] for key in "request position rows instance slot".split()), flags


def pack_trip(trip) -> tuple:
    request = -1 if trip["request"] is None else trip["request"]
    return KINDS.index(trip["kind"]), request, trip["source"], trip["target"], trip["rows"]


def pack_read(read, slots, depths) -> list[int]:
    """Request, instance, tokens, the last published segment (0: none), and pairs: the index of a
    segment, and its slot, where that is not the segment's first."""
    held = [slots.held.get(slot, FREE) for slot in read["slots"]]
    published = [segment for segment in held if segment > 0]
    last = published[-1] if published else 0
    usual = [slots.first_slot[segment] for segment in published]
    usual += [None] * (len(held) - len(usual))
    others = [
        (index, slot)
        for index, (slot, first) in enumerate(zip(read["slots"], usual))
        if slot != first
    ]
    if last and depths[last] != len(published):
        raise ValueError(f"what request {read['request']} reads is not a path in the tree")
    return [read["request"], read["instance"], read["tokens"], last, *flat(others)]


def write_page(data: dict, path: Path):
    """The template, with the data in it. No text of theirs can end their element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace(MARK, text)
    path.write_text(page, encoding="utf-8")


def main(arguments: list[str]):
    parser = Parser(description=f"Make {PAGE} of a folder's {FILE_NAME}.")
    told = "folder that run_cluster.py --record K --output DIR has written"
    parser.add_argument("folder", metavar="DIR", type=file_name, help=told)
    folder = Path(parser.parse_args(arguments).folder)
    path = folder / FILE_NAME
    try:
        header, records = read_plans(path)
        try:
            data = pack(header, records)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            said = f"not plans of version {VERSION} ({type(error).__name__}: {error})"
            raise ValueError(f"{path}: {said}") from None
        write_page(data, folder / PAGE)
    except ValueError as error:
        parser.refuse(error)
    except OSError as error:
        parser.refuse(f"{folder / PAGE}: {error.strerror}")
    size = (folder / PAGE).stat().st_size
    print(f"{folder / PAGE}: {plural(len(records), 'iteration')}, {size / 1000:,.0f} kB")


if __name__ == "__main__":
    run_main(main)
