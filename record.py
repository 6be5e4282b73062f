"""What was planned, for people: the plan of an iteration as JSON, and as text.

    scheduler, planner ─▶ Observer ─▶ a record of each iteration ─▶ plans.jsonl ─▶ bench/watch.py
                                                          └────────▶ explain: text

A plan is the same on every rank, so rank 0 tells it for all. The observer looks at the pool twice
an iteration, before it is planned and after, and compares: what the iteration before has published
and freed is new at the first look, what was evicted, reserved and copied at the second.

plans.jsonl begins with a line for the run:

    version          of this format: 1
    instances        N
    slots            S, of an instance; a *global slot* is instance · S + slot
    segment_tokens   C
    layers           of the model
    query_bytes      of a row's query and its result, over all layers
    kv_bytes         of a token's KV, over all layers
    model            what --model names, or built-in
    dtype            of its weights and KV
    scheduler        --scheduler
    placement        --placement
    trace            what --trace names, or the demo
    command          that was typed

Then each iteration has a line, when it has been computed:

    iteration        its number, from 1
    clock_s          when it was announced: s since the start, by rank 0's clock
    running          requests that run, by admission
    waiting          how many wait: for slots, or for a prefix that another computes
    arrived          requests that came since the iteration before:
      request          its number in the trace, from 0
      prompt           tokens of its prompt
      most             tokens of prompt and answer, at most
    admitted         requests that run from now on:
      request
      done             tokens that it found in the pool
    preempted        requests that gave up their slots, and start over; also one that had just been
                     admitted
    ended            requests that have left since the iteration before
    dropped          requests that had ended when this was computed: what it gives them is dropped
    published        segments that others can hit from now on:
      segment          its number, by first publication, from 1; equal tokens have equal numbers
      parent           the segment before it; null: it begins a prompt
      depth            segments from the beginning of the prompt to it
      slot             global slot
      request          that has filled it
    reserved         slots that requests took for what they write:
      request
      index            which segment of the request, from 0
      slot             global slot
    evicted          what left the pool for others:
      segment
      slot             global slot
      replica          whether that was a copy, of a segment that stays
    freed            global slots that requests gave back, and that are free
    evictions        how many were evicted: those above, and copies that were given up for others
                     before they were made
    runs             rows of one request within one segment, by who computes them:
      request
      position         in the request, of the first row
      rows
      instance         that computes them
      slot             global slot of the segment
      home             instance of that slot, where their KV will live
      puts             false: the segment is published already, the row only wants its logits
      decode           whether it is the one row of a decode. (After a preemption rows of an answer
                       are computed again as those of a prompt are)
    reads            old KV that is read: an entry for each request and each instance that computes
                     rows of it. All these rows read all of it
      request
      instance         that computes the rows
      tokens           of old KV
      slots            global slots of its segments, in order; a row is read where they lie …
      pulled           … but for these of the segments, by index: they come to the instance
      copies           segments, by index, that are not read in their first slot, but in a copy
    fresh            KV that is written in this iteration and read in it:
      writer           index into runs
      readers          the same: itself, and later ones of its request
      instance         where they meet
      place            here: in the slab there, at once; late: there, once moves have landed;
                       sibling: it was sent to the reader
    queries          rows that travel to KV; results come back:
      request
      source           instance that computes the rows
      target           instance that holds KV
      rows
      bytes            of queries and results, over all layers
    moves            KV that travels:
      kind             pull: old KV, to who reads it in this iteration; sibling: new KV, to rows of
                       the same prompt on another instance; put: new KV, to its home; replica: a
                       copy
      request          null for a replica
      source           instance
      target           instance
      slots            global slots of its segments; of a replica the one it is copied from, and to
      rows             tokens
      bytes            over all layers
    balance          by instance:
      rows             that it computes
      reads            tokens of old KV that it gives to requests, once for each
      tokens_read      tokens of KV that it reads, what several share once
      load             its attention: rows × tokens, see QueryPlan.load
      free             slots

What lies in the slots of an iteration is what lay in those before, but for what it names: freed,
published, evicted and reserved slots, and those that moves of kind replica fill, in this order.
"""

