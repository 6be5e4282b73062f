"""Control plane: who holds what? (§4.) Plain Python and NumPy, no torch.

A request's tokens are cut into *segments* of C. A full segment has an id, the chained hash of its
tokens and everything before them, and lives in the *prefix tree*, from where any request may read
it; it is *pinned* while a running request does. What is not full yet is the request's own: while it
generates, its last, partly filled segment is its *open tail*, and grows where the request decodes.
For a request with `done` of its tokens in the pool, about to compute `rows` more:

    tokens   0 ······ len(segments)·C ······ done ······ done+rows ······ len(tokens)
             │ published, pinned │  its own,   │  written in  │ not computed │
             │ read only         │  earlier    │  this        │ yet          │
             │ (maybe by others) │  iterations │  iteration   │              │
                                                                     table[index] = global slot

(If all of a prompt is published, its last token is computed again for its logits, but not written:
then `done` is one less than what is published.)

Three things keep N instances evenly loaded. *Placement*: a segment's home is one instance after its
parent's, or where its hash says. *Replication*: the few segments that many requests share, the
heavy hitters, are copied to others when their instance is overloaded. *Choice*: of two replicas
drawn at random the less loaded is read. `python balancer.py --trace FILE` shows what each is worth.

The same calls in the same order give the same state on every rank, so every rank runs it and nobody
asks anybody: no sets, no `hash()`, integer loads, and heat that only ever adds and doubles.

Notation: N instances · S slots per instance · C tokens per segment. A *global slot* is
instance · S + slot; a *run* is consecutive rows of one request within one segment.
"""

import argparse
import hashlib
import heapq
import json
import math
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np


@dataclass(eq=False, slots=True)
class Segment:
    """A published segment: C tokens and, through the chain of ids, everything before them."""

    id: bytes
    parent: "Segment | None"
    replicas: dict[int, int]  # instance → global slot; the first one lives as long as the segment
    children: dict[bytes, "Segment"] = field(default_factory=dict)
    pins: int = 0  # running requests that read it
    touched: int = 0  # when it was last accessed, by PrefixTree.clock
    depth: int = 0  # of a path that ends here: segments
    heat: float = 0.0  # requests that hit it, recent ones weigh more; never less than a child's

    @property
    def slot(self) -> int:
        """Global slot of the first replica."""
        return next(iter(self.replicas.values()))


class PrefixTree:
    """All published segments (§4.1), the global LRU of what may leave, and what is read most; an
    admission weighs half as much after `half_life` others."""

    def __init__(self, half_life: int = 128):
        self.root = Segment(b"", None, {})  # of no tokens; its heat is that of all hits
        self.segments: dict[bytes, Segment] = {}
        # Oldest first. A path enters leaf before parent, and whoever reads a segment reads its
        # ancestors too; so the oldest is always a leaf, and no child outlives its parent.
        self.lru: OrderedDict[bytes, Segment] = OrderedDict()  # no running request reads them
        self.extras: OrderedDict[int, Segment] = OrderedDict()  # slots of all replicas but first
        self.shrunk = False  # extras left since this was last looked at
        self.half_life, self.clock, self.admissions = half_life, 0, 0
        self.weight = 1.0  # of an admission

    def match(self, ids: list[bytes]) -> int:
        """How many of a request's segments, from its first on, are published."""
        return next((i for i, id in enumerate(ids) if id not in self.segments), len(ids))

    def insert(self, id: bytes, parent: Segment | None, instance: int, slot: int) -> Segment:
        segment = self.segments[id] = Segment(id, parent or self.root, {instance: slot})
        segment.parent.children[id], segment.depth = segment, segment.parent.depth + 1
        return segment

    def hit(self, segments: list[Segment]):
        """Counts the read of a path from the root on, at its admission. Instead of decaying every
        count, the weight of new ones doubles per half-life; both are exact."""
        self.admissions += 1
        if self.admissions % self.half_life == 0:
            self.weight *= 2.0
            if self.weight > 2.0**500:
                for segment in (self.root, *self.segments.values()):
                    segment.heat *= 2.0**-500
                self.weight *= 2.0**-500
        for segment in segments:
            segment.heat += self.weight
        self.root.heat += self.weight * len(segments)

    def heaviest(self, count: int) -> list[Segment]:
        """The `count` most read segments, exactly: a child is never read more than its parent, so a
        best-first search from the root finds them in that many steps (§4.3)."""
        found, heap = [], [(0.0, b"", self.root)]
        while heap and len(found) <= count:
            found.append(heapq.heappop(heap)[2])
            for child in found[-1].children.values():
                heapq.heappush(heap, (-child.heat, child.id, child))
        return found[1:]

    def pin(self, segment: Segment):
        self.lru.pop(segment.id, None)
        segment.pins += 1
        self._touch(segment)

    def unpin(self, segment: Segment):
        segment.pins -= 1
        if not segment.pins:
            self.lru[segment.id] = segment
        self._touch(segment)

    def _touch(self, segment):
        segment.touched = self.clock
        if len(segment.replicas) > 1:
            for slot in list(segment.replicas.values())[1:]:
                self.extras.move_to_end(slot)

    def evict(self) -> int | None:
        """Takes the globally least recently used replica out (§4.4) and returns its global slot;
        None when all are pinned. A pin holds the first replica; the others may leave any time, and
        of one segment they leave first."""
        extra = next(iter(self.extras.values()), None)
        oldest = next(iter(self.lru.values()), None)
        if extra and not (oldest and oldest.touched < extra.touched):
            oldest = extra
        if oldest is None:
            return None
        slot = oldest.replicas.popitem()[1]
        if oldest.replicas:
            del self.extras[slot]
            self.shrunk = True
        else:
            del self.lru[oldest.id], self.segments[oldest.id], oldest.parent.children[oldest.id]
        return slot


