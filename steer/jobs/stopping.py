"""How a running job is told to stop: by an exception out of its next report of progress.

They are no `Exception`s, like asyncio's cancellation, so that a kind of job which catches what goes
wrong with its data does not catch these.
"""

from __future__ import annotations


class JobStopped(BaseException):
    """The job must not go on."""


class JobCancelled(JobStopped):
    """A client cancelled it."""


class RunnerStopping(JobStopped):
    """The server stops; the job is queued again or ends as interrupted."""


class LeaseLost(JobStopped):
    """This runner was held up for so long that another took the job: nothing may be written."""
