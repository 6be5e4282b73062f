"""Control plane: who holds what? (§4.) Plain Python and NumPy, no torch.

A request's tokens are cut into *segments* of C. A full one has an id, the chained hash of all up to
its end, and is published in the *prefix tree*; a request that reads it *pins* it. What is not full
is a request's own, while it decodes its *open tail*. With `done` tokens in the pool, `rows` next:

    tokens   0 ······ len(segments)·C ······ done ······ done+rows ······ len(tokens)
             │ published, pinned │  its own,   │  written in  │ not computed │
             │ read only         │  earlier    │  this        │ yet          │
             │ (maybe by others) │  iterations │  iteration   │              │
                                                                     table[index] = global slot

Three things keep N instances evenly loaded. *Placement*: a segment lives one instance after its
parent, or where its hash says. *Replication*: heavy hitters, the few that many requests share, are
copied when their instance is overloaded. *Choice*: of two replicas drawn at random the less loaded
is read. `python balancer.py --trace FILE` shows what each is worth. The same calls give the same
state on every rank, so nobody asks anybody: no sets, no `hash()`, integer loads, exact heat.

Notation: N instances · S slots per instance · C tokens per segment. A *global slot* is
instance · S + slot; a *run* is consecutive rows of one request within one segment.
"""

import argparse
import hashlib
import heapq
import json
import math
import time
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import attrgetter, itemgetter

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
    """All published segments (§4.1), the global LRU of what may leave, and what is read most."""
    def __init__(self, half_life: int = 128):
        self.root = Segment(b"", None, {})  # of no tokens; its heat is that of all hits
        self.segments: dict[bytes, Segment] = {}
        # Not pinned, oldest first: a leaf, as a path enters leaf before parent and is read whole.
        self.lru: OrderedDict[bytes, Segment] = OrderedDict()
        self.extras: OrderedDict[int, Segment] = OrderedDict()  # slots of all replicas but first
        self.shrunk = False  # extras left since this was last looked at
        self.half_life, self.clock, self.admissions = half_life, 0, 0

    def match(self, ids: list[bytes]) -> int:
        """How many of a request's segments are published: the first ones, as parents stay."""
        return bisect_left(ids, True, key=lambda id: id not in self.segments)

    def insert(self, id: bytes, parent: Segment | None, instance: int, slot: int) -> Segment:
        segment = self.segments[id] = Segment(id, parent or self.root, {instance: slot})
        segment.parent.children[id], segment.depth = segment, segment.parent.depth + 1
        return segment

    def hit(self, segments: list[Segment]):
        """Counts and pins what an admission reads; after half_life others it counts half."""
        self.clock, self.admissions = self.clock + 1, self.admissions + 1
        if self.admissions % self.half_life == 0:
            for segment in (self.root, *self.segments.values()):
                segment.heat *= 0.5
        for segment in segments:
            segment.heat += 1.0
            self.pin(segment)
        self.root.heat += len(segments)

    def heaviest(self, count: int, above: float = 0.0) -> list[Segment]:
        """The `count` most read over `above`, by best-first search: no child is over its parent."""
        found, heap = [], [(0.0, b"", self.root)]
        while heap and len(found) <= count:
            found.append(heapq.heappop(heap)[2])
            for child in found[-1].children.values():
                if child.heat > above:
                    heapq.heappush(heap, (-child.heat, child.id, child))
        return found[1:]

    def pin(self, segment: Segment, readers: int = 1):
        """One reader more; with −1 one less."""
        self.lru.pop(segment.id, None)
        segment.pins, segment.touched = segment.pins + readers, self.clock
        if not segment.pins:
            self.lru[segment.id] = segment
        for slot in islice(segment.replicas.values(), 1, None):
            self.extras.move_to_end(slot)

    def evict(self) -> int | None:
        """Takes the globally least recently used replica out (§4.4): its global slot, None if all
        are pinned. A pin holds a segment's first replica; the others may leave, and before it."""
        heads = [next(iter(part.values()), None) for part in (self.extras, self.lru)]
        oldest = min(filter(None, heads), key=attrgetter("touched"), default=None)
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
    """A request and what it holds. KV is written when a token is an input: the last has none."""
    id: int
    tokens: list[int]  # the prompt, then what has been generated
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


def least(load, start: int, limit: int) -> int:
    """`start` if its load is within the limit, else the least loaded, the first from `start` on."""
    among = [start] if load[start] <= limit else range(len(load))
    return min(among, key=lambda i: (load[i], (i - start) % len(load)))


