"""The processes of a launch talk through torch's store alone: it works where gloo or NCCL do not, and no wait is endless."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from vae_dist.config import InputError
from vae_dist.distributed import in_words

T = TypeVar("T")

_GRACE = 5.0  # seconds on top of what an answer may take
_PINGS = 10  # round trips to compare two clocks
_SAID = 400  # characters of an error; gloo's name the address in the first line, then the call stack


class Fault(Exception):
    """What keeps a job from running, and what to do about it, in words. All ranks raise it together."""


class MeetingOver(Fault):
    """Some ranks do not answer: no more questions."""


class Abandoned(MeetingOver):
    """Rank zero does not answer, or never did: each rank must tell for itself."""


class Meeting:
    """All ranks, and questions that each answers. All ranks ask the same questions in the same order."""

    def __init__(self, patience: float) -> None:
        """`patience`: seconds an answer may take. Raises Abandoned where rank zero cannot be reached."""
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.patience = patience
        self.hosts = [""] * self.size  # of each rank, once `call_the_roll` knows
        self._questions = 0
        self._worker, self._is_stuck = ThreadPoolExecutor(1), False
        self._store = self._reach() if self.size > 1 else None
        if self._store is not None and self._store.add(f"is there a {self.rank}", 1) > 1:
            raise Abandoned(f"{self.size} processes are meant, but two of them are rank {self.rank}: give each its own RANK")

    def _reach(self) -> dist.PrefixStore:  # type: ignore[name-defined]  # torch's stubs lack it
        """The store, which lies with rank zero or, of torchrun, with the launcher on its machine."""
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not address or not port.isdecimal() or not self.rank < self.size:
            given = " ".join(f"{name}={os.environ.get(name, '')}" for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
            raise Abandoned(f"{self.size} processes are meant by WORLD_SIZE, which does not fit {given}: use a launcher")
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        seconds = timedelta(seconds=self.patience / 2)  # torch tries twice
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address, int(port), None, self.rank == 0 and not by_agent, seconds, False, multi_tenant=True
            )
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):
                raise Abandoned(f"port {port} is taken: another job runs here; set another MASTER_PORT") from None
            raise Abandoned(
                f"rank {self.rank} on {socket.gethostname()} cannot reach rank zero at {address}:{port} within "
                f"{self.patience:.0f} s: is rank zero started, is MASTER_ADDR its address, and does its firewall let this port "
                "through?"
            ) from None
        return dist.PrefixStore(f"meeting {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]

    def call_the_roll(self) -> float:
        """The seconds until all had come. Raises MeetingOver where they do not."""
        begin = time.monotonic()
        self.hosts = self.ask(socket.gethostname)
        return time.monotonic() - begin

    def ask(self, action: Callable[[], T], remedy: str = "") -> list[T]:
        """What `action` returns on each rank, as JSON gives it back.

        Raises Fault, with the remedy, where it fails on any or takes too long.
        """
        answers = self._exchange(self.attempt(action))
        if errors := {rank: answer["error"] for rank, answer in enumerate(answers) if "error" in answer}:
            raise Fault(self.told(errors) + (f"; {remedy}" if remedy else ""))
        return [answer["value"] for answer in answers]

    def ask_first(self, action: Callable[[], T]) -> T:
        """As `ask`, of rank zero alone."""
        values: list[T | None] = self.ask(lambda: action() if self.rank == 0 else None)
        return values[0]  # type: ignore[return-value]  # rank zero's is what `action` returned

    def attempt(self, action: Callable[[], object]) -> dict[str, Any]:
        """What comes of an action here alone. In a thread: a file system or a collective may hang, and somebody must tell."""
        future = self._worker.submit(action)
        try:
            return {"value": future.result(self.patience)}
        except Exception as error:  # whatever it is: it is what was asked for
            if not future.done():
                self._worker, self._is_stuck = ThreadPoolExecutor(1), True  # the other may never come back
                return {"error": f"no answer within {self.patience:.0f} s"}
            said = in_words(error) if isinstance(error, (InputError, OSError)) else f"{type(error).__name__}: {error}"
            return {"error": " ".join(said.split("Exception raised from")[0].split())[:_SAID]}

    def _exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank has to say. Raises MeetingOver, naming them, where some say nothing."""
        if self._store is None:
            return [json.loads(json.dumps(mine))]
        self._questions += 1
        keys = [f"{self._questions} of {rank}" for rank in range(self.size)]
        everything = f"{self._questions} of all"
        limit = self.patience + _GRACE
        try:
            self._store.set(keys[self.rank], json.dumps(mine))
            if self.rank == 0:
                silent = self._silent(keys, limit)
                answers = [] if silent else [json.loads(answer) for answer in self._store.multi_get(keys)]
                self._store.set(everything, json.dumps([silent, answers]))
            self._store.wait([everything], timedelta(seconds=2 * limit))  # rank zero may begin to wait that much later
            silent, answers = json.loads(self._store.get(everything))
        except dist.DistError:
            raise Abandoned(f"rank 0, or the launcher beside it, gave {self.named([self.rank])} no answer any more") from None
        if silent:
            did = "came" if self._questions == 1 else "answered"
            count = f"{self.size - len(silent)} of {self.size} processes"
            raise MeetingOver(f"{count} {did} within {limit:.0f} s; {self.named(silent)} did not")
        return list(answers)

    def _silent(self, keys: list[str], limit: float) -> list[int]:
        assert self._store is not None
        with contextlib.suppress(dist.DistStoreError):
            self._store.wait(keys, timedelta(seconds=limit))
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def clock_ahead(self) -> float:
        """Seconds by which this rank's clock is ahead of rank zero's. All ranks call it at once.

        Of several round trips the quickest is believed (Cristian 1989).
        """
        if self._store is None:
            return 0.0
        limit = timedelta(seconds=self.patience)
        trips = []
        for other in range(1, self.size) if self.rank == 0 else [self.rank]:
            for number in range(_PINGS):
                ping, pong = f"ping {number} of {other}", f"pong {number} of {other}"
                if self.rank == 0:
                    self._store.wait([ping], limit)
                    self._store.set(pong, repr(time.time()))
                else:
                    begin = time.time()
                    self._store.set(ping, "")
                    self._store.wait([pong], limit)
                    there, end = float(self._store.get(pong)), time.time()
                    trips.append((end - begin, (begin + end) / 2 - there))
        return min(trips)[1] if trips else 0.0

    def named(self, ranks: Iterable[int]) -> str:
        """For example `rank 1 on node2`, or `ranks 0-3 on node1, ranks 4-7 on node2`."""
        words, run = [], list[int]()
        ordered = sorted(ranks)
        for rank, following in zip(ordered, [*ordered[1:], -1], strict=True):
            run.append(rank)
            if following != rank + 1 or self.hosts[following] != self.hosts[rank]:
                where = f" on {self.hosts[rank]}" if self.hosts[rank] else ""
                words.append((f"rank {rank}" if len(run) == 1 else f"ranks {run[0]}-{rank}") + where)
                run = []
        return ", ".join(words)

    def told(self, words: Mapping[int, str]) -> str:
        """What some ranks say, each thing once, and who says it where not all do."""
        speakers: dict[str, list[int]] = {}
        for rank, said in words.items():
            speakers.setdefault(said, []).append(rank)
        named = {said: "" if len(ranks) == self.size else f"{self.named(ranks)}: " for said, ranks in speakers.items()}
        return "; ".join(f"{who}{said}" for said, who in named.items())

    def leave(self, status: int) -> None:
        """Ends this process, where there are several or something hangs.

        Rank zero may hold the store: it is the last to go. The others wait until it has spoken, as a launcher ends all with
        the first that fails.
        """
        if self._store is None and not self._is_stuck:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        if self._store is not None:
            others, limit = [f"{rank} leaves" for rank in range(1, self.size)], timedelta(seconds=_GRACE)
            with contextlib.suppress(dist.DistError):
                if self.rank == 0:
                    self._store.set("all is said", "")
                    self._store.wait(others, limit)
                else:
                    self._store.wait(["all is said"], limit)
                    self._store.set(f"{self.rank} leaves", "")
        os._exit(status)
