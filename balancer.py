"""Control plane: who holds what, and who computes what (§4, §5). Plain Python and NumPy, no torch.

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

All of it is deterministic: the same calls in the same order give the same state on every rank, so
every rank runs it and nobody asks anybody. Hence no sets, no `hash()`, no floats that one rank
measured.

    reserve   rows of a request → runs, each with a home slot          (compute where it will live)
    gen_plans runs → who computes them, which holders they read, where their KV goes
    commit    after the iteration: full segments are published
    release   a finished or preempted request unpins what it used

Left out so far: replicas (every segment has one), so a replica choice and heavy hitters.

Notation: N instances · S slots per instance · C tokens per segment · B runs. A *global slot* is
instance · S + slot; a *run* is consecutive rows of one request within one segment.
"""

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(eq=False, slots=True)
class Segment:
    """A published segment: C tokens and, through the chain of ids, everything before them."""

    id: bytes
    parent: "Segment | None"
    replicas: dict[int, int]  # instance → global slot
    children: dict[bytes, "Segment"] = field(default_factory=dict)
    pins: int = 0  # running requests that read it

    @property
    def slot(self) -> int:
        """Global slot of the replica to read."""
        return next(iter(self.replicas.values()))


class PrefixTree:
    """All published segments (§4.1), and the global LRU of those that no running request reads."""

    def __init__(self):
        self.segments: dict[bytes, Segment] = {}
        # Oldest first. A path enters leaf before parent, and whoever reads a segment reads its
        # ancestors too; so the oldest is always a leaf, and no child outlives its parent.
        self.lru: OrderedDict[bytes, Segment] = OrderedDict()

    def match(self, ids: list[bytes]) -> int:
        """How many of a request's segments, from its first on, are published."""
        return next((i for i, id in enumerate(ids) if id not in self.segments), len(ids))

    def insert(self, id: bytes, parent: Segment | None, instance: int, slot: int) -> Segment:
        segment = self.segments[id] = Segment(id, parent, {instance: slot})
        if parent:
            parent.children[id] = segment
        return segment

    def pin(self, segment: Segment):
        if not segment.pins:
            self.lru.pop(segment.id, None)
        segment.pins += 1

    def unpin(self, segment: Segment):
        segment.pins -= 1
        if not segment.pins:
            self.lru[segment.id] = segment

    def evict(self) -> Segment | None:
        """Removes the least recently used segment; None when all are pinned."""
        if not self.lru:
            return None
        segment = self.lru.popitem(last=False)[1]
        del self.segments[segment.id]
        if segment.parent:
            del segment.parent.children[segment.id]
        return segment


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
    order: int | None = None  # of arrival

    def __post_init__(self):
        self.num_prompt = len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.done


@dataclass(eq=False, slots=True)
class Run:
    """Rows [position, position + rows) of a request, all in one segment; so they read the same
    segments, and only the last of these needs the causal rule."""

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