class Balancer:
    """The pool's bookkeeping. factor: c of the ceil(c·N·ln N) heavy hitters that may be copied."""
    def __init__(self, num_instances: int, slots: int, segment_tokens: int,
                 placement: str = "stripe", factor: float = 3.0):
        N, S = num_instances, slots
        self.sizes = self.num_instances, self.slots, self.segment_tokens = N, S, segment_tokens
        # Monte-Carlo over random homes puts the worst max/mean at 1.3 for c = 3, 1.6 for c = 1.
        self.placement, self.num_heavy = placement, math.ceil(factor * N * math.log(N))
        self.tree = PrefixTree(16 * N)
        self.free = [list(range((i + 1) * S - 1, i * S - 1, -1)) for i in range(N)]
        self.in_progress: dict[bytes, Request] = {}  # prompt segments being prefilled
        self.evictions, self.duplicates, self.copies, self.replicas_max = 0, 0, 0, 1
        self.load = np.zeros(N, np.int64)  # of each instance: work done, recent iterations more
        self.copying: dict[int, Segment] = {}  # slot → what this iteration copies there
        self.held = np.zeros((0, N), np.int64)  # segments with tokens written, by Request.line
        self._lines: list[int] = []  # of `held` that are free
        self._rng = np.random.Generator(np.random.PCG64(0))
        self._index()

    def extend_ids(self, request: Request):
        """Ids of the segments that `tokens` has filled since (§4.1: a chained hash)."""
        C, ids = self.segment_tokens, request.ids
        for start in range(len(ids) * C, len(request.tokens) - C + 1, C):
            tokens = np.asarray(request.tokens[start:start + C], np.int64)
            salt = request.salt.encode("utf-8", "surrogatepass")
            id = ids[-1] if ids else hashlib.blake2b(salt, digest_size=16, person=b"root").digest()
            ids.append(hashlib.blake2b(id + tokens.tobytes(), digest_size=16).digest())

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
        """Whether slots for the rest of the prompt can be had besides those promised to others."""
        taken = sum(not self.tree.segments[id].pins for id in request.ids[:matched])
        available = sum(map(len, self.free)) + len(self.tree.lru) + len(self.tree.extras) - taken
        return available - promised >= self.num_segments(len(request.tokens)) - matched

    def admit(self, request: Request, matched: int):
        """Pins what matched. One row at least stays to compute: its logits are wanted."""
        request.segments = [self.tree.segments[id] for id in request.ids[:matched]]
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
        for id in request.ids[matched:]:
            self.in_progress.setdefault(id, request)

    def commit(self, request: Request, rows: int):
        """The rows are written: publishes full segments, or takes what was published meanwhile."""
        C, S, table, held = self.segment_tokens, self.slots, request.table, self.held[request.line]
        old = max(len(request.segments), self.num_segments(request.done))
        for slot in table[old:self.num_segments(request.done + rows)].tolist():
            held[slot // S] += 1
        request.done += rows
        request.peak = max(request.peak, request.done)
        while (index := len(request.segments)) < request.done // C:
            id, slot = request.ids[index], int(table[index])
            if segment := self.tree.segments.get(id):
                self.free[slot // S].append(slot)
                self.duplicates += 1
                table[index] = segment.slot
                held[slot // S] -= 1
                held[segment.slot // S] += 1
            else:
                parent = request.segments[-1] if index else None
                segment = self.tree.insert(id, parent, slot // S, slot)
            self.tree.pin(segment)
            request.segments.append(segment)
            if self.in_progress.get(id) is request:
                del self.in_progress[id]

    def release(self, request: Request):
        """Gives back everything: a finished request, or one that is preempted and starts over."""
        for slot in request.table[len(request.segments):request.num_slots].tolist():
            self.free[slot // self.slots].append(slot)
        self.tree.clock += 1
        for segment in reversed(request.segments):  # leaf first: see PrefixTree.lru
            self.tree.pin(segment, -1)
        for id in request.ids[len(request.segments):]:
            if self.in_progress.get(id) is request:
                del self.in_progress[id]
        self._lines.append(request.line)
        request.segments, request.num_slots, request.done = [], 0, 0

    def open_tails(self, running: list[Request]) -> list[int]:
        """[N] open tails that live at each instance."""
        N, S, C = self.sizes
        slots = [r.table[r.num_slots - 1] for r in running if r.num_slots * C > len(r.tokens)]
        return np.bincount(np.array(slots, np.int64) // S, minlength=N).tolist()

    def reserve(self, request: Request, rows: int, planned: list[int], tails: list[int], most: int):
        """Runs for the next `rows` tokens where their segments will live (§4.3); None if all slots
        are pinned (what was reserved stays). planned [N]: rows so far, updated on success; tails
        [N]: open ones, updated. Rows over `most` go to the least planned, and are put."""
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
            count = min(count, max(most - load[slot // S], 0) or count)  # the rest elsewhere
            instance = least(load, slot // S, most - count)
            load[instance] += count
            runs.append(Run(request, position, count, instance, slot,
                            index >= len(request.segments), decode))
            position += count
        planned[:] = load
        return runs

    def _home(self, request, index, rows, load, tails, most) -> int:
        """Where a new segment should live. `hash`: the paper's; `stripe`: a first child after its
        parent, to read long prefixes evenly, others by hash. Open tails spread: decodes follow."""
        N, S, _ = self.sizes
        home = (int(request.table[index - 1]) // S + 1) % N if index else 0
        if index >= len(request.ids):
            return min(range(N), key=lambda i: (load[i] + rows > most, tails[i], (i - home) % N))
        siblings = index == len(request.segments) > 0 and request.segments[-1].children
        if self.placement == "hash" or not index or siblings:
            home = int.from_bytes(request.ids[index][:8], "little") % N
        return least(load, home, most - rows)

    def _allocate(self, home: int, only: bool = False) -> int | None:
        """A slot at home, else (not `only`) where most are free, else an evicted one; or None."""
        if free := self.free[home] or not only and max(self.free, key=len):
            return free.pop()
        slot = self.tree.evict()
        self.evictions += slot is not None
        return slot

    def replicate(self) -> dict[int, int]:
        """Copies for this iteration, read from the next on (§4.3): global slot to fill → to read.
        Heavy hitters of instances over 1.1 of the mean load go to the least loaded: N an iteration,
        1/16 of the pool in all, each while its replicas are worth more than 1/num_heavy of an even
        share of all hits: so steady load stops copying, and what all requests hit is everywhere."""
        N, S, _ = self.sizes
        tree, heavy, readable, self.copying = self.tree, self.num_heavy, self.copying, {}
        hot = self.load * (10 * N) > self.load.sum() * 11
        share = tree.root.heat / (heavy * N) if heavy else 0.0
        ranked = sorted(range(N), key=lambda i: (not self.free[i], self.load[i]))
        wanted = ((segment, target) for segment in tree.heaviest(heavy * hot.any(), share)
                  for target in ranked if target not in segment.replicas
                  and any(hot[i] for i in segment.replicas)
                  and segment.heat > share * len(segment.replicas))
        unfit = []  # slots that eviction gave where the segment is already
        for segment, target in wanted:
            if len(tree.extras) >= N * S // 16 or N in (len(self.copying), len(unfit)):
                break
            there = tuple(segment.replicas)
            slot = self._allocate(target, only=True)
            if slot is None:
                break
            if slot // S in there:
                unfit.append(slot)
                continue
            segment.replicas[slot // S] = slot
            self.replicas_max = max(self.replicas_max, len(segment.replicas))
            tree.extras[slot] = self.copying[slot] = segment
        for slot in unfit:
            self.free[slot // S].append(slot)
        self.copying = {slot: segment for slot, segment in self.copying.items()
                        if segment.replicas.get(slot // S) == slot}
        self.copies += len(self.copying)
        if readable or self.copying:
            self._index()
        return {slot: segment.slot for slot, segment in self.copying.items()}

    def _index(self):
        """Where the segments with replicas can be read now: of a first replica's slot the line in
        `_places`, [segments with replicas, N] global slot or −1; and how deep they are."""
        segments, self.tree.shrunk = list(dict.fromkeys(self.tree.extras.values())), False
        self._replicated = np.full(self.num_instances * self.slots, -1, np.int32)
        self._replicated[[segment.slot for segment in segments]] = np.arange(len(segments))
        self._places = np.full((len(segments), self.num_instances), -1, np.int64)
        self.deepest = max((segment.depth for segment in segments), default=0)
        for line, segment in enumerate(segments):
            for instance, slot in segment.replicas.items():
                if slot not in self.copying:
                    self._places[line, instance] = slot

    def places(self, slots: np.ndarray):
        """Which of the slots have replicas: [h] indices, and where: [h, N] slot or −1."""
        if self.tree.shrunk:
            self._index()
        hot = np.flatnonzero(self._replicated[slots] >= 0)
        return hot, self._places[self._replicated[slots[hot]]]

    def choose(self, places: np.ndarray, cost: np.ndarray, load: np.ndarray) -> np.ndarray:
        """Power of two choices (§4.4): for each read [h] of a segment at `places` [h, N], the less
        loaded of two random replicas → [h] global slot. Adds costs to load [N], N at a time."""
        N, picks, rank = len(load), [np.zeros(0, np.int64)], (places >= 0).cumsum(1)
        count = rank[:, -1]
        first = self._rng.integers(count)
        second = (first + 1 + self._rng.integers(np.maximum(count - 1, 1))) % count
        pair = np.stack([(rank > n[:, None]).argmax(1) for n in (first, second)])
        for start in range(0, len(places), N):
            a, b = pair[:, start:start + N]
            picks.append(np.where(load[b] < load[a], b, a))
            np.add.at(load, picks[-1], cost[start:start + N])
        return places[np.arange(len(places)), np.concatenate(picks)]

    def observe(self, cost: np.ndarray):
        """Adds the work [N] of a planned iteration to the loads, which fade by an eighth each."""
        self.load += cost - (self.load + 7) // 8


BLOCK, WINDOW = 512, 10_000  # of a trace: tokens per hash id; ms that a CV is taken over


def variation(windows) -> float | None:
    """Coefficient of variation over instances, the mean over windows in which there is any load."""
    values = [float(w.std() / w.mean()) for w in windows if w.any()]
    return sum(values) / len(values) if values else None


def replay(lines: list[tuple], balancer: Balancer, kv_bytes: int = 131_072) -> dict:
    """A trace, (timestamp in ms, input_length, hash_ids), through the control plane alone: a
    timestamp is an iteration; each request reads what it hits once, and puts the rest. Load: tokens
    read at an instance; its CV: mean over windows; bytes cross instances. No room: ValueError."""
    N, S, C = balancer.sizes
    hits, put, total = 0, 0, sum(length for _, length, _ in lines)
    windows, milliseconds = {}, []
    for timestamp, group in groupby(lines, key=lambda line: line[0]):
        requests = [Request(0, (np.asarray(ids)[:, None] * BLOCK + np.arange(BLOCK)).ravel()[:n], n)
                    for _, n, ids in group]
        for request in requests:
            balancer.extend_ids(request)  # hashing is not planning
        started = time.perf_counter()
        balancer.replicate()
        load, planned = balancer.load.copy(), [0] * N
        most = -(-sum(len(request.tokens) for request in requests) // N) + C
        for request in requests:
            balancer.admit(request, matched := balancer.match(request))
            hits += request.done
            hot, places = balancer.places(request.table[:matched])
            load += C * np.bincount(np.delete(request.table[:matched], hot) // S, minlength=N)
            balancer.choose(places, np.full(len(hot), C), load)  # adds the chosen reads to it
            runs = balancer.reserve(request, request.remaining, planned, [0] * N, most)
            if runs is None:
                raise ValueError(f"the requests of {timestamp} ms need more than {N * S} segments")
            put += sum(run.rows for run in runs if run.puts and run.instance != run.slot // S)
        for request in requests:
            balancer.commit(request, request.remaining)
            balancer.release(request)
        reads = load - balancer.load
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
    if not (after <= at < 2**53 and length > 0 and len(ids) == -(-length // BLOCK)
            and all(type(id) is int and 0 <= id < 2**50 for id in (length, *ids))):
        raise ValueError
    return at, length, ids


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser("balancer.py", description="Replay a trace, planning only.")
    parser.print_usage = lambda *_: None  # an error is one line
    add = parser.add_argument
    add("--trace", required=True, metavar="FILE", help="timestamp, input_length, hash_ids per line")
    add("--instances", type=int, default=8, metavar="N", help="default 8")
    add("--placement", choices=("stripe", "hash"), default="stripe", help="default stripe")
    add("--replicate-factor", type=float, default=3.0, metavar="c", help="0: none; default 3")
    add("--segment-tokens", type=int, default=512, metavar="C", help="default 512")
    add("--capacity-tokens", type=int, metavar="T", help="of the whole pool; default: all fits")
    add("--json", action="store_true", help="print one JSON object")
    options, lines = parser.parse_args(arguments), []
    for name, value in vars(options).items():
        lowest = 0 if name == "replicate_factor" else 1
        if type(value) in (int, float) and not lowest <= value < 2**40:
            parser.error(f"--{name.replace('_', '-')} {value}: a number from {lowest} is expected")
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
                                        options.replicate_factor))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(json.dumps(result) if options.json else "\n".join(
        f"{key:>16}  {'–' if value is None else format(value, ',.4g')}"
        for key, value in result.items()))


if __name__ == "__main__":
    main()
