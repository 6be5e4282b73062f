"""Data plane: how do queries and keys meet across ranks? (§3.3, §3.4)

Every rank holds one *slab*: the segments that live with it, as rows per layer. A row is a token's
K and V, side by side. Two primitives over `torch.distributed` connect the slabs, per layer:

    query   rows of Q go to the KV, and partial results (O, LSE) come back
    move    rows of KV go: to their home, to a replica, or to rows that pull them

Each way is one `all_to_all_single`. A layer runs in this order on every rank, so that exchanges
hide behind attention:

    0  my new KV → my slab: to its slot, or if it lives elsewhere to *staging*, behind the slots
    1  query: my rows leave for the holders of what they read  ──▶  others' rows come to me
    2  move: new KV and copies leave; so does old KV that is pulled for the next layer (in the first
       layer, also for this one)
    3  my rows × KV that lies here already (HERE)
    4  others' rows × KV that lies here already. Old KV that my rows read, too, is read here, once
       for all (TOGETHER), if to read it a second time would take longer than the smallest exchange
    5  what was moved lands; others' rows × that (LATE); merge  ──▶  their (O, LSE) leave. Where
       none of them reads what was moved, they leave first
    6  my rows × what was moved (LATE, SIBLING) and pulled (PULLED), while results are on their way
    7  merge: what a row has read here, and at all holders

Why do ranks step together? An exchange is a collective: it ends when all have called it. So all
come to the same exchanges in the same order, layer by layer, and one without rows takes part, as
others read its KV. What carries nothing for any rank is skipped by all: each knows the whole plan.
Moves have a process group of their own, and begin after the layer's queries, so that none delays a
query. (NCCL wants the operations of two communicators in one order on all ranks, too: so it is.)
Left out: RDMA; a lost rank ends the run.

Notation: T rows · H query heads · Hkv KV heads · D head dim · N instances · S slots per instance ·
C tokens per segment · B runs · G shares (the runs of one request at one instance).
"""

import hashlib
import os
import socket
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from itertools import chain
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from balancer import BANDWIDTH, EXCHANGE_SECONDS
from cluster import Cluster, LakeError
from kernels import Outputs, attend_at_once, programs_at_once, suits_triton
from work import (
    CPU_LANES,
    MAX_LANES,
    AtOnce,
    Column,
    KVSpans,
    QueryRows,
    Work,
    ranges,
    rows_of_a_block,
    run_lesson,
    select,
    starts,
    starts_in_groups,
    to_device,
)

# Kinds of moves, and their names in reports.
PUT = 0  # new KV goes to its home
REPLICA = 1  # a segment is copied
PULL = 2  # old KV comes to its readers, for one iteration
TO_SIBLING = 3  # so does fresh KV, to later rows of its request
MOVE_KINDS = ("put", "replica", "pull", "sibling")

# Places of KV that rows read at an instance.
HERE = 0  # in its slab or staging, before the moves of a layer land
LATE = 1  # in its slab, once they have
PULLED = 2  # old KV that was pulled, in the receive buffer of `OldKV.pulls`
# Fresh KV of another share of the request, pulled too, in the receive buffer of
# `TransferPlan.moves`.
SIBLING = 3
# Not where, but when: in its slab, with the rows of others that come to read it, too. No plan says
# so: QueryBuffer makes it of HERE.
TOGETHER = 4


def slab_row(slot, S, C):
    """First row, in its own instance's slab, of the segment in global slot instance · S + slot."""
    return (slot % S) * C


# In the even split an instance may have an even share and a sixteenth of it, so that a segment is
# seldom cut in two. An iteration may become longer by as much.
EVEN_SLACK = 16


