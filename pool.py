"""Data plane: how do queries and keys meet across ranks? (§3.3, §3.4)

Every rank holds one *slab*: the segments that live with it, as rows of K and V per layer. Two
primitives over `torch.distributed` connect the slabs, per layer:

    query   rows of Q go to the KV, partial results (O, LSE) come back: two `all_to_all_single`
    move    rows of KV go elsewhere, as a put of rows just computed to their home: one

and a layer runs in this order, so that exchanges hide behind the attention that needs none:

    rank v                                            rank w, the same at the same time
    0  my new K, V → my slab (home, or staging)
    1  query: rows leave for the holders ───────────▶ arrive
    2  move: staged K, V leave for their homes ─────▶ arrive
    3  my rows × my KV that is here already
    4  my rows × my KV that arrived in 2              arrived rows × my KV → (O, LSE) ──▶ back
    5  merge per row

Moves have a process group of their own, so that none delays a query, and are issued after it on
every rank. An exchange that carries nothing for any rank is skipped by all: every rank knows the
whole plan. What ranks tell each other besides (a digest of the plan, flags, tokens, the clock) is
`Cluster`.

The plans come from balancer.py: a *run* is consecutive rows of one request, a *slot* holds a
segment, `references` are the segments that runs read at a holder. E.g. a run of 2 rows on instance
0 that reads segments on 0 and 1: rank 0 attends to its own (step 3) and ships 2 rows; rank 1
attends to the rest (step 4) and sends 2 partial results back; rank 0 merges two parts per row.

Left out: pulls (KV to the query), replicas, RDMA; a lost rank ends the run.

Notation: T rows · H query heads · Hkv KV heads · D head dim · N instances · C tokens per segment.
"""

import hashlib
import math
import os
import struct
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from kernels import Work, merge, partial_attention, ranges


class SetupError(ValueError):
    """A rank's ValueError during set-up, on every rank."""


class LakeError(RuntimeError):
    """The ranks cannot go on together: one line that says where and who."""


class Stopped(LakeError):
    """A rank was asked to stop (a signal); all stop at the same iteration."""