@dataclass(frozen=True)
class Geometry:
    """Sizes the plans are made with. Bytes are per row and layer."""

    num_instances: int
    slots: int  # per instance
    segment_tokens: int
    query_bytes: int = 1  # a query row on its way and its partial result on the way back
    kv_bytes: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, S, C."""
        return self.num_instances, self.slots, self.segment_tokens


@dataclass(frozen=True)
class QueryPlan:
    """Who computes which rows, and who holds what they read: the same on every rank. Runs are in
    the order of the instances that compute them."""

    runs: list[Run]
    instance: np.ndarray  # [B] computes the run
    first: np.ndarray  # [B] the run's first row there
    rows: np.ndarray  # [B]
    position: np.ndarray  # [B] of the first row
    segments: np.ndarray  # [B, N] segments that the run reads at that instance
    late: np.ndarray  # global slots of which rows arrive from elsewhere in this iteration
    ref_slot: np.ndarray  # [refs] global slots that the runs read, in another order of the runs:
    ref_run: np.ndarray  # [B] by which the runs are these,
    ref_end: np.ndarray  # [B] and their references end there
    geometry: Geometry

    def references(self, instance: int):
        """What is read at an instance, by run: for each reference the run, the segment's index in
        its request, and the global slot. Only a holder needs this, and only its own share."""
        at = np.flatnonzero(self.ref_slot // self.geometry.slots == instance)
        entry = np.searchsorted(self.ref_end, at, side="right")
        run = self.ref_run[entry]
        last = self.position[run] // self.geometry.segment_tokens
        order = np.argsort(run, kind="stable")
        index = at - self.ref_end[entry] + last + 1
        return run[order], index[order], self.ref_slot[at][order]

    def shipped(self) -> np.ndarray:
        """[N, N] query rows that instance v (line) ships to holder w (column)."""
        out = np.zeros((self.geometry.num_instances,) * 2, np.int64)
        np.add.at(out, self.instance, self.rows[:, None] * (self.segments > 0))
        np.fill_diagonal(out, 0)
        return out


@dataclass(frozen=True)
class TransferPlan:
    """Where new KV goes: a line per row, in the query plan's order."""

    source: np.ndarray  # [rows] instance that computes the row
    row: np.ndarray  # [rows] which row of those it computes
    home: np.ndarray  # [rows] instance where it will live
    slab_row: np.ndarray  # [rows] and the row of the slab there
    num_instances: int

    def moved(self) -> np.ndarray:
        """[N, N] rows of KV that instance v (line) puts to home w (column)."""
        out = np.zeros((self.num_instances,) * 2, np.int64)
        np.add.at(out, (self.source, self.home), 1)
        np.fill_diagonal(out, 0)
        return out


def least(load: list[int], start: int) -> int:
    """The instance with the least load, the first of them from `start` on."""
    return min(range(len(load)), key=lambda i: (load[i], (i - start) % len(load)))


