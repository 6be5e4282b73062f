"""Does a long run stay right, and as small as it began? Many requests in a small pool, and killed
ranks.

    python bench/soak.py                                       # 10,000 requests, 4 ranks
    python bench/soak.py --num-requests 500 --kill-every 2

The same trace is served twice, by torchrun on this machine: undisturbed, then with a random rank
killed (kill -9) every so often, under `--max-restarts` and `--resume`. Both have to end with one
answer for each request, and the same ones. The memory of every rank is looked at twice a second;
its slope is fitted to what comes after a warm-up, a third of a process's life.

So many requests are in flight at once, each behind one of a few stems; the pool has room for little
more than these, so it evicts all the time. Needs /proc, so Linux.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from options import Parser, number, run_main  # noqa: E402
from provenance import describe_machine  # noqa: E402

BLOCK = 16  # tokens of a hash id
TRACE_SCALE = 512 // BLOCK
STEMS = 12
IN_FLIGHT = 48
OPTIONS = ["--slots", "80", "--max-batch", "48", "--dtype", "float64", "--device", "cpu"]
OPTIONS += ["--temperature", "0.7", "--speed", "inf", "--trace-scale", str(TRACE_SCALE)]
WARM_UP = 1 / 3
LOOK = 0.5  # seconds
LONG_ENOUGH = 20  # seconds after the warm-up, to tell a slope


class Sample(NamedTuple):
    """The memory of a rank at a time."""
    seconds: float
    finished: int  # requests, so far
    process: int
    rank: int
    mib: float


def make_trace(num_requests: int, seed: int):
    """Lines: a stem of one to four blocks and one of its own. Those of a session wait for each
    other, so that so many are in flight: as with hash ids a prompt is not what was said before."""
    rng = np.random.default_rng((seed, 2))
    stems = [list(range(8 * i, 8 * i + int(rng.integers(1, 5)))) for i in range(STEMS)]
    for index in range(num_requests):
        stem = stems[min(int(rng.geometric(0.3)), STEMS) - 1]
        ids = [*stem, 1000 + index]
        own = int(rng.integers(1, BLOCK + 1))
        yield dict(
            timestamp=0,
            session_id=index % IN_FLIGHT,
            input_length=(len(stem) * BLOCK + own) * TRACE_SCALE,
            output_length=int(rng.integers(1, 9)) * TRACE_SCALE,
            hash_ids=ids,
        )


def ranks_of(torchrun: int) -> dict[int, int]:
    """Process ids by rank, of those that run under the torchrun of a process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        rank = [int(text[5:]) for text in variables if text.startswith(b"RANK=")]
        if int(parent) == torchrun and rank:
            found[rank[0]] = int(folder.name)
    return found


class Run:
    """A trace at work under torchrun: its ranks, their memory, and those that were killed."""
    def __init__(self, trace: Path, output: Path, ranks: int):
        self.file = output / "requests.jsonl"
        self.samples = []
        self.kills = 0
        self.began = time.monotonic()
        program = str(HERE.parent / "run_cluster.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", "--max-restarts=100000"]
        command += [program, "--trace", str(trace), "--resume"]
        self.log = open(output.with_suffix(".log"), "w+")
        self.process = subprocess.Popen(
            [*command, "--output", str(output), *OPTIONS],
            stdout=self.log,
            stderr=self.log,
        )

    def look(self):
        """Adds a sample of every rank."""
        seconds = time.monotonic() - self.began
        finished = self.file.read_bytes().count(b"\n") if self.file.exists() else 0
        for rank, process in ranks_of(self.process.pid).items():
            try:
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            except (OSError, IndexError):
                continue
            mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self.samples.append(Sample(seconds, finished, process, rank, mib))

    def kill_one(self, rng):
        ranks = ranks_of(self.process.pid)
        if ranks:
            os.kill(ranks[rng.choice(sorted(ranks))], signal.SIGKILL)
            self.kills += 1

    def finish(self, kill_every: float, rng):
        """Watches until all is served. A rank is killed `kill_every` seconds after the first answer,
        and after the first one since it was started again, and so on (inf: none)."""
        try:
            self._watch(kill_every, rng)
        finally:  # if we are interrupted it does not outlive us
            self.process.terminate()
            self.process.wait()
        self.seconds = time.monotonic() - self.began
        if self.process.returncode:
            self.log.seek(0)
            raise RuntimeError(f"the run has failed:\n{self.log.read()[-4000:]}")

    def _watch(self, kill_every: float, rng):
        next_kill = None
        written = 0  # bytes of answers, at the last kill
        while self.process.poll() is None:
            self.look()
            now = time.monotonic()
            size = self.file.stat().st_size if self.file.exists() else 0
            if next_kill is None and size > written:
                next_kill = now + kill_every
            if next_kill and now >= next_kill:
                self.kill_one(rng)
                next_kill = None
                written = size
            time.sleep(LOOK)

    def answers(self) -> list[tuple]:
        """(request id, answer) of each record, by id."""
        records = map(json.loads, self.file.read_text().splitlines())
        return sorted((record["request_id"], record["output_ids"]) for record in records)

    def memory(self) -> list[tuple]:
        """(rank, MiB after warm-up, MiB at the end, KiB per 1,000 requests) of the processes that
        have lived longest, if that is long enough."""
        rows = []
        for rank in sorted({sample.rank for sample in self.samples}):
            mine = [sample for sample in self.samples if sample.rank == rank]
            life, _ = Counter(sample.process for sample in mine).most_common(1)[0]
            longest = [sample for sample in mine if sample.process == life]
            warm = [s for s in longest if s.finished][int(len(longest) * WARM_UP) :]
            if not warm or warm[-1].seconds - warm[0].seconds < LONG_ENOUGH:
                continue
            finished = [sample.finished for sample in warm]
            slope, _ = np.polyfit(finished, [sample.mib for sample in warm], 1)
            rows.append((rank, warm[0].mib, warm[-1].mib, slope * 1024 * 1000))
        return rows