import json
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

import numpy as np

from balancer import Segment
from model import dtype_name
from pool import HERE, LATE, MOVE_KINDS, REPLICA, SIBLING
from work import select

VERSION = 1
FILE_NAME = "plans.jsonl"
RUN_KEYS = ("request", "position", "rows", "instance", "slot", "home", "puts", "decode")
PLACES = {HERE: "here", LATE: "late", SIBLING: "sibling"}


def describe_run(lake, model_dtype, options) -> dict:
    """The first line of plans.jsonl. options: of run_cluster.py."""
    N, S, C = lake.balancer.sizes
    layers = lake.llama_config.num_layers
    return dict(
        version=VERSION,
        instances=N,
        slots=S,
        segment_tokens=C,
        layers=layers,
        query_bytes=layers * lake.query_bytes,
        kv_bytes=layers * lake.kv_bytes,
        model=str(options.model or "built-in"),
        dtype=dtype_name(model_dtype),
        scheduler=options.scheduler,
        placement=lake.config.placement,
        trace=str(options.trace or "the demo"),
        command=options.command,
    )


class PlansFile:
    """plans.jsonl, which begins anew with the first record: so a run without iterations leaves the
    file of an earlier one. Each write leaves a whole line, or is the last."""
    def __init__(self, folder: Path, header: dict):
        self.path = folder / FILE_NAME
        self.header = header
        self._file = None

    def append(self, record: dict):
        """Raises OSError."""
        if self._file is None:
            self._file = open(self.path, "w")
            self._write(self.header)
        self._write(record)

    def _write(self, value):
        """A line at a time, so that who reads along sees it."""
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")
        self._file.flush()


# ── what happened: the pool before and after ─────────────────────────────────────────────────────


def owners_of_slots(balancer, running) -> dict:
    """Global slot → the Segment that lies there, or (request id, index) of a segment that belongs
    to a request alone. Free slots are left out."""
    owners = {}
    for segment in balancer.tree.segments.values():
        owners.update(dict.fromkeys(segment.replicas.values(), segment))
    for request in running:
        published = len(request.segments)
        own = request.table[published : request.num_slots].tolist()
        for index, slot in enumerate(own, published):
            owners[slot] = (request.id, index)
    return owners


