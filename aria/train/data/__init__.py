"""Conversations, texts and their media -> packed batches."""

from aria.train.data.settings import DataSettings
from aria.train.data.stream import DataStream, make_stream

__all__ = ["DataSettings", "DataStream", "make_stream"]