def describe(options) -> str:
    """What is measured, on what, with which settings: the lines above the table, and its head."""
    return (
        f"Does a long run stay right, and as small as it began? {options.num_requests:,} requests "
        f"of the built-in model, {options.ranks} ranks,\n{' '.join(OPTIONS)};\nthen again with a "
        f"random rank killed every {options.kill_every:g} s. Memory: of each rank's longest process,\n"
        f"after a third of its life, if {LONG_ENOUGH} s are left (else –). Run on {describe_machine()}.\n\n"
        f"{'run':<12} {'requests':>9} {'took':>7} {'kills':>6} {'rank':>5} {'after warm-up':>13} "
        f"{'at the end':>10} {'grows':>22}\n"
        f"{'':<12} {'':>9} {'s':>7} {'':>6} {'':>5} {'MiB':>13} "
        f"{'MiB':>10} {'KiB per 1,000 requests':>22}"
    )


def show(name: str, run: Run):
    """A row for each rank; the first has what is true of all."""
    cells = f"{name:<12} {len(run.answers()):>9,} {run.seconds:>7,.0f} {run.kills:>6}"
    rows = [
        f" {rank:>5} {first:>13,.1f} {last:>10,.1f} {slope:>+22,.0f}"
        for rank, first, last, slope in run.memory()
    ]
    for row in rows or [f" {'–':>5} {'–':>13} {'–':>10} {'–':>22}"]:
        print(f"{cells:<37}{row}", flush=True)
        cells = ""


def parse_options(arguments: list[str]):
    parser = Parser(description="Serve a long trace, and kill ranks.")
    add = parser.add_argument
    requests = number(int, 1, 10_000_000)
    add("--num-requests", type=requests, default=10_000, help="default 10,000")
    add("--ranks", type=number(int, 1, 1024), default=4, help="default 4")
    seconds = number(float, 1e-6, np.inf)
    add("--kill-every", type=seconds, default=12.0, help="seconds (12)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the trace (0)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    print(describe(options), flush=True)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace = folder / "trace.jsonl"
        lines = make_trace(options.num_requests, options.seed)
        trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
        answers = []
        both = {"undisturbed": np.inf, "with kills": options.kill_every}
        for name, kill_every in both.items():
            run = Run(trace, folder / name.replace(" ", "-"), options.ranks)
            try:
                run.finish(kill_every, rng)
            except RuntimeError as error:
                print(f"soak.py: {error}", file=sys.stderr)
                return 1
            show(name, run)
            answers.append(run.answers())
    if run.kills == 0:
        said = "more requests, or a smaller one, are expected"
        print(
            f"soak.py: --kill-every {options.kill_every:g}: no rank was killed; {said}",
            file=sys.stderr,
        )
        return 1
    same = answers[0] == answers[1]
    once = [id for id, _ in answers[1]] == list(range(options.num_requests))
    print(f"answers {'equal' if same else 'DIFFER'}; {'none' if once else 'SOME'} lost or twice")
    return int(not (same and once))


if __name__ == "__main__":
    run_main(main)