class Observer:
    """Makes a record of each iteration, and hands it to `take` when it has been computed. The
    engine calls `look`, `see` and `tell`, in this order."""
    def __init__(self, scheduler, take):
        self.scheduler = scheduler
        self.lake = scheduler.lake
        self.take = take
        self.numbers = {}  # of segments, by id
        self.owners = {}  # of slots, at the last look
        self.were_running = {}  # requests by id, at the last look
        self.were_waiting = {}
        self.record = None  # of what was planned last
        self._begin()

    def _begin(self):
        """What happened since the last iteration with rows."""
        names = "arrived admitted preempted ended published reserved evicted freed".split()
        self.events = {name: [] for name in names}
        self.evictions = self.lake.balancer.evictions

    def look(self):
        """Before an iteration is planned: at what the one before has left."""
        self._compare_slots()
        self._compare_requests()

    def see(self, iteration: int, plan, transfer_plan):
        """It is planned. If it has no rows, what happened is told with the next one."""
        scheduler = self.scheduler
        self.events["preempted"] += scheduler.preempted
        self._compare_requests()
        # Without rows nothing is copied.
        self._compare_slots(self.lake.balancer.copying if plan.runs else ())
        if not plan.runs:
            return
        self.record = dict(
            iteration=iteration,
            clock_s=None,
            running=[request.id for request in scheduler.running],
            waiting=len(scheduler.waiting),
            **self.events,
            dropped=[],
            evictions=self.lake.balancer.evictions - self.evictions,
            **describe_plan(plan, transfer_plan, self.lake),
        )
        self._begin()

    def tell(self, clock: int, dropped):
        """It has been computed. clock: ns, when it began; dropped: ids of requests that had
        ended."""
        self.record["clock_s"] = clock / 1e9
        in_plan = {run["request"] for run in self.record["runs"]}
        self.record["dropped"] = sorted(in_plan.intersection(dropped))
        self.take(self.record)

    def _compare_requests(self):
        """Who came, was admitted, has ended."""
        events = self.events
        running = {request.id: request for request in self.scheduler.running}
        waiting = {request.id: request for request in self.scheduler.waiting}
        were_here = self.were_running | self.were_waiting
        are_here = running | waiting
        for id, request in are_here.items():
            if id not in were_here:
                most = request.max_tokens
                events["arrived"].append(
                    dict(request=id, prompt=request.num_prompt, most=most)
                )
        for id, request in running.items():
            if id not in self.were_running:
                events["admitted"].append(dict(request=id, done=request.done))
        events["ended"] += [id for id in were_here if id not in are_here]
        self.were_running = running
        self.were_waiting = waiting

    def _compare_slots(self, filled=()):
        """What was published, reserved, evicted, freed. filled: slots that get a copy; that may be
        of what lay there, too, if it was evicted for another first."""
        were = self.owners
        owners = owners_of_slots(self.lake.balancer, self.scheduler.running)
        changed = [slot for slot, owner in owners.items() if were.get(slot) != owner]
        for slot in sorted(were):
            owner = None if slot in filled else owners.get(slot)
            self._left(slot, were[slot], owner)
        for slot in changed:
            self._came(slot, owners[slot], were.get(slot))
        self.owners = owners

    def _left(self, slot, was, owner):
        """What a slot held, if that is gone."""
        if isinstance(was, Segment) and owner is not was:
            remains = self.lake.balancer.tree.segments.get(was.id) is was
            number = self.numbers[was.id]
            self.events["evicted"].append(
                dict(segment=number, slot=slot, replica=remains)
            )
        elif owner is None:
            self.events["freed"].append(slot)

    def _came(self, slot, owner, was):
        """What a slot holds, if that is new. Copies are among the moves."""
        if not isinstance(owner, Segment):
            id, index = owner
            self.events["reserved"].append(dict(request=id, index=index, slot=slot))
        elif slot == owner.slot:
            # A segment is published where its request has filled it.
            request, _ = was
            number = self.numbers.setdefault(owner.id, len(self.numbers) + 1)
            self.events["published"].append(
                dict(
                    segment=number,
                    parent=self.numbers.get(owner.parent.id),
                    depth=owner.depth,
                    slot=slot,
                    request=request,
                )
            )


# ── what was planned ─────────────────────────────────────────────────────────────────────────────


def describe_plan(plan, transfer_plan, lake) -> dict:
    """The keys of a record that say who computes what, what is read where, what travels."""
    layers = lake.llama_config.num_layers
    return dict(
        runs=list_runs(plan),
        reads=list_reads(plan),
        fresh=list_fresh(plan),
        queries=list_queries(plan, layers * lake.query_bytes),
        moves=list_moves(plan, transfer_plan, layers * lake.kv_bytes),
        balance=list_balance(plan, lake.balancer),
    )


def request_of_share(plan) -> np.ndarray:
    """[G] ids."""
    request = np.zeros(len(plan.old.tokens), np.int64)
    request[plan.run_table.share] = plan.run_table.request_id
    return request


def list_runs(plan) -> list[dict]:
    table = plan.run_table
    where = table.instance, table.slot, table.home
    columns = table.request_id, table.position, table.rows, *where
    columns = *columns, table.puts > 0, table.decode > 0
    return [dict(zip(RUN_KEYS, values)) for values in zip(*(c.tolist() for c in columns))]


