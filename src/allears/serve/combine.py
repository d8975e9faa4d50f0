"""Hops of many sessions, worked on together where several wait."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Job = TypeVar("Job")
Made = TypeVar("Made")


class _Ticket(Generic[Job, Made]):
    def __init__(self, job: Job) -> None:
        self.job = job
        self.made: Made | None = None
        self.error: BaseException | None = None
        self.taken = False
        self.done = threading.Event()


class Combiner(Generic[Job, Made]):
    """Called from many threads, each with a job of its own; runs the jobs that wait in groups.

    A thread that gets one of the seats works on whatever waits, up to ``most`` jobs, until its own is among them. So
    one job that comes alone waits for nobody, and the more come the larger the groups.

    Args:
        run: works on a group: as many results as jobs, in their order.
        seats: groups at a time.
        most: jobs of a group.
    """

    def __init__(self, run: Callable[[Sequence[Job]], Sequence[Made]], seats: int, most: int) -> None:
        self._run, self._most = run, most
        self._seats = threading.Semaphore(seats)
        self._lock = threading.Lock()
        self._waiting: deque[_Ticket[Job, Made]] = deque()

    def __call__(self, job: Job) -> Made:
        """The job's result; an error of ``run`` goes to the one whose job it came from."""
        ticket: _Ticket[Job, Made] = _Ticket(job)
        with self._lock:
            self._waiting.append(ticket)
        with self._seats:
            while not ticket.taken:
                self._work(self._next())
        ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error
        assert ticket.made is not None
        return ticket.made

    def _next(self) -> list[_Ticket[Job, Made]]:
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            for ticket in taken:
                ticket.taken = True
        return taken

    def _work(self, tickets: list[_Ticket[Job, Made]]) -> None:
        try:
            for ticket, made in zip(tickets, self._run([ticket.job for ticket in tickets]), strict=True):
                ticket.made = made
        except BaseException as error:
            if len(tickets) == 1:
                tickets[0].error = error
            else:  # one of them: the others get theirs
                for ticket in tickets:
                    ticket.made = None
                    self._work([ticket])
        finally:
            for ticket in tickets:
                ticket.done.set()