class Cluster:
    """The ranks of this job, and their small talk over a gloo group on CPU tensors.

    Under torchrun the ranks meet by its environment; without it there is one rank and nothing is
    ever sent."""

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
        """This rank's device for `auto`, `cpu` or `cuda`, and the bytes available on it. Ranks take
        a machine's GPUs in turn. Raises ValueError when there is none."""
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: no CUDA device is visible; cpu or auto is expected")
        if wanted != "cpu" and torch.cuda.is_available():
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            return device, torch.cuda.mem_get_info(device)[0]
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            fields = dict(line.split(":") for line in lines)
            return torch.device("cpu"), int(fields["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):  # not Linux
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
        """`step(*arguments)` on every rank. What one rank cannot do, none goes on with: raises
        SetupError with the words of the lowest rank that failed, on all; but a rank's own error
        that is no ValueError, and so no user's mistake, as it is."""
        result = problem = None
        try:
            result = step(*arguments)
        except Exception as caught:
            problem = caught
        said = [e for e in self.share(problem and (str(problem) or repr(problem))) if e]
        if problem and not isinstance(problem, ValueError):
            raise problem
        if said:
            raise SetupError(said[0])
        return result

    def same(self, text: str, what: str):
        """Raises ValueError unless every rank has the same text: ranks may run on machines with
        other files and defaults."""
        found = self.share(hashlib.blake2b(text.encode("utf-8", "replace")).digest())
        if odd := [rank for rank in range(self.size) if found[rank] != found[0]]:
            raise ValueError(f"rank {odd[0]} has other {what} than rank 0; the same is expected")

    def gather(self, values: list[int], asynchronous=False):
        """Integers of every rank, as many from each → [size][len(values)], or with `asynchronous`
        a function that waits for them."""
        mine = torch.tensor(values, dtype=torch.int64)
        if self.size == 1:
            return (lambda: [values]) if asynchronous else [values]
        out = [torch.empty_like(mine) for _ in range(self.size)]
        work = self.guard(dist.all_gather, out, mine, async_op=True)

        def finish():
            self.guard(work.wait)
            return torch.stack(out).tolist()
        return finish if asynchronous else finish()

    def announce(self, digest: bytes, stop: bool, fault: bool = False):
        """Sends the digest of this rank's plan for the next iteration, with its flags; `confirm`
        waits for everyone's."""
        self.iteration += 1
        if self.store:
            self.store.set(f"iteration/{self.rank}", str(self.iteration))
        self._announced = self.gather([*struct.unpack("<qq", digest), stop, fault], True)

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
        """Calls a collective, or waits for one. If it fails, a rank was lost: the error says which
        is behind, by the counters that ranks keep in the store. (NCCL does not fail here: its
        watchdog ends the process.)"""
        try:
            return collective(*arguments, **options)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            try:
                self.store.set_timeout(timedelta(seconds=5))
                at = [int(self.store.get(f"iteration/{rank}")) for rank in range(self.size)]
                behind = [str(rank) for rank, iteration in enumerate(at) if iteration < max(at)]
                who = f"behind: rank {', '.join(behind)}" if behind else "all had begun it"
            except RuntimeError:
                who = "nobody knows which"
            raise LakeError(f"iteration {self.iteration}: a rank was lost ({who}): {said}"
                            ) from None

    def new_groups(self, instances: list[int], device: torch.device, count: int) -> list:
        """Process groups over the ranks of a lake; every rank of the cluster takes part. NCCL when
        each rank has a GPU of its own, else gloo."""
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


class KVBuffer:
    """Where the engine leaves K and V of this instance's new rows, and where they go from there.
    Row indices of the slab; made once per iteration, used by every layer. `staging`: slab rows for
    what lives elsewhere."""

    def __init__(self, plan, index: int, staging: range, device):
        mine, home = plan.source == index, plan.home
        away = home[mine] != index
        if away.sum() > len(staging):
            raise LakeError(f"{away.sum()} rows of instance {index} live elsewhere, staging has "
                            f"{len(staging)}")
        written = plan.slab_row[mine]
        written[away] = staging.start + np.arange(away.sum())
        leaving = written[away][np.argsort(home[mine][away], kind="stable")]
        arriving = plan.slab_row[(home == index) & ~mine]  # in order of their sources
        moved = plan.moved()
        self.active = bool(moved.any())
        self.sends, self.receives = moved[index].tolist(), moved[:, index].tolist()
        self.fresh, self.written, self.leave, self.arrive = (
            torch.from_numpy(rows).to(device, non_blocking=True)
            for rows in (plan.row[mine], written, leaving, arriving))
        self.layer = self.k = self.v = None

    def write(self, layer: int, k, v):
        """k, v [T, Hkv, D] of the rows that this instance computes."""
        self.layer, self.k, self.v = layer, k, v


class QueryBuffer:
    """Where the engine leaves Q of this instance's rows, and what becomes of them: which rows
    leave, what is attended here, and what is merged. Made once per iteration."""

    def __init__(self, plan, index: int, heads_per_kv: int, device):
        N, S, C = plan.geometry.sizes
        run, segment, slot = plan.references(index)
        own, late = plan.instance[run] == index, np.isin(slot, plan.late)
        length = np.where(segment == plan.position[run] // C,
                          plan.position[run] % C + plan.rows[run], C)

        def work(chosen, arriving=False):
            """Work over the chosen references, and the runs it is for. Their query rows are this
            instance's own, or those arriving, which come run after run."""
            spans = np.flatnonzero(chosen)
            runs, span_run = np.unique(run[spans], return_inverse=True)
            rows = plan.rows[runs]
            first = np.cumsum(rows) - rows if arriving else plan.first[runs]
            return Work(first, rows, plan.position[runs], span_run, slot[spans] % S * C,
                        length[spans], segment[spans] * C, heads_per_kv, device), runs

        self.ready, ready = work(own & ~late)
        self.waiting, waiting = work(own & late)
        self.arrived, _ = work(~own, arriving=True)

        mine = plan.instance == index
        shipped = plan.shipped()
        self.active = bool(shipped.any())
        self.sends, self.receives = shipped[index].tolist(), shipped[:, index].tolist()
        leaving = [np.flatnonzero(mine & (plan.segments[:, w] > 0)) if w != index else ready[:0]
                   for w in range(N)]
        self.num_rows = int(plan.rows[mine].sum())
        parts = np.full((self.num_rows, 2 + N), -1, np.int32)
        base, sources = 0, []
        for column, runs in enumerate([ready, waiting, *leaving]):
            rows = ranges(plan.first[runs], plan.rows[runs])
            parts[rows, column] = base + np.arange(len(rows))
            base += len(rows)
            sources.append(rows)
        parts = parts[:, (parts >= 0).any(0)]
        leave = np.concatenate(sources[2:])
        self.leave, self.parts = (torch.from_numpy(x).to(device, non_blocking=True)
                                  for x in (leave, np.ascontiguousarray(parts)))
        self.layer = self.q = None

    def write(self, layer: int, q):
        """q [T, H, D] of the rows that this instance computes."""
        self.layer, self.q = layer, q


class Pool:
    """One instance's slab, and its part in the exchanges of a lake over `groups` (one for queries,
    one for moves; none for a lake of one, where nothing is ever sent)."""

    def __init__(self, cluster: Cluster, groups: list, config, slots: int, segment_tokens: int,
                 staging: int, dtype, device):
        self.device = torch.device(device)
        self.heads_per_kv = config.num_heads // config.num_kv_heads
        self.scale = 1.0 / math.sqrt(config.head_dim)
        # Never read before written: spans end where the tokens do.
        self.staging = range(slots * segment_tokens, slots * segment_tokens + staging)
        shape = (config.num_layers, self.staging.stop, config.num_kv_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=self.device)
        self.v = torch.zeros(shape, dtype=dtype, device=self.device)
        self.cluster = cluster
        self.query_group, self.move_group = groups or (None, None)
        self.pinned = bool(groups) and self.device.type == "cuda" and (
            dist.get_backend(groups[0]) == "gloo")
        self.bytes = {"query": 0, "put": 0}
        self._put = None

    @staticmethod
    def bytes_needed(config, segment_tokens: int, staging: int, dtype, slots: int) -> int:
        """Of a slab."""
        rows = slots * segment_tokens + staging
        return (2 * config.num_layers * rows * config.num_kv_heads * config.head_dim
                * dtype.itemsize)

    def _exchange(self, rows, sends, receives, group):
        """rows [sum(sends), …], in the order of their destinations → a function that waits for
        [sum(receives), …], in the order of their sources."""
        if self.pinned:  # gloo moves host memory
            rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
        out = rows.new_empty(sum(receives), *rows.shape[1:])
        work = self.cluster.guard(dist.all_to_all_single, out, rows.contiguous(), receives, sends,
                                  group=group, async_op=True)

        def finish():
            self.cluster.guard(work.wait)
            return out.to(self.device)
        return finish

    def move(self, layer: int, leave, sends, arrive, receives, kind: str):
        """Slab rows `leave` of this rank (by destination) to the rows `arrive` of others (by
        source). Returns a function that waits until what arrives here is in place."""
        k, v = self.k[layer], self.v[layer]
        rows = torch.stack((k[leave], v[leave]), 1)  # [n, 2, Hkv, D]
        self.bytes[kind] += rows.nbytes
        finish = self._exchange(rows, sends, receives, self.move_group)

        def land():
            kv = finish()
            k[arrive], v[arrive] = kv[:, 0], kv[:, 1]
        return land

    def put(self, buffer: KVBuffer):
        """Writes the layer's new rows into this slab. Those that live elsewhere wait in staging:
        `query`, which comes next in every layer on every rank, sends them after the queries."""
        self.k[buffer.layer, buffer.written] = buffer.k[buffer.fresh]
        self.v[buffer.layer, buffer.written] = buffer.v[buffer.fresh]
        self._put = buffer if buffer.active else None

    def query(self, buffer: QueryBuffer):
        """Attention of this rank's rows over the whole pool → [T, H, D]."""
        layer, q = buffer.layer, buffer.q
        k, v = self.k[layer], self.v[layer]
        if buffer.active:
            rows = q[buffer.leave]
            self.bytes["query"] += rows.nbytes
            arriving = self._exchange(rows, buffer.sends, buffer.receives, self.query_group)
        land, self._put = self._put, None
        if land:
            land = self.move(layer, land.leave, land.sends, land.arrive, land.receives, "put")
        partials = [partial_attention(q, k, v, buffer.ready, self.scale)]
        if land:
            land()
            partials.append(partial_attention(q, k, v, buffer.waiting, self.scale))
        if buffer.active:
            o, lse = partial_attention(arriving(), k, v, buffer.arrived, self.scale)
            result = torch.cat((o, lse[..., None]), -1)  # one buffer: [n, H, D + 1]
            self.bytes["query"] += result.nbytes
            back = self._exchange(result, buffer.receives, buffer.sends, self.query_group)()
            partials.append((back[..., :-1], back[..., -1]))
        o, lse = (torch.cat(parts) for parts in zip(*partials))
        return merge(o, lse, buffer.parts)[0].to(q.dtype)