def list_reads(plan) -> list[dict]:
    reads = plan.segment_reads
    pulled = plan.old.pulled
    replicas = plan.old.replicas
    tables = plan.old.tables
    places = zip(replicas.share.tolist(), replicas.segment.tolist())
    first_slots = np.array([tables[share][index] for share, index in places], np.int64)
    copies = select(replicas, replicas.slot != first_slots)
    request = request_of_share(plan).tolist()
    instance = plan.instance_of_share.tolist()
    tokens = plan.old.tokens.tolist()
    # Entries of a share stand side by side.
    first = np.searchsorted(reads.share, np.arange(len(tokens) + 1))
    return [
        dict(
            request=request[share],
            instance=instance[share],
            tokens=tokens[share],
            slots=reads.slot[first[share] : first[share + 1]].tolist(),
            pulled=pulled.segment[pulled.share == share].tolist(),
            copies=copies.segment[copies.share == share].tolist(),
        )
        for share in np.flatnonzero(plan.old.tokens).tolist()
    ]


def list_fresh(plan) -> list[dict]:
    """By writer and place."""
    fresh = plan.fresh
    columns = fresh.reader, fresh.writer, fresh.instance, fresh.place
    readers = defaultdict(list)
    for reader, *meeting in zip(*(c.tolist() for c in columns)):
        readers[tuple(meeting)].append(reader)
    return [
        dict(writer=writer, readers=readers[key], instance=instance, place=PLACES[place])
        for key in readers
        for writer, instance, place in [key]
    ]


def list_queries(plan, query_bytes) -> list[dict]:
    """By request, source and target."""
    table = plan.run_table
    run, target = np.nonzero(plan.ships)
    trips = zip(table.request_id[run].tolist(), table.instance[run].tolist(), target.tolist())
    rows = Counter()
    for trip, count in zip(trips, table.rows[run].tolist()):
        rows[trip] += count
    return [
        dict(request=request, source=source, target=target, rows=n, bytes=n * query_bytes)
        for (request, source, target), n in sorted(rows.items())
    ]


def list_moves(plan, transfer_plan, kv_bytes) -> list[dict]:
    """By kind, request, source and target; each replica for itself."""
    slots = defaultdict(list)  # by these
    rows = Counter()
    for trip, slot, count in chain_moves(plan, transfer_plan):
        slots[trip] += slot
        rows[trip] += count
    return [
        dict(
            kind=kind,
            request=request,
            source=source,
            target=target,
            slots=slots[trip],
            rows=rows[trip],
            bytes=rows[trip] * kv_bytes,
        )
        for trip in slots
        for kind, request, source, target, *_ in [trip]
    ]


def chain_moves(plan, transfer_plan):
    """Yields ((kind, request, source, target[, slot filled]), slots, rows) of each move."""
    _, S, C = plan.sizes

    def slot_at(instance, row):
        return instance * S + row // C

    pulls = plan.old.pulls
    request = request_of_share(plan)[plan.old.pulled.share].tolist()
    columns = pulls.source, pulls.source_row, pulls.target, pulls.rows
    for id, source, row, target, rows in zip(request, *(c.tolist() for c in columns)):
        yield ("pull", id, source, target), [slot_at(source, row)], rows
    moves = transfer_plan.moves
    writer_at = find_writers(plan, transfer_plan)
    for kind, source, row, target, target_row, rows in zip(*(c.tolist() for c in moves)):
        if kind == REPLICA:
            filled = slot_at(target, target_row)
            trip = MOVE_KINDS[kind], None, source, target, filled
            yield trip, [slot_at(source, row), filled], rows
        else:
            id, slot = writer_at[source, row]
            yield (MOVE_KINDS[kind], id, source, target), [slot], rows


def find_writers(plan, transfer_plan) -> dict:
    """(Instance, slab row) where a run writes → its request and slot."""
    table = plan.run_table
    writes = transfer_plan.writes
    puts = table.puts > 0
    where = zip(writes.instance.tolist(), writes.slab_row.tolist())
    return dict(zip(where, zip(table.request_id[puts].tolist(), table.slot[puts].tolist())))


def list_balance(plan, balancer) -> list[dict]:
    table = plan.run_table
    rows = np.bincount(table.instance, table.rows, plan.sizes[0]).astype(np.int64)
    free = map(len, balancer.free)
    columns = rows, plan.reads, plan.tokens_read, plan.load
    return [
        dict(rows=n, reads=reads, tokens_read=tokens, load=load, free=slots)
        for n, reads, tokens, load, slots in zip(*(c.tolist() for c in columns), free)
    ]


