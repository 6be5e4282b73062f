"""Tests: `pytest test_tokenlake.py`; `-m slow` runs the long ones, which are left out by default.

Ranks are real processes that talk over gloo, forked from one server that has torch imported. Each
run has its own store on a free port and its own folder, so runs can go side by side."""

import ast
import contextlib
import gzip
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU leaves children free to use it
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels is imported

import balancer
import kernels
import model as model_module
import pool
import run_cluster
import engine as engine_module
import scheduler as scheduler_module
import tokenlake
import traces
import work as work_module
from balancer import Balancer, PrefixTree, Request
from kernels import merge, partial_attention
import cluster as cluster_module
from cluster import Cluster
import oracle as oracle_module
from model import Llama, LlamaConfig, Sampler, load_config, load_weights, random_weights
from pool import LakeConfig
from scheduler import Scheduler
from tokenlake import TokenLake
from work import KVSpans, QueryRows, Work, ranges, to_device

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tensors are small: threads would wait longer than they compute
BACKENDS = ["torch"] + ["triton"] * (kernels.triton is not None)
DEVICE = {"torch": "cpu", "triton": "cuda" if GPU else "cpu"}  # where a backend is tested
on_gpu = pytest.mark.skipif(not GPU, reason="there is no GPU")

# ── ranks ─────────────────────────────────────────────────────────────────────────────────────

os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_tokenlake"])


def rank_main(pipe, rank, size, port, arguments, prelude):
    """One rank: the program, with the invariants checked after every iteration."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                      LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True")
    out, seen, status, failure = io.StringIO(), {}, None, None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            observe = (globals()[prelude](rank, seen) if prelude else None) or (lambda *_: None)

            def on_iteration(server, finished):
                check_invariants(server)
                observe(server, finished)

            status = run_cluster.run(arguments, on_iteration)
    except BaseException:
        failure = traceback.format_exc()
    pipe.send((status, out.getvalue(), seen, failure))
    pipe.close()


def on_a_cpu(arguments) -> list[str]:
    """Unless they say otherwise: also where there is a GPU."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    return [*map(str, arguments), *device]


class Job:
    """Ranks of one run of the program, started; `finish` waits for them."""

    def __init__(self, arguments, ranks=1, prelude=None):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes, self.pipes = [], []
        for rank in range(ranks):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=rank_main, args=(
                theirs, rank, ranks, self.store.port, on_a_cpu(arguments), prelude))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def survivors(self, lost, timeout=60) -> str:
        """What the others say when one rank is dead or stuck: one line, of one of them."""
        texts = []
        deadline = time.monotonic() + timeout
        for rank, pipe in enumerate(self.pipes):
            if rank != lost:
                assert pipe.poll(max(0.1, deadline - time.monotonic())), f"rank {rank} hangs"
                status, text, _, failure = pipe.recv()
                assert failure is None and status == 1, failure
                texts.append(text)
        for process in self.processes:
            process.kill()
            process.join(10)
        said = "".join(texts)
        assert said.count("run_cluster.py: ") == 1, said
        return said[said.index("run_cluster.py: "):].splitlines()[0]

    def finish(self, timeout=240, raised=None):
        """[(status, text, seen)] by rank; fails the test if a rank hung, or if one raised that
        should not (`raised` should)."""
        deadline, results = time.monotonic() + timeout, []
        for rank, (process, pipe) in enumerate(zip(self.processes, self.pipes)):
            try:
                if not pipe.poll(max(0.1, deadline - time.monotonic())):
                    raise AssertionError(f"rank {rank} hangs")
                result = pipe.recv()
            except EOFError:
                result = (None, "", {}, f"rank {rank} died")
            except AssertionError:
                for other in self.processes:
                    other.kill()
                raise
            results.append(result)
        for process in self.processes:
            process.join(10)
        failures = [failure for rank, (*_, failure) in enumerate(results)
                    if bool(failure) != (rank == raised)]
        texts = "".join(text for _, text, *_ in results)
        assert not failures, "\n".join(map(str, failures)) + texts
        return [result[:3] for result in results]


class Served:
    """A finished run: records by request id, summary, and what the prelude saw on each rank."""

    def __init__(self, folder, results):
        self.status, self.text = results[0][0], "".join(text for _, text, _ in results)
        self.seen = [seen for *_, seen in results]
        lines = (folder / "requests.jsonl").read_text().splitlines()
        self.records = {r["request_id"]: r for r in map(json.loads, lines)}
        self.summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
        self.tokens = {id: r["output_ids"] for id, r in sorted(self.records.items())}


def write_trace(folder, lines) -> Path:
    path = folder / f"trace{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps({"timestamp": 0} | line) + "\n" for line in lines))
    return path


def serve(folder, trace, *arguments, ranks=1, prelude=None, status=0, dtype="float64"):
    """Runs the program on `trace` (a path, or lines to write) and reads what it wrote. status: how
    it is to end; None: as it likes."""
    if trace is not None and not isinstance(trace, Path):
        trace = write_trace(folder, trace)
    output = folder / f"out{len(list(folder.iterdir()))}"
    job = Job([*(("--trace", trace) if trace else ()), "--output", output, "--speed", "inf",
               "--dtype", dtype, *arguments], ranks, prelude)
    results = job.finish()
    assert status is None or [s for s, *_ in results] == [status] * ranks, results
    return Served(output, results)


def check_invariants(server):
    """What must hold between two iterations, and that the ranks agree on it."""
    bal, running = server.lake.balancer, server.scheduler.running
    check_bookkeeping(bal, running)
    state = repr((sorted(bal.tree.segments), list(bal.tree.lru), bal.free,
                  [r.tokens for r in running], [r.table.tolist() for r in running],
                  server.engine.clock))
    digest = int.from_bytes(balancer.hashlib.blake2b(state.encode(), digest_size=7).digest(),
                            "little")
    failed = isinstance((server.engine.next or [None])[0], Exception)  # to plan ahead
    digests, failures = zip(*server.cluster.gather_integers([digest, failed]))
    assert len(set(digests)) == 1 or any(failures), "ranks disagree"


def check_bookkeeping(bal, running):
    """Section by section what must hold of slots, segments and pins between two iterations."""
    tree, (N, S, C) = bal.tree, bal.sizes
    owners = Counter(slot for free in bal.free for slot in free)
    for instance, free in enumerate(bal.free):
        assert all(slot // S == instance for slot in free)
    references = Counter()
    for id, segment in tree.segments.items():
        assert segment.id == id and segment.replicas
        for instance, slot in segment.replicas.items():
            assert slot // S == instance
            owners[slot] += 1
        parent = segment.parent
        assert parent is tree.root or tree.segments[parent.id] is parent
        assert parent.children[id] is segment and segment.heat <= (parent.heat or math.inf)
        assert all(tree.segments[child] for child in segment.children)
        for slot in list(segment.replicas.values())[1:]:
            assert tree.extras[slot] is segment
    assert len(tree.extras) == sum(len(s.replicas) - 1 for s in tree.segments.values())
    for request in running:
        for index, segment in enumerate(request.segments):
            assert tree.segments[segment.id] is segment and segment.id == request.ids[index]
            assert request.table[index] in segment.replicas.values()
            references[segment.id] += 1
        owners.update(request.table[len(request.segments):request.num_slots].tolist())
        old = -(-request.done // C) if len(request.segments) * C <= request.done else (
            len(request.segments))
        held = np.bincount(request.table[:old] // S, minlength=N)
        assert bal.held[request.held_row].tolist() == held.tolist()
        assert len(request.segments) * C <= request.done + 1
        assert request.done <= len(request.tokens)
    assert owners == Counter(range(N * S)), "a slot without an owner, or with two"
    assert all(segment.pins == references[id] for id, segment in tree.segments.items())
    for request in running:
        others = [segment.pins > 1 for segment in request.segments]
        assert others == [i < request.num_shared for i in range(len(others))]
    assert set(tree.lru) == {id for id, s in tree.segments.items() if not s.pins}
    place = {id: i for i, id in enumerate(tree.lru)}
    for id in tree.lru:
        parent = tree.segments[id].parent
        assert parent is tree.root or parent.pins or place[id] < place[parent.id]
    assert all(owner in running for owner in bal.in_progress.values())


MODEL = {}


def small_model() -> Llama:
    """The built-in model in float64, as `--dtype float64` with seed 0 makes it."""
    if not MODEL:
        config = LlamaConfig()
        MODEL[0] = Llama(config, random_weights(config, 0, torch.float64, "cpu"))
    return MODEL[0]


def generate(model: Llama, prompt: list[int], num_tokens: int, sampler=Sampler(), request=0):
    """The oracle: each token from a forward over all so far. `request` only seeds the noise."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = model.forward_alone(tokens, rows=[-1])
        tokens += sampler.sample(logits, [(request, len(tokens))])[0].tolist()
    return tokens[len(prompt):]


def oracle(lines, model=None, sampler=Sampler()):
    """Tokens of every line by recomputation, sessions followed turn by turn."""
    model, sessions, answers = model or small_model(), {}, {}
    for index, line in enumerate(lines):
        session = line.get("salt"), line.get("session_id")
        prompt = sessions.get(session, []) + line["input_ids"]
        answers[index] = generate(model, prompt, line["output_length"], sampler, index)
        if session[1] is not None:
            sessions[session] = prompt + answers[index]
    return answers


def form_batches(scheduler, budget):
    return scheduler._form_batches(budget, scheduler.lake.list_shared(scheduler.running))


def tokens(count, seed):
    return np.random.default_rng(seed).integers(512, size=count).tolist()


def at_once(few_lanes):
    """A third as many with many lanes, as on an H200."""
    return work_module.AtOnce(few_lanes, few_lanes // 3)


def make_work(runs, spans, *args, **options):
    """Work from query runs (first row of q, rows, position), each a reader, KV spans (reader, first
    row of the slab, length, position), and what else it takes."""
    runs, spans = (np.array(table, np.int64).reshape(-1, n).T for table, n in ((runs, 3), (spans, 4)))
    rows = QueryRows.of_runs(np.arange(runs.shape[1]), *runs)
    return Work(rows, KVSpans(*spans), *args, **options)


# ── kernels ───────────────────────────────────────────────────────────────────────────────────


def side_by_side(k, v):
    """As a pool has them: a row's key and value side by side."""
    return torch.stack((k, v), 1)


def few_programs(monkeypatch):
    """The interpreter takes milliseconds for one: merges take eight heads each."""
    monkeypatch.setattr(kernels, "MANY_MERGED_ROWS", 1)


def in_work(rows, o, lse):
    """Results of the rows of a Work, in its order."""
    return o.cpu()[rows], lse.cpu()[rows]


def rows_of(runs):
    return [first + i for first, rows, _ in runs for i in range(rows)]


def reference_attention(q, k, v, runs, spans, scale):
    """float64, one row and one key at a time."""
    H, D = q.shape[1:]
    o, lse = [], []
    for number, (first, rows, position) in enumerate(runs):
        for row in range(rows):
            keys = [slab + j for run, slab, length, at in spans if run == number
                    for j in range(length) if at + j <= position + row]
            group = H // k.shape[1]
            kk = k[keys].double().repeat_interleave(group, 1)
            vv = v[keys].double().repeat_interleave(group, 1)
            s = torch.einsum("hd,nhd->hn", q[first + row].double(), kk) * scale
            lse.append(torch.logsumexp(s, -1) if keys else torch.full((H,), -math.inf).double())
            o.append(torch.einsum("hn,nhd->hd", s.softmax(-1), vv) if keys
                     else torch.zeros(H, D).double())
    return torch.stack(o), torch.stack(lse)


def test_arrays_reach_the_device_in_one_piece():
    """Of any shape, empty and strided ones too."""
    arrays = [np.arange(12).reshape(3, 4).T, np.zeros(0, np.int64), np.full((2, 0), -1),
              np.arange(7), np.arange(3)[::-1]]
    found = to_device(arrays, "cpu")
    for array, tensor in zip(arrays, found, strict=True):
        assert tensor.is_contiguous() and tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1


def test_what_a_kernel_reads_is_aligned(monkeypatch):
    """By 16 bytes, however many tiles and pieces there are: others would be compiled again."""
    monkeypatch.setattr(work_module, "PIECE_COST", 1)
    rng = np.random.default_rng(3)
    for _ in range(30):
        lengths = rng.integers(1, 400, size=3)
        runs = zip([0, 2, 5], [2, 3, rng.integers(1, 40)], lengths)
        spans = zip([0, 1, 2], [0, 500, 1000], lengths, [0, 0, 0])
        work = make_work([*runs], [*spans], 8, 8, resident=at_once(int(rng.integers(1, 30))))
        outputs = kernels.Outputs([work], [45, 3], [46], 8, 5, torch.float32, "cpu", True)
        tables = [tensor for table in (work.tables, *outputs.merges) for tensor in table]
        written = outputs.o, outputs.lse, outputs.partial_o, outputs.partial_lse
        for tensor in (*tables, *written):
            assert not tensor.numel() or tensor.storage_offset() * tensor.itemsize % 16 == 0


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


# A run that reads two spans, one of a prompt with causal tiles, one without keys, one whose keys
# all lie after it, and one that sees a single key.
RUNS = [(0, 1, 100), (3, 20, 30), (23, 7, 3), (30, 3, 2), (33, 1, 0)]
SPANS = [(0, 0, 70, 0), (0, 100, 31, 70), (1, 200, 16, 0), (1, 232, 16, 16), (1, 300, 19, 32),
         (3, 400, 9, 5), (4, 450, 1, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("H, Hkv, D, dtype, limit", [
    (8, 4, 16, "float32", 2e-6), (6, 2, 24, "float32", 2e-6), (8, 1, 64, "float16", 2e-3),
    (4, 4, 32, "bfloat16", 2e-2), (8, 2, 16, "float64", 1e-14), (7, 1, 80, "float32", 2e-6),
    (8, 2, 96, "bfloat16", 2e-2), (16, 1, 128, "float16", 2e-3), (2, 2, 256, "float32", 2e-6)])
@pytest.mark.parametrize("peak, programs", [(1.0, 1), (12.0, 1), (12.0, 8), (12.0, 1000)])
def test_partial_attention(backend, H, Hkv, D, dtype, limit, peak, programs, monkeypatch):
    """Against float64: peaky logits, poisoned rows outside the spans, rows without keys; also with
    blocks cut into pieces, down to a tile each."""
    if backend == "triton" and dtype == "float64":
        pytest.skip("the Triton kernels do not take float64")
    monkeypatch.setattr(work_module, "PIECE_COST", 1)
    few_programs(monkeypatch)
    generator = torch.Generator().manual_seed(H * D)
    q, k, v = (torch.randn(*shape, generator=generator).to(getattr(torch, dtype))
               for shape in ((34, H, D), (500, Hkv, D), (500, Hkv, D)))
    q = q * peak
    used = torch.zeros(500, dtype=torch.bool)
    for _, slab, length, _ in SPANS:
        used[slab:slab + length] = True
    k[~used] = v[~used] = math.nan
    device = DEVICE[backend]
    work = make_work(RUNS, SPANS, H, Hkv, q.dtype, at_once(programs))
    if programs != 8:
        assert (len(work.output_rows) > len(rows_of(RUNS))) == (programs > 1)
    found = partial_attention(q.to(device), side_by_side(k, v).to(device), work, D ** -0.5, backend)
    o, lse = in_work(rows_of(RUNS), *found)
    others = [1, 2]
    assert not found[0][others].any() and (found[1][others] == -math.inf).all()
    expected, expected_lse = reference_attention(q, k, v, RUNS, SPANS, D ** -0.5)
    assert o.dtype == lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    empty = expected_lse == -math.inf
    assert empty.any() and not empty.all()
    assert torch.equal(lse == -math.inf, empty) and not o[empty].any()
    assert error(o, expected) < limit
    assert error(lse[~empty], expected_lse[~empty]) < limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_attention_of_nothing(backend):
    """Zero query rows, and rows over a slab of which they read nothing."""
    q, kv = (x.to(DEVICE[backend]) for x in (torch.randn(5, 8, 16),
                                             torch.full((10, 2, 4, 16), math.nan)))
    nothing = make_work([], [], 8, 4)
    o, lse = partial_attention(q[:0], kv, nothing, 1.0, backend)
    assert o.shape == (0, 8, 16) and lse.shape == (0, 8)
    unread = make_work([(0, 5, 0)], [], 8, 4, resident=at_once(1000))
    o, lse = partial_attention(q, kv, unread, 1.0, backend)
    assert not o.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("many", [1, 100])
def test_merge(backend, many, monkeypatch):
    """Parts of a softmax give the whole; both sides −inf; o of an empty part may be anything; one or
    eight heads a program."""
    monkeypatch.setattr(kernels, "MANY_MERGED_ROWS", many)
    generator = torch.Generator().manual_seed(0)
    H, D, parts = 6, 24, 5
    s = torch.randn(4, H, parts, 40, generator=generator) * 10
    v = torch.randn(4, H, parts, 40, D, generator=generator)
    o = torch.einsum("rhpn,rhpnd->rphd", s.softmax(-1), v).flatten(0, 1)
    lse = s.logsumexp(-1).transpose(1, 2).flatten(0, 1)
    lse[3], o[3] = -math.inf, math.nan
    lse[10:15], o[10:15] = -math.inf, math.nan  # the whole of row 2
    table = torch.arange(20, dtype=torch.int32).view(4, 5)
    table = torch.cat((table, torch.full((4, 1), -1, dtype=torch.int32)), 1)
    table = torch.cat((table, torch.full((1, 6), -1, dtype=torch.int32)))  # a row with no part
    device = DEVICE[backend]
    out, out_lse = (x.cpu() for x in merge(o.to(device), lse.to(device), table.to(device), backend))
    s[0, :, 3] = -math.inf
    flat = s.flatten(2).double()
    expected = torch.einsum("rhn,rhnd->rhd", flat.softmax(-1), v.flatten(2, 3).double())
    for row in (0, 1, 3):
        assert error(out[row], expected[row]) < 1e-6
        assert error(out_lse[row], flat[row].logsumexp(-1)) < 1e-6
    for row in (2, 4):
        assert not out[row].any() and (out_lse[row] == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_of_nothing(backend):
    empty = torch.zeros(0, 4, 16, device=DEVICE[backend])
    o, lse = merge(empty, empty[..., 0], empty[:, :0, 0].int(), backend)
    assert o.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_long_blocks_are_cut_evenly():
    """As many pieces as run at once, or a few times as many; every tile of a block is in one piece,
    pieces of a block differ by one tile at most, and the longest come first."""
    spans = [(0, 0, 64 * 40, 0), (1, 5000, 64 * 6 + 1, 0), (2, 9000, 64, 0)]
    runs = [(0, 1, 9000), (1, 20, 9000), (21, 3, 9000), (24, 2, 9000)]  # the last one reads nothing
    whole = make_work(runs, spans, 8, 4)
    assert whole.output_rows.tolist() == [0, *range(21, 24), *range(1, 21)]
    for resident, counts in ((2, [3, 1, 1]), (6, [5, 1, 1]), (10**6, [10, 1, 1])):
        work = make_work(runs, spans, 8, 4, resident=at_once(resident))
        pieces = work.pieces
        lengths = pieces.end_tile - pieces.first_tile
        few = work.num_few
        assert (pieces.rows[:few] * 2 <= 16).all() and (pieces.rows[few:] * 2 > 16).all()
        for part in np.split(lengths, [few]):
            assert (np.diff(part) <= 0).all()
        tiles = [range(a, b) for a, b in zip(pieces.first_tile, pieces.end_tile)]
        assert sorted(tile for part in tiles for tile in part) == [*range(48)]
        for first, rows, count in zip((0, 1, 21), (1, 20, 3), counts):
            of_block = lengths[pieces.first_member == first]
            assert np.ptp(of_block) <= 1 and (pieces.rows[pieces.first_member == first] == rows).all()
            assert len(of_block) == count, (resident, first, of_block)
        assert work.many_lanes == 64
    # A row with parts is merged, one with nothing to read comes out empty, others are results.
    outputs = kernels.Outputs([work], [26], [], 8, 16, torch.float32, "cpu", True)
    assert outputs.merges[0].rows.tolist() == [0, 24, 25]
    assert outputs.merges[0].parts[1:].eq(-1).all() and outputs.merges[0].parts.shape[1] == 10
    assert sorted(outputs.merges[0].parts[0].tolist()) == [*range(10)] and len(outputs.partial_o) == 10
    assert not work.tables.tiles[-1].any()  # what the kernel loads ahead is there


def evenly(blocks, tiles, resident):
    """Pieces of so many blocks of so many tiles each."""
    return blocks * -(-tiles // work_module.choose_piece_tiles(np.full(blocks, tiles), resident))


def test_pieces_fill_waves():
    """On an H200, 3 programs on each of 132 multiprocessors, for 8 KV heads: 49 pieces at once.
    Few sequences make one wave of them, at most; more make some waves that are nearly full; many
    are not cut."""
    assert [evenly(1, tiles, 49) for tiles in (256, 2048)] == [43, 49]
    assert evenly(8, 256, 49) == 48 and evenly(16, 64, 49) == 48
    assert evenly(64, 64, 49) == 192 and evenly(64, 256, 49) == 192
    assert evenly(256, 64, 49) == 256
    assert evenly(64, 256, 1) == 64  # a CPU
    rng = np.random.default_rng(1)
    for _ in range(200):
        tiles = rng.integers(1, 300, size=rng.integers(1, 40))
        most = work_module.choose_piece_tiles(tiles, int(rng.integers(2, 200)))
        assert most >= min(tiles.max(), work_module.PIECE_COST)
        owner, offset, length = work_module.cut_evenly(tiles, -(-tiles // most))
        assert length.max() <= most and (np.bincount(owner, length) == tiles).all()
        for block in range(len(tiles)):
            assert np.ptp(length[owner == block]) <= 1


def test_masks_where_they_are_needed():
    """Tiles before `first_masked` are whole, and all rows of their piece see all of them."""
    rng = np.random.default_rng(6)
    plain = 0
    for _ in range(60):
        rows, spans, num_rows, _ = random_readers(rng)
        work = Work(rows, spans, 4, 2, resident=at_once(int(rng.choice([1, 50]))))
        pieces, tiles = work.pieces, work.tiles
        for first, count, begin, end, masked in zip(*pieces[:5]):
            assert begin <= masked <= end
            seen = work.members.position[first:first + count].min()
            whole = (tiles.length == 64) & (tiles.position + 63 <= seen)
            assert whole[begin:masked].all()
            assert masked == end or not whole[masked]
            plain += masked - begin
    assert plain > 100


# Six decodes behind a prefix of 320 tokens, three of them behind 128 more, each with tokens of its own;
# a chunk of a prompt behind the same prefix, and a run that sees only half of a span.
SHARED_RUNS = [*((i, 1, 600) for i in range(6)), (6, 90, 320), (96, 2, 30)]
SHARED_SPANS = [*((run, 64 * (4 - i), 64, 64 * i) for run in range(7) for i in range(5)),
                *((run, 400, 128, 320) for run in (1, 3, 4)),
                *((run, 600 + 16 * run, 1 + 3 * run, 500) for run in range(6)),
                (6, 700, 90, 320), (7, 256, 64, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, limit", [("float64", 1e-14), ("float32", 2e-6), ("float16", 2e-3),
                                          ("bfloat16", 2e-2)])
@pytest.mark.parametrize("programs", [1, 12])
def test_what_is_shared_is_read_once(backend, dtype, limit, programs, monkeypatch):
    """Each token of it is in one tile, of a group of all who read it; results are as if each read for
    itself, and as in float64."""
    if backend == "triton" and (dtype == "float64" or (dtype, programs) == ("float16", 1)):
        pytest.skip("the Triton kernels do not take float64; one 16-bit type is enough")
    monkeypatch.setattr(work_module, "PIECE_COST", 1)
    few_programs(monkeypatch)
    torch.manual_seed(0)
    dtype, device = getattr(torch, dtype), DEVICE[backend]
    q, k, v = (torch.randn(*shape).to(dtype) for shape in ((98, 4, 16), (800, 2, 16), (800, 2, 16)))
    found = {}
    for share in (True, False):
        work = make_work(SHARED_RUNS, SHARED_SPANS, 4, 2, dtype, at_once(programs), share)
        members, tiles = work.members, work.tiles
        groups = [members.row[members.group == g].tolist() for g in np.unique(members.group)]
        alone = [*([i] for i in range(6)), [*range(6, 96)], [96, 97]]
        # The chunk fills a block: it reads alone. So does who does not see all of a span.
        assert groups == alone + ([[*range(6)], [1, 3, 4]] if share else [])
        read = np.concatenate([ranges(tiles.first_row, tiles.length)])
        times = np.bincount(read, minlength=800)
        by_decodes = 1 if share else 6
        assert (times[:256] == by_decodes + 1).all() and (times[256:320] == by_decodes + 2).all()
        assert (times[400:528] == (1 if share else 3)).all()
        o, lse = partial_attention(3 * q.to(device), side_by_side(k, v).to(device), work, 0.3, backend)
        found[share] = o.cpu(), lse.cpu()
    expected = reference_attention(3 * q, k, v, SHARED_RUNS, SHARED_SPANS, 0.3)
    for once, alone, exact in zip(found[True], found[False], expected):
        assert error(once, exact) < limit and error(once, alone.double()) < limit


def test_sharing_has_a_price():
    """Two rows save one reading, and pay for two partials and a piece; a full block saves nothing."""
    saves = lambda *args: bool(work_module.saves_bytes(*args, max_rows=32, partial_tokens=8))
    assert [saves(2, 2, tokens) for tokens in (272, 273)] == [False, True]
    assert [saves(64, 64, tokens) for tokens in (12, 13)] == [False, True]  # 64 blocks or 2
    assert not saves(1, 1, 10**6) and not saves(2, 62, 752) and saves(3, 62, 753)
    # In 16 bits a partial row of Llama-3.1-8B weighs like 8 tokens: 2·(32·128·4) of 2·8·128·2 bytes.
    runs, spans = [(0, 1, 999), (1, 1, 999)], [(run, 0, 273, 0) for run in (0, 1)]
    for dtype, partials in ((torch.bfloat16, 4), (torch.float64, 4)):
        assert len(make_work(runs, spans, 32, 8, dtype).output_rows) == 2
    shorter = [(run, 0, 272, 0) for run in (0, 1)]
    assert len(make_work(runs, shorter, 32, 8, torch.bfloat16).pieces.rows) == 2
    assert len(make_work(runs, spans, 32, 8, torch.bfloat16).pieces.rows) == 1


def random_readers(rng):
    """Readers of random families of segments, with tokens of their own: QueryRows, KVSpans (in no
    order), rows of q, rows of the slab."""
    C, free = 16, iter(rng.permutation(900))
    families = [[int(next(free)) for _ in range(n)] for n in rng.integers(0, 40, size=3)]
    families[0] = [*range(900, 900 + len(families[0]))]  # side by side
    runs, spans, row = [], [], 0
    for reader in range(int(rng.integers(1, 9))):
        family = families[rng.integers(3)][:int(rng.integers(0, 80))]
        slots = family + [int(next(free)) for _ in range(rng.integers(0, 5))]
        rows, last = int(rng.choice([1, 1, 1, 5, 70])), int(next(free))
        runs.append((reader, row, rows, C * len(slots)))
        spans += [(reader, C * slot, C, C * i) for i, slot in enumerate(slots)]
        spans.append((reader, C * last, min(C, rows), C * len(slots)))
        if rng.random() < 0.1:
            spans = [span for span in spans if span[0] != reader]
        row += rows + int(rng.integers(0, 3))
    table = np.array(spans, np.int64).reshape(-1, 4)
    rows = QueryRows.of_runs(*np.array(runs).T)
    return rows, KVSpans(*rng.permutation(table).T), row, 960 * C


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_readers_of_any_spans(backend, monkeypatch):
    """Drawn at random: what is read together is as if each read for itself, row by row in float64."""
    monkeypatch.setattr(work_module, "PIECE_COST", 1)
    few_programs(monkeypatch)
    rng = np.random.default_rng(5)
    shared = 0
    for _ in range(20 if backend == "torch" else 2):
        rows, spans, num_rows, slab_rows = random_readers(rng)
        torch.manual_seed(int(rng.integers(1000)))
        q, k, v = (torch.randn(n, h, 16) for n, h in ((num_rows, 4), (slab_rows, 2), (slab_rows, 2)))
        work = Work(rows, spans, 4, 2, resident=at_once(int(rng.choice([1, 50]))))
        shared += work.members.group.max(initial=0) > rows.reader[-1]
        found = partial_attention(*(x.to(DEVICE[backend]) for x in (q, side_by_side(k, v))), work, 0.3, backend)
        found = in_work(rows.row, *found)
        runs = [(int(row), 1, int(position)) for row, position in zip(rows.row, rows.position)]
        by_row = [(i, *span[1:]) for i, reader in enumerate(rows.reader)
                  for span in zip(*(column.tolist() for column in spans)) if span[0] == reader]
        expected = reference_attention(q, k, v, runs, by_row, 0.3)
        empty = expected[1] == -math.inf
        assert torch.equal(found[1].cpu() == -math.inf, empty)
        assert torch.allclose(found[0].cpu().double(), expected[0], atol=1e-5)
        assert torch.allclose(found[1].cpu().double()[~empty], expected[1][~empty], atol=1e-5)
    assert shared


def test_adjacent_spans_are_views():
    """A stretch of the slab is not copied; what is scattered is gathered, no more at a time than a
    cache holds; only what hides something has a mask."""
    runs = [(i, 1, 99) for i in range(70)]
    apart = [(i, 2 * 48 * i + 32 * j, 16, 16 * j) for i in range(70) for j in range(3)]

    def batches_of(*work):
        work = make_work(*work, 4, 2)
        kernels.Outputs([work], [70], [], 4, 16, torch.float32, "cpu", False)
        return work.batches
    (batch,) = batches_of([(0, 1, 299)], [(0, 16 * j, 16, 16 * j) for j in range(20)])
    assert batch.kv_rows == slice(0, 320) and batch.hidden.sum() == 20
    batches = batches_of(runs, apart)
    assert sum(len(batch.query_rows) for batch in batches) == 2 * 70
    assert max(batch.kv_rows.numel() for batch in batches) <= 2 * work_module.MAX_BATCH_KEYS
    assert all(batch.hidden is None for batch in batches) and len(batches) == 5
    both = batches_of([(0, 1, 299), (1, 1, 299)], [(0, 0, 300, 0), (1, 300, 300, 0)])
    assert [batch.kv_rows for batch in both] == [slice(0, 300), slice(300, 600)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_request_does_not_see_anothers_nan(backend):
    """Blocks of a batch are padded with rows of their own: one's NaN stays with it."""
    device = DEVICE[backend]
    q, kv = torch.ones(2, 2, 16, device=device), torch.ones(200, 2, 1, 16, device=device)
    kv[0] = math.nan
    work = make_work([(0, 1, 99), (1, 1, 99)], [(0, 0, 100, 0), (1, 100, 80, 0)], 2, 1)
    o, lse = partial_attention(q, kv, work, 1.0, backend)
    assert o[0].isnan().all() and (o[1] == 1).all() and lse[1].isfinite().all()


@on_gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("H, Hkv, D", [(32, 8, 128), (32, 32, 128), (64, 8, 64)])
def test_kernels_on_a_gpu_at_real_shapes(H, Hkv, D, dtype):
    """Decodes and a chunk over scattered segments, in pieces, against float64."""
    torch.manual_seed(0)
    slots, C, S = np.random.default_rng(0).permutation(200), 512, 200
    q, k, v = (torch.randn(n, h, D, device="cuda", dtype=getattr(torch, dtype))
               for n, h in ((600, H), (S * C, Hkv), (S * C, Hkv)))
    runs = [(0, 1, 20_000), (1, 1, 700), (2, 512, 9500)]
    lengths = 20_001, 701, 10_012
    spans = [(run, int(slots[run * 50 + i]) * C, min(C, n - i * C), i * C)
             for run, n in enumerate(lengths) for i in range(-(-n // C))]
    work = make_work(runs, spans, H, Hkv, q.dtype, at_once(64))
    assert len(work.output_rows) > 514
    kv = side_by_side(k, v)
    found = in_work(slice(514), *partial_attention(2 * q, kv, work, D ** -0.5, "triton"))
    exact = in_work(slice(514), *partial_attention(2 * q.double(), kv.double(), work, D ** -0.5))
    assert error(found[0], exact[0]) < 1e-2 and error(found[1], exact[1]) < 1e-4


@on_gpu
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_oracle_on_a_gpu(tmp_path, ranks):
    """In float32, one rank, and several that share a GPU (gloo, through pinned memory)."""
    lines = [dict(timestamp=i, input_ids=tokens(200, 0) + tokens(50 + 7 * i, i), output_length=12)
             for i in range(12)]
    served = serve(tmp_path, lines, "--device", "cuda", "--verify", "--slots", 90,
                   "--segment-tokens", 16, ranks=ranks, dtype="float32")
    assert served.summary["verified"] == 12 and served.summary["hit_rate"] > 0.5


@on_gpu
def test_the_slab_takes_what_is_free_of_a_gpu(tmp_path):
    """Nine tenths of the least that a rank finds free, less what else is needed, divided among the
    ranks of a GPU."""
    folder = save_model(tmp_path / "m", dict(num_hidden_layers=8, head_dim=128))
    served = serve(tmp_path, [dict(timestamp=0, input_ids=[1, 2, 3], output_length=2)], "--model",
                   folder, "--device", "cuda", ranks=2, dtype="float32")
    config = load_config(folder)
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    free = torch.cuda.mem_get_info()[0]
    assert 0.8 < 2 * served.summary["config"]["slots"] * 512 * row / free < 0.95


@on_gpu
def test_exchanges_over_nccl():
    """One rank has no group of its own; with one it finds its rows again."""
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        cluster = Cluster().connect()
        group = dist.new_group([0], backend="nccl")
        made = pool.Pool(cluster, [group, group], LlamaConfig(), LakeConfig(8, 4), 1, torch.float32,
                         "cuda")
        rows = torch.randn(7, 3, device="cuda")
        assert not made.via_host
        assert torch.equal(made._exchange(rows, [7], [7], group)(), rows)
    finally:
        dist.destroy_process_group()


def test_grids_that_no_gpu_takes_are_refused():
    kernels.check_grid(2**31 - 1, 2**16 - 1)
    for grid in ((2**31,), (1, 2**16)):
        with pytest.raises(ValueError, match="programs, a GPU takes"):
            kernels.check_grid(*grid)


def test_error_does_not_grow_with_the_number_of_parts():
    """One pass in float32 over 64 parts is as exact as over 2; pairwise in 16 bits is not."""
    torch.manual_seed(0)
    q, k, v = torch.randn(8, 4, 32) * 4, torch.randn(1024, 4, 32), torch.randn(1024, 4, 32)
    expected, _ = reference_attention(q, k, v, [(0, 8, 1024)], [(0, 0, 1024, 0)], 0.2)
    errors = {}
    for parts in (2, 64):
        size = 1024 // parts
        pieces = [partial_attention(q, side_by_side(k, v), make_work(
            [(0, 8, 1024)], [(0, p * size, size, p * size)], 4, 4), 0.2) for p in range(parts)]
        o, lse = (torch.cat(x) for x in zip(*pieces))
        table = (torch.arange(parts)[None] * 8 + torch.arange(8)[:, None]).int()
        errors[parts] = error(merge(o, lse, table)[0], expected)
    assert errors[64] < 1e-6 and errors[64] < 3 * errors[2] + 1e-7
    coarse, coarse_lse = o[:8].bfloat16(), lse[:8]
    for p in range(1, 64):
        both = torch.cat((coarse.float(), o[p * 8:p * 8 + 8]))
        both_lse = torch.cat((coarse_lse, lse[p * 8:p * 8 + 8]))
        pair = torch.stack((torch.arange(8), torch.arange(8, 16)), 1).int()
        coarse, coarse_lse = merge(both, both_lse, pair)
        coarse = coarse.bfloat16()
    assert error(coarse, expected) > 100 * errors[64]


@pytest.mark.parametrize("dtype, limit", [("float64", 1e-14), ("float32", 2e-6), ("float16", 2e-3),
                                          ("bfloat16", 2e-2)])
def test_results_may_travel_in_the_models_type(dtype, limit):
    """Sixteen holders, peaky logits: what merge makes of rounded results is within the limits of the
    kernels, and hardly further off than if they came as they were computed."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    q, k, v = (x.to(dtype) for x in (torch.randn(40, 4, 32) * 12, torch.randn(1024, 4, 32),
                                     torch.randn(1024, 4, 32)))
    expected, _ = reference_attention(q, k, v, [(0, 40, 1024)], [(0, 0, 1024, 0)], 0.2)
    pieces = [partial_attention(q, side_by_side(k, v), make_work(
        [(0, 40, 1024)], [(0, p * 64, 64, p * 64)], 4, 4, dtype), 0.2) for p in range(16)]
    o, lse = (torch.cat(x) for x in zip(*pieces))
    table = (torch.arange(16)[None] * 40 + torch.arange(40)[:, None]).int()
    wide, travelled = (error(merge(parts, lse, table)[0].to(dtype), expected)
                       for parts in (o, o.to(dtype).to(o.dtype)))
    assert travelled < limit and travelled < 1.2 * wide + 1e-14


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)])
@pytest.mark.skipif(kernels.triton is None, reason="no Triton on this platform")
def test_the_kernel_rotates_as_rope_does(dtype, limit):
    """In place, a part of wider rows, whatever the sizes; what lies beside it stays."""
    device = DEVICE["triton"]
    torch.manual_seed(0)
    for T, heads, more, D in ((5, 6, 4, 16), (3, 1, 0, 24), (2, 40, 8, 128), (1, 3, 2, 10), (0, 2, 1, 8)):
        wide = torch.randn(T, heads + more, D)
        angle = 9 * torch.randn(T, D // 2)
        expected = wide.clone()
        model_module.rope(expected[:, :heads], angle.cos(), angle.sin())
        found = wide.clone().to(device, getattr(torch, dtype))
        angles = (x.to(device, found.dtype) for x in (angle.cos(), angle.sin()))
        kernels.rotate(found[:, :heads], *angles)
        assert torch.equal(found[:, heads:].cpu(), wide[:, heads:].to(found.dtype))
        if T:
            assert error(found.cpu(), expected) < limit
            assert error(found[:, :heads].cpu(), wide[:, :heads]) > 0.5


def test_the_oracle_shares_no_kernel(monkeypatch):
    """Also where kernels serve, it rotates with PyTorch."""
    model = small_model()
    expected = model.forward_alone(tokens(30, 1))
    monkeypatch.setattr(model, "rope", lambda x, cos, sin: x.mul_(-2))
    assert torch.equal(model.forward_alone(tokens(30, 1)), expected)
    wrong = model.forward(*[torch.arange(30)] * 2, model_module.causal_attend)
    assert not torch.allclose(wrong, model.forward_alone([*range(30)]))


COMPILE = """
import itertools, re, subprocess, tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels
def compile(arch, kernel, signature, constants, **options):
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature.get(name, "").startswith("*")}  # as the launcher finds tensors
    source = ASTSource(kernel, {**signature, **{n: "constexpr" for n in constants}}, constants,
                       aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(built.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True,
                              text=True).stdout
    assert built.metadata.shared <= {80: 166912, 90: 232448}[arch], built.metadata.shared
    registers, stack = (int(re.search(name + r":(\\d+)", text)[1]) for name in ("REG", "STACK"))
    return built, registers, stack
def widths(built):
    found = re.findall(r"tt.addptr [^\\n]*!tt.ptr<(?:bf16|f16|f32)>>, tensor<[^>]*xi(\\d+)",
                       built.asm["ttir"])
    assert len(found) >= 4
    return {*found}
shapes = [("bf16", 128, 32, 8, n) for n in (16, 32, 64, 128)]  # Llama-3.1-8B
shapes += [("fp16", 128, 32, 8, 16), ("fp16", 128, 32, 8, 128), ("bf16", 128, 32, 32, 16),
           ("bf16", 128, 32, 32, 128), ("bf16", 128, 64, 8, 16), ("bf16", 64, 32, 8, 128)]
OTHERS = {n: "*i64" for n in ("Members", "Pieces", "Tiles", "Numbers")} | {
    n: "*fp32" for n in ("LSE", "PartialO", "PartialLSE")} | dict(num_rows="i32", scale="fp32")
def check(case):
    arch, (dtype, D, H, Hkv, lanes) = case
    config = kernels.attention_config(lanes, H, Hkv, D, 2)
    options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
    names = {n: "*" + dtype for n in ("Q", "KV", "O")} | OTHERS
    config["Q_HEADS"] = H + 2 * Hkv
    built, registers, stack = compile(arch, kernels._partial_attention_kernel, names, config,
                                      **options)
    said = arch, dtype, D, H, Hkv, lanes, "registers", registers, "shared", built.metadata.shared
    assert stack == 0, said
    # K and V are copied 16 bytes at a time, two tiles of each or more are in flight, and the loop
    # does not wait for the tile that it has just asked for.
    assert re.search(r"cp\\.async\\.cg.*, 0x10|cp\\.async\\.cg\\.shared", built.asm["ptx"]), said
    assert re.search(rf"memdesc<[2-9]x64x{D}x", built.asm["ttgir"]), said
    # Offsets into rows of q, of slabs and of results are 64 bits wide. (Tables are short.)
    assert widths(built) == {"64"}, said
    waits = [int(n) for n in re.findall(r"async_wait .*num = (\\d+)", built.asm["ttgir"])]
    assert waits and waits[0] > 0, (said, waits)
    assert ("wgmma" in built.asm["ptx"]) == (arch == 90 and lanes >= 64), said
    return said
with ProcessPoolExecutor(2) as executor:
    for said in executor.map(check, itertools.product((80, 90), shapes)):
        print(*said)
for arch in (80, 90):
    for heads in (1, 8):
        names = dict(O="*fp32", LSE="*fp32", Rows="*i64", Parts="*i64", Out="*bf16", OutLSE="*fp32",
                     max_parts="i32")
        sizes = dict(H=32, D=128, HEADS=heads, PARTS=16 // heads, DPAD=128)
        built, registers, stack = compile(arch, kernels._merge_kernel, names, sizes)
        assert stack == 0 and widths(built) == {"64"}
    names = dict(X="*bf16", Cos="*bf16", Sin="*bf16")
    sizes = dict(ROW=48 * 128, HEADS=40, HALF=64, HEADSPAD=64, HALFPAD=64)
    built, registers, stack = compile(arch, kernels._rotate_kernel, names, sizes)
    assert stack == 0 and widths(built) == {"64"}
    names = {n: "*fp32" for n in ("Q", "KV", "O")} | OTHERS  # spills, but fits
    config = kernels.attention_config(32, 32, 8, 128, 4) | dict(Q_HEADS=32)
    options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
    compile(arch, kernels._partial_attention_kernel, names, config, **options)
"""


@pytest.mark.skipif(kernels.triton is None, reason="no Triton on this platform")
def test_kernels_compile_ahead_of_time(tmp_path):
    """Every shipped 16-bit configuration, without a GPU: for sm_80 and sm_90, within their shared
    memory and without a register on the stack; K and V are loaded a tile or more ahead; prefill
    takes wgmma on sm_90."""
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True,
                          env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 20


# ── model ─────────────────────────────────────────────────────────────────────────────────────

HF = dict(vocab_size=160, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
          num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
          rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
VARIANTS = {
    "gqa": {}, "mha": dict(num_key_value_heads=4), "tied": dict(tie_word_embeddings=True),
    "llama3": dict(rope_scaling=LLAMA3), "head_dim": dict(head_dim=20), "sharded": {},
    "old spelling": dict(rope_scaling=LLAMA3), "bf16 weights": {},
}


def write_checkpoint(folder, name, transformers):
    """A tiny random checkpoint as transformers saves it; returns its model in float64."""
    torch.manual_seed(3)
    extra = VARIANTS[name]
    config = transformers.LlamaConfig(**HF | extra)
    model = transformers.LlamaForCausalLM(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # wider than the default initialisation: peakier attention
            torch.nn.init.normal_(parameter, std=0.25)
    if name == "bf16 weights":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="30KB" if name == "sharded" else "1GB")
    if name == "old spelling":
        raw = json.loads((folder / "config.json").read_text())
        for key in ("rope_parameters", "head_dim", "dtype"):
            raw.pop(key, None)
        raw |= dict(rope_theta=10000.0, rope_scaling=LLAMA3, torch_dtype="float32")
        (folder / "config.json").write_text(json.dumps(raw))
    assert (folder / "model.safetensors.index.json").exists() == (name == "sharded")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_equal_transformers(tmp_path, name):
    """A Hugging Face checkpoint served on two ranks gives the tokens of transformers' generate."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    model = write_checkpoint(folder, name, transformers)
    rng = np.random.default_rng(5)
    shared = rng.integers(160, size=40).tolist()
    lines = [dict(input_ids=shared + rng.integers(160, size=n).tolist(), output_length=12)
             for n in (1, 20, 37)]
    run = serve(tmp_path, lines, "--model", folder, "--segment-tokens", 8, "--verify", ranks=2)
    for index, line in enumerate(lines):
        prompt = torch.tensor([line["input_ids"]])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                             max_new_tokens=12, min_new_tokens=12, eos_token_id=None,
                             pad_token_id=0)
        assert run.tokens[index] == out[0, prompt.shape[1]:].tolist(), name
    assert run.summary["verified"] == 3 and run.summary["hit_rate"] > 0


def save_model(folder, config=None, drop=(), change=None):
    """A folder with our own weights, some tensors dropped or changed."""
    from safetensors.torch import save_file
    folder.mkdir(exist_ok=True)
    raw = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48,
               num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=512, eos_token_id=[7, 9]) | (config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "drop"}))
    with contextlib.suppress(ValueError):
        config = load_config(folder)
        weights = random_weights(config, 0, torch.float32, "cpu").by_name(config)
        weights = {k: v.clone() for k, v in weights.items() if k not in drop} | (change or {})
        save_file(weights, folder / "model.safetensors")
    return folder


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def stored(folder):
    """The tensors of a folder's model.safetensors, which may be written anew."""
    from safetensors.torch import load_file
    return {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}


def shard(folder, files, weight_map):
    """In place of model.safetensors, files of tensors, and an index."""
    from safetensors.torch import save_file
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / model_module.INDEX).write_text(json.dumps(dict(weight_map=weight_map)))


def loaded(folder) -> dict:
    """What is served of a folder, by name; its head is there also if it is the embedding."""
    config = model_module.with_own_head(folder, load_config(folder))
    weights = load_weights(folder, config, torch.float32, "cpu")
    return weights.by_name(config) | {HEAD: weights.head}


def stale(tensors):
    return {name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}


@pytest.mark.parametrize("right, other", ["ab", "ba"])
def test_the_index_decides_where_a_tensor_is(tmp_path, right, other):
    """Whichever file sorts last; copies from before, and what the index does not name, are not even
    read: they are not finite, and no tensors of a Llama."""
    folder = save_model(tmp_path / "m")
    tensors = stored(folder)
    old = stale(tensors) | {"score.weight": torch.ones(2)}
    files = {f"{right}.safetensors": {K_PROJ: tensors[K_PROJ], HEAD: old[HEAD]},
             f"{other}.safetensors": old | {k: v for k, v in tensors.items() if k != K_PROJ}}
    shard(folder, files, dict.fromkeys(tensors, f"{other}.safetensors")
          | {K_PROJ: f"{right}.safetensors"})
    found = loaded(folder)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_one_file_goes_before_an_index(tmp_path):
    folder = save_model(tmp_path / "m")
    tensors = stored(folder)
    shard(folder, {"a.safetensors": stale(tensors)}, dict.fromkeys(tensors, "a.safetensors"))
    save_model(tmp_path / "m")
    assert torch.equal(loaded(folder)[K_PROJ], tensors[K_PROJ])


@pytest.mark.parametrize("case, said", [
    ("lacking", f"index.json: {K_PROJ} is not in b.safetensors, where it is expected"),
    ("unnamed", f"/m: {K_PROJ} is missing (1 tensors are)"),
    ("unknown", "a.safetensors: score.weight is not a tensor of a Llama"),
    ("damaged", "b.safetensors: damaged or not a safetensors file"),
    ("empty name", ": no such file"), ("number", "names the file 3, which is outside the folder")])
def test_an_index_is_held_to_its_word(tmp_path, case, said):
    """A file that holds what another is to hold does not help."""
    folder = save_model(tmp_path / "m")
    tensors = stored(folder)
    a = tensors | {"score.weight": torch.ones(2)}
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {K_PROJ: "b.safetensors"}
    if case == "unnamed":
        del weight_map[K_PROJ]
    b = {HEAD: tensors[HEAD]} if case == "lacking" else {K_PROJ: tensors[K_PROJ]}
    weight_map |= {"unknown": {"score.weight": "a.safetensors"}, "empty name": {K_PROJ: ""},
                   "number": dict.fromkeys(weight_map, 3)}.get(case, {})
    shard(folder, {"a.safetensors": a, "b.safetensors": b}, weight_map)
    if case == "damaged":
        file = folder / "b.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    assert said in refused(tmp_path, "--model", folder, "--num-requests", 1)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_the_hubs_cache(tmp_path, sharded):
    """Its files are links into another folder. The cache's own folder is refused, and where the
    model is is said."""
    cache = tmp_path / "models--org--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "3f9e"
    plain = save_model(tmp_path / "m", dict(tie_word_embeddings=True))
    tensors = stored(plain)
    if sharded:
        shard(plain, {"a.safetensors": tensors}, dict.fromkeys(tensors, "a.safetensors"))
    (plain / "generation_config.json").write_text(json.dumps(dict(eos_token_id=11)))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert load_config(snapshot).eos_token_ids == (7, 9, 11)
    assert torch.equal(loaded(snapshot)[K_PROJ], tensors[K_PROJ])
    served = serve(tmp_path, [dict(input_ids=[1, 2, 3], output_length=2)], "--model", snapshot)
    assert len(served.tokens[0]) == 2
    text = refused(tmp_path, "--model", cache)
    assert f"{cache}: a folder of the hub's cache; a folder under its snapshots is exp" in text
    (snapshot / "generation_config.json").resolve().unlink()
    with pytest.raises(ValueError, match="3f9e/generation_config.json: No such file"):
        load_config(snapshot)


@pytest.mark.parametrize("name, said", [
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B: no such folder, and nothing is downloaded"
     ": `hf download meta-llama/Llama-3.1-8B --local-dir DIR`, then --model DIR"),
    ("nowhere", "nowhere/config.json: No such file or directory (no such folder)"),
    ("../a/b", "../a/b/config.json: No such file or directory (no such folder)"),
    ("here/empty", "here/empty/config.json: No such file or directory (a Hugging Face model folder "
     "has this file)")])
def test_a_name_of_the_hub_is_no_folder(tmp_path, monkeypatch, name, said):
    (tmp_path / "here" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path, "--model", name) == f"run_cluster.py: {said}\n"


@pytest.mark.parametrize("files, said", [
    (["pytorch_model.bin", "original/consolidated.00.pth"],
     "(there is pytorch_model.bin; safetensors are expected)"),
    (["consolidated.00.pth"], "(there is consolidated.00.pth; safetensors are expected)"),
    (["model-00001-of-00002.safetensors"],
     "(there is model-00001-of-00002.safetensors, but no model.safetensors.index.json)"),
    (["original/consolidated.00.pth", "tokenizer.json"], "no such file")])
def test_weights_of_another_format_are_named(tmp_path, files, said):
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "original").mkdir()
    for name in files:
        (folder / name).write_bytes(b"")
    text = refused(tmp_path, "--model", folder)
    assert "model.safetensors: no such file" in text and text.endswith(said + "\n")


def test_a_pointer_of_git_lfs_is_no_file(tmp_path):
    folder = save_model(tmp_path / "m")
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    (folder / "model.safetensors").write_text(text)
    said = "model.safetensors: a pointer of Git LFS, not the file itself; `git lfs pull` gets that"
    assert said in refused(tmp_path, "--model", folder)


def test_what_lies_beside_a_checkpoint_is_not_read(tmp_path):
    """Other formats, Meta's own folder, and keys of config.json that change nothing."""
    folder = save_model(tmp_path / "m", dict(
        pretraining_tp=1, transformers_version="4.43.0", _name_or_path="x", bos_token_id=1,
        rope_scaling=LLAMA3 | {"type": "linear"}, architectures=["LlamaForCausalLM"]))
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors",
                 "original/params.json", "pytorch_model.bin.index.json", "tokenizer.json"):
        (folder / name).write_bytes(b"{")
    assert load_config(folder).rope_scaling == (8, 1, 4, 32)
    assert torch.equal(loaded(folder)[K_PROJ], stored(folder)[K_PROJ])


def saved_as(folder, way, tensors):
    """Rewrites the tensors of a tied or untied model, as programs save them."""
    from safetensors.torch import save_file
    torch.manual_seed(9)
    embedding = tensors[EMBEDDING]
    base = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    other = {HEAD: torch.randn_like(embedding)}
    found = {"other head": tensors | other, "same head": tensors | {HEAD: embedding.clone()},
             "no head": {k: v for k, v in tensors.items() if k != HEAD},
             "only the head": {k: v for k, v in tensors.items() if k != EMBEDDING} | other,
             "rounded head": tensors | {HEAD: embedding.bfloat16()},
             "base": {k: v for k, v in base.items() if k != HEAD}, "base and head": base | other}
    save_file(found[way], folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("way, tied, own", [
    ("other head", True, True), ("same head", True, False), ("no head", True, False),
    ("only the head", True, False), ("rounded head", True, True), ("base", True, False),
    ("base and head", True, True), ("base and head", False, True), ("other head", False, True)])
def test_heads_are_those_of_transformers(tmp_path, way, tied, own):
    """A stored head that is not the embedding counts, whatever config.json says. A model may be
    saved without its head, and then has shorter names."""
    transformers = pytest.importorskip("transformers")
    folder = save_model(tmp_path / "m", dict(tie_word_embeddings=tied, rms_norm_eps=1e-5))
    saved_as(folder, way, stored(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model_module.with_own_head(folder, load_config(folder))
    assert config.tie_word_embeddings == (not own)
    weights = load_weights(folder, config, torch.float32, "cpu")
    assert (weights.head is weights.embedding) == (not own)
    assert torch.equal(weights.head, theirs.lm_head.weight)
    assert torch.equal(weights.embedding, theirs.model.embed_tokens.weight)
    ids = list(range(40))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    found = Llama(config, weights).forward_alone(ids)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_head_of_its_own_is_warned_of_once(tmp_path):
    """By rank 0, and served; memory is asked for it before it is made. With random weights it is
    not looked for, and who loads by the tied config is told."""
    folder = save_model(tmp_path / "m", dict(tie_word_embeddings=True))
    tensors = stored(folder)
    saved_as(folder, "other head", tensors)
    lines = [dict(input_ids=list(range(20)), output_length=6)]
    said = (f"run_cluster.py: --model {folder}: lm_head.weight differs from the embedding, and is "
            "used (config.json says tie_word_embeddings true)\n")
    served = serve(tmp_path, lines, "--model", folder, "--verify", ranks=2)
    assert served.text.count(said) == served.text.count("lm_head") == 1
    alike = save_model(tmp_path / "untied", dict(tie_word_embeddings=False))
    saved_as(alike, "other head", tensors)
    assert served.tokens == serve(tmp_path, lines, "--model", alike).tokens
    random = serve(tmp_path, lines, "--model", folder, "--random-weights")
    assert "lm_head" not in random.text
    tied = load_config(folder)
    with pytest.raises(ValueError, match="/m: lm_head.weight is not the embedding; the config of"):
        load_weights(folder, tied, torch.float32, "cpu")
    options = run_cluster.parse_options(["--model", str(folder)])
    one = SimpleNamespace(size=1, rank=1, ranks_per_device=lambda device: 1)
    with pytest.raises(ValueError, match=f"ranks need {4 * tied.num_parameters + 64 * 32 * 4:,} b"):
        run_cluster.prepare(options, one, torch.device("cpu"), 4 * tied.num_parameters)


@pytest.mark.parametrize("way, tied, said", [
    ("base", False, "lm_head.weight is missing, and config.json does not say tie_word_embeddings"),
    ("misshapen", True, "lm_head.weight has the shape (63, 32), config.json makes it (64, 32)"),
    ("neither", True, "model.embed_tokens.weight is missing (1 tensors are)")])
def test_a_head_that_cannot_be_is_refused(tmp_path, way, tied, said):
    folder = save_model(tmp_path / "m", dict(tie_word_embeddings=tied))
    if way == "base":
        saved_as(folder, way, stored(folder))
    else:
        save_model(folder, dict(tie_word_embeddings=tied), [EMBEDDING] * (way == "neither"),
                   {HEAD: torch.ones(63, 32)} if way == "misshapen" else {})
    config = model_module.with_own_head(folder, load_config(folder))
    with pytest.raises(ValueError) as caught:
        load_weights(folder, config, torch.float32, "cpu")
    assert said in str(caught.value)


@pytest.mark.parametrize("of_config, of_generation, expected", [
    (7, "absent", (7,)), (7, {}, (7,)), (7, dict(eos_token_id=None), (7,)),
    (7, dict(eos_token_id=9), (7, 9)), (7, dict(eos_token_id=[9, 7, 3, 9]), (7, 9, 3)),
    ([9, 3], dict(eos_token_id=[3, 0]), (9, 3, 0)), (None, dict(eos_token_id=[5]), (5,)),
    ("drop", dict(eos_token_id=5, rope_scaling="x"), (5,)), ("drop", {}, ())])
def test_end_tokens_come_from_both_files(tmp_path, of_config, of_generation, expected):
    folder = save_model(tmp_path / "m", dict(eos_token_id=of_config))
    if of_generation != "absent":
        (folder / "generation_config.json").write_text(json.dumps(of_generation))
    assert load_config(folder).eos_token_ids == expected


@pytest.mark.parametrize("text, said", [
    ('{"eos_token_id": [1, -1]}', "eos_token_id is [1, -1]; null, token ids or one are expected"),
    ('{"eos_token_id": true}', "eos_token_id is [True]"), ("[]", "a JSON object is expected"),
    ('{"eos_token_id": "</s>"}', "eos_token_id is ['</s>']"), ("{", "not readable as JSON")])
def test_a_broken_generation_config_is_refused(tmp_path, text, said):
    folder = save_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(text)
    assert f"/m/generation_config.json: {said}" in refused(tmp_path, "--model", folder)


def test_an_end_token_of_generation_config_ends_a_request(tmp_path):
    """Of the tokens that are served anyway, one that only the second file names."""
    folder = save_model(tmp_path / "m", dict(eos_token_id=None, max_position_embeddings=512))
    lines = [dict(input_ids=list(range(20)), output_length=12)]
    text = refused(tmp_path, "--model", folder, "--stop-at-eos", "--num-requests", 1)
    assert "config.json and generation_config.json have no eos_token_id" in text
    (served,) = serve(tmp_path, lines, "--model", folder).tokens.values()
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=served[5])))
    (ended,) = serve(tmp_path, lines, "--model", folder, "--stop-at-eos").tokens.values()
    assert ended == served[:served.index(served[5]) + 1]


NULLS = [
    "model_type", "hidden_act", "attention_bias", "mlp_bias", "quantization_config", "head_dim",
    "sliding_window", "partial_rotary_factor", "num_key_value_heads", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "eos_token_id", "dtype", "torch_dtype",
    "rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads"]
ROPE_NULLS = ["rope_theta", "rope_type", "type", "partial_rotary_factor", "factor"]


@pytest.mark.parametrize("inside, key", [("", key) for key in NULLS] + [
    (name, key) for name in ("rope_parameters", "rope_scaling") for key in ROPE_NULLS])
def test_null_is_what_transformers_takes_it_for(tmp_path, inside, key):
    """For each key that is read: the same logits as without it, or a refusal that names it where
    transformers has no model to offer."""
    transformers = pytest.importorskip("transformers")
    usual = dict(num_key_value_heads=4, rms_norm_eps=1e-6, max_position_embeddings=2048)
    folder = save_model(tmp_path / "m", usual)
    raw = json.loads((folder / "config.json").read_text())
    # What is taken instead has to show, where it is not what the key says.
    raw |= {inside: {key: None}, "rope_theta": 5e5} if inside else {key: None}
    (folder / "config.json").write_text(json.dumps(raw))
    ids = list(range(40))
    try:
        load = transformers.AutoModelForCausalLM.from_pretrained
        with torch.no_grad():
            expected = load(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    except Exception:  # whatever comes of a null where none is foreseen
        with pytest.raises(ValueError, match=f"{key} (is )?None"):
            load_config(folder)
        return
    config = load_config(folder)
    weights = load_weights(folder, config, torch.float32, "cpu")
    assert torch.allclose(Llama(config, weights).forward_alone(ids), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key", LLAMA3)
def test_null_among_the_numbers_of_llama3_is_refused(tmp_path, key):
    rope = LLAMA3 | {key: None}
    with pytest.raises(ValueError, match=f"/config.json: {key} (is )?None"):
        load_config(save_model(tmp_path / "m", dict(rope_scaling=rope)))


@pytest.mark.parametrize("raw", [
    dict(rope_scaling=LLAMA3, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    dict(rope_scaling=dict(type="default"), rope_parameters=LLAMA3 | dict(rope_theta=5e5)),
    dict(rope_scaling={}, rope_parameters=LLAMA3 | dict(rope_theta=5e5)),
    dict(rope_scaling=LLAMA3 | dict(type="linear")),
    dict(rope_scaling={("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}),
    dict(rope_theta=None, rope_parameters=dict(rope_type="default", rope_theta=5e5))])
def test_rope_is_read_as_transformers_reads_it(tmp_path, raw):
    """Where it is said twice, and in each spelling."""
    transformers = pytest.importorskip("transformers")
    folder = save_model(tmp_path / "m", dict(rope_theta=2e4) | raw)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model_module.rope_frequency(load_config(folder))
    assert torch.allclose(found, theirs.model.rotary_emb.inv_freq, rtol=1e-5)


@pytest.mark.parametrize("value", [
    dict(quant_method="gptq", bits=4, modules=["model.layers.0.mlp"] * 500),
    dict(bits=4, modules=["model.layers.0.mlp"] * 500, quant_method="gptq")])
def test_quantisation_is_refused_by_its_method(tmp_path, value):
    """In a line of some length, wherever the method stands."""
    folder = save_model(tmp_path / "m", dict(quantization_config=value))
    text = refused(tmp_path, "--model", folder)
    assert "quantization_config {'quant_method': 'gptq', 'bits': 4, 'modules'" in text
    assert len(text.replace(str(tmp_path), "")) < 200


@pytest.mark.parametrize("change, said", [
    (dict(model_type="mistral"), "model_type 'mistral'"),
    (dict(attention_bias=True), "attention_bias True"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rope_type 'yarn'"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4)), "factor is None"),
    (dict(quantization_config=dict(bits=4)), "quantization_config"),
    (dict(hidden_size="drop"), "hidden_size is None"),
    (dict(hidden_size="32"), "hidden_size is '32'"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
    (dict(num_key_value_heads=3), "not a multiple"),
    (dict(head_dim=7), "head_dim 7"),
    (dict(sliding_window=16), "sliding_window 16"), (dict(eos_token_id=-5), "eos_token_id"),
    (dict(rms_norm_eps=math.inf), "rms_norm_eps"), (dict(eos_token_id="</s>"), "eos_token_id"),
    (dict(hidden_size=10**400), "…; a positive integer below 2**48 expected"),
    (dict(hidden_size=2**48), "hidden_size is 281474976710656; a positive integer below 2**48"),
    (dict(rope_theta=10**400), "…; a positive number below 1e38 expected"),
    (dict(num_hidden_layers=10**6), "num_hidden_layers is 1000000; at most 10000 layers"),
    (dict(hidden_act="x" * 5000), "xxx… is not supported (only 'silu' is)"),
    (dict(quantization_config=["a\n"] * 5000), "… is not supported (only None is)"),
    (dict(rope_scaling="x" * 5000), "xxx…; an object is expected"),
    (dict(rope_scaling=LLAMA3, original_max_position_embeddings=64),
     "original_max_position_embeddings is 64, 32 in the rope parameters; one is expected"),
    (dict(eos_token_id=[10**400, -1]), "…; null, token ids or one are expected")])
def test_config_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(ValueError) as caught:
        load_config(save_model(tmp_path / "m", change))
    text = str(caught.value).removeprefix(f"{tmp_path}/m/config.json: ")
    assert said in text and "\n" not in text and len(text) < 200


@pytest.mark.parametrize("depth", [100_000, *range(940, 1000)])
def test_nested_values_are_refused(tmp_path, depth):
    """Whether reading a value or showing it is too deep."""
    for open, close in (("[", "]"), ('{"a":', "}")):
        value = open * depth + "1" + close * depth
        (tmp_path / "config.json").write_text('{"model_type": %s}' % value)
        with pytest.raises(ValueError, match="model_type|not readable as JSON: max"):
            load_config(tmp_path)
        with pytest.raises(ValueError, match="salt is|not JSON \\(max"):
            traces.read_trace(['{"input_ids": [1], "timestamp": 0, "output_length": 1, '
                                 '"salt": %s}' % value], "t")


@pytest.mark.parametrize("value, stored, dtype, fits", [
    (math.nan, "float32", "float32", False), (-math.inf, "bfloat16", "float32", False),
    (1e5, "float32", "float16", False), (1e5, "bfloat16", "float16", False),
    (1e5, "float32", "bfloat16", True), (6e4, "float32", "float16", True)])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, stored, dtype, fits):
    """In the type that they are used in: float16 ends at 65504."""
    norm = torch.ones(32, dtype=getattr(torch, stored))
    norm[17] = value
    folder = save_model(tmp_path / "m", change={"model.norm.weight": norm})

    def load():
        return load_weights(folder, load_config(folder), getattr(torch, dtype), "cpu")
    if fits:
        assert load().norm[17] > 5e4
        return
    with pytest.raises(ValueError) as caught:
        load()
    assert str(caught.value) == (f"{folder}/model.safetensors: model.norm.weight has values that "
                                 f"are not finite in {dtype}")


def test_weights_have_to_fit(tmp_path):
    """Before they are made: on a device together with those of other ranks, and with the slots."""
    config = load_config(save_model(tmp_path / "m", dict(intermediate_size=9999)))
    weights = random_weights(config, 0, torch.float32, "cpu")
    size = 4 * sum(weight.numel() for weight in weights.by_name(config).values())
    assert size == 4 * config.num_parameters

    def prepare(memory, *arguments):
        options = run_cluster.parse_options(
            ["--model", str(tmp_path / "m"), "--random-weights", *arguments])
        two = SimpleNamespace(size=2, rank=1, ranks_per_device=lambda device: 2)
        return run_cluster.prepare(options, two, torch.device("cpu"), memory)[2]
    with pytest.raises(ValueError, match=f"/m: the weights of 2 ranks need {2 * size:,} bytes on "
                                         f"cpu, {2 * size - 1:,} are there"):
        prepare(2 * size - 1)
    nothing = "a rank needs .* bytes on cpu, of its .* there are 0 beside .* of weights and .* for"
    with pytest.raises(ValueError, match=nothing):
        prepare(2 * size)
    C, row = 16, 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    usual = LakeConfig(C, chunk_tokens=64, max_batch=32)
    demo = traces.read_trace(traces.demo_trace(48, config.vocab_size, 0), "demo")
    total = sum(line.total for line in demo)  # so many can be pulled
    usual = replace(usual, pull_tokens=min(usual.pull_tokens, total))
    needed = size + pool.iteration_bytes(config, usual, 2, torch.float32)
    room = 50 * C * row + usual.staging(2) * row
    slots = prepare(2 * (needed + room)).slots
    assert slots == (room * 9 // 10 - usual.staging(2) * row) // (C * row) > 30
    assert prepare(2 * (needed + room), "--slots", "50").slots == 50  # who asks for it gets all
    with pytest.raises(ValueError, match=f"there are {room:,} beside {size:,} of weights"):
        prepare(2 * (needed + room), "--slots", "51")
    # What is allowed, but not in the trace, takes no room.
    assert prepare(10**10, "--max-batch", str(10**6), "--slots", "50").slots == 50


def test_what_an_iteration_takes_is_foreseen(monkeypatch):
    """Bytes of tensors that live at once while a layer's rows are computed and exchanged, beside
    weights and slab, are no more than is set apart, and not a small part of it."""
    config = LlamaConfig(vocab_size=2000, num_layers=2)
    for lake_config, ranks in ((LakeConfig(16, 64, chunk_tokens=64, max_batch=8), 1),
                               (LakeConfig(16, 64, chunk_tokens=256, max_batch=64), 1)):
        model = Llama(config, random_weights(config, 0, torch.float32, "cpu"))
        lake = TokenLake([0], config, lake_config, Cluster(), torch.float32, "cpu")
        engine = run_cluster.Engine(Cluster(), lake, Scheduler(lake), model, Sampler(1.0))
        for id in range(lake_config.max_batch):
            engine.scheduler.add(Request(id, tokens(9, id), 12))
        live = LiveBytes()
        with live:
            while engine.scheduler.waiting or engine.scheduler.running:
                engine.step()
        foreseen = pool.iteration_bytes(config, lake_config, ranks, torch.float32)
        assert 0.1 * foreseen < live.most < foreseen


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of tensors' storages that live at once, of those made while it is on."""
    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(x) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                self.seen[storage] = None
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return made

    def _gone(self, count):
        self.now -= count


def test_rope_parameters_are_no_other_keys(tmp_path):
    """What stands in RoPE's object counts for RoPE alone; llama3's numbers are looked for there."""
    rope = dict(rope_type="default", rope_theta=5e5, head_dim=64, vocab_size=99, hidden_size=None)
    config = load_config(save_model(tmp_path / "m", dict(rope_parameters=rope)))
    assert (config.rope_theta, config.head_dim, config.vocab_size) == (5e5, 8, 64)
    outside = dict(LLAMA3, original_max_position_embeddings=None)
    with pytest.raises(ValueError, match="original_max_position_embeddings is None"):
        load_config(save_model(tmp_path / "n", dict(
            rope_scaling=outside, original_max_position_embeddings=32)))


def test_config_defaults(tmp_path):
    config = load_config(save_model(tmp_path / "m", dict(num_key_value_heads="drop",
                                                         head_dim=None, eos_token_id=5)))
    assert config.num_kv_heads == 4 and config.head_dim == 8 and config.eos_token_ids == (5,)
    assert load_config(save_model(tmp_path / "m", dict(eos_token_id=None))).eos_token_ids == ()


@pytest.mark.parametrize("case, said", [
    ("missing", "model.layers.0.mlp.up_proj.weight is missing"),
    ("long name", r": \nxx"), ("misshapen", "model.norm.weight has the shape (31,)"),
    ("unknown", "model.layers.0.self_attn.q_proj.bias is not a tensor"),
    ("truncated", "damaged"), ("empty", "damaged"), ("outside", "outside the folder"),
    ("no file", "model.safetensors: no such file"), ("bad index", "not a safetensors index"),
    ("no config", "config.json: No such file"), ("bad config", "not readable as JSON"),
    ("[" * 100_000, "index.json: not readable as JSON: maximum recursion depth"),
    ("9" * 5000, "index.json: not readable as JSON: Exceeds the limit (4300 digits)"),
    ({"weight_map": 3}, "not a safetensors index; a weight_map of tensors to files is expected"),
    ({"weight_map": dict(a="x" * 300)}, "/" + "x" * 79 + "…: no such file"),
    ({"weight_map": dict(a="x\0\ny")}, r"/x\x00\ny: no such file"),
    ({"weight_map": dict(a="\ud800")}, r"/\ud800: no such file"),
    ({"weight_map": dict(a="/" + "x" * 300)}, "xxx…, which is outside the folder")])
def test_damaged_model_folder_is_one_line(tmp_path, case, said):
    """Through the program: one line, status 2."""
    folder = tmp_path / "model"
    save_model(folder, drop=["model.layers.0.mlp.up_proj.weight"] * (case == "missing"),
               change={"misshapen": {"model.norm.weight": torch.ones(31)},
                       "long name": {"\n" + "x" * 5000: torch.ones(1)},
                       "unknown": {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}}
               .get(str(case)))
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not isinstance(case, str) or case[:1] in "[9" or case in ("outside", "bad index"):
        file.unlink()
        index.write_text(case if isinstance(case, str) else json.dumps(case))
    if case == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif case == "empty":
        file.write_bytes(b"")
    elif case == "outside":
        index.write_text(json.dumps(dict(weight_map={"lm_head.weight": "../x.safetensors"})))
    elif case == "bad index":
        index.write_text("[]")
    elif case == "no file":
        file.unlink()
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case == "bad config":
        (folder / "config.json").write_text("{")
    text = refused(tmp_path, "--model", folder, "--num-requests", 1)
    assert said in text and len(text) < 200 + len(str(index))


def test_temperature_samples_the_softmax():
    """Gumbel noise picks a token as often as its probability; the draw depends on its key only."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]], dtype=torch.float64)
    sampler = Sampler(0.7, seed=4)
    keys = [(1, p) for p in range(20_000)]
    drawn, logprobs = map(torch.Tensor.tolist, sampler.sample(logits.expand(20_000, 4), keys))
    expected = (logits[0] / 0.7).softmax(-1)
    assert all(abs(drawn.count(t) / 20_000 - expected[t]) < 0.012 for t in range(4))
    assert logprobs == [float(logits.log_softmax(-1)[0, t]) for t in drawn]
    for position in (0, 17, 19_999):
        assert sampler.sample(logits, [(1, position)])[0].tolist() == [drawn[position]]
    others = [Sampler(0.7, seed).sample(logits.expand(100, 4), [(id, p) for p in range(100)])[0]
              for seed, id in ((4, 2), (5, 1), (2**63 - 1, 1))]
    assert len({tuple(drawn[:100]), *(tuple(other.tolist()) for other in others)}) == 4


def test_random_numbers_are_those_of_splitmix64():
    """Beside the published algorithm in Python's integers; by counter, in any part."""
    def published(state, number):
        state = (state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31
    assert published(1234567, 0) == 6457827717110365317  # of the reference implementation
    keys = [0, 3, 1234567, -(2**63), 2**63 - 1, -1]
    drawn = model_module.draw(torch.tensor(keys), 50)
    assert drawn.tolist() == [[published(key % 2**64, i) >> 12 for i in range(50)] for key in keys]
    part = model_module.draw(torch.tensor(keys), 7, first=20)
    assert torch.equal(part, drawn[:, 20:27])
    names = torch.tensor([(0, 0), (0, 1), (1, 0), (1, 1), (2**63 - 1, 5)])
    streams = model_module.streams(names)
    assert len(set(streams.tolist())) == 5
    assert torch.equal(model_module.streams(names[3:4]), streams[3:4])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_random_weights_are_the_same_everywhere(device, monkeypatch):
    """Uniform, of the deviation that is asked for; drawn in parts or at once, on any device; another
    type rounds the same numbers."""
    config = LlamaConfig()

    def drawn(seed, dtype, device="cpu"):
        return random_weights(config, seed, dtype, device).by_name(config)
    weights = drawn(7, torch.float32, device)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for name, weight in drawn(7, dtype).items():
            assert torch.equal(weight, weights[name].cpu().to(dtype)), name
    monkeypatch.setattr(model_module, "DRAWN_AT_ONCE", 1000)
    again = drawn(7, torch.float32)
    assert all(torch.equal(weights[name].cpu(), again[name]) for name in weights)
    other = drawn(8, torch.float32)
    down = weights["model.layers.1.mlp.down_proj.weight"].cpu()
    assert abs(down.std() / (0.5 / 16) - 1) < 0.02 and abs(down.mean()) < 0.001
    assert down.abs().max() <= 3**0.5 * 0.5 / 16 and (down == down.round(decimals=3)).sum() < 50
    for name, weight in weights.items():
        if weight.dim() > 1:
            assert abs(np.corrcoef(weight.cpu().flatten(), other[name].flatten())[0, 1]) < 0.03
    firsts = {float(weight.flatten()[0] / weight.std()) for weight in other.values() if (
        weight.dim() > 1)}
    assert len(firsts) == 3 * 7 + 2  # each tensor has a stream of its own


# ── bad input ─────────────────────────────────────────────────────────────────────────────────


def refused(folder, *arguments, ranks=1) -> str:
    """What the program says when it refuses: one line, status 2, nothing written."""
    if ranks == 1:  # here: a process of its own takes longer than the rest
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            assert run_cluster.run(on_a_cpu(arguments)) == 2
        text = out.getvalue()
    else:
        results = Job(arguments, ranks).finish()
        assert [status for status, *_ in results] == [2] * ranks, results
        text = "".join(text for _, text, _ in results)
    assert text.startswith("run_cluster.py: ") and text.count("\n") == 1, text
    assert text[:-1].isprintable() and "Traceback" not in text
    return text


GOOD = dict(timestamp=1, input_length=600, output_length=3, hash_ids=[1, 2])
IDS = dict(timestamp=1, output_length=3, input_ids=[1, 2])


@pytest.mark.parametrize("line, said", [
    ("{", "not JSON"), ("[]", "a JSON object"), ("17", "a JSON object"),
    ("\x00\x01\xff", "not JSON"),
    ({**GOOD, "timestamp": None}, "timestamp is missing"), ({**GOOD, "timestamp": 0}, "before"),
    ({**GOOD, "timestamp": -2**54}, "timestamp is -180"), ({**GOOD, "timestamp": math.nan}, "NaN"),
    ({**GOOD, "timestamp": True}, "timestamp is true"),
    ({**GOOD, "input_length": 0}, "input_length is 0"),
    ({**GOOD, "input_length": 2.5}, "input_length is 2.5"),
    ({**GOOD, "output_length": "3"}, 'output_length is "3"'),
    ({**GOOD, "output_length": 0}, "output_length is 0"),
    ({**GOOD, "hash_ids": [1]}, "hash_ids lists 1 blocks"),
    ({**GOOD, "hash_ids": []}, "hash_ids is []; a list of integers, not empty, is expected"),
    ({**GOOD, "hash_ids": {"1": 2}}, 'hash_ids is {"1": 2}; a list of integers, not empty, is exp'),
    ({**GOOD, "hash_ids": [1, -2**63 - 1]}, "hash_ids[1] is -9223372036854775809; an integer of"),
    ({**GOOD, "hash_ids": [1, True]}, "hash_ids[1] is true"),
    ({k: v for k, v in GOOD.items() if k != "input_length"}, "input_length is missing"),
    ({k: v for k, v in GOOD.items() if k != "output_length"}, "output_length is missing"),
    ({k: v for k, v in GOOD.items() if k != "timestamp"}, "timestamp is missing"),
    ({**IDS, "input_ids": []}, "input_ids is []"), ({**IDS, "input_ids": [1, 2.0]}, "input_ids[1]"),
    ({**IDS, "input_ids": [1, 512]}, "token 512"), ({**IDS, "hash_ids": [1]}, "in place of"),
    ({**IDS, "salt": 3}, "salt is 3"), ({**IDS, "session_id": [1]}, "session_id is [1]"),
    ({**IDS, "think_ms": -1}, "think_ms is -1"), ("\n\n{", "not JSON"),
    ({**IDS, "output_length": 8191}, "8193 tokens, the model has 8192 positions"),
    ({**GOOD, "output_length": 1000}, "needs 100 segments, the pool has 60"),
    ("[" * 100_000, "not JSON (maximum recursion depth"),
    ('{"timestamp": %s}' % ("9" * 5000), "not JSON (Exceeds the limit (4300 digits)"),
    ({**GOOD, "timestamp": 10**400}, "…; a number from -2**53 to 2**53 is expected"),
    ({**GOOD, "input_length": 10**400}, "…; a positive integer below 2**53 is expected"),
    ({**GOOD, "hash_ids": [1, 2**64]}, "]; an integer of 64 bits, signed or not, is expected"[1:]),
    ({**IDS, "input_ids": [2**63]}, "an integer from 0 to 2**63 - 1 is expected"),
    ({**IDS, "input_ids": [1] * 5000 + ["\n"]}, 'input_ids[5000] is "\\n"; an integer'),
    ({**IDS, "delay": -1}, "delay is -1"), ({**IDS, "chat_id": 1.5}, "chat_id is 1.5"),
    ({**GOOD, "prompt": "Hi"}, "prompt stands in place of input_length and hash_ids; one or the"),
    ("[1]", "a JSON object is expected (`jq -c '.[]'` makes lines of an array)"),
    ("\x1f\x8b\x08", "compressed by gzip; text is expected"), ('{"a" 1}', "':' delimiter at column 6)"),
    ({**IDS, "delay": 1, "think_ms": 1}, "delay is another name of think_ms; one or the other"),
    ({k: v for k, v in IDS.items() if k != "timestamp"} | {"session_id": 1, "delay": 1},
     "is expected (only a session's later turns may lack it)"),
    ({**IDS, "salt": ["x" * 5000]}, 'salt is ["xxxx'),
    (dict(timestamp=1, output_length=3, prompt="Hi"), "token ids (input_ids) are expected")])
def test_bad_line_is_named(tmp_path, line, said):
    """Line 17 of a trace is wrong in one way or another."""
    path = tmp_path / "trace.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_bytes("".join(json.dumps(GOOD) + "\n" for _ in range(16)).encode()
                     + text.encode("latin-1") + b"\n")
    said_text = refused(tmp_path, "--trace", path, "--slots", 60,
                        *(["--segment-tokens", 200] if "8193" in said else []))
    number = 17 + text.count("\n") if isinstance(line, str) else 17
    assert f"{path}:{number}: " in said_text and said in said_text
    assert len(said_text) < 240 + len(str(path))


@pytest.mark.parametrize("arguments, said", [
    (["--trace", "{tmp}/missing"], "No such file"), (["--trace", "{tmp}"], "Is a directory"),
    (["--trace", "{tmp}/empty"], "is empty"), (["--trace", "{tmp}/binary"], "binary:1: not JSON"),
    (["--slots", "0"], "--slots"), (["--slots", "x"], "--slots"),
    (["--slots", "999999999999"], "a rank needs"), (["--segment-tokens", "-1"], "--segment-tokens"),
    (["--chunk-tokens", "0"], "--chunk-tokens"), (["--max-batch", "0"], "--max-batch"),
    (["--temperature", "-1"], "--temperature"), (["--temperature", "nan"], "--temperature"),
    (["--trace-scale", "3", "--trace", "x"], "'3': a divisor of 512 is expected"),
    (["--speed", "0"], "--speed"), (["--speed", "nan"], "--speed"), (["--seed", "-1"], "--seed"),
    (["--timeout", "0"], "--timeout"), (["--profile"], "--profile needs --output DIR"),
    (["--profile", "-1", "--output", "{tmp}/new"], "--profile: '-1': an integer from 0 to 2**63"),
    (["--trace-scale", "2"], "needs --trace"), (["--random-weights"], "needs --model"),
    (["--model", "{tmp}/missing"], "No such file"), (["--dtype", "int8"], "--dtype"),
    (["--placement", "here"], "--placement"), (["--bogus"], "--bogus"), (["extra"], "extra"),
    (["--output", "{tmp}/empty"], "File exists"), (["--model", "{tmp}/empty"], "Not a directory"),
    (["--output", "{tmp}/held"], "holds requests.jsonl"),
    (["--output", "{tmp}/empty/x"], "Not a directory"), (["--output", "/proc/self"], "--output"),
    (["--output", "x" * 300], "--output"), (["--temperature", "1e39"], "--temperature"),
    (["--num-requests", "0"], "--num-requests"), (["--trace", ""], "a path is expected"),
    (["--segment-tokens", "9999999"], "8192 positions"), (["--seed", "9" * 30], "--seed"),
    (["--chunk-tokens", "1e9"], "--chunk-tokens"),
    (["--replicate-factor", "-1"], "--replicate-factor: '-1': a number from 0 to 1e6 is expected"),
    (["--pull-tokens", "-1"], "--pull-tokens"), (["--tbt-slo-ms", "0"], "--tbt-slo-ms: '0': a pos"),
    (["--tbt-slo-ms", "nan"], "--tbt-slo-ms"), (["--scheduler", "pd"], "dp or pd:PxD is expected"),
    (["--scheduler", "pd:3x2"], "--scheduler pd:3x2: 5 instances, there are 1; as many are exp"),
    (["--scheduler", "pd:0x1"], "--scheduler"), (["--scheduler", "fast"], "--scheduler"),
    (["--stop-at-eos", "--model", "{tmp}/model", "--random-weights"], "no eos_token_id"),
    (["--trace", "{tmp}/ids", "--trace-scale", "2"], "cannot be scaled"),
    (["--trace", "{tmp}/a\nb\x1b"], r"/a\nb\x1b: No such file"),
    (["--output", "{tmp}/empty\n/x"], r"/empty\n/x: Not a directory"),
    (["--model", "{tmp}/a\u2028b"], r"/a\u2028b/config.json: No such file"),
    (["--bogus\n"], r"--bogus\n"), (["--timeout=--"], "--timeout=--: a value is expected"),
    (["--model", "{tmp}/huge", "--random-weights"], "the weights of 1 ranks need 281,474,976,7")])
def test_bad_option_is_named(tmp_path, arguments, said):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "requests.jsonl").write_text("{}\n")
    (tmp_path / "ids").write_text(json.dumps(IDS) + "\n")
    (tmp_path / "empty\n").write_text("")
    save_model(tmp_path / "model", dict(eos_token_id=None))
    huge = dict(json.loads((tmp_path / "model" / "config.json").read_text()), vocab_size=2**40)
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "config.json").write_text(json.dumps(huge))
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said in refused(tmp_path, *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert (tmp_path / "held" / "requests.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("name", [
    name for options in run_cluster.OPTIONS.values() for name, type, *_ in options
    if type not in (run_cluster.FLAG, run_cluster.SWITCH)] + ["--profile"])
@pytest.mark.parametrize("value", ["--", "x" * 5000, "9" * 5000, "x " * 3000, "\0", "\ud800"])
def test_any_option_is_refused_shortly(name, value):
    """Whatever is given for a value that it cannot be. (A float of many digits is infinite.)"""
    if name == "--speed" or name == "--tbt-slo-ms":
        value = value.replace("9", "x")
    with pytest.raises(ValueError) as caught:
        run_cluster.parse_options([f"{name}={value}"])
    assert name in str(caught.value) and len(str(caught.value)) <= 200


def test_unknown_keys_are_warned_of_once(tmp_path):
    """By name, by rank 0 alone; the line is served."""
    lines = [dict(timestamp=0, input_ids=[1], output_length=1, **{key: "a"})
             for key in ("sesion_id", "a\n\ud800", "sesion_id", "prompt")]
    trace = write_trace(tmp_path, lines)
    known = "known are input_ids, input_length, hash_ids, prompt, session_id, chat_id, "
    known += "parent_chat_id, timestamp, output_length, think_ms, delay, salt"
    said = [f"{trace}:1: unknown key \"sesion_id\" is ignored ({known})",
            f"{trace}:2: unknown key \"a\\n\\ud800\" is ignored",
            f"{trace}:4: prompt is ignored, as another key says it"]
    served = serve(tmp_path, trace, ranks=2)
    assert served.text.count("ignored") == 3
    assert all(f"run_cluster.py: {text}\n" in served.text for text in said)
    warned = []
    with open(trace) as file:
        assert len(traces.read_trace(file, str(trace), warn=warned.append)) == 4
    assert warned == said


def test_bad_input_with_several_ranks_is_said_once(tmp_path):
    refused(tmp_path, "--slots", 0, ranks=3)
    assert "--scheduler pd:3x2: 5 instances, there are 3" in refused(
        tmp_path, "--scheduler", "pd:3x2", ranks=3)
    refused(tmp_path, "--trace", tmp_path / "missing", ranks=3)
    assert "staging" in refused(tmp_path, "--max-batch", 99999999999, ranks=2)


def test_a_profile_that_comes_too_late_is_told(tmp_path):
    """The run is as ever, there is no file, and a line says why."""
    served = serve(tmp_path, [dict(input_ids=tokens(9, 1), output_length=3)], "--profile", 500)
    assert "--profile 500 iterations are left out: the run ended after " in served.text
    assert "3; nothing is written" in served.text and not list(tmp_path.glob("out*/profile*"))


@pytest.mark.parametrize("version, said", [
    ("2.10.1+cu128", "torch 2.10.1+cu128 is installed; 2.11 or later is expected"), ("1.13", "2.11 or"),
    ("2.11.0a0+git123", None), ("2.13.0+cpu", None), ("3.0", None)])
def test_an_old_torch_is_refused(monkeypatch, capsys, version, said):
    """By one line of one rank, exit status 2, before what it lacks is missed."""
    monkeypatch.setattr(sys, "argv", ["x/run_cluster.py"])
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ending = pytest.raises(SystemExit, match="2") if said else contextlib.nullcontext()
        with ending:
            cluster_module.require_torch(version)
        text = capsys.readouterr().err
        assert text.startswith("run_cluster.py: ") and said in text if said and rank == "0" else not text


MODULES = sorted(p.relative_to(HERE).as_posix() for p in [*HERE.glob("*.py"), *HERE.glob("bench/*.py")])
PARTS = [name for name in MODULES if (HERE / name).read_text().endswith("    print(__doc__)\n")]


def test_parts_say_what_they_are():
    """Who runs a module that is no program gets its lesson."""
    assert len(PARTS) >= 12 and "traces.py" in PARTS
    for name in MODULES:
        assert "__main__" in (HERE / name).read_text() or name == "bench/example.py", name
    for name in ("traces.py", "bench/options.py"):
        done = subprocess.run([sys.executable, HERE / name], capture_output=True, text=True, check=True)
        assert done.stdout.strip() in (HERE / name).read_text() and not done.stderr


@pytest.mark.parametrize("after, expected", [([], 8), (["7"], 2)])
def test_profile_names_what_the_pool_does(tmp_path, after, expected):
    """Rank 0 writes one file, in the format of Chrome's and Perfetto's traces, of eight iterations
    or as many as there are after those that are left out."""
    lines = [dict(input_ids=tokens(40, 1), output_length=9)]
    served = serve(tmp_path, lines, "--profile", *after, "--verify", ranks=2)
    (path,) = tmp_path.glob("out*/profile*")
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    count = Counter(event["name"].split(": ")[-1] for event in events
                    if event.get("cat") == "python_function")
    iterations = min(8, served.summary["iterations"] - int(*after or "0"))
    layers = LlamaConfig().num_layers * iterations
    assert layers <= count["merge"] <= 2 * layers  # own rows, and those that arrive
    assert layers <= count["partial_attention"] <= 5 * layers
    assert count["put"] == count["query"] == 2 * layers  # the lake's and the pool's
    assert count["gen_plans"] == iterations == expected and not count["recompute"]
    assert "aten::index_select" in {event["name"] for event in events}
    assert served.summary["verified"] == 1


def test_a_signal_while_loading_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(run_cluster, "random_weights", interrupted)
    assert run_cluster.run([]) == 1
    assert capsys.readouterr().err == "run_cluster.py: stopped by a signal\n"


def test_torchrun_serves(tmp_path):
    """The command line as a user types it, two runs at once."""
    def torchrun(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             str(HERE / "run_cluster.py"), *arguments], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pair = [torchrun("--num-requests", "5", "--speed", "inf", "--output", f"out{i}")
            for i in range(2)]
    for i, process in enumerate(pair):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert "5/5 equal recomputation" in out
        assert len((tmp_path / f"out{i}" / "requests.jsonl").read_text().splitlines()) == 5


# ── serving: the oracle decides ───────────────────────────────────────────────────────────────


def chat(num_sessions=4, turns=2, seed=0, salt=False):
    """Sessions behind two system prompts, with lengths around segment boundaries."""
    rng, lines = np.random.default_rng(seed), []
    systems = [tokens(n, seed + i) for i, n in enumerate((48, 33))]
    for turn in range(turns):
        for session in range(num_sessions):
            ids = rng.integers(512, size=rng.integers(1, 40)).tolist()
            line = dict(session_id=session, output_length=int(rng.integers(1, 14)),
                        input_ids=(systems[session % 2] if not turn else []) + ids)
            if salt:
                line["salt"] = "ab"[session // 2 % 2]
            lines.append(line)
    return lines


CHAT = chat()
CHAT_ANSWERS = {}


def chat_answers():
    if not CHAT_ANSWERS:
        CHAT_ANSWERS.update(oracle(CHAT))
    return CHAT_ANSWERS


@pytest.mark.parametrize("ranks, arguments", [
    (1, []), (2, []), (3, []), (4, []),
    (2, ["--segment-tokens", 4]), (3, ["--segment-tokens", 64]), (2, ["--segment-tokens", 1]),
    (3, ["--placement", "hash"]), (2, ["--chunk-tokens", 1]), (3, ["--chunk-tokens", 7]),
    (2, ["--chunk-tokens", 1000]), (3, ["--max-batch", 1]), (2, ["--max-batch", 2])],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value))
def test_tokens_do_not_depend_on_how_they_are_served(tmp_path, ranks, arguments):
    run = serve(tmp_path, CHAT, "--verify", *arguments, ranks=ranks)
    assert run.tokens == chat_answers()
    assert run.summary["verified"] == run.summary["completed"] == len(CHAT)
    assert run.summary["hit_rate"] > 0 or "64" in map(str, arguments)


AHEAD = pytest.mark.parametrize("ahead", ["--no-plan-ahead", "--plan-ahead"])


@pytest.mark.parametrize("ranks, placement, ahead", [
    (1, "stripe", "--no-plan-ahead"), (2, "hash", "--no-plan-ahead"),
    (3, "stripe", "--no-plan-ahead"), (2, "stripe", "--plan-ahead")])
def test_smallest_pool_evicts_and_preempts(tmp_path, ranks, placement, ahead):
    """Down to the smallest pool that admits the longest request: the same tokens, with evictions
    and preemptions; one slot less is refused with both numbers."""
    # Prompts of exactly one segment and long answers: all are admitted, then all want to grow.
    lines = [dict(input_ids=tokens(4 + i % 3, 50 + i), output_length=24 - i) for i in range(9)]
    needed = max(-(-(len(x["input_ids"]) + x["output_length"] - 1) // 4) for x in lines)
    slots = -(-needed // ranks)
    run = serve(tmp_path, lines, "--segment-tokens", 4, "--slots", slots, "--placement", placement,
                ahead, ranks=ranks)
    assert run.tokens == oracle(lines)
    s = run.summary
    assert s["evictions"] > 0 and s["preemptions"] > 0 and s["computed_tokens"] > 0
    fewest = sum(len(x["input_ids"]) + x["output_length"] - 1 for x in lines)
    assert s["hit_rate"] == 0 and s["recomputed_tokens"] > 0
    assert s["computed_tokens"] == fewest + s["recomputed_tokens"]
    if ranks == 1:
        text = refused(tmp_path, "--trace", write_trace(tmp_path, lines), "--segment-tokens", 4,
                       "--slots", slots - 1)
        assert f"needs {needed} segments, the pool has {slots - 1}" in text


def test_each_may_read_for_itself(tmp_path):
    """`read_once=False`, to compare with: plans weigh a segment once a request, kernels read it so."""
    loads, reads = {}, {}
    for read_once in (True, False):
        lake = TokenLake([0], LlamaConfig(), LakeConfig(4, 100, read_once=read_once))
        scheduler = Scheduler(lake)
        for i in range(3):
            scheduler.add(Request(i, tokens(40, 0) + [i], 50))
        for _ in range(4):
            plan, _, _ = lake.gen_plans(*scheduler.schedule(), lake.get_prefix_tree())
            scheduler.update(plan, {run.request.id: 7 for run in plan.runs if run.samples})
        assert sum(run.decode for run in plan.runs) == 3
        loads[read_once], reads[read_once] = plan.load.tolist(), plan.tokens_read.tolist()
    shared = 10 * 4  # tokens that all three read
    assert reads[False][0] - reads[True][0] == 2 * shared
    assert loads[False][0] - loads[True][0] == 2 * shared * lake.ridge


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_all_read_is_read_once_by_all(tmp_path, ranks):
    """Wherever rows of several requests meet at a segment, own rows and those that come from others:
    the same tokens as recomputed."""
    lines = [dict(input_ids=tokens(90, 0) + tokens(1 + i, i), output_length=8, timestamp=i // 6)
             for i in range(12)]
    run = serve(tmp_path, lines, "--segment-tokens", 4, "--verify", ranks=ranks, prelude="read_together")
    assert run.tokens == oracle(lines)
    for seen in run.seen:
        assert seen["shared"] and bool(seen["together"]) == (ranks > 1)


def read_together(rank, seen):
    """Sharing always pays, and no exchange is worth reading twice. Counts iterations in which rows of
    several requests share a span, and in which own rows wait for others."""
    seen.update(shared=0, together=0)
    work_module.saves_bytes = lambda readers, *_, **__: readers > 1
    pool.EXCHANGE_SECONDS = 0
    make = Work.__init__

    def count(work, rows, *args, **options):
        make(work, rows, *args, **options)
        seen["shared"] += work.members.group.max(initial=0) > rows.reader.max(initial=0)
    Work.__init__ = count
    find = pool.QueryBuffer._find_together

    def found(*args):
        spans = find(*args)
        seen["together"] += (spans.place == pool.TOGETHER).any()
        return spans
    pool.QueryBuffer._find_together = staticmethod(found)


def count_replicas_reading_together(rank, seen):
    read_together(rank, {})
    return count_replicas(rank, seen)


@pytest.mark.parametrize("seed", range(10))
def test_random_oracle(tmp_path, seed):
    """Ranks, sizes, pressure, salts and policies drawn at random; tokens as recomputed."""
    draw = random.Random(seed)
    lines = chat(draw.randint(1, 6), draw.randint(1, 3), seed, salt=draw.random() < 0.5)
    C, ranks = draw.choice([1, 2, 3, 5, 8, 16, 33]), draw.randint(1, 4)
    longest, sessions = 0, {}
    for line in lines:
        length = sessions.get(line["session_id"], 0) + len(line["input_ids"])
        sessions[line["session_id"]] = length + line["output_length"]
        longest = max(longest, length + line["output_length"] - 1)
    slots = -(-(-(-longest // C)) // ranks) + draw.choice([0, 0, 1, 4, 100])
    sampler = Sampler(draw.choice([0, 0.8]), seed)
    model = Llama(LlamaConfig(), random_weights(LlamaConfig(), seed, torch.float64, "cpu"))
    policies = ["auto", "even", "dp"] + [f"pd:{p}x{ranks - p}" for p in range(1, ranks)]
    slo = draw.choice([[], ["--tbt-slo-ms", 1e-6], ["--tbt-slo-ms", 5]])
    run = serve(tmp_path, lines, "--segment-tokens", C, "--slots", slots, "--placement",
                draw.choice(["stripe", "hash"]), "--chunk-tokens", draw.choice([1, 5, 16, 64]),
                "--max-batch", draw.choice([1, 2, 5, 32]), "--seed", seed, "--temperature",
                sampler.temperature, "--verify", "--scheduler", draw.choice(policies), *slo,
                "--replicate-factor", draw.choice([0, 3, 1000]), "--pull-tokens",
                draw.choice([0, 7, 16384]), "--plan-ahead" if seed % 2 else "--no-plan-ahead",
                ranks=ranks, prelude=draw.choice(["count_replicas", "count_replicas_of_split_rows",
                                     "count_replicas_reading_together"]))
    assert run.tokens == oracle(lines, model, sampler)
    row = C * 2 * 4 * 16 * 8 * 3  # bytes of a segment: K and V, Hkv·D, float64, layers
    assert run.summary["replica_bytes"] == run.seen[0]["copies"] * row
    assert run.summary["verified"] == len(lines) and run.summary["max_logit_gap"] == 0


def count_replicas_of_split_rows(rank, seen):
    """Rows over the even share leave their home, however few they are."""
    scheduler_module.FEW_ROWS = 1
    return count_replicas(rank, seen)


def count_replicas(rank, seen):
    """Segments that appear in another place from one iteration to the next, and how often."""
    seen["copies"], original = 0, Balancer.replicate

    def replicate(self):
        before = {slot: segment.id for slot, segment in self.tree.extras.items()}
        copies = original(self)
        after = {slot: segment.id for slot, segment in self.tree.extras.items()}
        new = [slot for slot, id in after.items() if before.get(slot) != id]
        assert all(slot in copies for slot in new)  # besides those that left and came back
        seen["copies"] += len(copies)
        for slot, source in copies.items():
            assert self.tree.extras[slot].slot == source and slot // self.slots != (
                source // self.slots)
        return copies
    Balancer.replicate = replicate


def test_salts_share_nothing(tmp_path):
    """The same prompt under another salt misses; under the same salt it hits."""
    prompt = tokens(64, 1)
    lines = [dict(input_ids=prompt, output_length=2, salt=salt) for salt in ("a", "b", "a")]
    run = serve(tmp_path, lines, "--max-batch", 1, ranks=2)
    assert [run.records[i]["cached_tokens"] for i in range(3)] == [0, 0, 63]
    assert len(set(map(tuple, run.tokens.values()))) == 1


def test_a_session_belongs_to_its_salt(tmp_path):
    """The same session id under another salt is another session, here and where it goes on."""
    lines = [dict(input_ids=tokens(20, i), output_length=3, session_id="s", salt=salt)
             for i, salt in enumerate(("a", "b", "a", "b", ""))]
    run = serve(tmp_path, lines, ranks=2)
    assert run.tokens == oracle(lines)
    assert [run.records[i]["input_length"] for i in range(5)] == [20, 20, 43, 43, 20]
    made = traces.read_trace((json.dumps(dict(line, timestamp=0)) for line in lines), "t")
    assert [line.previous and line.previous.index for line in made] == [None, None, 0, 1, None]


def test_any_salt(tmp_path):
    lines = [dict(input_ids=tokens(40, 1), output_length=2, salt=salt) for salt in ("", "\ud800")]
    assert serve(tmp_path, lines).summary["completed"] == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("temperature", [0, 0.1, 1e-300])
def test_other_types_verify(tmp_path, dtype, temperature):
    run = serve(tmp_path, CHAT, "--verify", "--temperature", temperature, ranks=2, dtype=dtype)
    found = run.summary
    assert found["verified"] == len(CHAT) and found["max_logit_gap"] >= 0
    usual = dict(float32=1e-6, bfloat16=1e-2, float16=1e-3)[dtype]
    assert usual / 10 < found["logprob_rounding"] < 10 * usual
    assert usual / 10 < found["max_logprob_error"] < 10 * usual
    said = "equal recomputation" if found["max_logit_gap"] == 0 else "are as near recomputation"
    assert said in run.text
    assert f"differ by {found['max_logprob_error']:.2g} at most; the model's own rounding is " in run.text


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_records_have_log_probabilities(tmp_path, temperature):
    """They are the model's own, before temperature and noise."""
    run = serve(tmp_path, CHAT, "--temperature", temperature, ranks=2)
    model = small_model()
    histories = {}
    for id, line in enumerate(CHAT):
        before = histories.get(line["session_id"], [])
        whole = before + line["input_ids"] + run.tokens[id]
        histories[line["session_id"]] = whole
        expected = model.forward_alone(whole[:-1]).log_softmax(-1)
        first = len(whole) - len(run.tokens[id])
        expected = [float(expected[p - 1, whole[p]]) for p in range(first, len(whole))]
        found = run.records[id]["output_logprobs"]
        assert found == pytest.approx(expected, rel=1e-6) and len(found) == len(run.tokens[id])


WAITS = {
    "item": lambda x: x.sum().item(), "tolist": lambda x: x[:1].tolist(),
    "nonzero": lambda x: x.nonzero(), "a boolean mask": lambda x: x[x > 0],
    "a copy to the host": lambda x: x.to("cpu")}


class Launches(TorchDispatchMode):
    """Notes what is launched: kernels and exchanges, which do nothing, and PyTorch's operators, but
    for views and allocations. A norm is one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        self.variants = []  # what Triton compiles a variant for
        for name in ("_partial_attention_kernel", "_merge_kernel", "_rotate_kernel"):
            monkeypatch.setattr(kernels, name, self.stub(name))
        for module in (kernels, pool, model_module):
            monkeypatch.setattr(module, "suits_triton", lambda *_: True)
        monkeypatch.setattr(pool, "programs_at_once", lambda *_: at_once(16))
        monkeypatch.setattr(pool.Pool, "_exchange", self.exchange)
        monkeypatch.setattr(model_module.F, "rms_norm", lambda x, *_: x.neg())

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        is_view = any(x.alias_info and not x.alias_info.is_write for x in op._schema.returns)
        if not is_view and "empty" not in op.__name__:
            self.names.append(op.__name__.removesuffix(".default"))
        return op(*args, **kwargs or {})

    def stub(self, name):
        def launch(*arguments, **config):
            def kind(x):
                if torch.is_tensor(x):
                    return x.dtype, x.storage_offset() * x.itemsize % 16 if x.numel() else 0
                return type(x)  # integers are not specialised
            self.names.append(name)
            self.variants.append((name, *map(kind, arguments), *config.values()))

        class Kernel:
            def __getitem__(self, grid):
                assert all(type(n) is int and n > 0 for n in grid)
                return launch
        return Kernel()

    def exchange(self, rows, sends, receives, group, target=None):
        assert len(rows) == sum(sends)
        self.names.append("exchange")
        return lambda: rows.new_empty(sum(receives), *rows.shape[1:])


def iterations_without_data(N, requests, dtype=torch.float32, in_layer=lambda x: None, policy="auto"):
    """Serves requests on N instances, on tensors without data: yields (model, query plan, instance,
    a function that makes its forward)."""
    config = LlamaConfig()
    lake_config = LakeConfig(segment_tokens=8, slots=256, chunk_tokens=24)
    model = Llama(config, model_module.Weights.empty(config, dtype, "meta"))
    pools = [pool.Pool(None, [None, None], config, lake_config, N, dtype, "meta")
             for _ in range(N)]
    for each in pools:
        each.max_lanes = work_module.MAX_LANES
    lake = TokenLake([*range(N)], config, lake_config)
    scheduler = Scheduler(lake, policy=policy)
    for request in requests:
        scheduler.add(request)
    while scheduler.waiting or scheduler.running:
        batches, dops = scheduler.schedule()
        plan, transfers, _ = lake.gen_plans(batches, dops, lake.get_prefix_tree())
        for index, its_pool in enumerate(pools):
            q_buf = pool.QueryBuffer(plan, index, its_pool)
            kv_buf = pool.KVBuffer(transfers, index, its_pool.num_rows, "meta")

            def attend(layer, q, kv):
                in_layer(q)
                kv_buf.write(layer, kv)
                its_pool.put(kv_buf)
                q_buf.write(layer, q)
                return its_pool.query(q_buf)

            def forward():
                ids = torch.empty(q_buf.num_rows, dtype=torch.int64, device="meta")
                logits = model.forward(ids, ids, attend, ids[:1])
                assert logits.shape == (min(1, q_buf.num_rows), config.vocab_size)
            yield model, plan, index, forward
        scheduler.update(plan, {run.request.id: 1 for run in plan.runs if run.samples})


def five_requests():
    return [Request(id, tokens(40, 0) + tokens(9 + 20 * id, id), 55 + 20 * id) for id in range(5)]


walks_launches = pytest.mark.skipif(kernels.triton is None, reason="it is launches that are walked")


@walks_launches
@pytest.mark.parametrize("wait", [None, *WAITS])
def test_no_layer_waits_for_the_device(monkeypatch, wait):
    """The forward of every instance on tensors without data, where what asks for data raises; `wait`:
    put into a layer, it is noticed. Nor is a kernel compiled."""
    launches = Launches(monkeypatch)
    in_layer = WAITS[wait] if wait else lambda x: None
    for model, plan, index, forward in iterations_without_data(3, five_requests(), in_layer=in_layer):
        if not wait:
            forward()
        elif (plan.run_table.instance == index).any():
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                forward()
            return
    # What is launched while serving was compiled before: few variants.
    while_serving = {*launches.variants}
    assert len(launches.variants) > 100 and len(while_serving) >= 4
    launches.variants.clear()
    H, Hkv, D = model.config.num_heads, model.config.num_kv_heads, model.config.head_dim
    kernels.warm_up(H, Hkv, H, D, torch.float32, "meta")
    assert len({*launches.variants}) == 6
    ids = torch.empty(1, dtype=torch.int64, device="meta")
    model.forward(ids, ids, lambda layer, q, kv: q)  # as Engine._warm_up does
    assert while_serving <= {*launches.variants} and len({*launches.variants}) == 7


@walks_launches
@pytest.mark.parametrize("ranks, policy, most", [(1, "auto", 16), (2, "auto", 30), (2, "pd:1x1", 30)])
def test_a_layer_launches_little(monkeypatch, ranks, policy, most):
    """Decodes in bfloat16, some behind a prefix that they share, some cut into pieces: what the
    device is asked for in a layer of any instance. The list stands in bench/NOTES.md."""
    launches = Launches(monkeypatch)
    layers = []

    def note(_):
        layers.append([])
        launches.names = layers[-1]
    counts, kinds = [], Counter()
    requests = [Request(id, tokens(240, id % 2) + tokens(9 + 10 * id, id), 275 + 10 * id)
                for id in range(10)]
    for _, plan, index, forward in iterations_without_data(ranks, requests, torch.bfloat16, note, policy):
        layers.clear()
        with launches:
            forward()
        if plan.run_table.decode.all():
            first, second, _ = layers  # of each: from its attention to the next one's
            counts.append(len(second))
            kinds.update(second)
    assert len(counts) > 20 and max(counts) <= most, (max(counts), kinds)
    assert kinds["linear"] == 4 * len(counts) and kinds["_merge_kernel"] > 20, kinds
    queries = 2 * (ranks - 1) * len(counts)
    assert kinds["exchange"] > queries if policy != "auto" else kinds["exchange"] == queries, kinds


def slow_moves(rank, seen):
    """What moves comes late, and later at each rank; and in which order a layer lands it and sends
    results back."""
    seen.update(events=[], groups=[], splits=[])
    move, merge, query = pool.Pool.move, kernels.Outputs.merge, pool.Pool.query
    all_to_all = dist.all_to_all_single

    def slow(self, layer, moves):
        land = move(self, layer, moves)

        def later():
            time.sleep(0.001 * (1 + rank) * moves.active)
            if moves is self.in_flight.staged:
                seen["events"].append("land")
            return land()
        return cache(later)

    def noted(self, section):
        if section == pool.ARRIVED:
            seen["events"].append("return")
        return merge(self, section)

    def begun(self, buffer):
        late = pool.LATE in buffer.works_after_arrival
        seen["events"].append("late" if late else "early")
        return query(self, buffer)

    def exchanged(received, sent, receives, sends, group, **options):
        """Of group, place and what is exchanged all ranks have to say the same, or the mirror."""
        seen["groups"].append(group.group_name)
        seen["splits"].append((sends, receives, tuple(sent.shape[1:])))
        return all_to_all(received, sent, receives, sends, group=group, **options)
    pool.Pool.move, kernels.Outputs.merge, pool.Pool.query = slow, noted, begun
    dist.all_to_all_single = exchanged


@pytest.mark.parametrize("arguments", [[], ["--one-communicator"]], ids=["two", "one"])
def test_results_leave_before_moves_land(tmp_path, arguments):
    """Where no row that has arrived reads what was moved; else they wait for it. Ranks come to the
    exchanges of both groups in one order, and delays change no token."""
    lines = [dict(input_ids=tokens(30 + 37 * i, i), output_length=4) for i in range(9)]
    run = serve(tmp_path, lines, "--segment-tokens", 8, "--scheduler", "dp", *arguments, ranks=3,
                prelude="slow_moves")
    assert run.tokens == oracle(lines)
    orders = Counter()
    for seen in run.seen:
        layers = " ".join(seen["events"]).replace(" early", "|early").replace(" late", "|late")
        orders.update(layers.split("|"))
    assert orders.keys() <= {"early return land", "late land return", "early land"}
    assert orders["early return land"] > 50 and orders["late land return"] >= 6, orders
    first = run.seen[0]["groups"]
    assert len(set(first)) == 2 - len(arguments)
    assert all(seen["groups"] == first for seen in run.seen)
    for exchange in zip(*(seen["splits"] for seen in run.seen)):  # on each rank
        sends, receives, shapes = zip(*exchange)
        assert [*map(list, zip(*receives))] == [*sends] and len(set(shapes)) == 1


def test_the_largest_gap_is_reported(tmp_path):
    """In 16 bits some tokens differ from the oracle's by rounding; the summary says by how much."""
    lines = [dict(input_ids=tokens(30 + i, i), output_length=40) for i in range(8)]
    run = serve(tmp_path, lines, "--verify", "--chunk-tokens", 7, "--seed", 1, dtype="bfloat16")
    model = Llama(LlamaConfig(), random_weights(LlamaConfig(), 1, torch.bfloat16, "cpu"))
    gaps = []
    for id, line in enumerate(lines):
        whole = line["input_ids"] + run.tokens[id]
        logits = model.forward_alone(whole[:-1]).float()
        gaps += [float(logits[p - 1].max() - logits[p - 1, whole[p]])
                 for p in range(len(line["input_ids"]), len(whole))]
    assert run.summary["max_logit_gap"] == max(gaps) > 0


@pytest.mark.parametrize("dtype, gap", [(torch.float64, 1e-9), (torch.float32, 1e-3),
                                        (torch.bfloat16, math.inf)])
def test_what_counts_as_rounding(dtype, gap):
    """A gap just above the limit is wrong in float32 and float64, one below is not; a NaN is."""
    def wrong(**changed):
        answers = {i: oracle_module.Recomputed(9, 0.0, 9.0, 9.0) for i in range(9)}
        answers[1] = answers[1]._replace(**changed)
        return oracle_module.judge([answers], dtype).wrong
    assert wrong() == wrong(gap=0.99 * gap) == [] and wrong(gap=math.nan) == [1]
    assert wrong(gap=1.01 * gap) == [1] * (gap < math.inf)
    assert wrong(error=9 * 1.99**2) == [] and wrong(error=9 * 2.01**2) == [1]
    assert wrong(error=math.nan) == [1] and wrong(error=math.nan, rounding=math.nan) == [1]
    # With a token alone chance does more; what is exact by chance is judged by the others.
    assert wrong(tokens=1, error=3.9**2, rounding=1.0) == []
    assert wrong(tokens=1, error=4.1**2, rounding=1.0) == [1]
    assert wrong(error=9.0, rounding=0.0) == []
    # One that rounds more than the others may differ by more, up to four times the usual.
    assert wrong(error=9 * 5.9**2, rounding=9 * 3.0**2) == []
    assert wrong(error=9 * 7.9**2, rounding=9 * 4.0**2) == []
    assert wrong(error=9 * 9.0**2, rounding=9 * 100.0**2) == [1]  # and excuses no other


def test_a_rank_that_rounds_excuses_nobody():
    """One that computes wrongly in the model's type, and rightly in the wider one, would otherwise
    find a large rounding."""
    def part(first, rounding, error):
        return {first + i: oracle_module.Recomputed(9, 0.0, 9 * error**2, 9 * rounding**2)
                for i in range(6)}
    parts = [part(0, 1.0, 1.1), part(10, 1.2, 5.0), part(20, 30.0, 1.0)]
    verdict = oracle_module.judge(parts, torch.bfloat16)
    assert verdict.wrong == [*range(10, 16)] and 1.0 < verdict.rounding < 1.2
    assert oracle_module.judge([{}, part(0, 1.0, 1.0), {}], torch.bfloat16).wrong == []
    assert oracle_module.judge([{}], torch.bfloat16).wrong == []
    # By few tokens no rank is told from another.
    one = oracle_module.Recomputed(1, 0.0, 1.0, 1.0)
    apart = [{0: one}, {1: one._replace(rounding=0.01)}, {2: one}]
    assert oracle_module.judge(apart, torch.bfloat16).wrong == []


def rounds_badly(rank, seen):
    """Rank 1 is wrong in bfloat16, and right in float32."""
    original = Llama._norm

    def norm(self, x, weight):
        y = original(self, x, weight)
        return y * 1.2 if rank == 1 and y.dtype == torch.bfloat16 else y
    Llama._norm = norm


def test_a_rank_that_is_wrong_in_one_type_is_noticed(tmp_path):
    lines = [dict(input_ids=tokens(30 + i, i), output_length=9) for i in range(12)]
    run = serve(tmp_path, lines, "--verify", ranks=2, dtype="bfloat16", prelude="rounds_badly",
                status=1)
    assert run.summary["logprob_rounding"] < 0.02 < run.summary["max_logprob_error"]
    assert len(run.summary["differing_requests"]) >= 6


def test_weights_have_no_second_copy():
    """In the wider type each is made when it is used."""
    config = LlamaConfig(tie_word_embeddings=True)
    model = Llama(config, random_weights(config, 0, torch.bfloat16, "cpu"))
    widened = Llama(config, oracle_module.Widened(model.weights, torch.float32))
    copy = Llama(config, random_weights(config, 0, torch.float32, "cpu"))
    for name, weight in copy.weights.by_name(config).items():
        weight.copy_(model.weights.by_name(config)[name])
    ids = tokens(20, 3)
    assert torch.equal(widened.forward_alone(ids), copy.forward_alone(ids))
    assert not any(torch.is_tensor(value) and value.dim() > 1 for value in vars(widened).values())


DEEP = [dict(input_ids=tokens(32, i if i % 4 == 3 else 99) + tokens(12 + i % 5, 200 + i),
             output_length=16) for i in range(12)]
SHARING = [i for i in range(12) if i % 4 != 3]  # the others have prefixes of their own


def deep_model(folder, layers) -> list:
    """Options for a model of so many layers."""
    config = dict(model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=256,
                  num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
                  head_dim=16, max_position_embeddings=512)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return ["--model", folder / "model", "--random-weights", "--temperature", 1, "--verify"]


def lose_a_segment(where):
    """A prelude: the KV of one layer of one segment is lost once the first request has ended."""
    def prelude(rank, seen):
        def observe(server, finished):
            first = next((record["request_id"] for record in finished), None)
            if seen or first not in SHARING:
                return
            seen["first"] = first
            lake = server.lake
            layer = int(where * (lake.llama_config.num_layers - 1) + 0.5)
            shared = lake.balancer.tree.segments[server.lines[first].request.ids[0]]
            _, S, C = lake.balancer.sizes
            slot = shared.replicas.get(rank)
            if slot is not None:
                row = slot % S * C
                lake.pool.kv[layer, row : row + C, 1] = 0
        return observe
    return prelude


lose_in_the_first, lose_in_the_middle, lose_in_the_last = map(lose_a_segment, (0, 0.5, 1))


@pytest.mark.parametrize("layers, dtype, ranks", [
    pytest.param(layers, dtype, ranks, marks=[] if (layers, dtype, ranks) in (
        (3, "bfloat16", 2), (16, "bfloat16", 1)) else pytest.mark.slow)
    for layers in (3, 8, 16, 32) for dtype in ("bfloat16", "float16", "float32")
    for ranks in (1, 2)])
def test_verify_tells_a_lost_segment_from_rounding(tmp_path, layers, dtype, ranks):
    """Where nothing is lost all requests pass; where a segment of one layer is, those that have
    read it do not. (In the last layer, in 16 bits, that is not asked for: what a layer adds is one
    part in as many as there are layers, while all of them round.)"""
    options = [*deep_model(tmp_path, layers), "--segment-tokens", 16]
    run = serve(tmp_path, DEEP, *options, ranks=ranks, dtype=dtype)
    assert run.summary["verified"] == len(DEEP)
    for place in ("first", "middle", "last"):
        run = serve(tmp_path, DEEP, *options, "--max-batch", 1, ranks=ranks, dtype=dtype,
                    prelude=f"lose_in_the_{place}", status=None)
        first = run.seen[0]["first"]
        readers = [id for id in SHARING if id != first]
        noticed = run.summary["differing_requests"]
        assert len(noticed) == len(DEEP) - run.summary["verified"] and set(noticed) <= {*readers}
        print(f"{layers} layers, {dtype}, {ranks} ranks, lost in the {place}: "
              f"{len(noticed)} of {len(readers)} are noticed")
        if place != "last" or dtype == "float32":
            assert noticed == readers


def corrupt(rank, seen):
    """Loses every partial result of one holder: what --verify exists to notice."""
    original = kernels.Outputs.merge

    def lossy(self, section=0):
        o, lse = original(self, section)
        return o, lse - 3.0 * (rank == 1 and section == pool.ARRIVED)
    kernels.Outputs.merge = lossy


def test_verify_notices_a_wrong_result(tmp_path):
    trace = write_trace(tmp_path, CHAT)
    results = Job(["--trace", trace, "--verify", "--speed", "inf"], 2, "corrupt").finish()
    assert [status for status, *_ in results] == [1, 1]
    assert "differs from recomputation" in results[0][1] + results[1][1]


# ── what moves, and what hits ─────────────────────────────────────────────────────────────────


def shares_of(batches, groups):
    """{(request, instance): its runs by position}, of the batches of an iteration."""
    out = {}
    for batch, group in zip(batches, groups):
        for run, instance in zip(batch, group):
            out.setdefault((run.request, instance), []).append(run)
    return {key: sorted(runs, key=lambda run: run.position) for key, runs in out.items()}


def expected_bytes(lake, batches, groups):
    """Bytes per layer of an iteration without replicas, request by request: (query, put, pull,
    pulled from siblings). Rows ship to a holder, or its KV comes if that is fewer bytes."""
    (_, S, C), q, kv = lake.balancer.sizes, lake.query_bytes, lake.kv_bytes
    shares, query, put, pull, fresh = shares_of(batches, groups), 0, 0, 0, 0
    for (request, v), runs in shares.items():
        rows = sum(run.rows for run in runs)
        home = lambda position: int(request.table[position // C]) // S
        visited = {run: set() for run in runs}
        old = Counter(home(p) for p in range(request.done + (not runs[0].puts)))
        for w, tokens in old.items():
            if w == v:
                continue
            if not runs[0].decode and tokens * kv < rows * q and lake.config.pull_tokens:
                pull += tokens * kv
            else:
                for run in runs:
                    visited[run].add(w)
        new = {}
        for (other, u), writers in shares.items():
            for c in writers:
                if other is request and c.puts and u != v and home(c.position) != v:
                    new.setdefault(home(c.position), []).append(c)
        for w, writers in new.items():
            writers = [c for c in writers if c.position <= runs[-1].position]
            tokens = sum(c.rows for c in writers)
            if any(w in places for places in visited.values()):
                continue
            if writers and not runs[0].decode and tokens * kv < rows * q:
                fresh += tokens * kv
            else:
                for run in runs:
                    if any(c.position <= run.position for c in writers):
                        visited[run].add(w)
        query += sum(run.rows * len(places) for run, places in visited.items()) * q
        put += sum(run.rows for run in runs if run.puts and home(run.position) != v) * kv
    return query, put, pull, fresh


def count_bytes(rank, seen):
    """Counts what crosses instances from who computes what, token by token."""
    original = TokenLake.gen_plans
    seen.update(query=0, put=0, pull=0, sibling=0, replica=0, puts=0, local=0, iterations=0, reads=[],
                decode=0, home=0)

    def gen_plans(lake, batches, dops, tree):
        before = dict(tree.extras)
        query_plan, transfer_plan, groups = original(lake, batches, dops, tree)
        S, C, layers = lake.config.slots, lake.config.segment_tokens, lake.llama_config.num_layers
        query, put, pull, fresh = expected_bytes(lake, batches, groups)
        seen["query"] += query * layers
        seen["put"] += put * layers
        seen["pull"] += pull * layers
        seen["sibling"] += fresh * layers
        seen["replica"] += C * layers * lake.kv_bytes * sum(
            slot not in before or before[slot] is not segment
            for slot, segment in tree.extras.items())
        for (request, instance), runs in shares_of(batches, groups).items():
            for run in runs:
                if run.position // C >= len(request.segments):
                    home = int(request.table[run.position // C]) // S
                    seen["puts"] += run.rows
                    seen["local"] += (home == instance) * run.rows
                    if request.num_prompt <= request.done == len(request.tokens) - 1:
                        seen["decode"] += 1
                        seen["home"] += home == instance
        seen["iterations"] += bool(query_plan.runs)
        if query_plan.runs:  # tokens of KV from before, once per request, wherever they are
            reads = [0] * len(lake.instances)
            for request in {run.request.id: run.request for run in query_plan.runs}.values():
                whole = request.done == len(request.segments) * C - 1
                for token in range(request.done + whole):
                    reads[int(request.table[token // C]) // S] += 1
            seen["reads"].append(reads)
        return query_plan, transfer_plan, groups
    TokenLake.gen_plans = gen_plans

    def observe(server, finished):
        if not server.options.replicate_factor:
            windows = [np.sum(seen["reads"][first:first + engine_module.CV_WINDOW], 0).tolist()
                       for first in range(0, len(seen["reads"]), engine_module.CV_WINDOW)]
            assert [list(reads) for reads in server.engine.reads] == windows
    return observe


@pytest.mark.parametrize("ranks, slots, arguments", [
    (1, 200, []), (2, 200, []), (4, 200, []), (3, 7, []), (4, 200, ["--pull-tokens", 0]),
    (3, 200, ["--scheduler", "dp"]), (4, 200, ["--scheduler", "pd:2x2"]),
    (4, 200, ["--scheduler", "pd:3x1", "--segment-tokens", 4, "--pull-tokens", 0])])
def test_bytes_equal_the_plans(tmp_path, ranks, slots, arguments):
    """Bytes, rows put and cache tokens read, counted independently; one prompt is cached whole."""
    lines = CHAT + [dict(input_ids=tokens(32, 0), output_length=2)] * 2
    run = serve(tmp_path, lines, "--slots", slots, "--replicate-factor", 0, *arguments,
                prelude="count_bytes", ranks=ranks)
    s, seen = run.summary, run.seen[0]
    assert [s[f"{kind}_bytes"] for kind in ("query", "put", "pull", "sibling", "replica")] == [
        seen["query"], seen["put"], seen["pull"], seen["sibling"], 0]
    assert run.tokens == oracle(lines)
    assert s["iterations"] == seen["iterations"]
    assert s["puts_local"] == seen["local"] / seen["puts"]
    assert s["decode_puts_local"] == seen["home"] / seen["decode"]
    windows = [np.sum(seen["reads"][i:i + 32], axis=0) for i in range(0, len(seen["reads"]), 32)]
    windows = windows[:-1] if len(seen["reads"]) % 32 and len(windows) > 1 else windows
    variation = np.mean([w.std() / w.mean() for w in windows if w.sum()])
    assert s["cache_load_cv"] == pytest.approx(variation)
    assert (s["query_bytes"] > 0) == (ranks > 1)
    if "--pull-tokens" in arguments:
        assert s["pull_bytes"] == 0
    elif ranks > 1:
        assert s["pull_bytes"] > 0
    if ranks == 1:
        assert s["put_bytes"] == 0
    if slots == 200 and "--scheduler" not in arguments:
        assert s["puts_local"] >= 0.9 and s["decode_puts_local"] >= 0.95


@pytest.mark.parametrize("dtype, row", [("float64", 8 * (16 + 16 + 1) * 8), ("float32", 8 * 33 * 4),
                                        ("bfloat16", 8 * (32 * 2 + 4)), ("float16", 8 * (32 * 2 + 4))])
def test_a_row_and_its_result_take_what_their_type_takes(tmp_path, dtype, row):
    """Per row and layer, 8 heads of 16: Q and O in the model's type, LSE in float32 at least."""
    run = serve(tmp_path, CHAT, "--pull-tokens", 0, "--verify", prelude="count_rows", ranks=2,
                dtype=dtype)
    assert run.summary["query_bytes"] == run.seen[0]["rows"] * 3 * row > 0
    assert run.summary["verified"] == len(CHAT)


def count_rows(rank, seen):
    original = TokenLake.gen_plans
    seen.update(rows=0)

    def gen_plans(lake, batches, dops, tree):
        plans = original(lake, batches, dops, tree)
        seen["rows"] += int(plans[0].rows_shipped().sum())
        return plans
    TokenLake.gen_plans = gen_plans


def test_bytes_at_llamas_shapes():
    """A row costs 16.5 KB, and pays for 4 tokens of KV, in bfloat16."""
    shape = LlamaConfig(num_heads=32, num_kv_heads=8, head_dim=128)
    lake = TokenLake([0, 1], shape, LakeConfig(), dtype=torch.bfloat16)
    assert lake.query_bytes == 16_512 and lake.query_bytes // lake.kv_bytes == 4


@pytest.mark.parametrize("ranks, slots", [(2, 16), (3, 11), (4, 200)])
def test_remote_puts_happen_and_are_right(tmp_path, ranks, slots):
    """A pool with one free instance: what is computed elsewhere is put there, token for token, and
    the counters know; decodes too, when there are many."""
    lines = [dict(input_ids=tokens(60 + 7 * i, i), output_length=6) for i in range(6)]
    lines += [dict(input_ids=tokens(3, i), output_length=7) for i in range(20 if ranks == 4 else 0)]
    run = serve(tmp_path, lines, "--segment-tokens", 4, "--slots", slots, "--chunk-tokens", 8,
                "--replicate-factor", 0, ranks=ranks, prelude="one_full_instance")
    assert run.tokens == oracle(lines)
    s, seen = run.summary, run.seen[0]
    assert s["put_bytes"] == seen["put"] > 0 and s["query_bytes"] == seen["query"]
    assert [s["pull_bytes"], s["sibling_bytes"]] == [seen["pull"], seen["sibling"]]
    assert s["puts_local"] == seen["local"] / seen["puts"] < 1
    assert s["decode_puts_local"] == seen["home"] / seen["decode"]
    assert ranks < 4 or s["decode_puts_local"] < 1


def one_full_instance(rank, seen):
    """Instance 1 offers its slots first, wherever the home should be."""
    def allocate(self, home, *others, **options):
        if self.free[1]:
            return self.free[1].pop()
        return original(self, home, *others, **options)
    original, Balancer._allocate = Balancer._allocate, allocate
    return count_bytes(rank, seen)


def keep_tree(rank, seen):
    """The number of segments stored at the end."""
    def observe(server, finished):
        seen["segments"] = len(server.lake.balancer.tree.segments)
    return observe


@pytest.mark.parametrize("ranks", [1, 3])
def test_hit_rate_equals_an_independent_count(tmp_path, ranks):
    """One request at a time in an ample pool: what is cached is exactly the longest prefix of full
    segments seen before, generated tokens counted too; and none is stored twice."""
    C, lines = 16, chat(6, 3, seed=2)
    run = serve(tmp_path, lines, "--max-batch", 1, ranks=ranks, prelude="keep_tree")
    stored, sessions, cached, total = set(), {}, 0, 0
    # Turns of a session wait for each other; the order of service is by arrival.
    for id in sorted(run.records, key=lambda id: run.records[id]["finished_s"]):
        line = lines[id]
        prompt = sessions.get(line["session_id"], []) + line["input_ids"]
        matched = 0
        while tuple(prompt[:matched + C]) in stored and matched + C <= len(prompt):
            matched += C
        assert run.records[id]["cached_tokens"] == min(matched, len(prompt) - 1)
        cached, total = cached + min(matched, len(prompt) - 1), total + len(prompt)
        whole = prompt + run.tokens[id]
        sessions[line["session_id"]] = whole
        stored |= {tuple(whole[:end]) for end in range(C, len(whole), C)}
    assert run.summary["hit_rate"] == cached / total > 0.3
    assert run.seen[0]["segments"] == len(stored)


def test_blank_lines_of_a_trace_do_not_count(tmp_path):
    lines = [dict(input_ids=tokens(9, i), output_length=3) for i in range(2)]
    path = write_trace(tmp_path, lines)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))
    assert serve(tmp_path, path).tokens == oracle(lines)


def test_trace_blocks_hit(tmp_path):
    """Lines of hash ids: equal ids are equal tokens, other ids are not; scaled blocks too."""
    lines = [dict(input_length=n, output_length=3, hash_ids=ids) for n, ids in (
        (1100, [5, 6, 7]), (1100, [5, 6, 8]), (1024, [5, 6]), (600, [6, 5]))]
    run = serve(tmp_path, lines, "--trace-scale", 32, "--max-batch", 1, "--verify", ranks=2)
    assert [run.records[i]["input_length"] for i in range(4)] == [35, 35, 32, 19]
    assert [run.records[i]["cached_tokens"] for i in range(4)] == [0, 32, 31, 0]
    assert all(len(answer) == 1 for answer in run.tokens.values())


def test_matching_confirms_homes(tmp_path):
    """With the even split sub-batches are formed by home, and there the rows read; so the matching
    of §5 leaves every sub-batch where it is (§7 of the design)."""
    serve(tmp_path, CHAT, ranks=4, prelude="assert_confirmed")


def assert_confirmed(rank, seen):
    original = TokenLake.gen_plans

    def gen_plans(lake, batches, dops, tree):
        plans = original(lake, batches, dops, tree)
        for number, (batch, group) in enumerate(zip(batches, plans[2])):
            assert group == [number] * len(batch)
        return plans
    TokenLake.gen_plans = gen_plans


def random_batches(rng, lake, replicated):
    """Batches of random requests over random slots, with DoPs of 2 and 1; some slots hold segments
    with replicas."""
    bal, (N, S, C) = lake.balancer, lake.balancer.sizes
    places = []
    for index, slot in enumerate(rng.choice(N * S, 25 * replicated, replace=False).tolist()):
        segment = bal.tree.insert(bytes([index]), None, slot // S, slot)
        for instance in rng.permutation(N)[:rng.integers(1, N)].tolist():
            if instance != slot // S:
                segment.replicas[instance] = 10**6 + instance * S  # a stand-in, never read
                bal.tree.extras[len(bal.tree.extras)] = segment
        places.append(segment)
    bal._index_replicas()
    bal._replica_slots[bal._replica_slots >= 10**6] -= 10**6
    bal.deepest_replicated = 20  # they lie anywhere in the tables
    cold = np.setdiff1d(np.arange(N * S), [segment.slot for segment in places])
    batches, dops = [], [2] + [1] * (N - 2)
    for number in range(len(dops)):
        batch = []
        for _ in range(int(rng.integers(1, 4))):
            length, prompt = int(rng.integers(1, 40)), int(rng.integers(2))
            request = Request(len(batch) + 10 * number, [0] * (length + 1), length + 2)
            bal.admit(request, 0)
            request.table = rng.choice(cold, size=20).astype(np.int32)
            request.done = length - 1
            for segment in places[:int(rng.integers(6)) if length > 4 else 0]:
                request.table[rng.integers(request.done // 4)] = segment.slot  # a full one
            bal.held[request.held_row] = np.bincount(request.table[:-(-request.done // C)] // S,
                                                 minlength=N)
            rows = int(rng.integers(1, C - request.done % C + 1)) if prompt else 1
            batch.append(balancer.Run(request, request.done, rows, 0,
                                      int(request.table[request.done // C]), True, not prompt))
        batches.append(batch)
    return batches, dops


@pytest.mark.parametrize("replicated", [False, True])
def test_matching_is_the_cheapest(replicated):
    """Against every assignment for N ≤ 5, on random requests, DoPs of 1 and 2: none moves fewer
    bytes; where segments have replicas, to those that were chosen, and what is at hand is saved."""
    from itertools import permutations
    rng, saved = np.random.default_rng(0), 0
    for N in (2, 3, 4, 5):
        for trial in range(20 if N < 5 else 8):
            config = LakeConfig(4, 50, replicate_factor=0)
            lake = TokenLake(list(range(N)), LlamaConfig(), config)
            lake.query_bytes, lake.kv_bytes = 100, int(rng.integers(1, 400))
            lake.exchange_bytes, bal = 0, lake.balancer
            bal.replicate = dict
            batches, dops = random_batches(rng, lake, replicated)

            def choose(places, cost, load):
                return (places >= 0).argmax(1) * 50 + places[
                    np.arange(len(places)), (places >= 0).argmax(1)] % 50
            bal.choose_replicas = choose

            def bytes_of(run, v):
                """What is chosen at a holder ships, or is pulled where that is fewer bytes."""
                q, kv, request = lake.query_bytes, lake.kv_bytes, run.request
                at = Counter()
                for index in range(-(-request.done // 4)):
                    slot = int(request.table[index])
                    line = bal._replica_row[slot]
                    chosen = slot // 50 if line < 0 else int((bal._replica_slots[line] >= 0).argmax())
                    at[chosen] += min(request.done - index * 4, 4)
                return run.rows * kv * (run.slot // 50 != v) + sum(
                    run.rows * q if run.decode else min(tokens * kv, run.rows * q)
                    for w, tokens in at.items() if w != v)

            plan, transfer, groups = lake.gen_plans(batches, dops, bal.tree)
            runs = [run for batch in batches for run in batch]
            found = sum(bytes_of(run, v) for run, v in zip(runs, sum(groups, [])))
            parts = np.concatenate(tokenlake.parts_of_runs(batches, dops))
            best = min(sum(bytes_of(run, order[part]) for run, part in zip(runs, parts))
                       for order in permutations(range(N), sum(dops)))
            assert found == best
            moved = (transfer.moves.rows_between(N) + plan.old.pulls.rows_between(N)).sum() * lake.kv_bytes
            moved += plan.rows_shipped().sum() * 100
            assert moved <= found if replicated else moved == found  # a replica at hand is taken
            saved += found - moved
    assert (saved > 0) == replicated


def test_the_papers_figure_8():
    """Two batches whose prefixes lie crosswise: the least traffic is each where its prefix is; the
    negated weight of §5.2 would choose the most."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(4, 50, replicate_factor=0))
    lake.exchange_bytes, batches = 0, []
    for number, holder in enumerate((1, 0)):
        request = prepared(lake.balancer, number, tokens(17, number))
        for index in range(4):
            request.table[index] = holder * 50 + 10 * number + index
        lake.balancer.held[request.held_row] = [17 // 4 * (holder == 0), 17 // 4 * (holder == 1)]
        request.done, slot = 16, 50 * holder + 40
        batches.append([balancer.Run(request, 16, 1, 0, slot, True, True)])
    plan, transfer, groups = lake.gen_plans(batches, [1, 1], lake.get_prefix_tree())
    assert groups == [[1], [0]] and plan.rows_shipped().sum() == 0 == transfer.moves.rows_between(2).sum()


def plan_by_example():
    """The scene of tokenlake.py's docstring: a plan for two instances and three requests."""
    config = LakeConfig(segment_tokens=4, slots=10, replicate_factor=0)
    lake = TokenLake([0, 1], LlamaConfig(), config)
    scheduler = Scheduler(lake)
    prompt = list(range(10, 20))
    scheduler.add(Request(0, prompt[:], 14))
    plan, _, _ = lake.gen_plans(*scheduler.schedule(), lake.get_prefix_tree())
    scheduler.update(plan, {0: 7})
    scheduler.add(Request(1, prompt[:4] + [1, 2, 3, 4, 5], 12))
    scheduler.add(Request(2, prompt[:8], 10))
    return lake.gen_plans(*scheduler.schedule(), lake.get_prefix_tree())


def test_the_plan_of_the_docstring():
    """Its table line by line, made from the plan; and what travels there."""
    plan, transfer, groups = plan_by_example()
    between = lambda first, n: f"{first}" if n == 1 else f"{first}–{first + n - 1}"
    reads = [[[], []] for _ in plan.runs]
    for instance in (0, 1):
        for run, _, _, length, position in golden_plans.reads_of_runs(plan, instance):
            reads[run][instance].append((position, between(position, length)))
    table = plan.run_table
    for run, where in enumerate(reads):
        home = f"slot {table.slot[run]}" if table.puts[run] else "–"
        found = [", ".join(text for _, text in sorted(spans)) or "–" for spans in where]
        rows = between(table.position[run], table.rows[run])
        line = (f"{run:>10}  {table.request_id[run]:>7}  {rows:<4}  {table.instance[run]:>8}  "
                f"{home:<7}  {found[0]:<12}  {found[1]}")
        assert line in tokenlake.__doc__, line
    assert plan.ships.tolist() == [[False, True], [False, False], [True, False], [True, False]]
    assert groups == [[0, 0], [1, 1]] and not len(transfer.moves.kind)
    assert plan.reads.tolist() == [14, 8]
    assert plan.token_ids.tolist() == [7, 1, 2, 3, 4, 5, 17]


def altered(value, path=""):
    """Copies of a plan, or of a part of it, each with one leaf changed, and where: (path, copy).
    What is not in the digest by itself is left as it is."""
    if isinstance(value, np.ndarray):
        for i in range(value.size):
            other = value.copy()
            other.flat[i] = not other.flat[i] if other.dtype == bool else other.flat[i] + 1
            yield path, other
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            for where, part in altered(getattr(value, name), f"{path}.{name}"):
                yield where, value._replace(**{name: part})
    elif is_dataclass(value):
        for part in fields(value):
            if part.metadata.get("digest", True):
                for where, other in altered(getattr(value, part.name), f"{path}.{part.name}"):
                    yield where, replace(value, **{part.name: other})
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            for where, other in altered(item, path):
                yield where, (*value[:i], other, *value[i + 1:])
    else:
        yield path, value + 1


def test_the_digest_covers_every_leaf_of_a_plan():
    """Each number of the plans changes it, also the slots of the tables that are read; so does each
    token of the planned rows, and the iteration. Every column has been there."""
    seen, read_slots = set(), 0
    for plan, transfer in golden_plans.busy_plans(seeds=range(40), enough=4):
        digest = pool.plan_digest(7, plan, transfer)
        assert digest == pool.plan_digest(7, plan, transfer) != pool.plan_digest(8, plan, transfer)
        for where, other in altered(plan, "query"):
            seen.add(where)
            vars(other).update(segment_reads=plan.segment_reads, token_ids=plan.token_ids,
                               samples=plan.samples)
            assert pool.plan_digest(7, other, transfer) != digest, where
        for where, other in altered(transfer, "transfer"):
            seen.add(where)
            assert pool.plan_digest(7, plan, other) != digest, where
        reads, replicas = plan.segment_reads, plan.old.replicas
        others = set(zip(replicas.share.tolist(), replicas.segment.tolist()))
        for share, segment in zip(reads.share.tolist(), reads.segment.tolist()):
            if (share, segment) not in others:  # those are leaves of their own
                tables = [table.copy() for table in plan.old.tables]
                tables[share][segment] += 1
                other = replace(plan, old=replace(plan.old, tables=tables))
                assert pool.plan_digest(7, other, transfer) != digest
                read_slots += 1
        for run in plan.runs:
            for position in range(run.position, run.position + run.rows):
                run.request.tokens[position] += 1
                assert pool.plan_digest(7, replace(plan), transfer) != digest
                run.request.tokens[position] -= 1
            if run.samples:  # with a token more it would not
                run.request.tokens.append(0)
                assert pool.plan_digest(7, replace(plan), transfer) != digest
                run.request.tokens.pop()
        assert pool.plan_digest(7, replace(plan), transfer) == digest
        assert plan.samples.tolist() == [run.samples for run in plan.runs]
    names = {f"query.run_table.{name}" for name in pool.RunTable._fields}
    names |= {f"query.old.{name}" for name in ("tokens", "replicas.share", "replicas.segment",
                                               "replicas.slot")}
    names |= {f"query.old.pulled.{name}" for name in pool.PulledSegments._fields}
    names |= {f"query.fresh.{name}" for name in pool.FreshReads._fields}
    names |= {f"{where}.{name}" for name in pool.Moves._fields
              for where in ("query.old.pulls", "transfer.moves")}
    names |= {f"transfer.writes.{name}" for name in pool.SlabWrites._fields}
    names |= {f"query.{name}" for name in ("ships", "reads", "load", "tokens_read", "sizes")}
    assert seen == names | {"transfer.num_instances"} and read_slots > 20


def test_stripe_spreads_a_long_prefix():
    """Consecutive segments live on consecutive instances; with hash, where their hash says."""
    for placement, even in (("stripe", True), ("hash", False)):
        bal = Balancer(4, 100, 4, placement)
        request = Request(0, tokens(160, 0), 170)
        bal.admit(request, bal.match(request))
        bal.reserve(request, 160, [0] * 4, [0] * 4, 1000)
        homes = [int(slot) // 100 for slot in request.table[:40]]
        steps = {(b - a) % 4 for a, b in zip(homes, homes[1:])}
        assert (steps == {1}) == even


def test_free_slots_anywhere_come_before_eviction():
    """At home first, then where the most are free."""
    bal = Balancer(3, 4, 2)
    del bal.free[0][:2]
    assert [bal._allocate(1) // 4 for _ in range(10)] == [1] * 4 + [2, 2, 0, 2, 0, 2]
    assert bal._allocate(1) is None and bal.evictions == 0


def prepared(bal, id, prompt, output=10, publish=True):
    """A request admitted, its prompt reserved and, if wanted, computed."""
    request = Request(id, prompt, len(prompt) + output)
    bal.admit(request, bal.match(request))
    if rows := len(prompt) - request.done:
        N = bal.num_instances
        assert bal.reserve(request, rows, [0] * N, bal.open_tails([]), 1000)
        if publish:
            bal.commit(request, rows)
    return request


def test_other_children_go_where_their_hash_says():
    """A first child lives after its parent; the second where its id says; and when the children
    are evicted, the next is a first child again."""
    bal = Balancer(5, 40, 4)
    stem = tokens(4, 0)
    prepared(bal, 0, stem)
    parent = next(iter(bal.tree.segments.values()))
    homes = []
    for id in range(1, 9):
        request = prepared(bal, id, stem + tokens(4, id))
        homes.append(((int(request.table[1]) // 40 - parent.slot // 40) % 5,
                      (int.from_bytes(request.ids[1][:8], "little") - parent.slot // 40) % 5))
        bal.release(request)
    assert homes[0][0] == 1 and all(home == hashed for home, hashed in homes[1:])
    assert any(hashed != 1 for _, hashed in homes[1:])
    while parent.children:
        slot = bal.tree.evict()
        bal.free[slot // bal.slots].append(slot)
    request = prepared(bal, 9, stem + tokens(4, 9))
    assert (int(request.table[1]) // 40 - parent.slot // 40) % 5 == 1


def test_open_tails_spread():
    """With nothing else to tell instances apart, every one gets as many open tails."""
    lake = TokenLake([0, 1, 2], LlamaConfig(), LakeConfig(segment_tokens=16, slots=20))
    scheduler = Scheduler(lake)
    for id in range(9):
        scheduler.add(Request(id, tokens(3, id), 20))
    scheduler.schedule()
    assert lake.balancer.open_tails(scheduler.running) == [3, 3, 3]


def test_admission_counts_what_is_promised_and_what_would_be_pinned():
    """Two prompts that fit alone but not together: the second waits. A matched prefix that nobody
    reads is not there to be evicted for the rest of the same request."""
    lake = TokenLake([0], LlamaConfig(), LakeConfig(segment_tokens=4, slots=10, chunk_tokens=4))
    scheduler = Scheduler(lake)
    for id in range(2):
        scheduler.add(Request(id, tokens(24, id), 25))
    batches, _ = scheduler.schedule()
    assert [r.id for r in scheduler.running] == [0] and sum(run.rows for run in batches[0]) == 4
    bal = Balancer(1, 10, 4)
    stem = tokens(24, 0)
    bal.release(prepared(bal, 0, stem))
    prepared(bal, 1, tokens(8, 7))  # pins two more: two are free
    longer = Request(2, stem + tokens(9, 1), 40)
    assert not bal.fits(longer, bal.match(longer), 0)
    longer = Request(3, stem + tokens(8, 1), 40)
    assert bal.fits(longer, bal.match(longer), 0) and not bal.fits(longer, bal.match(longer), 1)


def test_prompt_rows_share_a_budget():
    """N·chunk prompt rows per iteration, the most urgent first; decodes are not counted."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(segment_tokens=4, slots=99, chunk_tokens=10))
    scheduler = Scheduler(lake)
    for id, length in enumerate((1, 13, 30)):
        scheduler.add(Request(id, tokens(length, id), 60))
    batches, dops = scheduler.schedule()
    rows = Counter()
    for batch in batches:
        for run in batch:
            rows[run.request.id] += run.rows
    assert rows == {0: 1, 1: 13, 2: 7} and dops == [1, 1]
    assert max(sum(run.rows for run in batch) for batch in batches) <= 11 + 4


def test_queue_is_by_arrival_and_lets_others_pass_who_waits_for_a_prefix():
    """A later turn has a small id but comes last; an unrelated request passes one that waits for
    a prefix in progress; a preempted one goes before all that wait."""
    lake = TokenLake([0], LlamaConfig(), LakeConfig(segment_tokens=4, slots=99, chunk_tokens=4))
    scheduler = Scheduler(lake)
    same = tokens(16, 0)
    for id, prompt in ((5, same), (4, same), (3, tokens(16, 1)), (1, tokens(16, 2))):
        scheduler.add(Request(id, prompt, 30))
    scheduler.schedule()
    assert [r.id for r in scheduler.running] == [5, 3, 1] and [
        r.id for r in scheduler.waiting] == [4]
    scheduler.add(Request(0, tokens(5, 3), 30))
    scheduler._preempt()
    assert [r.id for r in scheduler.waiting] == [4, 1, 0]


def test_lakes_need_not_span_the_cluster(tmp_path):
    """A lake over ranks 0 and 2 of three, and one of rank 1 alone, served side by side: every rank
    runs both control planes, and nothing hangs. Unordered instances are refused."""
    trace = write_trace(tmp_path, CHAT[:2])
    results = Job(["--trace", trace, "--speed", "inf"], 3, "two_lakes").finish()
    prompts = [tokens(50, 1), tokens(40, 2)]
    expected = [generate(small_model(), prompt, 5) for prompt in prompts]
    for *_, seen in results:
        assert seen["tokens"] == expected
    assert [seen["bytes"] > 0 for *_, seen in results] == [True, False, True]
    with pytest.raises(pool.LakeError, match="ascending"):
        TokenLake([1, 0], LlamaConfig(), LakeConfig())


def two_lakes(rank, seen):
    def observe(server, finished):
        if seen:
            return
        config = LakeConfig(segment_tokens=4, slots=50)
        lakes = [TokenLake(ranks, LlamaConfig(), config, server.cluster, torch.float64)
                 for ranks in ([0, 2], [1])]
        seen.update(tokens=[], bytes=0)
        for lake, prompt in zip(lakes, (tokens(50, 1), tokens(40, 2))):
            scheduler = Scheduler(lake)
            request = Request(0, list(prompt), len(prompt) + 5)
            scheduler.add(request)
            engine = run_cluster.Engine(server.cluster, lake, scheduler, small_model(), Sampler())
            while scheduler.waiting or scheduler.running:
                engine.step()
            seen["tokens"].append(request.tokens[request.num_prompt:])
            seen["bytes"] += sum(lake.pool.bytes.values()) if lake.pool else 0
    return observe


def test_plans_that_cannot_be_are_refused():
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(segment_tokens=4))
    tree = lake.get_prefix_tree()
    request = prepared(lake.balancer, 0, tokens(8, 0), publish=False)
    run = balancer.Run(request, 0, 4, 0, int(request.table[0]), True, False)
    for dops in ([3], [0]):
        with pytest.raises(pool.LakeError, match="DoPs"):
            lake.gen_plans([[run]], dops, tree)
    with pytest.raises(pool.LakeError, match="own prefix tree"):
        lake.gen_plans([[run]], [1], PrefixTree())
    _, plan, _ = lake.gen_plans([[run]], [1], tree)
    index = int(plan.writes.instance[0])
    writes = plan.writes._replace(slab_row=plan.writes.slab_row * 0 + 100)
    beyond = replace(plan, writes=writes)
    with pytest.raises(pool.LakeError, match="to write slab row 103, its slab has 103"):
        pool.KVBuffer(beyond, index, 103, "cpu")
    staged = pool.KVBuffer(beyond, index, 104, "cpu")
    assert staged.slab_rows.tolist() == [100, 101, 102, 103]


def test_get_cache_load():
    """§6.1 with the corrected FLOPs, by hand; more cache is more load, none without requests."""
    config = LlamaConfig()
    lake = TokenLake([0, 1], config, LakeConfig(segment_tokens=16))
    tree = lake.get_prefix_tree()
    request = Request(0, tokens(100, 0), 110)
    assert lake.get_cache_load([], tree) == 0
    fresh = lake.get_cache_load([request], tree, flops=1e9, bandwidth=1e9)
    lake.balancer.admit(request, lake.balancer.match(request))
    lake.balancer.reserve(request, 64, [0, 0], [0, 0], 1000)
    lake.balancer.commit(request, 64)
    memory = 3 * (2 * 4 * 16 * 4) * 100
    compute = 3 * 4 * 8 * 16 * 64 * 36
    ideal = 2 * config.num_linear_parameters * 36 / (2 * 1e9)
    expected = max(memory / (memory + 2e9 * ideal), compute / (compute + 2e9 * ideal))
    assert lake.get_cache_load([request], tree, flops=1e9, bandwidth=1e9) == pytest.approx(expected)
    assert fresh < expected < 1


def test_a_prefix_of_several_requests_is_one_load():
    """Two that match the same segments read them once; their own parts count apart. Distinct
    prompts of the same lengths are more load."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(segment_tokens=16))
    tree, config = lake.get_prefix_tree(), LlamaConfig()
    prepared(lake.balancer, 0, tokens(64, 0))
    alike = [Request(id, tokens(64, 0) + tokens(20, id), 90) for id in (1, 2)]
    memory = 3 * (2 * 4 * 16 * 4) * (64 + 20 + 20)
    compute = 3 * 4 * 8 * 16 * (64 * 20) * 2
    linear = 2 * config.num_linear_parameters * 40
    expected = max(memory / (memory + linear * 1e-3), compute / (compute + linear))
    found = lake.get_cache_load(alike, tree, flops=1e12, bandwidth=1e9)
    assert found == pytest.approx(expected) and memory / (memory + linear * 1e-3) == found
    prepared(lake.balancer, 3, tokens(64, 3))
    apart = [alike[0], Request(4, tokens(64, 3) + tokens(20, 4), 90)]
    assert lake.get_cache_load(apart, tree, flops=1e12, bandwidth=1e9) > found


# ── figures of the README ─────────────────────────────────────────────────────────────────────

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn_figures(tmp_path_factory):
    """All that bench/lesson.py writes, by name."""
    folder = tmp_path_factory.mktemp("figures") / "new"
    command = [sys.executable, HERE / "bench/lesson.py", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


def texts_of(figure: bytes, look=None):
    root = ElementTree.fromstring(figure)
    return [text for text in root.iter(f"{SVG}text") if look in (None, *text.get("class", "").split())]


def extent(text):
    """Left, right, top and bottom of a text, in letters as wide as DejaVu Sans has them."""
    look = text.get("class", "").split()
    size = 14 if "head" in look else 12 if {"small", "code"} & {*look} else 13
    widths = (0.42 if c in " ijl.,:;'|!ftrI()" else 0.98 if c in "mwMW" else 0.64 + 0.12 * c.isupper()
              for c in text.text)
    width = size * (0.61 * len(text.text) if "code" in look else sum(widths) * (1 + 0.1 * ("head" in look)))
    before = dict(start=0, middle=0.5, end=1)[text.get("text-anchor", "start")]
    x, y = float(text.get("x")), float(text.get("y"))
    return x - before * width, x + (1 - before) * width, y - 0.75 * size, y + 0.25 * size


def test_figures_of_the_readme_are_those_of_the_program(drawn_figures):
    """To the byte, and all of them."""
    kept = {path.stem: path.read_bytes() for path in report.FIGURES.glob("*.svg")}
    assert len(drawn_figures) == 7 and drawn_figures.items() <= kept.items()


def test_figures_of_the_readme_stand_alone_on_any_page(drawn_figures):
    """Small files, which name themselves, have colours for light pages and for dark ones, no
    background, and nothing from elsewhere."""
    for name, figure in drawn_figures.items():
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img" and root.get("viewBox") == f"0 0 760 {root.get('height')}"
        title, description, style = root[:3]
        assert title.text and description.text, name
        assert style.text.count("@media (prefers-color-scheme: dark)") == 1
        text = figure.decode()
        assert len(figure) < 15_000 and not re.search(r"href|url\(|@import|<script|<image", text), name
        assert text.count("http") == 1  # the name of the language
        assert not any(shape.get("width") in ("100%", "760") for shape in root.iter(f"{SVG}rect"))
        sizes = [float(size) for size in re.findall(r"([\d.]+)px", style.text)]
        assert min(sizes) >= 12
        known = {*re.findall(r"\.([a-z]+)(?=[ ,])", style.text), "ink"}
        used = {look for part in root.iter() for look in part.get("class", "").split()}
        assert used <= known, name


def test_colours_of_figures_can_be_read():
    """Contrast, as WCAG 2 has it, of letters: 4.5 at least, on white and on a dark page."""
    import svg

    def light(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot(linear, (0.2126, 0.7152, 0.0722)) + 0.05
    for tones in svg.COLOURS.values():
        for tone, page in zip(tones, ("#ffffff", "#0d1117")):
            lower, higher = sorted((light(tone), light(page)))
            assert higher / lower >= 4.5, tone


def test_texts_of_figures_stay_where_they_belong(drawn_figures):
    """Within the figure, within their box, and off each other."""
    for name, figure in drawn_figures.items():
        root = ElementTree.fromstring(figure)
        extents = {text: extent(text) for text in root.iter(f"{SVG}text")}
        for text, (left, right, top, bottom) in extents.items():
            inside = 0 <= left and right <= 760 and 0 <= top and bottom <= int(root.get("height"))
            assert inside, (name, text.text, left, right)
        for group in root.iter(f"{SVG}g"):
            frame, *texts = group
            x, y, width, height = (float(frame.get(key)) for key in ("x", "y", "width", "height"))
            for text in texts:
                left, right, top, bottom = extents[text]
                inside = x <= left and right <= x + width and y <= top and bottom <= y + height
                assert inside, (name, text.text, right - left, width)
        for (one, a), (other, b) in itertools.combinations(extents.items(), 2):
            apart = a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
            assert apart, (name, one.text, other.text)


def test_figures_name_what_is_there(drawn_figures):
    """Functions of the code, and policies that are compared."""
    parts = balancer, engine_module, run_cluster, scheduler_module, tokenlake
    named = {name: [call for text in texts_of(figure, "code") for call in text.text.split(", ")]
             for name, figure in drawn_figures.items()}
    for policy in named.pop("lakes"):
        simulate.check_policy("--policy", policy, 4)
    assert len(named["life"]) >= 16 and set(named["agree"]) >= {"TokenLake.gen_plans"}
    for call in itertools.chain(*named.values()):
        owner, function = call.split(".")
        (found,) = {getattr(part, owner) for part in parts if hasattr(part, owner)}
        assert callable(getattr(found, function)), call


def test_bytes_in_figures_are_counted_by_hand(drawn_figures):
    """Of Llama-3.1-8B in bf16: 32 heads of 128, 8 of KV. Query and result have two bytes a value,
    LSE four a head."""
    said = {name: " ".join(text.text for text in texts_of(figure)) for name, figure in drawn_figures.items()}
    query = result = 32 * 128 * 2
    row = query + result + 32 * 4
    segment = 512 * 2 * 8 * 128 * 2
    assert (row, segment) == (16_512, 2_097_152)  # 16.5 kB and 2.1 MB, as the README has them
    assert "lives: 2.1 MB" in said["pool"] and "instead: 16.5 kB, 127 times fewer" in said["pool"]
    assert segment / row == pytest.approx(127, abs=0.01) and "Break-even: 127 rows" in said["meet"]
    assert "16.5 kB travel in a layer, not 2.1 MB" in said["meet"]
    assert "2.1 MB are read a layer, not 67.1 MB" in said["once"]
    assert round(32 * segment / 1e6, 1) == 67.1
    units = re.findall(r"[\d.,]+ (\w*)(?:B|bytes)\b", " ".join(map(bytes.decode, drawn_figures.values())))
    assert len(units) > 10 and {*units} == {"k", "M"}


@pytest.mark.parametrize("rows, pulled", [(1, 0), (127, 0), (128, 1)])
def test_a_prompt_pulls_from_where_the_figure_says(rows, pulled):
    """A segment at another instance, for as many rows of a prompt."""
    import lesson

    share = SimpleNamespace(is_prompt=np.array([True]), part=np.array([0]), rows=np.array([rows]))
    found = lesson.LAKE._ship_or_pull(share, np.array([[0, lesson.C, 0]]))
    assert found.holder.tolist() == [1] * pulled


def test_fresh_kv_goes_as_the_figure_says(drawn_figures):
    """The prompt that is drawn, planned: who computes what, and which KV goes from whom to whom."""
    import lesson

    C, N = lesson.C, lesson.INSTANCES
    cached, end = lesson.CACHED * C, lesson.SEGMENTS * C
    lake = TokenLake(list(range(N)), lesson.LLAMA, LakeConfig(C, chunk_tokens=4 * C), dtype=torch.bfloat16)
    prepared(lake.balancer, 0, list(range(cached)))
    asked = Scheduler(lake)
    asked.add(Request(1, list(range(end)), end + 1))
    plan, transfer, _ = lake.gen_plans(*asked.schedule(), lake.get_prefix_tree())
    S = lake.balancer.slots
    first = plan.old.tables[0][0] // S  # the home of segment 0, which is instance 0 in the figure
    segment_at = {}
    for run in plan.runs:
        assert run.rows == C and run.preferred == run.slot // S == (first + run.position // C) % N
        segment_at[run.slot // S, (run.slot % S) * C] = run.position // C
    moves = transfer.moves
    sent = {pair: [] for pair in itertools.permutations(range(N), 2)}
    for source, row, target in zip(moves.source, moves.source_row, moves.target):
        pair = (source - first) % N, (target - first) % N
        sent[pair].append(segment_at[source, row])
    assert (moves.rows == C).all() and not plan.ships.any()
    assert len(plan.old.pulls.rows) == lesson.CACHED * (N - 1)
    assert sent == {pair: lesson.fresh_sent(*pair) for pair in sent} and all(sent.values())
    said = [text.text for text in texts_of(drawn_figures["split"], "kv")]
    assert sorted(said) == sorted(f"KV {lesson.named(segments)}" for segments in sent.values())


@pytest.mark.parametrize("decodes, reads", [(31, 1), (32, 1), (33, 2), (64, 2)])
def test_a_segment_is_read_as_often_as_the_figure_says(decodes, reads):
    """A program takes 32 rows of Llama-3.1-8B: so many decodes read a segment once."""
    import lesson

    number = np.arange(decodes)
    rows = QueryRows(number, number, np.full(decodes, lesson.C))
    spans = KVSpans(number, number * 0, np.full(decodes, lesson.C), number * 0)
    shape = lesson.LLAMA.num_heads, lesson.LLAMA.num_kv_heads, torch.bfloat16

    def tokens_read(**options):
        work = Work(rows, spans, *shape, **options)
        before = np.append(0, np.cumsum(work.tiles.length))
        return (before[work.pieces.end_tile] - before[work.pieces.first_tile]).sum()
    assert lesson.BLOCK == 32 and tokens_read() == reads * lesson.C
    assert tokens_read(share=False) == decodes * lesson.C


@pytest.mark.parametrize("arguments, said", [
    (["--output", "taken"], "--output taken: File exists; a folder that takes files is expected"),
    (["--output", "taken/in"], "--output taken/in: Not a directory; a folder that takes files is expected"),
    (["--output", ""], "argument --output: '': a file's name is expected"),
    (["pool"], "unrecognized arguments: pool"),
])
def test_wrong_options_of_figures_are_named(tmp_path, monkeypatch, capsys, arguments, said):
    import lesson

    (tmp_path / "taken").write_text("kept")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        lesson.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith(f"error: {said}")
    assert (tmp_path / "taken").read_text() == "kept"


@pytest.mark.parametrize("found, named", [
    ([[5, 23, 34], [4.6, 17, 31]], False),
    ([[5, 23, 4096], [4.6, 17, 31]], True),
    ([[90, 700, 3072], [0, 86, 31]], True),
    ([[0, 0, 0], [0, 0, 2048]], True),
    ([[4096] * 3] * 2, True),
])
def test_an_unlimited_goodput_leaves_others_room(found, named):
    """It has a tick of its own, a fifth over the highest of the others, which keep their places."""
    pytest.importorskip("matplotlib")
    policies = {
        policy: dict(capacities=[dict(capacity_tokens=n * 100_000, hit_rate=0.1 * n, p90_goodput=goodput)
                                 for n, goodput in enumerate(goodputs, 1)])
        for policy, goodputs in zip(("tokenlake", "router"), found)}
    plt = drawing.pyplot()
    axis = drawing.draw_capacity(plt, policies, compare.NO_LIMIT).axes[1]
    names = [label.get_text() for label in axis.get_yticklabels()]
    ticks = axis.get_yticks()
    assert names.count("unlimited") == named
    limited = [goodput for goodputs in found for goodput in goodputs if goodput <= 1024]
    most = max(limited, default=0)
    level = 1.2 * most or 1
    for line, goodputs in zip(axis.lines, found):
        assert line.get_ydata() == pytest.approx([min(goodput, level) for goodput in goodputs])
    if named:
        assert ticks[-1] == level and names[-1] == "unlimited"
        assert axis.get_ylim()[1] == pytest.approx(1.05 * level)
        assert all(tick <= most for tick in ticks[:-1])
        assert [float(name) for name in names[:-1]] == pytest.approx(ticks[:-1])
    plt.close("all")


# ── load: rows that meet at a token read it once ──────────────────────────────────────────────


def reader(lake, id, slots, home, rows=1, decode=True, num_shared=0):
    """A run of a request whose old segments, full ones of four tokens, lie in these slots."""
    request = Request(id, tokens(4 * len(slots) + rows, id), 4 * len(slots) + rows + 9)
    lake.balancer.admit(request, 0)
    request.table[:len(slots) + 1] = [*slots, home]
    request.done, request.num_shared = 4 * len(slots), num_shared
    lake.balancer.held[request.held_row] = np.bincount(
        np.array(slots) // lake.config.slots, minlength=len(lake.instances))
    return balancer.Run(request, request.done, rows, home // lake.config.slots, home, True, decode)


def test_a_shared_segment_is_read_once():
    """By hand, with 3 rows as the ridge: two decodes share two segments, one is alone, and a prompt
    of 4 rows pulls its segment."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(4, 50, replicate_factor=0))
    lake.ridge, lake.query_bytes, lake.kv_bytes = 3, 100, 10
    a = reader(lake, 0, [0, 50], home=10, num_shared=2)
    b = reader(lake, 1, [0, 50], home=60, num_shared=2)
    alone = reader(lake, 2, [1], home=11)
    prompt = reader(lake, 3, [51], home=12, rows=4, decode=False)
    plan, _, groups = lake.gen_plans([[a, alone, prompt], [b]], [1, 1], lake.get_prefix_tree())
    assert groups == [[0, 0, 0], [1]] and plan.old.pulls.rows.tolist() == [4]
    fresh = 1 + 1 + 4 * 4
    assert plan.load.tolist() == [3 * 4 + 3 * 4 + 4 * 4 + fresh, 3 * 4 + 1]
    assert plan.tokens_read.tolist() == [4 + 4 + 4 + 1 + 1 + 4, 4 + 1]
    assert plan.reads.tolist() == [12, 12]  # once a request, and what is pulled where it lies
    lake.ridge = 1
    plan, _, _ = lake.gen_plans([[a, alone, prompt], [b]], [1, 1], lake.get_prefix_tree())
    assert plan.load.tolist() == [2 * 4 + 4 + 4 * 4 + fresh, 2 * 4 + 1]


def met_at(lake, plan, index):
    """(load, tokens read) of an instance, row by row and token by token."""
    old_tokens, readers, seen, fresh = Counter(), {}, set(), 0
    for run in plan.runs:
        id = run.request.id
        old_tokens[id] = max(old_tokens[id], run.request.done + (not run.puts))
    for number, place, first, length, position in golden_plans.reads_of_runs(plan, index):
        run = plan.runs[number]
        buffer = pool.HERE if place == pool.LATE else place  # both are the slab
        for i in range(length):
            seen.add((buffer, first + i))
            if position + i < old_tokens[run.request.id]:
                rows = {(run.request.id, run.position + row) for row in range(run.rows)}
                readers.setdefault((buffer, first + i), set()).update(rows)
            else:
                fresh += run.rows
    return fresh + sum(max(len(rows), lake.ridge) for rows in readers.values()), len(seen)


def test_loads_are_what_rows_meet():
    """Scenes with pulls, siblings, replicas and parts of one prompt, for several ridges: load and
    tokens read, against a count of rows and tokens."""
    saved = 0
    for seed in range(0, golden_plans.NUM_SCENES, 20):
        scene = golden_plans.Scene(seed)
        lake = scene.lake
        lake.ridge = 1 + seed % 7
        for _, made, _, _ in scene.plans():
            found = [met_at(lake, made, index) for index in range(len(lake.instances))]
            assert found == list(zip(made.load.tolist(), made.tokens_read.tolist()))
            saved += made.reads.sum() - made.tokens_read.sum() > 0
    assert saved > 20


SHARED = [dict(input_ids=tokens(32, 0) + tokens(4, id), output_length=3) for id in (1, 2)]


def test_kv_bytes_are_counted_by_hand(tmp_path):
    """Two requests behind two shared segments, on one rank: the second waits for the first one's
    prefix. Then the shared segments are read once for both."""
    run = serve(tmp_path, SHARED, "--segment-tokens", 16)
    first_prompt, both = 36, 32 + (4 + 1) + 4
    both_decode, last = 32 + (5 + 1) + (4 + 1), 32 + (5 + 1)
    kv_bytes = 3 * 2 * 4 * 16 * 8  # layers, K and V, heads, dim, float64
    read = first_prompt + both + both_decode + last
    assert run.summary["kv_bytes_read"] == read * kv_bytes
    assert f"KV read  {read * kv_bytes / 1e6:,.1f} MB" in run.text


@pytest.mark.parametrize("ranks", [1, 3])
def test_engine_and_simulator_read_the_same(tmp_path, monkeypatch, ranks):
    """Requests that come at once, so that no clock decides, on real ranks and simulated."""
    monkeypatch.setattr(simulate, "REUSE", 0)
    lines = SHARED + [dict(input_ids=tokens(48, id % 3) + tokens(30 * id, 50 + id),
                           output_length=4 + id) for id in range(9)]
    served = serve(tmp_path, lines, "--segment-tokens", 16, "--slots", 100, ranks=ranks).summary
    asked = (json.dumps(dict(line, timestamp=0)) for line in lines)
    config = LakeConfig(16, 100, chunk_tokens=64, max_batch=32 // ranks)
    made = baselines.make_fleet("tokenlake", ranks, LlamaConfig(), config)
    made.lakes[0].config = replace(made.lakes[0].config, max_batch=32)
    run = simulate.Simulation(
        made, traces.read_trace(asked, "x"), simulate.Roofline(LlamaConfig(), "a100")).run()
    summary = run.summary()
    token_bytes = 3 * 2 * 4 * 16
    assert served["kv_bytes_read"] / (8 * token_bytes) == run.tokens_read
    assert summary["kv_bytes_read"] == 2 * token_bytes * run.tokens_read
    assert served["computed_tokens"] == made.schedulers[0].counters["computed_tokens"]


# ── traces as people have them ────────────────────────────────────────────────────────────────


def read_bytes(folder, content, **options):
    """A trace's lines, read as the programs do."""
    path = folder / "t.jsonl"
    path.write_bytes(content)
    return traces.open_trace("--trace", path, **options)


@pytest.mark.parametrize("start, newline, end", [
    (b"", b"\n", b"\n"), (b"\xef\xbb\xbf", b"\r\n", b"\r\n\r\n"), (b"\xef\xbb\xbf\n", b"\n \t\n", b""),
    (b"\r\n\r\n", b"\r\n", b"\n\n\n")])
def test_blank_lines_marks_and_line_ends_do_not_count(tmp_path, start, newline, end):
    rows = [dict(GOOD, timestamp=at, output_length=at) for at in (3, 5, 8)]
    content = start + newline.join(json.dumps(row).encode() for row in rows) + end
    lines = read_bytes(tmp_path, content)
    assert [(line.index, line.timestamp, line.output_length) for line in lines] == [
        (0, 0, 3), (1, 2, 5), (2, 5, 8)]
    numbers = [number for number, text in enumerate(content.split(b"\n"), 1) if b"{" in text]
    assert [line.where for line in lines] == [f"{tmp_path}/t.jsonl:{n}" for n in numbers]
    replay.main(["--trace", str(tmp_path / "t.jsonl"), "--json"])
    simulate.main(["--trace", str(tmp_path / "t.jsonl")])
    assert run_cluster.run(["--trace", str(tmp_path / "t.jsonl"), "--trace-scale", "64"]) == 0


def test_null_says_nothing(tmp_path):
    """As writers of tables leave it where a row has no such key."""
    said = dict.fromkeys(["session_id", "chat_id", "parent_chat_id", "think_ms", "delay", "salt",
                          "prompt", "input_ids", "user"])
    rows = [GOOD | said, GOOD | said | dict(hash_ids=None, timestamp=2)]
    content = "\n".join(map(json.dumps, rows)).encode()
    warned = []
    one, other = read_bytes(tmp_path, content, warn=warned.append)
    assert (one.session_id, one.think_ms, one.salt, one.previous) == (None, 0, "", None)
    assert one.hash_ids == [1, 2] and other.hash_ids is None and not warned


@pytest.mark.parametrize("apart", [2**32, 2**63, 2**64 - 1])
def test_no_two_hash_ids_of_64_bits_are_alike(tmp_path, capsys, apart):
    """Signed or not: ids that are equal in 32 or 64 bits, in sign or in the last bit of a float are
    blocks of their own; the same id is the same block."""
    ids = [1, 1 - apart, 1 + apart] if apart < 2**63 else [1, 1 - 2**63, apart]
    rows = [dict(timestamp=0, input_length=512, output_length=1, hash_ids=[id]) for id in ids]
    path = write_trace(tmp_path, [dict(row, timestamp=1000 * i) for i, row in enumerate(rows)])
    lines = traces.open_trace("--trace", path)
    for tokens_of in (traces.RandomTokens(512, 64, 0), traces.NumberedTokens(64)):
        blocks = [tuple(tokens_of.of_block(line.hash_ids[0], 64)) for line in lines]
        assert len(set(blocks)) == 3 and tuple(tokens_of.of_block(1, 64)) == blocks[0]
        assert tuple(tokens_of.of_block(1, 9)) == blocks[0][:9]
    for program in (replay, simulate):
        program.main(["--trace", str(path), *(["--json"] if program is replay else [])])
        assert json.loads(capsys.readouterr().out)["hit_rate"] == 0
    served = serve(tmp_path, path, "--trace-scale", 8, "--segment-tokens", 8)
    assert served.summary["hit_rate"] == 0


def test_a_length_alone_shares_nothing(tmp_path, capsys):
    """Without hash_ids prompts are made of tokens of their own, within a session, too."""
    lines = [dict(timestamp=i, input_length=40, output_length=2, session_id=session)
             for i, session in enumerate(("a", "b", "a", None, None))]
    run = serve(tmp_path, lines, "--segment-tokens", 4, "--verify", ranks=2)
    assert [run.records[i]["input_length"] for i in range(5)] == [40] * 5
    assert run.summary["hit_rate"] == 0 and run.summary["verified"] == 5
    path = write_trace(tmp_path, lines)
    for program in (replay, simulate):
        program.main(["--trace", str(path), *(["--json"] if program is replay else [])])
        assert json.loads(capsys.readouterr().out)["hit_rate"] == 0


def watch_arrivals(rank, seen):
    """When requests came and ended, in ns of rank 0's clock; and who was told of pauses."""
    def observe(server, finished):
        for record in finished:
            seen[record["request_id"]] = record["arrival_s"], record["finished_s"]
    return observe


@pytest.mark.parametrize("spelling", ["delay", "think_ms"])
def test_later_turns_need_no_time_of_their_own(tmp_path, spelling):
    """As converters write sessions: the first turn has a timestamp, later ones a pause. A turn that
    has both waits for the later of the two."""
    lines = [dict(timestamp=0.5, session_id="s", input_ids=tokens(20, 1), output_length=3),
             dict(session_id="s", input_ids=tokens(5, 2), output_length=3, **{spelling: 400.0}),
             dict(timestamp=1.5, session_id="t", input_ids=tokens(20, 3), output_length=3),
             dict(timestamp=1001.5, session_id="t", input_ids=tokens(5, 4), output_length=3,
                  **{spelling: 1})]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = serve(tmp_path, path, "--speed", 2, prelude="watch_arrivals")
    assert run.tokens == oracle(lines)
    arrived, ended = zip(*(run.seen[0][i] for i in range(4)))
    assert arrived[0] == 0 and arrived[1] - ended[0] == pytest.approx(0.2, abs=1e-6)
    assert arrived[2] == 0.0005 and arrived[3] == 0.5005 and arrived[3] > ended[2] + 0.0005


CHATS = [dict(chat_id=7, parent_chat_id=-1, timestamp=0), dict(chat_id=9, parent_chat_id=7, timestamp=0),
         dict(chat_id=8, parent_chat_id=-1, timestamp=0.5), dict(chat_id=4, parent_chat_id=9, timestamp=1),
         dict(chat_id=5, parent_chat_id=9, timestamp=1), dict(chat_id=6, parent_chat_id=1000, timestamp=2),
         dict(chat_id=3, parent_chat_id=8, timestamp=2)]
PARENTS = [None, 0, None, 1, 1, None, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_chats_are_sessions(tmp_path, ranks):
    """Each line follows the one that its parent_chat_id names, two may follow the same; whose parent
    is not there is the first. Cut off at any request, and resumed, the answers are the same."""
    lines = [chat | dict(input_ids=tokens(9 + i, i), output_length=3) for i, chat in enumerate(CHATS)]
    expected, model, said = {}, small_model(), {}
    for i, (line, parent) in enumerate(zip(lines, PARENTS)):
        prompt = said.get(parent, []) + line["input_ids"]
        expected[i] = generate(model, prompt, 3, Sampler(), i)
        said[i] = prompt + expected[i]
    path = write_trace(tmp_path, lines)
    arguments = ["--trace-time-unit", "s", "--segment-tokens", 4]
    run = serve(tmp_path, path, *arguments, "--verify", ranks=ranks)
    assert run.tokens == expected and run.summary["verified"] == len(lines)
    assert [run.records[i]["session_id"] for i in range(7)] == [7, 7, 8, 7, 7, 6, 8]
    assert all(run.records[i]["cached_tokens"] >= 4 for i, parent in enumerate(PARENTS) if parent)
    (output,) = tmp_path.glob("out*")
    whole = (output / "requests.jsonl").read_text().splitlines()
    for kept in range(1, len(whole)):
        for verify in ("--verify", "--no-verify"):
            (output / "requests.jsonl").write_text("\n".join(whole[:kept]) + "\n")
            status = run_cluster.run([*map(str, arguments), "--trace", str(path), "--output", str(output),
                                      "--resume", verify, "--speed", "inf", "--dtype", "float64"])
            records = map(json.loads, (output / "requests.jsonl").read_text().splitlines())
            assert status == 0 and {r["request_id"]: r["output_ids"] for r in records} == expected


def test_a_trace_of_other_blocks(tmp_path, capsys):
    """As Bailian's: blocks of 16 tokens, times in seconds, chats whose prompts are complete. All
    programs find the same hits, where a segment is a block."""
    rows, block = [], 16
    for i, (chat, parent) in enumerate(zip(CHATS, PARENTS)):
        ids = (rows[parent]["hash_ids"][:-1] if parent is not None else []) + [100 * i, 100 * i + 1]
        rows.append(chat | dict(input_length=block * len(ids) - 5, output_length=2, hash_ids=ids,
                                type="text", turn=1))
    path = write_trace(tmp_path, rows)
    hits = sum(block * (len(row["hash_ids"]) - 2) for row in rows)
    expected = hits / sum(row["input_length"] for row in rows)
    form = ["--trace-block", "16", "--trace-time-unit", "s"]
    replay.main(["--trace", str(path), *form, "--segment-tokens", "16", "--json"])
    assert json.loads(capsys.readouterr().out)["hit_rate"] == pytest.approx(expected)
    simulate.main(["--trace", str(path), *form, "--model", "tiny"])
    assert json.loads(capsys.readouterr().out)["hit_rate"] == pytest.approx(expected)
    for scale in (1, 4):
        run = serve(tmp_path, path, *form, "--segment-tokens", block // scale, "--trace-scale", scale)
        prompts = [-(-row["input_length"] // scale) for row in rows]
        assert [run.records[i]["input_length"] for i in range(len(rows))] == prompts
        assert run.summary["hit_rate"] == pytest.approx(hits / scale / sum(prompts))
    known = write_trace(tmp_path, [dict(row, type=None, turn=None) for row in rows])
    for arguments, said in (
            (["--trace-block", 16, "--trace-scale", 32], "'32': a divisor of 16 is expected"),
            (["--trace-scale", 4], "hash_ids lists 2 blocks; input_length 27 makes 1 of 512 tokens")):
        assert said in refused(tmp_path, "--trace", known, *arguments)
    assert "--trace-block needs --trace" in refused(tmp_path, "--trace-block", 16)


@pytest.mark.parametrize("think_ms", [0, 3000])
def test_a_replay_honours_sessions_and_salts(tmp_path, capsys, think_ms):
    """Conversations by token ids, the same ones with two salts: what the replay hits is what a run on
    ranks does. A turn comes in a later iteration than its predecessor."""
    lines = [dict(session_id=i % 3, salt="ab"[i % 2], input_ids=tokens(4 + 3 * (i // 6), i // 6 + 9 * (i % 3)),
                  output_length=5, timestamp=0, think_ms=think_ms) for i in range(18)]
    path = write_trace(tmp_path, lines)
    replay.main(["--trace", str(path), "--segment-tokens", "4", "--instances", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    run = serve(tmp_path, path, "--segment-tokens", 4, ranks=2)
    assert found["hit_rate"] == pytest.approx(run.summary["hit_rate"]) and found["hit_rate"] > 0.4
    assert found["iterations"] == 3  # six sessions of three turns


def test_answers_in_a_replay_are_nobody_s(tmp_path, capsys):
    """Two sessions say the same: the second turns share what was said before the answers differ."""
    lines = [dict(session_id=session, input_ids=tokens(8, turn), output_length=9, timestamp=turn)
             for turn in range(2) for session in "ab"]
    path = write_trace(tmp_path, [lines[0], dict(lines[1], timestamp=0.5), *lines[2:]])
    replay.main(["--trace", str(path), "--segment-tokens", "4", "--instances", "1", "--json"])
    # 8 of the second's first prompt but for its last token; 16 of 17 before each second turn.
    assert json.loads(capsys.readouterr().out)["hit_rate"] == (7 + 16 + 16) / (8 + 8 + 25 + 25)


def write_tokenizer(folder):
    """Words to numbers, 0 before what begins."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<s>", "a", "lake", "of", "keys", "<?>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<?>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    made.add_special_tokens(["<s>"])
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(folder / "tokenizer.json"))
    return made


def test_prompts_may_be_text(tmp_path):
    """With a tokenizer: a session's first turn begins as texts begin, later ones go on; every answer
    is written as text, too."""
    save_model(tmp_path / "model", dict(vocab_size=6))
    write_tokenizer(tmp_path / "model")
    lines = [dict(prompt="a lake of keys", session_id=1, output_length=4),
             dict(prompt="keys of a lake", session_id=1, output_length=4),
             dict(prompt="lake", output_length=4), dict(input_ids=[1, 2], output_length=2)]
    run = serve(tmp_path, lines, "--model", tmp_path / "model", "--verify", ranks=2)
    config = load_config(tmp_path / "model")
    model = Llama(config, load_weights(tmp_path / "model", config, torch.float64, "cpu"))
    as_ids = [dict(lines[0], input_ids=[0, 1, 2, 3, 4]), dict(lines[1], input_ids=[4, 3, 1, 2]),
              dict(lines[2], input_ids=[0, 2]), lines[3]]
    assert run.tokens == oracle(as_ids, model)
    words = ["<s>", "a", "lake", "of", "keys", "<?>"]
    for id, answer in run.tokens.items():
        assert run.records[id]["output_text"] == " ".join(words[token] for token in answer if token)
    without = serve(tmp_path, as_ids[3:], "--model", tmp_path / "model")
    assert "output_text" not in without.records[0]
    refused_text = lambda: refused(tmp_path, "--trace", write_trace(tmp_path, lines[:1]), "--model",
                                   tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert "model/tokenizer.json: not a tokenizer: " in refused_text()
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "jsonl:1: prompt is text, and there is no " in refused_text()
    assert "the built-in model has no tokenizer; token ids (input_ids) are expected" in refused(
        tmp_path, "--trace", write_trace(tmp_path, lines[:1]))


def test_half_a_character_is_no_text(tmp_path):
    """A lone surrogate, which JSON can have: one line, also with several ranks."""
    write_tokenizer(save_model(tmp_path / "model"))
    trace = write_trace(tmp_path, [dict(prompt="a\ud800b", output_length=3)])
    said = f"{trace}:1: prompt has half of a character (a surrogate); text is expected"
    assert said in refused(tmp_path, "--trace", trace, "--model", tmp_path / "model", ranks=2)


def test_no_more_tokens_are_made_than_a_prompt_has(tmp_path, capsys):
    """Blocks may be as long as they like; a request longer than any memory is refused by its line."""
    block = ["--trace-block", str(2**40)]
    lines = [dict(input_length=5, output_length=2, hash_ids=[1]),
             dict(input_length=9, output_length=2, hash_ids=[1], timestamp=9)]
    path = write_trace(tmp_path, lines)
    run = serve(tmp_path, path, *block, "--segment-tokens", 1)
    assert run.records[1]["cached_tokens"] == 5
    replay.main(["--trace", str(path), *block, "--segment-tokens", "1", "--json"])
    simulate.main(["--trace", str(path), *block, "--model", "tiny"])
    capsys.readouterr()
    path = write_trace(tmp_path, [dict(GOOD, input_length=2**34, hash_ids=None)])
    for program in (replay, simulate):
        with pytest.raises(SystemExit, match="2"):
            program.main(["--trace", str(path), "--capacity-tokens", str(2**30)])
        said = f"{path}:1: prompt and answer are {2**34 + 3} tokens; at most {2**30} are expected\n"
        assert said in capsys.readouterr().err


def test_chats_that_are_not_there_are_told(tmp_path):
    """In one line; whoever follows them begins. And of many unknown keys ten are named."""
    rows = [chat | dict(input_ids=[1, 2], output_length=1) for chat in CHATS]
    rows[4]["parent_chat_id"] = "9"  # not the number
    warned = []
    lines = traces.read_trace(map(json.dumps, rows), "t", warn=warned.append)
    assert [line.previous and line.previous.index for line in lines] == [
        None, 0, None, 1, None, None, 2]
    assert warned == ["2 lines follow a parent_chat_id that no line before has with this salt, so they "
                      "begin chats (the first is t:5)"]
    del warned[:]
    rows = [dict(GOOD, **{f"key{i}": 1}) for i in range(30)]
    traces.read_trace(map(json.dumps, rows), "t", warn=warned.append)
    assert len(warned) == 11 and "key9" in warned[9]
    assert warned[10] == "t:11: more keys are ignored, of which nothing is said"


def test_a_long_session_is_no_burden(tmp_path):
    """Only the newest turn of a conversation is kept in a replay and in a simulation."""
    lines = [dict(session_id=1, input_ids=[1, 2], output_length=2, timestamp=i) for i in range(50)]
    made = traces.read_trace(map(json.dumps, lines), "t")
    bal, most = Balancer(1, 400, 4), []
    original = replay.Replay.iterate

    def iterate(self, timestamp, arrived):
        most.append(sum(line.request is not None for line in made))
        original(self, timestamp, arrived)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.Replay, "iterate", iterate)
        replay.replay(made, bal, traces.NumberedTokens(512))
    assert len(most) == 50 and max(most) == 1
    made = traces.read_trace(map(json.dumps, lines), "t")
    fleet_of_one = fleet("tokenlake", 1000)
    simulate.Simulation(fleet_of_one, made, simulate.Roofline(LlamaConfig(), "a100")).run()
    assert not any(line.request for line in made)


def test_a_turn_behind_a_refused_one_is_shorter(tmp_path, capsys):
    """Nothing was answered before it, so a simulation counts what its prompt has, not what it might
    have."""
    lines = [dict(session_id=1, input_length=1000, output_length=10**6, timestamp=0),
             dict(session_id=1, input_ids=[1] * 100, output_length=10)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    simulate.main(["--trace", str(path), "--capacity-tokens", "900000"])
    summary = json.loads(capsys.readouterr().out)
    assert (summary["completed"], summary["refused"]) == (1, 0.5)
    assert summary["total_input_tokens"] == 1100
    assert summary["normalised_ttft"] == pytest.approx(summary["mean_ttft_ms"] / 1100)


def test_a_rate_moves_sessions_and_not_what_users_think(tmp_path, capsys):
    """Of a file: its sessions come so often that their turns do; think times stay. Where all begin
    at once, or the load has times of its own, a rate is refused."""
    rows = [dict(timestamp=10 * i, session_id=i % 10, think_ms=2000, input_length=64, output_length=2)
            for i in range(10)]
    rows += [dict(row, timestamp=None) for row in rows for _ in range(2)]
    path = write_trace(tmp_path, rows)
    found = {}
    for rate in (1.0, 3.0):
        simulate.main(["--trace", str(path), "--rate", str(rate)])
        found[rate] = json.loads(capsys.readouterr().out)["duration"]
    for rate, duration in found.items():  # the last session begins after all, and thinks twice
        assert duration == pytest.approx(30 / rate + 4, abs=0.3)
    at_once = write_trace(tmp_path, [GOOD, dict(GOOD, timestamp=1)])
    for arguments, said in ((["--trace", str(at_once)], "begin at once; times that differ"),
                            (["--workload", "demo", "--model", "tiny"], "times of its own")):
        with pytest.raises(SystemExit, match="2"):
            simulate.main([*arguments, "--rate", "2"])
        assert said in capsys.readouterr().err


def test_what_is_sent_is_the_mean_of_all_iterations(monkeypatch, capsys):
    """Also of those that use a plan again."""
    every, original = [], simulate.Simulation.call_at

    def call_at(self, time, action, *arguments):
        if getattr(action, "__name__", "") == "finish":
            every.append(self.last_iteration[arguments[0]].traffic)
        original(self, time, action, *arguments)
    monkeypatch.setattr(simulate.Simulation, "call_at", call_at)
    simulate.main(["--num-requests", "10"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["iterations"] == len(every) > 2 * len(set(map(id, every)))
    assert summary["sent_mib"] == pytest.approx(np.mean([traffic.sent_mib for traffic in every]))
    assert summary["fan_out"] == max(traffic.fan_out for traffic in every) <= 3


@pytest.mark.slow
def test_a_soak_without_a_kill_proves_nothing(tmp_path, capsys):
    status = soak.main(["--num-requests", "4", "--kill-every", "1e6", "--ranks", "1"])
    assert status == 1 and "no rank was killed; more requests" in capsys.readouterr().err


def test_a_file_is_a_file_whatever_it_is_called(tmp_path, monkeypatch, capsys):
    """--trace loogle is not the generated load; what it lacks is said of --trace; its lines count,
    and a key is warned of once."""
    monkeypatch.chdir(tmp_path)
    Path("loogle").write_text(json.dumps(dict(GOOD, other=1, output_length=1)) + "\n")
    simulate.main(["--trace", "loogle"])
    out, said = capsys.readouterr()
    assert json.loads(out)["completed"] == 1 and said.count("unknown key") == 1
    assert "the first 1 requests of loogle at its own times" in said
    simulate.main(["--table", "--trace", "loogle", "--num-requests", "2"])
    assert "first 2 requests" in capsys.readouterr().out.splitlines()[1]
    simulate.main(["--table", "--trace", "loogle", "--num-requests", "2"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert "pd:3x1" in row and " – " in row  # its only answer is one token
    os.mkfifo("pipe")
    for name, expected in (("none", "--trace none: No such file"), ("pipe", "can be read twice")):
        with pytest.raises(SystemExit, match="2"):
            simulate.main(["--trace", name])
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        simulate.main(["--trace", "loogle", "--workload", "mixed"])
    assert "--workload has a load, too" in capsys.readouterr().err


def test_too_few_iterations_do_not_fit(tmp_path):
    path = write_trace(tmp_path, [dict(input_ids=[1, 2], output_length=2)])
    command = [sys.executable, HERE / "bench" / "simulate.py", "--validate", "--trace", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "10 are expected (more requests)\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_output_may_lack_characters(tmp_path):
    """Of an encoding that has neither dashes nor the name of the trace."""
    path = tmp_path / "x\udcff.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    for program in ("balancer.py", "bench/simulate.py"):
        done = subprocess.run([sys.executable, HERE / program, "--trace", path], capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
        assert done.returncode == 0 and b"\\udcff" in done.stdout + done.stderr, done.stderr


def test_text_needs_a_package(tmp_path, monkeypatch):
    """Which is named where it is not installed, and asked for only where a trace has text."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    text = model_module.Text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="`pip install tokenizers`, or token ids .input_ids., are exp"):
        text.encode("a", True)
    assert not text.is_used


def test_pauses_are_shown(tmp_path):
    """In a log once for each, in seconds; where all comes at once nothing is said."""
    lines = [dict(timestamp=at, input_ids=tokens(5, at), output_length=2) for at in (0, 5000, 5001, 12000)]
    path = write_trace(tmp_path, lines)
    text = serve(tmp_path, path, "--speed", 2, ranks=2).text
    assert [line for line in text.splitlines() if "arrival" in line] == [
        "run_cluster.py: next arrival in 2 s", "run_cluster.py: next arrival in 3 s"]
    assert "arrival" not in serve(tmp_path, path).text


# ── modules run alone show their lesson, and a lake of one needs no cluster ──────────────────────


@cache
def run_alone(name, *arguments):
    """A module as a newcomer runs it: what it says."""
    done = subprocess.run([sys.executable, HERE / name, *arguments], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


LESSONS = "kernels.py", "work.py", "balancer.py", "pool.py", "tokenlake.py", "model.py"


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_ends_with_where_to_go_on(name):
    """That of the kernels goes on with the benchmark, which has the options."""
    lesson, _, benchmark = run_alone(name).partition("\n\nThe kernels, checked and timed:\n")
    *said, last = lesson.splitlines()
    assert len(said) > 5 and max(map(len, said)) <= 115
    assert re.match(r"Next: (\w+\.py), ", last) and (HERE / last[6:].split(",")[0]).exists()
    assert ("merge   tiny" in benchmark or GPU) == (name == "kernels.py")


def floats(line) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d+|-?inf", line)]


def test_kernels_show_parts_and_their_merge():
    """Merged by hand from what is printed, and recomputed in float64."""
    torch.manual_seed(0)
    q, kv = torch.randn(2, 1, 16).double(), torch.randn(12, 2, 1, 16).double()
    for row, part in enumerate(run_alone("kernels.py").split("\n\n")[1:3]):
        _, *parts, merged, whole = map(floats, part.splitlines())
        assert len(parts) == 3 and merged == whole
        assert sum(weight for _, _, weight in parts) == pytest.approx(1, abs=2e-4)
        assert math.log(sum(math.exp(lse) for _, lse, _ in parts)) == pytest.approx(merged[1], abs=2e-4)
        seen = (7, 12)[row]
        scores = kv[:seen, 0, 0] @ q[row, 0] / 4
        norm = float((scores.softmax(0) @ kv[:seen, 1, 0]).norm())
        assert whole == pytest.approx([norm, float(scores.logsumexp(0))], abs=1e-4)
    assert row == 1 and "-inf" in run_alone("kernels.py")  # row 6 sees none of the last part


def test_work_shows_what_is_read_once():
    """Tiles cover what is shared once, and what each has alone; pieces cover all (row, tile)."""
    tables = {}
    for part in run_alone("work.py").split("\n\n")[1:5]:
        title, *lines = part.splitlines()
        columns, *entries = [line.split() for line in lines if "  " in line.strip()]
        tables[title.split(":")[0]] = [dict(zip(columns, map(int, entry))) for entry in entries]
    spans, members, tiles, pieces = tables.values()
    covered = Counter(row for tile in tiles
                      for row in range(tile["first_row"], tile["first_row"] + tile["length"]))
    wanted = {row for s in spans for row in range(s["first_row"], s["first_row"] + s["length"])}
    assert set(covered) == wanted and set(covered.values()) == {1}
    assert f"\n{len(wanted)} slab rows are read; {sum(s['length'] for s in spans)} if" in run_alone("work.py")
    read = Counter()
    for piece in pieces:
        for tile in tiles[piece["first_tile"]:piece["end_tile"]]:
            for member in members[piece["first_member"]:piece["first_member"] + piece["rows"]]:
                assert tile["group"] == member["group"]
                read[member["row"]] += tile["length"]
    assert read == {row: member["position"] + 1 for member in members for row in [member["row"]]}


def test_balancer_shows_a_scene():
    """Homes are where the rule says, the replica is read, and the eviction is of a leaf."""
    scene = run_alone("balancer.py").split("\n\n")[1:6]
    places = [{line.split()[0]: [int(slot) for slot in re.findall(r"(\d+)@\d", line)]
               for line in part.splitlines()[1:]} for part in scene]
    for place in re.findall(r"\d+@\d", run_alone("balancer.py")):
        slot, instance = map(int, place.split("@"))
        assert slot // 6 == instance
    bal = Balancer(3, 6, 4)
    ids = []
    for number in range(4):
        request = Request(number, [*range(8), 20 + number, 0, 0, 0], 13)
        bal.extend_ids(request)
        ids.append(request.ids)
    by_hash = lambda id: int.from_bytes(id[:8], "little") % 3
    first = by_hash(ids[0][0])
    homes = [[slot // 6 for slot in place["homes"]] for place in places]
    assert homes[0] == [(first + i) % 3 for i in range(3)]
    assert homes[1:4] == [[by_hash(chain[2])] for chain in ids[1:]] and len(homes[4]) == 12
    copied, copy = places[2]["replica"]
    prefix = places[0]["homes"][:2]
    assert [place["hits"] for place in places[:3]] == [[], prefix, prefix] and copied == prefix[0]
    assert places[3]["hits"] == [copy, prefix[1]] and copy // 6 != copied // 6
    assert places[4]["eviction"] == places[0]["homes"][2:] and places[4]["homes"][-1] in places[4]["eviction"]
    left = re.findall(r"(\d+)@\d, as instance (\d) is full", run_alone("balancer.py"))
    stripe = zip(places[4]["homes"], places[4]["homes"][1:])
    assert left == [(str(slot), str((before // 6 + 1) % 3)) for before, slot in stripe
                    if slot // 6 != (before // 6 + 1) % 3]
    assert "copied" in run_alone("balancer.py") and "take 1 of the 18 slots, a 16th." in run_alone("balancer.py")
    assert sum(map(len, (place["homes"] for place in places))) + 1 == 18 + 1  # one slot twice


def test_pool_shows_a_journey():
    """Bytes and log-sum-exps, from the seeds, in one place."""
    slabs = []
    for rank in range(2):
        torch.manual_seed(rank)
        slabs.append(torch.empty(1, 8 + LakeConfig(4).staging(2), 2, 1, 8).normal_()[0])
        if rank == 0:
            new, q = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 8)
    kv = torch.cat((slabs[0][:4], slabs[1][:4], slabs[0][4:5], new)).double()
    scores = (kv[:, 0, 0] @ q[0].double().mT / 8**0.5)[:, 0]
    there = [*range(4, 8)]
    here = [i for i in range(10) if i not in there]
    said = run_alone("pool.py")
    lse = [float(x) for x in re.findall(r"LSE (-?\d\.\d{4})", said)]
    expected = [float(scores[keys].logsumexp(0)) for keys in (here, there, range(10), range(10))]
    assert lse == pytest.approx(expected, abs=1e-4)
    assert " of 8: 64 bytes (the KV that it is to meet has 256)" in said  # 2 · 8, 4 · 2 · 8 floats
    assert "of 8 + 1: 72 bytes" in said and "first_row 5" in said
    assert float(re.search(r"O differs by (\S+) at most", said)[1]) < 1e-5
    weights = re.search(r"by weights (\S+) and (\S+):", said).groups()
    assert sum(map(float, weights)) == pytest.approx(1, abs=2e-4)


def test_tokenlake_shows_the_seven_calls():
    """Each once for each request. The second reads four old tokens, and computes one row."""
    said = run_alone("tokenlake.py")
    for call in "get_prefix_tree get_cache_load gen_plans init_query init_transfer put query".split():
        assert said.count(f"  {call}(") == 2, call
    apart = [float(x) for x in re.findall(r"O \[[^]]*\], (\S+) from the softmax", said)]
    assert len(apart) == 2 and max(apart) < 1e-5
    assert [int(x) for x in re.findall("old tokens to read: (.+)", said)] == [0, 4]
    assert "Q [6, 2, 8] → O [6, 2, 8]" in said and "Q [1, 2, 8] → O [1, 2, 8]" in said


def test_tokenlake_shows_the_plan_of_its_docstring():
    """The same runs at the same instances; slots in which their old KV lies; and what travels."""
    lines = run_alone("tokenlake.py").split("\nrun  request")[1].splitlines()[1:5]
    shown = [re.split("  +", line.strip()) for line in lines]
    table = tokenlake.__doc__.split("reads at 1\n")[1].splitlines()[:4]
    assert [cells[:5] for cells in shown] == [re.split("  +", line.strip())[:5] for line in table]
    plan, _, _ = plan_by_example()
    for run, (*_, slots, targets) in enumerate(shown):
        old = plan.segment_reads.slot[plan.segment_reads.share == plan.run_table.share[run]]
        assert slots == ", ".join(map(str, old.tolist()))
        assert targets == (", ".join(map(str, np.flatnonzero(plan.ships[run]))) or "–")
    assert "Rows that travel: 3. Tokens whose KV does: 0." in run_alone("tokenlake.py")


def shown_answer(said):
    """Tokens and log-probabilities of model.py's table."""
    rows = [line.split() for line in said.splitlines() if re.match(r" +\d+ +\d+ +-\d", line)]
    return [int(token) for _, token, _ in rows], [float(logprob) for *_, logprob in rows]


@pytest.mark.parametrize("prompt, arguments", [
    ([9, 8, 7, 6], []), ([5], ["--prompt-ids", "5", "--max-tokens", "3"]),
    ([1, 2, 3], ["--prompt-ids", "1,2,3", "--model", "m", "--max-tokens", "12"])])
def test_model_answers_without_a_cache(tmp_path, capsys, prompt, arguments):
    """The oracle's tokens, and their log-probabilities: those of one forward over all."""
    config = LlamaConfig()
    model = Llama(config, random_weights(config, 0, torch.float32, "cpu"))
    if "m" in arguments:
        folder = save_model(tmp_path / "m")
        arguments = [str(folder) if argument == "m" else argument for argument in arguments]
        config = load_config(folder)
        model = Llama(config, load_weights(folder, config, torch.float32, "cpu"))
    options = model_module.parse_options(arguments)
    model_module.show_answer(options)
    said = capsys.readouterr().out
    assert arguments or said == run_alone("model.py")
    answer, found = shown_answer(said)
    assert answer == generate(model, prompt, options.max_tokens) and f"answer: {answer}\n" in said
    logits = model.forward_alone([*prompt, *answer[:-1]])[len(prompt) - 1:]
    expected = model_module.logprobs(logits, torch.tensor(answer))
    assert found == pytest.approx(expected.tolist(), abs=1e-3)
    total = len(prompt) + len(answer)
    assert f"{sum(range(len(prompt), total))} rows were computed; with a cache it would have been {total - 1}." in said


def test_model_answers_with_text(tmp_path, capsys):
    """Where the folder has a tokenizer: the prompt's, and the answer's."""
    folder = save_model(tmp_path / "m", dict(vocab_size=6))
    made = write_tokenizer(folder)
    model_module.show_answer(model_module.parse_options(["--model", str(folder), "--prompt-ids", "1,2"]))
    said = capsys.readouterr().out
    answer, _ = shown_answer(said)
    assert said.startswith("prompt: [1, 2] 'a lake'\n")
    assert f"answer: {answer} {made.decode(answer)!r}\n" in said


@pytest.mark.parametrize("arguments, said", [
    (["--prompt-ids", "1,600"], "--prompt-ids: token 600; ids below the model's 512 are expected"),
    (["--prompt-ids", "1,-2"], "--prompt-ids: '1,-2': token ids, by commas, are expected"),
    (["--prompt-ids", ""], "--prompt-ids: ''"), (["--prompt-ids", "9" * 5000], "token ids, by commas"),
    (["--max-tokens", "0"], "--max-tokens: '0': a positive integer is expected"),
    (["--max-tokens", "8189"], "--max-tokens: 8193 tokens with the prompt; at most 8192 are expected"),
    (["--max-tokens=--"], "--max-tokens=--: a value is expected"), (["--bogus"], "--bogus"),
    (["--model", "{tmp}/none"], "none/config.json: No such file"), (["--model", "x" * 5000], "a folder is exp"),
    (["--model", "ORG/NAME"], "nothing is downloaded"), (["--model", "{tmp}"], "config.json")])
def test_model_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises(ValueError) as caught:
        model_module.show_answer(model_module.parse_options(arguments))
    text = model_module.one_line(caught.value)
    assert said in text and len(text) < 240 + len(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_model_says_what_it_refuses():
    done = subprocess.run([sys.executable, HERE / "model.py", "--prompt-ids", "x\n"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "model.py: --prompt-ids: 'x\\n': token ids, by commas, are expected\n"


@pytest.mark.parametrize("name", ["kernels.py", "balancer.py"])
def test_options_are_those_of_the_benchmark(name):
    """With any there is no lesson, and what is wrong with them is one line."""
    done = subprocess.run([sys.executable, HERE / name, "--bogus"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "error: " in done.stderr


LISTING = (HERE / "bench" / "example.py").read_text().split("\n\nimport torch\n")[1]
LISTING = "import torch\n" + LISTING


def test_the_listing_is_short_and_hides_nothing():
    """It has all seven calls, and those of the balancer; the README shows it as it is."""
    lines = LISTING.splitlines()
    assert len(lines) <= 36 and max(map(len, lines)) <= 90
    calls = "get_prefix_tree get_cache_load gen_plans init_query query init_transfer put".split()
    for call in [f"lake.{call}(" for call in calls] + [
            f"balancer.{call}(" for call in "match admit reserve commit release".split()]:
        assert call in LISTING, call
    fenced = re.findall(r"^```\w*\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [block for block in fenced if "init_query" in block] == [LISTING]


def test_the_listing_finds_what_is_shared():
    """32 tokens are two segments; both answers are those of recomputation, here and there."""
    said = run_alone("bench/example.py")
    config = LlamaConfig()
    model = Llama(config, random_weights(config, 0, torch.float32, "cpu"))
    answers = [json.loads(text) for text in re.findall(r"\[.*?\]", said)]
    expected = [generate(model, [*range(32), *own], 6) for own in ([41, 42, 43, 44, 45], [51, 52, 53])]
    assert answers == [answer for answer in expected for _ in range(2)]
    assert re.findall(r"(\d+) of (\d+) prompt tokens", said) == [("0", "37"), ("32", "35")]
    assert said.endswith("segments in the pool: 2\n")
    assert f"```\n{said}```" in (HERE / "README.md").read_text()


def test_a_lake_of_one_needs_no_cluster():
    """It serves, wherever its instance is said to be; who only plans has no slab."""
    prompt = tokens(50, 1)
    for instance in (0, 3):
        lake = TokenLake([instance], LlamaConfig(), LakeConfig(8), dtype=torch.float64)
        scheduler = Scheduler(lake)
        request = Request(0, list(prompt), len(prompt) + 5)
        scheduler.add(request)
        plan, transfer_plan, (group,) = lake.gen_plans(*scheduler.schedule(), lake.get_prefix_tree())
        assert "pool" not in vars(lake)
        lake.init_query(plan.runs, group, plan)
        assert lake.pool.kv.dtype == torch.float64 and lake.index == 0
    lake = TokenLake([0], LlamaConfig(), dtype=torch.float64)
    engine = run_cluster.Engine(Cluster(), lake, Scheduler(lake), small_model(), Sampler())
    request = Request(0, list(prompt), len(prompt) + 5)
    engine.scheduler.add(request)
    while engine.scheduler.waiting or engine.scheduler.running:
        engine.step()
    assert request.tokens[len(prompt):] == generate(small_model(), prompt, 5)


@pytest.mark.parametrize("instances, cluster, said", [
    ([0, 1], None, r"instances \[0, 1\] exchange queries and KV, and the lake has no cluster; TokenLake"),
    ([1], "of one", r"rank 0 is none of the lake's instances \[1\]; on these alone")])
@pytest.mark.parametrize("call, arguments", [
    ("init_query", ([], [], None)), ("init_transfer", ([], None)), ("put", (None,)), ("query", (None,))])
def test_the_data_plane_says_what_it_lacks(instances, cluster, said, call, arguments):
    """In one line, from each call; the control plane is there."""
    lake = TokenLake(instances, LlamaConfig(), cluster=cluster and Cluster())
    assert lake.get_cache_load([Request(0, [1, 2], 3)], lake.get_prefix_tree()) > 0
    with pytest.raises(pool.LakeError, match=said) as caught:
        getattr(lake, call)(*arguments)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


def test_fleets_that_are_simulated_have_no_slabs():
    """Also lakes of one, which could serve; and a lake has an instance at least."""
    for policy in ("tokenlake", "router", "pd:1x3", "lakes:2x2"):
        fleet_of_four = fleet(policy, 100_000)
        made = traces.read_trace([json.dumps(GOOD)], "t")
        simulate.Simulation(fleet_of_four, made, simulate.Roofline(LlamaConfig(), "a100")).run()
        assert not any("pool" in vars(lake) for lake in fleet_of_four.lakes)
    with pytest.raises(pool.LakeError, match=r"instances \[\]: distinct, ascending ranks"):
        TokenLake([], LlamaConfig())


def test_reserve_by_default_is_for_a_request_alone():
    """As with no rows planned, no open tails, and room for all."""
    found = []
    for others in ((), ([0] * 3, [0] * 3, 10**9)):
        bal = Balancer(3, 20, 4)
        request = Request(0, tokens(30, 5), 40)
        bal.admit(request, bal.match(request))
        runs = bal.reserve(request, 30, *others)
        found.append([(run.position, run.rows, run.preferred, run.slot) for run in runs])
    assert found[0] == found[1] and len(found[0]) == 8


# ── balance ───────────────────────────────────────────────────────────────────────────────────


def replayed(rows, bal):
    """Rows (ms, input_length, hash_ids) through a balancer, for which equal ids are the same block
    in all calls; the KV of a token is a byte."""
    numbered = vars(bal).setdefault("numbered", traces.NumberedTokens(512))
    lines = (json.dumps(dict(timestamp=at, input_length=length, output_length=1, hash_ids=ids))
             for at, length, ids in rows)
    return replay.replay(traces.read_trace(lines, "rows"), bal, numbered, kv_bytes=1)


def read_from(bal, times, rows):
    """`times` iterations of requests [segments as id lists]: admitted, read once each, computed."""
    for _ in range(times):
        replayed([(0, len(ids) * 512 + 1, [*ids, 10**9]) for ids in rows], bal)


def toolagent(windows, per_window, seed, families=(0, 1, 2), start=0):
    """Lines of a workload of agents: a family's prefix of 12, 15 or 18 blocks, and an own part of
    2,000 tokens in the mean."""
    rng, lines, own = np.random.default_rng(seed), [], 10**6 * (seed + 1)
    for window in range(windows):
        for at in np.sort(rng.integers(10_000, size=max(16, rng.poisson(per_window)))).tolist():
            family = rng.choice(3, p=(0.48, 0.38, 0.14))
            prefix = [1000 * families[family] + i for i in range((12, 15, 18)[family])]
            tail = int(np.clip(rng.lognormal(math.log(2000) - 0.32, 0.8), 1, 20_000))
            blocks = -(-tail // 512)
            lines.append((start + window * 10_000 + at, len(prefix) * 512 + tail,
                          prefix + list(range(own, own + blocks))))
            own += blocks
    return lines


@pytest.mark.parametrize("placement, factor, least, most", [
    ("hash", 0, 0.2, 1), ("hash", 3, 0, 0.11), ("stripe", 3, 0, 0.06)])
def test_shared_prefixes_are_read_evenly(placement, factor, least, most):
    """Agents on 8 instances, 16 requests per window at least. Warm, the variation is small, and
    copying has stopped but for stragglers; when other prefixes become popular, it is small again
    within 4 windows of 17 requests, which are 64 iterations."""
    for seed in range(3):
        bal = Balancer(8, 20_000, 512, placement, factor)
        replayed(toolagent(20, 17, seed), bal)
        warm = bal.copies
        steady = replayed(toolagent(40, 17, seed + 50, start=200_000), bal)
        assert least < steady["cache_load_cv"] < most
        # 45 segments are shared, and 7 instances lack one; now and then one more is copied.
        assert bal.copies - warm <= 0.1 * warm and bal.copies <= 7 * 45
        assert (warm > 0) == (factor > 0)
        if factor:
            replayed(toolagent(4, 17, seed + 90, (7, 8, 9), 600_000), bal)
            assert bal.copies > warm
            again = replayed(toolagent(20, 17, seed + 120, (7, 8, 9), 640_000), bal)
            assert again["cache_load_cv"] < most


def test_variation_is_what_the_cold_segments_make_it():
    """Random homes, hot segments read evenly: E[CV²] = (N−1)·Σ p² over the cold segments."""
    N, p = 8, 1 / np.arange(1, 400) ** 0.8
    p /= p.sum()
    rng, found, hot = np.random.default_rng(0), [], 20
    for _ in range(400):
        homes = rng.integers(N, size=len(p))
        bal = Balancer(N, 1000, 4, replicate_factor=0)
        segments = [bal.tree.insert(bytes([i // 256, i % 256]), None, home, bal.free[home].pop())
                    for i, home in enumerate(homes.tolist())]
        for segment in segments[:hot]:
            for i in range(N):
                if i not in segment.replicas:
                    slot = segment.replicas[i] = bal.free[i].pop()
                    bal.tree.extras[slot] = segment
        bal._index_replicas()
        reads = np.repeat(np.arange(len(p)), np.round(p * 20_000).astype(int))
        slots = np.array([segment.slot for segment in segments])[rng.permutation(reads)]
        at, places = bal.replicas_of(slots)
        load = np.bincount(np.delete(slots, at) // 1000, minlength=N)
        # Evenly, as the identity has it, not where it would even out the rest.
        slots[at] = bal.choose_replicas(places, np.ones(len(at), np.int64), np.zeros(N, np.int64))
        load = np.bincount(slots // 1000, minlength=N)
        found.append((load.std() / load.mean()) ** 2)
    expected = (N - 1) * (p[hot:] ** 2).sum()
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / 20)
    assert np.mean(found) == pytest.approx(expected, rel=0.15)


def test_heavy_hitters_are_exact():
    """Best-first search finds the k most read segments of a random tree; no child is read more
    than its parent, also when the counts have been scaled down."""
    rng = np.random.default_rng(0)
    bal = Balancer(4, 3000, 1)
    bal.tree.half_life = 2
    for id in range(2000):
        request = Request(id, np.minimum(rng.geometric(0.5, size=6), 9).tolist(), 7)
        bal.admit(request, bal.match(request))
        rows = request.remaining
        assert bal.reserve(request, rows, [0] * 4, [0] * 4, 1000)
        bal.commit(request, rows)
        bal.release(request)
    assert bal.tree.admissions == 2000
    heats = sorted((s.heat for s in bal.tree.segments.values()), reverse=True)
    assert all(s.heat <= s.parent.heat for s in bal.tree.segments.values()
               if s.parent is not bal.tree.root)
    for count in (0, 1, 7, 50, 10**6):
        assert [s.heat for s in bal.tree.heaviest(count)] == [h for h in heats[:count] if h]
    assert heats[0] > heats[20] > 0


@pytest.mark.parametrize("N", [2, 5, 8])
def test_a_segment_on_every_request_is_everywhere(N):
    """A shared first block ends up on every instance, at most N copies an iteration; in a pool of
    few slots, a sixteenth is spent on replicas at most; with the factor 0 nothing is copied."""
    lines = [(i, 1024 + 1, [0, i + 1, 10**6 + i]) for i in range(400)]
    bal = Balancer(N, 300, 512)
    original, most = bal.replicate, []
    bal.replicate = lambda: most.append(len(copies := original())) or copies
    result = replayed(lines, bal)
    root, = (s for s in bal.tree.segments.values() if s.parent is bal.tree.root)
    assert sorted(root.replicas) == list(range(N)) and result["replicas_max"] == N
    assert 0 < max(most) <= N and result["replica_bytes"] == 512 * sum(most)
    assert all(slot // 300 == instance for instance, slot in root.replicas.items())
    small = Balancer(N, 12, 512)
    replayed(lines, small)
    assert 0 < len(small.tree.extras) <= 12 * N // 16
    none = Balancer(N, 300, 512, replicate_factor=0)
    assert replayed(lines, none)["replica_segments"] == 0 == none.copies


def test_the_less_loaded_of_two_replicas_is_read():
    """Never an instance without a replica, never the most loaded of all; and evenly in the end."""
    bal = Balancer(4, 100, 4)
    places = np.array([[5, 105, -1, 305]] * 300)
    load = np.array([0, 0, 0, 10**6])
    found = bal.choose_replicas(places, np.ones(300, np.int64), load)
    counts = np.bincount(found // 100, minlength=4)
    assert counts[2:].tolist() == [0, 0] and abs(counts[0] - counts[1]) < 30
    assert load.tolist() == [counts[0], counts[1], 0, 10**6]
    one = bal.choose_replicas(np.array([[-1, 105, -1, -1]] * 3), np.ones(3, np.int64), np.zeros(4, np.int64))
    assert one.tolist() == [105] * 3


def replicated_lake(ridge, instances=4):
    """A lake whose first slot of instance 0 holds a segment with a replica at every instance."""
    lake = TokenLake(list(range(instances)), LlamaConfig(), LakeConfig(4, 50))
    bal, lake.ridge = lake.balancer, ridge
    segment = bal.tree.insert(b"hot", None, 0, 0)
    for instance in range(1, instances):
        slot = segment.replicas[instance] = 50 * instance
        bal.tree.extras[slot] = segment
    bal._index_replicas()
    bal.replicate = dict
    return lake


@pytest.mark.parametrize("rows", [3, 9, 10, 19, 200])
def test_few_rows_read_one_replica(rows):
    """A segment with four replicas, read by decodes that are all computed at instance 0 but for
    one at 3: in as many replicas as have the ridge's five rows each; by the rows at hand there, as
    soon as it is read or they are as many."""
    lake = replicated_lake(ridge=5)
    lake.balancer.load[:] = [10**6, 0, 0, 0]  # so none is chosen at instance 0
    runs = [reader(lake, id, [0], home=10 + id % 39, num_shared=1) for id in range(rows - 1)]
    last = reader(lake, rows, [0], home=3 * 50 + 10, num_shared=1)
    shares = np.arange(rows)
    bundle, first = lake._bundle(shares * 0, shares * 0 + 1)
    assert len(first) == max(1, rows // 5) and min(np.bincount(bundle)) >= min(5, rows)
    plan, _, _ = lake.gen_plans([runs, [], [], [last]], [1] * 4, lake.get_prefix_tree())
    read = set(plan.segment_reads.slot.tolist())
    at_hand = rows - 1 >= 5
    assert (0 in read) == at_hand and len(read) <= (1 + at_hand if rows < 10 else 2)
    assert plan.load.sum() == rows + 4 * sum(
        max(5, n) for n in Counter(plan.segment_reads.slot.tolist()).values())


def test_what_a_bundle_is():
    """Reads of one segment make bundles of about equal rows, other segments' are others."""
    lake = replicated_lake(ridge=10)
    slot = np.array([7, 3, 7, 3, 7, 7])
    rows = np.array([6, 1, 6, 2, 6, 6])
    bundle, first = lake._bundle(slot, rows)
    assert len(first) == 3 and bundle[1] == bundle[3]  # 24 rows of 7: two; 3 rows of 3: one
    assert bundle[0] == bundle[2] != bundle[4] == bundle[5] and bundle[1] not in bundle[[0, 4]]
    assert slot[first[bundle]].tolist() == slot.tolist()


def test_a_colder_replica_leaves_before_a_warmer_segment():
    """Replicas are in the global LRU: one of a segment not read for long leaves before segments
    that were; one of a segment just read stays, and the oldest segment goes."""
    for read_again in (False, True):
        bal = Balancer(2, 8, 4)
        hot = prepared(bal, 0, tokens(4, 0))
        bal.release(hot)
        segment, = bal.tree.segments.values()
        slot = segment.replicas[1 - segment.slot // 8] = bal.free[1 - segment.slot // 8].pop()
        bal.tree.extras[slot] = segment
        for id in range(1, 8):
            bal.release(prepared(bal, id, tokens(8, id)))
        assert not any(bal.free)
        if read_again:
            bal.release(prepared(bal, 9, tokens(4, 0), output=1))
        before = set(bal.tree.segments)
        victim = bal._allocate(0)
        assert (victim == slot) != read_again
        assert (before == set(bal.tree.segments)) != read_again


@pytest.mark.parametrize("slots", [100, 200, 400])
def test_the_pool_is_one_lru(slots):
    """Token hit rate of 8 instances with replicas, against one ideal LRU over full segments of the
    same total size: within a percentage point."""
    from collections import OrderedDict
    rng, lines = np.random.default_rng(0), []
    for i in range(3000):
        session = int(rng.zipf(1.3)) % 400
        blocks = [0, 1] + [1000 * (session + 1) + j for j in range(2 + session % 9)]
        lines.append((i, 512 * len(blocks) + 1, [*blocks, 10**7 + i]))
    bal = Balancer(8, slots, 512)
    found = replayed(lines, bal)
    lru, hits, total = OrderedDict(), 0, 0
    for _, length, ids in lines:
        path = [tuple(ids[:k]) for k in range(1, length // 512 + 1)]
        matched = next((k for k, p in enumerate(path) if p not in lru), len(path))
        hits, total = hits + matched * 512, total + length
        for p in reversed(path):
            lru[p] = None
            lru.move_to_end(p)
        while len(lru) > 8 * slots:
            lru.popitem(last=False)
    assert bal.copies > 0 and 0.1 < hits / total < 0.99
    assert found["hit_rate"] == pytest.approx(hits / total, abs=0.01)


def test_replay_by_the_command_line(tmp_path, capsys):
    """The lines as defined: one iteration per timestamp, each hit segment read once, the rest put;
    wrong input is one line."""
    path = tmp_path / "t.jsonl"
    lines = [dict(timestamp=t, input_length=n, output_length=1, hash_ids=ids) for t, n, ids in (
        (0, 1030, [1, 2, 3]), (0, 600, [1, 9]), (5000, 1030, [1, 2, 4]), (25000, 512, [1]))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replay.main(["--trace", str(path), "--instances", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["hit_rate"] == (1024 + 511) / sum(line["input_length"] for line in lines)
    assert result["iterations"] == 3 and result["put_bytes"] == 0
    # Blocks 1 and 2 are on different instances: reads of 512 on both, then of 512 on one.
    assert result["cache_load_cv"] == pytest.approx(0.5)
    assert set(result) == {"hit_rate", "cache_load_cv", "replicas_max", "replica_segments",
                           "put_bytes", "replica_bytes", "plan_ms_median", "iterations"}
    for arguments, said in (
            (["--instances", "0"], "--instances: '0': an integer from 1 to 1024 is expected"),
            (["--replicate-factor", "-1"], "--replicate-factor: '-1': a number from 0 to"),
            (["--segment-tokens", "x"], "--segment-tokens: 'x': an integer from 1 to"),
            (["--capacity-tokens", "4095"], "--capacity-tokens 4095: 4096 at least, a segment per"),
            (["--capacity-tokens", "512", "--instances", "1"],
             "need more than 1 segments; more --capacity-tokens are expected"),
            (["--trace", str(tmp_path / "none")], "No such file")):
        with pytest.raises(SystemExit, match="2"):
            replay.main(["--trace", str(path), *arguments])
        assert said in (text := capsys.readouterr().err) and text.count("\n") == 1
    good = path.read_text()
    for line, said in (
            (dict(lines[0], timestamp=1), "timestamp 1 is before the previous line's 25000"),
            ([], "a JSON object is expected"), ("{", "not JSON"),
            (dict(lines[3], hash_ids=["1"]), 'hash_ids[0] is "1"; an integer of 64 bits'),
            (dict(lines[3], input_length=0, hash_ids=[]), "input_length is 0; a positive integer"),
            (dict(timestamp=25000, output_length=1, prompt="Hi"), "prompt is text, and there")):
        path.write_text(good + (line if line == "{" else json.dumps(line)) + "\n")
        with pytest.raises(SystemExit, match="2"):
            replay.main(["--trace", str(path)])
        assert f"t.jsonl:5: {said}" in capsys.readouterr().err
    path.write_text(good + "\n")  # blank lines do not count
    replay.main(["--trace", str(path), "--instances", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["iterations"] == 3
    path.write_text(json.dumps(lines[0]) + "\n")
    replay.main(["--trace", str(path)])
    assert "cache_load_cv            –" in capsys.readouterr().out
    path.write_text("")
    with pytest.raises(SystemExit, match="2"):
        replay.main(["--trace", str(path)])
    assert "t.jsonl: is empty" in capsys.readouterr().err


# ── conformance vectors ───────────────────────────────────────────────────────────────────────


VECTORS = HERE / "bench" / "vectors"


@pytest.fixture(scope="module")
def vectors():
    """bench/conformance.py, and the cases that are kept."""
    import conformance
    return SimpleNamespace(module=conformance, cases=conformance.read_vectors(VECTORS))


@pytest.fixture(scope="module")
def our_answers(vectors):
    """A line for each case, as a port writes them: tensors are lists."""
    def listed(value):
        if isinstance(value, torch.Tensor):
            return listed(value.tolist())
        if isinstance(value, dict):
            return {key: listed(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [listed(part) for part in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return {case.name: listed(vectors.module.KINDS[kind].answer(case.input))
            for kind, cases in vectors.cases.items() for case in cases}


def checked(module, capsys, *arguments) -> tuple[int, str]:
    """Exit status and what is said."""
    try:
        status = module.main(["check", *map(str, arguments)])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    return status, out + err


def answer_lines(answers: dict) -> str:
    return "".join(json.dumps(dict(case=name, output=output)) + "\n" for name, output in answers.items())


def changed(value, by):
    """The value with its first leaf changed."""
    if isinstance(value, dict):
        key = next(iter(value))
        return value | {key: changed(value[key], by)}
    if isinstance(value, list) and value:
        return [changed(value[0], by), *value[1:]]
    if isinstance(value, (int, float)):
        return value + by
    return f"{value}0"


def test_vectors_are_what_is_written(tmp_path, vectors, capsys):
    """Each file, byte for byte, but for the last bit of expected tensors: exp may differ in it."""
    from safetensors.torch import load_file
    assert vectors.module.main(["write", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.match(r"\d{3} cases of 14 kinds are in ", said)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in VECTORS.iterdir())
    assert sum(path.stat().st_size for path in VECTORS.iterdir()) < 500_000
    for name in names:
        if not name.endswith(".safetensors"):
            assert (tmp_path / name).read_bytes() == (VECTORS / name).read_bytes(), name
            continue
        written, kept = load_file(tmp_path / name), load_file(VECTORS / name)
        assert written.keys() == kept.keys()
        for key, value in written.items():
            limits = dict(rtol=0, atol=0) if ".input." in key else dict(rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(value, kept[key], equal_nan=True, **limits)


def test_vectors_agree_with_us(vectors, our_answers, tmp_path, capsys):
    """As this implementation answers; as its answers are read from a file; and with tensors in a
    safetensors file."""
    from safetensors.torch import save_file
    module = vectors.module
    expected = "".join(f"{kind.replace('_', ' ')}: {len(cases)} of {len(cases)} agree\n"
                       for kind, cases in vectors.cases.items())
    assert checked(module, capsys, VECTORS) == (0, expected)
    (tmp_path / "answers.jsonl").write_text(answer_lines(our_answers))
    assert checked(module, capsys, VECTORS, "--answers", tmp_path / "answers.jsonl") == (0, expected)
    tensors = {}
    answers = {case.name: module.set_apart(module.KINDS[kind].answer(case.input), case.name, tensors)
               for kind in ("merge", "iteration") for case in vectors.cases[kind]}
    (tmp_path / "answers.jsonl").write_text(answer_lines(answers))
    save_file(tensors, tmp_path / "o.safetensors")
    status, said = checked(module, capsys, VECTORS, "--answers", tmp_path, "--kind", " merge, iteration")
    assert status == 0 and said == "merge: 15 of 15 agree\niteration: 4 of 4 agree\n"


def test_every_compared_field_counts(vectors, our_answers):
    """In each case each field is changed by a little, and left out: that alone is said."""
    module = vectors.module
    for case in (case for cases in vectors.cases.values() for case in cases):
        answer = our_answers[case.name]
        assert not module.problems_of(case, answer)
        for field, how in case.compare.items():
            by = 2 * how["within"] + 1e-6 if isinstance(how, dict) else 1
            if isinstance(how, dict) and "inf" in str(answer[field]):
                by = math.inf  # −inf and inf are no number
            wrong = answer | {field: changed(answer[field], by)}
            (problem,) = module.problems_of(case, wrong).values()
            assert problem.startswith(f"{case.name}: {field}"), problem
            problems = module.problems_of(case, {k: v for k, v in answer.items() if k != field})
            assert problems == {field: f"{case.name}: {field} is missing"}


def test_a_wrong_answer_is_named(vectors, our_answers, tmp_path, capsys):
    """One of each kind, and one that is missing."""
    path = tmp_path / "answers.jsonl"
    for kind, cases in vectors.cases.items():
        case = cases[-1]
        field = next(iter(case.compare))
        answers = our_answers | {case.name: our_answers[case.name] | {field: "x"}}
        path.write_text(answer_lines(answers))
        status, said = checked(vectors.module, capsys, VECTORS, "--answers", path, "--kind", kind)
        first, second, *notes = said.splitlines()
        assert status == 1 and first == f"{kind.replace('_', ' ')}: {len(cases) - 1} of {len(cases)} agree"
        assert second.startswith(f"  {case.name}: {field} ")
        because = [f"    because: {case.because}"] if isinstance(case.compare[field], dict) else []
        assert notes == [f"    shows: {case.shows}", *because]
    del answers["merge/two parts"]
    path.write_text(answer_lines(answers))
    status, said = checked(vectors.module, capsys, VECTORS, "--answers", path, "--kind", "merge")
    assert status == 1 and said == "merge: 14 of 15 agree, 1 missing\n  merge/two parts is missing\n"
    path.write_text("")
    status, said = checked(vectors.module, capsys, VECTORS, "--answers", path)
    assert status == 1 and "segment ids: 0 of 24 agree, 24 missing\n" in said and "  and 14 more; --all" in said


def test_all_that_differs_is_counted(vectors, our_answers, tmp_path, capsys):
    """Of a field the first place is said, and how many there are; of a kind ten fields, or all."""
    path = tmp_path / "answers.jsonl"
    wrong = {"o": [9.0, *our_answers["merge/two parts"]["o"][0][0][1:], 9, 9, 9, math.nan]}
    answers = our_answers | {"merge/two parts": our_answers["merge/two parts"] | wrong}
    stripe = our_answers["placement/stripe"]
    wrong = dict(table=[8, 1, 5], runs=[run | dict(rows=3) for run in stripe["runs"]])
    path.write_text(answer_lines(answers | {"placement/stripe": stripe | wrong}))
    options = "--answers", path, "--kind", "merge,placement"
    status, said = checked(vectors.module, capsys, VECTORS, *options)
    assert "o[0, 0, 0] is 9; " in said and ", within 8e-07 (5 of 8 values differ)\n" in said
    assert "stripe: runs[0].rows is 3; 4 is expected (3 of 15 values differ)\n" in said
    assert "stripe: table[1] is 1; 0 is expected (2 of 3 values differ)\n" in said
    nothing = {name: dict.fromkeys(answer, "x") for name, answer in our_answers.items()}
    path.write_text(answer_lines(nothing))
    few, every = (checked(vectors.module, capsys, VECTORS, *options, *more)[1] for more in ([], ["--all"]))
    fields = {kind: sum(len(case.compare) for case in vectors.cases[kind]) for kind in ("placement", "merge")}
    for kind, count in fields.items():
        assert few.count(f"  {kind}/") == 10 and f"  and {count - 10} more; --all shows them\n" in few
        assert every.count(f"  {kind}/") == count
    assert "more; --all" not in every


def test_cases_by_name(vectors, capsys):
    """One, or several; of the kinds that are asked for, which else are all."""
    def check(*names):
        return checked(vectors.module, capsys, VECTORS, *(f"--case={name}" for name in names))

    assert check("iteration/the plan of the docstring") == (0, "iteration: 1 of 1 agree\n")
    said = "placement: 2 of 2 agree\nmerge: 1 of 1 agree\n"
    assert check("placement/hash, merge/two parts", "placement/stripe") == (0, said)
    status, said = check("merge/two")
    assert status == 2 and "--case 'merge/two': a case's name is expected, as 'merge/two parts'\n" in said
    status, said = checked(vectors.module, capsys, VECTORS, "--case=merge/two parts", "--kind=eviction")
    assert status == 2 and "a case's name is expected, as 'eviction/" in said
    assert not [case.name for cases in vectors.cases.values() for case in cases if "," in case.name]


def test_pools_of_the_vectors_can_be(vectors):
    """Nothing is in two places, who is in the LRU has no pinned child, and calls that pin and unpin
    begin with nothing that is pinned."""
    for case in (case for cases in vectors.cases.values() for case in cases if "pool" in case.input):
        pool = case.input["pool"]
        segments = {segment["id"]: segment for segment in pool["segments"]}
        slots = [slot for segment in pool["segments"] for slot in segment["slots"]]
        used = slots + [slot for free in pool["free"] for slot in free]
        assert len(used) == len(set(used)), case.name
        assert sorted(pool["extras"]) == sorted(slot for segment in segments.values() for slot in segment["slots"][1:])
        touched = [segments[id]["touched"] for id in pool["lru"]]
        assert touched == sorted(touched), case.name
        for number, (id, segment) in enumerate(segments.items()):
            parent = segments.get(segment["parent"])
            if parent:
                assert segment["heat"] <= parent["heat"], case.name
                assert segment["parent"] in list(segments)[:number], case.name
                if segment["parent"] in pool["lru"]:
                    assert id in pool["lru"][:pool["lru"].index(segment["parent"])], case.name
        assert pool["hits"] >= sum(segment["heat"] for segment in segments.values()), case.name
        requests = case.input.get("requests", [case.input.get("request", dict(ids=[]))])
        for request in requests:
            published = request["ids"][:request.get("published", 0)]
            assert not set(published) & set(pool["lru"]) and set(published) <= set(segments), case.name
            table = request.get("table", [])
            own = table[len(published):]
            assert table[:len(published)] == [segments[id]["slots"][0] for id in published], case.name
            assert not set(own) & set(used), case.name
        if case.name.startswith(("eviction/", "admission/")):
            assert set(pool["lru"]) == set(segments), case.name


def test_paged_cases_of_the_vectors(vectors):
    """What their README says of those for kernels over paged blocks."""
    listed = json.loads((VECTORS / "partial_attention.json").read_text())["cases"]
    names = [case["name"] for case in listed if case.get("paged")]
    assert names == ["partial_attention/paged and no mask", "partial_attention/paged and causal"]
    for case in (case for case in vectors.cases["partial_attention"] if case.name in names):
        q, rows, spans = case.input["q"], case.input["rows"], case.input["spans"]
        assert q.dtype == torch.bfloat16 and q.shape[2] in (64, 128) and len(case.input["slab"]) % 16 == 0
        assert rows["row"] == list(range(len(q))) and set(spans["length"]) == {16}
        assert not any(first % 16 for first in spans["first_row"])
        for reader in sorted(set(rows["reader"])):
            positions = [at for its, at in zip(spans["reader"], spans["position"]) if its == reader]
            assert positions == [16 * i for i in range(len(positions))]
            keys = 16 * len(positions)
            seen = [position for its, position in zip(rows["reader"], rows["position"]) if its == reader]
            causal = seen == list(range(keys - len(seen), keys))
            assert causal if "causal" in case.name else min(seen) >= keys


def test_answers_by_cost(vectors):
    """Another matching or cut that costs the same is right; a dearer or impossible one is not."""
    module = vectors.module
    cases = {case.name: case for kind in ("dispatch", "dynamic_program") for case in vectors.cases[kind]}
    tie = cases["dispatch/a tie"]
    assert not module.problems_of(tie, dict(instance_of_part=[2, 1], cost=0))
    for wrong in ([1, 1], [0, 3], [0], [0.5, 1], [True, 0], [1.0, 0], None, {}):
        (problem,) = module.problems_of(tie, dict(instance_of_part=wrong, cost=0)).values()
        assert "another instance for each part" in problem or "not iterable" in problem or "KeyError" in problem
    wrong = dict(instance_of_part=[0, 1], cost=0)
    (problem,) = module.problems_of(cases["dispatch/to the keys"], wrong).values()
    assert problem == "dispatch/to the keys: instance_of_part costs 3584; 0 is expected"
    tie = cases["dynamic_program/a tie"]
    assert not module.problems_of(tie, dict(batches=[[0, 3, 3]], cost=300))
    assert not module.problems_of(tie, dict(batches=[[0, 1, 1], [1, 3, 2]], cost=300))
    for wrong in ([[0, 2, 1]], [[0, 3, 4]], [[1, 3, 1]], [[0, 1, 2], [1, 3, 2]], [[False, 3, 3]], None):
        (problem,) = module.problems_of(tie, dict(batches=wrong, cost=300)).values()
        assert problem.startswith("dynamic_program/a tie: batches")


@pytest.mark.parametrize("name, field, wrong, said", [
    ("dispatch/a tie", "cost", False, "cost is False; 0 is expected"),
    ("dispatch/a tie", "instance_of_part", torch.tensor([0j, 1]), "is a tensor of complex64; real numbers"),
    ("placement/stripe", "table", torch.tensor([8 + 0j, 0, 5]), "is a tensor of complex64; real numbers"),
    ("merge/two parts", "o", lambda o: o + 0j, "o is a tensor of complex64; real numbers are expected"),
    ("merge/two parts", "o", lambda o: o > 0, "o is [[[True, False, "),
    ("merge/two parts", "o", lambda o: [str(x) for x in o.flatten().tolist()], "numbers are expected"),
    ("merge/two parts", "o", lambda o: ["Infinity", *o.flatten().tolist()[1:]], "numbers are expected"),
    ("merge/two parts", "o", lambda o: [o.flatten().tolist()], "o[0] has 8 entries; 2 are expected"),
    ("merge/two parts", "o", lambda o: [[o[0, 0].tolist(), *o[0, 1].tolist()]], "o[0] has 5 entries; 2"),
    ("merge/two parts", "o", lambda o: o[..., None], "numbers are expected"),
    ("merge/two parts", "o", 7, "o is 7; a list of numbers is expected")])
def test_answers_of_another_form(vectors, name, field, wrong, said):
    """What Python would take for the same: it is a difference."""
    case = next(case for case in vectors.cases[name.partition("/")[0]] if case.name == name)
    wrong = wrong(case.output[field]) if callable(wrong) else wrong
    (problem,) = vectors.module.problems_of(case, case.output | {field: wrong}).values()
    assert problem.startswith(f"{name}: {field}") and said in problem


def test_tensors_of_answers(vectors, tmp_path, capsys):
    """What cannot be read, or read as numbers, is a line."""
    from safetensors.torch import save_file
    path = tmp_path / "t.safetensors"
    save_file({"t": torch.zeros(8)}, path)
    fields = {case.name: case.output for case in vectors.cases["merge"]}["merge/two parts"]
    answers = tmp_path / "answers.jsonl"

    def check(output):
        answers.write_text(answer_lines({"merge/two parts": output}))
        return checked(vectors.module, capsys, VECTORS, "--answers", tmp_path, "--case", "merge/two parts")
    status, said = check({"tensor": "t"})
    assert status == 1 and "  merge/two parts: o is missing\n" in said
    output = dict(o={"tensor": "t"}, lse=fields["lse"].tolist())
    header = json.dumps(dict(t=dict(dtype="F4", shape=[8], data_offsets=[0, 4]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    status, said = check(output)
    assert status == 1 and "o is a tensor of float4_e2m1fn_x2; real numbers are expected\n" in said
    save_file({"t": fields["o"]}, path)
    assert check(output) == (0, "merge: 1 of 1 agree\n")
    other = tmp_path / "v.safetensors"
    shutil.copy(path, other)
    status, said = check(output)
    assert status == 2 and said.endswith("v.safetensors: another file has a tensor 't', too\n")
    for make, why in (other.mkdir, "Is a directory"), (lambda: other.symlink_to("x"), "No such file"):
        other.rmdir() if other.is_dir() else other.unlink()
        make()
        status, said = check(output)
        assert status == 2 and f"v.safetensors: {why}" in said and said.count("\n") == 1


def test_ids_by_the_words_of_the_vectors(vectors):
    """The recipe of their README, without this implementation."""
    from hashlib import blake2b
    for case in vectors.cases["segment_ids"]:
        ids = [blake2b(bytes.fromhex(case.input["salt_hex"]), digest_size=16, person=b"root").digest()]
        C = case.input["segment_tokens"]
        for start in range(0, len(case.input["tokens"]) - C + 1, C):
            tokens = [int(token) for token in case.input["tokens"][start : start + C]]
            message = b"".join(token.to_bytes(8, "little", signed=True) for token in tokens)
            ids.append(blake2b(ids[-1] + message, digest_size=16).digest())
        assert [case.output["root"], *case.output["ids"]] == [id.hex() for id in ids], case.name
    roots = {case.name: case.output["root"] for case in vectors.cases["segment_ids"]}
    assert roots["segment_ids/one segment"] == "7f50ce913656a96bbdfd5065f0e2c0e4"
    assert roots["segment_ids/salt"] == "ee60dc9f8d3ac6eb24968e55e6d89b80"


def test_least_costs_of_the_vectors(vectors):
    """Every matching and every cut is tried: none costs less, but where parts stay at home."""
    from itertools import permutations, product
    for case in vectors.cases["dispatch"]:
        cost = vectors.module.KINDS["dispatch"].cost
        every = permutations(range(case.input["instances"]), case.input["parts"])
        least = min(cost(case.input, list(matching)) for matching in every)
        assert (case.output["cost"] > least) == (case.name == "dispatch/all at home and they stay")
    for case in vectors.cases["dynamic_program"]:
        R, N = case.input["requests"], case.input["instances"]
        costs = []
        for cuts in product([False, True], repeat=R - 1):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [R]
            for dops in product(range(1, N + 1), repeat=len(ends)):
                with contextlib.suppress(ValueError):  # not allowed
                    batches = [list(batch) for batch in zip([0, *ends], ends, dops)]
                    costs.append(vectors.module.KINDS["dynamic_program"].cost(case.input, batches))
        assert case.output["cost"] == min(costs, default=None)


def test_iterations_of_the_vectors(vectors, monkeypatch):
    """All that a plan can have comes up, and no matching is as cheap as the one that is expected."""
    import itertools
    costs = []
    match = tokenlake.linear_sum_assignment
    monkeypatch.setattr(tokenlake, "linear_sum_assignment", lambda cost: costs.append(cost) or match(cost))
    came_up = {}
    for case in vectors.cases["iteration"]:
        assert not vectors.module.our_problems(case)
        matchings = itertools.permutations(range(len(costs[-1])))
        least, second, *_ = sorted(sum(costs[-1][range(len(m)), m].tolist()) for m in matchings)
        assert least < second
        plan = case.output
        decodes = [ships for ships, decode in zip(plan["ships"], plan["runs"]["decode"]) if decode]
        slots = [case.input["requests"][0]["table"], plan["replicas"]["slot"]]
        came_up[case.name] = dict(
            ships=any(map(any, decodes)), cached=0 in plan["runs"]["puts"],
            pulls=len(plan["pulls"]["kind"]) > 0, chosen=not set(slots[1]) <= set(slots[0]),
            late="late" in plan["fresh"]["place"], sibling="sibling" in plan["fresh"]["place"],
            **{kind: kind in plan["moves"]["kind"] for kind in ("put", "replica")})
    all_at_once = came_up["iteration/all at once"]
    assert [what for what, came in all_at_once.items() if not came] == ["late"]
    two = came_up["iteration/two batches"]
    assert two["late"] and two["pulls"] and two["sibling"] and two["put"] and two["replica"]
    two = came_up["iteration/two instances"]
    assert two["ships"] and two["cached"] and two["pulls"] and two["sibling"] and two["replica"]
    example = vectors.cases["iteration"][0].output
    plan, *_ = plan_by_example()
    table = {name: values.tolist() for name, values in plan.run_table._asdict().items()}
    assert example["runs"] == table and example["reads"] == plan.reads.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_recorded_iteration_is_planned_again(seed):
    """The state that a case has is all that a plan depends on."""
    import conformance_iteration
    scene = conformance_iteration.busy_scene(2 + seed % 2, seed)
    for iteration in range(12):
        batches, dops = scene.schedule(1)
        given = scene.input_of(batches, dops)
        scene.draws.drawn = []
        rows = scene.slabs.rows.copy()
        plan = scene.iterate(batches, dops)
        if plan.runs:
            given |= dict(draws=scene.draws.drawn) | conformance_iteration.draw_tensors(scene, rows, plan)
            answer = conformance_iteration.expect_iteration(given)
            assert answer["runs"] == conformance_iteration.columns_of(plan.run_table)
            assert answer["segment_reads"] == conformance_iteration.columns_of(plan.segment_reads)
            assert answer["fresh"] == conformance_iteration.columns_of(plan.fresh)
            assert answer["load_after"] == scene.lake.balancer.load.tolist()
            o = conformance_iteration.answer_iteration(given)["o"]
            torch.testing.assert_close(torch.cat(o), torch.cat(answer["o"]), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow")  # of ±3e38, as is meant
@pytest.mark.skipif(GPU or kernels.triton is None, reason="there the interpreter is not in use")
def test_triton_agrees_with_the_vectors(vectors, monkeypatch):
    """Its kernels, too, in float32 and in bfloat16."""
    import conformance_attention
    from functools import partial
    monkeypatch.setattr(conformance_attention, "partial_attention", partial(partial_attention, backend="triton"))
    monkeypatch.setattr(conformance_attention, "merge", partial(merge, backend="triton"))
    for kind in ("partial_attention", "merge"):
        compared = vectors.module.compare_kind(vectors.cases[kind], None)
        assert compared.agree == compared.cases == len(vectors.cases[kind]), compared.wrong


@pytest.mark.parametrize("name, text, said", [
    ("format.json", None, "format.json: No such file"),
    ("format.json", "{", "format.json: not JSON"),
    ("format.json", "[1]", "a JSON object is expected"),
    ("format.json", '{"format": 2}', "format.json: format 2; format 1 is expected"),
    ("format.json", '{"format": 1, "cases": {}}', "the files have other numbers of cases"),
    ("merge.json", None, "merge.json: No such file"),
    ("merge.json", '{"format": "x"}', "merge.json: format 'x'; format 1"),
    ("merge.json", '{"format": 1}', "no cases; a list of them"),
    ("merge.json", '{"format": 1, "cases": [1]}', "case 0: an object with name, input, output and compare"),
    ("merge.json", '{"format": 1, "cases": [{"name": "merge/x", "input": {}, "output": {}, "compare": '
     '{"o": "exactly"}}]}', "case 0: 'o' cannot be compared by 'exactly'"),
    ("merge.json", b"\xff", "not UTF-8"),
    ("merge.safetensors", None, "merge.json: case 0: no safetensors file beside it has a tensor 'merge/two parts"),
    ("merge.safetensors", "x", "no safetensors ("),
    ("answers", "\n{", "answers:2: not JSON"),
    ("answers", '{"case": 1}', 'answers:1: {"case": name, "output": {...}} is expected'),
    ("answers", '{"case": "merge/none", "output": {}}', "'merge/none' is no case of"),
    ("answers", '{"case": "merge/two parts", "output": {}}\n' * 2, "answers:2: 'merge/two parts' has an answer"),
    ("answers", '{"case": "merge/two parts", "output": {"o": {"tensor": "a"}}}', "has a tensor 'a'"),
    ("answers", '{"case": "merge/two parts", "output": {"o": %s1%s}}' % ("[" * 900, "]" * 900), "nested too deep"),
    ("answers", None, "answers: No such file"),
    ("answers", '{"case": "merge/x", "case": "merge/two parts", "output": {}}', "1: 'case' is twice in an"),
    ("answers", '{"case": "merge/two parts", "output": {"o": 1, "o": 2}}', "answers:1: 'o' is twice in an object"),
    ("--answers", "x" * 300, "File name too long"),
    ("--kind", "merge,x", "--kind 'x': some of segment_ids, placement"),
    ("--kind", "", "--kind '': some of"),
    ("--case", "merge/x\n", "--case 'merge/x': a case's name is expected"),
    ("--case", "", "--case '': a case's name is expected"),
])
def test_bad_vectors_are_one_line(vectors, tmp_path, capsys, name, text, said):
    folder = shutil.copytree(VECTORS, tmp_path / "vectors")
    path = folder / name if "." in name else tmp_path / name
    arguments = []
    if name == "answers":
        arguments = ["--answers", path]
    if name.startswith("--"):
        arguments = [name, text]
    elif text is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, output = checked(vectors.module, capsys, folder, *arguments)
    assert status == 2 and said in output and output.count("\n") == 1, output


@pytest.mark.parametrize("command", [[], ["x"], ["write"], ["check"], ["check", "--kind=a\nb", "DIR"]])
def test_any_option_of_vectors_is_refused_shortly(vectors, capsys, command):
    commands = [command] + [["check", "DIR", f"--{name}={value}"] for name in ("answers", "case", "kind")
                            for value in ("--", "9" * 5000, "\0")]
    for arguments in commands:
        with pytest.raises(SystemExit, match="2"):
            vectors.module.main(arguments)
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and len(text) < 300, text


def test_vectors_that_make_no_sense(vectors, tmp_path, capsys):
    """Inputs that no implementation can use; names twice; and a folder that cannot be written."""
    folder = shutil.copytree(VECTORS, tmp_path / "vectors")
    path = folder / "eviction.json"
    good = path.read_text()
    path.write_text(good.replace('"release": 1', '"release": 7', 1))
    status, said = checked(vectors.module, capsys, folder, "--kind", "eviction")
    assert status == 1 and "10 of 11 agree\n  eviction/leaf first: no answer (KeyError: 7)\n" in said
    path.write_text(good.replace('"name": "eviction/pinned"', '"name": "eviction/nothing"'))
    status, said = checked(vectors.module, capsys, folder)
    assert status == 2 and "'eviction/nothing'; names eviction/NAME, each once, are expected\n" in said
    with pytest.raises(SystemExit, match="2"):
        vectors.module.main(["write", str(path)])
    assert "eviction.json: File exists" in capsys.readouterr().err


# ── schedulers ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(30))
def test_dynamic_program_equals_exhaustive_search(seed):
    """Every way to cut a sequence in batches with DoPs, for random times, some forbidden."""
    from itertools import combinations, product
    rng = np.random.default_rng(seed)
    R, N = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    table = rng.integers(1, 1000, size=(R + 1, R + 1, N + 1))
    table[rng.random(table.shape) < 0.2] = balancer.FORBIDDEN
    slo = int(rng.integers(300, 1200)) if seed % 2 else None
    best = None
    for parts in range(1, min(R, N) + 1):
        for ends in combinations(range(1, R), parts - 1):
            cuts = list(zip((0, *ends), (*ends, R)))
            for dops in product(range(1, N + 1), repeat=parts):
                times = [int(table[j, i, k]) for (j, i), k in zip(cuts, dops)]
                if sum(dops) <= N and max(times) <= (slo or balancer.FORBIDDEN - 1):
                    cost = sum((i - j) * t for (j, i), t in zip(cuts, times))
                    best = cost if best is None else min(best, cost)
    found = balancer.dynamic_program(lambda i, dop: table[:i, i, dop], R, N, slo)
    if best is None:
        assert found is None
        return
    assert [j for j, *_ in found] == [0, *(i for _, i, _ in found[:-1])] and found[-1][1] == R
    assert sum(dop for *_, dop in found) <= N
    times = [int(table[cut]) for cut in found]
    assert sum((i - j) * t for (j, i, _), t in zip(found, times)) == best
    assert max(times) <= (slo or balancer.FORBIDDEN - 1)


def batches_of(policy, prompts, decodes=0, slo=None, ranks=4, coefficients=None):
    """What a scheduler makes of prompts of these lengths and of decodes → (batches, DoPs,
    scheduler)."""
    lake = TokenLake(list(range(ranks)), LlamaConfig(), LakeConfig(4, 500, chunk_tokens=16))
    scheduler = Scheduler(lake, (), policy, slo)
    for id in range(decodes):
        request = prepared(lake.balancer, id, tokens(9, id), output=40)
        request.tokens.append(1)
        scheduler.running.append(request)
    if coefficients:
        scheduler.predictor.coefficients = coefficients
    for id, length in enumerate(prompts):
        scheduler.add(Request(100 + id, tokens(length, 100 + id), length + 5))
    return *scheduler.schedule(), scheduler


def test_policies_form_the_batches_they_promise():
    """PD keeps P parts for prompts and D for decodes; the dynamic program never mixes them, gives
    decodes one instance a batch, and no instance more prompt rows than a chunk; the even split
    gives none more than an even share and a segment."""
    for policy in ("even", "dp", "pd:3x1", "pd:2x2"):
        batches, dops, scheduler = batches_of(policy, [30, 20, 50], decodes=6)
        rows = [sum(run.rows for run in batch) for batch in batches]
        assert sum(dops) <= 4
        if policy == "even":
            assert dops == [1] * 4 and sum(rows) == 64 + 6 and max(rows) <= -(-70 // 4) + 4
            continue
        for batch, dop, n in zip(batches, dops, rows):
            assert len({run.decode for run in batch}) == 1
            if policy == "dp":
                assert n <= 16 * dop if not batch[0].decode else dop == 1
        if policy != "dp":
            assert dops == [int(x) for x in reversed(policy[3:].split("x"))]
            assert [batch[0].decode for batch in batches] == [True, False]
            assert rows == [6, 16 * dops[1]]


@pytest.mark.parametrize("few, most", [(1, 17), (128, 20)])
def test_the_even_split_is_even(monkeypatch, few, most):
    """No instance has more than a sixteenth over the even share; the rows over it leave the home of
    their segment. Where the share is small, whole segments stay together."""
    monkeypatch.setattr(scheduler_module, "FEW_ROWS", few)
    for seed in range(5):
        batches, dops, scheduler = batches_of("even", [23 + seed, 38, 51])
        runs = [run for batch in batches for run in batch]
        rows = [sum(run.rows for run in batch) for batch in batches]
        assert dops == [1] * 4 and sum(rows) == 64 and max(rows) <= most
        assert all(run.rows > 0 for run in runs)
        S = scheduler.lake.config.slots
        away = [run for run in runs if run.preferred != run.slot // S]
        assert few == 1 or not away
        for request in scheduler.running:
            own = sorted((r.position, r.rows, r.slot) for r in runs if r.request is request)
            ends = [position + n for position, n, _ in own]
            assert [position for position, _, _ in own] == [0, *ends[:-1]][:len(own)]
            assert all(slot == request.table[position // 4] for position, _, slot in own)
            assert all(position // 4 == (end - 1) // 4 for (position, _, _), end in zip(own, ends))


def test_the_shortest_prompt_goes_first_but_none_starves():
    """A chunk goes to the shortest prompts; a long one is served once enough have come after it."""
    batches, _, scheduler = batches_of("even", [400, 30, 20])
    rows = Counter()
    for run in (run for batch in batches for run in batch):
        rows[run.request.id] += run.rows
    assert rows == {100: 14, 101: 30, 102: 20}
    scheduler._arrived += 400  # requests, long gone; each counts 1/16 of a chunk of 16
    order = [r.id for r, _ in form_batches(scheduler, 1)[0][0][0]]
    assert order == [102]  # four rows to the one with the fewest left, all are as old
    by_id = {request.id: request for request in scheduler.running}
    by_id[102].order = scheduler._arrived
    assert [r.id for r, _ in form_batches(scheduler, 1)[0][0][0]] == [101]
    by_id[101].order = scheduler._arrived
    assert [r.id for r, _ in form_batches(scheduler, 1)[0][0][0]] == [100]  # 386 rows of long ago


def test_the_queue_is_served_by_urgency():
    """Of those that wait, the one with the fewest uncached rows comes in first; one that was passed
    over comes in once enough have come after it, and nobody passes one that has no room."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(4, 10, chunk_tokens=16, max_batch=3))
    scheduler = Scheduler(lake)
    first = Request(0, tokens(40, 0), 41)
    scheduler.add(first)
    while scheduler.running or scheduler.waiting:  # its 40 tokens stay cached
        plan, transfer, _ = lake.gen_plans(*scheduler.schedule(), lake.get_prefix_tree())
        scheduler.update(plan, {run.request.id: 1 for run in plan.runs if run.samples})
    waiting = [Request(1, tokens(30, 1), 31), Request(2, tokens(20, 2), 21),
               Request(3, first.tokens[:40] + [7, 7], 43)]
    for request in waiting:
        scheduler.add(request)

    def admitted():
        scheduler._admit()
        return [request.id for request in scheduler.running]

    assert admitted() == [3, 2] and scheduler.cached_tokens == {0: 0, 3: 40, 2: 0}  # 1: no room
    while scheduler.running:
        scheduler._preempt()
    scheduler._arrived += 22  # 30 rows of so long ago are 6
    waiting[1].order = waiting[2].order = scheduler._arrived
    assert admitted() == [3, 1]  # and come before 20 new ones, not before 2
    scheduler._preempt()
    big = Request(4, tokens(75, 4), 76)
    big.order = -100
    scheduler.add(big)
    assert admitted() == [3]


def test_nobody_waits_for_ever():
    """A long prompt among ever more short ones comes in after at most one for each of its rows, as
    1/16 of a chunk is a row here, also where the queue never empties."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(4, 80, chunk_tokens=16, max_batch=6))
    scheduler, count, long = Scheduler(lake), 0, Request(0, tokens(300, 0), 301)
    while not (long.segments or long.num_slots):
        for _ in range(50 - len(scheduler.waiting)):
            count += 1
            scheduler.add(Request(count, tokens(8, count), 9) if count != 60 else long)
        plan, transfer, _ = lake.gen_plans(*scheduler.schedule(), lake.get_prefix_tree())
        scheduler.update(plan, {run.request.id: 1 for run in plan.runs if run.samples})
        assert len(scheduler.running) <= 6 and count < 60 + 300 + 50


def test_a_satisfiable_slo_is_kept():
    """With decodes waiting, prompt rows are as many as keep the SLO, and not one fewer; what no
    choice satisfies is dropped; without decodes there is no SLO."""
    per_row = [0, 10**9, 0, 0, 1000]  # 1 ms per row, computed by the slowest instance
    for policy in ("even", "dp", "pd:2x2"):
        for slo, decodes, rows in ((6, 4, None), (0.5, 4, "all"), (6, 0, "all")):
            batches, dops, scheduler = batches_of(policy, [60], decodes, slo, 4, per_row)
            prompt = sum(run.rows for batch in batches for run in batch if not run.decode)
            slowest = form_batches(scheduler, 16)[1]
            if rows == "all":
                assert prompt == min(60, {"even": 64, "dp": 64 - 16 * bool(decodes),
                                          "pd:2x2": 32}[policy])
                continue
            assert 0 < prompt < 48 and slowest > 6e9
            budgets = [n for n in range(17) if form_batches(scheduler, n)[1] <= 6e9]
            shares = {"even": 4, "dp": 3, "pd:2x2": 2}[policy]
            assert prompt == max(budgets) * shares


def test_prompts_do_not_starve_under_an_slo():
    """Where decodes alone keep the SLO but no prompt row beside them does, one row is computed; an
    SLO below what is representable is not dropped."""
    for policy, shares in (("even", 4), ("dp", 3), ("pd:2x2", 2)):
        per_row = [0, 10**9, 0, 10**6, 1000]
        scheduler = batches_of(policy, [60], 4, None, 4, per_row)[2]
        alone, beside = form_batches(scheduler, 0)[1], form_batches(scheduler, 1)[1]
        slo = (alone + beside) / 2e9 if alone < beside else None
        batches, _, scheduler = batches_of(policy, [60], 4, slo, 4, per_row)
        assert slo is None or shares == sum(
            run.rows for batch in batches for run in batch if not run.decode)
        assert slo or policy == "pd:2x2"  # there decodes are apart, and slower than one row
    assert Scheduler(scheduler.lake, (), "even", 1e-12).slo == 1


def test_an_idle_iteration_copies_nothing():
    """Copies travel with the layers of an iteration; one without rows has none, so a hot segment
    waits for the next that has."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(segment_tokens=4, slots=50))
    bal, tree = lake.balancer, lake.get_prefix_tree()
    for id in range(3):
        bal.release(prepared(bal, id, tokens(4, 0) + tokens(4, id)))
    bal.load = np.array([0, 0])
    bal.load[bal.tree.heaviest(1)[0].slot // 50] = 100
    _, transfer, _ = lake.gen_plans([[], []], [1, 1], tree)
    assert bal.copies == 0 and not bal.copying and not len(transfer.moves.kind)
    request = prepared(bal, 9, tokens(4, 0) + tokens(4, 9), publish=False)
    run = balancer.Run(request, 4, 4, 0, int(request.table[1]), True, False)
    _, transfer, _ = lake.gen_plans([[run]], [1], tree)
    assert bal.copies > 0 and (transfer.moves.kind == tokenlake.REPLICA).any()


def test_segments_of_one_token_are_counted_once():
    """A fully cached prompt computes its last row again; with C = 1 that is a whole segment."""
    bal = Balancer(2, 50, 1)
    for id in range(2):
        request = prepared(bal, id, tokens(5, 0))
        assert bal.held[request.held_row].sum() == 5


def test_a_copy_is_made_in_a_full_pool():
    """What is evicted for a copy lies anywhere: where the segment is already, the next goes."""
    bal = Balancer(2, 64, 4)
    for id in range(128):
        bal.release(prepared(bal, id, tokens(4, id)))
    hot = prepared(bal, 200, tokens(4, 127))
    for _ in range(30):
        bal.tree.hit(hot.segments, Request(0, [], 0))
    home = hot.segments[0].slot // 64
    assert not any(bal.free)
    for _ in range(8):
        bal.load = np.array([100 * (home == i) for i in range(2)])
        bal.replicate()
    assert sorted(hot.segments[0].replicas) == [0, 1] and bal.copies == 1


def test_time_model_fits_what_it_measures():
    """Least squares over the slowest instance's work recover the coefficients; a fit counts only
    from when it is shared."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig())
    model, rng = Scheduler(lake).predictor, np.random.default_rng(0)
    before, true = list(model.coefficients), (2e-3, 3e-5, 4e-8, 5e-7)
    for _ in range(64):
        features = rng.integers(1, 1000, size=(2, 3)) * (1, 1000, 10)
        seconds = max(np.dot(true, (1, *line)) for line in features.tolist())
        model.coefficients = [*(round(x * 1e12) for x in true), 1000]
        model.measured(features, seconds)
    assert [x / 1e12 for x in model.fitted[:4]] == pytest.approx(true, rel=0.02)
    assert model.fitted[4] == 1000 and before != model.fitted


@pytest.mark.parametrize("ranks, policy", [(1, "dp"), (2, "dp"), (4, "dp"), (2, "pd:1x1"),
                                           (4, "pd:1x3"), (4, "pd:3x1")])
def test_tokens_do_not_depend_on_the_scheduler(tmp_path, ranks, policy):
    run = serve(tmp_path, CHAT, "--verify", "--scheduler", policy, "--tbt-slo-ms", 20,
                "--segment-tokens", 4, "--chunk-tokens", 9, ranks=ranks)
    assert run.tokens == chat_answers() and run.summary["verified"] == len(CHAT)
    assert 0 <= run.summary["idle_fraction"] < 1


def multi_query(rank, seen):
    """The built-in model with one KV head for eight query heads."""
    run_cluster.LlamaConfig = lambda: LlamaConfig(num_kv_heads=1)
    count_bytes(rank, seen)


def test_ship_or_pull_halves_the_bytes(tmp_path):
    """H / Hkv = 8, prompts of 4 cached and 4 new segments, 8 generated tokens: at least 2 times
    fewer bytes of queries and pulls than always shipping; tokens the same; counted on its own."""
    stem = tokens(64, 0)
    lines = [dict(input_ids=stem, output_length=1)]
    lines += [dict(input_ids=stem + tokens(64, i), output_length=8) for i in range(1, 9)]
    moved = {}
    for pull in (16384, 0):
        run = serve(tmp_path, lines, "--pull-tokens", pull, "--replicate-factor", 0, "--max-batch",
                    1, "--chunk-tokens", 16, ranks=4, prelude="multi_query")
        s, seen = run.summary, run.seen[0]
        assert [s["query_bytes"], s["pull_bytes"]] == [seen["query"], seen["pull"]]
        moved[pull] = s["query_bytes"] + s["pull_bytes"] + s["sibling_bytes"], run.tokens
    assert moved[0][1] == moved[16384][1] and moved[0][0] >= 2 * moved[16384][0] > 0


# ── an engine with paged KV, brought into a lake ──────────────────────────────────────────────


def run_ported(*arguments, fault=""):
    """bench/ported.py, maybe with something broken in it: ranks are forked, so all have that."""
    code = (f"import sys; sys.path.insert(0, {str(HERE / 'bench')!r}); import ported\n{fault}\n"
            f"ported.run_main(ported.main)")
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_ported_engine_answers_as_without_a_cache(ranks):
    """Prefixes are shared, one prompt is cached as a whole, something is evicted; and with several
    ranks queries travel, and new KV both to its home and to readers."""
    done = run_ported("--ranks", str(ranks))
    assert done.returncode == 0 and done.stdout.endswith("\n6 of 6 answers equal\n"), done.stderr
    hits = [int(n) for n in re.findall(r"(\d+) of \d+ prompt tokens", done.stdout)]
    assert sum(n >= 63 for n in hits) == 3 and "63 of 64 prompt tokens" in done.stdout
    (totals,) = re.findall(r"in all: (\d+) of Q travel, (\d+) of KV to its home, (\d+) to", done.stdout)
    assert [int(n) > 0 for n in totals] == [ranks > 1] * 3
    assert ranks == 3 or not done.stdout.count("\n0 segments were evicted")


FAULTS = {
    "a page is lost": """
def step(engine, step=ported.Engine.step):
    if engine.iterations == 3:
        home, slot = divmod(int(engine.running[0].table[0]), ported.LAKE.slots)
        if home == engine.rank:
            engine.cache.layers[:, engine.cache.block_table[slot * ported.C // ported.PAGE]] = 0
    return step(engine)
ported.Engine.step = step""",
    "results from one rank are not merged": """
def merge(o, lse, parts, merge=ported.merge):
    return merge(o, lse, parts[:, :1])
ported.merge = merge""",
    "what moves does not land": """
def list_new_kv(attention, *arguments, list_new_kv=ported.PagedAttention._list_new_kv):
    list_new_kv(attention, *arguments)
    attention.landing = attention.landing.clamp(max=0)
ported.PagedAttention._list_new_kv = list_new_kv""",
    "spans are not cut": """
def cut(cache, reader, first_row, length, position):
    row = cache.block_table[first_row // ported.PAGE] * ported.PAGE + first_row % ported.PAGE
    return ported.KVSpans(reader, row, length.clip(max=ported.PAGE), position)
ported.PagedCache.cut = cut""",
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_ported_engine_notices(fault):
    """What a port may get wrong: answers differ, and the exit status says so."""
    done = run_ported(fault=fault)
    assert done.returncode == 1 and "answer WRONG" in done.stdout, done.stderr
    assert not done.stderr


def test_a_ported_engine_refuses_an_option_in_a_line():
    done = run_ported("--ranks", "0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--ranks: '0'" in done.stderr
    assert not done.stdout


# ── hazards ───────────────────────────────────────────────────────────────────────────────────


def alone(lines, folder, *arguments, ranks=2, **options):
    """Serves lines of token ids and holds them against the oracle."""
    run = serve(folder, lines, *arguments, ranks=ranks, **options)
    assert run.tokens == oracle(lines)
    return run


def test_a_fully_cached_prompt_leaves_one_row(tmp_path):
    """Its last token is computed for its logits, and not put again."""
    lines = [dict(input_ids=tokens(32, 0), output_length=3)] * 2
    run = alone(lines, tmp_path, "--max-batch", 1)
    assert run.records[1]["cached_tokens"] == 31
    assert run.summary["computed_tokens"] == 34 + 3


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32])
def test_a_prompt_around_a_segment_boundary(tmp_path, length):
    alone([dict(input_ids=tokens(length, 1), output_length=n) for n in (1, 2, 17)], tmp_path)


def test_a_segment_that_another_request_computes_is_awaited(tmp_path):
    """Two equal prompts at once, in one iteration: the second waits and hits."""
    lines = [dict(input_ids=tokens(200, 2) + [i], output_length=4) for i in range(3)]
    run = alone(lines, tmp_path, "--chunk-tokens", 32)
    assert [run.records[i]["cached_tokens"] for i in range(3)] == [0, 192, 192]


def test_duplicates_that_two_requests_generate(tmp_path):
    """The same prompt shorter than a segment, twice at once: both generate the same tokens, so
    both seal the same segments; one is kept, the other's table points to it."""
    lines = [dict(input_ids=tokens(5, 3), output_length=60)] * 2
    run = alone(lines, tmp_path, prelude="count_duplicates")
    assert run.seen[0]["duplicates"] == 4 and run.seen[0]["segments"] == 4


def count_duplicates(rank, seen):
    def observe(server, finished):
        seen["duplicates"] = server.lake.balancer.duplicates
        seen["segments"] = len(server.lake.balancer.tree.segments)
    return observe


def test_no_parent_is_evicted_before_its_child():
    """Paths of random requests through a small pool, evicted one by one: always a leaf."""
    rng = random.Random(0)
    bal, evicted = Balancer(2, 40, 2), 0
    for id in range(300):
        stem = tokens(2 * rng.randint(1, 8), rng.randint(0, 3))
        request = Request(id, stem + tokens(rng.randint(1, 9), id), 60)
        bal.admit(request, bal.match(request))
        rows = len(request.tokens) - request.done
        assert bal.reserve(request, rows, [0, 0], [0, 0], 1000) is not None
        bal.commit(request, rows)
        bal.release(request)
        before = dict(bal.tree.segments)
        if rng.random() < 0.3 and (slot := bal.tree.evict()) is not None:
            gone, = before.keys() - bal.tree.segments.keys()
            assert not before[gone].children and not before[gone].pins
            bal.free[slot // bal.slots].append(slot)
            evicted += 1
        assert all(s.parent is bal.tree.root or s.parent.id in bal.tree.segments
                   for s in bal.tree.segments.values())
    assert evicted > 20 and bal.evictions > 100


def test_what_a_plan_reads_is_never_evicted():
    """A pool filled by two running requests: the third gets no slot, and theirs stay."""
    bal = Balancer(2, 4, 4)
    first, second, third = (Request(i, tokens(16, i), 40) for i in range(3))
    for request in (first, second):
        bal.admit(request, bal.match(request))
        bal.reserve(request, 16, [0, 0], [0, 0], 100)
        bal.commit(request, 16)
    bal.admit(third, bal.match(third))
    assert bal.reserve(third, 4, planned := [0, 0], [0, 0], 100) is None and planned == [0, 0]
    assert not bal.fits(third, 0, 0) and bal.evictions == 0
    bal.release(first)
    assert bal.fits(third, 0, 0) and bal.reserve(third, 4, [0, 0], [0, 0], 100)
    assert bal.evictions == 1 and first.ids[3] not in bal.tree.segments


def test_instances_without_rows_or_segments(tmp_path):
    """More ranks than rows and segments; and one token after another."""
    alone([dict(input_ids=[7], output_length=3)], tmp_path, ranks=4)


def test_all_requests_end_at_once(tmp_path):
    run = alone([dict(input_ids=tokens(20, i), output_length=5) for i in range(8)], tmp_path,
                "--chunk-tokens", 100)
    assert len({r["finished_s"] for r in run.records.values()}) == 1


def test_end_of_sequence_in_the_middle_of_a_batch(tmp_path):
    """--stop-at-eos: an answer ends with the first end token, the others go on, and the session's
    next prompt is what was said."""
    model = small_model()
    lines = [dict(input_ids=tokens(6, 90 + i), output_length=40, session_id=i) for i in range(24)]
    lines += [dict(input_ids=tokens(5, i), output_length=4, session_id=i) for i in range(24)]
    run = serve(tmp_path, lines, "--stop-at-eos", ranks=2)
    full, early = oracle(lines[:24]), 0
    for id in range(24):
        cut = full[id][:full[id].index(0) + 1] if 0 in full[id] else full[id]
        early += len(cut) < 40
        assert run.tokens[id] == cut
        prompt = lines[id]["input_ids"] + cut + lines[id + 24]["input_ids"]
        rest = generate(model, prompt, 4)
        assert run.tokens[id + 24] == (rest[:rest.index(0) + 1] if 0 in rest else rest)
        assert run.records[id + 24]["input_length"] == len(prompt)
    assert 0 < early < 24


def differ(rank, seen):
    """Rank 1 plans the fifth iteration otherwise."""
    original, calls = engine_module.digest_with_tokens, []

    def digest(*plan):
        calls.append(plan)
        return bytes(16) if rank == 1 and len(calls) == 5 else original(*plan)
    engine_module.digest_with_tokens = digest


def differ_in_rows(rank, seen):
    """Rank 1 would really exchange something else: another home for one run."""
    original, calls = TokenLake.gen_plans, []

    def gen_plans(self, batches, dops, tree):
        calls.append(0)
        if rank == 1 and len(calls) == 5:
            batches = [batch[1:] for batch in batches]
        return original(self, batches, dops, tree)
    TokenLake.gen_plans = gen_plans


def differ_in_a_slot(rank, seen):
    """Rank 1 takes another slot of the same instance: the exchange would go, the KV be wrong."""
    original, calls = Balancer._allocate, []

    def allocate(self, home, *others, **options):
        calls.append(0)
        if rank == 1 and len(calls) == 3:
            self.free[home].reverse()
        return original(self, home, *others, **options)
    Balancer._allocate = allocate


def differ_in_a_token(rank, seen):
    """Rank 1 has another last token in a prompt: nothing else of its plan is different."""
    original = traces.TraceLine.arrive

    def arrive(self, *arguments):
        request = original(self, *arguments)
        request.tokens[-1] ^= rank == 1
        return request
    traces.TraceLine.arrive = arrive


def differ_in_a_sampled_token(rank, seen):
    """Rank 1 has another token for the fourth of an answer."""
    def observe(server, finished):
        if rank == 1 and server.engine.iterations == 4:
            server.scheduler.running[0].tokens[-1] ^= 1
    return observe


@pytest.mark.parametrize("prelude, iteration", [("differ_in_a_token", 1),
                                                ("differ_in_a_sampled_token", 5)])
@AHEAD
def test_ranks_with_other_tokens_stop_when_they_are_planned(tmp_path, prelude, iteration, ahead):
    trace = write_trace(tmp_path, [dict(input_ids=tokens(5, 1), output_length=9)])
    results = Job(["--trace", trace, "--speed", "inf", ahead], 2, prelude).finish()
    assert [status for status, *_ in results] == [1, 1]
    said = f"iteration {iteration}: the plan of rank 1 differs from that of rank 0"
    assert said in "".join(text for _, text, _ in results)


def fail_planning(rank, seen):
    original, calls = Scheduler.schedule, []

    def schedule(self):
        calls.append(0)
        if rank == 1 and len(calls) == 5:
            raise KeyError("injected")
        return original(self)
    Scheduler.schedule = schedule


def die(rank, seen, who=1):
    def observe(server, finished):
        if rank == who and server.engine.iterations == 5:
            os._exit(9)
    return observe


def first_dies(rank, seen):
    return die(rank, seen, who=0)


@pytest.mark.parametrize("prelude, said", [
    ("differ", "iteration 5: the plan of rank 1 differs from that of rank 0"),
    ("differ_in_rows", "iteration 5: the plan of rank 1 differs from that of rank 0"),
    ("differ_in_a_slot", "the plan of rank 1 differs from that of rank 0"),
    ("fail_planning", "iteration 5: planning failed on rank 1")])
@AHEAD
def test_ranks_that_disagree_stop_with_a_message(tmp_path, prelude, said, ahead):
    """No hang, no crash in C++: one rank says which iteration and which rank, all leave. A rank
    whose own code failed shows its traceback instead."""
    trace = write_trace(tmp_path, CHAT)
    began, broken = time.monotonic(), prelude == "fail_planning"
    results = Job(["--trace", trace, "--speed", "inf", ahead], 3, prelude).finish(
        raised=1 if broken else None)
    assert [status for status, *_ in results] == [1, None if broken else 1, 1]
    text = "".join(text for _, text, _ in results)
    assert said in text and text.count("run_cluster.py: ") == 1 and time.monotonic() - began < 60


@pytest.mark.parametrize("prelude, lost, ranks", [("die", 1, 2), ("first_dies", 0, 2),
                                                  ("die", 1, 4), ("first_dies", 0, 3)])
def test_a_lost_rank_is_an_error_not_a_hang(tmp_path, prelude, lost, ranks):
    """Whoever is lost, a rank that is left says so."""
    trace = write_trace(tmp_path, CHAT)
    said = Job(["--trace", trace, "--speed", "inf"], ranks, prelude).survivors(lost)
    assert f"iteration 6: an exchange failed; rank {lost} does not answer; " in said


def dies_joining(rank, seen):
    """Rank 1 has come, but never joins the others in gloo."""
    if rank == 1:
        dist.init_process_group = lambda *_, **options: os._exit(9)


def test_a_rank_lost_while_others_join_is_named(tmp_path):
    """They wait in C++ then, and torchrun sends them a signal: it is heeded nevertheless."""
    job = Job(["--num-requests", 3], 3, "dies_joining")
    job.processes[1].join(60)
    time.sleep(0.5)
    for rank in (0, 2):
        os.kill(job.processes[rank].pid, signal.SIGTERM)
    said = job.survivors(1, timeout=20)
    assert said == "run_cluster.py: stopped by a signal; rank 1 does not answer"


def stuck(rank, seen):
    """Rank 1 does not come to the sixth iteration, or (in layer 1) to its exchange of data."""
    def observe(server, finished):
        if rank == 1 and server.engine.iterations == 5:
            time.sleep(60)
    return observe


def stuck_in_attention(rank, seen):
    original, calls = kernels.Outputs.partial_attention, []

    def slow(*arguments):
        calls.append(0)
        if rank == 1 and len(calls) == 20:
            time.sleep(60)
        return original(*arguments)
    kernels.Outputs.partial_attention = slow


@pytest.mark.parametrize("prelude", ["stuck", "stuck_in_attention"])
def test_a_silent_rank_is_given_up_after_the_timeout(tmp_path, prelude):
    """In the control plane and in the data plane; the message names it, though it had begun."""
    trace, began = write_trace(tmp_path, CHAT), time.monotonic()
    job = Job(["--trace", trace, "--speed", "inf", "--timeout", 4], 3, prelude)
    assert "an exchange failed; rank 1 is busy or stuck; " in job.survivors(1)
    assert time.monotonic() - began < 50


def die_in_verify(rank, seen):
    if rank == 1:
        oracle_module.recompute = lambda *_: os._exit(9)


def test_a_rank_lost_while_verifying_is_said(tmp_path):
    trace = write_trace(tmp_path, CHAT)
    job = Job(["--trace", trace, "--speed", "inf", "--verify"], 2, "die_in_verify")
    text = job.survivors(1)
    assert "verifying: an exchange failed; rank 1 does not answer; " in text


def stop_in_verify(rank, seen):
    original = oracle_module.recompute

    def recompute(*arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)
    oracle_module.recompute = recompute


def test_a_signal_stops_verification(tmp_path):
    run = serve(tmp_path, CHAT, "--verify", ranks=2, prelude="stop_in_verify", status=1)
    assert run.summary["verified"] == 2 and run.summary["completed"] == len(CHAT)
    assert "stopped by a signal; 2 of 8 are verified" in run.text


def other_weights(rank, seen):
    original = run_cluster.random_weights
    run_cluster.random_weights = lambda config, seed, *rest: original(config, seed + rank, *rest)


def broken_setup(rank, seen):
    def random_weights(*_):
        raise MemoryError("injected")
    if rank == 1:
        run_cluster.random_weights = random_weights


def test_an_error_in_one_ranks_setup_stops_all(tmp_path):
    """Not a user's mistake: its rank shows the traceback, the others stop with its words."""
    results = Job(["--num-requests", 3], 3, "broken_setup").finish(raised=1)
    assert [status for status, *_ in results] == [1, None, 1]
    assert "injected" in results[0][1] + results[2][1]


def other_seed(rank, seen):
    original = run_cluster.parse_options

    def parse_options(arguments):
        options = original(arguments)
        options.seed = rank
        return options
    run_cluster.parse_options = parse_options


def other_sessions(rank, seen):
    """Rank 1 reads the same lines, but has another session for the first."""
    original = run_cluster.read_lines

    def read_lines(*arguments):
        lines = original(*arguments)
        lines[0].session_id = rank
        return lines
    run_cluster.read_lines = read_lines


def change_weights(change):
    """Weights are made as ever, then changed."""
    original = run_cluster.random_weights

    def random_weights(*arguments):
        weights = original(*arguments)
        change(weights)
        return weights
    run_cluster.random_weights = random_weights


def one_bit(rank, seen):
    """Rank 1 has one other bit in one weight."""
    def change(weights):
        weights.by_name(LlamaConfig())["model.layers.2.mlp.up_proj.weight"].view(torch.int32)[5, 7] ^= rank
    change_weights(change)


def swapped_rows(rank, seen):
    """Rank 1 has two rows of one weight the other way round."""
    def change(weights):
        rows = weights.by_name(LlamaConfig())["model.layers.1.self_attn.v_proj.weight"]
        rows[[3, 9]] = rows[[9, 3] if rank == 1 else [3, 9]]
    change_weights(change)


@pytest.mark.parametrize("prelude, said", [
    ("other_seed", "rank 1 has other options"), ("other_sessions", "rank 1 has other options"),
    ("other_weights", "rank 1 has another model.embed_tokens.weight than rank 0"),
    ("one_bit", "rank 1 has another model.layers.2.mlp.up_proj.weight than rank 0"),
    ("swapped_rows", "rank 1 has another model.layers.1.self_attn.v_proj.weight than rank 0")])
def test_ranks_started_otherwise_are_refused(tmp_path, prelude, said):
    results = Job(["--num-requests", 3], 3, prelude).finish()
    assert [status for status, *_ in results] == [2, 2, 2]
    assert said in "".join(text for _, text, _ in results)


@AHEAD
def test_a_signal_stops_all_ranks_and_keeps_what_is_finished(tmp_path, ahead):
    """SIGTERM to one rank: every rank leaves at the same iteration, the results so far stay."""
    lines = [dict(input_ids=[1, 2, 3], output_length=2), dict(input_ids=[5], output_length=4000)]
    output = tmp_path / "out"
    trace = write_trace(tmp_path, lines)
    job = Job(["--trace", trace, "--output", output, "--speed", "inf", ahead], 2)
    while not (output / "requests.jsonl").exists() or not (output / "requests.jsonl").read_text():
        time.sleep(0.05)
        assert job.processes[0].is_alive()
    os.kill(job.processes[1].pid, signal.SIGTERM)
    results = job.finish()
    assert [status for status, *_ in results] == [1, 1]
    said = "stopped by a signal; 1 of 2 are finished"
    assert said in results[0][1] + results[1][1]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["completed"] == 1 and said in summary["error"]


# ── planning ahead ────────────────────────────────────────────────────────────────────────────


def rare_end_token(rank, seen):
    """The end token is one that ends answers at every place of a segment, and not all of them. Notes
    how often a plan is made before the tokens of the iteration before are known."""
    load = run_cluster.LlamaConfig
    run_cluster.LlamaConfig = lambda: replace(load(), eos_token_ids=tuple(range(0, 512, 9)))
    seen.update(ahead=0, plans=0, preempted=0)
    plan = run_cluster.Engine._plan

    def counted(self):
        running = self.scheduler.running
        seen["ahead"] += any(request.tokens[-1] == scheduler_module.UNKNOWN for request in running)
        seen["plans"] += 1
        return plan(self)
    run_cluster.Engine._plan = counted
    fill = Scheduler.fill

    def noted(self, found):
        late = [request for request in self.waiting if found.get(request.id) in self.eos]
        seen["preempted"] += len(late)
        return fill(self, found)
    Scheduler.fill = noted


def infinite_when_dropped(rank, seen):
    """Rows behind an end token have KV that is not finite."""
    rare_end_token(rank, seen)
    seen["dropped"] = 0
    launch = run_cluster.Engine._launch

    def poisoned(self, plan, buffers, dropped):
        table = plan.run_table
        mine = (table.instance == self.lake.index) & np.isin(table.request_id, list(dropped))
        rows = ranges(table.first_row[mine], table.rows[mine])
        write, seen["dropped"] = buffers[1].write, seen["dropped"] + len(rows)

        def write_with_them(layer, kv):
            kv[rows] = math.inf
            write(layer, kv)
        buffers[1].write = write_with_them
        return launch(self, plan, buffers, dropped)
    run_cluster.Engine._launch = poisoned


@pytest.mark.parametrize("ranks, C", [(1, 4), (2, 3), (2, 1)])
def test_end_tokens_come_an_iteration_late(tmp_path, ranks, C):
    """An answer ends with the first one, at every place of a segment, though a row more was planned:
    that is computed, dropped and counted. Its session goes on from there."""
    lines = [dict(session_id=i // 2, input_ids=tokens(5 + i % 7, i), output_length=14)
             for i in range(36)]
    run = serve(tmp_path, lines, "--stop-at-eos", "--plan-ahead", "--segment-tokens", C, "--verify",
                ranks=ranks, prelude="rare_end_token")
    plain = serve(tmp_path, lines, "--stop-at-eos", "--no-plan-ahead", "--segment-tokens", C,
                  ranks=ranks, prelude="rare_end_token")
    assert run.tokens == plain.tokens and run.summary["verified"] == len(lines)
    early = [answer for answer in run.tokens.values() if len(answer) < 14]
    assert 10 < len(early) < 30
    assert all(token % 9 for answer in run.tokens.values() for token in answer[:-1])
    ends, lengths = Counter(), {}
    for id, line in enumerate(lines):
        lengths[id // 2] = lengths.get(id // 2, 0) + len(line["input_ids"]) + len(run.tokens[id])
        ends[lengths[id // 2] % C] += len(run.tokens[id]) < 14
    assert all(ends[place] for place in range(C)), ends
    assert run.summary["dropped_rows"] == len(early) and plain.summary["dropped_rows"] == 0
    computed = run.summary["computed_tokens"] + sum(r["cached_tokens"] for r in run.records.values())
    asked = sum(r["input_length"] + len(r["output_ids"]) - 1 for r in run.records.values())
    assert computed == asked + run.summary["recomputed_tokens"]
    assert all(seen["ahead"] > 0.8 * seen["plans"] for seen in run.seen)
    assert not any(seen["ahead"] for seen in plain.seen)
    for id, record in run.records.items():
        assert len(record["output_ids"]) == len(record["output_logprobs"])


def test_end_tokens_of_preempted_requests(tmp_path):
    """An end token comes when the next plan has already preempted its request: that is over."""
    lines = [dict(input_ids=tokens(3 + i % 3, i), output_length=24 - i % 5) for i in range(60)]
    options = lines, "--stop-at-eos", "--segment-tokens", 2, "--slots", 14
    runs = [serve(tmp_path, *options, ahead, prelude="rare_end_token")
            for ahead in ("--plan-ahead", "--no-plan-ahead")]
    assert runs[0].tokens == runs[1].tokens
    assert all(run.summary["completed"] == 60 and run.summary["preemptions"] > 10 for run in runs)
    assert runs[0].seen[0]["preempted"] > 0 and not runs[1].seen[0]["preempted"]


def test_what_is_dropped_need_not_be_finite(tmp_path):
    """Nobody reads it; without planning ahead it is not even computed."""
    lines = [dict(input_ids=tokens(5 + i % 7, i), output_length=14) for i in range(12)]
    runs = [serve(tmp_path, lines, "--stop-at-eos", ahead, "--verify", ranks=2,
                  prelude="infinite_when_dropped") for ahead in ("--plan-ahead", "--no-plan-ahead")]
    assert runs[0].tokens == runs[1].tokens
    assert sum(seen["dropped"] for seen in runs[0].seen) > 3
    assert not any(seen["dropped"] for seen in runs[1].seen)


def test_planning_ahead_plans_alike():
    """What is published, and the next plan, are those of planning afterwards: tokens count, not
    their values. Only ids of segments that a token not yet known fills come later."""
    def scheduled(ahead):
        lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(segment_tokens=4, slots=99, chunk_tokens=8))
        scheduler = Scheduler(lake)
        for id in range(6):
            scheduler.add(Request(id, tokens(9, id % 2) + tokens(id, id), 40 + id))
        plan, sampled, digests = None, {}, []
        while scheduler.waiting or scheduler.running:
            if plan:
                scheduler.advance(plan, sampled) if ahead else scheduler.update(plan, sampled)
            batches, dops = scheduler.schedule()
            following = lake.gen_plans(batches, dops, lake.get_prefix_tree())[:2]
            hashed = pool.hash_plan(len(digests), *following)
            if plan and ahead:
                scheduler.fill(sampled)
            plan = following[0]
            sampled = {run.request.id: (7 * len(run.request.tokens) + run.request.id) % 512
                       for run in plan.runs if run.samples}
            digests.append(pool.digest_with_tokens(hashed, plan))
        return digests
    assert scheduled(True) == scheduled(False)


@pytest.mark.parametrize("ranks", [1, 3])
def test_planning_ahead_is_recorded_alike(tmp_path, ranks):
    """Answers are the same, and nearly the iterations: a session's next turn comes one later."""
    lines = chat(6, 3, 4)
    runs = [serve(tmp_path, lines, option, "--segment-tokens", 8, ranks=ranks)
            for option in ("--plan-ahead", "--no-plan-ahead")]
    ahead, plain = runs
    assert ahead.tokens == plain.tokens == oracle(lines)
    assert ahead.summary["recomputed_tokens"] == plain.summary["recomputed_tokens"] == 0
    assert abs(ahead.summary["iterations"] - plain.summary["iterations"]) < 30
    assert ahead.summary["config"]["plan_ahead"] and not plain.summary["config"]["plan_ahead"]
    assert ahead.summary["asked_tokens"] == plain.summary["asked_tokens"]
    for record in ahead.records.values():
        assert record["ttft_ms"] > 0 and len(record["itl_ms"]) == len(record["output_ids"]) - 1


# ── what is not finite, and who checks what ───────────────────────────────────────────────────


def wrong_in_itself(rank, seen):
    """Rank 1's weights change once they were compared: answers and oracle are wrong alike there."""
    make = run_cluster.Server

    def server(options, cluster, lines, text, lake_config, model, *rest):
        if rank == 1:
            up = model.weights.by_name(model.config)["model.layers.1.mlp.up_proj.weight"]
            up *= -1
        return make(options, cluster, lines, text, lake_config, model, *rest)
    run_cluster.Server = server


def test_no_rank_checks_what_it_computed_alone(tmp_path):
    """One that serves with other weights is noticed, by the others."""
    trace = write_trace(tmp_path, CHAT)
    results = Job(["--trace", trace, "--verify", "--speed", "inf"], 2, "wrong_in_itself").finish()
    assert [status for status, *_ in results] == [1, 1]
    assert "differs from recomputation" in "".join(text for _, text, _ in results)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_verification_is_dealt_to_others(num_ranks):
    rng = np.random.default_rng(num_ranks)
    requests = [Request(i, [1] * int(rng.integers(1, 50)), 60) for i in range(60)]
    computed = Counter()
    sampled = Counter()
    for request in requests:
        for done in (computed, sampled):
            alone = rng.random() < 0.5
            counts = np.zeros(num_ranks, int) if alone else rng.integers(9, size=num_ranks)
            counts[rng.integers(num_ranks)] += 1
            done.update({(request.id, rank): int(n) for rank, n in enumerate(counts)})
    dealt = oracle_module.deal(requests, computed, sampled, num_ranks)
    assert sorted(r.id for share in dealt for r in share) == list(range(60))
    for rank, share in enumerate(dealt):
        for request in share:
            answer, rows = ([done[request.id, other] for other in range(num_ranks)]
                            for done in (sampled, computed))
            assert num_ranks == 1 or answer[rank] < sum(answer)
            assert answer[rank] <= sum(answer) / num_ranks
            fair = [other for other in range(num_ranks) if num_ranks * max(
                answer[other] / sum(answer), rows[other] / sum(rows)) <= 1]
            assert not fair or rank in fair
    work = [sum(len(request.tokens) for request in share) for share in dealt]
    assert max(work) < 2 * sum(work) / num_ranks


def test_who_prefills_checks_who_decodes():
    """As with pd:1x1: rank 1 has few rows of the request, but all of its answer."""
    request = Request(0, [1] * 208, 223)
    computed, sampled = Counter({(0, 0): 208, (0, 1): 15}), Counter({(0, 0): 1, (0, 1): 15})
    assert oracle_module.deal([request], computed, sampled, 2) == [[request], []]


def test_checksums_notice_any_change():
    """One bit, the sign of a zero or of many, rows or halves that change places; of any size."""
    for shape, dtype in (((64, 33), torch.float32), ((7,), torch.bfloat16), ((8, 9), torch.float64),
                         ((900, 700), torch.float16)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        weight[0] = 0.0
        found = {run_cluster.checksums({"w": weight})["w"]}
        changed = [weight.flip(0), weight.roll(len(weight) // 2, 0), -weight]
        changed += [weight.clone() for _ in range(3)]
        changed[3].view(torch.uint8).flatten()[-1] ^= 1
        changed[4].view(torch.uint8).flatten()[1] ^= 128
        changed[5].flatten()[3::4] *= -1  # the highest bit of many words
        for other in changed:
            found |= {run_cluster.checksums({"w": other})["w"]}
        assert len(found) == 7
        assert run_cluster.checksums({"w": weight.clone()})["w"] in found


def poison(rank, seen, layer=1, iteration=4, which=0, value=math.nan):
    """From some iteration on, rank 1 computes a value that is not finite."""
    original, calls = TokenLake.put, []

    def put(self, kv_buf):
        calls.append(0)
        if rank == 1 and len(calls) > 3 * iteration and kv_buf.layer == layer:
            if len(kv_buf.kv):
                kv_buf.kv[-1, which, 0, 0] = value
        return original(self, kv_buf)
    TokenLake.put = put

    def observe(server, finished):
        for segment in server.lake.balancer.tree.segments.values():
            for instance, slot in segment.replicas.items():
                row = pool.slab_row(slot, *server.lake.balancer.sizes[1:])
                if instance == rank:
                    assert server.lake.pool.kv[:, row:row + 16].isfinite().all()
    return observe


def poison_v(rank, seen):
    return poison(rank, seen, layer=2, which=1, value=-math.inf)


def poison_logits(rank, seen):
    original = Llama.forward

    def forward(self, *arguments):
        logits = original(self, *arguments)
        return logits * math.nan if rank == 1 else logits
    Llama.forward = forward


@pytest.mark.parametrize("prelude, said", [
    ("poison", r"iteration \d+: request \d+: the KV of layer 1 is not finite; "),
    ("poison_v", r"iteration \d+: request \d+: the KV of layer 2 is not finite; "),
    ("poison_logits", r"iteration \d+: request \d+: its logits are not finite; ")])
@AHEAD
def test_what_is_not_finite_ends_the_run_with_its_name(tmp_path, prelude, said, ahead):
    """Nothing of it is read by others, and no answer is made of it."""
    run = serve(tmp_path, CHAT, ahead, ranks=2, prelude=prelude, status=1)
    assert len(re.findall(said, run.text)) == 1
    assert run.summary["status"] == "failed" and re.match(said, run.summary["error"])
    assert run.tokens.items() <= chat_answers().items()


def test_large_values_are_finite():
    """Their sum overflows: only then is each looked at."""
    lake = TokenLake([0], LlamaConfig(), LakeConfig(), Cluster(), torch.float32)
    buffer = pool.KVBuffer(pool.TransferPlan(pool.SlabWrites(*np.array([[0], [0], [16], [3]])),
                                             pool.Moves.of((0, 0, 0, 0, 0, 0)), 1), 0, 99, "cpu")
    buffer.write(2, torch.zeros(3, 2, 4, 16))
    k, v = lake.pool.kv.unbind(2)
    k[2, 16:19] = 3e38
    assert lake.pool.first_nonfinite(buffer) is None
    v[2, 18, 3, 5] = math.inf
    v[2, 17, 3, 5] = math.nan
    assert lake.pool.first_nonfinite(buffer) == (2, 1)
    k[1, 18, 0, 0] = math.nan
    k[0, 19, 0, 0] = math.nan  # nothing was written there
    assert lake.pool.first_nonfinite(buffer) == (1, 2)


def slow_to_sample(rank, seen):
    original = Sampler.sample

    def sample(self, logits, keys):
        time.sleep(0.4 * (rank == 1))
        return original(self, logits, keys)
    Sampler.sample = sample


def test_a_token_is_known_when_all_are(tmp_path):
    """Rank 1 takes its time to sample: that is part of the time to the first token."""
    run = serve(tmp_path, [dict(input_ids=tokens(40, i), output_length=2) for i in range(2)],
                ranks=2, prelude="slow_to_sample")
    for record in run.records.values():
        assert record["ttft_ms"] >= 400 and record["itl_ms"][0] >= 400
    assert run.summary["duration"] >= 0.8


def test_a_stall_changes_the_time_model_little():
    """Ten seconds among tens of milliseconds: predictions change by a few percent at most."""
    def predictions(stalls, seed):
        model = Scheduler(TokenLake([0], LlamaConfig(), LakeConfig())).predictor
        rng = np.random.default_rng(seed)
        for i in range(256):
            rows = rng.integers(1, 130)
            work = np.array([[rows, rows * rng.integers(100, 4000), rng.integers(5000)]])
            seconds = np.dot((2e-3, 3e-5, 4e-8, 5e-7), (1, *work[0]))
            model.measured(work, seconds * (1 + 0.2 * rng.exponential()) + 10 * (i in stalls))
        model.coefficients = model.fitted
        usual = np.array([[rows, rows * length, kib] for rows in (1, 32, 128)
                          for length in (100, 3000) for kib in (0, 4000)])
        return model.time(*usual.T)
    for seed in range(5):
        without = predictions((), seed)
        assert predictions((200,), seed) == pytest.approx(without, rel=0.03)
        assert predictions((20, 100, 250), seed) == pytest.approx(without, rel=0.06)


def test_predictions_are_corrected_by_what_iterations_took():
    """Of an even split, whose slowest instance has 30 % more: predicted is what it takes; a stall
    changes nothing, and an iteration that is not planned by the SLO does not count."""
    def corrected(stalls):
        model = Scheduler(TokenLake([0, 1], LlamaConfig(), LakeConfig())).predictor
        rng = np.random.default_rng(0)
        for i in range(256):
            work = rng.integers(50, 130), rng.integers(10**4, 10**5), 0
            features = np.round(np.outer((0.7, 1.3), work)).astype(int)
            seconds = features[1] @ (1e-4, 1e-8, 0)
            model.expect([work, (1, 1, 0)] if i % 4 else [])
            model.measured(features, seconds * (1 if i % 4 else 3) + 10 * (i in stalls))
        assert model.coefficients[-1] == 1000  # until it is shared
        model.coefficients = model.fitted
        rows, pairs, kib = model.split(200, 100_000, 2)
        return model.fitted[-1], model.longest_time(rows, pairs, kib) / model.time(rows, pairs, kib)
    without, longer = corrected(())
    assert isinstance(without, int) and longer == pytest.approx(without / 1000, rel=1e-3)
    assert corrected((201,))[0] == pytest.approx(without, rel=0.01)


@pytest.mark.parametrize("unevenness", [1.0, 1.4])
def test_iterations_keep_the_slo_in_the_mean(unevenness):
    """Where the slowest instance takes so many times an even split's time, prompt rows are chosen
    so that iterations with decodes still take what is allowed, in the mean."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(16, 4000, chunk_tokens=256, max_batch=64))
    slo, rng, sent = 20.0, np.random.default_rng(0), 0  # ms
    scheduler = Scheduler(lake, (), "even", slo)
    model, taken = scheduler.predictor, []
    for iteration in range(220):
        for length in rng.integers(50, 600, size=rng.poisson(1.3)).tolist():
            scheduler.add(Request(sent, tokens(length, sent), length + 8))
            sent += 1
        plan, transfer, _ = lake.gen_plans(*scheduler.schedule(), lake.get_prefix_tree())
        rows = sum(run.rows for run in plan.runs) / 2
        features = np.array([[rows, 0, 0]]).repeat(2, 0)
        seconds = 2e-3 + unevenness * rows * 1e-4
        most = (slo - 2) / (0.1 * unevenness)  # rows that keep it
        if iteration > 100 and rows > 0.8 * most:
            taken.append(1e3 * seconds)
        features[1] *= unevenness
        model.measured(features, seconds)
        model.coefficients = model.fitted
        scheduler.update(plan, {run.request.id: 1 for run in plan.runs if run.samples})
    assert len(taken) > 50 and slo * 0.85 < np.mean(taken) < slo * 1.03


# ── lost work: what a run has written is kept, and gone on with ──────────────────────────────


TALK = chat(num_sessions=6, turns=3, seed=7)


def interrupted(folder, kept, torn=b'{"request_id": 3, "outp'):
    """As if the run that wrote the folder had been cut off after so many records."""
    file = folder / "requests.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:kept]) + torn)
    (folder / "summary.json").unlink()


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_run_that_was_cut_off_goes_on(tmp_path, temperature):
    """Whatever was finished, the same answers in the end, none twice; the number of ranks, slots
    and what else changes no answer may be another. Verification covers what was kept."""
    sampling = ["--dtype", "float64", "--temperature", temperature, "--speed", "inf"]
    options = ["--trace", write_trace(tmp_path, TALK), "--output", tmp_path / "out", *sampling]
    Job(options, 2).finish()
    whole = Served(tmp_path / "out", [(0, "", {})])
    assert whole.tokens == oracle(TALK, sampler=Sampler(temperature))
    for kept, torn, ranks, more in ((0, b"", 1, []), (1, b"", 2, ["--slots", 40]),
                                    (7, b'{"request_id": 3, "outp', 3, ["--verify"]),
                                    (11, b"\0\0\0", 2, ["--segment-tokens", 4]),
                                    (18, b"", 2, ["--verify"])):
        interrupted(tmp_path / "out", kept, torn)
        before = (tmp_path / "out" / "requests.jsonl").read_bytes()[:-len(torn) or None]
        results = Job([*options, "--resume", *more], ranks).finish()
        assert [status for status, *_ in results] == [0] * ranks
        run = Served(tmp_path / "out", results)
        assert run.tokens == whole.tokens
        written = (tmp_path / "out" / "requests.jsonl").read_bytes()
        assert written.startswith(before) and written.count(b"\n") == len(TALK)
        assert run.summary["resumed"] == kept and run.summary["completed"] == len(TALK)
        assert run.summary["verified"] == (len(TALK) if "--verify" in more else None)
        for record in run.records.values():
            previous = run.records.get(record["request_id"] - 6)
            assert not previous or previous["finished_s"] <= record["arrival_s"]


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_resume_begins_anew_where_nothing_is(tmp_path, folder):
    output = tmp_path / folder
    if folder == "empty":
        output.mkdir()
    results = Job(["--num-requests", 3, "--output", output, "--resume", "--speed", "inf"]).finish()
    run = Served(output, results)
    assert run.status == 0 and run.summary["resumed"] == 0 and len(run.tokens) == 3


@pytest.mark.parametrize("change, said", [
    (["--seed", 1], "it was begun with another --seed: 0, now 1; the same, or a new folder"),
    (["--temperature", 0.5], "it was begun with another --temperature: 0.0, now 0.5"),
    (["--dtype", "float64"], "it was begun with another --dtype: 'float32', now 'float64'"),
    (["--stop-at-eos"], "it was begun with another --stop-at-eos: False, now True"),
    (["--num-requests", 3], "it was begun with another number of requests: 4, now 3"),
    (["--trace", "other"], "it was begun with another trace; the same"),
    (["--model", "model", "--random-weights"], "it was begun with another model; the same"),
    ("twice", "requests.jsonl:3: request 1 is there twice"),
    ("of none", "requests.jsonl:3: not the record of a request of this trace"),
    ("not JSON", "requests.jsonl:3: not the record of a request of this trace"),
    ("a turn alone", "requests.jsonl:3: request 3 is there, but not the one before it in its sess"),
    ("no run.json", "run.json: No such file"),
    ("broken run.json", "run.json: not readable as JSON")])
def test_a_folder_of_another_run_is_refused(tmp_path, change, said):
    """By the name of what differs; nothing in it changes."""
    lines = [dict(input_ids=tokens(9, i), output_length=2, session_id=min(i, 2)) for i in range(4)]
    write_trace(tmp_path, lines).rename(tmp_path / "trace")
    write_trace(tmp_path, [*lines[:3], dict(lines[3], input_ids=[5])]).rename(tmp_path / "other")
    save_model(tmp_path / "model", dict(vocab_size=512))
    output = tmp_path / "out"
    options = ["--speed", "inf", "--output", output, "--trace", tmp_path / "trace"]
    Job(options).finish()
    interrupted(output, 2, b"")
    file = output / "requests.jsonl"
    records = file.read_bytes().splitlines(keepends=True)
    again = json.loads(records[1])["request_id"]
    said = said.replace("request 1 is there twice", f"request {again} is there twice")
    turn = json.loads(records[1]) | {"request_id": 3}
    added = {"twice": records[1], "of none": b'{"request_id": 4}', "not JSON": b"[" * 100_000,
             "a turn alone": json.dumps(turn).encode()}
    if str(change) in added:
        file.write_bytes(b"".join([*records, added[change].strip() + b"\n"]))
    if change == "no run.json":
        (output / "run.json").unlink()
    if change == "broken run.json":
        (output / "run.json").write_text("{")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    change = [] if isinstance(change, str) else change
    change = [tmp_path / x if x in ("other", "model") else x for x in change]
    assert said in refused(tmp_path, *options, "--resume", *change)
    assert before == {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.mark.parametrize("change", [
    dict(request_id=-1), dict(request_id=True), dict(request_id="1"), dict(request_id=2.5),
    dict(output_ids=[]), dict(output_ids=[1] * 99), dict(output_ids=["1"]), dict(output_ids=None),
    dict(output_ids=[512]), dict(output_ids=[-1]), "one token short", dict(status="failed"),
    dict(finished_s=1e10), dict(input_length=10**400), dict(cached_tokens=-3), dict(ttft_ms=math.nan),
    dict(finished_s=math.inf), dict(finished_s="soon"), dict(itl_ms=["x"]), dict(arrival_s=None)])
def test_a_damaged_record_is_refused(tmp_path, change):
    output = tmp_path / "out"
    options = ["--num-requests", 4, "--speed", "inf", "--output", output]
    Job(options).finish()
    file = output / "requests.jsonl"
    first, *others = file.read_text().splitlines()
    if change == "one token short":
        change = dict(output_ids=json.loads(first)["output_ids"][:-1])
    file.write_text("\n".join([json.dumps(json.loads(first) | change), *others, ""]))
    said = refused(tmp_path, *options, "--resume")
    assert "requests.jsonl:1: not the record of a request of this trace" in said


def test_a_resumed_folder_has_no_summary_of_another_run(tmp_path):
    """If the run that goes on is lost, nothing says that it has ended well."""
    output = tmp_path / "out"
    options = ["--trace", write_trace(tmp_path, CHAT), "--output", output, "--speed", "inf"]
    Job(options, 2).finish()
    interrupted(output, 3, b"")
    (output / "summary.json").write_text("{}")
    Job([*options, "--resume"], 2, "first_dies_at_once").survivors(0)
    assert not (output / "summary.json").exists()
    Job([*options, "--resume"], 2).finish()
    assert len(Served(output, [(0, "", {})]).tokens) == len(CHAT)


def first_dies_at_once(rank, seen):
    def observe(server, finished):
        if rank == 0:
            os._exit(9)
    return observe


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_a_finished_folder_keeps_what_was_measured(tmp_path, verify):
    """A run that has nothing to serve adds what it finds of the answers, and takes nothing away."""
    command = ["--num-requests", "3", "--output", str(tmp_path), "--speed", "inf"]
    assert run_cluster.run([*command, "--no-verify"]) == 0
    before = json.loads((tmp_path / "summary.json").read_text())
    assert before["computed_tokens"] > 0 and before["verified"] is None
    assert run_cluster.run([*command, "--resume", verify]) == 0
    after = json.loads((tmp_path / "summary.json").read_text())
    changed = {key for key in before if before[key] != after[key]}
    if verify == "--no-verify":
        assert changed == set()
    else:
        assert changed == {"verified", "max_logit_gap", "max_logprob_error", "logprob_rounding",
                           "differing_requests"} and after["verified"] == 3
    said = "it was begun with another --speed: 'inf', now 2.0; the same, or a new folder"
    assert said in refused(tmp_path, "--num-requests", 3, "--output", tmp_path, "--resume", "--speed", 2)


def test_segments_that_are_longer_than_blocks_are_told(tmp_path, capsys):
    """As then what prompts share may miss; not where prompts have no blocks."""
    said = "--segment-tokens 32 is more than the trace's blocks of 16 tokens have"
    path = write_trace(tmp_path, [dict(input_length=20, hash_ids=[1, 2], output_length=1)])
    form = ["--trace-block", "16", "--segment-tokens"]
    assert said in serve(tmp_path, path, *form, 32, ranks=2).text
    assert "--segment-tokens" not in serve(tmp_path, path, *form, 16).text
    replay.main(["--trace", str(path), *form, "32"])
    assert said in capsys.readouterr().err
    assert said not in serve(tmp_path, [dict(input_ids=[1], output_length=1)], *form, 32).text


def test_two_runs_do_not_write_one_folder(tmp_path):
    output = tmp_path / "out"
    trace = write_trace(tmp_path, [dict(input_ids=[5], output_length=4000)])
    options = ["--trace", trace, "--output", output, "--resume", "--speed", "inf"]
    job = Job(options)
    while not (output / "run.json").exists():
        time.sleep(0.05)
    assert "another run writes there" in refused(tmp_path, *options)
    os.kill(job.processes[0].pid, signal.SIGTERM)
    assert [status for status, *_ in job.finish()] == [1]


def test_finished_requests_leave_no_tokens_behind(tmp_path):
    """Only a next turn or --verify asks for them."""
    serve(tmp_path, CHAT, ranks=2, prelude="nothing_is_left")
    lines = [dict(input_ids=tokens(30, i), output_length=3) for i in range(6)]
    serve(tmp_path, lines, prelude="nothing_is_left")


def nothing_is_left(rank, seen):
    def observe(server, finished):
        finished = set(np.flatnonzero(server.is_finished))
        left = {line.index for line in server.lines if line.request}
        live = {request.id for request in server.scheduler.running + server.scheduler.waiting}
        wanted = {line.previous.index for line in server.lines
                  if line.previous and line.index not in live | finished}
        assert left <= live | wanted
        per_request = server.times, server.scheduler.cached_tokens
        assert all(set(kept) <= live for kept in per_request)
        for done in (server.engine.computed, server.engine.sampled):
            assert {id for id, _ in done} <= live | wanted
    return observe


# ── however a run ends, its summary is written ───────────────────────────────────────────────


def full_disk(rank, seen, room=1500):
    """Files may take so many bytes, and no more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def no_room_at_all(rank, seen):
    full_disk(rank, seen, room=10)


def folder_vanishes(rank, seen):
    def observe(server, finished):
        if finished and rank == 0 and server.results.folder.exists():
            shutil.rmtree(server.results.folder)
    return observe


def file_is_replaced(rank, seen):
    """As a copy with sed -i does it."""
    def observe(server, finished):
        if finished and rank == 0:
            file = server.results.folder / "requests.jsonl"
            shutil.copy(file, f"{file}.new")
            os.replace(f"{file}.new", file)
    return observe


def profile_fails(rank, seen):
    """The folder takes no profile."""
    def export(self, path):
        raise OSError(28, "No space left on device")
    torch.profiler.profile.export_chrome_trace = export


def bug(rank, seen):
    """The program itself is wrong, on rank 0."""
    def observe(server, finished):
        if rank == 0 and server.engine.iterations == 5:
            raise ZeroDivisionError("injected")
    return observe


@pytest.mark.parametrize("prelude, said, status", [
    ("die", "iteration 6: an exchange failed; rank 1 does not answer; 2 of 8", "failed"),
    ("bug", "ZeroDivisionError('injected'); 2 of 8 are finished", "failed"),
    ("poison", "is not finite; ", "failed")])
def test_a_summary_is_written_however_the_run_ends(tmp_path, prelude, said, status):
    output = tmp_path / "out"
    options = ["--trace", write_trace(tmp_path, CHAT), "--output", output, "--speed", "inf"]
    job = Job(options, 2, prelude)
    deadline = time.monotonic() + 60
    while not (output / "summary.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in job.processes:
        process.join(20)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["status"] == status and said in summary["error"]
    assert summary["completed"] == len((output / "requests.jsonl").read_text().splitlines())
    assert sorted(path.name for path in output.iterdir()) == [
        "requests.jsonl", "run.json", "summary.json"]


@pytest.mark.parametrize("prelude, said", [
    ("full_disk", "requests.jsonl: File too large; "),
    ("folder_vanishes", "requests.jsonl: No such file or directory; "),
    ("file_is_replaced", "requests.jsonl: it was replaced by another file; "),
    ("profile_fails", "profile.json.gz: No space left on device; ")])
def test_what_cannot_be_written_is_one_line(tmp_path, prelude, said):
    """All ranks stop, the file is named, and what was complete stays whole."""
    output = tmp_path / "out"
    lines = [dict(input_ids=tokens(9, i), output_length=5) for i in range(40)]
    options = ["--trace", write_trace(tmp_path, lines), "--output", output, "--speed", "inf",
               "--dtype", "float64"]
    profile = ["--profile"] * (prelude == "profile_fails")
    results = Job([*options, *profile], 2, prelude).finish()
    text = "".join(text for _, text, _ in results)
    assert [status for status, *_ in results] == [1, 1] and said in text
    assert text.count("run_cluster.py: ") == 1
    if prelude == "full_disk":
        assert "summary.json: File too large" in text  # that has no room, either
        records = [json.loads(line) for line in (output / "requests.jsonl").open()]
        assert 0 < len(records) < 40 and not list(output.glob("*.partial"))
        Job([*options, "--resume"], 2).finish()
        assert Served(output, [(0, "", {})]).tokens == oracle(lines)


@pytest.mark.parametrize("output, said", [
    ("/proc/nowhere", "--output /proc/nowhere: No such file"),
    ("{tmp}/file", "--output {tmp}/file: File exists")])
def test_a_folder_that_takes_nothing_is_refused(tmp_path, output, said):
    (tmp_path / "file").write_text("")
    here = str(tmp_path)
    text = refused(tmp_path, "--num-requests", 2, "--output", output.replace("{tmp}", here))
    assert said.replace("{tmp}", here) in text


def test_a_folder_that_was_filled_meanwhile_is_refused(tmp_path, monkeypatch):
    """A run that was slow to set up finds what another has written since it looked first."""
    output = tmp_path / "out"
    original = run_cluster.load_config

    def another_run_ends(folder):
        Job(["--num-requests", 3, "--speed", "inf", "--output", output]).finish()
        return original(folder)
    monkeypatch.setattr(run_cluster, "load_config", another_run_ends)
    save_model(tmp_path / "model", dict(vocab_size=512))
    text = refused(tmp_path, "--model", tmp_path / "model", "--random-weights", "--num-requests", 3,
                   "--output", output)
    assert "already holds requests.jsonl" in text
    assert len((output / "requests.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(tmp_path, closed):
    command = f"{sys.executable} {HERE}/run_cluster.py --num-requests 2 --speed inf --output out"
    assert subprocess.run(f"{command} {closed}", shell=True, cwd=tmp_path, timeout=60,
                          capture_output=True).returncode == 0
    lines = (tmp_path / "out" / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["completed"] * 2


@pytest.mark.parametrize("case", ["closed pipe", "ASCII"])
def test_a_summary_comes_before_the_table(tmp_path, case):
    """A reader that has left, and an encoding without a dash."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"} if case == "ASCII" else None
    trace = write_trace(tmp_path, [dict(input_ids=[7], output_length=1)] * 2)
    process = subprocess.Popen(
        [sys.executable, HERE / "run_cluster.py", "--trace", trace, "--speed", "inf",
         "--output", tmp_path / "out", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    if case == "closed pipe":
        process.stdout.close()
    said = process.stderr.read().decode()
    status = process.wait(60)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["completed"] == 2
    assert "Traceback" not in said and "Exception ignored" not in said
    if case == "closed pipe":
        assert status == 1 and said.endswith("run_cluster.py: the report could not be printed\n")
    else:  # no time per token was measured
        assert status == 0 and rb"TPOT ms  mean \u2013" in process.stdout.read()


# ── faults under torchrun ─────────────────────────────────────────────────────────────────────


class Torchrun:
    """The command line as users type it, in a process group of its own, and its workers."""

    def __init__(self, folder, trace, *arguments, ranks=4, restarts=0):
        self.output = folder / "out"
        self.log = open(folder / "log", "w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc-per-node={ranks}", f"--max-restarts={restarts}",
             str(HERE / "run_cluster.py"), "--device", "cpu", "--trace", str(trace),
             "--dtype", "float64", "--output", str(self.output), *map(str, arguments)],
            cwd=folder, stdout=self.log, stderr=self.log, start_new_session=True)

    def workers(self) -> dict:
        """Process ids by rank, of those that run."""
        return soak.ranks_of(self.process.pid)

    def wait_for_records(self, count, timeout=90):
        file, deadline = self.output / "requests.jsonl", time.monotonic() + timeout
        while not file.exists() or len(file.read_bytes().splitlines()) < count:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()
            time.sleep(0.02)

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def finish(self, timeout=180):
        """(exit status, what was said, lines of ours); no process outlives it by more than 15 s."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        workers = self.workers()
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL) if self.process.poll() is None else None
        text = self.text()
        said = re.findall(r"run_cluster.py: .*", text)
        assert self.process.poll() is not None, text
        return self.process.returncode, text, said, workers


LONG = [dict(input_ids=tokens(5 + i % 40, i), output_length=12 + i % 9, session_id=i % 20)
        for i in range(40)]
on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")


def is_running(id):
    """Whether a process does: one that has ended may still be listed, as a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(ids, timeout=20):
    """Whether all these processes end."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not any(map(is_running, ids)):
            return True
        time.sleep(0.1)
    return False


FAULTS = [
    # what happens to rank 2 (or to torchrun), what one line says then, within seconds
    ("rank 2 is killed", "an exchange failed; rank 2 does not answer", 10),
    ("rank 0 is killed", "an exchange failed; rank 0 does not answer", 10),
    ("rank 2 is stopped", "an exchange failed; rank 2 does not answer", 3 + 10),
    ("torchrun is killed", "torchrun has ended", 10),
    ("Ctrl-C", "stopped by a signal", 10),
    ("Ctrl-C, rank 2 is stopped", "; rank 2 does not answer", 3 + 10)]


@on_linux
@pytest.mark.parametrize("fault, expected, seconds", FAULTS)
def test_who_was_lost_is_one_line(tmp_path, fault, expected, seconds):
    """No C++ frames, no traceback of ours, no process left; rank 0's summary says the same."""
    run = Torchrun(tmp_path, write_trace(tmp_path, LONG), "--timeout", 3, "--max-batch", 2,
                   "--speed", "inf")
    run.wait_for_records(2)
    workers = run.workers()
    assert sorted(workers) == [0, 1, 2, 3]
    began = time.monotonic()
    if "killed" in fault:
        os.kill({"rank 0": workers[0], "rank 2": workers[2]}.get(fault[:6], run.process.pid),
                signal.SIGKILL)
    if "rank 2 is stopped" in fault:
        os.kill(workers[2], signal.SIGSTOP)
    if "Ctrl-C" in fault:
        os.killpg(run.process.pid, signal.SIGINT)
    while "run_cluster.py: " not in run.text():
        assert time.monotonic() - began < seconds, run.text()
        time.sleep(0.05)
    if "stopped" in fault:
        os.kill(workers[2], signal.SIGCONT)  # or torchrun takes half a minute to kill it
    status, text, said, _ = run.finish()
    assert status and len(said) == 1 and expected in said[0]
    assert "frame #" not in text and "Traceback" not in text.partition("torch/distributed")[0]
    assert 'run_cluster.py", line' not in text
    assert gone(workers.values())
    if fault != "rank 0 is killed":
        summary = json.loads((run.output / "summary.json").read_text())
        assert summary["error"] in said[0]
        assert summary["status"] == ("stopped" if fault == "Ctrl-C" else "failed")


def test_the_reason_is_in_torchruns_report(tmp_path):
    """A refusal is said once, does not hang, and is also the last on the screen."""
    status, text, said, _ = Torchrun(tmp_path, "missing.jsonl", ranks=2).finish()
    assert status and said[0].startswith("run_cluster.py: --trace missing.jsonl: No such file")
    assert len(said) == 1 and 'run_cluster.py", line' not in text
    assert text.rpartition("Root Cause")[2].count("--trace missing.jsonl: No such file") == 1


def ends_early(rank, seen):
    """Rank 1 takes the run to be over."""
    def observe(server, finished):
        if rank == 1 and server.engine.iterations == 4:
            server.arrivals.clear()
            server.scheduler.running.clear()
            server.scheduler.waiting.clear()
    return observe


def test_ranks_that_disagree_about_the_end_stop_with_a_message(tmp_path):
    trace = write_trace(tmp_path, [dict(input_ids=[i, 2], output_length=9) for i in range(3)])
    text = ""
    for status, said, _ in Job(["--trace", trace, "--speed", "inf"], 3, "ends_early").finish():
        assert status == 1
        text += said
    assert "iteration 5: the plan of rank 1 differs from that of rank 0" in text
    assert text.count("run_cluster.py: ") == 1


def kill_at_random(folder, trace, seed, undisturbed):
    """A worker is killed at a random moment, from the launch on; the run goes on by itself."""
    rng = random.Random(seed)
    resume = ["--resume"] * (seed % 2)  # a restart by torchrun resumes anyway
    run = Torchrun(folder, trace, "--temperature", 0.7, "--speed", "inf", "--max-batch", 4,
                   *resume, restarts=3)
    while len(run.workers()) < 4:
        assert run.process.poll() is None, run.text()
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 8))
    workers = run.workers()
    if workers:
        os.kill(workers[rng.choice(sorted(workers))], signal.SIGKILL)
    status, text, _, _ = run.finish()
    assert status == 0, text
    lines = (run.output / "requests.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert sorted(record["request_id"] for record in records) == list(range(len(LONG)))
    assert {record["request_id"]: record["output_ids"] for record in records} == undisturbed
    assert json.loads((run.output / "summary.json").read_text())["completed"] == len(LONG)


@on_linux
@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)])
def test_a_killed_worker_loses_nothing(tmp_path, seeds):
    """kill -9 under --max-restarts: all requests complete, with the answers of an undisturbed run,
    none lost, none twice."""
    trace = write_trace(tmp_path, LONG)
    undisturbed = oracle(LONG, sampler=Sampler(0.7))
    for seed in seeds:
        (tmp_path / str(seed)).mkdir()
        kill_at_random(tmp_path / str(seed), trace, seed, undisturbed)


# ── the run as a whole ────────────────────────────────────────────────────────────────────────


def readme_table(head):
    """Rows of the README's table whose first column is called so, a row for each `name` there."""
    text = (HERE / "README.md").read_text().split("\n| " + head + " |")[1]
    for row in text.splitlines()[2:]:
        if not row.startswith("|"):
            return
        names, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        yield from ((name, *cells) for name in re.findall("`([^`]*)`", names))


def test_a_simulation_has_the_names_of_a_run(capsys):
    """For the same things; the README says which, and explains the others."""
    simulate.main(["--num-requests", "5"])
    out, header = capsys.readouterr()
    expected = set()
    for key, _, simulated in readme_table("key of summary.json"):
        if simulated in ("yes", "only") or f"`{key}`" in simulated:
            expected.add(key)
    assert set(json.loads(out)) == expected
    assert header.startswith("simulated: 4 instances of 2 A100, lwm-7b in 16 bits, ")
    assert header.endswith("; the first 5 requests of loogle at 1/s, tokenlake\n")


def test_a_trace_s_keys_are_explained():
    """One table of the README has all that the reader knows, and no others."""
    assert {key for key, _ in readme_table("key of a line")} == set(traces.KNOWN)


def test_lines_of_the_readme_share_a_prefix(tmp_path, capsys):
    """Its sample of a trace is served, and its first two lines share what it says."""
    text = (HERE / "README.md").read_text()
    sample = "\n".join(re.findall(r"^\{.*\}$", text, re.MULTILINE)) + "\n"
    path = tmp_path / "sample.jsonl"
    path.write_text(sample)
    assert sample.count("\n") == 4
    assert run_cluster.run(["--trace", str(path), "--verify", "--output", str(tmp_path / "out")]) == 0
    records = map(json.loads, (tmp_path / "out" / "requests.jsonl").read_text().splitlines())
    cached = {record["request_id"]: record["cached_tokens"] for record in records}
    assert cached == {0: 0, 1: 512, 2: 0, 3: 0}


def test_demo_and_its_report(tmp_path):
    """The built-in demo on four ranks: verified, hits, and every key of the contract."""
    run = serve(tmp_path, None, "--num-requests", 18, ranks=4, dtype="float32")
    s = run.summary
    assert s["verified"] == s["completed"] == 18 and s["hit_rate"] > 0.5
    assert s["puts_local"] >= 0.9 and s["decode_puts_local"] >= 0.95
    assert set(s) == {key for key, _, simulated in readme_table("key of summary.json")
                      if simulated != "only"}
    (environment,) = [said for key, said, _ in readme_table("key of summary.json")
                      if key == "environment"]
    assert set(s["environment"]) == set(re.findall("`([^`]*)`", environment))
    assert s["environment"]["python"] == platform.python_version()
    assert s["environment"]["command"].startswith("run_cluster.py --output ")
    config = s["config"]
    assert config["ranks"] == 4 and config["temperature"] == 0 and config["replicate_factor"] == 3
    assert (config["speed"], config["timeout"], config["scheduler"]) == ("inf", 300, "auto")
    assert s["total_output_tokens"] == sum(map(len, run.tokens.values()))
    for r in run.records.values():
        assert set(r) == {key for key, _ in readme_table("key of requests.jsonl")} - {"output_text"}
        assert r["session_id"] == r["request_id"] // 3
        assert len(r["itl_ms"]) == len(r["output_ids"]) - 1 and r["ttft_ms"] > 0
    assert "18/18 equal recomputation" in run.text
    shown, = report.read_records()["demo"]["result"]
    assert shape(shown) == shape(run.text.replace(" of trace, all sent at once", ""))


def shape(text):
    """Its words, without what differs from run to run."""
    return re.sub(r"\d[\d,.]*(e-\d+)?", "#", text).splitlines()


def watch_times(rank, seen):
    """What happened when, by the clock: when the length of each request's answer grew."""
    seen.update(times={}, lengths={})
    requests = {}  # also those that have ended, and are forgotten by the server

    def observe(server, finished):
        requests.update((line.index, line.request) for line in server.lines if line.request)
        requests.update((request.id, request) for request in server.scheduler.running)
        for id, request in requests.items():
            length = len(request.tokens) - request.num_prompt
            new = length - seen["lengths"].get(id, 0)
            seen["lengths"][id] = length
            seen["times"].setdefault(id, []).extend([server.engine.clock] * new)
    return observe


def test_a_run_says_what_it_is(tmp_path):
    """Before the first request, to whom reads the output; names may have line breaks."""
    lines = [dict(input_ids=[1, 2], output_length=1)]
    folder = save_model(tmp_path / "a\nb")
    text = serve(tmp_path, lines, "--model", folder, "--slots", 7, "--segment-tokens", 4,
                 "--max-batch", 3, ranks=2).text
    config = load_config(folder)
    ranks, model, pool_line, scheduler, trace, blank, *table = text.splitlines()
    assert re.fullmatch(r"       ranks  2 on CPU, \d+ cores; exchanges by gloo", ranks)
    assert model == (f"       model  {tmp_path}/a\\nb, its weights: 1 layers, 4 heads (2 of KV) of 8, "
                     f"{config.num_parameters:,} parameters, float64")
    assert pool_line == "        pool  14 slots (7 per rank), each a segment of 4 tokens: 56 tokens"
    assert scheduler == ("   scheduler  auto: 16 prompt tokens per rank and iteration, "
                         "3 requests at once")
    assert re.fullmatch(r"       trace  /.*trace1.jsonl: 1 requests over 0.0 s of trace, all sent at once", trace)
    assert blank == ""
    assert table[0].startswith("    requests  1 in ")
    alone = serve(tmp_path, lines, "--dtype", "float32").text.splitlines()
    assert alone[0].endswith(" cores; no exchanges") and "built-in, random weights" in alone[1]


def test_times_and_their_summary(tmp_path):
    """TTFT from arrival, TPOT over the tokens after the first, percentiles over requests; time begins
    with the first line."""
    lines = [dict(timestamp=200 + 20 * i, input_ids=tokens(9 + i, i), output_length=1 + i % 4)
             for i in range(12)]
    trace, output = write_trace(tmp_path, lines), tmp_path / "out"
    job = Job(["--trace", trace, "--output", output], 2, "watch_times")
    job.finish()
    run = Served(output, [(0, "", {})])
    job = run.records
    assert len(job) == 12
    s = run.summary
    first = min(r["arrival_s"] for r in job.values())
    last = max(r["finished_s"] for r in job.values())
    assert first == 0 and s["duration"] == pytest.approx(last - first)
    assert s["output_throughput"] == pytest.approx(30 / s["duration"])
    assert s["total_token_throughput"] == pytest.approx(
        (30 + sum(9 + i for i in range(12))) / s["duration"])
    for r in job.values():
        assert r["finished_s"] == pytest.approx(
            r["arrival_s"] + (r["ttft_ms"] + sum(r["itl_ms"])) / 1e3, abs=1e-4)
        if r["itl_ms"]:
            assert r["tpot_ms"] == pytest.approx(np.mean(r["itl_ms"]), abs=1e-3)
        else:
            assert r["tpot_ms"] is None
    values = dict(ttft_ms=[r["ttft_ms"] for r in job.values()],
                  tpot_ms=[r["tpot_ms"] for r in job.values() if r["itl_ms"]],
                  itl_ms=[gap for r in job.values() for gap in r["itl_ms"]])
    for name, found in values.items():
        assert s[f"mean_{name}"] == pytest.approx(np.mean(found))
        for kind, q in (("median", 50), ("p90", 90), ("p99", 99)):
            assert s[f"{kind}_{name}"] == pytest.approx(np.percentile(found, q))


def test_times_are_rank_0s_clock(tmp_path):
    run = serve(tmp_path, CHAT, ranks=2, prelude="watch_times")
    assert run.seen[0] == run.seen[1]
    for id, times in run.seen[0]["times"].items():
        r = run.records[id]
        assert r["finished_s"] == times[-1] / 1e9
        assert r["ttft_ms"] == pytest.approx(times[0] / 1e6 - r["arrival_s"] * 1e3, abs=1e-3)
        assert r["itl_ms"] == pytest.approx([(b - a) / 1e6 for a, b in zip(times, times[1:])],
                                            abs=1e-3)


def test_arrivals_and_think_time(tmp_path):
    """With --speed 2 a line comes at half its time, a turn its think time after the answer."""
    lines = [dict(timestamp=0, input_ids=[1, 2], output_length=2, session_id="s"),
             dict(timestamp=0, input_ids=[3], output_length=2, session_id="s", think_ms=800),
             dict(timestamp=1000, input_ids=[4], output_length=2)]
    path = write_trace(tmp_path, lines)
    output = tmp_path / "out"
    job = Job(["--trace", path, "--speed", 2, "--output", output, "--dtype", "float64"], 2)
    job.finish()
    r = {x["request_id"]: x for x in map(json.loads, (output / "requests.jsonl").open())}
    assert r[2]["arrival_s"] == 0.5
    assert r[1]["arrival_s"] == pytest.approx(r[0]["finished_s"] + 0.4)
    assert {i: x["output_ids"] for i, x in r.items()} == oracle(lines)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_random_oracle_long(tmp_path, seed):
    test_random_oracle(tmp_path, seed)


def test_ranges():
    assert ranges([5, 0, 9], [2, 0, 3]).tolist() == [5, 6, 9, 10, 11]
    assert ranges([], []).tolist() == []


sys.path.insert(0, str(HERE / "bench"))
import baselines  # noqa: E402
import compare  # noqa: E402
import drawing  # noqa: E402
import golden_plans  # noqa: E402
import gpu as gpu_module  # noqa: E402
import kernel_speed  # noqa: E402
import peers  # noqa: E402
import plan  # noqa: E402
import provenance  # noqa: E402
import replay  # noqa: E402
import report  # noqa: E402
import simulate  # noqa: E402
import soak  # noqa: E402
import workloads  # noqa: E402


@pytest.mark.parametrize("part", range(8))
def test_plans_are_as_recorded(part):
    """Seeded scenes of even, dp and pd, with pulls, siblings, puts, replicas and repeated prompts,
    on 1 to 8 instances: plans, groups, loads and slabs, and each row reads each token once."""
    seeds = range(part, golden_plans.NUM_SCENES, 8)
    digests, counts = golden_plans.scenes(seeds)
    recorded = json.loads(golden_plans.FILE.read_text())
    assert digests == [recorded[seed] for seed in seeds]
    assert all(counts[what] for what in ("siblings", "puts", "replicas", "pulls", "ships",
                                         "cached_prompts", "preemptions", "evictions"))


@pytest.mark.parametrize("command, said", [
    (["kernel_speed.py"], "merge   tiny"),
    (["host_time.py", "--requests", 3, "--prompt", 600, "--iterations", 4], "3 decodes, one rank, "),
    (["plan.py", "--instances", 3, "--requests", 2, "--segments", 5, "--json"], "plan_ms_p99"),
    (["simulate.py", "--workload", "toolagent", "--policy", "tokenlake:dp", "--num-requests", 8],
     '"completed": 8'),
    (["simulate.py", "--workload", "demo", "--model", "tiny", "--policy", "tokenlake:pd:2x2",
      "--num-requests", 9], '"completed": 9'),
    (["simulate.py", "--validate", "--num-requests", 40, "--trace", "t.jsonl", "--trace-scale", 64,
      "--speed", "inf"], '"correlation"'),
    (["workloads.py", "sharegpt", "--num-requests", 3], '"hash_ids": [0, 1, 2, ')])
def test_benchmarks_run(tmp_path, command, said):
    script, *arguments = map(str, command)
    (tmp_path / "t.jsonl").write_text("\n".join(
        json.dumps(line) for line in workloads.generate("sharegpt", 40, 10.0, 0)))
    done = subprocess.run([sys.executable, HERE / "bench" / script, *arguments], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and said in done.stdout, done.stderr


@pytest.mark.parametrize("command, said", [
    (["simulate.py", "--policy", "pd:1x4"], "P + D = 4"),
    (["simulate.py", "--policy", "lakes:2x3"], "lakes:2x3: K x M = 4 instances are expected"),
    (["compare.py", "--policies", "router,lakes:2"], "lakes:2: no such policy"),
    (["simulate.py", "--policy", "magic"], "magic"),
    (["simulate.py", "--policy", "tokenlake:pd:1x4"], "pd:1x4"),
    (["simulate.py", "--workload", "missing.jsonl"], "missing.jsonl"),
    (["simulate.py", "--rate", "0"], "--rate"),
    (["simulate.py", "--instances", "0"], "--instances"),
    (["simulate.py", "--capacity-tokens", "100"], "--capacity-tokens"),
    (["compare.py", "--policies", "router,what"], "what"),
    (["compare.py", "--policies", "dp"], "dp"), (["compare.py", "--rates", "1,0"], "--rates"),
    (["simulate.py", "--policy", "tokenlake:hash"], "tokenlake:hash"),
    (["compare.py", "--workload", "demo"], "--workload"),
    (["compare.py", "--seeds", "0"], "--seeds"), (["compare.py", "--real"], "torchrun"),
    (["simulate.py", "--tp", "0"], "argument --tp: '0': an integer from 1 to 1024 is expected"),
    (["simulate.py", "--workload", "a\nb"], r"'a\nb'"), (["simulate.py", "a\nb"], r"a\nb"),
    (["simulate.py", "--workload", "deep.jsonl"], "deep.jsonl:1: not JSON (maximum recursion"),
    (["simulate.py", "--workload", "long.jsonl"], "at most 1073741824 are expected"),
    (["replay.py", "--trace", "deep.jsonl"], "deep.jsonl:1: not JSON (maximum recursion"),
    (["replay.py", "--trace", "a\nb"], r"--trace a\nb: No such file"),
    (["compare.py", "--capacities", "1"], "--capacities 1: 2048 at least"),
    (["compare.py", "--policies", ","], "--policies"), (["kernel_speed.py", "--segments", "0"], "'0'"),
    (["plan.py", "--repeat", "0"], "--repeat: '0': an integer from 1 to 1000000 is expected"),
    (["soak.py", "--kill-every", "0"], "--kill-every: '0': a number from 1e-06 to inf is expected"),
    (["peers.py", "--batch", "1,x"], "--batch: '1,x': up to 16 integers, by commas, are expected"),
    (["peers.py", "--ranks", "0"], "--ranks: '0': an integer from 1 to 64 is expected"),
    (["peers.py", "--prefixes", "49"], "--prefixes 49: no more than --num-requests 48 are expected"),
    (["peers.py", "--heads", "6"], "--heads 6: a multiple of --kv-heads 4 is expected"),
    (["peers.py", "--head-dim", "3"], "--head-dim 3: an even number is expected"),
    (["peers.py", "--threads", "4096"], "--threads 4096: several ranks share all"),
    (["peers.py", "--segment-tokens", "577"], "--segment-tokens 577: no more than the 576 of"),
    (["peers.py", "--model", "missing"], "--model: missing/config.json"),
    (["workloads.py", "loogle", "--rate", "0"], "--rate: '0': a number from 1e-06 to 1000000.0")])
def test_wrong_options_of_benchmarks_are_named(tmp_path, monkeypatch, capsys, command, said):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "long.jsonl").write_text(json.dumps({**IDS, "output_length": 2**50}))
    monkeypatch.chdir(tmp_path)
    program = importlib.import_module(command[0].removesuffix(".py"))
    with pytest.raises(SystemExit) as ended:
        program.main(command[1:])
    text = capsys.readouterr().err
    assert ended.value.code == 2 and said in text and len(text.splitlines()) == 1


@pytest.mark.parametrize("program, names", [
    (simulate, "model hardware instances tp num-requests seed chunk-tokens max-batch "
               "capacity-tokens tbt-slo-ms workload policy rate trace validate table"),
    (compare, "policies seeds rate rates capacities output slots"), (workloads, "rate seed"),
    (report, "measure again trace"),
    (replay, "trace instances placement replicate-factor segment-tokens capacity-tokens"),
    (plan, "instances requests segments repeat"), (golden_plans, "record"),
    (kernel_speed, "models segments dtype json"),
    (peers, "model layers num-requests sharing batch ranks threads device dtype json")])
def test_any_option_of_benchmarks_is_refused_shortly(program, names, capsys):
    for name in names.split():
        for value in ("--", "9" * 5000, "\0"):
            with pytest.raises(SystemExit, match="2"):
                program.main([f"--{name}={value}"])
            text = capsys.readouterr().err
            assert text.count("\n") == 1 and len(text) < 300 and "<lambda>" not in text, text


def test_a_peer_that_fails_is_a_line(monkeypatch):
    """Of the benchmark of kernels: what it says, and the run goes on."""
    def broken():
        raise ImportError("another build\nof it is expected")
    monkeypatch.setattr(kernel_speed, "median_ms", lambda run: run())
    assert kernel_speed.times_ours(lambda: 6.0, 2.0) == 3.0
    said = kernel_speed.times_ours(broken, 2.0)
    assert said.startswith("failed: ImportError") and "\n" not in said
    result = dict(kind="decode", model="tiny", x_flash=said)
    assert kernel_speed.format_result(result).endswith(said)
    assert kernel_speed.format_heads(result).split() == ["kind", "model", "flash", "x", "ours"]


@pytest.mark.parametrize("program, arguments, columns", [
    (plan, "--instances 3 --requests 2 --segments 5 --repeat 2",
     "instances requests segments reads median p99 with digest"),
    (golden_plans, "", "what came up times"),
    (kernel_speed, "--shared 3x64+16", "kind model batch rows context segment shared error read once "
     "alone alone least most")])
def test_tables_begin_with_what_was_measured(monkeypatch, capsys, program, arguments, columns):
    """And on what, before a line without text; then the names of the columns."""
    monkeypatch.setattr(golden_plans, "NUM_SCENES", 2)
    assert program.main(arguments.split()) == 0
    heading, table = capsys.readouterr().out.split("\n\n")
    assert f"Run on {provenance.describe_machine()}" in heading
    assert table.splitlines()[0].split() == columns.split()


def test_a_soak_says_what_it_measures(capsys):
    options = soak.parse_options(["--num-requests", "50"])
    heading, columns = soak.describe(options).split("\n\n")
    assert "50 requests" in heading and provenance.describe_machine() in heading
    run = SimpleNamespace(answers=lambda: [1] * 50, seconds=61.2, kills=1,
                          memory=lambda: [(0, 300.0, 301.5, 30.0), (1, 300.0, 302.5, -2.0)])
    soak.show("with kills", run)
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["with", "kills", "50", "61", "1", "0", "300.0", "301.5", "+30"]
    assert second.split() == ["1", "300.0", "302.5", "-2"]
    assert len(first) == len(second) == max(map(len, columns.splitlines()))
    soak.show("undisturbed", SimpleNamespace(**vars(run) | dict(memory=lambda: [])))
    assert capsys.readouterr().out.split() == ["undisturbed", "50", "61", "1", *"––––"]


@pytest.mark.parametrize("command", [
    ["plan.py", "--instances", "2", "--requests", "1", "--segments", "2", "--repeat", "1"],
    ["host_time.py", "--requests", "2", "--prompt", "600", "--iterations", "2"],
    ["kernel_speed.py"], ["gpu.py", "sanitizer"],
    ["compare.py", "--workload", "sharegpt", "--model", "llama-3.1-8b", "--num-requests", "3",
     "--seeds", "1", "--policies", "router", "--rates", "5", "--rate", "4096"]])
def test_who_reads_no_further_is_no_error(tmp_path, command):
    """As `head` does not: the exit is quiet."""
    script, *arguments = command
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, HERE / "bench" / script, *arguments], cwd=tmp_path,
                          stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "" or script == "compare.py" and "Error" not in done.stderr


@pytest.mark.parametrize("body, status, out, error", [
    ("print('found'); return 0", 0, "found\n", ""), ("return 3", 3, "", ""), ("return None", 0, "", ""),
    ("print('found'); raise KeyboardInterrupt", 1, "found\n", "p.py: stopped by Ctrl-C\n"),
    ("Parser(prog='p.py').refuse('wrong')", 2, "", "p.py: error: wrong\n")])
def test_programs_end_with_their_status(tmp_path, body, status, out, error):
    (tmp_path / "p.py").write_text(
        f"import sys\nsys.path[:0] = {[str(HERE), str(HERE / 'bench')]}\n"
        f"from options import Parser, run_main\ndef main(arguments):\n    {body}\nrun_main(main)\n")
    done = subprocess.run([sys.executable, "p.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, error)


@pytest.mark.parametrize("name, said", [
    ("-", "'-': a file is expected"), ("/dev/full/x", "Not a directory; a file that can be written"),
    (".", "Is a directory; a file that can be written is expected"), ("pipe", "a file is expected")])
def test_figures_of_a_benchmark_go_into_a_file(tmp_path, monkeypatch, capsys, name, said):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    both_ends = os.open("pipe", os.O_RDWR)  # or who opens it would wait for a reader
    with pytest.raises(SystemExit, match="2"):
        kernel_speed.main(["--json", name])
    os.close(both_ends)
    text = capsys.readouterr().err
    assert f"argument --json: {name!r}: " in text and said in text and text.count("\n") == 1


def test_the_proof_on_a_gpu_is_rehearsed(tmp_path):
    """The same path with tiny shapes: every step says what it has found, or what it lacks; the file
    is whole after each."""
    file = tmp_path / "gpu.json"
    steps = "facts demo bf16-8b engine sanitizer".split()
    done = subprocess.run([sys.executable, HERE / "bench" / "gpu.py", *steps, "--output", file],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: step["found"] for name, step in json.loads(file.read_text())["steps"].items()}
    heading, table = done.stdout.split("\n\n")
    assert f"Run on {provenance.describe_machine()}" in heading and "a rehearsal" in heading
    assert [line.split()[0] for line in table.splitlines()] == ["step", *steps] == ["step", *found]
    assert found["demo"]["verified"] == found["bf16-8b"]["verified"] == 6
    assert found["bf16-8b"]["max_logprob_error"] < 3 * found["bf16-8b"]["logprob_rounding"]
    scenes = found["engine"]["scenes"]
    assert [scene["scene"] for scene in scenes] == ["1 x 40", "3 x 24"]
    assert all(scene["iteration_ms"] > 0 < scene["host_ms"]["forward"] for scene in scenes)
    assert found["sanitizer"]["said"] == "6 heads of 24: right"


def test_the_proof_on_several_cards_is_rehearsed(tmp_path):
    """Exchanges, iterations that are verified, bandwidth, and a rank that dies."""
    file = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         HERE / "bench" / "gpu.py", "--output", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: step["found"] for name, step in json.loads(file.read_text())["steps"].items()}
    assert found["exchanges"] == dict(rounds=10, backend="gloo")
    assert found["iterations"]["verified"] > 5 and found["large"]["iteration_ms"] > 0
    assert "rank 1 does not answer" in found["lost-rank"]["said"]
    assert 1 < found["lost-rank"]["seconds"] < 30
    assert not any("failed" in step for step in found.values())


def test_a_step_that_fails_is_said(tmp_path, monkeypatch, capsys):
    """And what it lacks, and that it took too long; the others run, and the status is 1."""
    def fails():
        raise RuntimeError("two\nlines")

    def lacks():
        raise gpu_module.Skipped("a tool is not installed")
    monkeypatch.setattr(gpu_module, "STEPS", {
        "facts": gpu_module.Step(9, fails), "demo": gpu_module.Step(9, lacks)})
    for name, found in (("facts", dict(failed="two\\nlines")),
                        ("demo", dict(skipped="a tool is not installed"))):
        gpu_module.run_here(name, tmp_path / name)
        assert json.loads((tmp_path / name).read_text()) == found
    assert gpu_module.run_step("facts", 0.01) == dict(failed="it took more than 0 s")
    monkeypatch.setattr(gpu_module, "run_step", lambda name, seconds: json.loads(
        (tmp_path / name).read_text()))
    assert gpu_module.main(["--output", str(tmp_path / "gpu.json")]) == 1
    heading, table = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["step", "facts", "demo"]
    with pytest.raises(SystemExit, match="2"):
        gpu_module.main(["fact"])
    assert "fact: there are facts, demo" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gpu_module.main(["--output", str(tmp_path)])
    assert "a file in a folder that is there is expected" in capsys.readouterr().err


SMALL_PEERS = """--layers 2 --hidden-size 48 --intermediate-size 64 --heads 4 --kv-heads 2
    --head-dim 16 --vocab-size 160 --num-requests 5 --prefix-tokens 24 --own-tokens 5
    --output-tokens 4 --segment-tokens 8 --chunk-tokens 32 --batch 2,3 --rounds 1""".split()
BY_ALL = ["generate()", "generate(), batches of 2", "generate(), batches of 3",
          "by hand, batches of 2", "by hand, batches of 3"]


@pytest.mark.parametrize("sharing, more, labels", [
    ("on", ["--uneven"], ["prefix once", "prefix once, batches of 2", "prefix once, batches of 3",
                          "tokenlake, 1 rank", "tokenlake, 2 ranks"]),
    pytest.param("off", ["--ranks", "2"], ["tokenlake, 2 ranks"], marks=pytest.mark.slow)])
def test_peers_give_the_same_tokens(tmp_path, monkeypatch, capsys, sharing, more, labels):
    """Transformers in every way and batch, padded or not, and one and two ranks of ours."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # threads that wait for each other are slow
    file = tmp_path / "report.json"
    assert peers.main([*SMALL_PEERS, "--sharing", sharing, *more, "--json", str(file)]) == 0
    load, = json.loads(file.read_text())["loads"]
    assert [row["label"] for row in load["rows"]] == BY_ALL + labels
    assert all(row["equal"] == 5 and row["seconds"][0] > 0 for row in load["rows"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" 5/5")]
    assert len(lines) == len(BY_ALL + labels)


@pytest.mark.parametrize("change, status, said", [(1, 0, "a near tie"), (2, 1, "WRONG")])
def test_peers_tell_near_ties_from_wrong_tokens(monkeypatch, capsys, change, status, said):
    """Tokens 2i and 2i + 1 always have equal logits; a served answer has another one at its third
    place."""
    pytest.importorskip("transformers")
    random = peers.random_weights

    def in_pairs(*arguments):
        weights = random(*arguments)
        weights.head[1::2] = weights.head[::2]
        return weights

    def tampered(folder, load, ranks, options):
        first = [peers.ONE_BY_ONE]
        (_, answers), = peers.serve_by_peers(folder, load, first, peers.where(options))
        answers[3][2] ^= change
        return 1.0, answers

    monkeypatch.setattr(peers, "random_weights", in_pairs)
    monkeypatch.setattr(peers, "serve_by_us", tampered)
    monkeypatch.setattr(peers, "in_a_process", lambda work, *arguments: work(*arguments))
    threads = str(torch.get_num_threads())
    options = [*SMALL_PEERS, "--sharing", "off", "--ranks", "1", "--threads", threads]
    assert peers.main(options) == status
    out = capsys.readouterr().out
    assert f"tokenlake, 1 rank: request 3 differs at token 2: {said}" in out
    assert [line.split()[-1] for line in out.splitlines() if "tokenlake, 1 rank  " in line] == ["4/5"]


def test_ratios_of_peers_are_made_within_a_round():
    first, second, ours = peers.ONE_BY_ONE, peers.Variant("hand", 2), peers.Variant(peers.OURS, 1)
    load = dict(prompts=[[1], [2]], output_tokens=5)
    seconds = {first: [8.0, 10.0], second: [4.0, 20.0], ours: [2.0, 5.0]}
    rows = peers.summarise(load, seconds, [peers.Difference(ours.label, 1, 0, 0.0)])
    assert [row["to_one_by_one"] for row in rows] == [[1, 1], [2, 0.5], [4, 2]]
    assert [row["to_best_peer"] for row in rows] == [[0.5, 1], [1, 0.5], [2, 2]]
    assert [row["equal"] for row in rows] == [2, 2, 1]
    assert rows[2]["output_throughput"] == pytest.approx(10 / 3.5)


def test_peers_need_transformers(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        peers.main([])
    said = ": error: transformers is not installed; it is what is compared with\n"
    assert capsys.readouterr().err.endswith(said)


def test_generated_loads_share_what_they_say():
    """Turns, shares and lengths of the generated loads, and the same again for the same seed."""
    generate = workloads.generate
    for name in workloads.WORKLOADS:
        lines = list(generate(name, 2000, 5.0, 1))
        assert lines == list(generate(name, 2000, 5.0, 1)) != list(generate(name, 2000, 5.0, 2))
        assert len(traces.read_trace(map(json.dumps, lines), name)) == 2000
        sessions = {}
        for line in lines:
            sessions.setdefault(line.get("session_id", line["hash_ids"][-1]), []).append(line)
        if name != "mixed":
            assert lines[-1]["timestamp"] / 2000 == pytest.approx(200, rel=0.12)
        heads = Counter(line["hash_ids"][0] for line in lines)
        length = np.mean([x["input_length"] for x in lines])
        if name == "sharegpt":
            assert heads == {0: 2000} and max(x["input_length"] for x in lines) <= 1536 + 2400
        elif name == "toolagent":
            assert sorted(n / 2000 for n in heads.values()) == pytest.approx(
                [0.14, 0.38, 0.48], abs=0.04)
            own = [x["input_length"] % 512 + 512 * (len(x["hash_ids"]) - 13) for x in lines
                   if x["hash_ids"][0] == 0]
            assert 1500 < np.mean(own) < 2500
        elif name == "loogle":
            assert 200 < len(heads) < 2000 / 4 and max(heads.values()) <= 12
            assert 20_000 < length < 28_000
        elif name == "scbench":
            assert {len(turns) for turns in sessions.values()} == {5}
            assert 200_000 < length < 255_000
            for turns in sessions.values():
                assert {x["think_ms"] for x in turns} == {5000}
                for a, b in zip(turns, turns[1:]):
                    grown = b["input_length"] - a["input_length"]
                    assert 30 <= grown - a["output_length"] <= 200
                    whole = a["input_length"] // 512
                    assert a["hash_ids"][:whole] == b["hash_ids"][:whole]
        else:
            kinds = Counter("scbench" if "session_id" in x else "sharegpt" if n == 1 else "loogle"
                            for n, x in ((n, x) for x in lines for n in [
                                heads[x["hash_ids"][0]] < 100 or 1]))
            assert kinds["scbench"] / 2000 == pytest.approx(1 / 3, abs=0.08)


def fleet(policy, slots=400, N=4, model="tiny", **lake):
    config = LakeConfig(16, slots, **{"chunk_tokens": 64, "max_batch": 32, **lake})
    return baselines.make_fleet(policy, N, simulate.MODELS[model], config, dtype=torch.bfloat16)


def asks(lines):
    """Lines of a trace from (timestamp, hash ids, last block's tokens, output)."""
    return traces.read_trace((json.dumps(dict(
        timestamp=at, input_length=512 * (len(ids) - 1) + tail, output_length=output,
        hash_ids=ids)) for at, ids, tail, output in lines), "test")


def simulated(policy, lines, slots=400, block=16, N=4, limit=None, **lake):
    """A simulation with the tiny model and blocks of 16 tokens; all has to be given back."""
    for line in lines:
        line.input_length = -(-line.input_length * block // 512)
    made = fleet(policy, slots, N, **lake)
    run = simulate.Simulation(made, lines, simulate.Roofline(LlamaConfig(), "a100"), block).run(limit)
    for lake, scheduler in zip(made.lakes, made.schedulers * (limit is None)):
        bal = lake.balancer
        tree = bal.tree
        assert not scheduler.running and not scheduler.waiting and not bal.in_progress
        assert not getattr(scheduler, "parked", ())
        assert len(tree.lru) == len(tree.segments)
        used = len(tree.segments) + len(tree.extras)
        assert sum(map(len, bal.free)) + used == len(lake.instances) * bal.slots
    return run


def test_router_follows_the_launcher_s_rules():
    """Longest prefix above 0.3 of the prompt, else the smallest tree; the shortest queue where
    queues are over 64 and over half apart. What an instance evicted, the router does not know."""
    router = fleet("router", slots=8)
    shared = tokens(64, 1)
    first = Request(0, shared + tokens(16, 2), 90)
    assert router.arrive(first) == []
    assert [len(s.waiting) for s in router.schedulers] == [1, 0, 0, 0]
    extend = router.lakes[0].balancer.extend_ids
    place = lambda request: (extend(request), router.choose(request))[1]
    assert place(Request(1, shared + tokens(32, 3), 100)) == 0  # 64 of 96 tokens are there
    assert place(Request(2, shared + tokens(150, 4), 220)) == 1  # 64 of 214: below 0.3
    assert place(Request(3, shared[:48] + tokens(112, 4), 170)) == 1  # 48 of 160 is not above 0.3
    router.schedulers[0].waiting.clear()
    assert place(Request(4, shared + tokens(32, 5), 100)) == 0  # it is sent there all the same
    for scheduler, n in zip(router.schedulers, (70, 5, 6, 5)):
        scheduler.running = [None] * n
    assert place(Request(5, shared + tokens(32, 6), 100)) == 1  # 65 apart: the shortest queue
    router.schedulers[0].running.pop()
    assert place(Request(6, shared + tokens(32, 7), 100)) == 0  # 64 apart
    for scheduler, n in zip(router.schedulers, (290, 200, 200, 200)):
        scheduler.running = [None] * n
    assert place(Request(7, shared + tokens(32, 8), 100)) == 0  # not 1.5 times as many
    router.MAX_TREE = 80
    router.arrive(Request(8, tokens(80, 9), 90))  # the smallest tree, 1
    for scheduler in router.schedulers:
        scheduler.running = []
    router.arrive(Request(9, tokens(80, 9)[:48] + tokens(48, 10), 100))
    assert len(router.trees[1]) == 5  # LRU by tokens: the older request's ends have left
    assert [place(Request(10, tokens(80, 9)[:n], 90)) for n in (48, 80)] == [1, 1]


def test_conductor_follows_its_algorithm():
    """The least of queue + prefill (+ copy of a prefix that is longer elsewhere)."""
    made = fleet("pd:2x2", chunk_tokens=1024)
    long, lake = tokens(1600, 1), made.lakes[1]
    warm = prepared(lake.balancer, 90, long, output=1)
    lake.balancer.release(warm)
    ask = lambda seed=2: Request(0, long + tokens(16, seed), 1700)
    for scheduler in made.schedulers:  # 1 µs a row, nothing else
        scheduler.predictor.coefficients = [0, 10**6, 0, 0, 1000]
    made.bandwidth = 1e15
    assert made.choose(ask()) == (1, 1)  # 16 new rows there, 1,616 or a copy here
    made.schedulers[1].add(Request(1, tokens(500, 3), 600))
    assert made.choose(ask()) == (1, 1)  # a longer prompt lets it pass
    for id in range(2, 10):
        made.schedulers[1].add(Request(id, tokens(15, id), 20))
    assert made.choose(ask()) == (0, 1)  # 120 rows wait there: the prefix is copied
    made.bandwidth = 1.0
    assert made.choose(ask()) == (1, 1)  # but not over a slow link
    assert made.choose(Request(2, tokens(100, 4), 120)) == (0, 0)  # nothing cached: shortest queue
    made.bandwidth = 1e15
    (copy,) = made.arrive(ask())
    assert (copy.source, copy.target, copy.start, copy.stop) == (1, 0, 0, 1600)
    assert not made.schedulers[0].waiting  # until it has landed
    made.landed(copy)
    assert made.schedulers[0].waiting and made.lakes[0].balancer.tree.match(copy.leaving.ids) == 100
    assert made.choose(ask()) == (0, 0)
    near = Request(3, long + tokens(16, 5), 1700)
    made.lakes[0].balancer.tree.evict()  # 99 of 100 segments: not 1.25 times as long elsewhere
    assert made.choose(near) == (0, 0)


def test_prefills_hand_over_to_the_least_loaded_decode():
    made = fleet("pd:1x2", N=3)
    C, ready = 16, []
    for id, length in enumerate((100, 30, 47, 20)):
        request = prepared(made.lakes[0].balancer, id, tokens(length, id), output=20)
        request.tokens.append(5)
        made.schedulers[0].parked.append(request)
        ready.append(request)
    moves = made.advance(0)
    assert [t.target for t in moves] == [1, 2, 2, 2]  # 101 | 31 + 48 + 21
    for t, request in zip(moves, ready):
        source, target, rows = t.spans(C)
        assert (t.start, t.stop, rows.sum()) == (0, request.num_prompt, request.num_prompt)
        at = [x for a, n in zip(source, rows) for x in range(a, a + n)]
        assert at == [int(request.table[p // C]) * C + p % C for p in range(t.stop)]
        at = [x for a, n in zip(target, rows) for x in range(a, a + n)]
        assert at == [int(t.arriving.table[p // C]) * C + p % C for p in range(t.stop)]
        made.landed(t)
    assert [len(s.running) for s in made.schedulers] == [0, 1, 3]
    assert all(r.remaining == 1 for s in made.schedulers[1:] for r in s.running)
    again = prepared(made.lakes[0].balancer, 9, tokens(100, 0), output=20)  # it kept what it got
    again.tokens.append(6)
    made.schedulers[0].parked.append(again)
    made.flying[2] = [Request(50, tokens(1000, 5), 1001)]
    made.flying[2][0].num_slots = 63
    (t,) = made.advance(0)
    assert (t.target, t.start, t.stop) == (1, 96, 100) and t.spans(C)[2].tolist() == [4]


def test_a_request_alone_takes_what_the_roofline_says():
    """TTFT and TPOT on one instance, by hand: chunks of a prompt, then decodes."""
    run = simulated("tokenlake", asks([(0, list(range(20)), 512, 30)]), N=1)
    ttft, tbt = run.latency(0)
    alone = run.roofline.alone(run.lines[0].input_length, run.lines[0].output_length, 64)
    assert (ttft, tbt) == (pytest.approx(alone[0], rel=0.01), pytest.approx(alone[1], rel=0.01))
    assert run.summary()["slo_attainment"] == 1.0
    assert run.roofline.compute(64, 0) >= run.roofline.weights


@pytest.mark.parametrize("policy", ["tokenlake", "tokenlake:pd:2x2", "lakes:2x2", "router", "pd:1x3",
                                    "pd:3x1"])
def test_simulated_fleets_serve_everything(policy, monkeypatch):
    """Under pressure, all of a load with sessions and shared prefixes; planning each iteration or
    not is the same to a percent; a request longer than an instance is refused, and has missed."""
    load = lambda: asks([(2 * i, [i % 7, 100 + i % 7, *range(1000 + 10 * i, 1003 + 10 * i)], 300,
                          5 + i % 40) for i in range(120)])
    run = simulated(policy, load(), slots=40)
    summary = run.summary()
    assert summary["completed"] == 120 and 0.1 < summary["hit_rate"] < 0.5
    assert {len(x) for x in run.times.values()} == {5 + i for i in range(40)}
    assert all(b > a for x in run.times.values() for a, b in zip(x, x[1:]))
    monkeypatch.setattr(simulate, "REUSE", 0)
    exact = simulated(policy, load(), slots=40).summary()
    assert summary["duration"] == pytest.approx(exact["duration"], rel=0.02)
    lines = asks([(0, [1, 2, 3], 512, 4), (0, list(range(100, 160)), 512, 4)])
    run = simulated(policy, lines, slots=40)
    assert len(run.times) == (2 if "lake" in policy else 1)
    assert "lake" in policy or (run.refused, run.summary()["slo_attainment"]) == (1, 0.5)


def test_lakes_behind_a_router_lie_between_one_lake_and_instances_of_their_own():
    """One lake of all is the flat pool, lakes of one are the router's instances, to the last figure;
    what is between sends less than the first, to fewer, and waits less."""
    load = lambda: asks([(2 * i, [i % 5, 100 + i % 5, *range(1000 + 10 * i, 1003 + 10 * i)], 300,
                          5 + i % 40) for i in range(60)])
    found = {}
    for policy in ("tokenlake", "lakes:1x4", "lakes:2x2", "lakes:4x1", "router"):
        run = simulated(policy, load(), slots=60)
        found[policy] = run.summary()
        lakes = [lake.instances for lake in run.fleet.lakes]
        if policy == "lakes:2x2":
            assert lakes == [[0, 1], [2, 3]] and len(run.fleet.trees) == 2
            assert all(lake.config.max_batch == 2 * 32 for lake in run.fleet.lakes)
            assert 0 < found[policy]["fan_out"] <= 1 and found[policy]["plan_ms_median"] > 0
        del found[policy]["plan_ms_median"]
    assert found["lakes:1x4"] == found["tokenlake"] and found["lakes:4x1"] == found["router"]
    assert found["router"]["fan_out"] is None is found["router"]["idle_fraction"]
    for key in ("fan_out", "sent_mib", "idle_fraction"):
        assert 0 < found["lakes:2x2"][key] < found["tokenlake"][key]


def test_lakes_serve_by_urgency_or_in_order():
    """`:fcfs` reaches the schedulers of all lakes; K lakes of M have to be the instances there are,
    of which there may be 1,024."""
    made = fleet("lakes:2x2:fcfs")
    assert [s.patience for s in made.schedulers] == [baselines.by_arrival] * 2
    assert [s.patience for s in fleet("lakes:2x2").schedulers] != [baselines.by_arrival] * 2
    for policy in ("lakes:2x3", "lakes:4x0", "lakes:0x0", "lakes:5x1:fcfs"):
        with pytest.raises(ValueError, match=r"^lakes:\dx\d: K x M = 4 instances are expected$"):
            fleet(policy)
    for policy in ("lakes:4", "lakes:2x2x1", "lakes:-2x-2", "lakes:2X2", "lakes:99999x1"):
        with pytest.raises(ValueError, match=f"^{policy}: no such policy; .*lakes:KxM, "):
            fleet(policy)
    many = fleet("lakes:32x32", slots=2, N=1024)
    assert [len(lake.instances) for lake in many.lakes] == [32] * 32
    assert many.lakes[-1].instances[-1] == 1023


def test_a_lake_of_one_is_planned_by_hand_as_by_gen_plans():
    """Rows, attention and cache reads of an iteration, for prompts, decodes and a repeated prompt
    of which one row is computed that puts nothing."""
    made = fleet("router", 200, 1)
    lake, scheduler = made.lakes[0], made.schedulers[0]
    repeated = tokens(96, 9)
    for id, prompt in enumerate((repeated, tokens(300, 1), tokens(40, 2), repeated, tokens(64, 3))):
        scheduler.add(Request(id, list(prompt), len(prompt) + 20))
        for _ in range(4):
            batches, dops = scheduler.schedule()
            plan, transfer, _ = lake.gen_plans(batches, dops, lake.get_prefix_tree())
            by_hand = simulate.Alone.of(lake, batches[0])
            assert (by_hand.features == lake.features(plan, transfer)).all()
            assert by_hand.reads == plan.reads.sum()
            assert by_hand.tokens_read == plan.tokens_read
            assert len(by_hand.runs) == len(plan.runs) == by_hand.local.sum()
            scheduler.update(by_hand, {run.request.id: 7 for run in plan.runs if run.samples})
    assert scheduler.cached_tokens[3] == 95


@pytest.mark.parametrize("start", [1_200_000, 1_700_000_000_000])
def test_time_begins_with_the_first_line(tmp_path, capsys, start):
    """A slice of a trace, or one with Unix times, is simulated and replayed as the same one from 0
    on, turns of sessions among it."""
    lines = list(workloads.generate("mixed", 40, 2.0, 3))
    assert any("session_id" in line for line in lines)
    summaries, replays = [], []
    for name, first in (("zero.jsonl", 0), ("late.jsonl", start)):
        moved = [line | {"timestamp": first + 700 * i} for i, line in enumerate(lines)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in moved))
        path = str(tmp_path / name)
        simulate.main(["--workload", path, "--num-requests", "40", "--rate", "1"])
        summary = json.loads(capsys.readouterr().out)
        del summary["config"], summary["environment"]
        summaries.append(summary)
        replay.main(["--trace", path, "--instances", "3", "--json"])
        replays.append(json.loads(capsys.readouterr().out))
    for at_zero, late in (summaries, replays):
        del at_zero["plan_ms_median"], late["plan_ms_median"]
        assert at_zero == late and late["hit_rate"] > 0


def test_nobody_waits_for_the_first_timestamp(tmp_path):
    """A trace that begins late is served at once, its requests as far apart as they are in it; a run
    that resumes goes on from there."""
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps(dict(
        timestamp=2_000_000 + 70_000 * i, input_length=512, output_length=4, hash_ids=[i])) + "\n"
        for i in range(3)))
    command = ["--trace", str(path), "--trace-scale", "64", "--speed", "200", "--output",
               str(tmp_path / "out")]
    assert run_cluster.run(command) == 0
    file = tmp_path / "out" / "requests.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["arrival_s"] for record in records] == [0, 0.35, 0.7]
    file.write_text(json.dumps(records[0]) + "\n")
    assert run_cluster.run([*command, "--resume"]) == 0
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[0] == records[0]
    assert [record["arrival_s"] for record in again] == [0, 0.35, 0.7]
    assert all(a["output_ids"] == b["output_ids"] for a, b in zip(records, again))


@pytest.mark.parametrize("first, apart", [(0, 4), (1, 2**56), (2**63 - 32, 4)])
def test_hash_ids_are_of_any_64_bits(tmp_path, capsys, first, apart):
    """Eight prompts of four blocks each, no id twice: none hits. Then the same eight again: all do,
    but for their last token."""
    path = tmp_path / "t.jsonl"
    ids = [[first + apart * i + k for k in range(4)] for i in range(8)]
    for rows, hits in ((ids, 0), (ids + ids, 8 * 2047 / (16 * 2048))):
        path.write_text("".join(json.dumps(dict(
            timestamp=5000 * i, input_length=2048, output_length=4, hash_ids=row)) + "\n"
            for i, row in enumerate(rows)))
        simulate.main(["--workload", str(path), "--model", "llama-3.1-8b"])
        assert json.loads(capsys.readouterr().out)["hit_rate"] == hits
        replay.main(["--trace", str(path), "--json"])
        assert json.loads(capsys.readouterr().out)["hit_rate"] == hits


def test_blocks_are_nobody_s_tokens(tmp_path, capsys):
    """A simulated block is no prompt that is given by its tokens, whatever these are."""
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (
        dict(timestamp=0, input_length=1024, output_length=1, hash_ids=[0, 1]),
        dict(timestamp=5000, input_ids=list(range(1024)), output_length=1))))
    simulate.main(["--workload", str(path)])
    assert json.loads(capsys.readouterr().out)["hit_rate"] == 0


def test_a_simulation_knows_early_that_it_fails():
    """Requests whose time for a first token is over have missed, served or not; each counts once,
    so a whole run finds the same."""
    load = lambda: asks([(0, list(range(20 * i, 20 * i + 8 + i % 9)), 512, 9)
                          for i in range(60)])
    whole, short = (simulated("tokenlake", load(), N=1, slots=600, limit=n) for n in (None, 6))
    assert len(whole.missed) + whole.kept == 60 and 6 < len(whole.missed) < 60
    assert 6 < len(short.missed) and short.missed < whole.missed and short.now < whole.now
    assert {i for i in range(60) if not whole.good(whole.lines[i])} == whole.missed


def test_schedulers_keep_the_time_between_tokens_that_nearly_all_allow():
    """By default; what the command line says instead goes before."""
    options = simulate.parser("").parse_args(["--workload", "loogle", "--num-requests", "200"])
    options.policy, options.rate = "router", 1.0
    simulate.check(options)
    run = simulate.simulate(options)
    alone = [run.roofline.alone(line.input_length, line.output_length) for line in run.lines]
    allowed = [simulate.SLO * 1e12 * tpot for _, tpot in alone]  # ps
    for scheduler in run.fleet.schedulers:
        assert 0.985 <= np.mean([x >= scheduler.slo for x in allowed]) <= 0.995
    options.tbt_slo_ms = 7.0
    assert simulate.simulate(options, limit=0).fleet.schedulers[0].slo == 7 * 10**9


def test_the_conductor_counts_all_who_wait_where_the_queue_is_in_order():
    """A prompt of 50 rows waits for shorter ones by patience, and for all in order of arrival."""
    made = {name: fleet(name, 100) for name in ("pd:1x3", "pd:1x3:fcfs")}
    for one in made.values():
        for id, n in enumerate((20, 300)):
            one.schedulers[0].add(Request(id, tokens(n, id), n + 5))
    short = made["pd:1x3"].estimate(0, 20, 0)
    assert made["pd:1x3"].queue(0, 50) == short
    assert made["pd:1x3:fcfs"].queue(0, 50) == short + made["pd:1x3"].estimate(0, 300, 0)


def test_a_fleet_serves_by_urgency_or_in_order():
    """`:fcfs` behind a policy: first come, first served, at the instances of a baseline too."""
    for policy in ("tokenlake", "router", "pd:1x3"):
        order = {}
        for name in (policy, policy + ":fcfs"):
            lines = asks([(0, list(range(100 * i, 100 * i + 40 - 3 * i)), 512, 2)
                          for i in range(8)])
            run = simulated(name, lines, N=4)
            first = {i: times[0] for i, times in run.times.items()}
            order[name] = sorted(first, key=first.get)
        assert order[policy] != order[policy + ":fcfs"]
        if policy != "router":  # one queue
            assert order[policy + ":fcfs"] == list(range(8))


def test_baselines_are_no_strawmen():
    """Without pressure or sharing the router is as fast as the pool, to a tenth; behind one prefix
    nobody's hits are further from the pool's than a prefix per lake."""
    rng = np.random.default_rng(0)
    lines, first = [], 0
    for _ in range(150):
        length = int(rng.lognormal(math.log(4000), 0.5))
        ids = list(range(first, first := first + -(-length // 512)))
        lines.append(dict(timestamp=0, input_length=length, hash_ids=ids,
                          output_length=int(rng.integers(50, 200))))
    took = {}
    for policy in ("tokenlake", "router"):
        model = simulate.MODELS["lwm-7b"]
        config = LakeConfig(512, 3000, chunk_tokens=1024, max_batch=128)
        made = baselines.make_fleet(policy, 4, model, config, dtype=torch.bfloat16)
        run = simulate.Simulation(made, traces.read_trace(map(json.dumps, lines), "x"),
                                  simulate.Roofline(model, "a100", 2)).run()
        took[policy] = run.summary()["duration"]
    assert 0.9 < took["tokenlake"] / took["router"] < 1.1
    alike = lambda: asks([(20 * i, [0, 1, 2, 3, 10 + i], 100, 8) for i in range(60)])
    runs = {policy: simulated(policy, alike(), slots=1000) for policy in (
        "tokenlake", "router", "pd:1x3", "pd:3x1")}
    total = runs["router"].summary()["total_input_tokens"]
    hits = {policy: run.summary()["hit_rate"] for policy, run in runs.items()}
    assert all(abs(hits["tokenlake"] - x) <= 3 * 64 / total + 1e-9 for x in hits.values())
    assert hits["tokenlake"] > 0.9 * 64 * 59 / total


def test_comparison_finds_goodput_and_draws(tmp_path):
    """compare.py, small: JSON, a table, and figures where Matplotlib is."""
    command = [sys.executable, HERE / "bench" / "compare.py", "--workload", "sharegpt", "--model",
               "llama-3.1-8b", "--num-requests", "20", "--seeds", "1", "--policies",
               "tokenlake,pd:1x3", "--rates", "5,50", "--rate", "64", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "goodput" in done.stdout, done.stderr
    assert "Simulated: sharegpt, 20 requests; 4 instances of 2 A100, llama-3.1-8b, " in done.stdout
    assert "131,072 bytes of KV a token" in done.stdout and "tokenlake: goodput " in done.stderr
    result = json.loads((tmp_path / "out" / "compare.json").read_text())["policies"]
    assert list(result) == ["tokenlake", "pd:1x3"]
    for found in result.values():
        assert found["p90_goodput"].keys() >= {"mean", "spread"} and 0 <= found["hit_rate"] <= 1
        assert [x["rate"] for x in found["curve"]] == [5, 50] and found["cache_load_cv"] >= 0
        assert all({"slo_attainment", "normalised_ttft", "mean_tpot_ms", "hit_rate"} <= x.keys()
                   for x in found["curve"])
        if found["p90_goodput"]["mean"] > 50:
            assert found["curve"][1]["slo_attainment"] >= 0.9
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "out" / "latency.svg").stat().st_size > 10_000
        assert (tmp_path / "out" / "balance.svg").stat().st_size > 10_000


SMALL_COMPARISON = """--workload sharegpt --model llama-3.1-8b --num-requests 12 --seeds 1
    --policies tokenlake,router --rates 5,50 --rate 64""".split()


def test_a_comparison_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """With what was found, the last line torn; and to the same result, also with more policies. All
    was kept, nothing is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "draw_if_possible", lambda *_: None)
    policies = lambda folder: json.loads((tmp_path / folder / "compare.json").read_text())["policies"]
    assert compare.main([*SMALL_COMPARISON, "--output", "whole"]) == 0
    lines = (tmp_path / "whole" / "measured.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 + 4
    (tmp_path / "cut").mkdir()
    kept = b"".join(lines[:4])
    (tmp_path / "cut" / "measured.jsonl").write_bytes(kept + lines[4][:-9])
    assert compare.main([*SMALL_COMPARISON, "--output", "cut"]) == 0
    said = capsys.readouterr().err
    assert "2 searches for a goodput, 2 are there already" in said
    assert "4 simulations at common rates, 1 are there already" in said
    again = (tmp_path / "cut" / "measured.jsonl").read_bytes()
    assert again.startswith(kept) and sorted(again.splitlines(keepends=True)) == sorted(lines)
    assert policies("cut") == policies("whole")
    with monkeypatch.context() as patched:
        patched.setattr(compare, "ProcessPoolExecutor", lambda *_, **__: SimpleNamespace(
            shutdown=lambda: None))
        assert compare.main([*SMALL_COMPARISON, "--output", "whole"]) == 0
    assert (tmp_path / "whole" / "measured.jsonl").read_bytes() == b"".join(lines)
    more = [*SMALL_COMPARISON, "--policies", "router,pd:1x3", "--output", "whole"]
    assert compare.main(more) == 0
    assert "2 searches for a goodput, 1 are there already" in capsys.readouterr().err
    assert list(policies("whole")) == ["router", "pd:1x3"]
    assert policies("whole")["router"] == policies("cut")["router"]


@pytest.mark.parametrize("change, content, said", [
    (["--num-requests", "13"], "", "--output out: it was begun with another --num-requests: 12, now 13;"),
    (["--rate", "9"], "", "another --rate: 64.0, now 9.0; the same, or a new folder, is expected"),
    ([], "1\n", "out/measured.jsonl:2: no measurement; a new folder is expected"),
    ([], '{"what": "all", "case": [], "found": 1}\n', "out/measured.jsonl:2: no measurement"),
    ([], None, "--output out: already holds compare.json, without measured.jsonl; a new folder")])
def test_another_comparison_needs_another_folder(
        tmp_path, monkeypatch, capsys, change, content, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text("{}")
    if content is not None:
        options = compare.parser().parse_args(SMALL_COMPARISON)
        first = json.dumps(compare.basis(options)) + "\n"
        (tmp_path / "out" / "measured.jsonl").write_text(first + content)
    with pytest.raises(SystemExit, match="2"):
        compare.main([*SMALL_COMPARISON, "--output", "out", *change])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_a_comparison_kept_is_of_the_same_code_and_trace(tmp_path, monkeypatch):
    """And of one program at a time."""
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "t.jsonl"
    trace.write_text(json.dumps(IDS))
    options = compare.parser().parse_args(["--workload", "t.jsonl"])
    measured = compare.Measured(tmp_path, compare.basis(options))
    with pytest.raises(ValueError, match="another comparison writes there"):
        compare.Measured(tmp_path, compare.basis(options))
    measured.file.close()
    compare.Measured(tmp_path, compare.basis(options)).file.close()
    trace.write_text(json.dumps(IDS) + "\n")
    with pytest.raises(ValueError, match="begun with another content of the trace; the same"):
        compare.Measured(tmp_path, compare.basis(options))
    trace.write_text(json.dumps(IDS))
    monkeypatch.setattr(compare, "digest_of_code", lambda program: "another")
    with pytest.raises(ValueError, match="begun with another version of the code; the same"):
        compare.Measured(tmp_path, compare.basis(options))


@pytest.mark.parametrize("to_all", [True, False])
def test_a_comparison_is_stopped_in_a_line(tmp_path, to_all):
    """By Ctrl-C, of which its workers hear or not; none of them is left."""
    command = [sys.executable, HERE / "bench" / "compare.py", "--workload", "loogle",
               "--num-requests", "5000", "--seeds", "1", "--policies", "tokenlake,router"]
    with subprocess.Popen([*command, "--output", "out"], cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr.readline() == "2 searches for a goodput\n"
        # Once there are workers, they have been given work.
        while len(children_of(process.pid)) < os.cpu_count():
            assert process.poll() is None
            time.sleep(0.05)
        workers = children_of(process.pid)
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert error == ("compare.py: stopped by Ctrl-C; out/measured.jsonl has what was found, "
                     "the same command goes on\n")
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(process: int) -> list[int]:
    """Its worker processes, by id."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(id) for task in tasks for id in task.read_text().split()]


def test_figures_say_what_they_show():
    """The CV is that of the README's table; instances and the goal have names; there is no
    background, so that a page may be light or dark."""
    pytest.importorskip("matplotlib")
    record = report.read_records()["loogle"]
    policies = record["result"][0]["policies"]
    plt = drawing.pyplot()
    balance = drawing.draw_balance(plt, policies)
    rows = [line.split("|") for line in report.loogle_table(record).splitlines()[2:]]
    titles = {f"{row[1].strip()}: CV {row[6].strip()}" for row in rows}
    assert {axis.get_title() for axis in balance.axes} == titles
    legend, = balance.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1", "2", "3"]
    lines = balance.axes[0].lines
    assert len({line.get_linestyle() for line in lines}) == len(lines) == 4
    latency = drawing.draw_latency(plt, policies)
    assert [text.get_text() for text in latency.axes[0].texts] == ["goal: 0.9"]
    legend, = latency.legends
    assert [text.get_text() for text in legend.get_texts()] == list(policies)
    shapes = {(line.get_marker(), line.get_fillstyle()) for line in latency.axes[1].lines}
    assert len(shapes) == len(policies)
    for name in ("latency", "balance"):
        drawn = (report.FIGURES / f"{name}.svg").read_text()
        assert drawing.INK in drawn and "fill: #ffffff" not in drawn
    plt.close("all")


def test_the_readmes_say_what_was_measured():
    """Their tables are those of bench/results, to the character; every table stands in one."""
    records = report.read_records()
    texts = [page.read_text() for page in report.PAGES]
    assert texts == [report.fill(page, records) for page in report.PAGES]
    assert {name for text in texts for name, _ in report.MARKED.findall(text)} == set(report.TABLES)


def test_records_say_how_they_came_about():
    """Each is of its experiment's command, and of a machine without a name."""
    records = report.read_records()
    assert {f"{name}.json" for name in records} == {f.name for f in report.RESULTS.iterdir()}
    for name, record in records.items():
        assert list(record) == ["command", "commit", "code", "machine", "date", "seconds", "result"]
        assert record["command"] == report.command_of(name) and record["result"]
        assert record["machine"].keys() == {"cpus", "platform", "python", "torch", "numpy"}
        text = json.dumps(record)
        assert not any(part in text for part in (str(Path.home()), str(HERE), os.uname().nodename))


@pytest.mark.parametrize("name", [name for name in report.EXPERIMENTS if name not in report.TEXTS])
def test_the_programs_accept_what_is_measured(name, tmp_path, monkeypatch, capsys):
    """Each experiment's options, with a trace of the name that commands have for it."""
    if name == "peers" and not importlib.util.find_spec("transformers"):
        pytest.skip("it is what is compared with")
    (tmp_path / report.TRACE).write_text(json.dumps(
        dict(timestamp=0, input_length=20, output_length=2, hash_ids=[1])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(report.RANKS.get(name, 1)))
    done = []
    note = lambda *arguments, **_: done.append(arguments)
    monkeypatch.setattr(replay, "replay", lambda *_: note(name) or {})
    monkeypatch.setattr(simulate, "validate", lambda arguments: note(arguments) or 0)
    monkeypatch.setattr(simulate, "table", note)
    monkeypatch.setattr(simulate, "simulate", lambda options: note(options) or SimpleNamespace(
        summary=lambda: baselines.make_fleet(options.policy, options.instances, simulate.MODELS[
            "tiny"], LakeConfig()) and {}))
    monkeypatch.setattr(compare, "compare", lambda options: note(options) or {})
    monkeypatch.setattr(compare, "real", lambda options: note(options) or 0)
    monkeypatch.setattr(plan, "milliseconds", lambda *sizes: note(sizes) or np.ones((2, 3)))
    monkeypatch.setattr(peers, "compare", lambda *load: note(load) or dict(wrong=0))
    program, *arguments = report.EXPERIMENTS[name].split()
    main = importlib.import_module(program.removesuffix(".py")).main
    assert not main(arguments) and done


def test_records_are_of_what_a_program_needs():
    """Of what it imports, and what that does, and what it starts; not of others."""
    files_needed = provenance.files_needed
    needed = {name: {file.name for file in files_needed(report.HERE / f"{name}.py")}
              for name in ("plan", "compare", "peers", "simulate")}
    assert {"plan.py", "tokenlake.py", "pool.py", "kernels.py", "balancer.py"} <= needed["plan"]
    assert not needed["plan"] & {"run_cluster.py", "compare.py", "report.py", "test_tokenlake.py"}
    assert {"simulate.py", "baselines.py", "workloads.py"} <= needed["compare"]
    assert {"transformers_peer.py", "run_cluster.py", "results.py"} <= needed["peers"]
    assert "model.py" in needed["simulate"]


def test_measuring_and_reporting(tmp_path, monkeypatch, capsys):
    """A record is written once, and again if its command or the code is another; the README's table
    is made of it, and only what stands between its marks."""
    readme = tmp_path / "README.md"
    monkeypatch.setattr(report, "PAGES", [readme])
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    small = "plan.py --instances {} --requests 2 --segments 3 --repeat 2 --json"
    monkeypatch.setattr(report, "EXPERIMENTS", {
        "planning": small.format(2), "planning-unshared": small.format(3)})
    monkeypatch.setattr(report, "TABLES", {"planning": report.TABLES["planning"]})
    text = "Before.\n\n<!-- table: planning -->\nold\n<!-- /table -->\nAfter.\n"
    readme.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    said = capsys.readouterr().err
    assert "bench/results has no planning.json, planning-unshared.json" in said
    assert "`python bench/report.py --measure planning planning-unshared`" in said
    assert said.count("\n") == 1 and readme.read_text() == text
    assert report.main(["--measure"]) == 0
    records = report.read_records()
    assert [record["result"][0]["instances"] for record in records.values()] == [2, 3]
    assert records["planning"]["command"] == f"python bench/{small.format(2)}"
    assert report.main([]) == 0
    made = readme.read_text()
    rows = made.splitlines()
    assert rows[:3] == ["Before.", "", "<!-- table: planning -->"]
    assert rows[-2:] == ["<!-- /table -->", "After."] and rows[4] == "|" + " --- |" * 6
    median = records["planning"]["result"][0]["plan_ms_median"]
    assert rows[5].startswith(f"| 2 | 2 | 3 | everywhere | {report.short(median, 2)} | ")
    assert rows[6].startswith("| 3 | 2 | 3 | none | ") and "old" not in made
    report.main([])
    assert readme.read_text() == made  # steady
    capsys.readouterr()
    report.main(["--measure", "planning"])
    assert "planning: is there already" in capsys.readouterr().out
    assert report.read_records() == records
    report.main(["--measure", "planning", "--again"])
    assert report.read_records()["planning"]["result"] != records["planning"]["result"]
    records = report.read_records()
    monkeypatch.setattr(report, "digest_of_code", lambda name: "another")
    report.main([])
    assert "earlier state of the code: planning, planning-unshared\n" in capsys.readouterr().out
    monkeypatch.setitem(report.EXPERIMENTS, "planning", "plan.py --instances 0")
    assert report.main(["--measure", "planning"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("report.py: planning: exit status 2: plan.py: error: ")
    assert report.read_records() == records  # left as they were


@pytest.mark.parametrize("arguments, text, said", [
    (["--measure", "planing"], "", "--measure planing: there are replay-hash-alone replay-hash "),
    (["--measure", "loogle", "conversation"], "",
     "--trace: conversation need Mooncake's conversation_trace.jsonl"),
    (["--measure", "schedulers", "--trace", "none"], "", "No such file or directory: 'none'"),
    ([], "<!-- table: plan -->\n<!-- /table -->", "README.md: no table is called plan; options, "),
    ([], "<!-- table: real -->\n", "<!-- table: NAME --> and <!-- /table --> are expected"),
    ([], "<!-- table: real -->\n<!-- table: real -->\n<!-- /table -->", "are expected")])
def test_what_cannot_be_reported_is_named(tmp_path, monkeypatch, capsys, arguments, text, said):
    page = tmp_path / "README.md"
    page.write_text(text)
    monkeypatch.setattr(report, "PAGES", [page])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and page.read_text() == text


def test_tables_of_small_measurements(tmp_path, monkeypatch, capsys):
    """Every table from what its programs print, for loads of a few requests."""
    lines = workloads.generate("sharegpt", 6, 5.0, 0)
    (tmp_path / report.TRACE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)

    def record(command):
        program, *arguments = command.split()
        assert importlib.import_module(program.removesuffix(".py")).main(arguments) == 0
        return dict(command=f"python bench/{command}", result=report.parse(capsys.readouterr().out))

    found = record("compare.py --json --workload sharegpt --capacity-tokens 200000 --num-requests 4 "
                   "--rate 4096 --rates 1,2,4 --seeds 1 --capacities 1500000 "
                   "--policies tokenlake,read-alone,hash,unreplicated,ship,tokenlake:fcfs")
    policies = found["result"][0]["policies"]
    rates = {policy: report.goodput(entry) for policy, entry in policies.items()}
    assert set(rates.values()) == {"no limit"}  # four requests may come at once
    assert [report.goodput(dict(p90_goodput=x)) for x in (0, 5.876, dict(mean=41.72))] == [
        "0", "5.88", "41.7"]
    assert [report.short(x) for x in (1036.2, 9.994, 0.0091, None)] == [
        "1,036", "9.99", "0.00910", "–"]
    rows = lambda table: [[cell.strip() for cell in line.split("|")[1:-1]]
                          for line in table.splitlines()]
    head, _, *body = rows(report.loogle_table(found))
    assert [row[:2] for row in body] == [list(pair) for pair in rates.items()]
    at_4 = policies["hash"]["curve"][2]
    assert body[2][3] == report.short(at_4["normalised_ttft"]) and at_4["rate"] == 4
    assert body[2][6] == f"{100 * at_4['hit_rate']:.0f} %" and len(head) == len(body[2]) == 7
    assert rows(report.loads_table(found))[2] == [
        "sharegpt, 200k (4, one seed)", rates["tokenlake"], *"––––"]
    sizes = rows(report.capacities_table(found))
    assert sizes[0] == ["cache, tokens", *policies]
    assert [row[0] for row in sizes[2:]] == ["200k", "1.5M"] and sizes[2][1:] == [*rates.values()]
    assert rows(report.elastic_table(found))[2][2] == report.short(
        policies["tokenlake"]["curve"][1]["normalised_ttft"])
    assert rows(report.ablations_table(found))[2] == ["sharegpt", *rates.values()]
    fleets = [record("simulate.py --workload sharegpt --num-requests 9 --rate 7 --instances 4 "
                     f"--policy {policy}") for policy in ("lakes:2x2", "router")]
    pooled, routed = rows(report.lakes_table(*fleets))[2:]
    assert pooled[:3] == ["4", "lakes:2x2", "7"] and float(pooled[8]) > 0
    assert routed[:4] == ["4", "router", "7", "100.0 %"] and routed[8:] == ["–", "–", "–"]
    steps = rows(report.schedulers_table(record(
        f"simulate.py --table --json --trace {report.TRACE} --num-requests 3 --rate 4")))
    assert [row[0] for row in steps[2::5]] == [
        "loogle, 4 requests/s", "sharegpt, 24 requests/s", "conversation trace"]
    assert [row[1] for row in steps[2:]] == ["even", "dp", "pd:1x3", "pd:2x2", "pd:3x1"] * 3


def test_comparison_on_real_ranks(tmp_path):
    """Every policy's tokens equal recomputation; the pool hits most and is the most even."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
               HERE / "bench" / "compare.py", "--real", "--num-requests", "30", "--policies",
               "tokenlake,lakes:2x2,router,pd:1x3,pd:2x2", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = {r["policy"]: r for r in json.loads((tmp_path / "out" / "real.json").read_text())}
    assert all(r["verified"] == 30 for r in results.values())
    pool = results.pop("tokenlake")
    assert pool["cache_load_cv"] < min(r["cache_load_cv"] for r in results.values())
    assert all(r["put_bytes"] > 0 for name, r in results.items() if "pd" in name)
    assert results["lakes:2x2"]["query_bytes"] > 0 == results["router"]["query_bytes"]


# ── what was planned, for people ──────────────────────────────────────────────────────────────────

import record as record_module  # noqa: E402
import watch as watch_module  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def describe(lake) -> dict:
    options = SimpleNamespace(model=None, scheduler="auto", trace=None, command="a test")
    return record_module.describe_run(lake, torch.float32, options)


def observe_scene(seed):
    """A golden scene, watched. Yields (scene, observer, query plan, transfer plan, record)."""
    scene = golden_plans.Scene(seed)
    records = []
    observer = record_module.Observer(scene.scheduler, records.append)
    schedule = scene.scheduler.schedule

    def look_and_schedule():
        observer.look()
        return schedule()
    scene.scheduler.schedule = look_and_schedule
    few, scheduler_module.FEW_ROWS = scheduler_module.FEW_ROWS, scene.few_rows
    try:
        for _, query_plan, transfer_plan, _ in scene.plans():
            observer.see(len(records) + 1, query_plan, transfer_plan)
            if query_plan.runs:
                observer.tell(10**9, ())
                yield scene, observer, query_plan, transfer_plan, records[-1]
    finally:
        scheduler_module.FEW_ROWS = few


def check_reads(header, record):
    """Each row reads each token up to its own once: old KV, then what its request writes before it;
    and who is elsewhere is met, as the row travels there or the KV comes."""
    S, C = header["slots"], header["segment_tokens"]
    trips = {(q["request"], q["source"], q["target"]) for q in record["queries"]}
    unused = set(trips)
    came = {(m["kind"], m["request"], m["target"], slot) for m in record["moves"] for slot in m["slots"]}
    puts = {(m["request"], m["source"], m["target"], slot) for m in record["moves"]
            if m["kind"] == "put" for slot in m["slots"]}
    old = {(read["request"], read["instance"]): read for read in record["reads"]}

    def meets(run, instance):
        if instance != run["instance"]:
            trip = run["request"], run["instance"], instance
            assert trip in trips
            unused.discard(trip)
    for number, run in enumerate(record["runs"]):
        end = run["position"] + run["rows"]
        read = old.get((run["request"], run["instance"]), dict(tokens=0, slots=[], pulled=[]))
        assert len(read["slots"]) == -(-read["tokens"] // C)
        seen = Counter(range(read["tokens"]))
        for index, slot in enumerate(read["slots"]):
            if index in read["pulled"]:
                assert ("pull", run["request"], run["instance"], slot) in came
            else:
                meets(run, slot // S)
        for fresh in record["fresh"]:
            if number in fresh["readers"]:
                writer = record["runs"][fresh["writer"]]
                assert writer["request"] == run["request"]
                seen.update(range(writer["position"], writer["position"] + writer["rows"]))
                if fresh["place"] == "sibling":
                    assert ("sibling", run["request"], run["instance"], writer["slot"]) in came
                else:
                    meets(run, fresh["instance"])
        assert {t: n for t, n in seen.items() if t < end} == dict.fromkeys(range(end), 1)
        put = run["request"], run["instance"], run["home"], run["slot"]
        assert (put in puts) == (run["puts"] and run["home"] != run["instance"])
    assert not unused


def check_totals(header, record):
    """By instance, and bytes."""
    for instance, balance in enumerate(record["balance"]):
        rows = [run["rows"] for run in record["runs"] if run["instance"] == instance]
        assert balance["rows"] == sum(rows)
    first = {read["request"]: read for read in reversed(record["reads"])}
    assert sum(b["reads"] for b in record["balance"]) == sum(r["tokens"] for r in first.values())
    assert all(q["bytes"] == q["rows"] * header["query_bytes"] for q in record["queries"])
    assert all(m["bytes"] == m["rows"] * header["kv_bytes"] for m in record["moves"])
    assert all(trip["source"] != trip["target"] for trip in record["queries"] + record["moves"])


def check_words(header, record):
    """The text has the numbers of the record."""
    text = record_module.explain(header, record)
    assert all(len(line) < 150 for line in text.splitlines()), text
    assert len(text.splitlines()) < 120
    rows = re.findall(r"^  instance \d+: ([\d,]+) rows?;", text, re.MULTILINE)
    assert [int(n.replace(",", "")) for n in rows] == [b["rows"] for b in record["balance"]]
    trips = [dict(q, kind="query") for q in record["queries"]] + record["moves"]
    sections = re.findall(r"^  (\S.*)((?:\n    .*)*)", text.split("what travels:\n")[1], re.MULTILINE)
    assert len(sections) == len(record_module.WHY)
    for (kind, (name, why)), (heading, leaving) in zip(record_module.WHY.items(), sections):
        those = [trip for trip in trips if trip["kind"] == kind]
        total = record_module.name_bytes(sum(trip["bytes"] for trip in those))
        assert heading == f"{name}: {total}" + f" ({why})" * bool(those)
        said = Counter()
        for source, targets in re.findall(r"from (\d+): .*; (?:rows|tokens): (.*)", leaving):
            for count, target in re.findall(r"([\d,]+) to (?:instance )?(\d+)", targets):
                said[int(source), int(target)] += int(count.replace(",", ""))
        planned = Counter()
        for trip in those:
            planned[trip["source"], trip["target"]] += trip["rows"]
        assert said == planned
    for key in ("preempted", "ended"):
        if record[key]:
            assert f"  {key}: {record_module.name_numbers('request', record[key])}" in text
    copies = {(r["request"], *map(tuple, (r["slots"], r["pulled"]))): len(r["copies"]) for r in record["reads"]}
    if len(copies) <= record_module.MOST_LINES:
        assert sum(map(int, re.findall(r" \((\d+) copies", text))) == sum(copies.values())


def watch_evictions(balancer, evictions):
    """Adds (slot, whether it was to be filled with a copy in this iteration) of each to a list."""
    evict, replicate = balancer.tree.evict, balancer.replicate
    at_work = []

    def watched_replicate():
        at_work.append(True)
        copies = replicate()
        at_work.clear()
        return copies

    def watched_evict():
        slot = evict()
        if slot is not None:
            evictions.append((slot, bool(at_work) and slot in balancer.copying))
        return slot
    balancer.replicate, balancer.tree.evict = watched_replicate, watched_evict


def test_records_say_what_is_planned():
    """Scenes of every policy: each row reads each token once, as the record has it; who keeps the
    slots as it says has those of the pool; the text says the same, and the page gets it all."""
    seen = Counter()
    for seed in range(0, golden_plans.NUM_SCENES, 16):
        slots, records, evictions = watch_module.Slots(), [], []
        for scene, observer, query_plan, transfer_plan, record in observe_scene(seed):
            header = describe(scene.lake)
            if records:  # from the second one on: what left, and whether it was about to be a copy
                assert sorted(e["slot"] for e in record["evicted"]) == sorted(
                    slot for slot, is_copy in evictions if not is_copy)
                assert record["evictions"] == len(evictions)
            evictions.clear()
            if not records:
                watch_evictions(scene.lake.balancer, evictions)
            check_reads(header, record)
            check_totals(header, record)
            check_words(header, record)
            slots.apply(record)
            owners = record_module.owners_of_slots(scene.lake.balancer, scene.scheduler.running)
            held = {slot: -1 - owner[0] if isinstance(owner, tuple) else observer.numbers[owner.id]
                    for slot, owner in owners.items()}
            assert {slot: n for slot, n in slots.held.items() if n} == held
            assert [b["reads"] for b in record["balance"]] == query_plan.reads.tolist()
            for read in record["reads"]:  # copies are never first replicas
                copied = [index for index, slot in enumerate(read["slots"]) if slot in slots.copies]
                assert read["copies"] == copied
                seen["copies read"] += len(copied)
            records.append(json.loads(json.dumps(record)))
            seen.update(move["kind"] for move in record["moves"])
            for key in ("evicted", "evictions", "preempted", "freed", "ended", "published"):
                seen[key] += len(record[key]) if isinstance(record[key], list) else record[key]
            seen["copies evicted"] += sum(event["replica"] for event in record["evicted"])
        assert records and watch_module.pack(header, records)["used"] <= header["slots"]
        assert sum(r["evictions"] for r in records) <= scene.lake.balancer.evictions
        assert sum(len(r["preempted"]) for r in records) <= scene.scheduler.counters["preemptions"]
    assert all(seen[what] > 1 for what in (
        "pull", "sibling", "put", "replica", "evicted", "preempted", "freed", "ended", "published",
        "copies evicted", "copies read")), seen
    assert seen["evicted"] < seen["evictions"]


def test_evictions_are_named_in_full():
    """A segment that has left once, and a copy for each replica of one that stays."""
    event = lambda segment, replica: dict(segment=segment, slot=0, replica=replica)

    def explained(gone=(), copies=()):
        record = dict.fromkeys("arrived admitted preempted ended dropped published".split(), [])
        record["evicted"] = [event(n, False) for n in gone] + [event(n, True) for n in copies]
        return record_module.explain_events(record)
    assert explained([11, 7], [7, 9, 7]) == ["evicted: segments 7, 11; copies of segments 7 (twice), 9"]
    assert explained([4]) == ["evicted: segment 4"] and explained() == []
    assert explained(copies=[5]) == ["evicted: a copy of segment 5"]
    assert explained(copies=[5] * 3) == ["evicted: copies of segment 5 (3 times)"]
    (many,) = explained(copies=range(20))
    assert many.endswith("11, …") and "12" not in many


def test_one_is_not_many():
    """Counts of one, and where they are."""
    assert record_module.name_counts("at", Counter([0])) == "1 at instance 0"
    assert record_module.name_counts("to", Counter([2, 0, 2])) == "1 to instance 0, 2 to 2"
    balance = [dict(rows=1, reads=1, free=1), dict(rows=2, reads=0, free=0)]
    assert record_module.explain_runs(dict(balance=balance, runs=[])) == [
        "instance 0: 1 row; gives 1 token of old KV to requests; 1 slot free",
        "instance 1: 2 rows; gives 0 tokens of old KV to requests; 0 slots free"]


def test_what_a_record_says_is_explained():
    """Every key of plans.jsonl, and no other, stands in the table of record.py."""
    table = record_module.__doc__.split("begins with a line for the run:")[1]
    keys = re.findall(r"^    (  )?([a-z_]+)(?:   | ?$|  )", table, re.MULTILINE)
    explained = {key for nested, key in keys if not nested}
    nested = {key for nested, key in keys if nested}
    written, within = set(), set()
    for seed in (0, 3, 7, 60):
        for scene, _, _, _, record in observe_scene(seed):
            written |= {*record, *describe(scene.lake)}
            for value in record.values():
                entries = [entry for entry in value if isinstance(entry, dict)] if (
                    isinstance(value, list)) else []
                within.update(*entries)
    assert explained == written and nested == within


def total_bytes(records) -> dict:
    total = Counter()
    for record in records:
        total["query_bytes"] += sum(q["bytes"] for q in record["queries"])
        for move in record["moves"]:
            total[f"{move['kind']}_bytes"] += move["bytes"]
    return {f"{kind}_bytes": total[f"{kind}_bytes"] for kind in ("query", *pool.MOVE_KINDS)}


SMALL_POOL = ["--slots", 7, "--segment-tokens", 8, "--chunk-tokens", 24]


@pytest.mark.parametrize("ranks, arguments", [
    (1, []), (4, []), (3, ["--scheduler", "dp", "--no-plan-ahead"]),
    (4, ["--scheduler", "pd:1x3", "--plan-ahead"]),
    (2, ["--placement", "hash", "--plan-ahead", "--dtype", "bfloat16"]),
    (4, [*SMALL_POOL, "--plan-ahead"]), (4, [*SMALL_POOL, "--no-plan-ahead"])])
def test_a_run_tells_its_plans(tmp_path, ranks, arguments):
    """All of it, and what it sums up to is what summary.json counts; one iteration as text."""
    lines = [dict(input_ids=tokens(40, 1 + i % 2) + tokens(20 + i, 5 + i), output_length=4 + i % 5)
             for i in range(9)]
    run = serve(tmp_path, lines, "--record", 1000, "--explain", 4, *arguments, ranks=ranks, dtype="float32")
    (folder,) = (path.parent for path in tmp_path.glob("out*/plans.jsonl"))
    header, records = watch_module.read_plans(folder / "plans.jsonl")
    summary = run.summary
    assert len(records) == summary["iterations"] and header["instances"] == ranks
    assert total_bytes(records) == {key: summary[key] for key in total_bytes(records)}
    rows = [sum(b["rows"] for b in record["balance"]) for record in records]
    assert sum(rows) == summary["computed_tokens"] + summary["dropped_rows"]
    reads = np.sum([[b["reads"] for b in record["balance"]] for record in records], 0)
    assert reads.tolist() == summary["cache_reads"]
    read = sum(b["tokens_read"] for record in records for b in record["balance"])
    assert read * header["kv_bytes"] == summary["kv_bytes_read"]
    assert sum(record["evictions"] for record in records) == summary["evictions"]
    assert (summary["evictions"] > 0) == (SMALL_POOL[1] in arguments)
    assert sum(len(record["preempted"]) for record in records) == summary["preemptions"]
    came = [event for record in records for event in record["arrived"]]
    assert sorted(event["request"] for event in came) == list(range(9))
    for record in records:
        check_reads(header, record)
    clocks = [record["clock_s"] for record in records]
    assert clocks == sorted(clocks) and 0 <= clocks[-1] < 240
    assert record_module.explain(header, records[3]) in run.text
    said = f"--record 1000: the run ended after {len(records)} iterations\n"
    assert run.text.count("run_cluster.py: ") == 1 and said in run.text
    assert watch_module.main([str(folder)]) is None and (folder / "lake.html").stat().st_size < 300_000


def test_plans_that_nobody_asks_for_cost_nothing(tmp_path):
    """From the last one that is asked for on, the engine has no observer."""
    lines = [dict(input_ids=tokens(9, 1), output_length=8)]
    trace = write_trace(tmp_path, lines)
    for asked in ([], ["--explain", "2"], ["--record", "2", "--explain", "3"]):
        observers = []

        def note(server, finished):
            observers.append(server.engine.observer is not None)
        out = tmp_path / f"out{len(asked)}"
        arguments = ["--trace", str(trace), "--output", str(out), "--speed", "inf", "--device", "cpu"]
        assert run_cluster.run([*arguments, *asked], note) == 0
        last = int(asked[-1]) if asked else 1
        assert observers == [True] * (last - 1) + [False] * (len(observers) - last + 1)
        assert (out / "plans.jsonl").exists() == ("--record" in asked)
    assert (out / "plans.jsonl").read_text().count("\n") == 3


def test_plans_begin_anew_with_the_pool(tmp_path, capsys):
    """A folder that holds some is refused; with --resume they are of the run that goes on, as its
    pool is; one that finds nothing to do leaves them."""
    trace = write_trace(tmp_path, [dict(input_ids=tokens(9, i), output_length=5) for i in range(4)])
    out = tmp_path / "out"
    arguments = ["--trace", str(trace), "--output", str(out), "--speed", "inf", "--max-batch", "1",
                 "--device", "cpu", "--record", "3"]

    def stop(server, finished):
        if finished:
            server.cluster.ask_stop()
    assert run_cluster.run(arguments, stop) == 1
    text = (out / "plans.jsonl").read_text()
    assert [json.loads(line).get("iteration") for line in text.splitlines()] == [None, 1, 2, 3]
    (out / "requests.jsonl").rename(tmp_path / "moved")
    (out / "summary.json").unlink()
    capsys.readouterr()
    assert "already holds plans.jsonl; a new folder, or --resume" in refused(tmp_path, *arguments)
    (tmp_path / "moved").rename(out / "requests.jsonl")
    assert run_cluster.run([*arguments, "--resume"]) == 0
    header, records = watch_module.read_plans(out / "plans.jsonl")
    assert records[0]["arrived"][0]["request"] > 0 and "--resume" in header["command"]
    text = (out / "plans.jsonl").read_text()
    assert run_cluster.run([*arguments, "--resume"]) == 0
    assert (out / "plans.jsonl").read_text() == text
    assert "--record 3: the run ended after 0 iterations\n" in capsys.readouterr().err


def disk_of_plans_is_full(rank, seen):
    """Of them alone."""
    def append(self, record):
        raise OSError(28, "No space left on device")
    record_module.PlansFile.append = append


def test_plans_that_cannot_be_written_are_one_line(tmp_path):
    lines = [dict(input_ids=tokens(9, i), output_length=5) for i in range(9)]
    arguments = ["--trace", write_trace(tmp_path, lines), "--output", tmp_path / "out", "--speed", "inf"]
    results = Job([*arguments, "--record", 9], 2, "disk_of_plans_is_full").finish()
    text = "".join(text for _, text, _ in results)
    assert [status for status, *_ in results] == [1, 1] and text.count("run_cluster.py: ") == 1
    assert "out/plans.jsonl: No space left on device; 0 of 9 are finished" in text


@pytest.mark.parametrize("arguments, said", [
    (["--record", "3"], "--record needs --output DIR"),
    (["--record", "0", "--output", "{tmp}/new"], "--record: '0': a positive integer below 2**48"),
    (["--explain", "0"], "--explain: '0': a positive integer below 2**48 is expected")])
def test_plans_are_asked_for_in_numbers(tmp_path, arguments, said):
    assert said in refused(tmp_path, *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert not (tmp_path / "new").exists()


def planned_lines() -> list[str]:
    """A small plans.jsonl."""
    values = []
    for scene, *_, record in observe_scene(60):
        values = [describe(scene.lake), *values[1:], record]
    return [json.dumps(value) + "\n" for value in values]


@pytest.mark.parametrize("change, said", [
    (lambda lines: None, "plans.jsonl: No such file or directory (run_cluster.py --record K --output"),
    (lambda lines: [], "plans.jsonl: it is empty; a line for the run is expected"),
    (lambda lines: lines[0][:-9], "plans.jsonl:1: the line is torn; a whole one for the run is expected"),
    (lambda lines: [lines[0], lines[1][:-9]], "plans.jsonl:2: the line is torn; an iteration, at least one,"),
    (lambda lines: [lines[0], re.sub('"clock_s": [^,]*', '"clock_s": NaN', lines[1])],
     "plans.jsonl:2: not a JSON object of finite numbers"),
    (lambda lines: [lines[0], re.sub('"clock_s": [^,]*', '"clock_s": 1e999', lines[1])],
     "plans.jsonl:2: not a JSON object of finite numbers"),
    (lambda lines: lines[:1], "plans.jsonl: it has no iteration; one at least is expected"),
    (lambda lines: [lines[0].replace('"version": 1', '"version": 2'), *lines[1:]],
     "plans.jsonl:1: version 2; 1 is expected (record it again)"),
    (lambda lines: lines[1:], "plans.jsonl:1: version None; 1 is expected (record it again)"),
    (lambda lines: [lines[0], lines[2]], "plans.jsonl:2: iteration 1 is expected"),
    (lambda lines: [lines[0], "{\n", lines[1]], "plans.jsonl:2: not a JSON object"),
    (lambda lines: ["\0\xff\n"], "plans.jsonl:1: not a JSON object"),
    (lambda lines: ["[" * 100_000 + "\n"], "plans.jsonl:1: not a JSON object"),
    (lambda lines: [lines[0], '{"iteration": 1}\n'], "plans.jsonl: not plans of version 1 (KeyError"),
    (lambda lines: [lines[0], lines[1].replace('"freed": []', '"freed": 7')],
     "plans.jsonl: not plans of version 1 (TypeError")])
def test_plans_that_are_none_are_one_line(tmp_path, capsys, change, said):
    lines = change(planned_lines())
    if lines is not None:
        (tmp_path / "plans.jsonl").write_text("".join(lines))
    with pytest.raises(SystemExit, match="2"):
        watch_module.main([str(tmp_path)])
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1 and len(text) < 400
    assert not (tmp_path / "lake.html").exists()


@pytest.mark.parametrize("field", [*watch_module.COUNTS, *watch_module.TEXTS])
def test_each_field_of_the_header_is_checked(field):
    header = dict.fromkeys(watch_module.COUNTS, 4) | dict.fromkeys(watch_module.TEXTS, "")
    header |= dict(version=1)
    watch_module.check_header(header, "plans.jsonl:1")
    is_text = field in watch_module.TEXTS
    wants = "text is" if is_text else "an integer from 1 to 9007199254740991 is"
    for wrong in [None, 0, -1, True, 1.5, 10**30] + ["x"] * (not is_text):
        said = re.escape(f"plans.jsonl:1: {field} {wrong!r}; {wants} expected")
        with pytest.raises(ValueError, match=said):
            watch_module.check_header(header | {field: wrong}, "plans.jsonl:1")
    del header[field]
    with pytest.raises(ValueError, match=f"{field} None; "):
        watch_module.check_header(header, "plans.jsonl:1")


@pytest.mark.parametrize("wrong, said", [
    (dict(slots=0), "slots 0; an integer"),
    (dict(instances=10**9), "slots; at most 67,108,864 are expected")])
def test_a_header_that_is_none_is_one_line(tmp_path, capsys, wrong, said):
    first, second, *_ = planned_lines()
    (tmp_path / "plans.jsonl").write_text(json.dumps(json.loads(first) | wrong) + "\n" + second)
    with pytest.raises(SystemExit, match="2"):
        watch_module.main([str(tmp_path)])
    text = capsys.readouterr().err
    assert "plans.jsonl:1: " in text and said in text and text.count("\n") == 1


def test_a_page_where_text_is_ascii(tmp_path):
    """It is UTF-8, as it says."""
    (tmp_path / "plans.jsonl").write_text("".join(planned_lines()[:2]))
    done = subprocess.run([sys.executable, HERE / "bench" / "watch.py", tmp_path], text=True, capture_output=True,
                          env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert done.returncode == 0 and "lake.html: 1 iteration, " in done.stdout, done.stderr
    assert "·" in (tmp_path / "lake.html").read_text(encoding="utf-8")


def test_a_torn_line_is_dropped(tmp_path, capsys):
    """With a warning; the page has the others."""
    lines = planned_lines()
    (tmp_path / "plans.jsonl").write_text("".join(lines)[:-5])
    watch_module.main([str(tmp_path)])
    out, error = capsys.readouterr()
    assert error == f"{tmp_path}/plans.jsonl:{len(lines)}: the line is torn, and dropped\n"
    assert f"lake.html: {len(lines) - 2} iterations, " in out
    done = subprocess.run([sys.executable, HERE / "bench" / "watch.py", tmp_path / "x"], text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    (tmp_path / "lake.html").unlink()
    (tmp_path / "lake.html").mkdir()
    with pytest.raises(SystemExit, match="2"):
        watch_module.main([str(tmp_path)])
    assert f"{tmp_path}/lake.html: Is a directory\n" in capsys.readouterr().err


def record_large_lake(folder, iterations, instances, slots):
    """Plans of a lake without tensors: prompts behind four stems, so many that slots run out."""
    rng = np.random.default_rng(0)
    config = LakeConfig(slots=slots, max_batch=64, chunk_tokens=512, placement="hash")
    lake = TokenLake(list(range(instances)), LlamaConfig(), config)
    scheduler = Scheduler(lake)
    file = record_module.PlansFile(folder, describe(lake))
    observer = record_module.Observer(scheduler, file.append)
    stems = [rng.integers(500, size=n).tolist() for n in (1600, 900, 700, 3000)]
    coming = 0
    for iteration in range(1, iterations + 1):
        while len(scheduler.waiting) < 8:
            own = rng.integers(500, size=rng.integers(200, 1500)).tolist()
            prompt = stems[min(rng.geometric(0.5), 4) - 1] + own
            scheduler.add(Request(coming, prompt, len(prompt) + int(rng.integers(3, 30))))
            coming += 1
        observer.look()
        batches, dops = scheduler.schedule()
        query_plan, transfer_plan, _ = lake.gen_plans(batches, dops, lake.get_prefix_tree())
        observer.see(iteration, query_plan, transfer_plan)
        observer.tell(iteration * 10**7, ())
        scheduler.update(query_plan, {run.request.id: 7 for run in query_plan.runs if run.samples})


@pytest.fixture(scope="module")
def large_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    record_large_lake(folder, 64, 8, 2000)
    watch_module.main([str(folder)])
    return folder / "lake.html"


def test_pages_are_small(large_page):
    """Without data, and with 64 iterations of 8 instances of 2,000 slots; and none loads anything."""
    page = watch_module.TEMPLATE.read_text()
    assert len(page.encode()) < 80_000 and page.count(watch_module.MARK) == 1
    assert "default-src 'none'" in page and not re.search(r"https?:|//cdn|@import|src=", page)
    assert 500_000 < large_page.stat().st_size < 3_000_000


def look_at(page) -> dict:
    """What the page says of itself in a browser."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900",
               f"--user-data-dir={page.parent}/browser", "--dump-dom", f"file://{page}#check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.findall(r'<pre id="check">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(found[0].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


in_a_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


@in_a_browser
def test_a_page_in_a_browser(tmp_path):
    """It draws every iteration, the same there and back; keys and clicks lead where they should, and
    a name in it is text."""
    lines = planned_lines()
    header = json.dumps(json.loads(lines[0]) | dict(trace="</script><script>start = 1</script>&amp;")) + "\n"
    (tmp_path / "plans.jsonl").write_text("".join([header, *lines[1:]]))
    watch_module.main([str(tmp_path)])
    seen = look_at(tmp_path / "lake.html")
    last = len(lines) - 1
    records = [json.loads(line) for line in lines[1:]]
    assert seen["iterations"] == last and seen["steps"] == 3 * last and seen["alike"]
    assert seen["colours"] > 10
    first_request = records[-1]["running"][0]
    places = [place for place, *_ in seen["keys"]]
    assert places == [1, 2, 3, 2, last, last, last, last, 1, 1, 1]
    assert [request for _, request, _ in seen["keys"]] == [-1] * 6 + [first_request] + [-1] * 4
    assert [plays for *_, plays in seen["keys"]] == [False] * 9 + [True, False]
    place, slot, segment, text = seen["segment"]
    record = records[place - 1]
    readers = [read["request"] for read in record["reads"] if slot in read["slots"]]
    assert text.startswith(f"Segment {segment}, the ")
    assert readers and f"read by {record_module.name_numbers('request', readers)}, computed at" in text
    place, request, text = seen["request"]
    assert request == record["running"][0] and text.startswith(f"Request {request}: a prompt of ")


@in_a_browser
def test_a_large_page_tells_how_long_a_step_takes(large_page):
    """By the browser's own clock, with what is painted: some 15 ms, which depends on who else works."""
    seen = look_at(large_page)
    assert seen["iterations"] == 64 and seen["alike"] and seen["median_ms"] > 0.1


def test_colours_of_the_page_can_be_told():
    """WCAG's contrast of text, 4.5, and of lines, 3, in both themes."""
    def luminance(colour):
        values = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    def contrast(a, b):
        low, high = sorted(map(luminance, (a, b)))
        return (high + 0.05) / (low + 0.05)
    style = watch_module.TEMPLATE.read_text().split("<style>")[1].split("</style>")[0]
    light, dark = style.split("prefers-color-scheme: dark")
    for theme in (light.split("@media")[0], dark.split("* {")[0]):
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", theme))
        for ground in ("paper", "panel"):
            assert all(contrast(colours[name], colours[ground]) >= 4.5 for name in ("ink", "soft"))
        for name in [*record_module.WHY, "gone", "mark", "focus"]:
            assert contrast(colours[name], colours["paper"]) >= 3, name


# ── the control plane against a naive model ───────────────────────────────────────────────────

END = 1_000_000  # the end-of-sequence token: no prompt has it
MOST_WAITING = 6  # requests: then no more arrive, so that draining stays short


@dataclass
class NaiveReader:
    """A running request in the naive model."""
    request: Request
    asked: list  # the prefixes that its tokens had at its admission
    reading: list  # the prefixes that it reads: the first ones of its tokens
    done: int  # its tokens in the pool


class NaiveCache:
    """What should be cached, as simply as it can be said: prefixes, when each was last read, and
    who reads it. A prefix is (salt, *tokens up to a segment's end). There is no tree, no hash and
    no count of pins. Its methods are told of the balancer's calls before these are made."""

    def __init__(self, C, num_slots):
        self.C, self.num_slots = C, num_slots
        self.time = 0
        self.last_read = {}  # published prefix → when
        self.copies = {}  # slot → prefix, in order of last reading or making
        self.running = {}  # request id → NaiveReader
        self.cached = {}  # request id → tokens that hit at its first admission
        self.prefix_of = {}  # id of a segment → prefix

    def prefixes(self, request) -> list[tuple]:
        tokens, C = request.tokens, self.C
        return [(request.salt, *tokens[:end]) for end in range(C, len(tokens) + 1, C)]

    def longest(self, prefixes) -> int:
        """How many of a request's prefixes are published, up to the first that is not."""
        published = [prefix in self.last_read for prefix in prefixes]
        return (*published, False).index(False)

    def read(self, prefixes):
        """Published prefixes are read, or new ones published."""
        for prefix in prefixes:
            self.last_read[prefix] = self.time
            for slot in [slot for slot, copied in self.copies.items() if copied == prefix]:
                self.copies[slot] = self.copies.pop(slot)

    def pinned(self) -> set[tuple]:
        return {prefix for reader in self.running.values() for prefix in reader.reading}

    def unread_since(self) -> list[int]:
        """When the published prefixes that nobody reads were last read."""
        pinned = self.pinned()
        return [when for prefix, when in self.last_read.items() if prefix not in pinned]

    def admit(self, request, matched):
        """A request hits the longest prefix there is. Nobody is about to compute the next one, and
        there is room."""
        prefixes = self.prefixes(request)
        assert matched == self.longest(prefixes), "not the longest published prefix"
        for other in self.running.values():
            to_come = other.asked[len(other.reading):]
            assert not set(prefixes[matched:matched + 1]) & set(to_come), "should have waited"
        assert self.room(request, prefixes[:matched]) >= 0, "admitted without room"
        self.time += 1
        self.read(prefixes[:matched])
        done = min(matched * self.C, len(request.tokens) - 1)
        self.cached.setdefault(request.id, done)
        self.running[request.id] = NaiveReader(request, prefixes, prefixes[:matched], done)

    def room(self, request, matched) -> int:
        """Slots that nobody needs when this request has its prompt, and those that run have theirs
        and a segment of their answers. The last token needs none."""
        needed = -(-len(request.tokens) // self.C) - len(matched)
        for other in self.running.values():
            most = min(len(other.request.tokens) + self.C, other.request.max_tokens - 1)
            needed += -(-most // self.C) - len(other.reading)
        return self.num_slots - len(self.pinned().union(matched)) - needed

    def commit(self, request, rows):
        """Prefixes that are filled are published, and read by who filled them."""
        reader = self.running[request.id]
        reader.done += rows
        known = len(reader.reading)
        filled = self.prefixes(request)[known:reader.done // self.C]
        for id, prefix in zip(request.ids[known:], filled):
            assert self.prefix_of.setdefault(id, prefix) == prefix, "two prefixes have one id"
        self.read(filled)
        reader.reading += filled

    def release(self, request):
        """What a request has read it reads until now, the longest first; the rest is forgotten."""
        self.time += 1
        self.read(reversed(self.running.pop(request.id).reading))

    def copy(self, segment, slot):
        """A copy is made of what is published."""
        prefix = self.prefix_of[segment.id]
        assert prefix in self.last_read and slot not in self.copies
        self.copies[slot] = prefix

    def evict_copy(self, slot):
        """Of the prefix with the oldest copy, or of one that nobody reads: the least recently read
        of these."""
        oldest = self.last_read[next(iter(self.copies.values()))]
        when = self.last_read[self.copies.pop(slot)]
        assert when == min([oldest, *self.unread_since()]), "a copy of one read more recently"

    def evict(self, prefix):
        """The least recently read leaves of those that nobody reads, after its copies and all that
        continue it, and only if it was read before the prefix with the oldest copy."""
        assert prefix not in self.pinned(), "evicted while it is read"
        assert self.last_read[prefix] == min(self.unread_since()), "not the least recently read"
        assert prefix not in self.copies.values(), "evicted before its copies"
        for oldest in list(self.copies.values())[:1]:
            assert self.last_read[prefix] < self.last_read[oldest], "evicted before a copy"
        del self.last_read[prefix]
        assert not any(other[:len(prefix)] == prefix for other in self.last_read), "a lost parent"

    def slots_in_use(self) -> int:
        """One for each published prefix, each copy, and each segment that is a request's own."""
        own = (-(-reader.done // self.C) - len(reader.reading) for reader in self.running.values())
        return len(self.last_read) + len(self.copies) + sum(max(0, number) for number in own)


def tell(owner, name, told):
    """Before each call of a method, `told` is called with the same arguments."""
    call = getattr(owner, name)

    def watched(*arguments):
        told(*arguments)
        return call(*arguments)

    setattr(owner, name, watched)


class ControlPlane:
    """A lake without tensors at work: scheduler and balancer as they are. After each step the pool
    is compared with the naive model and with what the slabs hold.

    Prompts begin with the rising numbers of a stem, and all requests sample the number after their
    last token: so equal prefixes get equal answers, and answers run into longer prompts."""

    happened = Counter()  # in all lakes
    sound = False  # whether all went well so far

    def begin(self, N, C, most_segments, spare, policy, prefills, slo, few_rows, kv_heads,
              exchange_bytes, **options):
        """most_segments: of a request. The pool has room for one such and `spare` more."""
        if policy == "pd":
            P = min(prefills, N - 1)
            policy = f"pd:{P}x{N - P}" if P else "even"
        config = LakeConfig(C, -(-(most_segments + spare) // N), **options)
        self.lake = TokenLake(list(range(N)), LlamaConfig(num_kv_heads=kv_heads), config)
        self.lake.exchange_bytes = exchange_bytes
        scheduler_module.FEW_ROWS = few_rows
        self.scheduler = Scheduler(self.lake, (END,), policy, slo)
        self.balancer, self.tree = self.lake.balancer, self.lake.get_prefix_tree()
        self.slabs = golden_plans.Slabs(self.lake)
        self.most_tokens = most_segments * C
        self.sent = []
        self.identities = {}  # by prefix: of its last C tokens
        self.naive = NaiveCache(C, N * config.slots)
        for name, told in (("admit", self.naive.admit), ("commit", self.naive.commit),
                           ("release", self.naive.release), ("_add_replica", self.naive.copy)):
            tell(self.balancer, name, told)
        self.evict, self.tree.evict = self.tree.evict, self.watched_evict
        self.sound = True

    def watched_evict(self):
        """Tells the naive model what is evicted, once it is known."""
        before = list(self.tree.segments)
        slot = self.evict()
        gone = [id for id in before if id not in self.tree.segments]
        if slot is None:
            assert not self.naive.unread_since() and not self.naive.copies
        elif gone:
            self.naive.evict(self.naive.prefix_of[gone[0]])
        else:
            self.naive.evict_copy(slot)
        return slot

    @contextlib.contextmanager
    def step(self, name):
        """What a step does goes inside."""
        self.sound = False
        yield
        self.compare()
        self.happened.update(["steps", name])
        self.sound = True

    # ── steps ──

    def arrive(self, stem, shared, own, length, answer, salt):
        """A prompt of `shared` tokens of a stem, then `length` of its own."""
        with self.step("arrivals"):
            prompt = [1000 * stem + i for i in range(shared)]
            self.send(prompt + [10_000 * own + i for i in range(length)], answer, salt)

    def arrive_at_a_boundary(self, stem, segments, beyond, answer, salt):
        """A prompt that follows its stem to a segment's end, or to a token less or more."""
        with self.step("arrivals"):
            length = segments * self.naive.C + beyond
            self.send([1000 * stem + i for i in range(length)], answer, salt)

    def repeat(self, which, dropped, answer):
        """An earlier request's prompt and answer so far, to the last token or nearly."""
        with self.step("repeats"):
            earlier = self.sent[which % len(self.sent)]
            prompt = [token for token in earlier.tokens if token != END]
            self.send(prompt[:max(1, len(prompt) - dropped)], answer, earlier.salt)

    def send(self, prompt, answer, salt):
        """Cut to what the pool has room for."""
        prompt = (prompt or [0])[:self.most_tokens - 1]
        most = min(len(prompt) + answer, self.most_tokens)
        self.sent.append(Request(len(self.sent), prompt, most, salt))
        self.scheduler.add(self.sent[-1])

    def iterate(self):
        with self.step("iterations"):
            self.serve()

    def end_early(self, which):
        """An iteration in which a request samples the end-of-sequence token."""
        with self.step("ended early"):
            self.serve(ends=which)

    def press(self, instance):
        """An iteration before which an instance seems overloaded: what it holds gets copied."""
        with self.step("pressed"):
            self.balancer.load[instance % self.balancer.num_instances] += 1 << 30
            self.serve()

    def stay_idle(self):
        """An iteration without rows: nothing is read, moved or copied."""
        with self.step("idle"):
            N = self.balancer.num_instances
            before = dict(self.naive.copies)
            plan, transfer, _ = self.lake.gen_plans([[]] * N, [1] * N, self.tree)
            assert not plan.runs and not plan.load.any() and not len(transfer.moves.kind)
            assert self.naive.copies == before
            self.update(plan, {})

    def preempt(self):
        with self.step("preempted"):
            self.scheduler._preempt()

    def drain(self):
        """All that were sent are served, and only what is published keeps slots. An iteration
        computes one token at least of what is left; few are computed again."""
        scheduler, bal = self.scheduler, self.balancer
        left = sum(request.max_tokens for request in (*scheduler.waiting, *scheduler.running))
        for _ in range(2 * left):
            if scheduler.waiting or scheduler.running:
                self.serve()
                self.compare()
        assert not scheduler.waiting and not scheduler.running, "not served in time"
        assert not bal.in_progress and len(self.tree.lru) == len(self.tree.segments)
        assert len(bal._free_held_rows) == len(bal.held)
        kept = len(self.tree.lru) + len(self.tree.extras)
        assert sum(map(len, bal.free)) + kept == bal.num_instances * bal.slots
        self.happened.update(evictions=bal.evictions, duplicates=bal.duplicates,
                             preemptions=scheduler.counters["preemptions"])

    # ── what a step does, and what is compared after it ──

    def serve(self, ends=None):
        """An iteration. ends: which of those that sample is given the end-of-sequence token."""
        batches, dops = self.scheduler.schedule()
        plan, transfer, _ = self.lake.gen_plans(batches, dops, self.tree)
        assert plan.runs or not (self.scheduler.waiting or self.scheduler.running), "a standstill"
        self.check_copies(plan, transfer)
        requests = {run.request.id: run.request for run in plan.runs}
        identities = {id: golden_plans.identities(request) for id, request in requests.items()}
        self.slabs.iterate(plan, transfer, identities)
        sampling = [run.request for run in plan.runs if run.samples]
        sampled = {request.id: request.tokens[-1] + 1 for request in sampling}
        if sampling and ends is not None:
            sampled[sampling[ends % len(sampling)].id] = END
        self.update(plan, sampled)

    def update(self, plan, sampled):
        """Requests that sample grow; those with their last token end. All but that is computed, and
        cached as far as it fills segments."""
        lengths = {request.id: len(request.tokens) for request in self.scheduler.running}
        ended = self.scheduler.update(plan, sampled)
        for request in (*ended, *self.scheduler.running):
            assert len(request.tokens) == lengths[request.id] + (request.id in sampled)
            full = len(request.tokens) == request.max_tokens or request.tokens[-1] == END
            assert full == (request in ended)
        for request in ended:
            fed = len(request.tokens) - 1
            filled = self.naive.prefixes(request)[:fed // self.naive.C]
            assert request.peak == fed and self.naive.longest(filled) == len(filled)

    def check_copies(self, plan, transfer):
        """A copy is made of a segment that is in the tree, and read from the next iteration on."""
        S, C = self.balancer.slots, self.naive.C
        copies = work_module.select(transfer.moves, transfer.moves.kind == pool.REPLICA)
        copied = (copies.source * S + copies.source_row // C).tolist()
        filled = (copies.target * S + copies.target_row // C).tolist()
        ids = {segment.slot: id for id, segment in self.tree.segments.items()}
        for source, target in zip(copied, filled):
            assert self.naive.prefix_of[ids[source]] == self.naive.copies[target]
        assert not set(filled) & set(plan.segment_reads.slot.tolist()), "read as it is made"
        self.happened.update(copies=len(filled), **{"read replicas": len(plan.old.replicas.slot)})

    def compare(self):
        """The tree has the prefixes of the naive model, pinned by as many; so have the slots."""
        bal, naive, running = self.balancer, self.naive, self.scheduler.running
        check_bookkeeping(bal, running)
        found = {naive.prefix_of[id]: segment for id, segment in self.tree.segments.items()}
        assert found.keys() == naive.last_read.keys() and len(found) == len(self.tree.segments)
        readers = Counter(prefix for r in naive.running.values() for prefix in r.reading)
        assert all(segment.pins == readers[prefix] for prefix, segment in found.items())
        copies = [(slot, naive.prefix_of[segment.id]) for slot, segment in self.tree.extras.items()]
        assert copies == list(naive.copies.items())
        assert len(copies) <= naive.num_slots // balancer.REPLICA_SLOTS
        assert naive.num_slots - sum(map(len, bal.free)) == naive.slots_in_use()
        done = {id: reader.done for id, reader in naive.running.items()}
        assert done == {request.id: request.done for request in running}
        assert naive.cached == self.scheduler.cached_tokens
        for request in self.sent:
            assert request in running or not (request.done or request.num_slots or request.segments)
        for prefix, segment in found.items():
            self.check_contents(prefix, segment)

    def check_contents(self, prefix, segment):
        """All slots of a segment hold its tokens."""
        S, C = self.balancer.slots, self.naive.C
        if prefix not in self.identities:
            request = Request(0, prefix[1:], 0, prefix[0])
            self.identities[prefix] = golden_plans.identities(request)[-C:].tolist()
        for instance, slot in segment.replicas.items():
            row = pool.slab_row(slot, S, C)
            held = self.slabs.rows[instance, row:row + C].tolist()
            assert held == self.identities[prefix], "something else lies in a segment's slot"


def random_steps():
    """A machine for Hypothesis, which draws lakes and steps, and shortens what fails."""
    from hypothesis import strategies as some
    from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

    lake = dict(
        N=some.integers(1, 5), C=some.sampled_from([1, 2, 4, 8]), most_segments=some.integers(2, 8),
        spare=some.sampled_from([0, 2, 6, 24]), policy=some.sampled_from(["even", "dp", "pd"]),
        prefills=some.integers(1, 4), slo=some.sampled_from([None, 1e-2]),
        few_rows=some.sampled_from([1, 128]), kv_heads=some.sampled_from([1, 4]),
        exchange_bytes=some.sampled_from([0, 3_000_000]),
        placement=some.sampled_from(["stripe", "hash"]),
        replicate_factor=some.sampled_from([0, 3, 50]), pull_tokens=some.sampled_from([0, 20, 999]),
        chunk_tokens=some.sampled_from([2, 7, 16, 40]), max_batch=some.sampled_from([2, 4, 8]))
    asked = dict(stem=some.integers(0, 2), answer=some.integers(1, 24),
                 salt=some.sampled_from(["", "", "b"]))
    few_wait = precondition(lambda plane: len(plane.scheduler.waiting) < MOST_WAITING)
    any_sent = precondition(lambda plane: plane.sent)
    any_left = precondition(lambda plane: plane.scheduler.waiting or plane.scheduler.running)
    any_runs = precondition(lambda plane: plane.scheduler.running)
    plane = ControlPlane

    class RandomSteps(ControlPlane, RuleBasedStateMachine):
        begin = initialize(**lake)(plane.begin)
        arrive = few_wait(rule(shared=some.integers(0, 16), own=some.integers(1, 4),
                               length=some.integers(0, 8), **asked)(plane.arrive))
        arrive_at_a_boundary = few_wait(rule(
            segments=some.integers(0, 8), beyond=some.integers(-1, 1), **asked)(
                plane.arrive_at_a_boundary))
        repeat = any_sent(few_wait(rule(
            which=some.integers(0, 99), dropped=some.integers(0, 3), answer=asked["answer"])(
                plane.repeat)))
        iterate = any_left(rule()(plane.iterate))
        end_early = any_left(rule(which=some.integers(0, 3))(plane.end_early))
        press = any_left(rule(instance=some.integers(0, 4))(plane.press))
        stay_idle = any_left(rule()(plane.stay_idle))
        preempt = any_runs(rule()(plane.preempt))

        def teardown(self):
            if self.sound:
                self.drain()

    return RandomSteps


def take_random_steps(monkeypatch, folder, seed) -> Counter:
    """Ten lakes, 100 steps in each: Hypothesis counts the beginning as one more, and makes ten
    anew, later ones mostly by altering these. Returns what happened."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis.configuration import set_hypothesis_home_dir
    from hypothesis.stateful import run_state_machine_as_test

    # Each lake sets the first one. A sixteenth of so few slots would be no copies at all.
    monkeypatch.setattr(scheduler_module, "FEW_ROWS", scheduler_module.FEW_ROWS)
    monkeypatch.setattr(balancer, "REPLICA_SLOTS", 4)
    monkeypatch.setattr(ControlPlane, "happened", Counter())
    # What it notes of the constants in our code does not go into the checkout.
    set_hypothesis_home_dir(folder)
    machine = hypothesis.seed(seed)(random_steps())
    run_state_machine_as_test(machine, settings=hypothesis.settings(
        max_examples=10, stateful_step_count=101, deadline=None, database=None, derandomize=True,
        report_multiple_bugs=False, suppress_health_check=list(hypothesis.HealthCheck)))
    return ControlPlane.happened


@pytest.mark.parametrize("seed", range(3))
def test_the_control_plane_equals_a_naive_model(monkeypatch, tmp_path, seed):
    """Lakes of one to five instances with few slots, 1,000 steps: requests that share prefixes
    come, end, end early and are preempted, iterations are busy, idle, or make copies."""
    happened = take_random_steps(monkeypatch, tmp_path, seed)
    assert all(happened[what] for what in (
        "arrivals", "repeats", "iterations", "idle", "ended early", "preemptions", "evictions",
        "duplicates", "copies", "read replicas"))


@pytest.mark.slow
def test_the_control_plane_equals_a_naive_model_for_long(monkeypatch, tmp_path):
    """100,000 steps: 100 seeds, ten lakes of each, 100 steps in each. (Some more are taken in lakes
    that come to where no step is allowed: Hypothesis does not count these.)"""
    happened = sum((take_random_steps(monkeypatch, tmp_path, seed) for seed in range(100, 200)),
                   Counter())
    assert happened["steps"] >= 100_000 and happened["preemptions"] > happened["preempted"]


# ── the exercises ─────────────────────────────────────────────────────────────────────────────
#
# First tests that grade them beside the others, as short as they can be; then what EXERCISES.md and
# bench/exercise.py promise.


def test_a_merge_by_hand():
    """A row's keys have equal scores: one of them in a part with o = 8, three in one with o = 4. Scores
    may be higher than exp bears; an empty part changes nothing; other rows are not touched."""
    o = torch.tensor([8, 4, math.nan], dtype=torch.float64).view(3, 1, 1)
    lse = torch.tensor([[1], [3], [0]], dtype=torch.float64).log()
    for higher in (0, 1000):
        for parts in ([0, 1], [1, -1, 0], [2, 0, 1]):
            out, out_lse = torch.full_like(o, 7), torch.full_like(lse, 7)
            table = kernels.MergeTable(torch.tensor([1]), torch.tensor([parts]))
            kernels._merge_with_torch(o, lse + higher, table, out, out_lse)
            assert out.flatten().tolist() == pytest.approx([7, (1 * 8 + 3 * 4) / 4, 7])
            assert out_lse.flatten().tolist() == pytest.approx([7, math.log(4) + higher, 7])


def test_a_key_is_hidden_from_rows_before_it():
    """Two pieces, of two rows and three keys each."""
    hidden = work_module.is_hidden(np.array([[3, 4], [0, 9]]), np.array([[2, 3, 4], [7, 8, 9]]))
    assert hidden.shape == (2, 1, 2, 3)
    assert hidden[0, 0].tolist() == [[False, False, True], [False, False, False]]
    assert hidden[1, 0].tolist() == [[True, True, True], [False, False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("begins", [0, 60, 63, 64])
def test_a_row_sees_keys_up_to_its_own(backend, begins):
    """Of q = 0 all keys that a row sees weigh the same: exp(lse) counts them, and o is the mean of
    their positions. Tiles are of 64 keys; what lies in the slab behind the last one is no number. The
    last row comes long after all of them, as where a tail of its keys lies elsewhere."""
    rows, device = 7, DEVICE[backend]
    end = begins + rows
    position = torch.arange(end, dtype=torch.float32)
    kv = torch.full((end + 64, 2, 1, 16), math.nan)
    kv[:end] = position[:, None, None, None]
    work = make_work([(0, rows, begins), (rows, 1, 500)], [(0, 0, end, 0), (1, 0, end, 0)], 2, 1)
    q = torch.zeros(rows + 1, 2, 16, device=device)
    o, lse = (x.cpu() for x in partial_attention(q, kv.to(device), work, 1.0, backend))
    seen = torch.tensor([*range(begins + 1, end + 1), end], dtype=torch.float32)
    assert torch.allclose(lse.exp(), seen[:, None].expand_as(lse), rtol=1e-5)
    assert torch.allclose(o, ((seen - 1) / 2)[:, None, None].expand_as(o), rtol=1e-5)


def same_prompt_twice():
    """Two requests with the same prompt of two segments, at once: neither has found the other's. What
    the second one reserves lies all at the instance where the first one's first segment is not."""
    bal = Balancer(2, 8, 4)
    first = prepared(bal, 0, tokens(8, 0), publish=False)
    second = Request(1, tokens(8, 0), 18)
    bal.admit(second, bal.match(second))
    crowded = [100 * (int(first.table[0]) // 8 == i) for i in range(2)]
    assert bal.reserve(second, 8, crowded, [0, 0], 50)
    assert first.table[0] // 8 != second.table[0] // 8 == second.table[1] // 8
    return bal, first, second


def test_a_new_segment_enters_the_tree_where_it_lies():
    bal, first, _ = same_prompt_twice()
    slots = first.table[:2].tolist()
    bal.commit(first, 8)
    parent, child = first.segments
    assert parent.parent is bal.tree.root and child.parent is parent and child.depth == 2
    assert [segment.id for segment in first.segments] == first.ids == [*bal.tree.segments]
    assert [segment.replicas for segment in first.segments] == [{slot // 8: slot} for slot in slots]
    assert bal.duplicates == 0 and first.table[:2].tolist() == slots


@pytest.mark.parametrize("rows", [[8], [3, 5], [4, 4]])
def test_a_segment_that_is_there_is_not_kept_twice(rows):
    """The second request reads the first one's segments from now on; its own slots are free again, each
    at its instance, and nothing else is."""
    bal, first, second = same_prompt_twice()
    bal.commit(first, 8)
    own, free = second.table[:2].tolist(), sum(map(len, bal.free))
    for count in rows:
        bal.commit(second, count)
    assert second.segments == first.segments and len(bal.tree.segments) == 2
    assert second.table[:2].tolist() == first.table[:2].tolist()
    assert sum(map(len, bal.free)) == free + 2 and bal.duplicates == 2
    assert all(slot in bal.free[slot // 8] for slot in own)
    check_bookkeeping(bal, [first, second])


def test_the_least_recently_read_leaves_first():
    """Of three segments b was read first, then a, then c, which is read still. a and c have copies at
    instances 1 and 2: these leave before it, the last one made first, also while it is read."""
    tree, reader = PrefixTree(), Request(0, [], 0)
    a, b, c = (tree.insert(id, None, 0, slot) for slot, id in enumerate((b"a", b"b", b"c")))
    for segment in (b, a, c):
        tree.hit([segment], reader)
        tree.clock += 1
        if segment is not c:
            tree.unpin(segment, reader)
    for slot, segment in ((10, a), (20, a), (11, c), (21, c)):
        segment.replicas[slot // 10] = slot
        tree.extras[slot] = segment
    assert tree.evict() == 1 and not tree.extras_evicted
    assert [tree.evict() for _ in range(3)] == [20, 10, 0] and tree.extras_evicted
    assert [tree.evict() for _ in range(3)] == [21, 11, None]
    assert [*tree.segments] == [*tree.root.children] == [b"c"] and not tree.extras
    tree.unpin(c, reader)
    assert [tree.evict(), tree.evict()] == [2, None] and not tree.segments and not tree.root.children


def test_two_are_drawn_and_the_less_loaded_is_read():
    """Eight replicas, loads far apart: one is read if it is drawn with one that has more load, so the
    n-th least loaded in 8 − n of the 28 pairs. Each rank draws the same."""
    order = [3, 0, 7, 1, 6, 2, 5, 4]  # instances by load
    before = np.zeros(8, np.int64)
    before[order] = 10**6 * np.arange(8)
    found = []
    for _ in range(2):
        load = before.copy()
        candidates = np.tile(100 * np.arange(8) + 7, (2800, 1))
        found.append(Balancer(8, 100, 4).choose_replicas(candidates, np.full(2800, 3), load).tolist())
        counts = np.bincount(np.array(found[-1]) // 100, minlength=8)
        assert {slot % 100 for slot in found[-1]} == {7} and (load - before == 3 * counts).all()
        assert np.abs(counts[order] - 100 * np.arange(7, -1, -1)).max() < 100
    assert found[0] == found[1]


def test_each_choice_is_a_load_for_later_ones():
    """Two replicas: those that come first read the less loaded, until it is no longer."""
    load = np.array([0, 500])
    chosen = Balancer(2, 100, 4).choose_replicas(np.tile([5, 105], (200, 1)), np.full(200, 10), load)
    assert load.sum() == 500 + 2000 and abs(load[0] - load[1]) <= 40
    assert set(chosen[:40].tolist()) == {5} and set(chosen.tolist()) == {5, 105}


@pytest.mark.parametrize("prompts, rows, kv_bytes, room, pulled", [
    (1, 4, 49, 99, 8), (1, 3, 49, 99, 0), (1, 4, 50, 99, 0),  # 8 tokens against rows of 100 bytes
    (1, 4, 49, 8, 8), (1, 4, 49, 7, 0),  # and all of them have to fit
    (2, 4, 49, 16, 16), (2, 4, 49, 15, 0), (0, 1, 1, 99, 0)])  # prompts share the room; decodes ship
def test_what_is_fewer_bytes_travels(prompts, rows, kv_bytes, room, pulled):
    """Of requests that instance 0 computes, eight old tokens of each lie at instance 1: how many come."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(4, 50, replicate_factor=0, pull_tokens=room))
    lake.query_bytes, lake.kv_bytes = 100, kv_bytes
    runs = [reader(lake, id, [50 + 2 * id, 51 + 2 * id], 10 + id, rows, decode=not prompts)
            for id in range(max(1, prompts))]
    plan, _, groups = lake.gen_plans([runs, []], [1, 1], lake.get_prefix_tree())
    assert groups == [[0] * len(runs), []] and plan.old.pulls.rows.sum() == pulled
    assert plan.ships[:, 1].tolist() == [not pulled] * len(runs)


@pytest.mark.parametrize("slots, room, pulled", [
    ([50, 51, 100, 101], 16, 16), ([50, 51, 100, 101], 15, 8), ([50, 51, 100, 101], 7, 0),
    ([50, 51, 100], 7, 0), ([50, 100, 101], 7, 4)])
def test_all_that_is_pulled_has_to_fit(slots, room, pulled):
    """Four or eight old tokens lie at instance 1 and at instance 2; either is worth it, in one buffer.
    Nothing comes behind the first that does not fit."""
    lake = TokenLake([0, 1, 2], LlamaConfig(), LakeConfig(4, 50, replicate_factor=0, pull_tokens=room))
    lake.query_bytes, lake.kv_bytes = 100, 40
    run = reader(lake, 0, slots, 10, rows=4, decode=False)
    plan, _, groups = lake.gen_plans([[run], [], []], [1, 1, 1], lake.get_prefix_tree())
    assert groups == [[0], [], []] and plan.old.pulls.rows.sum() == pulled


def test_all_that_goes_into_a_plan_goes_into_its_digest():
    """Values that are not the same have other bytes: of another shape or type, cut elsewhere, or with
    one number of many changed. How an array lies in memory does not count, nor what is left out."""
    numbers, many = np.arange(6), np.arange(5000)
    other = many.copy()
    other[2500] += 1
    values = [numbers, numbers.reshape(2, 3), numbers.reshape(3, 2), numbers.astype(np.int32), [*numbers],
              (numbers[:3], numbers[3:]), (numbers[:2], numbers[2:]), 0 * numbers, 0.0 * numbers, 12, (1, 2),
              many, other, work_module.AtOnce(3, 4), pool.TransferPlan((), (), 3)]
    written = [b"".join(map(bytes, pool.plan_leaves(value))) for value in values]
    assert len({*written}) == len(values)
    left_out = [pool.OldKV(numbers, tables, (), (), ()) for tables in ([], [numbers])]
    assert len({b"".join(map(bytes, pool.plan_leaves(old))) for old in left_out}) == 1
    table = numbers.reshape(3, 2)
    strided, copied = ([*map(bytes, pool.plan_leaves(x))] for x in (table[:, 1], table[:, 1].copy()))
    assert strided == copied


def test_a_plan_is_hashed_before_its_tokens_are_known():
    """Who makes the same plan has the same hash, though its objects are others; tokens do not count, but
    for the digest that is made of it. What is no part of the digest may differ."""
    plan, transfer, _ = plan_by_example()
    hashed = pool.hash_plan(7, plan, transfer).digest()
    again, transfer_again, _ = plan_by_example()
    assert pool.hash_plan(7, again, transfer_again).digest() == hashed
    run = again.runs[0]
    run.request.tokens[run.position] += 1
    assert pool.hash_plan(7, again, transfer_again).digest() == hashed
    digests = [pool.plan_digest(7, *plans) for plans in ((plan, transfer), (again, transfer_again))]
    assert digests[0] != digests[1] and len(digests[0]) == 16
    tables = [np.append(table, table[:1]) for table in plan.old.tables]  # behind what is read
    other = replace(plan, old=replace(plan.old, tables=tables))
    assert pool.hash_plan(7, other, transfer).digest() == hashed
    assert pool.hash_plan(8, plan, transfer).digest() != hashed


def test_the_best_pair_is_not_always_matched():
    """One request has 12 old tokens at instance 0 and 8 at instance 1, the other 8 at instance 0; both
    will write a row at instance 0. The first one is to leave it to the other: 17 bytes stay instead of
    13."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(4, 50, replicate_factor=0))
    lake.query_bytes, lake.kv_bytes = 10**6, 1  # so all is pulled
    first = reader(lake, 0, [0, 1, 2, 50, 51], home=10, decode=False)
    second = reader(lake, 1, [3, 4], home=11, decode=False)
    plan, transfer, groups = lake.gen_plans([[first], [second]], [1, 1], lake.get_prefix_tree())
    assert groups == [[1], [0]]
    assert plan.old.pulls.rows.sum() + transfer.moves.rows.sum() == 12 + 1


def test_the_example_of_the_matching():
    """The table in EXERCISES.md: both parts would rather be at instance 1, and one of them goes there."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(4, 50, replicate_factor=0))
    lake.query_bytes, lake.kv_bytes = 10, 2
    decode = reader(lake, 0, [0, 50], home=60)
    prompt = reader(lake, 1, [1], home=61, rows=6, decode=False)
    plan, transfer, groups = lake.gen_plans([[decode], [prompt]], [1, 1], lake.get_prefix_tree())
    assert groups == [[0], [1]]
    kv_rows = plan.old.pulls.rows.sum() + transfer.moves.rows.sum()
    assert 10 * plan.rows_shipped().sum() + 2 * kv_rows == 12 + 8
    text = exercise.TEXT.read_text()
    assert "| part 0 | 10 | 10 + 2 = 12 | 12 | 10 |\n| part 1 | 4 · 2 = 8 | 6 · 2 = 12 | 12 | 8 |" in text


def test_a_row_that_puts_nothing_draws_nobody():
    """A cached prompt reads at instance 0 and ships a row of 10 bytes; its KV is there already. A decode
    reads at instance 1 and puts 100 bytes at instance 2: there their part is computed."""
    lake = TokenLake([0, 1, 2], LlamaConfig(), LakeConfig(4, 50, replicate_factor=0))
    lake.query_bytes, lake.kv_bytes = 10, 100
    cached = Request(0, tokens(4, 0), 9)
    lake.balancer.admit(cached, 0)
    cached.done = 3
    lake.balancer.held[cached.held_row] = [1, 0, 0]
    run = balancer.Run(cached, 3, 1, 0, int(cached.table[0]), False, False)
    decode = reader(lake, 1, [50], home=100)
    _, _, groups = lake.gen_plans([[run, decode]], [1], lake.get_prefix_tree())
    assert groups == [[2, 2]]


@pytest.mark.parametrize("exchange_bytes, instance", [(90, 0), (89, 1)])
def test_a_part_leaves_its_home_if_an_exchange_is_worth_it(exchange_bytes, instance):
    """At home a decode ships its row of 100 bytes; where its old KV lies it would put 10. One exchange
    less in each layer is worth so many bytes, too."""
    lake = TokenLake([0, 1], LlamaConfig(), LakeConfig(4, 50, replicate_factor=0))
    lake.query_bytes, lake.kv_bytes, lake.exchange_bytes = 100, 10, exchange_bytes
    run = reader(lake, 0, [50, 51], home=10)
    _, _, groups = lake.gen_plans([[run], []], [1, 1], lake.get_prefix_tree())
    assert groups == [[instance], []]


def test_who_reads_what_together():
    """Four readers: a span of all but the last, two of the first two, one with the same first row that
    is longer, and what each has alone. The second one reads it in two rows, which see all of it."""
    rows = QueryRows.of_runs(np.arange(4), np.arange(4) * 2, np.array([1, 2, 1, 1]), np.full(4, 500))
    entries = [(0, 0, 64, 0), (1, 0, 64, 0), (2, 0, 64, 0), (3, 0, 65, 0), (0, 100, 32, 64),
               (1, 100, 32, 64), (0, 200, 9, 96), (1, 200, 9, 96), (2, 300, 5, 64)]
    spans = KVSpans(*np.array(entries).T)
    shareable = work_module.can_be_shared(rows, spans, 16)
    assert shareable.all()
    readers, set_of_entry, is_first = work_module.find_sets(spans, shareable, 4)
    together = [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert sorted(readers.astype(int).tolist(), reverse=True) == together
    found = [readers[number].astype(int).tolist() if number >= 0 else None for number in set_of_entry]
    assert found == [together[0]] * 3 + [None] + [together[1]] * 4 + [None]
    assert np.flatnonzero(is_first).tolist() == [0, 4, 6]
    none = work_module.find_sets(spans, shareable & False, 4)
    assert none[0].shape == (0, 4) and (none[1] == -1).all() and not none[2].any()


def test_who_may_read_together():
    """All rows of a reader see all of the span; and rows for a whole block gain little. Nor do four
    readers of 31 rows each gain anything: together they fill four blocks of 32, as alone."""
    rows = QueryRows.of_runs(np.arange(3), np.array([0, 9, 20]), np.array([2, 2, 16]), np.array([62, 63, 99]))
    spans = KVSpans(*np.array([(0, 0, 64, 0), (1, 0, 64, 0), (2, 0, 64, 0), (0, 0, 63, 0)]).T)
    assert work_module.can_be_shared(rows, spans, 16).tolist() == [False, True, False, True]
    assert work_module.can_be_shared(rows, spans, 17).tolist() == [False, True, True, True]
    assert not work_module.saves_bytes(4, 4 * 31, 10**6, max_rows=32, partial_tokens=8)
    assert work_module.saves_bytes(4, 4 * 24, 10**6, max_rows=32, partial_tokens=8)


def test_a_dynamic_program_by_hand():
    """Two requests, two instances: each takes 4 alone, both take 6 together on one instance, of which
    each waits for all. On two instances they take 3, or, if these do not get on, 9."""
    def divide(together, N, slo=None):
        table = np.zeros((2, 3, 3), np.int64)  # requests before the batch, up to its last, DoP
        table[0, 1, 1:] = table[1, 2, 1:] = 4, 9
        table[0, 2, 1:] = 6, together
        return balancer.dynamic_program(lambda i, dop: table[:i, i, dop], 2, N, slo)
    assert divide(3, 2) == [(0, 2, 2)] and divide(9, 2) == [(0, 1, 1), (1, 2, 1)]
    assert divide(9, 1) == divide(9, 1, slo=6) == [(0, 2, 1)] and divide(9, 1, slo=5) is None


import exercise  # noqa: E402

EXERCISES = exercise.read_exercises()


def test_the_exercises_name_what_there_is():
    """Ten in order, each whole: functions, tests, hints, and all that stands in backticks."""
    text = exercise.TEXT.read_text()
    assert [made.number for made in EXERCISES] == [*range(1, 11)]
    functions = [function for made in EXERCISES for function in made.functions]
    assert len({*functions}) == len(functions) and all(made.functions for made in EXERCISES)
    for function in functions:
        place = exercise.find(function, exercise.read_lines(function.file))
        assert place.first < place.body < place.end
    for made, section in zip(EXERCISES, text.split("\n## ")[1:], strict=True):
        assert 2 <= len(made.graders) <= 5 and len({*made.graders}) == len(made.graders)
        assert all(callable(globals()[name.partition("[")[0]]) for name in made.graders)
        assert 2 <= section.count("<details><summary>Hint ") == section.count("</details>") <= 3
        for part in ("Read first", "Empties", "What stays.", "The contract.", "Graded by", "Go on thinking."):
            assert section.count(f"\n**{part}**") == 1, (made.title, part)
        assert max(map(len, section.splitlines())) <= 115
    sources = " ".join((HERE / name).read_text() for name in [*MODULES, "README.md", "test_tokenlake.py"])
    prose = re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    named = {word for name in re.findall("`([^`]*)`", prose) for word in re.findall(r"[A-Za-z_]\w+", name)}
    known = {*re.findall(r"\w+", sources)}
    assert len(named) > 100 and not named - known


@pytest.mark.parametrize("arguments, said", [
    (["0"], "'0': an exercise from 1 to 10 is expected"), (["11"], "'11': an exercise"), (["--check"], "no number:"),
    (["x\n\x1b" * 900], r"'x\n\x1bx"), (["-1"], "-1"), (["1", "2"], "unrecognized arguments: 2"),
    (["1", "--solution", "--check"], "not allowed with"), (["--bogus" * 900], "--bogus"),
    (["--solution"], "no number: an exercise"), (["3", "--solution"], "exercise 3 is not begun: the original is")])
def test_what_is_no_exercise_is_refused(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(exercise, "KEPT", tmp_path / "none")
    with pytest.raises(SystemExit, match="2"):
        exercise.main(arguments)
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1 and len(text) < 240 and text[:-1].isprintable()


def copy_project(folder) -> Path:
    """What exercises need of it."""
    for pattern in ("*.py", "bench/*.py", "*.md", "pytest.ini"):
        for file in HERE.glob(pattern):
            target = folder / file.relative_to(HERE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return folder


def contents(folder) -> dict:
    return {name: (folder / name).read_bytes() for name in [*MODULES, "EXERCISES.md"]}


def test_an_attempt_is_kept(tmp_path, monkeypatch, capsys):
    """Also a second one; other changes of a file stay. What cannot be done is a line, and nothing is
    changed."""
    copy_project(tmp_path)
    monkeypatch.setattr(exercise, "ROOT", tmp_path)
    monkeypatch.setattr(exercise, "KEPT", tmp_path / ".exercises")
    before, file = contents(tmp_path), tmp_path / "balancer.py"
    file.write_bytes((before["balancer.py"] + b"# mine\xc2\xa0\n").replace(b"\n", b"\r\n"))  # also such lines
    with_a_change = contents(tmp_path)

    def refused(arguments, said):
        found = contents(tmp_path)
        with pytest.raises(SystemExit, match="2"):
            exercise.main(arguments)
        text = capsys.readouterr().err
        assert said in text and text.count("\n") == 1 and contents(tmp_path) == found

    for number in (1, 2):
        assert exercise.main(["4"]) == exercise.main(["5"]) == 0
        refused(["4"], "exercise 4 is begun; --solution puts its original back")
        hole = file.read_text()
        attempt = hole.replace('raise NotImplementedError("exercise 4: PrefixTree.evict")', f"return {number}")
        file.write_text(attempt.replace("return", "return ("))
        refused(["4", "--solution"], "balancer.py:")
        file.write_text(attempt.replace("def evict(", "def evicts("))
        refused(["4", "--solution"], "balancer.py: PrefixTree.evict is expected there, and is not")
        file.write_bytes(attempt.replace("\n", "\r\n").encode())
        assert attempt != hole and not exercise.main(["4", "--solution"])
        kept = (tmp_path / ".exercises" / f"4-attempt-{number}.py").read_text()
        assert kept.startswith("# PrefixTree.evict in balancer.py\n") and f"return {number}\n" in kept
        assert exercise.main(["5", "--solution"]) == 0 and contents(tmp_path) == with_a_change
    file.write_bytes(before["balancer.py"])
    capsys.readouterr()
    assert exercise.main([]) == exercise.main(["2"]) == exercise.main([]) == 0
    said = capsys.readouterr().out
    assert said.count("The causal rule in a piece  (begun)") == 1 and "write    is_hidden, work.py:" in said
    assert exercise.main(["2", "--solution"]) == 0 and contents(tmp_path) == before
    left = {path.name for path in (tmp_path / ".exercises").iterdir()}
    assert left == {"4-attempt-1.py", "4-attempt-2.py", "lock"}


@pytest.fixture
def small_project(tmp_path, monkeypatch):
    """A file whose functions `f` and `g` are exercises 1 and 2 → the file."""
    monkeypatch.setattr(exercise, "ROOT", tmp_path)
    monkeypatch.setattr(exercise, "KEPT", tmp_path / ".exercises")
    made = [exercise.Exercise(number, "", [exercise.Function("a.py", name)], [])
            for number, name in ((1, "f"), (2, "g"))]
    monkeypatch.setattr(exercise, "read_exercises", lambda: made)
    file = tmp_path / "a.py"
    file.write_bytes(b'def f(x):\n    """One."""\n    return 1\n\n\ndef g():\n    return 2\n')
    return file


def test_calls_at_once_lose_no_original(tmp_path):
    """Of two exercises in one file, which are emptied at once, and put back at once."""
    copy_project(tmp_path)
    before = contents(tmp_path)
    for instead in ([], ["--solution"]):
        calls = [subprocess.Popen([sys.executable, "bench/exercise.py", number, *instead], cwd=tmp_path,
                                  stdout=subprocess.DEVNULL) for number in "4455"]
        assert sorted(call.wait(60) for call in calls) == [0, 0, 2, 2]
        text = (tmp_path / "balancer.py").read_text()
        assert text.count("NotImplementedError(\"exercise ") == (0 if instead else 2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("end", [b"\r", b"\r\n", b"\r\r\n", b"\n\x0c"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_lines_end_as_they_did(small_project, start, end):
    """Also the last one, which has no end, and one of another kind in the midst of a function."""
    lines = small_project.read_bytes().replace(b"\n", end).replace(b'"""' + end, b'"""\r')
    before = start + lines.removesuffix(end)
    small_project.write_bytes(before)
    assert exercise.main(["1"]) == exercise.main(["2"]) == 0
    assert all(f'"exercise {number}: ' in small_project.read_text() for number in (1, 2))
    assert exercise.main(["1", "--solution"]) == exercise.main(["2", "--solution"]) == 0
    assert small_project.read_bytes() == before
    assert exercise.main(["2"]) == 0
    small_project.write_bytes(small_project.read_bytes() + b"\nmore = 1")
    assert exercise.main(["2", "--solution"]) == 0
    ast.parse(small_project.read_bytes().removeprefix(start))
    assert small_project.read_bytes().startswith(before) and small_project.read_bytes().endswith(b"\nmore = 1")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("writes", [1, 2])
def test_what_cannot_be_emptied_is_not_begun(small_project, monkeypatch, error, writes):
    """Whether the originals cannot be written or, after these, the file."""
    before, replace, calls = small_project.read_bytes(), os.replace, []

    def fail(new, path):
        calls.append(path)
        if len(calls) == writes:
            raise error
        replace(new, path)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error):
        exercise.main(["1"])
    assert len(calls) == writes and small_project.read_bytes() == before
    assert [path.name for path in exercise.KEPT.iterdir()] == ["lock"]
    assert exercise.main(["1"]) == exercise.main(["1", "--solution"]) == 0


def test_a_full_disk_is_a_line(tmp_path):
    copy_project(tmp_path)
    before = contents(tmp_path)
    command = f"ulimit -f 0; trap '' XFSZ; {sys.executable} -B bench/exercise.py 1 2>&1 | cat"
    said = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout
    assert said.startswith("exercise.py: error: ") and said.count("\n") == 1
    assert contents(tmp_path) == before and [path.name for path in (tmp_path / ".exercises").iterdir()] == ["lock"]
    assert not [*tmp_path.glob("*.new")]


def test_a_file_converted_meanwhile_keeps_its_line_ends(small_project):
    """And that is no attempt."""
    before = small_project.read_bytes()
    for end in (b"\r\n", b"\n"):
        assert exercise.main(["1"]) == 0
        small_project.write_bytes(small_project.read_bytes().replace(b"\r", b"").replace(b"\n", end))
        assert exercise.main(["1", "--solution"]) == 0
        assert small_project.read_bytes() == before.replace(b"\n", end)
    assert [path.name for path in exercise.KEPT.iterdir()] == ["lock"]


@pytest.mark.parametrize("content, said", [
    (b"HOLE\ndef f(x):\n    return 3\n", ": f is defined twice, in line 1 and here; leave one"),
    (b"HOLE\nif 1:\n    async def f(): pass\n", ": f is defined twice, in line 1 and here; leave one"),
    (b"HOLE\nx = '\xff'", "a.py:9: this is no UTF-8"), (b"HOLE\n\0", "a.py:9: a NUL character"),
    (b"HOLE\nx = " + b"-" * 200_000 + b"1", "a.py: its expressions are nested too deeply")])
def test_what_cannot_be_put_back_is_refused(small_project, capsys, content, said):
    assert exercise.main(["1"]) == 0
    hole = small_project.read_bytes()
    small_project.write_bytes(content.replace(b"HOLE", hole))
    for arguments in (["1", "--solution"], ["2"]) if b"def f" not in content else (["1", "--solution"],):
        with pytest.raises(SystemExit, match="2"):
            exercise.main(arguments)
        text = capsys.readouterr().err
        assert said in text and text.count("\n") == 1 and small_project.read_bytes() == content.replace(b"HOLE", hole)
    small_project.write_bytes(hole)
    assert exercise.main(["1", "--solution"]) == 0


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"[]", b"{}", b"\xff", b'[["a.py", "f", [], []]]',
                                     b'[["a.py", "f", [1], ["x"]]]', b'[["a.py", 3, ["x"], ["x"]]]', b"[" * 200_000])
def test_mangled_originals_are_refused(small_project, capsys, content):
    assert exercise.main(["1"]) == 0
    hole = small_project.read_bytes()
    (exercise.KEPT / "1-originals.json").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        exercise.main(["1", "--solution"])
    text = capsys.readouterr().err
    assert ".exercises/1-originals.json: no originals are left there; take a.py from a fresh copy" in text
    assert text.count("\n") == 1 and small_project.read_bytes() == hole


@pytest.mark.parametrize("closed, status, said", [
    (">&-", 0, ""), (">/dev/full", 1, "exercise.py: error: [Errno 28]"), ("2>&-", 0, "")])
def test_no_output_is_no_traceback(tmp_path, closed, status, said):
    copy_project(tmp_path)
    for arguments, expected in (("", status), ("11", 2)):
        command = f"{sys.executable} bench/exercise.py {arguments} {closed}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == expected and done.stderr.count("\n") <= 1
        assert arguments or done.stderr.startswith(said) and bool(done.stderr) == bool(said)


def run_in(folder, *command):
    """Python there, which compiles what it imports once → exit status, what it says."""
    left_out = "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run([sys.executable, *command], cwd=folder, text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=environment | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout


def fail_and_put_back(folder, made):
    """Once its functions are empty all of its tests fail, and for that; then all is as it was."""
    before = contents(folder)
    command = "bench/exercise.py", str(made.number)
    assert run_in(folder, *command)[0] == 0
    changed = [name for name, content in contents(folder).items() if content != before[name]]
    assert changed == sorted({function.file for function in made.functions})
    status, said = run_in(folder, *command, "--check")
    failed = set(re.findall(r"^FAILED \S+::(\w+(?:\[\S+\])?)", said, re.MULTILINE))
    names = failed | {name.partition("[")[0] for name in failed}
    assert status == 1 and names >= {*made.graders}, (made.graders, said)
    assert not re.search(r"\d+ (passed|error)", said.splitlines()[-1]), said
    assert said.count(f"exercise {made.number}: ") >= len(failed), said
    assert run_in(folder, *command, "--solution")[0] == 0 and contents(folder) == before


def test_the_graders_see_what_is_missing(tmp_path):
    """Of each exercise, in two copies of the project at once; and in the end that all is there."""
    folders = [copy_project(tmp_path / name) for name in "ab"]

    def every_second(first):
        for made in EXERCISES[first::2]:
            fail_and_put_back(folders[first], made)

    with ThreadPoolExecutor(2) as executor:
        assert [*executor.map(every_second, (0, 1))] == [None, None]
    graders = dict.fromkeys(f"test_tokenlake.py::{name}" for made in EXERCISES for name in made.graders)
    status, said = run_in(folders[0], "-m", "pytest", "-q", "-n0", *graders)
    assert status == 0, said


# ── the README's commands ─────────────────────────────────────────────────────────────────────


class Shown(NamedTuple):
    """How a command of the README is tried: what stands in for it where it wants more than two
    cores have, why, and what it says (a regular expression)."""
    said: str
    instead: str | None = None
    why: str = ""
    seconds: int = 60  # that it takes about; from 20 on it is slow


SERVE = "torchrun --standalone --nproc-per-node="
TINY = "run_cluster.py --model DIR --trace FILE.jsonl --trace-scale 256 --num-requests 20 --speed inf"
REPLAY = "python balancer.py --trace FILE.jsonl --instances 8"
VERIFIED = "equal recomputation without a cache, token for token"
# By what the README shows, in its order.
COMMANDS = {
    "pip install -r requirements.txt && torchrun --standalone --nproc-per-node=4 run_cluster.py":
        Shown(f"48/48 {VERIFIED}", seconds=120),
    "pytest": Shown("7 passed", "pytest -k salt", "all of them run this one", 20),
    "pytest -m slow": Shown("tests collected", "pytest -m slow --collect-only -q", "they take an hour"),
    "pip install transformers": Shown("", None, "from the network", 0),
    "python bench/workloads.py toolagent --num-requests 1000 --rate 4 > FILE.jsonl": Shown("^$", seconds=9),
    f"{REPLAY} --placement hash --replicate-factor 0":
        Shown(r"1,000 requests, planned on 8 .*homes by hash.*replicas_max +1 ", seconds=20),
    f"{REPLAY} --placement hash": Shown(r"homes by hash.*replicas_max +8 ", seconds=20),
    REPLAY: Shown(r"homes by stripe.*hit_rate +0\.7", seconds=9),
    "python run_cluster.py": Shown(rf"1 on .*48/48 {VERIFIED}", seconds=20),
    f"{SERVE}2 run_cluster.py --trace FILE.jsonl --trace-scale 64 --segment-tokens 8 "
    "--num-requests 200 --speed inf --verify --output out": Shown(f"200/200 {VERIFIED}", seconds=30),
    "grep -v ^torch requirements.txt | pip install -r /dev/stdin":
        Shown("Would install|already satisfied", "grep -v ^torch requirements.txt | "
              "pip install --dry-run -r /dev/stdin", "what is installed stays as it is"),
    "hf download ORG/NAME --local-dir DIR": Shown("", None, "from the network", 0),
    f"{SERVE}8 run_cluster.py --model DIR --trace FILE.jsonl":
        Shown(r"2 on .*requests  20 in", f"{SERVE}2 {TINY}", "two ranks on CPUs, a tiny folder"),
    "python bench/gpu.py": Shown("facts", "python bench/gpu.py facts", "a rehearsal takes two minutes"),
    "torchrun --nproc-per-node=8 bench/gpu.py":
        Shown(r"exchanges", "torchrun --standalone --nproc-per-node=2 bench/gpu.py", "two ranks on CPUs"),
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
    "run_cluster.py --model DIR --trace FILE.jsonl":
        Shown(r"2 on .*requests  20 in", " & ".join(
            ["torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:PORT "
             "--rdzv-id=PORT " + TINY] * 2) + "; wait", "two agents on one machine, a tiny folder"),
    "python bench/workloads.py loogle --num-requests 200 --rate 1 > FILE.jsonl": Shown("^$", seconds=9),
    "pip install tokenizers": Shown("", None, "from the network", 0),
    f"{SERVE}4 --max-restarts=10 run_cluster.py --output out --resume":
        Shown(f"48/48 {VERIFIED}", seconds=25),
    "python bench/soak.py": Shown("answers equal; none lost", "python bench/soak.py --num-requests 300 --kill-every 1",
                                  "fewer requests", 90),
    "python bench/golden_plans.py": Shown("0 of 320 scenes are planned otherwise", seconds=45),
    "python bench/simulate.py --table --trace FILE.jsonl --model llama-3.1-8b --tp 1 --num-requests 200 "
    "--capacity-tokens 1000000 --chunk-tokens 1024 --max-batch 128 --rate 4":
        Shown(r"4 instances of 1 A100.*FILE +pd:3x1", "python bench/simulate.py --table --trace "
              "FILE.jsonl --model llama-3.1-8b --tp 1 --num-requests 10 --capacity-tokens 1000000 "
              "--chunk-tokens 1024 --max-batch 128 --rate 4", "fewer requests", 40),
    "python bench/plan.py": Shown("with digest", seconds=30),
    "python bench/compare.py --workload loogle --capacity-tokens 400000 --num-requests 1000 --rate 4 "
    "--rates 1,2,3,4,5,6 --policies tokenlake,router,pd:1x3,pd:3x1,router:fcfs --seeds 3 --output DIR":
        Shown(r"goodput.*router:fcfs", "python bench/compare.py --workload loogle --capacity-tokens "
              "400000 --num-requests 20 --rate 4 --rates 1,2 --policies "
              "tokenlake,router,pd:1x3,pd:3x1,router:fcfs --seeds 1 --output compared", "fewer requests", 60),
    f"{SERVE}4 bench/compare.py --real --policies tokenlake,lakes:2x2,router,pd:1x3,pd:3x1":
        Shown(r"tokenlake +80/80 .*pd:3x1 +80/80 ", seconds=60),
    "python bench/report.py --measure NAME":
        Shown("planning-unshared", "python bench/report.py --measure planning-unshared --again",
              "the shortest", 40),
    "python bench/report.py": Shown("of an earlier state|^$", seconds=20),
    "python bench/simulate.py --policy lakes:8x32 --instances 256 --num-requests 10000 --rate 240 "
    "--capacity-tokens 25600000 --max-batch 32768":
        Shown('"slo_attainment": 1.0', "python bench/simulate.py --policy lakes:2x4 --instances 8 "
              "--num-requests 100 --rate 8 --capacity-tokens 800000 --max-batch 1024", "fewer instances", 25),
    "python bench/simulate.py --validate": Shown('"correlation"', seconds=25),
    "python bench/peers.py": Shown("tokenlake, 1 rank", "python bench/peers.py --sharing on --ranks 1 "
                                   "--rounds 1 --num-requests 4 --layers 1 --batch 2", "a small load", 60),
    "python kernels.py": Shown("Merged and whole differ by .*decode", seconds=25),
    # (The next nine have tests of their own; so these are slow.)
    "python work.py": Shown("265 slab rows are read; 649"),
    "python balancer.py": Shown("eviction  6@1"),
    "python pool.py": Shown("All ten keys in one place"),
    "python tokenlake.py": Shown("old tokens to read: 4"),
    "python model.py": Shown("rows were computed"),
    "python bench/example.py": Shown("32 of 35 prompt tokens"),
    "python bench/lesson.py": Shown("^$"),
    "python bench/ported.py": Shown("6 of 6 answers equal"),
    "python bench/exercise.py": Shown("1  The merge of partial attentions"),
    f"{SERVE}4 run_cluster.py --record 40 --output out": Shown(f"48/48 {VERIFIED}", seconds=25),
    "python bench/watch.py out":
        Shown(r"lake.html: 5 iterations", "python run_cluster.py --record 5 --num-requests 3 "
              "--speed inf --output out && python bench/watch.py out", "it needs a recording", 15),
    "python bench/conformance.py check bench/vectors": Shown("iteration: 4 of 4 agree"),
    "python record.py": Shown("plans.jsonl begins with a line", seconds=9),
    "python run_cluster.py --model DIR --trace FILE.jsonl":
        Shown(r"1 on .*requests  20 in", f"python {TINY}", "a tiny folder", 15),
    "python bench/kernel_speed.py": Shown("merge", seconds=25),
    "python bench/host_time.py": Shown("decodes, one rank", seconds=25),
}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


PROGRAMS = "pip", "grep", "hf", "python", "pytest", "torchrun"


def shown_commands() -> list[str]:
    """Of both READMEs: lines of their fenced blocks, and what stands in backticks, that begin with a
    program; each once."""
    text = "\n".join(page.read_text() for page in report.PAGES)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    fenced = "".join(block for language, block in blocks if not language)
    lines = fenced.replace("\\\n", "").splitlines()
    lines += re.findall("`([^`]*)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [" ".join(line.split()) for line in lines]
    return list(dict.fromkeys(line for line in lines if line != "python" and line.split() and
                              line.split()[0] in PROGRAMS))


def test_all_commands_of_the_readme_are_tried():
    assert sorted(shown_commands()) == sorted(COMMANDS)
    assert all(shown.why for shown in COMMANDS.values() if shown.instead or not shown.seconds)


@pytest.fixture(scope="module")
def fresh_clone(tmp_path_factory):
    """All files of the project as they are now, nothing that was made; a trace, and a tiny model."""
    folder = tmp_path_factory.mktemp("clone")
    listed = "git ls-files --cached --others --exclude-standard -z".split()
    for name in subprocess.run(listed, cwd=HERE, stdout=subprocess.PIPE, check=True).stdout.split(b"\0")[:-1]:
        target = folder / os.fsdecode(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / os.fsdecode(name), target)
    lines = workloads.generate("toolagent", 1000, 4.0, 0)
    (folder / "FILE.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_model(folder / "DIR", dict(vocab_size=512))
    return folder


@pytest.mark.parametrize("command", [
    pytest.param(command, marks=[pytest.mark.slow] * (shown.seconds >= 20))
    for command, shown in COMMANDS.items() if shown.seconds])
def test_a_command_of_the_readme(fresh_clone, tmp_path, command):
    """In a fresh clone, as it stands there or as the table says; the first one in an environment
    where nothing is installed."""
    shown = COMMANDS[command]
    path = os.path.dirname(sys.executable)
    if command.startswith("pip install -r"):
        subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
        path = tmp_path / "bin"
    shutil.rmtree(fresh_clone / "out", ignore_errors=True)
    line = (shown.instead or command).replace("PORT", str(free_port()))
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], cwd=fresh_clone, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200)
    assert done.returncode == 0, done.stdout
    assert re.search(shown.said, done.stdout, re.DOTALL), done.stdout


# ── what the documents say ────────────────────────────────────────────────────────────────────

# (bench/NOTES.md also speaks of what was dropped.)
DOCUMENTS = "README.md", "bench/README.md", "PORTING.md", "EXERCISES.md"
# Names in PORTING.md and elsewhere that are not ours: vLLM's, SGLang's, PyTorch's, of files and shells.
FOREIGN = set("""
    block_table query_start_loc seq_lens ref_cnt lock_ref req_to_token token_to_kv_pool k_buffer v_buffer
    KVConnectorBase_V1 get_num_new_matched_tokens update_state_after_alloc build_connector_meta
    request_finished start_load_kv wait_for_layer_load save_kv_layer wait_for_save merge_attn_states
    RadixCache.match_prefix insert evict inc_lock_ref dec_lock_ref cache_unfinished_req cache_finished_req
    init_forward_metadata forward_extend forward_decode torch.distributed._symmetric_memory
    lstsq generate GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME
""".split())


def prose_of(document) -> str:
    """What is not in fenced blocks."""
    return re.sub(r"^```.*?^```", "", (HERE / document).read_text(), flags=re.MULTILINE | re.DOTALL)


def code_names():
    """Of all our files: identifiers, `Class.attribute` pairs, and strings (names of options and keys)."""
    names, members, strings = set(), set(), set()
    for file in MODULES:
        tree = ast.parse((HERE / file).read_text())
        for node in ast.walk(tree):
            names |= {getattr(node, key) for key in ("id", "attr", "name", "arg")
                      if isinstance(getattr(node, key, None), str)}
            if isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
            if isinstance(node, ast.ClassDef):
                inside = {getattr(part, key) for part in ast.walk(node) for key in ("name", "attr", "id")
                          if isinstance(getattr(part, key, None), str)}
                members |= {f"{node.name}.{name}" for name in inside}
        names.add(Path(file).stem)
    return names, members, strings


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_exists(document):
    """Options, files, functions, attributes and keys in backticks, and links."""
    text = prose_of(document)
    names, members, strings = code_names()
    words = {word for string in strings for word in re.findall(r"[\w-]+", string)}
    words |= set(re.findall(r'"(\w+)":', (HERE / "bench/results/reads.json").read_text()))
    missing = []
    for quoted in (" ".join(found.split()) for found in re.findall("`([^`]+)`", text)):
        called = re.sub(r"\(.*\)( -> .*)?$", "", quoted)
        if re.fullmatch(r"--[a-z][a-z-]*( .*)?", quoted):
            known = quoted.split()[0] in strings or f"--{quoted.split()[0][5:]}" in strings
        elif re.fullmatch(r"[\w./-]+\.(py|md|jsonl?|txt|svg|png|html)", quoted):
            beside = (HERE / document).parent
            known = (HERE / quoted).exists() or (beside / quoted).exists()
            known = known or any(quoted in string for string in strings)
        elif re.fullmatch(r"[A-Za-z_]\w+\.\w+", called):
            module, name = called.split(".")
            known = called in members or module in names and name in names
        elif re.fullmatch(r"[A-Za-z_]\w+", called):
            known = called in names or called in words
        else:
            continue
        if not known and called not in FOREIGN:
            missing.append(quoted)
    for target in re.findall(r"\]\(([^)#:\s]+)\)", text):
        if not ((HERE / document).parent / target).exists():
            missing.append(target)
    assert not missing


def test_what_the_readmes_say_of_their_tables():
    """Figures in the text that follow from records, by themselves or as ratios."""
    found = report.read_records()

    def policy(name, policy):
        return found[name]["result"][0]["policies"][policy]

    def goodput(name, key):
        rate = policy(name, key)["p90_goodput"]
        return rate["mean"] if isinstance(rate, dict) else rate

    def ttft(name, key, rate):
        return report.at_rate(policy(name, key), rate)["normalised_ttft"]

    def tpot(name, key, rate):
        return report.at_rate(policy(name, key), rate)["mean_tpot_ms"]

    def fleet(name, key):
        return found[name]["result"][0][key]

    text = " ".join("".join(map(prose_of, ("README.md", "bench/README.md"))).split())
    quoted = {
        "0.013 against 0.032 ms": [ttft("conversation", key, 2) for key in ("tokenlake", "router")],
        "(12 against 15 ms": [tpot("conversation", key, 8) for key in ("router", "tokenlake")],
        "2.8 and 7 times the goodput": [
            goodput("elastic", f"tokenlake:{pd}") / goodput("elastic", pd) for pd in ("pd:1x3", "pd:3x1")],
        "refuses what that does not hold (0.3 %)": [100 * fleet("lakes-256-router", "refused")],
    }
    for sentence, values in quoted.items():
        assert sentence in text
        numbers = re.findall(r"\d[\d.]*", sentence)
        for said, value in zip(numbers, values, strict=True):
            decimals = len(said.partition(".")[2])
            assert float(said) == pytest.approx(value, abs=0.51 * 10**-decimals), sentence
    in_words = {
        "an eighth and a fifth of its TTFT": [
            (ttft("elastic", pd, 2) / ttft("elastic", f"tokenlake:{pd}", 2), times)
            for pd, times in (("pd:1x3", 8), ("pd:3x1", 5))],
        "less than half of the goodput": [
            (2 * goodput("ablations", "read-alone") < goodput("ablations", "tokenlake"), True)],
        "at a fifth of the rate": [
            (goodput("ablations", "tokenlake") / goodput("ablations", "tokenlake:fcfs"), 5)],
        "four times as long as eight of 32": [
            (fleet("lakes-256", "mean_tpot_ms") / fleet("lakes-256-8x32", "mean_tpot_ms"), 4)],
        "a first one three times": [
            (fleet("lakes-256", "mean_ttft_ms") / fleet("lakes-256-8x32", "mean_ttft_ms"), 3)],
        "and a plan twelve times": [
            (fleet("lakes-256", "plan_ms_median") / fleet("lakes-256-8x32", "plan_ms_median"), 12)],
            }
    for sentence, pairs in in_words.items():
        assert sentence in text
        for value, said in pairs:
            assert value == pytest.approx(said, rel=0.2), sentence
    hits = [[entry["hit_rate"] for entry in policy("hits", key)["capacities"]]
            for key in ("tokenlake", "pd:1x3", "pd:3x1")]
    ratios = [pool_hits / pd_hits for pds in hits[1:] for pool_hits, pd_hits in zip(hits[0], pds)]
    assert "the pool's rate is 1.2 to 2.2 times as high" in text
    assert (round(min(ratios), 1), round(max(ratios), 1)) == (1.2, 2.2)


def test_the_arithmetic_of_the_readme():
    """A row and a segment of Llama-3.1-8B in bf16, and the ridge of an A100."""
    text = " ".join(prose_of("README.md").split())
    llama = simulate.MODELS["llama-3.1-8b"]
    lake = TokenLake([0, 1], llama, LakeConfig(segment_tokens=512), dtype=torch.bfloat16)
    assert "**16.5 kB**" in text and round(lake.query_bytes / 1e3, 1) == 16.5
    assert "**2.1 MB**, 127 times as much" in text and round(512 * lake.kv_bytes / 1e6, 1) == 2.1
    assert 512 * lake.kv_bytes // lake.query_bytes == 127
    assert "(38 on an A100 with four query heads to a KV head)" in text and lake.ridge == 38
    porting = " ".join(prose_of("PORTING.md").split())
    assert "16,512 bytes" in porting and lake.query_bytes == 16512
    assert "token's K and V 4,096" in porting and lake.kv_bytes == 4096
    assert "less than 4.03 tokens" in porting and round(lake.query_bytes / lake.kv_bytes, 2) == 4.03


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
