"""The ranks of a job: what do they say to each other, and what if one is lost?

Ranks plan alike and step together (tokenlake.py, pool.py), so little has to be said. All of it is
small integers, over gloo on the CPU:

    set-up                 `together`: a step that fails on one rank fails on all, with one message
    before an iteration    `announce`, `confirm`: a digest of the plan; is it the same on all?
    after it               `gather_and_time`: the tokens of all, and rank 0's clock when it has them

Who was lost? A rank that cannot go on says so in the job's store. A thread of every rank looks
there (`Lookout`), so all that wait for an exchange learn of it, come to `Cluster.give_up` too, and
answer. Ranks that do not are named: dead or stopped ones do not answer at all, for busy or stuck
ones only the thread does. A rank that torchrun ends because of another still answers. All then
leave: what was cached is lost, what was finished is not (results.py).
"""

import hashlib
import os
import pickle
import sys
import time
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import Callable, NamedTuple

PARENT = os.getppid()  # asked before torch is imported: that takes seconds

import numpy as np
import torch

OLDEST_TORCH = "2.11"


def require_torch(version: str):
    """Ends the program if the installed one is too old, before what it lacks is missed."""
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) < tuple(map(int, OLDEST_TORCH.split("."))):
        if os.environ.get("RANK", "0") == "0":
            said = f"torch {version} is installed; {OLDEST_TORCH} or later is expected"
            print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr, flush=True)
        raise SystemExit(2)


require_torch(torch.__version__)

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# Between two looks of a waiting rank: was there a signal, has another rank given up?
LOOK_SECONDS = 0.5
# After a signal an iteration has so long to end. (torchrun kills its ranks after 30 s.)
STOP_SECONDS = 10.0
# So long after the last answer, whoever has not answered counts as lost.
ANSWER_SECONDS = 2.0
# Thread blocks of a communicator's kernel, at most. All kernels of NCCL that run at once have to
# fit into a GPU, or each may wait for another: a block takes a multiprocessor, an A100 has 108.
MAX_CTAS = 16
# Stands for a plan's digest when there is nothing more to plan.
THE_END = hashlib.blake2b(b"the end", digest_size=16).digest()


class SetupError(ValueError):
    """Set-up failed on some rank by a user's mistake: every rank raises this, with one message."""


class LakeError(RuntimeError):
    """The lake cannot go on, or is misused: one line that says why."""


class Stopped(LakeError):
    """A rank was asked to stop (a signal); all stop at the same iteration."""


def rank_list(ranks: list[int]) -> str:
    """`rank 2` or `ranks 1, 2`."""
    return "rank" + "s" * (len(ranks) > 1) + " " + ", ".join(map(str, ranks))


def pickled(value) -> torch.Tensor:
    """Its bytes, as collectives take them."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def in_time(seconds, function):
    """What a function returns; None if it fails or takes longer. If the store is lost, a call of it
    may do either."""
    results = []

    def call():
        with suppress(RuntimeError):
            results.append(function())

    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def nccl_options(timeout):
    """Of one communicator among several whose operations overlap: it leaves room on the device."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout  # or PyTorch warns that it takes the one that is said beside
    options.config.max_ctas = MAX_CTAS
    return options


class Lookout(Thread):
    """Looks after the job while the rank is busy or waits: has torchrun ended, has another rank
    given up? No rank outlives torchrun for long, not even a stuck one."""
    def __init__(self, rank):
        super().__init__(daemon=True)
        self.rank = rank
        self.store = None  # once it is known
        self.given_up = None  # by another rank: its reason
        self.parent = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None

    def orphaned(self) -> bool:
        return self.parent is not None and os.getppid() != self.parent

    def run(self):
        while not self.orphaned():
            time.sleep(LOOK_SECONDS)
            with suppress(RuntimeError):  # the store is lost: its ranks will be, too
                if self.store and self.store.check(["given up"]):
                    self.store.set(f"alive/{self.rank}", "")
                    self.given_up = self.store.get("given up").decode()
        time.sleep(STOP_SECONDS)
        os._exit(1)


