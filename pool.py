"""Data plane: how do queries and keys meet across ranks? (§3.3, §3.4)

Every rank holds one *slab*: the segments that live with it, as rows of K and V per layer. Two
primitives over `torch.distributed` connect the slabs, per layer:

    query   rows of Q go to the KV, partial results (O, LSE) come back: two `all_to_all_single`
    move    rows of KV go: to their home, to a replica, to rows that pull them: one

and a layer runs in this order, so that exchanges hide behind the attention that needs none:

    rank v                                            rank w, the same at the same time
    0  my new K, V → my slab (home, or staging)
    1  query: rows leave for the holders ───────────▶ arrive
    2  move: new KV leaves, copies too; and what is pulled for the next layer ─▶ arrive
    3  my rows × my KV that is here already
    4  my rows × KV that came by now                  arrived rows × my KV → (O, LSE) ──▶ back
    5  merge per row

Moves have a process group of their own, so that none delays a query, and are issued after it. What
carries nothing for any rank is skipped by all: every rank knows the whole plan (tokenlake.py). Left
out: RDMA; a lost rank ends the run.

Notation: T rows · H query heads · Hkv KV heads · D head dim · N instances · C tokens per segment.
"""

import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist

from kernels import Work, merge, partial_attention, ranges, to_device

KINDS = "put", "replica", "pull"  # of moves
HERE, LATE, PULLED, SIBLING = range(4)  # places of KV: see QueryPlan.references


class SetupError(ValueError):
    """A rank's ValueError during set-up, on every rank."""


class LakeError(RuntimeError):
    """The ranks cannot go on together: one line that says where and who."""


class Stopped(LakeError):
    """A rank was asked to stop (a signal); all stop at the same iteration."""


