"""Control plane: who holds what? (§4.) Plain Python and NumPy, no torch.

A request's tokens are cut into *segments* of C. A full one has an id, the chained hash of all
tokens up to its end, and is published in the *prefix tree*; a request that reads it *pins* it.
Where its tokens end, the segment that is not full belongs to the request alone: it is its *open
tail*.

`Request.table` says in which slot each segment lies. With `done` tokens in the pool and `rows`
next:

    tokens   0 ······ len(segments)·C ······ done ······ done+rows ······ len(tokens)
             │ published, pinned │  its own,   │  written in  │ not computed │
             │ read only         │  earlier    │  this        │ yet          │
             │ (maybe by others) │  iterations │  iteration   │              │

Three things keep N instances evenly loaded. *Placement*: a segment lives one instance after its
parent, or where its hash says. *Replication*: heavy hitters, the few that many requests share, are
copied when their instance is overloaded. *Choice*: of two replicas drawn at random the less loaded
is read, by enough rows together (a bundle, see tokenlake.py). `python balancer.py` shows a small
scene, and with `--trace FILE` what each is worth.

Every rank runs this and has to decide the same, so nobody asks anybody. There are no sets and no
`hash()`, whose order differs between processes; random draws come from one seeded generator; and
what decides is an integer, as floats that two machines measure, or sum in another order, differ in
the last bit. (Heat is a float, but a sum of ones and exact halves; a quotient of two numbers is the
same everywhere.)

Rows are *committed* before the next iteration is planned, and the segments that they fill are
published: from that plan on others can hit them. With `--plan-ahead` the device may still be
writing them then; but it reads what the next plan asks for after that, as it works in order. A
segment is evicted only when nobody pins it, children first: see `PrefixTree`.

At the end stand two things that need no tensors either: the paper's dynamic program, and the time
model.

Notation: N instances · S slots per instance · C tokens per segment. A *global slot* is
instance · S + slot; a *run* is consecutive rows of one request within one segment.
"""

import hashlib
import heapq
import math
import os
import sys
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

# When to copy. None of these has to be exact: they were varied in replays on 8 instances, homes by
# hash, of Mooncake's conversation trace, unless another is named; CV and copies were looked at.

# An instance is overloaded from 11/10 of the mean load on. Higher leaves loads with several hot
# prefixes uneven. Lower makes nothing more even, but 129 copies instead of 81:
#
#                             1/1    11/10   3/2    2/1
#     toolagent (CV)          0.04   0.04    0.12   0.35    three hot prefixes (bench/workloads.py)
#     conversation (copies)   129    81      7      7       one hot block; the CV is the same
OVERLOAD = (11, 10)
# Loads lose an eighth in each iteration, so half in five: the CV is 0.144, with 81 copies. If they
# lose a quarter, it is 0.135 with 96; with a 64th it is 0.158 with 45.
LOAD_FADE = 8
# Heat is halved after 16·N admissions in all. After 4·N, copies are seven times as many and the CV
# is the same; after 64·N they are a fifth fewer, but a prefix stays hot for longer.
HALF_LIFE = 16
# Copies take a sixteenth of all slots at most. On that trace there are never so many: it keeps a
# pool of few slots from filling up with copies.
REPLICA_SLOTS = 16

UNLIMITED = 1 << 60  # rows


@dataclass(eq=False, slots=True)
class Segment:
    """A published segment: C tokens and, through the chain of ids, everything before them."""
    id: bytes
    parent: "Segment | None"
    # Instance → global slot; the first one lives as long as the segment.
    replicas: dict[int, int]
    children: dict = field(default_factory=dict)  # segments by id
    readers: dict = field(default_factory=dict)  # running requests that pin it
    touched: int = 0  # when it was last accessed, by PrefixTree.clock
    depth: int = 0  # segments on the path from the root to here
    # Requests that hit it, recent ones weigh more; never less than a child's.
    heat: float = 0.0

    @property
    def slot(self) -> int:
        """Global slot of the first replica."""
        return next(iter(self.replicas.values()))

    @property
    def pins(self) -> int:
        """Never less than a child's: whoever pins a segment pins all before it."""
        return len(self.readers)


def root_id(salt: str) -> bytes:
    """In place of a parent's id, for first segments: behind another salt all is another cache."""
    salt_bytes = salt.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(salt_bytes, digest_size=16, person=b"root").digest()


