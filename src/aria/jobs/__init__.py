"""Long-running jobs on the engine: each record is on disk before it counts, so that an interrupted job can resume."""

from aria.jobs.describe import Describer, MediaItem, find_media
from aria.jobs.journal import Journal, RecordStream
from aria.jobs.runner import BatchJob, JobCounts, JobTask

__all__ = ["BatchJob", "Describer", "JobCounts", "JobTask", "Journal", "MediaItem", "RecordStream", "find_media"]
