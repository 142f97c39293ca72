"""Work with limits that can be cancelled: cancellable threads, and sandboxed worker processes."""

from aria.workers.pool import LocalJob, NotReady, Workers, retry_until_ready
from aria.workers.process import BusyError, WorkerError

__all__ = ["BusyError", "LocalJob", "NotReady", "WorkerError", "Workers", "retry_until_ready"]