class PrefixTree:
    """All published segments (§4.1), the global LRU of what may leave, and what is read most.

    A parent never leaves before its child. Whoever pins a segment pins all before it, and
    `Balancer.release` unpins the leaf first. So a child enters the LRU before its parent, and the
    oldest of all is a leaf."""
    def __init__(self, half_life=128):
        # Of no tokens; its heat is the sum of all hits.
        self.root = Segment(b"", None, {})
        self.segments = {}  # by id
        self.lru = OrderedDict()  # segments that are not pinned, by id, oldest first
        # Segments by the slots of their replicas but the first, in order of last access or making.
        self.extras = OrderedDict()
        self.extras_evicted = False  # since this was last looked at
        self.half_life = half_life
        self.clock = 0
        self.admissions = 0

    def match(self, ids) -> int:
        """How many of a request's segments are published. As parents stay, those are the first
        ones, and can be bisected."""
        return bisect_left(ids, True, key=lambda id: id not in self.segments)

    def insert(self, id: bytes, parent: Segment | None, instance, slot) -> Segment:
        parent = parent or self.root
        segment = Segment(id, parent, {instance: slot}, depth=parent.depth + 1)
        self.segments[id] = segment
        parent.children[id] = segment
        return segment

    def hit(self, segments: list[Segment], reader: "Request"):
        """Counts and pins what an admission reads. After half_life admissions all heat is
        halved."""
        self.clock += 1
        self.admissions += 1
        if self.admissions % self.half_life == 0:
            for segment in (self.root, *self.segments.values()):
                segment.heat *= 0.5
        for segment in segments:
            segment.heat += 1.0
            self.pin(segment, reader)
        self.root.heat += len(segments)

    def heaviest(self, count, above=0.0) -> list[Segment]:
        """The `count` most read over `above`, by best-first search: no child is over its parent."""
        found = []
        heap = [(0.0, b"", self.root)]
        while heap and len(found) <= count:
            _, _, segment = heapq.heappop(heap)
            found.append(segment)
            for child in segment.children.values():
                if child.heat > above:
                    heapq.heappush(heap, (-child.heat, child.id, child))
        return found[1:]  # without the root

    def pin(self, segment, reader: "Request"):
        """One reader more."""
        self.lru.pop(segment.id, None)
        readers = segment.readers
        if len(readers) == 1:
            next(iter(readers)).num_shared += 1
        readers[reader] = None
        reader.num_shared += len(readers) > 1
        self._touch(segment)

    def unpin(self, segment, reader: "Request"):
        """One reader less; the last one leaves it the youngest of the LRU."""
        readers = segment.readers
        reader.num_shared -= len(readers) > 1
        del readers[reader]
        if len(readers) == 1:
            next(iter(readers)).num_shared -= 1
        if not readers:
            self.lru[segment.id] = segment
        self._touch(segment)

    def _touch(self, segment):
        segment.touched = self.clock
        for slot in islice(segment.replicas.values(), 1, None):
            self.extras.move_to_end(slot)

    def evict(self) -> int | None:
        """Takes a replica of the globally least recently used segment out (§4.4): its global slot;
        None if all are pinned. A pin holds a segment's first replica. The others leave before it,
        the last one made first, and may do so while it is pinned."""
        heads = [
            next(iter(candidates.values()), None)
            for candidates in (self.extras, self.lru)
        ]
        oldest = min(filter(None, heads), key=attrgetter("touched"), default=None)
        if oldest is None:
            return None
        _, slot = oldest.replicas.popitem()
        if oldest.replicas:
            del self.extras[slot]
            self.extras_evicted = True
        else:
            del self.lru[oldest.id]
            del self.segments[oldest.id]
            del oldest.parent.children[oldest.id]
        return slot


@dataclass(eq=False)
class Request:
    """A request and what it holds. A token gets its KV when it is fed to the model: the newest one
    has none yet."""
    id: int
    tokens: list[int]  # the prompt, then what has been generated
    max_tokens: int  # generation stops at this many, prompt included
    salt: str = ""  # requests with different salts share nothing
    num_prompt: int = field(init=False)
    logprobs: list[float] = field(default_factory=list)  # of the tokens behind the prompt
    done: int = 0  # tokens whose KV is in the pool
    # The most `done` has been: after a preemption, rows below it are computed again.
    peak: int = 0
    ids: list = field(default_factory=list)  # of the full segments among `tokens`
    segments: list = field(default_factory=list)  # published and pinned
    num_shared: int = 0  # of these, the first ones, which others pin, too
    table: np.ndarray | None = None  # [segments] global slot; the published ones first
    num_slots: int = 0  # entries of the table in use
    held_row: int | None = None  # of Balancer.held, while it runs
    order: int | None = None  # of arrival

    def __post_init__(self):
        self.num_prompt = len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.done

    @property
    def decoding(self) -> bool:
        return self.remaining == 1 and len(self.tokens) > self.num_prompt