class Announcement(NamedTuple):
    """What each rank says before the first exchange of an iteration."""
    digest_head: int  # the first 8 bytes of its plan's digest
    digest_tail: int  # and the others
    stop: int  # it was asked to stop
    fault: int  # it could not plan


class Cluster:
    """The ranks of this job (one without torchrun)."""
    def __init__(self, timeout=300.0):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.timeout = timedelta(seconds=timeout)
        self.doing = ""  # for messages; during set-up, nothing
        self.backend = None  # of exchanges between devices, if there are any
        self.stop_asked_at = None  # by time.monotonic
        self.store = None
        self._lookout = Lookout(self.rank)
        self._wait_for_announcements = None  # see `announce`

    def connect(self) -> "Cluster":
        """Meets the others in the store, so that who does not come can be named, then in gloo."""
        self._lookout.start()
        if self.size > 1:
            store = self._reach_store()
            # A connection for gloo, and one for us: while one waits, nobody else can use it.
            self.store = self._lookout.store = self._own_keys(store.clone())
            self._meet(self._own_keys(store))
        return self

    def _reach_store(self):
        try:
            return next(rendezvous("env://", timeout=self.timeout))[0]
        except RuntimeError:
            raise LakeError("the store of this job is not reached") from None

    @staticmethod
    def _own_keys(store):
        """After a restart torchrun's store may still have the keys of the run before."""
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"attempt {restarts}", store)

    def _meet(self, store):
        deadline = time.monotonic() + self.timeout.total_seconds()
        here = self.guard(self.store.add, "here", 1)
        while here < self.size:
            if time.monotonic() > deadline:
                raise self.give_up("not all ranks have come")
            self._look_up()
            time.sleep(0.05)
            here = self.guard(self.store.add, "here", 0)
        self._patiently(
            dist.init_process_group,
            "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=self.timeout,
        )

    def ask_stop(self):
        """Asks all ranks to stop at the next iteration."""
        self.stop_asked_at = self.stop_asked_at or time.monotonic()

    def choose_device(self, wanted):
        """This rank's device from now on, for `auto`, `cpu` or `cuda`, and its memory in bytes: a
        CPU's whole memory, what is free of a GPU's. Ranks take a machine's GPUs in turn. Raises
        ValueError when there is none."""
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: no CUDA device is visible; cpu or auto is expected"
            )
        if wanted != "cpu" and torch.cuda.is_available():
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            return device, torch.cuda.mem_get_info(device)[0]
        return torch.device("cpu"), os.sysconf("SC_PHYS_PAGES") * os.sysconf(
            "SC_PAGE_SIZE"
        )

    def ranks_per_device(self, device) -> int:
        """How many ranks share a device of this machine."""
        devices = torch.cuda.device_count() if device.type == "cuda" else 1
        return -(-self.local_size // devices)

    # ── collectives ──

    def gather_objects(self, mine) -> list:
        """Every rank's (picklable) object, by rank. Slow; for set-up and reports."""
        mine = pickled(mine)
        lengths = [length for (length,) in self.gather_integers([len(mine)])]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(mine)] = mine
        rows = self._begin_gather(padded)().numpy()
        return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, lengths)]

    def from_rank_0(self, mine):
        """Rank 0's (picklable) object, on every rank."""
        mine = pickled(mine)
        length = self.gather_integers([len(mine)])[0][0]
        first = mine if self.rank == 0 else torch.zeros(length, dtype=torch.uint8)
        if self.size > 1:
            self.wait(self.guard(dist.broadcast, first, 0, async_op=True))
        return pickle.loads(first.numpy().tobytes())

    def together(self, step, *arguments):
        """`step(*arguments)` on every rank. If any fails by a user's mistake, a ValueError, raises
        SetupError on all, with the message of the lowest such rank. If one fails otherwise, that
        rank raises its own error, and the others LakeError."""
        result = problem = None
        try:
            result = step(*arguments)
        except Exception as caught:
            problem = caught
        mistake = isinstance(problem, ValueError)
        mine = problem and (mistake, str(problem) or repr(problem))
        problems = list(filter(None, self.gather_objects(mine)))
        if problem and not mistake:
            raise problem
        for is_mistake, text in sorted(problems, key=lambda each: each[0]):
            raise SetupError(text) if is_mistake else LakeError(text)
        return result

    def require_same(self, text, what):
        """Raises ValueError unless all have the same text: machines have other files, defaults."""
        digest = hashlib.blake2b(text.encode("utf-8", "replace")).digest()
        digests = self.gather_objects(digest)
        if odd := [rank for rank in range(self.size) if digests[rank] != digests[0]]:
            said = f"rank {odd[0]} has other {what} than rank 0; the same is expected"
            raise ValueError(said)

    def gather_integers(self, values: list[int]) -> list:
        """Every rank's integers: [size][len(values)]."""
        return self.gather_and_time(values, now=lambda: 0)[1]

    def gather_and_time(self, values: list[int], now) -> tuple[int, list]:
        """What rank 0's clock, `now()`, says when it has all, and every rank's integers. They go
        through rank 0: a gather and a broadcast take gloo a third of an all-gather's time."""
        length = len(values)
        mine = torch.tensor(values, dtype=torch.int64)
        message = torch.zeros(1 + self.size * length, dtype=torch.int64)
        rows = message[1:].view(self.size, length)
        rows[self.rank] = mine
        if self.size > 1 and length:  # gloo gathers nothing only by mistake
            gathered = list(rows) if self.rank == 0 else None
            self.wait(self.guard(dist.gather, mine, gathered, async_op=True))
        if self.rank == 0:
            message[0] = now()
        if self.size > 1:
            self.wait(self.guard(dist.broadcast, message, 0, async_op=True))
        return int(message[0]), rows.tolist()

    def _begin_gather(self, mine) -> Callable:
        """Every rank's tensor, of the same shape: returns a function that waits for [size, …]."""
        gathered = mine.repeat(self.size, *[1] * mine.ndim)
        if self.size == 1:
            return lambda: gathered
        work = self.guard(dist.all_gather, [*gathered], mine, async_op=True)

        def wait():
            self.wait(work)
            return gathered

        return wait

    def announce(self, digest: bytes, fault=False):
        """Sends the digest of this rank's next plan, and its flags; `confirm` waits for all."""
        self._require_parent()
        stop = self.stop_asked_at is not None
        mine = Announcement(*np.frombuffer(digest, "<i8").tolist(), stop, fault)
        mine = torch.tensor(mine, dtype=torch.int64)
        self._wait_for_announcements = self._begin_gather(mine)

    def confirm(self):
        """Before the first exchange of data: raises LakeError on every rank if one could not plan
        or planned otherwise (collectives whose splits disagree end the process in C++), Stopped if
        a rank was asked to stop. Called in every layer; only the first call waits."""
        if self._wait_for_announcements is None:
            return
        rows = self._wait_for_announcements().tolist()
        self._wait_for_announcements = None
        announcements = [Announcement(*row) for row in rows]
        if faults := [rank for rank, said in enumerate(announcements) if said.fault]:
            raise self.problem(f"planning failed on {rank_list(faults)}")
        digests = [(said.digest_head, said.digest_tail) for said in announcements]
        if odd := [rank for rank in range(self.size) if digests[rank] != digests[0]]:
            whose = "the plan of" if len(odd) == 1 else "the plans of"
            differ = "differs" if len(odd) == 1 else "differ"
            raise self.problem(f"{whose} {rank_list(odd)} {differ} from that of rank 0")
        if any(said.stop for said in announcements):
            raise self.problem("stopped by a signal", Stopped)

    def problem(self, text, kind=LakeError) -> LakeError:
        """An error that says what this rank was doing."""
        return kind(f"{self.doing}: {text}" if self.doing else text)

    def new_groups(self, instances: list[int], device, count) -> list:
        """Process groups over a lake's ranks, made by all: NCCL if each has a GPU of its own, else
        gloo. NCCL's are ready at once: else the first exchange would wait for that."""
        alone = device.type == "cuda" and self.ranks_per_device(device) == 1
        backend = self.backend = "nccl" if all(self.gather_objects(alone)) else "gloo"
        make = dist.new_group, instances, self.timeout, backend
        groups = []
        for _ in range(count):
            options = {}
            if backend == "nccl":
                options = dict(pg_options=nccl_options(self.timeout), device_id=device)
            groups.append(self._patiently(*make, **options))
        return groups

    # ── when a rank is lost ──

    def guard(self, call, *arguments, **options):
        """Calls a collective or the store. If that fails, a rank was lost. (NCCL's watchdog ends
        the process instead.)"""
        try:
            return call(*arguments, **options)
        except RuntimeError as error:
            raise self.give_up("an exchange failed", error) from None

    def wait(self, work):
        """Waits for a collective of gloo, and looks up now and then."""
        while True:
            had_ended = work.is_completed()
            try:
                work.wait(timedelta(seconds=LOOK_SECONDS))
                return
            except RuntimeError as error:
                # If it had not ended before, the error may only say that the time is over.
                if had_ended:
                    raise self.give_up("an exchange failed", error) from None
            self._look_up()

    def _patiently(self, call, *arguments, **options):
        """The same for a call that waits in C++, where no signal is heeded: another thread makes
        it, and this one looks up now and then."""
        results = []

        def make():
            try:
                results.append(call(*arguments, **options))
            except Exception as error:
                results.append(error)

        thread = Thread(target=make, daemon=True)
        thread.start()
        thread.join(LOOK_SECONDS)
        while thread.is_alive():
            self._look_up()
            thread.join(LOOK_SECONDS)
        if isinstance(results[0], Exception):
            raise self.give_up("an exchange failed", results[0])
        return results[0]

    def _look_up(self):
        """Raises LakeError if there is nothing to wait for any more."""
        self._require_parent()
        since_stop = time.monotonic() - (self.stop_asked_at or np.inf)
        if since_stop > STOP_SECONDS:
            raise self.give_up("stopped by a signal")
        if self._lookout.given_up:
            raise self.give_up(self._lookout.given_up)

    def _require_parent(self):
        if self._lookout.orphaned():
            raise self.problem("torchrun has ended")

    def give_up(self, reason: str, error=None) -> LakeError:
        """To be raised: tells all ranks that this one cannot go on, hears who answers, and names
        who does not."""
        if self._lookout.orphaned():
            return self.problem("torchrun has ended")
        if self.store is None:
            return self.problem(reason)
        answers = in_time(4 * ANSWER_SECONDS, lambda: self._hear_answers(reason))
        if answers is None:
            return self.problem(f"{reason}; the store of this job is lost")
        reason, silent, busy = answers
        found = []
        if silent:
            found += [f"{rank_list(silent)} {'do' if len(silent) > 1 else 'does'} not answer"]
        if busy:
            found += [f"{rank_list(busy)} {'are' if len(busy) > 1 else 'is'} busy or stuck"]
        if error and not found:
            found = ["all ranks answer", *str(error).splitlines()[:1]]
        return self.problem("; ".join([reason, *found]))

    def _hear_answers(self, reason) -> tuple[str, list[int], list[int]]:
        """Answers, and waits for the others. → Why the first has given up, ranks that do not answer
        at all, and those for which only their `Lookout` does."""
        if not self._has("given up"):
            self.store.set("given up", reason)
        self.store.set(f"answer/{self.rank}", "")
        missing = list(range(self.size))
        since = time.monotonic()
        while missing and time.monotonic() - since < ANSWER_SECONDS:
            still = [rank for rank in missing if not self._has(f"answer/{rank}")]
            if len(still) < len(missing):
                since = time.monotonic()
            missing = still
            time.sleep(0.05)
        busy = [rank for rank in missing if self._has(f"alive/{rank}")]
        silent = [rank for rank in missing if rank not in busy]
        return self.store.get("given up").decode(), silent, busy

    def _has(self, key) -> bool:
        return self.store.check([key])

    def speaks(self) -> bool:
        """True on the first rank that asks: it prints what went wrong. Rank 0 comes first if it
        can: it has the progress bar, and knows what could not be written. If the store is lost, one
        on each machine speaks."""
        if self.size == 1:
            return True
        if self.rank:
            time.sleep(0.5)
        number = None
        if self.store and not self._lookout.orphaned():  # torchrun has the store
            number = in_time(ANSWER_SECONDS, lambda: self.store.add("spoken", 1))
        return self.local_rank == 0 if number is None else number == 1

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    print(__doc__)
