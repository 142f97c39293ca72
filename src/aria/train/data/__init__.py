"""Training data: conversations, texts and their media, as packed batches."""

from aria.train.data.settings import DataSettings
from aria.train.data.stream import DataStream, Question, questions

__all__ = ["DataSettings", "DataStream", "Question", "questions"]