@dataclass(eq=False)
class Request:
    """A request and what it holds. `tokens` is the prompt, then what has been generated; a token's
    KV is written when the token is an input, so the last one generated never has any."""

    id: int
    tokens: list[int]
    max_tokens: int  # generation stops at this many, prompt included
    salt: str = ""  # requests with different salts share nothing
    num_prompt: int = field(init=False)
    done: int = 0  # tokens whose KV is in the pool
    peak: int = 0  # the most `done` has been: below it, rows are computed again
    ids: list[bytes] = field(default_factory=list)  # of the full segments among `tokens`
    segments: list[Segment] = field(default_factory=list)  # published and pinned
    table: np.ndarray | None = None  # [segments] global slot; the published ones first
    num_slots: int = 0  # entries of the table in use
    line: int | None = None  # of Balancer.held, while it runs
    order: int | None = None  # of arrival

    def __post_init__(self):
        self.num_prompt = len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.done


@dataclass(eq=False, slots=True)
class Run:
    """Rows [position, position + rows) of a request, all in one segment."""

    request: Request
    position: int
    rows: int
    instance: int  # where the even split wants it
    slot: int  # global slot of its segment
    puts: bool  # False: the segment is published already, the row only wants its logits
    decode: bool

    @property
    def samples(self) -> bool:
        """Whether its last row is the request's last, whose logits give the next token."""
        return self.position + self.rows == len(self.request.tokens)


def least(load, start: int) -> int:
    """The instance with the least load, the first of them from `start` on."""
    return min(range(len(load)), key=lambda i: (load[i], (i - start) % len(load)))