@dataclass(frozen=True)
class LakeConfig:
    """How a lake is cut."""
    segment_tokens: int = 16  # C
    slots: int = 512  # segments per instance
    placement: str = "stripe"  # or "hash"
    replicate_factor: float = 3.0  # c of c·N·ln N heavy hitters
    pull_tokens: int = 16_384  # of old KV that an instance pulls per iteration, at most
    chunk_tokens: int = 64  # mean prompt rows per instance in an iteration, at most
    max_batch: int = 32  # running requests in the whole lake
    # Read once what rows of several requests read at an instance; or each request for itself.
    read_once: bool = True
    # Queries and moves share a communicator, and so wait for each other.
    one_communicator: bool = False

    def staging(self, num_instances) -> int:
        """Slab rows for new KV whose home is elsewhere. That may be all that an instance computes:
        its chunk, all decodes, and the excess over an even share that Scheduler._most_rows allows.
        """
        return 0 if num_instances == 1 else self.most_rows()

    def most_rows(self) -> int:
        """Rows that an instance computes in an iteration, at most."""
        rows = self.chunk_tokens + self.max_batch
        return rows + max(rows // EVEN_SLACK + 1, self.segment_tokens)


def iteration_bytes(llama, config: LakeConfig, num_instances, dtype) -> int:
    """What an iteration takes of an instance's memory beside weights and slab, about, and at most:
    activations of a layer, partial results, what comes and goes, and logits. llama: its config."""
    size = dtype.itemsize
    wide = max(4, size)
    own = config.most_rows()
    # Rows of the whole lake may come here.
    others = num_instances * config.chunk_tokens + config.max_batch
    others *= num_instances > 1
    queries = llama.num_heads * llama.head_dim
    keys = llama.num_kv_heads * llama.head_dim
    layer = 3 * llama.hidden_size + 3 * llama.intermediate_size + 2 * (queries + 2 * keys)
    # A row's query, result and partial rows, about two, of this iteration and of the next one,
    # which may be prepared already; and what travels, both ways.
    buffers = 2 * (2 * wide + 2 * size)
    attention = (own + others) * queries * (buffers + 2 * size)
    # Sent and received, those of this layer and of the next.
    moved = config.staging(num_instances) + 2 * config.pull_tokens * (num_instances > 1)
    # As they are, in float32, as log-probabilities, and noise, which is made of 64-bit numbers.
    logits = config.max_batch * llama.vocab_size * (size + 3 * wide + 5 * 8)
    # `Pool.sum_of_new` gathers new KV of half of the layers.
    gathered = (llama.num_layers + 1) // 2 * own * 2 * keys
    return (own * layer + 2 * moved * 2 * keys + gathered) * size + attention + logits


# ── the plan of an iteration ─────────────────────────────────────────────────────────────────────


class Moves(NamedTuple):
    """An entry is a move: rows of KV that travel from one instance to another. In a TransferPlan
    they stand in this order: fresh KV to siblings, new KV to its home, copies."""
    kind: Column  # PUT, REPLICA, PULL or TO_SIBLING
    source: Column  # instance
    source_row: Column  # first slab row there
    target: Column  # instance
    target_row: Column  # first slab row there; −1: the rows stay in the receive buffer
    rows: Column

    @classmethod
    def of(cls, *parts: tuple) -> "Moves":
        """Parts one after another. A part has the six columns in order, each an array or one number
        for all."""
        # Mostly nothing moves, and this takes a while.
        parts = [part for part in parts if all(map(np.size, part))]
        columns = [
            np.stack(np.broadcast_arrays(*map(np.atleast_1d, part))) for part in parts
        ]
        none = np.zeros((len(cls._fields), 0), np.int64)
        return cls(*np.concatenate([none, *columns], 1).astype(np.int64))

    def receive_rows(self) -> Column:
        """[moves] where each begins in its target's receive buffer: by source, and those of one
        source in the order of this table, as they are sent."""
        order = np.lexsort((self.source, self.target))
        rows = self.rows[order]
        target = self.target[order]
        first = np.zeros_like(rows)
        first[order] = starts_in_groups(rows, target)
        return first

    def rows_between(self, N) -> Column:
        """[N, N] rows, by source and target."""
        trip = self.source * N + self.target
        return np.bincount(trip, self.rows, N * N).astype(np.int64).reshape(N, N)


class RunTable(NamedTuple):
    """An entry is a run: rows of one request within one segment."""
    request_id: Column
    position: Column  # of its first row
    rows: Column
    slot: Column  # global slot of its segment
    puts: Column  # 0: its segment is published already, the row only wants its logits
    decode: Column
    home: Column  # instance of that slot: where its KV will live
    share: Column  # its number
    instance: Column | None = None  # that computes it, once it is known
    first_row: Column | None = None  # among the rows that the instance computes


class SegmentReads(NamedTuple):
    """An entry is a segment of old KV that a share reads. By share, then segment; the number of a
    share says nothing of where it is computed."""
    share: Column
    segment: Column  # which of its request's: index into the table
    slot: Column  # global slot that is read

    @classmethod
    def of(cls, tables: list, counts: Column, replicas=None):
        """The first counts[g] segments of each share g: in the slots of its table, or, where
        `replicas` has that segment of that share, in the slot that it says."""
        share = np.repeat(np.arange(len(counts)), counts)
        segment = ranges(np.zeros_like(counts), counts)
        some = np.flatnonzero(counts)
        slots = [tables[g][:n] for g, n in zip(some.tolist(), counts[some].tolist())]
        slot = np.concatenate(slots or [counts[:0]])
        if replicas is not None:
            replicas = select(replicas, replicas.segment < counts[replicas.share])
            # A share's come one after another.
            first = np.searchsorted(share, replicas.share)
            slot[first + replicas.segment] = replicas.slot
        return cls(share, segment, slot)


class PulledSegments(NamedTuple):
    """An entry is a segment of old KV that travels to the share that reads it: the n-th of them is
    the n-th move of `OldKV.pulls`."""
    share: Column
    segment: Column
    receive_row: Column  # where it begins in the receive buffer


class FreshReads(NamedTuple):
    """An entry is a pair of runs of one request: the reader's rows read what the writer, the same
    run or one before it, writes in this iteration."""
    reader: Column
    writer: Column
    instance: Column  # where they meet
    place: Column  # HERE, LATE or SIBLING
    first_row: Column  # of the KV, there


class ReadSpans(NamedTuple):
    """An entry is a span of KV that a share reads at an instance: each of its rows what lies at
    positions up to its own."""
    share: Column
    place: Column
    first_row: Column  # of the slab, or of the receive buffer of its place
    length: Column
    position: Column  # in the request, of its first row


@dataclass(frozen=True)
class OldKV:
    """KV from before the iteration. All rows of a share read all that its request has."""
    tokens: Column  # [G] tokens of old KV of each share's request
    # [G] global slots of its segments. The digest has the slots that are read of them instead.
    tables: list = field(metadata={"digest": False})
    replicas: SegmentReads  # slots that are read in place of those in the tables
    pulled: PulledSegments  # what travels to its readers
    pulls: Moves  # how


@dataclass(frozen=True)
class QueryPlan:
    """Who computes which rows, and how these meet the KV they read: the same on every rank.

    Runs are in order of the instances that compute them, then of requests, then of positions. All
    runs of one request that one instance computes are a *share*: they stand side by side."""
    # [B] the Run objects; `run_table` has all of them as columns.
    runs: list = field(metadata={"digest": False})
    run_table: RunTable
    old: OldKV
    fresh: FreshReads  # of KV that is written in the iteration
    ships: Column  # [B, N] whether a run's rows travel to an instance
    # [N] tokens of old KV that each instance gives to readers, once a request (§7.2). Pulled ones
    # count where they come from.
    reads: Column
    # [N] attention done at each, rows × tokens: all rows that read a token of old KV there, but
    # `TokenLake.ridge` at least, as it is read once for all.
    load: Column
    tokens_read: Column  # [N] tokens of KV read at each, old, pulled and fresh, in every layer
    sizes: tuple[int, int, int]  # N, S, C

    @property
    def local(self) -> Column:
        """[B] whether a run is computed where its KV will live."""
        return self.run_table.instance == self.run_table.home

    @cached_property
    def token_ids(self) -> Column:
        """[T] inputs of all rows, run after run."""
        slices = (slice(run.position, run.position + run.rows) for run in self.runs)
        tokens = (run.request.tokens[rows] for run, rows in zip(self.runs, slices))
        return np.fromiter(chain.from_iterable(tokens), np.int64)

    @cached_property
    def samples(self) -> Column:
        """[B] whether a run's last row is its request's last, which gives the next token. (It is
        asked for when the plan is hashed: later the request is longer.)"""
        return np.fromiter((run.samples for run in self.runs), bool, len(self.runs))

    @cached_property
    def segment_reads(self) -> SegmentReads:
        """All old KV that is read. Made when it is asked for, as planning can do without."""
        counts = -(-self.old.tokens // self.sizes[2])
        return SegmentReads.of(self.old.tables, counts, self.old.replicas)

    def spans_read_at(self, index) -> ReadSpans:
        """What rows read at an instance: its own rows, and those that travel there."""
        columns = zip(self._old_spans(index), self._fresh_spans(index))
        return ReadSpans(*map(np.concatenate, columns))

    @cached_property
    def instance_of_share(self) -> Column:
        """[G] that computes it."""
        instance = np.zeros(len(self.old.tokens), np.int64)
        instance[self.run_table.share] = self.run_table.instance
        return instance

    def _old_spans(self, index):
        _, S, C = self.sizes
        reads = self.segment_reads
        pulled = self.old.pulled
        # A segment is read in its slot, unless it is pulled: then it comes to its share.
        instance = reads.slot // S
        place = np.full(len(reads.slot), HERE)
        row = slab_row(reads.slot, S, C)
        # (Entries of a share stand side by side, from its segment 0 on.)
        travels = np.searchsorted(reads.share, pulled.share) + pulled.segment
        instance[travels] = self.instance_of_share[pulled.share]
        place[travels] = PULLED
        row[travels] = pulled.receive_row
        found = np.flatnonzero(instance == index)
        share = reads.share[found]
        position = reads.segment[found] * C
        length = np.minimum(self.old.tokens[share] - position, C)
        return ReadSpans(share, place[found], row[found], length, position)

    def _fresh_spans(self, index):
        """Where a share meets what a run writes depends on the two alone: one span for them. (Rows
        before it do not see it, by position.)"""
        fresh = select(self.fresh, self.fresh.instance == index)
        share = self.run_table.share[fresh.reader]
        key = share * len(self.runs) + fresh.writer
        _, once = np.unique(key, return_index=True)
        _, writer, _, place, first_row = select(fresh, once)
        rows = self.run_table.rows[writer]
        position = self.run_table.position[writer]
        return ReadSpans(share[once], place, first_row, rows, position)

    def rows_shipped(self) -> Column:
        """[N, N] query rows, by the instance that ships them and the one that they go to."""
        rows = np.zeros((self.sizes[0],) * 2, np.int64)
        np.add.at(
            rows, self.run_table.instance, self.run_table.rows[:, None] * self.ships
        )
        return rows


class SlabWrites(NamedTuple):
    """An entry is a run that puts KV: its own instance writes it."""
    instance: Column
    first_row: Column  # among the rows that the instance computes
    slab_row: Column  # first one that is written: at home, or in staging
    rows: Column


@dataclass(frozen=True)
class TransferPlan:
    """What is written where it is computed, then what travels: new KV to siblings and to its
    home, and copies."""
    writes: SlabWrites
    moves: Moves
    num_instances: int


def plan_digest(iteration: int, query_plan, transfer_plan: TransferPlan) -> bytes:
    """16 bytes that two ranks share only if they planned the same, for the same tokens: all that
    the plans are made of, which runs sample, and the inputs of the planned rows."""
    return digest_with_tokens(hash_plan(iteration, query_plan, transfer_plan), query_plan)


def hash_plan(iteration: int, query_plan, transfer_plan):
    """A hash of all but the tokens: they may not be known yet."""
    hashed = hashlib.blake2b(repr(iteration).encode(), digest_size=16)
    derived = query_plan.samples, query_plan.segment_reads.slot
    for leaf in plan_leaves((query_plan, derived, transfer_plan)):
        hashed.update(leaf)
    return hashed


def digest_with_tokens(hashed, query_plan) -> bytes:
    """Of what `hash_plan` gave: the digest."""
    for leaf in plan_leaves(query_plan.token_ids):
        hashed.update(leaf)
    return hashed.digest()


def plan_leaves(value):
    """The bytes of everything in a plan. Each array comes behind its shape and type, so that no two
    plans have the same bytes."""
    if isinstance(value, Column):
        yield f"{value.shape}{value.dtype}".encode()
        yield np.ascontiguousarray(value)
    elif is_dataclass(value):
        for part in fields(value):
            if part.metadata.get("digest", True):
                yield from plan_leaves(getattr(value, part.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from plan_leaves(item)
    else:
        yield f"{value!r}|".encode()


# ── an instance's part in it ─────────────────────────────────────────────────────────────────────


def in_place(rows, table):
    """The first rows as a slice, which copies nothing; others as their table."""
    return slice(len(rows)) if np.array_equal(rows, np.arange(len(rows))) else table


class InstanceMoves:
    """One instance's side of an iteration's moves: slab rows that leave, and where others land."""
    def __init__(self, moves, num_instances, index, device):
        self.active = len(moves.rows) > 0
        if not self.active:
            return
        between = moves.rows_between(num_instances)
        # [N] rows to each instance, and from each.
        self.sends = between[index].tolist()
        self.receives = between[:, index].tolist()
        # An exchange takes rows by target.
        by_target = np.argsort(moves.target, kind="stable")
        leaving = select(moves, by_target[moves.source[by_target] == index])
        rows_of_kind = np.bincount(leaving.kind, leaving.rows, len(MOVE_KINDS))
        self.rows_of_kind = rows_of_kind.astype(int).tolist()
        lands = (moves.target == index) & (moves.target_row >= 0)
        landing = select(moves, lands)
        # Slab rows that leave; rows of the receive buffer that belong into the slab, and where.
        received = ranges(moves.receive_rows()[lands], landing.rows)
        self.leave, self.received, self.slab_rows = to_device(
            [
                ranges(leaving.source_row, leaving.rows),
                received,
                ranges(landing.target_row, landing.rows),
            ],
            device,
        )
        self.received = in_place(received, self.received)


class KVBuffer:
    """Where the engine leaves KV of this instance's new rows. num_rows: those of the slab."""
    def __init__(self, plan: TransferPlan, index, num_rows, device):
        writes = select(plan.writes, plan.writes.instance == index)
        last = (writes.slab_row + writes.rows).max(initial=0) - 1
        if last >= num_rows:
            said = f"instance {index} is to write slab row {last}, its slab has {num_rows}"
            raise LakeError(said)
        rows = ranges(writes.first_row, writes.rows)
        self.rows, self.slab_rows = to_device(
            [rows, ranges(writes.slab_row, writes.rows)], device
        )
        self.rows = in_place(rows, self.rows)
        self.moves = InstanceMoves(plan.moves, plan.num_instances, index, device)

    def write(self, layer, kv):
        """kv [T, 2, Hkv, D] of the rows that this instance computes."""
        self.layer = layer
        self.kv = kv


def runs_reading(runs, spans):
    """The runs of those shares that have spans."""
    return select(runs, np.isin(runs.share, spans.share))


def rows_of(runs):
    """The rows of runs, among those of the instance that computes them."""
    return ranges(runs.first_row, runs.rows)


def work_of(runs, spans, pool) -> Work:
    """The Work of these runs, whose shares are the readers of the spans."""
    # Runs of a share stand side by side.
    begins_share = runs.share[1:] != runs.share[:-1]
    reader = np.cumsum(np.append(0, begins_share))[: len(runs.share)]
    # Only shares with spans here are looked up, and they have runs here: others are no reader.
    reader_of_share = np.full(spans.share.max(initial=0) + 1, len(runs.share))
    reader_of_share[runs.share] = reader
    return Work(
        QueryRows.of_runs(reader, runs.first_row, runs.rows, runs.position),
        KVSpans(reader_of_share[spans.share], *spans[2:]),
        pool.num_heads,
        pool.num_kv_heads,
        pool.kv.dtype,
        pool.resident,
        pool.read_once,
        pool.max_lanes,
    )


# Sections of the rows of a QueryBuffer.
OWN = 0  # rows that this instance computes
ARRIVED = 1  # others' rows, that read here


class QueryBuffer:
    """Where the engine leaves Q of the rows that this instance computes; behind these, others'
    arrive that read here. What is to be read for which, where, when; and what comes of it.

    Each Work is over KV of one place. All write into `outputs`: so a row's partial results are
    merged once, wherever it has read. What holders have for own rows comes back as partial rows,
    those of one holder after another's."""
    def __init__(self, plan: QueryPlan, index, pool: "Pool"):
        runs = plan.run_table
        is_own = runs.instance == index
        own = select(runs, is_own)
        self.num_rows = int(own.rows.sum())
        # ships[run, here] holds exactly if the run sees a span here, in the slab. Runs are by
        # instance, and a sender's are sent in their order: so those that arrive are in order.
        arrived = select(runs, plan.ships[:, index] & ~is_own)
        arrived = arrived._replace(first_row=self.num_rows + starts(arrived.rows))
        self._list_works(plan, index, own, arrived, pool)
        self.active = bool(plan.ships.any())
        leave = rows_of(own)[:0]  # own rows, by holder
        if self.active:
            by_holder = [rows_of(select(runs, is_own & ships)) for ships in plan.ships.T]
            leave = np.concatenate(by_holder)
            (self.leave,) = to_device([leave], pool.device)
        between = plan.rows_shipped()
        self.sends = between[index].tolist()
        self.receives = between[:, index].tolist()
        self.pulls = InstanceMoves(plan.old.pulls, plan.sizes[0], index, pool.device)
        self._allocate(plan, int(arrived.rows.sum()), leave, pool)

    def _list_works(self, plan, index, own, arrived, pool):
        """What own rows read, by place; and what is read once others' rows have arrived: at once,
        together with own rows that wait for them, or when moves have landed."""
        spans = plan.spans_read_at(index)
        is_own = plan.instance_of_share[spans.share] == index
        spans = self._find_together(plan, spans, is_own, pool)
        self.works = {}  # by place
        self.works_after_arrival = {}  # HERE and LATE
        for place in np.unique(spans.place[is_own]).tolist():
            there = select(spans, is_own & (spans.place == place))
            if place != TOGETHER:
                self.works[place] = work_of(runs_reading(own, there), there, pool)
        here = select(spans, ~is_own & (spans.place == HERE))
        if len(here.share):
            together = select(spans, spans.place == TOGETHER)
            readers = runs_reading(arrived, here), runs_reading(own, together)
            readers = RunTable(*map(np.concatenate, zip(*readers)))
            both = ReadSpans(*map(np.concatenate, zip(here, together)))
            self.works_after_arrival[HERE] = work_of(readers, both, pool)
        late = select(spans, ~is_own & (spans.place == LATE))
        if len(late.share):
            readers = runs_reading(arrived, late)
            self.works_after_arrival[LATE] = work_of(readers, late, pool)

    def _allocate(self, plan, num_arrived, leave, pool):
        """Queries, and what comes of them: of own rows, then of those that arrive."""
        self.outputs = Outputs(
            [*self.works.values(), *self.works_after_arrival.values()],
            [self.num_rows, num_arrived],
            leave,
            pool.num_heads,
            pool.head_dim,
            pool.kv.dtype,
            pool.device,
            pool.use_triton,
        )
        # Alone, it reads Q where the model has it.
        self.q = self.all_q = None
        if plan.sizes[0] > 1:
            shape = self.num_rows + num_arrived, pool.num_heads, pool.head_dim
            self.all_q = torch.empty(shape, dtype=pool.kv.dtype, device=pool.device)

    @staticmethod
    def _find_together(plan, spans, own, pool):
        """Spans with their places. What own and other rows both read waits for these, all of it, if
        to read it a second time would take longer than the smallest exchange. (It is old KV, of
        shares that do not fill a block: other KV is not read together.)"""
        if own.all():
            return spans
        is_old = spans.position < plan.old.tokens[spans.share]
        num_rows = np.bincount(plan.run_table.share, plan.run_table.rows, len(plan.old.tokens))
        heads_per_kv = pool.num_heads // pool.num_kv_heads
        few = num_rows < rows_of_a_block(heads_per_kv, pool.max_lanes)
        meets = is_old & few[spans.share] & (spans.place == HERE) & pool.read_once
        both = own & meets & np.isin(spans.first_row, spans.first_row[meets & ~own])
        _, once = np.unique(spans.first_row[both], return_index=True)
        twice_read = spans.length[both][once].sum() * pool.token_bytes
        if twice_read <= BANDWIDTH * EXCHANGE_SECONDS:
            return spans
        return spans._replace(place=np.where(both, TOGETHER, spans.place))

    def write(self, layer, q):
        """q [T, H, D] of the rows that this instance computes."""
        self.layer = layer
        self.q = q
        if self.all_q is not None:
            self.q = self.all_q
            self.q[: self.num_rows] = q


# ── the slab and its exchanges ───────────────────────────────────────────────────────────────────


@dataclass
class InFlight:
    """What one call leaves to the next."""
    # From `put` to `query`: all moves of the layer.
    staged: InstanceMoves | None = None
    pull: Callable | None = None  # from one layer to the next: waits for old KV to arrive


def nothing_moves():
    """Waits for what `move` has begun, where that is nothing."""


class Pool:
    """One instance's slab, and its exchanges over two groups (for queries, for moves), or none."""
    def __init__(
        self,
        cluster,
        groups: list,
        llama_config,
        config: LakeConfig,
        num_instances,
        dtype,
        device,
    ):
        self.cluster = cluster
        self.device = torch.device(device)
        self.read_once = config.read_once
        self.num_heads = llama_config.num_heads
        self.num_kv_heads = llama_config.num_kv_heads
        self.head_dim = llama_config.head_dim
        self.scale = 1.0 / self.head_dim**0.5
        # Rows of slots, then staging. Unwritten rows are never read: spans end where the tokens do.
        self.num_rows = config.slots * config.segment_tokens
        self.num_rows += config.staging(num_instances)
        row = 2, self.num_kv_heads, self.head_dim
        shape = llama_config.num_layers, self.num_rows, *row
        self.kv = torch.zeros(shape, dtype=dtype, device=self.device)
        self.slabs = self.kv.unbind(0)  # of each layer: [slab rows, 2, Hkv, D]
        self.token_bytes = self.kv[0, :1].nbytes  # of a layer
        self.query_group, self.move_group = groups or (None, None)
        on_gpu = self.device.type == "cuda"
        self.via_host = bool(groups) and on_gpu and dist.get_backend(groups[0]) == "gloo"
        self.use_triton = suits_triton(self.device, dtype, self.head_dim)
        self.max_lanes = MAX_LANES if on_gpu else CPU_LANES
        # Pieces that run at once: each is a program for each KV head.
        programs = programs_at_once(self.device, self.head_dim, dtype)
        self.resident = AtOnce(*(n // self.num_kv_heads for n in programs))
        self.bytes = dict.fromkeys(("query", *MOVE_KINDS), 0)
        self.in_flight = InFlight()

    def _exchange(self, rows, sends, receives, group, target=None):
        """Sends rows [sum(sends), …], which are by target. Returns a function that waits for those
        that come: [sum(receives), …], by source; into a tensor, if one is given."""
        if target is None:
            target = rows.new_empty(sum(receives), *rows.shape[1:])
        received = target
        if self.via_host:  # gloo moves host memory
            rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
            received = torch.empty(target.shape, dtype=rows.dtype, pin_memory=True)
        cluster = self.cluster
        work = cluster.guard(
            dist.all_to_all_single,
            received,
            rows.contiguous(),
            receives,
            sends,
            group=group,
            async_op=True,
        )

        def wait():
            if received.is_cuda:  # nothing waits here: NCCL lets the device wait
                cluster.guard(work.wait)
            else:
                cluster.wait(work)
            return target.copy_(received) if self.via_host else target

        return wait

    def move(self, layer, moves) -> Callable:
        """Slab rows travel. Returns a function that waits for those that come, writes those into
        the slab that belong there, and returns all, [n, 2, Hkv, D]; the second time it only returns
        them. If none travel, all ranks skip it."""
        if not moves.active:
            return nothing_moves
        slab = self.slabs[layer]
        rows = slab.index_select(0, moves.leave)
        for kind, n in zip(MOVE_KINDS, moves.rows_of_kind):
            self.bytes[kind] += n * self.token_bytes
        wait = self._exchange(rows, moves.sends, moves.receives, self.move_group)

        def land():
            new = wait()
            if len(moves.slab_rows):
                slab.index_copy_(0, moves.slab_rows, new[moves.received])
            return new

        return cache(land)

    def put(self, buffer):
        """Writes the layer's new rows into this slab. Those that live elsewhere wait in staging:
        `query`, which comes next in every layer on every rank, sends them after the queries."""
        self.slabs[buffer.layer].index_copy_(0, buffer.slab_rows, buffer.kv[buffer.rows])
        self.in_flight.staged = buffer.moves

    def sum_of_new(self, buffer):
        """[1] of all new KV of this instance, in float64. If it is finite, so is each value; if
        not, it may only have overflowed."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        wide = torch.promote_types(self.kv.dtype, torch.float32)
        for layers in self.kv.chunk(2):  # half of them at a time
            total += layers.index_select(1, buffer.slab_rows).sum(dtype=wide)
        return total

    def first_nonfinite(self, buffer, ignored=()) -> tuple[int, int] | None:
        """The first layer in which new KV of this instance is not finite, and the lowest such row
        among those that the instance computes, but for those that are ignored. It looks at each
        value."""
        new = self.kv.index_select(1, buffer.slab_rows)
        finite = new.isfinite().flatten(2).all(2)  # [L, n]
        rows = torch.arange(len(buffer.kv), device=self.device)[buffer.rows]
        finite |= torch.isin(rows, torch.tensor(list(ignored), device=self.device))
        layers = (~finite).any(1).nonzero()
        if not len(layers):
            return None
        layer = int(layers[0])
        return layer, int(rows[~finite[layer]].min())

    def query(self, buffer):
        """Attention of this rank's rows over the whole pool → [T, H, D]."""
        layer = buffer.layer
        slab = self.slabs[layer]
        wait_for_queries = self._ship(buffer) if buffer.active else None
        # Old KV is complete in every layer, so a pull begins one layer ahead (the first one has no
        # layer before it). Fresh KV of a layer is computed in that layer, so it can leave only now.
        wait_for_pulled = self.in_flight.pull if layer else self.move(0, buffer.pulls)
        land = self.move(layer, self.in_flight.staged)
        if layer + 1 < len(self.slabs):
            self.in_flight.pull = self.move(layer + 1, buffer.pulls)

        self._attend(buffer, buffer.works, HERE, slab)
        if buffer.active:
            wait_for_queries()
            wait_for_results = self._answer(buffer, slab, land)
        moved = land()
        pulled = wait_for_pulled()
        self._attend(buffer, buffer.works, LATE, slab)
        self._attend(buffer, buffer.works, PULLED, pulled)
        self._attend(buffer, buffer.works, SIBLING, moved)
        if buffer.active:
            wait_for_results()
        return buffer.outputs.merge(OWN)[0]

    def _attend(self, buffer, works, place, kv):
        """The Work over KV of a place, if there is any."""
        if place in works:
            buffer.outputs.partial_attention(buffer.q, kv, works[place], self.scale)

    def _ship(self, buffer):
        """Rows of Q leave for the holders. Returns a function that waits for those that arrive."""
        rows = buffer.q.index_select(0, buffer.leave)
        self.bytes["query"] += rows.nbytes
        behind = buffer.q[buffer.num_rows :]
        return self._exchange(
            rows, buffer.sends, buffer.receives, self.query_group, behind
        )

    def _answer(self, buffer, slab, land) -> Callable:
        """Rows have arrived: their results go back. Returns a function that waits for those of own
        rows. What was moved lands only if rows that arrived read it. O travels in the model's type,
        as the sum that it becomes part of is rounded to that, too; an error of LSE would count for
        all of a part, so it stays wide, as a value or two of that type."""
        works = buffer.works_after_arrival
        outputs = buffer.outputs
        self._attend(buffer, works, HERE, slab)
        if LATE in works:
            land()
            self._attend(buffer, works, LATE, slab)
        o, lse = outputs.merge(ARRIVED)
        lse_values = lse[..., None].view(o.dtype)
        results = torch.cat((o, lse_values), -1)  # one buffer: [n, H, D + 1 or 2]
        self.bytes["query"] += results.nbytes
        wait = self._exchange(results, buffer.receives, buffer.sends, self.query_group)

        def take():
            o_came, lse_came = wait().tensor_split((self.head_dim,), -1)
            outputs.take(o_came, lse_came.contiguous().view(lse.dtype)[..., 0])

        return take


# ── the lesson, run: a row's journey between two ranks ───────────────────────────────────────────


def plan_by_hand(S, C):
    """Request 0 decodes its row 9 at instance 0. Positions 0 to 3 are in slot 0, 8 is in slot 1,
    where 9 will be; 4 to 7 are in slot S, the first of instance 1."""
    no, one, nine = np.array([[0], [1], [9]])
    none = no[:0]
    next_row = slab_row(one, S, C) + 1
    runs = RunTable(no, nine, one, slot=one, puts=one, decode=one, home=no, share=no)
    runs = runs._replace(instance=no, first_row=no)
    segments = SegmentReads(none, none, none), PulledSegments(none, none, none)
    query_plan = QueryPlan(
        runs=[None],  # its request has the token, which no pool asks for
        run_table=runs,
        old=OldKV(nine, [np.array([0, S, 1])], *segments, pulls=Moves.of()),
        fresh=FreshReads(no, no, instance=no, place=np.array([HERE]), first_row=next_row),
        ships=np.array([[False, True]]),
        reads=np.array([5, 4]),
        load=np.array([6, 4]),
        tokens_read=np.array([6, 4]),
        sizes=(2, S, C),
    )
    writes = SlabWrites(no, first_row=no, slab_row=next_row, rows=one)
    return query_plan, TransferPlan(writes, Moves.of(), 2)


def travel(rank, port):
    """One of two ranks, which hold a slab each; rank 0 tells of both."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cluster = Cluster(timeout=30).connect()
    groups = cluster.new_groups([0, 1], torch.device("cpu"), 2)
    config = LakeConfig(segment_tokens=4, slots=2)
    shape = SimpleNamespace(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    pool = Pool(cluster, groups, shape, config, 2, torch.float32, "cpu")
    torch.manual_seed(rank)
    pool.kv.normal_()  # what was written before
    query_plan, transfer_plan = plan_by_hand(config.slots, config.segment_tokens)
    q_buf = QueryBuffer(query_plan, rank, pool)
    kv_buf = KVBuffer(transfer_plan, rank, pool.num_rows, pool.device)
    kv_buf.write(0, torch.randn(q_buf.num_rows, 2, 1, 8))
    pool.put(kv_buf)
    q_buf.write(0, torch.randn(q_buf.num_rows, 2, 8))
    pool.query(q_buf)
    ranks = cluster.gather_objects((pool.slabs[0], pool.bytes["query"]))
    if rank == 0:
        run_lesson(tell, query_plan, q_buf, *zip(*ranks))
    cluster.close()


def tell(plan, q_buf, slabs, sent):
    """What happened to the row: slabs of both ranks, and bytes that they sent."""

    def show(name, table, *meaning):
        cells = (f"{key} {column[0]}" for key, column in zip(table._fields, table))
        print(f"{name:<7}{', '.join(cells)}")
        print("".join(f"       {line}\n" for line in meaning))

    print(
        "Two ranks of two slots of 4 tokens, and one layer. Request 0 is in the pool, but for"
    )
    print("its newest token, at position 9: a row for rank 0. The plan, made by hand:\n")
    show(
        "runs",
        plan.run_table,
        "slot: where its KV will lie. share: a number for all rows that one instance computes",
        "of one request. first_row: where the run begins among all rows that it computes.",
    )
    show(
        "fresh",
        plan.fresh,
        "KV that is written and read in this iteration: which run reads which, and where.",
        "place 0 is HERE: in the slab before any KV moves. first_row: of the slab.",
    )
    said = f"{plan.old.tokens[0]} tokens in slots {plan.old.tables[0]}"
    print(f"old    {said}; slots 0 and 1 are rank 0's, 2 and 3 rank 1's")
    (o,), (lse,) = q_buf.outputs.results[OWN]
    part_lse = q_buf.outputs.partial_lse[:, 0]  # of head 0, from both ranks
    here, there = (part_lse - lse[0]).exp().tolist()
    kv = torch.cat((slabs[0][:4], slabs[1][:4], slabs[0][4:6]))  # by position
    (all_o,), (all_lse,) = attend_at_once(q_buf.q[:1], kv, [9])
    apart = (o - all_o).abs().max()
    print(f"""
The steps have the numbers of pool.py's docstring; 2 and 6 are for KV that moves: here none does.

0  rank 0  puts K and V of position 9 into its slab row {plan.fresh.first_row[0]}, their home
1  rank 0  sends Q, 2 heads of 8: {sent[0]} bytes (the KV that it is to meet has {kv[4:8].nbytes})
3  rank 0  attends to its slab rows 0–5, positions 0–3, 8 and 9: LSE {part_lse[0]:.4f} (of head 0)
4  rank 1  has the row, and attends to its slab rows 0–3, positions 4–7: LSE {part_lse[1]:.4f}
5  rank 1  sends O and LSE, 2 heads of 8 + 1: {sent[1]} bytes
7  rank 0  merges both, by weights {here:.4f} and {there:.4f}: LSE {lse[0]:.4f}

All ten keys in one place: LSE {all_lse[0]:.4f}; O differs by {apart:.0e} at most.
Next: tokenlake.py, which makes such plans for many requests and ranks.""")


if __name__ == "__main__":
    # Rank 0 will have the store: one here would have threads, which do not survive a fork.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(travel, [port], 2, start_method="fork")