@dataclass(eq=False, slots=True)
class Run:
    """Rows [position, position + rows) of a request, all in one segment."""
    request: Request
    position: int
    rows: int
    # Instance that is proposed for it: its home, if that has room for more rows.
    preferred: int
    slot: int  # global slot of its segment
    puts: bool  # False: its KV is published already, only its logits are needed
    decode: bool

    @property
    def samples(self) -> bool:
        """Whether its last row is the request's last, whose logits give the next token."""
        return self.position + self.rows == len(self.request.tokens)


def least_loaded(load: list[int], preferred, limit) -> int:
    """The preferred instance if its load is within the limit, else the least loaded one, of equals
    the first after it."""
    if load[preferred] <= limit:
        return preferred
    N = len(load)
    return min(range(N), key=lambda i: (load[i], (i - preferred) % N))


class Balancer:
    """The pool's bookkeeping. replicate_factor: c of the ceil(c·N·ln N) heavy hitters that may be
    copied. If so many are read evenly from all, N instances are balanced whatever the others are
    (§4.3): in a Monte Carlo over random homes of these, the busiest instance has 1.3 times the mean
    load for c = 3, and 1.6 times for c = 1."""
    def __init__(
        self,
        num_instances: int,
        slots: int,
        segment_tokens: int,
        placement: str = "stripe",
        replicate_factor: float = 3.0,
    ):
        N = num_instances
        self.num_instances = N
        self.slots = slots
        self.segment_tokens = segment_tokens
        self.sizes = N, slots, segment_tokens  # N, S, C
        self.placement = placement
        self.num_heavy = math.ceil(replicate_factor * N * math.log(N))
        self.tree = PrefixTree(HALF_LIFE * N)
        # Free slots by instance, taken from the end: the lowest first.
        self.free = [list(range(i * slots, (i + 1) * slots))[::-1] for i in range(N)]
        self.in_progress = {}  # id of a segment → request whose prompt fills it
        self.evictions = 0
        self.duplicates = 0
        self.copies = 0
        self.replicas_max = 1
        # [N] attention done (QueryPlan.load; in a replay, tokens read), recent iterations more.
        self.load = np.zeros(N, np.int64)
        self.copying = {}  # slot → segment that this iteration copies there
        # [running requests, N] segments with tokens written, by Request.held_row.
        self.held = np.zeros((0, N), np.int64)
        self._free_held_rows = []
        self._rng = np.random.Generator(np.random.PCG64(0))
        self._index_replicas()

    # ── a request's life: match, admit, reserve and commit by turns, release ──

    def extend_ids(self, request):
        """Ids of the segments that `tokens` has filled since the last call (§4.1: chained
        hashes)."""
        C = self.segment_tokens
        ids = request.ids
        for start in range(len(ids) * C, len(request.tokens) - C + 1, C):
            parent = ids[-1] if ids else root_id(request.salt)
            tokens = np.asarray(request.tokens[start : start + C], np.int64)
            ids.append(
                hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()
            )

    def match(self, request) -> int:
        """The number of leading segments that the pool holds."""
        self.extend_ids(request)
        return self.tree.match(request.ids)

    def awaited(self, request, matched) -> bool:
        """Whether the next segment is being prefilled by another request: better wait for it."""
        return matched < len(request.ids) and request.ids[matched] in self.in_progress

    def num_segments(self, tokens) -> int:
        return -(-tokens // self.segment_tokens)

    def fits(self, request, matched, promised) -> bool:
        """Whether slots for the rest of the prompt can be had besides those promised to others."""
        evictable = len(self.tree.lru) + len(self.tree.extras)
        # Matched segments are not there to be evicted: admission pins them.
        evictable -= sum(not self.tree.segments[id].pins for id in request.ids[:matched])
        available = sum(map(len, self.free)) + evictable
        return available - promised >= self.num_segments(len(request.tokens)) - matched

    def admit(self, request, matched):
        """Pins what matched. Even if that is all, one row is computed again: to have its logits."""
        request.segments = [self.tree.segments[id] for id in request.ids[:matched]]
        self.tree.hit(request.segments, request)
        request.table = np.zeros(self.num_segments(request.max_tokens), np.int32)
        request.table[:matched] = [segment.slot for segment in request.segments]
        request.num_slots = matched
        request.done = min(matched * self.segment_tokens, len(request.tokens) - 1)
        if not self._free_held_rows:
            longer = len(self.held) * 2 + 8
            self._free_held_rows = list(range(len(self.held), longer))
            self.held = np.resize(self.held, (longer, self.num_instances))
        request.held_row = self._free_held_rows.pop()
        instances = request.table[:matched] // self.slots
        self.held[request.held_row] = np.bincount(instances, minlength=self.num_instances)
        for id in request.ids[matched:]:
            self.in_progress.setdefault(id, request)

    def commit(self, request, rows):
        """The rows are written before anything that is planned from now on: publishes the segments
        that they fill."""
        C = self.segment_tokens
        held = self.held[request.held_row]
        # A segment is held from its first token on; those with earlier tokens are counted. (The max
        # is for C = 1, where the last segment of a fully cached prompt has no token before `done`.)
        counted = max(len(request.segments), self.num_segments(request.done))
        end = self.num_segments(request.done + rows)
        for slot in request.table[counted:end].tolist():
            held[slot // self.slots] += 1
        request.done += rows
        request.peak = max(request.peak, request.done)
        while len(request.segments) < request.done // C:
            segment = self._publish(request, len(request.segments))
            self.tree.pin(segment, request)
            request.segments.append(segment)
            self._stop_awaiting(request, segment.id)

    def _publish(self, request, index):
        """A segment of a request enters the tree where it is; if its id is there already, ours is
        freed and the request reads the other."""
        id = request.ids[index]
        slot = int(request.table[index])
        segment = self.tree.segments.get(id)
        if segment is None:
            parent = request.segments[-1] if index else None
            return self.tree.insert(id, parent, slot // self.slots, slot)
        self.free[slot // self.slots].append(slot)
        self.duplicates += 1
        request.table[index] = segment.slot
        held = self.held[request.held_row]
        held[slot // self.slots] -= 1
        held[segment.slot // self.slots] += 1
        return segment

    def _stop_awaiting(self, request, id):
        """Nobody waits any more for this request to prefill a segment."""
        if self.in_progress.get(id) is request:
            del self.in_progress[id]

    def release(self, request):
        """Gives back everything: a finished request, or one that is preempted and starts over."""
        published = len(request.segments)
        for slot in request.table[published : request.num_slots].tolist():
            self.free[slot // self.slots].append(slot)
        self.tree.clock += 1
        for segment in reversed(request.segments):  # leaf first: see PrefixTree
            self.tree.unpin(segment, request)
        for id in request.ids[published:]:
            self._stop_awaiting(request, id)
        self._free_held_rows.append(request.held_row)
        request.segments = []
        request.num_slots = 0
        request.done = 0

    # ── placement (§4.3): where new segments live, and who computes their rows ──

    def open_tails(self, running: list[Request]) -> list[int]:
        """[N] open tails that live at each instance."""
        N, S, C = self.sizes
        open_ones = [r for r in running if r.num_slots * C > len(r.tokens)]
        slots = np.array([r.table[r.num_slots - 1] for r in open_ones], np.int64)
        return np.bincount(slots // S, minlength=N).tolist()

    def reserve(
        self,
        request,
        rows,
        planned: list[int] | None = None,
        tails: list[int] | None = None,
        most=UNLIMITED,
    ) -> list[Run] | None:
        """Runs for the next `rows` tokens, in slots where their segments will live; None if all
        slots are pinned (the request keeps what was reserved for it). planned [N]: rows planned so
        far, updated on success; tails [N]: open tails, updated (both are none by default). An
        instance that would have more than `most` rows leaves some to the least planned one: these
        are computed there, and put."""
        N, S, C = self.sizes
        planned = [0] * N if planned is None else planned
        tails = [0] * N if tails is None else tails
        rows_at = list(planned)
        runs = []
        position = request.done
        stop = position + rows
        while position < stop:
            index = position // C
            count = min(stop, (index + 1) * C) - position
            if index == request.num_slots:
                home = self._home(request, index, count, rows_at, tails, most)
                slot = self._allocate(home)
                if slot is None:
                    return None
                request.table[index] = slot
                request.num_slots += 1
                tails[slot // S] += index >= len(request.ids)
            run = self._next_run(request, position, count, rows_at, most)
            rows_at[run.preferred] += run.rows
            runs.append(run)
            position += run.rows
        planned[:] = rows_at
        return runs

    def _next_run(self, request, position, count, rows_at, most):
        """Up to `count` rows of a segment: as many as its home has room for; if it has none, all,
        at the instance with the fewest."""
        index = position // self.segment_tokens
        slot = int(request.table[index])
        home = slot // self.slots
        room = max(most - rows_at[home], 0)
        rows = min(count, room or count)
        instance = least_loaded(rows_at, home, most - rows)
        puts = index >= len(request.segments)
        return Run(request, position, rows, instance, slot, puts, request.decoding)

    def _home(self, request, index, rows, rows_at, tails, most):
        """Where a new segment should live. `hash`: where its id says, as in the paper; `stripe`: a
        first child one instance after its parent, so that a long prefix is read evenly from all,
        others by hash. If that instance would have over `most` rows: where the fewest are. Open
        tails go where tails are fewest, below `most`: their decodes are computed there."""
        N, S, _ = self.sizes
        after_parent = (int(request.table[index - 1]) // S + 1) % N if index else 0
        if index >= len(request.ids):  # an open tail

            def crowding(i):
                return rows_at[i] + rows > most, tails[i], (i - after_parent) % N

            return min(range(N), key=crowding)
        is_first_child = True
        # A parent that is not yet published has no children.
        if 0 < index == len(request.segments):
            is_first_child = not request.segments[-1].children
        home = after_parent
        if self.placement == "hash" or index == 0 or not is_first_child:
            home = int.from_bytes(request.ids[index][:8], "little") % N
        return least_loaded(rows_at, home, most - rows)

    def _allocate(self, home, try_others=True):
        """A free slot at home, or else where most are free (if others are to be tried); or else one
        that is evicted, wherever it is; None if all are pinned."""
        free = self.free[home]
        if not free and try_others:
            free = max(self.free, key=len)
        if free:
            return free.pop()
        slot = self.tree.evict()
        self.evictions += slot is not None
        return slot

    # ── replication (§4.3): heavy hitters of overloaded instances are copied ──

    def replicate(self) -> dict[int, int]:
        """Copies for this iteration, N at most, which can be read from the next one on: global slot
        that is filled → global slot that is copied. A short prefix that all requests hit ends up
        everywhere, as long as instances that have it are overloaded. Of a long one each segment is
        a smaller part of all hits, and gets fewer replicas, or none (see `_wanted_copies`)."""
        N, S, _ = self.sizes
        were_copying = self.copying
        self.copying = {}
        unfit = []  # slots that eviction gave where the segment is already
        for segment, target in self._wanted_copies():
            spent = len(self.tree.extras) >= N * S // REPLICA_SLOTS
            if spent or len(self.copying) == N or len(unfit) == N:
                break
            # Before eviction, which may take one of them.
            holders = tuple(segment.replicas)
            slot = self._allocate(target, try_others=False)
            if slot is None:
                break
            if slot // S in holders:
                unfit.append(slot)
            else:
                self._add_replica(segment, slot)
        for slot in unfit:
            self.free[slot // S].append(slot)
        # A later slot may have been evicted from an earlier copy: that one is not made.
        self.copying = {
            slot: segment
            for slot, segment in self.copying.items()
            if segment.replicas.get(slot // S) == slot
        }
        self.copies += len(self.copying)
        if were_copying or self.copying:
            self._index_replicas()
        return {slot: segment.slot for slot, segment in self.copying.items()}

    def _wanted_copies(self):
        """Segments that want a replica, the most read first, and an instance for it: those with
        free slots first, then the least loaded. The caller adds replicas in between.

        A replica takes heat / replicas of a segment's hits. That is `enough` if it is 1/num_heavy
        of the hits that each instance has when all have the same, root.heat / N: then one replica
        of each heavy hitter, all on one instance, would be no more than its share. So under a
        steady load copying stops."""
        N = self.num_instances
        limit, whole = OVERLOAD
        overloaded = self.load * (whole * N) > self.load.sum() * limit
        if not overloaded.any() or not self.num_heavy:
            return
        enough = self.tree.root.heat / (self.num_heavy * N)
        targets = sorted(range(N), key=lambda i: (not self.free[i], self.load[i]))
        for segment in self.tree.heaviest(self.num_heavy, enough):
            for target in targets:
                if target in segment.replicas:
                    continue
                wants = segment.heat > enough * len(segment.replicas)
                if wants and any(overloaded[i] for i in segment.replicas):
                    yield segment, target

    def _add_replica(self, segment, slot):
        segment.replicas[slot // self.slots] = slot
        self.replicas_max = max(self.replicas_max, len(segment.replicas))
        self.tree.extras[slot] = segment
        self.copying[slot] = segment

    def _index_replicas(self):
        """Tables of the segments with replicas that can be read now, for `replicas_of`."""
        N, S, _ = self.sizes
        segments = list(dict.fromkeys(self.tree.extras.values()))
        self.tree.extras_evicted = False
        self.deepest_replicated = max((segment.depth for segment in segments), default=0)
        # [N·S] global slot of a first replica → entry in the other table, −1 without others.
        self._replica_row = np.full(N * S, -1, np.int32)
        self._replica_row[[segment.slot for segment in segments]] = np.arange(
            len(segments)
        )
        # [segments with others, N] global slot of each of its replicas, −1 where there is none.
        self._replica_slots = np.full((len(segments), N), -1, np.int32)
        for row, segment in enumerate(segments):
            for instance, slot in segment.replicas.items():
                if slot not in self.copying:
                    self._replica_slots[row, instance] = slot

    # ── choice (§4.4): which replica is read ──

    def replicas_of(self, slots):
        """slots [n] of first replicas: which of them have others, [h] indices, and the slots of all
        their replicas, [h, N], −1 where there is none."""
        if self.tree.extras_evicted:
            self._index_replicas()
        replicated = np.flatnonzero(self._replica_row[slots] >= 0)
        return replicated, self._replica_slots[self._replica_row[slots[replicated]]]

    def choose_replicas(self, candidates, cost, load: np.ndarray):
        """Power of two choices: for each of h reads (or bundles of reads) of a segment, whose
        replicas are in the slots `candidates` [h, N], the less loaded of two random ones → [h]
        global slot. Adds the costs [h] to load [N]: for speed, N reads choose by the same load,
        then it is updated."""
        N = len(load)
        number = (candidates >= 0).cumsum(1, np.int32)  # of replicas up to an instance
        count = number[:, -1]
        first = self._rng.integers(count)
        other = self._rng.integers(np.maximum(count - 1, 1))
        second = (first + 1 + other) % count
        # The n-th replica (from 0) is at the first instance up to which n + 1 are counted.
        pair = np.stack([(number > n[:, None]).argmax(1) for n in (first, second)])
        chosen = np.zeros(len(candidates), np.int64)
        for start in range(0, len(candidates), N):
            reads = slice(start, start + N)
            a, b = pair[:, reads]
            less_loaded = np.where(load[b] < load[a], b, a)
            np.add.at(load, less_loaded, cost[reads])
            chosen[reads] = less_loaded
        return candidates[np.arange(len(candidates)), chosen]

    def observe(self, cost):
        """Adds the work [N] of a planned iteration to the loads, which fade: rounded so that an
        idle one comes to 0."""
        self.load += cost - (self.load + LOAD_FADE - 1) // LOAD_FADE


def variation(windows) -> float | None:
    """Coefficient of variation over instances, the mean over windows in which there is any load."""
    values = [float(w.std() / w.mean()) for w in windows if w.any()]
    return sum(values) / len(values) if values else None


# ── batches (§6.2): which requests run together, on how many instances ───────────────────────────

FORBIDDEN = 1 << 60  # ps, longer than anything takes


class BatchRange(NamedTuple):
    """A batch of consecutive items, first to end − 1, and its DoP."""
    first: int
    end: int
    dop: int


def dynamic_program(time, R, N, slo: int | None = None) -> list[BatchRange] | None:
    """Cuts R requests into batches with DoPs on N instances (§6.2), every time at most `slo`, by

        f(i, k) = min over j < i, l < k of f(j, l) + (i − j)·T(j … i − 1, k − l)

    so a batch's time counts for each of its requests, which are counted from 0. time(i, dop) → [i]
    integers: entry j is the time T of requests j … i − 1; FORBIDDEN rules the batch out. None if
    nothing is allowed."""
    best = np.full((R + 1, N + 1), FORBIDDEN)
    best[0] = 0  # for any k: instances may stay idle
    best_first = np.zeros((R + 1, N + 1), np.int64)
    best_dop = np.zeros((R + 1, N + 1), np.int64)
    for i in range(1, R + 1):
        for dop in range(1, N + 1):
            times = time(i, dop)
            # A sum of R allowed times stays below FORBIDDEN.
            allowed = (times < FORBIDDEN // (R + 1)) & (times <= (slo or FORBIDDEN))
            cost = np.where(allowed, times, 0) * np.arange(i, 0, -1)
            total = best[:i, : N + 1 - dop] + cost[:, None]  # [j, instances before]
            total = np.where(allowed[:, None], total, FORBIDDEN)
            better = np.flatnonzero(total.min(0) < best[i, dop:])
            k = dop + better
            best[i, k] = total.min(0)[better]
            best_first[i, k] = total.argmin(0)[better]
            best_dop[i, k] = dop
    if best[R, N] == FORBIDDEN:
        return None
    batches = []
    i = R
    k = N
    while i:
        first = int(best_first[i, k])
        dop = int(best_dop[i, k])
        batches.insert(0, BatchRange(first, i, dop))
        i = first
        k -= dop
    return batches


# ── how long an iteration takes (§6.2) ───────────────────────────────────────────────────────────

# An A100 in bf16, in FLOP/s and B/s: what plans assume of the hardware. TimePredictor begins with
# it, and goes on to what it measures.
FLOPS = 312e12
BANDWIDTH = 2.04e12
LINK = 300e9
EXCHANGE_SECONDS = 10e-6  # of the smallest exchange: assumed, as in bench/simulate.py
# An iteration that took so many times what is usual was held up by something else.
STALL = 3


class TimePredictor:
    """The time of an instance (§6.2), in ps: a + b·rows + c·rows·tokens + e·KiB. Integers, so that
    ranks agree. The coefficients are a roofline's at first; then rank 0 fits them, and its fit
    is used once all ranks have it (engine.py).

    An iteration is planned by an even split of its work. It takes longer: its slowest instance
    has more, and the fit has errors of its own. So times are multiplied by a fifth number, in
    thousandths: what iterations with prompt rows, while decodes wait, took in all, over what an
    even split would have. (In all, as the time between tokens that is to be kept is a mean.)"""
    def __init__(self, lake):
        shape = lake.llama_config
        self.bytes_per_row = shape.num_layers * lake.kv_bytes
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim
        linear = 2 * shape.num_linear_parameters
        weights = lake.weight_bytes / BANDWIDTH
        seconds = weights, linear / FLOPS, attention / FLOPS, 1024 / LINK
        self.fitted = [*(round(x * 1e12) for x in seconds), 1000]
        self.coefficients = self.fitted
        self.samples = []  # (1, rows, rows · tokens, KiB, seconds)
        self.expected = ()  # what this iteration is planned by: see `expect`
        # (1, rows, rows · tokens, KiB) of that and of the slowest instance, and seconds.
        self.splits = []
        self.count = 0

    def time(self, rows, pairs, kib):
        """ps, for integers or arrays of them."""
        a, b, c, e, _ = self.coefficients
        return a + b * rows + c * pairs + e * kib

    def split(self, rows, pairs, dop):
        """Rows, pairs and KiB of an instance, if rows are split evenly over `dop`. A row's fresh KV
        goes to the instances with later rows: to half of the others, on average."""
        kib = rows * self.bytes_per_row * (dop - 1) // 2 // 1024
        return -(-rows // dop), -(-pairs // dop), -(-kib // dop)

    def longest_time(self, rows, pairs, kib):
        """ps of the slowest instance, if this is an even split's."""
        return self.time(rows, pairs, kib) * self.coefficients[-1] // 1000

    def expect(self, works: list[tuple]):
        """Notes the work of each batch, split evenly, if the iteration counts; else nothing."""
        self.expected = max(works, key=lambda work: self.time(*work), default=())

    def measured(self, features, seconds, expected=None):
        """Takes an iteration with `features` [N, 3], of which the instance that should be the
        slowest counts; expected: what it was planned by, if another is planned already. After
        every 32 it fits the last 256, by least squares with no coefficient below 0; the first 8,
        which warm up, are left out, and so are stalls."""
        slowest = features[np.argmax(self.time(*features.T))].tolist()
        self.count += 1
        if self.count > 8:
            self.samples = [*self.samples, (1, *slowest, seconds)][-256:]
            expected = self.expected if expected is None else expected
            if expected:
                split = 1, *expected, 1, *slowest, seconds
                self.splits = [*self.splits, split][-256:]
        if self.count % 32 == 0:
            solution = self._fit()
            longer = self._measure_split(solution)
            self.fitted = [*(round(x * 1e12) for x in solution), round(1000 * longer)]

    def _fit(self):
        """A first fit, of relative errors, hardly heeds a stall: so it tells what is one. It is
        often too short, as that is where relative errors are smallest, but not by STALL."""
        work, times = np.split(np.array(self.samples), [4], 1)
        times = times[:, 0]
        scale = np.maximum(1, work.max(0))
        work = work / scale
        usual, _ = nnls(work / times[:, None], np.ones(len(times)))
        fair = times <= STALL * (work @ usual)
        solution, _ = nnls(work[fair], times[fair])
        return solution / scale

    def _measure_split(self, solution) -> float:
        """How many times as long iterations took as an even split of their work would have, but for
        stalls: 1 if nothing is known."""
        if not self.splits:
            return 1.0
        even, slowest, times = np.split(np.array(self.splits), [4, 8], 1)
        times = times[:, 0]
        fair = times <= STALL * (slowest @ solution)
        even = even @ solution
        return float(times[fair].sum() / even[fair].sum()) if fair.any() else 1.0


# ── the lesson, run: a scene of five requests ────────────────────────────────────────────────────


def show_scene():
    """Three instances. Requests come one by one, and each puts its whole prompt into the pool."""
    balancer = Balancer(num_instances=3, slots=6, segment_tokens=4)
    over, whole = OVERLOAD
    N, S, C = balancer.sizes
    copies = N * S // REPLICA_SLOTS
    print(f"""\
{N} instances of {S} slots, each for a segment of {C} tokens. 12@2: slot 12, at instance 2.
Homes: a first child lives one instance after its parent, any other segment where its hash says.
If that instance is full, the segment lives where most slots are free.
Replicas: if an instance has over {over}/{whole} of the mean load, the segment that is read most
there is copied to another; of two that are read alike, the earlier one of the prompt. Copies may
take {copies} of the {N * S} slots, a {REPLICA_SLOTS}th. They can be read an iteration later.""")
    shared = list(range(8))
    prompts = [shared + [first, 0, 0, 0] for first in range(20, 24)]
    prompts.append(list(range(100, 148)))
    for number, prompt in enumerate(prompts):
        show_request(balancer, Request(number, prompt, len(prompt) + 1))
    print("\nNext: pool.py, how rows of one instance read segments of another.")


def show_request(balancer, request):
    """An iteration with one request, step by step."""
    N, S, C = balancer.sizes
    print(f"\nrequest {request.id}, {request.num_prompt} tokens; loads: {balancer.load}")
    for target, source in balancer.replicate().items():
        overloaded = f"instance {source // S} is overloaded"
        print(f"  replica   of {places([source], S)}, in {places([target], S)}: {overloaded}")
    matched = balancer.match(request)
    balancer.admit(request, matched)
    read = request.table[:matched].copy()
    replicated, candidates = balancer.replicas_of(read)
    cost = np.full(len(replicated), C)
    read[replicated] = balancer.choose_replicas(candidates, cost, balancer.load.copy())
    print(f"  hits      {places(read, S)}: {request.done} tokens")
    slot_of = {id: segment.slot for id, segment in balancer.tree.segments.items()}
    balancer.reserve(request, request.remaining)
    for id, slot in slot_of.items():
        if id not in balancer.tree.segments:
            print(f"  eviction  {places([slot], S)}: least recently used, and nobody pins it")
    new = request.table[matched : request.num_slots].tolist()
    print(f"  homes     {places(new, S)}")
    # The first child of a segment of its own should live one instance after that.
    for parent, slot in zip(new, new[1:]):
        wanted = (parent // S + 1) % N
        if slot // S != wanted:
            print(f"            {places([slot], S)}, as instance {wanted} is full")
    balancer.commit(request, request.remaining)
    balancer.release(request)
    balancer.observe(C * np.bincount(read // S, minlength=N))


def places(slots, S):
    """Global slots with their instances."""
    return " ".join(f"{slot}@{slot // S}" for slot in slots) or "none"


# What placement, replication and choice are worth on a trace, bench/replay.py counts: it has the
# options. Without any there is the scene.
if __name__ == "__main__":
    if not sys.argv[1:]:
        show_scene()
    else:
        replay = os.path.dirname(os.path.abspath(__file__)) + "/bench/replay.py"
        os.execv(sys.executable, [sys.executable, replay, *sys.argv[1:]])
