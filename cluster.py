"""The ranks of a job: what do they say to each other, and what if one is lost?

Ranks plan alike and step together (tokenlake.py, pool.py), so little has to be said. All of it is
small integers, over gloo on the CPU:

    set-up                 `together`: a step that fails on one rank fails on all, with one message
    before an iteration    `announce`, `confirm`: a digest of the plan; is it the same on all?
    after it               `gather_and_time`: the tokens of all, and rank 0's clock when it has them

Who was lost? A rank that can't go on says so in the job's store, and all that wait for an exchange
look there now and then: so each that is alive comes to `Cluster.lost`, and answers. Who does not is
named. A dead process doesn't, nor one that is stopped or stuck; one that torchrun ends because of
another still does. All then leave: what was cached is lost, what was finished is not (results.py).
"""

import hashlib
import os
import pickle
import time
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# Seconds between two looks of a waiting rank: was there a signal, has another rank given up?
LOOK = 1.0
# After a signal an iteration has so long to end. (torchrun kills its ranks after 30 s.)
TO_STOP = 10.0
# Ranks that answer do it soon: if none has for so long, the others do not.
TO_ANSWER = 3.0
# Stands for a plan's digest when there is nothing more to plan.
THE_END = hashlib.blake2b(b"the end", digest_size=16).digest()


class SetupError(ValueError):
    """A rank's error during set-up, on every rank."""


class LakeError(RuntimeError):
    """The lake cannot go on, or is misused: one line that says why."""


