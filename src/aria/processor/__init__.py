"""Convert messages, text and images to model inputs, and token ids back to text."""

from aria.media.limits import MediaSettings
from aria.media.read import load_image
from aria.processor.batch import BatchFeature
from aria.processor.chat import CHAT_TEMPLATE, IMAGE_TOKEN, DocumentPart, ImagePart, Prompt, VideoPart, render
from aria.processor.image import AriaImageProcessor
from aria.processor.processor import AriaProcessor
from aria.processor.tokenizer import AriaTokenizer, TextStream

__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_TOKEN",
    "AriaImageProcessor",
    "AriaProcessor",
    "AriaTokenizer",
    "BatchFeature",
    "DocumentPart",
    "ImagePart",
    "MediaSettings",
    "Prompt",
    "TextStream",
    "VideoPart",
    "load_image",
    "render",
]
