"""Long lists of work on the engine, written down record by record: a job that was killed goes on where it was."""

from aria.jobs.describe import Describer, MediaFile, find_media
from aria.jobs.journal import Journal, Stream
from aria.jobs.runner import Job, Tally, Work

__all__ = ["Describer", "Job", "Journal", "MediaFile", "Stream", "Tally", "Work", "find_media"]