class Stopped(LakeError):
    """A rank was asked to stop (a signal); all stop at the same iteration."""


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
        self.iteration = 0
        self.stop_asked = None  # when, by time.monotonic
        self.store = None
        self._announced = None  # waits for what all ranks say, see `announce`
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._orphan = False

    def connect(self) -> "Cluster":
        """Meets the others in the store, so that who does not come can be named, then in gloo."""
        if self._parent:
            Thread(target=self._leave_with_parent, daemon=True).start()
        if self.size == 1:
            return self
        try:
            store, _, _ = next(rendezvous("env://", timeout=self.timeout))
        except RuntimeError:
            raise LakeError("the store of this job is not reached") from None
        # After a restart torchrun's store may still have the keys of the run before.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"attempt {restarts}", store)
        deadline = time.monotonic() + self.timeout.total_seconds()
        here = self.guard(self.store.add, "here", 1)
        while here < self.size:
            if time.monotonic() > deadline:
                raise self.lost("not all ranks are here")
            self._look_up()
            time.sleep(0.05)
            here = self.guard(self.store.add, "here", 0)
        self.guard(
            dist.init_process_group,
            "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=self.timeout,
        )
        return self

    def ask_stop(self):
        """Asks all ranks to stop at the next iteration."""
        self.stop_asked = self.stop_asked or time.monotonic()

    def find_device(self, wanted):
        """This rank's device for `auto`, `cpu` or `cuda`, and its memory in bytes: a CPU's whole
        memory, what is free of a GPU's. Ranks take a machine's GPUs in turn. Raises ValueError when
        there is none."""
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
        mine = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        lengths = [length for (length,) in self.gather_integers([len(mine)])]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(mine)] = mine
        pickled = self._begin_gather(padded)().numpy()
        return [pickle.loads(row[:n].tobytes()) for row, n in zip(pickled, lengths)]

    def together(self, step, *arguments):
        """`step(*arguments)` on every rank. If any fails, raises SetupError on all, with the
        message of the lowest that failed. A rank whose own error is no ValueError (so no user's
        mistake) raises that instead."""
        result = problem = None
        try:
            result = step(*arguments)
        except Exception as caught:
            problem = caught
        said = self.gather_objects(problem and (str(problem) or repr(problem)))
        if problem and not isinstance(problem, ValueError):
            raise problem
        if errors := [text for text in said if text]:
            raise SetupError(errors[0])
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
        return self.gather_and_time(values, lambda: 0)[1]

    def gather_and_time(self, values: list[int], clock) -> tuple[int, list]:
        """What rank 0's clock says when it has all, and every rank's integers. They go through rank
        0: a gather and a broadcast take gloo a third of the time of an all-gather."""
        length = len(values)
        mine = torch.tensor(values, dtype=torch.int64)
        message = torch.zeros(1 + self.size * length, dtype=torch.int64)
        rows = message[1:].view(self.size, length)
        rows[self.rank] = mine
        if self.size > 1 and length:
            gathered = list(rows) if self.rank == 0 else None
            self.wait(self.guard(dist.gather, mine, gathered, async_op=True))
        if self.rank == 0:
            message[0] = clock()
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
        self.iteration += 1
        self.doing = f"iteration {self.iteration}"
        stop = self.stop_asked is not None
        mine = Announcement(*np.frombuffer(digest, "<i8").tolist(), stop, fault)
        self._announced = self._begin_gather(torch.tensor(mine, dtype=torch.int64))

    def confirm(self):
        """Before the first exchange of data: raises LakeError on every rank if the plans differ
        (collectives whose splits disagree end the process in C++), Stopped if a rank was asked to
        stop. Called in every layer; only the first call waits."""
        if self._announced is None:
            return
        all_said = [Announcement(*values) for values in self._announced().tolist()]
        self._announced = None
        if faults := [str(rank) for rank, said in enumerate(all_said) if said.fault]:
            said = f"planning failed on rank {', '.join(faults)}"
            raise LakeError(self._where() + said)
        digests = [(said.digest_head, said.digest_tail) for said in all_said]
        if odd := [
            str(rank) for rank, digest in enumerate(digests) if digest != digests[0]
        ]:
            said = f"the plan of rank {', '.join(odd)} differs from that of rank 0"
            raise LakeError(self._where() + said)
        if any(said.stop for said in all_said):
            raise Stopped(self._where() + "stopped by a signal")

    def new_groups(self, instances: list[int], device, count) -> list:
        """Process groups over a lake's ranks, made by all: NCCL if each has a GPU of its own, else
        gloo."""
        alone = device.type == "cuda" and self.ranks_per_device(device) == 1
        backend = "nccl" if all(self.gather_objects(alone)) else "gloo"
        make = dist.new_group, instances, self.timeout, backend
        return [self.guard(*make) for _ in range(count)]

    # ── when a rank is lost ──

    def guard(self, collective, *arguments, **options):
        """Calls a collective. If it fails, a rank was lost. (NCCL's watchdog ends the process
        instead.)"""
        try:
            return collective(*arguments, **options)
        except RuntimeError as error:
            raise self.lost("an exchange failed", error) from None

    def wait(self, work):
        """Waits for a collective of gloo, and looks up now and then."""
        while True:
            over = work.is_completed()
            try:
                work.wait(timedelta(seconds=LOOK))
                return
            except RuntimeError as error:
                # If it was not over, only the time of this wait may be.
                if over:
                    raise self.lost("an exchange failed", error) from None
            self._look_up()

    def _look_up(self):
        """Raises LakeError if there is nothing to wait for any more."""
        self._require_parent()
        since_stop = time.monotonic() - (self.stop_asked or np.inf)
        if since_stop > TO_STOP:
            raise self.lost("stopped by a signal")
        if self.guard(self.store.check, ["given up"]):
            raise self.lost("an exchange failed")

    def _require_parent(self):
        if self._parent and os.getppid() != self._parent:
            self._orphan = True
            raise LakeError(self._where() + "torchrun has ended")

    def lost(self, reason: str, error=None) -> LakeError:
        """What to raise when ranks can't go on together, naming those that do not answer."""
        self._require_parent()
        said = [self._where() + reason]
        detail = str(error).splitlines()[:1]
        try:
            silent = self._silent_ranks()
        except RuntimeError:
            said += ["nobody knows which rank was lost: the store is lost, too"]
        else:
            if silent:
                said += [f"rank {', '.join(map(str, silent))} does not answer"]
            elif error:
                said += ["all ranks answer", *detail]
        return LakeError("; ".join(said))

    def _where(self) -> str:
        return self.doing and f"{self.doing}: "

    def _silent_ranks(self) -> list[int]:
        """Answers, and waits for the answers of the others."""
        if self.store is None:
            return []
        self.store.set_timeout(timedelta(seconds=TO_ANSWER))
        self.store.set("given up", "")
        self.store.set(f"answer/{self.rank}", "")
        silent = list(range(self.size))
        since = time.monotonic()
        while silent and time.monotonic() - since < TO_ANSWER:
            missing = [r for r in silent if not self.store.check([f"answer/{r}"])]
            if len(missing) < len(silent):
                since = time.monotonic()
            silent = missing
            time.sleep(0.05)
        return silent

    def _leave_with_parent(self):
        """No rank outlives torchrun. This is for one that is stuck: others see it themselves."""
        while os.getppid() == self._parent:
            time.sleep(LOOK)
        time.sleep(TO_STOP)
        os._exit(1)

    def speaks(self) -> bool:
        """True on the first rank that asks: it prints what went wrong. If the store is lost, on the
        first of each machine. Rank 0 comes first if it can: it has the progress bar, and knows what
        could not be written."""
        if self.store is None:
            return True
        if self.rank:
            time.sleep(0.5)
        with suppress(RuntimeError):
            if not self._orphan:  # torchrun has the store
                return self.store.add("spoken", 1) == 1
        return self.local_rank == 0

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()