# ── as text ──────────────────────────────────────────────────────────────────────────────────────

MOST_LINES = 16  # of a list; the rest is counted
MOST_NUMBERS = 12  # of a list within a line

# Kinds of what travels: their names, and why they do.
WHY = {
    "query": (
        "queries and results",
        "rows go to each instance that holds KV of theirs, and their results come back",
    ),
    "pull": (
        "pulled KV",
        "old KV comes to a prompt's rows, as it is fewer bytes than their queries and results",
    ),
    "sibling": (
        "KV to siblings",
        "new KV goes to later rows of its prompt, as it is fewer bytes than their queries",
    ),
    "put": ("new KV", "its rows are computed elsewhere, and it goes to its home"),
    "replica": (
        "replicas",
        "an instance with a much read segment is overloaded: another gets a copy",
    ),
}


def explain(header: dict, record: dict) -> str:
    """A record as text: what happened, who computes what, what is read where, what travels."""
    parts = [
        [
            f"iteration {record['iteration']}, announced at {record['clock_s']:.3f} s: "
            f"{plural(header['instances'], 'instance')}, segments of "
            f"{header['segment_tokens']} tokens; {plural(len(record['running']), 'request')} "
            f"running, {record['waiting']:,} waiting",
            *shorten(explain_events(record)),
        ],
        ["who computes what:", *explain_runs(record)],
        ["what is read of old KV:", *(shorten(explain_reads(header, record)) or ["nothing"])],
        ["what travels:", *explain_trips(record)],
    ]
    return "\n".join("\n  ".join(part) for part in parts)


def plural(count, noun) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shorten(lines: list[str]) -> list[str]:
    left = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + [f"… and {left:,} more (--record has all)"] * (left > 0)


def name_numbers(noun, numbers) -> str:
    """`request 3`, or `requests 3, 5–9`: each once, in order."""
    numbers = sorted(set(numbers))
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    spans = [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(starts, ends)]
    more = ", …" * (len(spans) > MOST_NUMBERS)
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(spans[:MOST_NUMBERS])}{more}"


def name_copies(segments) -> str:
    """`a copy of segment 3`, or `copies of segments 7 (twice), 9`: a copy for each mention."""
    said = []
    for segment, count in sorted(Counter(segments).items()):
        times = {1: "", 2: " (twice)"}.get(count, f" ({count} times)")
        said.append(f"{segment}{times}")
    more = ", …" * (len(said) > MOST_NUMBERS)
    copies = "a copy" if len(segments) == 1 else "copies"
    noun = "segment" + "s" * (len(said) > 1)
    return f"{copies} of {noun} {', '.join(said[:MOST_NUMBERS])}{more}"


def name_counts(preposition, counts: Counter) -> str:
    """`4 at instance 0, 3 at 1, 5 at 2`."""
    said = []
    for instance, count in sorted(counts.items()):
        noun = "" if said else "instance "
        said.append(f"{count:,} {preposition} {noun}{instance}")
    more = ", …" * (len(said) > MOST_NUMBERS)
    return ", ".join(said[:MOST_NUMBERS]) + more


def name_bytes(count) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000


def explain_events(record) -> list[str]:
    """What happened since the iteration before, and while this one was planned."""
    said = [
        f"request {came['request']} came, with a prompt of {plural(came['prompt'], 'token')}"
        for came in record["arrived"]
    ]
    said += [
        f"request {r['request']} is admitted, with {plural(r['done'], 'token')} in the pool"
        for r in record["admitted"]
    ]
    for key, verb in ("preempted", "preempted"), ("ended", "ended"), ("dropped", "dropped"):
        if record[key]:
            said.append(f"{verb}: {name_numbers('request', record[key])}")
    if published := record["published"]:
        numbers = [p["segment"] for p in published]
        by = name_numbers("request", [p["request"] for p in published])
        said.append(f"published: {name_numbers('segment', numbers)}, by {by}")
    if evicted := record["evicted"]:
        copies = [e["segment"] for e in evicted if e["replica"]]
        gone = [e["segment"] for e in evicted if not e["replica"]]
        named = [name_numbers("segment", gone)] * bool(gone)
        named += [name_copies(copies)] * bool(copies)
        said.append(f"evicted: {'; '.join(named)}")
    return said


