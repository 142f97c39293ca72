"""Work that is limited and can be stopped: threads that notice that nobody waits for them, and child processes."""

from aria.workers.pool import LocalJob, NotReady, Workers, retry_until_ready
from aria.workers.process import BusyError, WorkerError

__all__ = ["BusyError", "LocalJob", "NotReady", "WorkerError", "Workers", "retry_until_ready"]
