"""`AriaProcessor`: converts messages or prompts with media to model inputs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aria.config import CONFIG_NAME
from aria.hub import resolve, write_json
from aria.media.budgets import PixelBudget
from aria.media.cache import MediaCache
from aria.media.limits import MediaSettings
from aria.media.read import load_image, shared_workers
from aria.processor.batch import BatchFeature, check_tensor_kind
from aria.processor.chat import END_OF_TURN, IMAGE_TOKEN, Conversation, ImagePart, MediaPart, Prompt, VideoPart
from aria.processor.expand import expand, resolve_defaults
from aria.processor.files import (
    CHAT_TEMPLATE_FILE,
    PREPROCESSOR_CONFIG,
    PROCESSOR_CONFIG,
    SIZE_CONVERSION,
    TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
    read_size_conversion,
)
from aria.processor.image import AriaImageProcessor, NeededSizes, flatten_images, require_rgb
from aria.processor.image_inputs import ImageSpan, Medium, Prepared, read_image_inputs
from aria.processor.options import TextOptions, merge_options
from aria.processor.tokenizer import AriaTokenizer, check_length, check_sanitized
from aria.workers import Workers

_PIXELS = ("pixel_values", "pixel_mask")


class AriaProcessor:
    """Tokenizer and image processor combined.

    Each image slot ``<|img|>`` in a prompt becomes one image id per query token of each of its crops. The crops of all
    images, in the order of the slots, are ``pixel_values``. Clips and documents are expanded to images first
    (:mod:`aria.processor.expand`).

    Attributes:
        tokenizer: The :class:`AriaTokenizer`.
        image_processor: The :class:`AriaImageProcessor`.
        size_conversion: Side of a crop in pixels -> tokens per crop.
        media: Limits and permissions for media, a :class:`~aria.media.limits.MediaSettings`; may be replaced.
    """

    def __init__(
        self,
        image_processor: AriaImageProcessor,
        tokenizer: AriaTokenizer,
        chat_template: str | None = None,
        *,
        size_conversion: Mapping[int, int] | None = None,
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        if chat_template is not None:
            self.chat_template = chat_template
        self.media = MediaSettings()
        self._media_cache = MediaCache()
        table = SIZE_CONVERSION if size_conversion is None else size_conversion
        self.size_conversion = {int(size): int(tokens) for size, tokens in table.items()}
        if set(self.size_conversion) != set(image_processor.sizes):
            raise ValueError(
                f"size_conversion has the sizes {sorted(self.size_conversion)}, but the image processor has "
                f"{list(image_processor.sizes)}"
            )

    @property
    def image_token(self) -> str:
        return self.tokenizer.image_token

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.image_token_id

    @property
    def chat_template(self) -> str:
        """The chat template of the tokenizer; may be replaced."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.tokenizer.chat_template = template

    @property
    def workers(self) -> Workers | None:
        """The worker processes of ``media``, which also render chat templates; None: this process."""
        return shared_workers(self.media)

    @property
    def model_input_names(self) -> list[str]:
        """Names of all possible model inputs."""
        return ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool | None = None,
        use_fast: bool | None = None,
    ) -> AriaProcessor:
        """Load a processor from a folder, a Hub repository, or (None) the packaged nano model.

        Args:
            path_or_repo_id: Folder, Hub repository, or None for the packaged nano model.
            revision: Branch, tag or commit of a Hub repository.
            chat_template: A Jinja template to use instead of that of the files.
            trust_remote_code, use_fast: Accepted for compatibility with transformers, without effect: remote code is
                never run, and there is one tokenizer.

        Raises:
            FileNotFoundError: No such folder or repository, or a file is missing.
            ValueError: A file is damaged or not Aria's.
        """
        patterns = [
            PREPROCESSOR_CONFIG,
            PROCESSOR_CONFIG,
            TOKENIZER_MODEL,
            TOKENIZER_CONFIG,
            CHAT_TEMPLATE_FILE,
            CONFIG_NAME,
        ]
        folder = resolve(path_or_repo_id, revision=revision, allow_patterns=patterns)
        return cls(
            AriaImageProcessor.from_pretrained(folder),
            AriaTokenizer.from_pretrained(folder),
            chat_template=chat_template,
            size_conversion=read_size_conversion(folder),
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.model, tokenizer_config.json, preprocessor_config.json and processor_config.json."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        table = {str(size): tokens for size, tokens in self.size_conversion.items()}
        write_json(Path(folder) / PROCESSOR_CONFIG, {"processor_class": "AriaProcessor", "size_conversion": table})

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        videos: Any = None,
        max_image_size: int | None = None,
        split_image: bool | None = None,
        split_mode: str | None = None,
        do_convert_rgb: bool | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool | None = None,
        return_tensors: str | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchFeature:
        """Prepare one prompt or several with their images.

        Args:
            text: A prompt or a list of prompts. In a plain string every ``<|img|>`` is an image slot (or a video slot,
                if only videos are given). In a :class:`~aria.processor.chat.Prompt`, from ``apply_chat_template``, only
                those of media parts are slots, each for its kind. Likewise ``<|im_end|>`` and the other markers are
                always control tokens in a plain string, but in a prompt only where the template wrote them. None:
                images only.
            images: One image, a list in the order of the slots, or a list of lists, one per prompt. They fill all
                slots, or only those without a source in the messages. A four-dimensional array counts as a list.
            videos: The same for clips: paths, bytes, data: URIs or addresses.
            max_image_size: Side of all crops; None: from the parts or the settings of the image processor, and the
                smallest size for clips alone. All images of a call share one size, because their crops are one tensor.
            split_image: Whether to split images into crops; None: as above. May differ between images.
            split_mode: "authors" (overview first) or "pad" (as in transformers).
            do_convert_rgb: False rejects images in memory that are not RGB.
            padding: True or "longest", "max_length", or False.
            padding_side: "left" or "right"; None: ``padding_side`` of the tokenizer, which is "left".
            truncation: Truncate prompts on the right to ``max_length``. Truncating images is an error.
            max_length: For truncation and ``padding="max_length"``.
            add_special_tokens: No effect: Aria's tokenizer adds none.
            return_tensors: "pt" (also "pd"), "np", or None: ids as lists, pixels as torch tensors.
            text_kwargs, images_kwargs, common_kwargs: The same arguments in groups, as in transformers.
                ``images_kwargs`` may have any setting of :meth:`AriaImageProcessor.from_dict`.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, S) int64; with images also ``pixel_values`` (C, 3, S, S) float32
            and ``pixel_mask`` (C, S, S) bool. The attribute ``num_crops`` has the number of crops of each image.

        Raises:
            ValueError: Numbers of slots and images differ, sizes differ, truncation would cut an image, or an argument
                is given twice.
            TypeError: A group has an unknown argument.
        """
        flat_text = {
            "padding": padding,
            "padding_side": padding_side,
            "truncation": truncation,
            "max_length": max_length,
            "add_special_tokens": add_special_tokens,
            "return_tensors": return_tensors,
        }
        flat_images = {
            "max_image_size": max_image_size,
            "split_image": split_image,
            "split_mode": split_mode,
            "do_convert_rgb": do_convert_rgb,
        }
        flat_text = merge_options("common_kwargs", flat_text, common_kwargs)
        text_options = TextOptions.from_mapping(merge_options("text_kwargs", flat_text, text_kwargs))
        image_options = merge_options("images_kwargs", flat_images, images_kwargs)
        return self._prepared(text, images, videos, text_options, image_options)

    def _prepared(
        self, text: Any, images: Any, videos: Any, text_options: TextOptions, image_options: dict[str, Any]
    ) -> BatchFeature:
        check_length(text_options.padding, text_options.truncation, text_options.max_length)
        check_tensor_kind(text_options.return_tensors)
        max_image_size, split_image = image_options.pop("max_image_size", None), image_options.pop("split_image", None)
        kind = text_options.return_tensors or "pt"
        process = self.image_processor.changed(**image_options)
        if text is None and images is not None and videos is None:
            pixels = process(images, max_image_size=max_image_size, split_image=split_image, return_tensors=kind)
            return BatchFeature({key: pixels[key] for key in _PIXELS}, num_crops=pixels.num_crops)
        prompts = _match(_prompts(text, images, videos), images, videos)
        size = self._common_size([part for prompt in prompts for part in prompt.parts], max_image_size)
        prompts = [
            expand(
                resolve_defaults(prompt, process, max_image_size=size, split_image=split_image),
                process,
                self.media,
                self._media_cache,
            ).prompt
            for prompt in prompts
        ]
        parts = [part for prompt in prompts for part in prompt.parts]
        pixels = BatchFeature()
        tokens: list[int] = []
        if parts:
            if not process.do_convert_rgb:
                for part in parts:
                    require_rgb(part.source)
            pixels = process(
                [load_image(part.source, self.media) for part in parts],
                max_image_size=size,
                split_image=[bool(part.split_image) for part in parts],
                return_tensors=kind,
            )
            tokens = [crops * self.size_conversion[size] for crops in pixels.num_crops]
        rows = self._expand(prompts, tokens)
        if text_options.truncation:
            assert text_options.max_length is not None, "checked by check_length"
            rows = [self._truncate(row, text_options.max_length) for row in rows]
        ids = self.tokenizer.pad(
            rows,
            padding=text_options.padding,
            padding_side=text_options.padding_side,
            max_length=text_options.max_length,
            return_tensors=text_options.return_tensors,
        )
        return BatchFeature(
            {**ids, **{key: pixels[key] for key in _PIXELS if key in pixels}}, num_crops=pixels.num_crops
        )

    def apply_chat_template(
        self,
        conversation: Conversation | Sequence[Conversation],
        chat_template: str | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        sanitize_control_tokens: bool | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Convert messages to a prompt, or to model inputs.

        Args:
            conversation: A list of messages (see :func:`aria.processor.chat.render`), or a list of such lists.
            chat_template: A Jinja template instead of Aria's. Markers in messages are text in it too.
            images: Images for image parts without a source.
            videos: Clips for video parts without a source.
            tools: Functions that the model may call, as in OpenAI's API. Aria's template describes them in the system
                message, in the form used by training and the server.
            add_generation_prompt: End with the start of an assistant message.
            continue_final_message: Leave the last message open, to be continued.
            sanitize_control_tokens: May be True, since markers in messages are always text. For the behaviour of
                transformers without it, use ``str(prompt)``.
            tokenize: False returns the :class:`~aria.processor.chat.Prompt` (or a list of them).
            return_dict: With ``tokenize``, return all model inputs; False: only ``input_ids``.
            processor_kwargs: Arguments for calling the processor, which may also be given by name.
            more: Arguments for calling the processor, and variables of ``chat_template``.

        Raises:
            ValueError: As for a call, or a template that cannot be rendered.
        """
        check_sanitized(sanitize_control_tokens)
        options = {name: more.pop(name) for name in list(more) if name in _CALL_OPTIONS}
        prompt = self.tokenizer.render(
            conversation,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=more,
            workers=self.workers,
        )
        if not tokenize:
            return prompt
        inputs = self(prompt, images, videos=videos, **merge_options("processor_kwargs", options, processor_kwargs))
        return inputs if return_dict else inputs["input_ids"]

    def prepare(
        self,
        conversation: Conversation,
        *,
        images: Any = None,
        videos: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        max_image_size: int | None = None,
        split_image: bool | None = None,
        split_mode: str | None = None,
    ) -> Prepared:
        """Convert a conversation to token ids and images for the engine. Images are resized only when encoded.

        Args:
            conversation: A list of messages, see :func:`aria.processor.chat.render`.
            images: Images for image parts without a source.
            videos: Clips for video parts without a source.
            add_generation_prompt: End with the start of an assistant message.
            continue_final_message: Leave the last message open, to be continued; without ``add_generation_prompt``.
            variables: Variables of a chat template other than Aria's.
            max_image_size: Side of the crops of media parts without their own, which may differ here. None: that of the
                image processor for images and documents, the smallest for clips.
            split_image: Whether to split media parts without their own setting into crops.
            split_mode: "authors" or "pad".

        Raises:
            ValueError: As for a call, and for several conversations.
        """
        prompt = self.tokenizer.render(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
            workers=self.workers,
        )
        if not isinstance(prompt, Prompt):
            raise ValueError(f"prepare takes one conversation, a list of messages, but got {len(prompt)} of them")
        [prompt] = _match([prompt], images, videos)
        prompt = resolve_defaults(prompt, self.image_processor, max_image_size=max_image_size, split_image=split_image)
        budget = PixelBudget(self.media.prompt_pixels)

        def cutting(part: MediaPart) -> dict[str, Any]:
            size, split = part.max_image_size, part.split_image
            return {"max_image_size": size, "split_image": split, "split_mode": split_mode}

        prompt, origins = expand(
            prompt, self.image_processor, self.media, self._media_cache, budget,
            lambda part: NeededSizes(self.image_processor, **cutting(part)),
        )  # fmt: skip
        settings = [cutting(part) for part in prompt.parts]
        sources = [part.source for part in prompt.parts]
        images = read_image_inputs(sources, self.image_processor, settings, self.media, budget)
        ids, *rest = self.tokenizer.encode_segments(prompt)
        placed = []
        for image, segment in zip(images, rest, strict=True):
            tokens = len(image.extents) * self.size_conversion[image.size]
            placed.append(ImageSpan(len(ids), tokens, image.key, image))
            ids += [self.tokenizer.image_token_id] * tokens + segment
        inputs = iter(placed)
        media = []
        for kind, count, total in origins:
            own = [next(inputs) for _ in range(count)]
            crops = sum(len(one.data.extents) for one in own)
            media.append(Medium(kind, count, crops, sum(one.tokens for one in own), total))
        return Prepared(ids, placed, media, stop=(END_OF_TURN,))

    def decode(self, ids: Any, skip_special_tokens: bool = False, **more: Any) -> str:
        """Decode token ids, see :meth:`AriaTokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **more)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **more: Any) -> list[str]:
        """Decode several sequences, see :meth:`AriaTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **more)

    def post_process_image_text_to_text(
        self, generated_outputs: Iterable[Any], skip_special_tokens: bool = True, **more: Any
    ) -> list[str]:
        """Decode the output of ``generate``; the name is that of transformers."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **more)

    def _common_size(self, parts: Sequence[MediaPart], max_image_size: int | None) -> int:
        sizes = {size for part in parts if (size := part.max_image_size or max_image_size) is not None}
        others = [part for part in parts if not isinstance(part, VideoPart)]
        if any(part.max_image_size is None for part in others) or not (sizes or parts):
            sizes.add(max_image_size or self.image_processor.max_image_size)
        if not sizes:  # only clips without a size
            sizes.add(self.image_processor.sizes[0])
        if len(sizes) > 1:
            raise ValueError(
                f"images of one call need crops of {' and '.join(map(str, sorted(sizes)))} pixels, but share one "
                "tensor; give all parts the same max_image_size"
            )
        return sizes.pop()

    def _expand(self, prompts: Sequence[Prompt], tokens: Sequence[int]) -> list[list[int]]:
        """Encode each prompt, with as many image ids at each slot as its image has tokens."""
        counts = iter(tokens)
        rows = []
        for prompt in prompts:
            row, *rest = self.tokenizer.encode_segments(prompt)
            for segment in rest:
                row += [self.tokenizer.image_token_id] * next(counts) + segment
            rows.append(row)
        return rows

    def _truncate(self, row: list[int], max_length: int) -> list[int]:
        if self.tokenizer.image_token_id in row[max_length:]:
            end = len(row) - row[::-1].index(self.tokenizer.image_token_id)
            raise ValueError(
                f"truncation to max_length={max_length} would cut an image: the last one ends at token {end} of "
                f"{len(row)}; raise max_length, use a smaller max_image_size, or send fewer images"
            )
        return row[:max_length]


# Arguments of calling the processor. Other arguments of apply_chat_template are variables of the template.
_CALL_OPTIONS = frozenset(inspect.signature(AriaProcessor.__call__).parameters) - {"self", "text", "images", "videos"}


def _prompts(text: Any, images: Any, videos: Any) -> list[Prompt]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(one, str) for one in texts):
        raise ValueError(
            f"text should be a prompt or a list of prompts, but is {text!r:.100}; for images only call .image_processor"
        )
    if videos is None or all(isinstance(one, Prompt) for one in texts):
        return [Prompt.of(one) for one in texts]
    if images is not None:
        raise ValueError(
            f"a plain string does not say which {IMAGE_TOKEN} are images and which are clips; pass the prompt from "
            "apply_chat_template unchanged"
        )
    prompts = [Prompt.of(one) for one in texts]
    return [
        prompt if isinstance(one, Prompt) else prompt.with_parts([VideoPart()] * len(prompt.slots))
        for one, prompt in zip(texts, prompts, strict=True)
    ]


def _match(prompts: Sequence[Prompt], images: Any, videos: Any) -> list[Prompt]:
    """Assign a source to every slot."""
    return _place(_place(prompts, images, ImagePart, "images", "image"), videos, VideoPart, "videos", "clip")


def _place(prompts: Sequence[Prompt], media: Any, kind: type[MediaPart], argument: str, noun: str) -> list[Prompt]:
    if media is None:
        given: list[Any] = []
    elif isinstance(media, list | tuple):
        given = list(media)
    else:
        given = flatten_images(media)
    own = [[part for part in prompt.parts if isinstance(part, kind)] for prompt in prompts]
    if not any(isinstance(one, list | tuple) for one in given):
        sources = iter(_fill([part for some in own for part in some], given, "the prompts have", noun))
    elif not all(isinstance(one, list | tuple) for one in given):
        raise ValueError(f"{argument} should be one {noun}, a list of {noun}s or a list of lists, not a mixture")
    elif len(given) != len(prompts):
        raise ValueError(f"{argument} has {len(given)} lists for {len(prompts)} prompts; give one list per prompt")
    else:
        pairs = enumerate(zip(own, map(flatten_images, given), strict=True))
        sources = iter([one for i, (parts, some) in pairs for one in _fill(parts, some, f"prompt {i} has", noun)])
    return [
        prompt.with_parts(
            [replace(part, source=next(sources)) if isinstance(part, kind) else part for part in prompt.parts]
        )
        for prompt in prompts
    ]


def _fill(parts: Sequence[MediaPart], given: list[Any], subject: str, noun: str) -> list[Any]:
    # Code for transformers names media in messages and passes all of them as well; then those passed are used.
    if len(given) == len(parts):
        return given
    bare = sum(part.source is None for part in parts)
    if len(given) == bare:
        rest = iter(given)
        return [next(rest) if part.source is None else part.source for part in parts]
    named = f" ({len(parts) - bare} of them with a source)" if bare < len(parts) else ""
    raise ValueError(
        f"{subject} {len(parts)} {noun} slots {IMAGE_TOKEN}{named}, but {len(given)} {noun}s were given; each slot "
        "takes one"
    )