class Balancer:
    """The pool's bookkeeping over N instances, and the plans of an iteration."""

    def __init__(self, geometry: Geometry, placement: str = "stripe"):
        self.geometry, self.placement = geometry, placement
        N, S = geometry.num_instances, geometry.slots
        self.tree = PrefixTree()
        self.free = [list(range((i + 1) * S - 1, i * S - 1, -1)) for i in range(N)]
        self.in_progress: dict[bytes, Request] = {}  # prompt segments being prefilled
        self.evictions = self.duplicates = 0

    # ── a request's life ──────────────────────────────────────────────────────────────────────

    def extend_ids(self, request: Request):
        """Ids of the segments that `tokens` has filled since (§4.1: a chained hash)."""
        C, ids = self.geometry.segment_tokens, request.ids
        while (len(ids) + 1) * C <= len(request.tokens):
            tokens = array("q", request.tokens[len(ids) * C:(len(ids) + 1) * C])
            salt = request.salt.encode("utf-8", "surrogatepass")
            parent = ids[-1] if ids else hashlib.blake2b(salt, digest_size=16,
                                                         person=b"root").digest()
            ids.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest())

    def match(self, request: Request) -> int:
        """The number of leading segments that the pool holds."""
        self.extend_ids(request)
        return self.tree.match(request.ids)

    def awaited(self, request: Request, matched: int) -> bool:
        """Whether the next segment is being prefilled by another request: better wait for it."""
        return matched < len(request.ids) and request.ids[matched] in self.in_progress

    def num_segments(self, tokens: int) -> int:
        return -(-tokens // self.geometry.segment_tokens)

    def fits(self, request: Request, matched: int, promised: int) -> bool:
        """Whether slots for the rest of the prompt are free or evictable, besides those
        `promised` to requests already running."""
        taken = sum(not self.tree.segments[id].pins for id in request.ids[:matched])
        available = sum(map(len, self.free)) + len(self.tree.lru) - taken
        return available - promised >= self.num_segments(len(request.tokens)) - matched

    def admit(self, request: Request, matched: int):
        """Pins what matched. One row at least stays to compute: its logits are wanted."""
        C = self.geometry.segment_tokens
        request.table = np.zeros(self.num_segments(request.max_tokens), np.int64)
        request.segments = [self.tree.segments[id] for id in request.ids[:matched]]
        for index, segment in enumerate(request.segments):
            self.tree.pin(segment)
            request.table[index] = segment.slot
        request.num_slots = matched
        request.done = min(matched * C, len(request.tokens) - 1)
        for id in request.ids[matched:]:
            self.in_progress.setdefault(id, request)

    def commit(self, request: Request, rows: int):
        """After the iteration: the rows are written, segments that are now full are published. One
        that another request published meanwhile replaces ours; nothing is moved."""
        C = self.geometry.segment_tokens
        request.done += rows
        request.peak = max(request.peak, request.done)
        while (index := len(request.segments)) < request.done // C:
            id, slot = request.ids[index], int(request.table[index])
            segment = self.tree.segments.get(id)
            if segment is None:
                segment = self.tree.insert(id, request.segments[-1] if index else None,
                                           slot // self.geometry.slots, slot)
            else:
                self._free(slot)
                self.duplicates += 1
                request.table[index] = segment.slot
            self.tree.pin(segment)
            request.segments.append(segment)
            self._forget(request, id)

    def release(self, request: Request):
        """Gives back everything: a finished request, or one that is preempted and starts over."""
        for slot in request.table[len(request.segments):request.num_slots]:
            self._free(int(slot))
        for segment in reversed(request.segments):  # leaf first: see PrefixTree.lru
            self.tree.unpin(segment)
        for id in request.ids[len(request.segments):]:
            self._forget(request, id)
        request.segments, request.num_slots, request.done = [], 0, 0

    def _forget(self, request, id):
        if self.in_progress.get(id) is request:
            del self.in_progress[id]

    def _free(self, slot: int):
        self.free[slot // self.geometry.slots].append(slot)

    # ── homes (§4.3): compute where it will live ──────────────────────────────────────────────

    def open_tails(self, running: list[Request]) -> list[int]:
        """[N] open tails that live at each instance."""
        N, S, C = self.geometry.sizes
        tails = [0] * N
        for request in running:
            if request.num_slots * C > len(request.tokens):
                tails[int(request.table[request.num_slots - 1]) // S] += 1
        return tails

    def reserve(self, request: Request, rows: int, planned: list[int], tails: list[int],
                most: int):
        """Runs for the next `rows` tokens, each with a slot for its segment; None when every slot
        is pinned (what was reserved stays with the request).

        planned [N]: rows that each instance has so far in this iteration; updated on success.
        tails [N]: open tails at each instance; updated where one is opened. An instance gets at
        most `most` rows. With `most` ≥ the even share + C the least planned one always has room, so
        that is also the bound of what an instance computes."""
        C, S, load = self.geometry.segment_tokens, self.geometry.slots, list(planned)
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
        N, S = self.geometry.num_instances, self.geometry.slots
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
        globally least recently used segment. None when all are pinned."""
        if not self.free[home]:
            home = max(range(len(self.free)), key=lambda i: len(self.free[i]))
        if self.free[home]:
            return self.free[home].pop()
        segment = self.tree.evict()
        if segment is None:
            return None
        self.evictions += 1
        return segment.slot

    # ── plans (§5) ────────────────────────────────────────────────────────────────────────────

    def gen_plans(self, batches: list[list[Run]], dops: list[int]):
        """Who computes what, in the fewest bytes. A batch of DoP k is cut into k sub-batches of
        about equal rows; sub-batches are matched with instances, at most one each.

        Returns the query plan, the transfer plan, and the groups: for each batch the instance that
        computes each of its runs."""
        N, S, C = self.geometry.sizes
        runs = [run for batch in batches for run in batch]
        B = len(runs)
        rows = np.fromiter((run.rows for run in runs), np.int64, B)
        position = np.fromiter((run.position for run in runs), np.int64, B)
        slot = np.fromiter((run.slot for run in runs), np.int64, B)
        puts = np.fromiter((run.puts for run in runs), bool, B)

        length = position // C + 1  # segments that the run reads
        ref_slot = np.concatenate([run.request.table[:n] for run, n in zip(runs, length.tolist())]
                                  or [slot])
        segments = np.bincount(np.repeat(np.arange(B) * N, length) + ref_slot // S,
                               minlength=B * N).reshape(B, N)
        reads = segments > 0

        # Bytes if run b is computed by v: its rows to every holder but v, its KV to a home but v.
        home = slot // S
        cost = rows[:, None] * self.geometry.query_bytes * (reads.sum(1, keepdims=True) - reads)
        cost = cost + (rows * puts * self.geometry.kv_bytes)[:, None] * (
            home[:, None] != np.arange(N))
        part = self._cut(batches, dops, rows)
        parts = np.zeros((sum(dops), N), np.int64)
        np.add.at(parts, part, cost)
        instance = linear_sum_assignment(parts)[1][part]

        ends = np.cumsum([len(batch) for batch in batches])
        groups = [group.tolist() for group in np.split(instance, ends)[:len(batches)]]
        order = np.argsort(instance, kind="stable")
        instance, rows, position, slot = instance[order], rows[order], position[order], slot[order]
        before = np.cumsum(rows) - rows
        first = before - before[np.searchsorted(instance, instance)]
        kept, home = np.flatnonzero(puts[order]), slot // S
        run = np.repeat(kept, rows[kept])  # of each row that is put
        step = np.arange(len(run)) - np.repeat(np.cumsum(rows[kept]) - rows[kept], rows[kept])
        transfer_plan = TransferPlan(instance[run], first[run] + step, home[run],
                                     slot[run] % S * C + position[run] % C + step, N)
        query_plan = QueryPlan(
            [runs[b] for b in order], instance, first, rows, position, segments[order],
            slot[kept][instance[kept] != home[kept]], ref_slot, np.argsort(order),
            np.cumsum(length), self.geometry)
        return query_plan, transfer_plan, groups

    @staticmethod
    def _cut(batches, dops, rows) -> np.ndarray:
        """The sub-batch of each run: batches one after another, cut at equal shares of rows."""
        parts, base, at = [], 0, 0
        for batch, dop in zip(batches, dops):
            own = rows[at:at + len(batch)]
            before = np.cumsum(own) - own
            parts.append(base + before * dop // max(1, own.sum()))
            base, at = base + dop, at + len(batch)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def cache_reads(self, plan: QueryPlan) -> np.ndarray:
        """[N] tokens of KV written before this iteration that each instance reads, a request's
        once however many runs it has (§7.2's cache accesses)."""
        N, S, C = self.geometry.sizes
        # A request's first run reads the segments up to the one that `done` is in, and no other.
        first = [b for b, run in enumerate(plan.runs) if run.position == run.request.done]
        home = np.array([plan.runs[b].slot // S for b in first], np.int64)
        here = np.array([not plan.runs[b].puts for b in first], np.int64)  # its own KV is old
        missing = np.bincount(home, C - plan.position[first] % C - here, N)  # of the last segment
        return C * plan.segments[first].sum(0) - missing.astype(np.int64)


def plan_digest(iteration: int, query_plan: QueryPlan, transfer_plan: TransferPlan) -> bytes:
    """16 bytes that two ranks share only if they planned the same: who computes what, which slots
    are read, where new rows go."""
    digest = hashlib.blake2b(str(iteration).encode(), digest_size=16)
    requests = np.array([run.request.id for run in query_plan.runs], np.int64)
    for part in (requests, query_plan.instance, query_plan.rows, query_plan.position,
                 query_plan.ref_slot, transfer_plan.home, transfer_plan.slab_row):
        digest.update(np.ascontiguousarray(part).tobytes() + b"|")
    return digest.digest()
