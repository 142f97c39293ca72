"""Training data: conversations, texts and their media, as packed batches."""

from aria.train.data.settings import DataSettings
from aria.train.data.stream import DataStream, Question, make_stream, questions

__all__ = ["DataSettings", "DataStream", "Question", "make_stream", "questions"]
