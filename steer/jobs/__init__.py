"""Long work beside serving: fitting, imports and sweeps as jobs with progress.

A kind of job is a `JobKind`: a name, a model of its parameters and a function. A `JobRunner` takes
jobs from the registry's catalogue and runs them in threads of this process; see docs/jobs.md.
"""

from steer.jobs.kinds.kind import JobContext, JobKind
from steer.jobs.kinds.table import builtin_kinds, hub
from steer.jobs.limits import JobLimits
from steer.jobs.runner import JobRunner

__all__ = ["JobContext", "JobKind", "JobLimits", "JobRunner", "builtin_kinds", "hub"]