def explain_runs(record) -> list[str]:
    """Each instance, and the requests of which it computes rows."""
    said = []
    for instance, balance in enumerate(record["balance"]):
        said.append(
            f"instance {instance}: {plural(balance['rows'], 'row')}; gives "
            f"{plural(balance['reads'], 'token')} of old KV to requests; "
            f"{plural(balance['free'], 'slot')} free"
        )
        shares = defaultdict(list)  # its runs, by request
        for run in record["runs"]:
            if run["instance"] == instance:
                shares[run["request"]].append(run)
        decodes = [request for request, runs in shares.items() if runs[0]["decode"]]
        prompts = [runs for runs in shares.values() if not runs[0]["decode"]]
        if decodes:
            said.append(f"  decodes {name_numbers('request', decodes)}")
        said += [f"  {line}" for line in shorten(list(map(explain_share, prompts)))]
    return said


def explain_share(runs) -> str:
    """One instance's runs of one request's prompt."""
    rows = [run["position"] + i for run in runs for i in range(run["rows"])]
    said = f"prefill of request {runs[0]['request']}: {name_numbers('row', rows)}"
    homes = {run["home"] for run in runs if run["puts"] and run["home"] != run["instance"]}
    if homes:
        said += f"; KV goes to {name_numbers('instance', homes)}"
    if not all(run["puts"] for run in runs):
        said += "; for the logits alone, as all is cached"
    return said


def explain_reads(header, record) -> list[str]:
    """Requests, and where their old KV lies. Instances that read the same share a line."""
    readers = defaultdict(list)  # instances, by what they read
    for read in record["reads"]:
        lists = (tuple(read[key]) for key in ("slots", "copies", "pulled"))
        readers[read["request"], read["tokens"], *lists].append(read["instance"])
    said = []
    for (request, tokens, slots, copies, pulled), instances in readers.items():
        holders = Counter(slot // header["slots"] for slot in slots)
        line = f"request {request} on {name_numbers('instance', instances)}: "
        line += f"{plural(tokens, 'token')}; segments: {name_counts('at', holders)}"
        some = [f"{len(copies)} copies"] * bool(copies) + [f"{len(pulled)} pulled"] * bool(pulled)
        said.append(line + f" ({', '.join(some)})" * bool(some))
    return said


def explain_trips(record) -> list[str]:
    """Each kind, why it travels, and what leaves each instance."""
    trips = [dict(trip, kind="query") for trip in record["queries"]] + record["moves"]
    said = []
    for kind, (name, why) in WHY.items():
        leaving = defaultdict(list)  # trips by source
        for trip in trips:
            if trip["kind"] == kind:
                leaving[trip["source"]].append(trip)
        total = sum(trip["bytes"] for trip in chain.from_iterable(leaving.values()))
        said.append(f"{name}: {name_bytes(total)}" + f" ({why})" * bool(leaving))
        lines = [explain_leaving(kind, source, leaving[source]) for source in sorted(leaving)]
        said += [f"  {line}" for line in shorten(lines)]
    return said


def explain_leaving(kind, source, trips) -> str:
    """What of one kind leaves an instance, and where it goes."""
    total = name_bytes(sum(trip["bytes"] for trip in trips))
    of = ""
    if kind != "replica":
        of = " of " + name_numbers("request", [trip["request"] for trip in trips])
    rows = Counter()  # by target
    for trip in trips:
        rows[trip["target"]] += trip["rows"]
    what = "rows" if kind == "query" else "tokens"
    return f"from {source}: {total}{of}; {what}: {name_counts('to', rows)}"


if __name__ == "__main__":
    print(__doc__)