class Balancer:
    """The pool's bookkeeping over N instances of S slots for segments of C tokens. placement:
    `stripe` or `hash`. factor: c of the ceil(c·N·ln N) heavy hitters that may have replicas."""

    def __init__(self, num_instances: int, slots: int, segment_tokens: int,
                 placement: str = "stripe", factor: float = 3.0):
        N, S = num_instances, slots
        self.sizes = self.num_instances, self.slots, self.segment_tokens = N, S, segment_tokens
        self.placement = placement
        # Monte-Carlo over random homes puts the worst max/mean at 1.3 for c = 3, 1.6 for c = 1.
        self.num_heavy = math.ceil(factor * N * math.log(N))
        self.tree = PrefixTree(16 * N)
        self.free = [list(range((i + 1) * S - 1, i * S - 1, -1)) for i in range(N)]
        self.in_progress: dict[bytes, Request] = {}  # prompt segments being prefilled
        self.evictions = self.duplicates = self.copies = self.replicas_max = 0
        self.load = np.zeros(N, np.int64)  # of each instance: work done, recent iterations more
        self.copying: dict[int, Segment] = {}  # slot → what this iteration copies there
        self.held = np.zeros((0, N), np.int64)  # segments with tokens written, by Request.line
        self._lines: list[int] = []  # of `held` that are free
        self._rng = np.random.Generator(np.random.PCG64(0))
        self._replicated = np.full(N * S, -1, np.int32)  # first replica's slot → line of
        self._places = np.zeros((0, N), np.int64)  # [segments with replicas, N] global slot or −1
        self.deepest = 0  # segments of a path among which they are

    def extend_ids(self, request: Request):
        """Ids of the segments that `tokens` has filled since (§4.1: a chained hash)."""
        C, ids = self.segment_tokens, request.ids
        while (len(ids) + 1) * C <= len(request.tokens):
            tokens = np.asarray(request.tokens[len(ids) * C:(len(ids) + 1) * C], np.int64)
            root = hashlib.blake2b(request.salt.encode("utf-8", "surrogatepass"), digest_size=16,
                                   person=b"root")
            parent = ids[-1] if ids else root.digest()
            ids.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest())

    def match(self, request: Request) -> int:
        """The number of leading segments that the pool holds."""
        self.extend_ids(request)
        return self.tree.match(request.ids)

    def awaited(self, request: Request, matched: int) -> bool:
        """Whether the next segment is being prefilled by another request: better wait for it."""
        return matched < len(request.ids) and request.ids[matched] in self.in_progress

    def num_segments(self, tokens: int) -> int:
        return -(-tokens // self.segment_tokens)

    def fits(self, request: Request, matched: int, promised: int) -> bool:
        """Whether slots for the rest of the prompt are free or evictable, besides those
        `promised` to requests already running."""
        taken = sum(not self.tree.segments[id].pins for id in request.ids[:matched])
        available = sum(map(len, self.free)) + len(self.tree.lru) + len(self.tree.extras) - taken
        return available - promised >= self.num_segments(len(request.tokens)) - matched

    def admit(self, request: Request, matched: int):
        """Pins what matched. One row at least stays to compute: its logits are wanted."""
        request.segments = [self.tree.segments[id] for id in request.ids[:matched]]
        self.tree.clock += 1
        self.tree.hit(request.segments)
        request.table = np.zeros(self.num_segments(request.max_tokens), np.int32)
        request.table[:matched] = [segment.slot for segment in request.segments]
        if not self._lines:
            self._lines = list(range(len(self.held), len(self.held) * 2 + 8))
            self.held = np.resize(self.held, (len(self.held) * 2 + 8, self.num_instances))
        request.line = self._lines.pop()
        self.held[request.line] = np.bincount(request.table[:matched] // self.slots,
                                              minlength=self.num_instances)
        request.num_slots = matched
        request.done = min(matched * self.segment_tokens, len(request.tokens) - 1)
        for segment in request.segments:
            self.tree.pin(segment)
        for id in request.ids[matched:]:
            self.in_progress.setdefault(id, request)

    def commit(self, request: Request, rows: int):
        """After the iteration: the rows are written, segments that are now full are published. One
        that another request published meanwhile replaces ours; nothing is moved."""
        C, S, table, held = self.segment_tokens, self.slots, request.table, self.held[request.line]
        for index in range(self.num_segments(request.done), self.num_segments(request.done + rows)):
            held[table[index] // S] += 1
        request.done += rows
        request.peak = max(request.peak, request.done)
        while (index := len(request.segments)) < request.done // C:
            id, slot = request.ids[index], int(table[index])
            segment = self.tree.segments.get(id)
            if segment is None:
                segment = self.tree.insert(id, request.segments[-1] if index else None,
                                           slot // S, slot)
            else:
                self._free(slot)
                self.duplicates += 1
                table[index] = segment.slot
                held[slot // S] -= 1
                held[segment.slot // S] += 1
            self.replicas_max = max(self.replicas_max, 1)
            self.tree.pin(segment)
            request.segments.append(segment)
            self._forget(request, id)

    def release(self, request: Request):
        """Gives back everything: a finished request, or one that is preempted and starts over."""
        for slot in request.table[len(request.segments):request.num_slots]:
            self._free(int(slot))
        self.tree.clock += 1
        for segment in reversed(request.segments):  # leaf first: see PrefixTree.lru
            self.tree.unpin(segment)
        for id in request.ids[len(request.segments):]:
            self._forget(request, id)
        self._lines.append(request.line)
        request.segments, request.num_slots, request.done = [], 0, 0

    def _forget(self, request, id):
        if self.in_progress.get(id) is request:
            del self.in_progress[id]

    def _free(self, slot: int):
        self.free[slot // self.slots].append(slot)

    def open_tails(self, running: list[Request]) -> list[int]:
        """[N] open tails that live at each instance."""
        N, S, C = self.sizes
        tails = [0] * N
        for request in running:
            if request.num_slots * C > len(request.tokens):
                tails[int(request.table[request.num_slots - 1]) // S] += 1
        return tails

    def reserve(self, request: Request, rows: int, planned: list[int], tails: list[int],
                most: int):
        """Runs for the next `rows` tokens, each with a slot for its segment: compute where it will
        live (§4.3). None when every slot is pinned (what was reserved stays with the request).

        planned [N]: rows that each instance has so far in this iteration; updated on success.
        tails [N]: open tails at each instance; updated where one is opened. An instance gets at
        most `most` rows; with at least the even share + C the least planned one has room."""
        C, S, load = self.segment_tokens, self.slots, list(planned)
        decode = request.remaining == 1 and len(request.tokens) > request.num_prompt
        runs, position, stop = [], request.done, request.done + rows
        while position < stop:
            index = position // C
            count = min(stop, (index + 1) * C) - position
            if index == request.num_slots:
                slot = self._allocate(self._home(request, index, count, load, tails, most))
                if slot is None:
                    return None
                request.table[index] = slot
                request.num_slots += 1
                tails[slot // S] += index >= len(request.ids)
            slot = int(request.table[index])
            instance = slot // S
            if load[instance] + count > most:
                instance = least(load, instance)
            load[instance] += count
            runs.append(Run(request, position, count, instance, slot,
                            index >= len(request.segments), decode))
            position += count
        planned[:] = load
        return runs

    def _home(self, request, index, rows, load, tails, most) -> int:
        """The instance where a new segment should live.

        `hash` is the paper's. `stripe` puts a first child one instance after its parent, so that a
        long prefix is read evenly from all, and other children where their hash says. An open tail
        goes where the fewest are: its request decodes there."""
        N, S = self.num_instances, self.slots
        after = (int(request.table[index - 1]) // S + 1) % N if index else 0
        if index >= len(request.ids):
            return min(range(N), key=lambda i: (load[i] + rows > most, tails[i], (i - after) % N))
        home = int.from_bytes(request.ids[index][:8], "little") % N
        if self.placement == "stripe" and index:
            parent = request.segments[-1] if index == len(request.segments) else None
            home = home if parent and parent.children else after
        return home if load[home] + rows <= most else least(load, home)

    def _allocate(self, home: int) -> int | None:
        """A slot: at home, else at the instance with the most free ones, else the one of the
        globally least recently used replica. None when all are pinned."""
        if not self.free[home]:
            home = max(range(len(self.free)), key=lambda i: len(self.free[i]))
        if self.free[home]:
            return self.free[home].pop()
        slot = self.tree.evict()
        self.evictions += slot is not None
        return slot

    def replicate(self) -> dict[int, int]:
        """Copies for this iteration, to be read from the next one on (§4.3): global slot to fill →
        global slot to read. Heavy hitters of instances whose load is over 1.1 of the mean go to the
        least loaded ones without a copy; N segments an iteration, a sixteenth of the pool in all.

        A segment gets another replica while each that it has is worth more than 1/num_heavy of an
        instance's even share of all hits. So a steady load stops copying, however it fluctuates,
        and a segment on every request ends up everywhere."""
        N, S, _ = self.sizes
        tree, heavy, readable, self.copying = self.tree, self.num_heavy, self.copying, {}
        hot = self.load * (10 * N) > self.load.sum() * 11
        ranked = np.argsort(self.load, kind="stable").tolist()
        wanted = ((segment, target) for segment in (tree.heaviest(heavy) if hot.any() else ())
                  if any(hot[i] for i in segment.replicas)
                  for target in ranked if target not in segment.replicas
                  and segment.heat * heavy * N > tree.root.heat * len(segment.replicas))
        for segment, target in wanted:
            if len(self.copying) == N or len(tree.extras) >= N * S // 16:
                break
            slot = self._allocate(target)
            if slot is None:
                break
            if not segment.replicas or slot // S in segment.replicas:  # evicted for itself
                self._free(slot)
                break
            segment.replicas[slot // S] = slot
            self.replicas_max = max(self.replicas_max, len(segment.replicas))
            tree.extras[slot] = self.copying[slot] = segment
        self.copying = {slot: segment for slot, segment in self.copying.items()
                        if segment.replicas.get(slot // S) == slot}
        self.copies += len(self.copying)
        if readable or self.copying or tree.shrunk:
            self._index()
        return {slot: segment.slot for slot, segment in self.copying.items()}

    def _index(self):
        """Where the segments with replicas can be read now, as arrays."""
        segments, self.tree.shrunk = list(dict.fromkeys(self.tree.extras.values())), False
        self._replicated[:] = -1
        self._replicated[[segment.slot for segment in segments]] = np.arange(len(segments))
        self._places = np.full((len(segments), self.num_instances), -1, np.int64)
        self.deepest = 0
        for line, segment in enumerate(segments):
            self.deepest = max(self.deepest, segment.depth)
            for instance, slot in segment.replicas.items():
                if slot not in self.copying:
                    self._places[line, instance] = slot

    def places(self, slots: np.ndarray, among: np.ndarray):
        """Which of the global slots, `among` these indices, hold a segment with replicas: indices
        [h], and [h, N] the global slots where it can be read, −1 where not."""
        hot = among[self._replicated[slots[among]] >= 0]
        return hot, self._places[self._replicated[slots[hot]]]

    def choose(self, places: np.ndarray, cost: np.ndarray, load: np.ndarray) -> np.ndarray:
        """Power of two choices (§4.4): for each read [h] of a segment at `places` [h, N], the less
        loaded of two replicas drawn at random → [h] global slot. Costs are added to load [N]
        N reads at a time, in place."""
        N, out = len(load), np.zeros(len(places), np.int64)
        for start in range(0, len(places), N):
            there = places[start:start + N]
            line, rank = np.arange(len(there)), (there >= 0).cumsum(1)
            count = rank[:, -1]
            first = self._rng.integers(count)
            second = (first + 1 + self._rng.integers(np.maximum(count - 1, 1))) % count
            first, second = ((rank > n[:, None]).argmax(1) for n in (first, second))
            pick = np.where(load[second] < load[first], second, first)
            out[start:start + N] = there[line, pick]
            np.add.at(load, pick, cost[start:start + N])
        return out

    def observe(self, cost: np.ndarray):
        """The work [N] of an iteration that is planned: loads are sums that fade by an eighth each."""
        self.load += cost - self.load // 8


# ── the replay: a trace through the control plane alone ───────────────────────────────────────

BLOCK, WINDOW = 512, 10_000  # tokens per hash id of a trace; ms that a CV is taken over


def variation(windows) -> float | None:
    """Coefficient of variation over instances, the mean over windows in which there is any load."""
    values = [float(w.std() / w.mean()) for w in windows if w.any()]
    return sum(values) / len(values) if values else None


def replay(lines: list[tuple], balancer: Balancer, kv_bytes: int) -> dict:
    """Lines (timestamp in ms, input_length, hash_ids) in order of time. Requests with one timestamp
    form one iteration; each reads each of its hit segments once, at admission, and puts the others;
    no decode. An instance's load is tokens of cache read, its CV the mean over windows; bytes are
    those that cross instances, kv_bytes per token. Raises ValueError if an iteration does not fit.
    """
    N, S, C = balancer.sizes
    hits = total = put = 0
    windows, milliseconds = {}, []
    for timestamp, group in groupby(lines, key=lambda line: line[0]):
        requests = [Request(0, (np.asarray(ids)[:, None] * BLOCK + np.arange(BLOCK)).ravel()[:n],
                            n) for _, n, ids in group]
        for request in requests:
            balancer.extend_ids(request)  # hashing is not planning
        started = time.perf_counter()
        balancer.replicate()
        reads, planned = np.zeros(N, np.int64), [0] * N
        most = -(-sum(len(request.tokens) for request in requests) // N) + C
        for request in requests:
            balancer.admit(request, matched := balancer.match(request))
            hits, total = hits + request.done, total + len(request.tokens)
            slots = request.table[:matched].astype(np.int64)
            hot, places = balancer.places(slots, np.arange(matched))
            cold = np.bincount(np.delete(slots, hot) // S, minlength=N)
            slots[hot] = balancer.choose(places, np.full(len(hot), C),
                                         balancer.load + reads + C * cold)
            reads += C * np.bincount(slots // S, minlength=N)
            runs = balancer.reserve(request, request.remaining, planned, [0] * N, most)
            if runs is None:
                raise ValueError(f"the requests of {timestamp} ms need more than {N * S} segments")
            put += sum(run.rows for run in runs if run.puts and run.instance != run.slot // S)
        for request in requests:
            balancer.commit(request, request.remaining)
            balancer.release(request)
        balancer.observe(reads)
        milliseconds.append((time.perf_counter() - started) * 1e3)
        windows[timestamp // WINDOW] = windows.get(timestamp // WINDOW, 0) + reads
    return dict(hit_rate=hits / total, cache_load_cv=variation(windows.values()),
                replicas_max=balancer.replicas_max, replica_segments=len(balancer.tree.extras),
                put_bytes=put * kv_bytes, replica_bytes=balancer.copies * C * kv_bytes,
                plan_ms_median=float(np.median(milliseconds)), iterations=len(milliseconds))


def read_line(text: bytes, after: float) -> tuple:
    """(timestamp, input_length, hash_ids) of a trace's line. Raises ValueError or TypeError."""
    at, length, ids = itemgetter("timestamp", "input_length", "hash_ids")(json.loads(text))
    if not (at >= after and length > 0 and len(ids) == -(-length // BLOCK)
            and all(type(id) is int and 0 <= id < 2**50 for id in (length, *ids))):
        raise ValueError
    return at, length, ids


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="balancer.py", description="Replay a trace through the "
                                     "control plane alone, for any number of instances.")
    parser.print_usage = lambda *_: None  # an error is one line
    add = parser.add_argument
    add("--trace", required=True, metavar="FILE", help="timestamp, input_length, hash_ids per line")
    add("--instances", type=int, default=8, metavar="N", help="default 8")
    add("--placement", choices=("stripe", "hash"), default="stripe", help="default stripe")
    add("--replicate-factor", type=float, default=3.0, metavar="c", help="0: none; default 3")
    add("--segment-tokens", type=int, default=512, metavar="C", help="default 512")
    add("--capacity-tokens", type=int, metavar="T", help="of the whole pool; default: all fits")
    add("--kv-bytes", type=int, default=131_072, metavar="B",
        help="per token; default: 128 KiB, Llama-3.1-8B in 16 bits")
    add("--json", action="store_true", help="print one JSON object")
    options, lines = parser.parse_args(arguments), []
    for name, value in vars(options).items():
        least = 0 if name == "replicate_factor" else 1
        if type(value) in (int, float) and not least <= value < 2**40:
            parser.error(f"--{name.replace('_', '-')} {value}: a number from {least} is expected")
    try:
        with open(options.trace, "rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    lines.append(read_line(text, lines[-1][0] if lines else 0))
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f"{options.trace}:{number}: timestamp (ms, in order), input_"
                                     "length and a hash id per 512 tokens are expected") from None
        if not lines:
            raise ValueError(f"{options.trace}: is empty; one JSON object per line is expected")
        N, C = options.instances, options.segment_tokens
        room = options.capacity_tokens or 2 * C * sum(-(-n // C) for _, n, _ in lines)
        result = replay(lines, Balancer(N, -(-room // (N * C)), C, options.placement,
                                        options.replicate_factor), options.kv_bytes)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(json.dumps(result) if options.json else "\n".join(
        f"{key:>16}  {value:,.4g}" for key, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