class Cluster:
    """The ranks of this job (one without torchrun), and their small talk over gloo on the CPU."""
    def __init__(self, timeout: float = 300.0):
        self.rank, self.size, self.local_rank, self.local_size = (
            int(os.environ.get(name, default)) for name, default in (
                ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        self.timeout, self.iteration = timedelta(seconds=timeout), 0
        self.store = self._announced = None
        if self.size > 1:
            dist.init_process_group("gloo", timeout=self.timeout)
            self.store = dist.distributed_c10d._get_default_store()
            self.store.set(f"iteration/{self.rank}", "0")

    def find_device(self, wanted: str) -> tuple[torch.device, int]:
        """This rank's device for `auto`, `cpu` or `cuda`, and the bytes there (free on a GPU).
        Ranks take a machine's GPUs in turn. Raises ValueError when there is none."""
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: no CUDA device is visible; cpu or auto is expected")
        if wanted != "cpu" and torch.cuda.is_available():
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            return device, torch.cuda.mem_get_info(device)[0]
        return torch.device("cpu"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def ranks_per_device(self, device: torch.device) -> int:
        """How many ranks share a device of this machine."""
        return -(-self.local_size // (torch.cuda.device_count() if device.type == "cuda" else 1))

    def share(self, thing) -> list:
        """Every rank's `thing` (picklable), by rank. Slow; for set-up and reports."""
        things = [thing] * self.size
        if self.size > 1:
            self.guard(dist.all_gather_object, things, thing)
        return things

    def together(self, step, *arguments):
        """`step(*arguments)` on every rank. If any fails, raises SetupError on all, in the words of
        the lowest; but a rank's own error that is no ValueError (no user's mistake), as it is."""
        try:
            result, problem = step(*arguments), None
        except Exception as caught:
            problem = caught
        said = [e for e in self.share(problem and (str(problem) or repr(problem))) if e]
        if problem and not isinstance(problem, ValueError):
            raise problem
        if said:
            raise SetupError(said[0])
        return result

    def same(self, text: str, what: str):
        """Raises ValueError unless all have the same text: machines have other files, defaults."""
        found = self.share(hashlib.blake2b(text.encode("utf-8", "replace")).digest())
        if odd := [rank for rank in range(self.size) if found[rank] != found[0]]:
            raise ValueError(f"rank {odd[0]} has other {what} than rank 0; the same is expected")

    def gather(self, values: list[int], asynchronous=False):
        """Every rank's integers → [size][len(values)]; asynchronous: a function that waits."""
        mine = torch.tensor(values, dtype=torch.int64)
        out = mine.repeat(self.size, 1)
        work = self.size > 1 and self.guard(dist.all_gather, [*out], mine, async_op=True)
        def finish():
            if work:
                self.guard(work.wait)
            return out.tolist()
        return finish if asynchronous else finish()

    def announce(self, digest: bytes, stop: bool, fault: bool = False):
        """Sends the digest of this rank's next plan, and its flags; `confirm` waits for all."""
        self.iteration += 1
        if self.store:
            self.store.set(f"iteration/{self.rank}", str(self.iteration))
        self._announced = self.gather([*np.frombuffer(digest, "<i8").tolist(), stop, fault], True)

    def confirm(self):
        """Before the first exchange of data: raises LakeError on every rank if the plans differ
        (collectives whose splits disagree end the process in C++), Stopped if one was asked to."""
        if self._announced is None:
            return
        said, self._announced = self._announced(), None
        at = f"iteration {self.iteration}: "
        if faults := [str(rank) for rank, (*_, fault) in enumerate(said) if fault]:
            raise LakeError(f"{at}planning failed on rank {', '.join(faults)}")
        if odd := [str(rank) for rank, words in enumerate(said) if words[:2] != said[0][:2]]:
            raise LakeError(f"{at}the plan of rank {', '.join(odd)} differs from that of rank 0")
        if any(stop for *_, stop, _ in said):
            raise Stopped(at + "stopped by a signal")

    def guard(self, collective, *arguments, **options):
        """Calls a collective, or waits for one. If it fails, a rank was lost: LakeError says which
        is behind, by the store's counters. (NCCL's watchdog ends the process instead.)"""
        try:
            return collective(*arguments, **options)
        except RuntimeError as error:
            try:
                self.store.set_timeout(timedelta(seconds=5))
                at = [int(self.store.get(f"iteration/{rank}")) for rank in range(self.size)]
                behind = [str(rank) for rank, iteration in enumerate(at) if iteration < max(at)]
                who = f"behind: rank {', '.join(behind)}" if behind else "all had begun it"
            except RuntimeError:
                who = "nobody knows which"
            said = f"a rank was lost ({who}): {str(error).splitlines()[0]}"
            raise LakeError(f"iteration {self.iteration}: {said}") from None

    def new_groups(self, instances: list[int], device: torch.device, count: int) -> list:
        """Process groups over a lake's ranks, made by all: NCCL if each has a GPU, else gloo."""
        alone = device.type == "cuda" and self.ranks_per_device(device) == 1
        backend = "nccl" if all(self.share(alone)) else "gloo"
        return [dist.new_group(instances, self.timeout, backend) for _ in range(count)]

    def speaks(self) -> bool:
        """True on the first rank that asks: it says what went wrong, whoever is lost."""
        try:
            return self.store is None or self.store.add("spoken", 1) == 1
        except RuntimeError:
            return True

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def profiler(folder, after: int):
    """Of this rank, for Perfetto: functions by name, operators, kernels. Of eight iterations (a
    `step` ends one), after so many others: each takes megabytes, and a second to write."""
    return torch.profiler.profile(
        with_stack=True, schedule=torch.profiler.schedule(wait=after, warmup=0, active=8, repeat=1),
        on_trace_ready=lambda seen: seen.export_chrome_trace(f"{folder}/profile.json.gz"))


@dataclass(frozen=True)
class Moves:
    """Rows of KV that travel: a line per span of slab rows."""
    kind: np.ndarray  # index into KINDS
    source: np.ndarray  # instance
    leave: np.ndarray  # first slab row there
    target: np.ndarray  # instance
    arrive: np.ndarray  # first slab row there; −1: the rows stay in the receive buffer
    length: np.ndarray

    @classmethod
    def of(cls, *parts) -> "Moves":
        """From (kind, source, leave, target, arrive, length), each a number or [lines]."""
        return cls(*np.concatenate([np.stack(np.broadcast_arrays(*map(np.atleast_1d, part)))
                                    for part in parts], 1).astype(np.int64))

    def offsets(self) -> np.ndarray:
        """[lines] where each begins in its target's receive buffer, which is in order of source."""
        order, out = np.lexsort((self.source, self.target)), np.zeros_like(self.length)
        length, target = self.length[order], self.target[order]
        before = np.cumsum(length) - length
        out[order] = before - before[np.searchsorted(target, target)]
        return out

    def moved(self, N: int) -> np.ndarray:
        """[N, N] rows that instance v (line) sends to w (column)."""
        rows = np.bincount(self.source * N + self.target, self.length, N * N)
        return rows.astype(np.int64).reshape(N, N)


def old_segments(tables: list, count, hot=np.zeros((3, 0), np.int64)):
    """3 × [n] share, segment, global slot: of the first `count` [G] entries of each share's table,
    and of replicas that are read instead, `hot` in the same terms, as far as among them."""
    share, segment = np.repeat(np.arange(len(count)), count), ranges(0 * count, count)
    some = np.flatnonzero(count)
    parts = [tables[g][:n] for g, n in zip(some.tolist(), count[some].tolist())]
    slot = np.concatenate(parts or [count[:0]])
    hot = hot[:, hot[1] < count[hot[0]]]
    slot[np.searchsorted(share, hot[0]) + hot[1]] = hot[2]
    return share, segment, slot


@dataclass(frozen=True)
class QueryPlan:
    """Who computes which rows, and how these meet the KV they read: the same on every rank.

    Runs stand in order of the instances that compute them, then of requests, then of positions;
    what an instance computes of a request is a *share*. KV from before this iteration is *old*: all
    rows of a share read all that its request has. KV written in it is *fresh*: of each pair of runs
    of a request the reader reads what the writer, the same run or one before it, writes."""
    runs: list
    instance: np.ndarray  # [B] computes the run
    first: np.ndarray  # [B] the run's first row there
    rows: np.ndarray  # [B]
    position: np.ndarray  # [B] of the first row
    home: np.ndarray  # [B] instance where its KV lives
    share: np.ndarray  # [B]
    old: np.ndarray  # [G] tokens of old KV that a share reads
    tables: list  # [G] of the share's request: global slots of its segments
    hot: np.ndarray  # [3, h] share, segment, slot: replicas that are read instead
    pull: np.ndarray  # [3, p] share, segment, row in the receive buffer of `pulls`: KV that travels
    fresh: np.ndarray  # [5, pairs] reader, writer, where they meet: instance, place, row
    ships: np.ndarray  # [B, N] whether the run's rows travel to that instance
    pulls: Moves  # of old KV
    reads: np.ndarray  # [N] tokens of old KV read at each holder, once a request (§7.2)
    load: np.ndarray  # [N] attention done there, rows × tokens; what is memory-bound weighs more
    sizes: tuple[int, int, int]  # N, S, C

    @cached_property
    def segments(self):
        """3 × [n] share, segment, global slot of old KV. Made when asked for, in the iteration."""
        return old_segments(self.tables, -(-self.old // self.sizes[2]), self.hot)

    def references(self, index: int):
        """What rows read at an instance, its own and those that arrive: [5, spans] run (ascending),
        place, first row, length, position. Places: in the slab, HERE before the iteration's moves
        or only after them (LATE), or in the receive buffer of pulls (PULLED) or moves (SIBLING)."""
        N, S, C = self.sizes
        _, first, runs = np.unique(self.share, return_index=True, return_counts=True)
        share, segment, slot = self.segments
        meet, row, place = slot // S, slot % S * C, np.full(len(slot), HERE)
        to, at, pull_row = self.pull
        at = np.searchsorted(share, to) + at
        row[at], place[at], meet[at] = pull_row, PULLED, self.instance[first[to]]
        at = np.flatnonzero(meet == index)
        each = runs[share[at]]  # every run of the share reads them
        run, at = ranges(first[share[at]], each), np.repeat(at, each)
        length = np.minimum(self.old[share[at]] - segment[at] * C, C)
        old = run, place[at], row[at], length, segment[at] * C
        run, writer, _, place, row = self.fresh[:, self.fresh[2] == index]
        fresh = run, place, row, self.rows[writer], self.position[writer]
        spans = np.concatenate((old, fresh), 1)
        return spans[:, np.argsort(spans[0], kind="stable")]

    def shipped(self) -> np.ndarray:
        """[N, N] query rows that instance v (line) ships to w (column)."""
        out = np.zeros((self.sizes[0],) * 2, np.int64)
        np.add.at(out, self.instance, self.rows[:, None] * self.ships)
        return out


@dataclass(frozen=True)
class TransferPlan:
    """New KV: what is written where it is computed, and what travels on, besides hot segments."""
    instance: np.ndarray  # [lines] one per run
    first: np.ndarray  # first row of those that the instance computes
    written: np.ndarray  # first slab row
    length: np.ndarray
    moves: Moves
    num_instances: int


class Exchange:
    """An instance's part in an iteration's moves: slab rows that leave, and where others land."""
    def __init__(self, moves: Moves, num_instances: int, index: int, device):
        moved, offsets = moves.moved(num_instances), moves.offsets()
        self.active = bool(moved.any())
        self.sends, self.receives = moved[index].tolist(), moved[:, index].tolist()
        by_target = np.argsort(moves.target, kind="stable")
        mine = by_target[moves.source[by_target] == index]
        self.rows = np.bincount(moves.kind[mine], moves.length[mine], len(KINDS)).astype(int)
        lands = np.flatnonzero((moves.target == index) & (moves.arrive >= 0))
        self.leave, self.land, self.arrive = to_device([
            ranges(first[lines], moves.length[lines]) for first, lines in (
                (moves.leave, mine), (offsets, lands), (moves.arrive, lands))], device)


class KVBuffer:
    """Where the engine leaves K and V of this instance's new rows. rows: how many the slab has."""
    def __init__(self, plan: TransferPlan, index: int, rows: int, device):
        mine = plan.instance == index
        last = (plan.written + plan.length)[mine].max(initial=0) - 1
        if last >= rows:
            raise LakeError(f"instance {index} is to write slab row {last}, its slab has {rows}")
        self.fresh, self.written = to_device(
            [ranges(x[mine], plan.length[mine]) for x in (plan.first, plan.written)], device)
        self.moves = Exchange(plan.moves, plan.num_instances, index, device)
        self.layer = self.k = self.v = None

    def write(self, layer: int, k, v):
        """k, v [T, Hkv, D] of the rows that this instance computes."""
        self.layer, self.k, self.v = layer, k, v


class QueryBuffer:
    """Where the engine leaves Q of this instance's rows; which leave, are attended to, merged."""
    def __init__(self, plan: QueryPlan, index: int, pool: "Pool"):
        N, device = plan.sizes[0], pool.device
        spans = plan.references(index)
        own, place = plan.instance[spans[0]] == index, spans[1]
        def work(chosen, arriving=False):
            """Work over the chosen references, and the runs it is for. Their query rows are this
            instance's own, or those arriving, which come run after run."""
            runs, span_run = np.unique(spans[0, chosen], return_inverse=True)
            rows = plan.rows[runs]
            first = np.cumsum(rows) - rows if arriving else plan.first[runs]
            return Work(first, rows, plan.position[runs], span_run, *spans[2:, chosen],
                        pool.heads_per_kv, device, pool.programs), runs

        self.works, columns = zip(*(work(own & (place == p)) for p in range(4)))
        self.arrived, _ = work(~own, arriving=True)
        self.pulls = Exchange(plan.pulls, N, index, device)
        mine, shipped = plan.instance == index, plan.shipped()
        self.active = bool(shipped.any())
        self.sends, self.receives = shipped[index].tolist(), shipped[:, index].tolist()
        self.num_rows = int(plan.rows[mine].sum())
        leaving = [np.flatnonzero(mine & plan.ships[:, w]) for w in range(N)]
        rows = [ranges(plan.first[runs], plan.rows[runs]) for runs in (*columns, *leaving)]
        leave, column = np.concatenate(rows[4:]), np.repeat(np.arange(4 + N), [*map(len, rows)])
        parts = np.full((self.num_rows, 4 + N), -1, np.int64)
        parts[np.concatenate(rows), column] = np.arange(len(column))
        self.parts, self.leave = to_device((parts[:, (parts >= 0).any(0)], leave), device)
        self.layer = self.q = None

    def write(self, layer: int, q):
        """q [T, H, D] of the rows that this instance computes."""
        self.layer, self.q = layer, q


class Pool:
    """One instance's slab, and its exchanges over two groups (for queries, for moves), or none."""
    def __init__(self, cluster: Cluster, groups: list, config, slots: int, segment_tokens: int,
                 staging: int, dtype, device):
        self.cluster, self.device = cluster, torch.device(device)
        self.heads_per_kv = config.num_heads // config.num_kv_heads
        self.scale = 1.0 / config.head_dim**0.5
        # Rows of slots, then staging. Never read before written: spans end where the tokens do.
        self.rows = slots * segment_tokens + staging
        shape = config.num_layers, self.rows, config.num_kv_heads, config.head_dim
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in "kv")
        self.query_group, self.move_group = groups or (None, None)
        cuda = self.device.type == "cuda"
        self.pinned = bool(groups) and cuda and dist.get_backend(groups[0]) == "gloo"
        # A decode alone is to keep a GPU busy: four programs for each of its multiprocessors.
        busy = 4 * torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
        self.programs = -(-busy // config.num_kv_heads)
        self.bytes = dict.fromkeys(("query", *KINDS), 0)
        self._transfer = self._pulling = None

    def _exchange(self, rows, sends, receives, group):
        """rows [sum(sends), …] by target → a function: waits for [sum(receives), …] by source."""
        if self.pinned:  # gloo moves host memory
            rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
        out = rows.new_empty(sum(receives), *rows.shape[1:])
        work = self.cluster.guard(dist.all_to_all_single, out, rows.contiguous(), receives, sends,
                                  group=group, async_op=True)
        def finish():
            self.cluster.guard(work.wait)
            return out.to(self.device)
        return finish

    def move(self, layer: int, part: Exchange):
        """Slab rows travel. Returns a function that waits until those that belong into this slab
        are there, and returns all arrivals as k, v [n, Hkv, D]. All skip it if none sends any."""
        k, v = self.k[layer], self.v[layer]
        if not part.active:
            return lambda: (k[:0], v[:0])
        rows = torch.stack((k[part.leave], v[part.leave]), 1)  # [n, 2, Hkv, D]
        for kind, n in zip(KINDS, part.rows.tolist()):
            self.bytes[kind] += n * rows[:1].nbytes
        finish = self._exchange(rows, part.sends, part.receives, self.move_group)
        def land():
            arrived = [x.contiguous() for x in finish().unbind(1)]
            for slab, x in zip((k, v), arrived):
                slab[part.arrive] = x[part.land]
            return arrived
        return land

    def put(self, buffer: KVBuffer):
        """Writes the layer's new rows into this slab. Those that live elsewhere wait in staging:
        `query`, which comes next in every layer on every rank, sends them after the queries."""
        self.k[buffer.layer, buffer.written] = buffer.k[buffer.fresh]
        self.v[buffer.layer, buffer.written] = buffer.v[buffer.fresh]
        self._transfer = buffer.moves

    def query(self, buffer: QueryBuffer):
        """Attention of this rank's rows over the whole pool → [T, H, D]."""
        layer, q = buffer.layer, buffer.q
        slab = self.k[layer], self.v[layer]
        if buffer.active:
            rows = q[buffer.leave]
            self.bytes["query"] += rows.nbytes
            arriving = self._exchange(rows, buffer.sends, buffer.receives, self.query_group)
        # Old KV is complete in every layer, so its pull has a layer's head start.
        pull = self._pulling if layer else self.move(0, buffer.pulls)
        land = self.move(layer, self._transfer)
        if layer + 1 < len(self.k):
            self._pulling = self.move(layer + 1, buffer.pulls)
        here, late, pulled, sibling = buffer.works
        attend = lambda kv, work: partial_attention(q, *kv, work, self.scale)
        partials = [attend(slab, here)]
        fresh = land()
        partials += [attend(slab, late), attend(pull(), pulled), attend(fresh, sibling)]
        if buffer.active:
            o, lse = partial_attention(arriving(), *slab, buffer.arrived, self.scale)
            result = torch.cat((o, lse[..., None]), -1)  # one buffer: [n, H, D + 1]
            self.bytes["query"] += result.nbytes
            back = self._exchange(result, buffer.receives, buffer.sends, self.query_group)()
            partials.append((back[..., :-1], back[..., -1]))
        o, lse = (torch.cat(parts) for parts in zip(*partials))
        return merge(o, lse, buffer.parts)[0].to(q.dtype)
