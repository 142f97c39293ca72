"""Messages or prompts, and images, to everything the model takes: `AriaProcessor`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aria.config import CONFIG_NAME
from aria.hub import resolve, write_json
from aria.media.cache import MediaCache
from aria.media.limits import MediaSettings, PixelBudget
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
    """Tokenizer and image processor together.

    Every image's place ``<|img|>`` in a prompt becomes one image id per query token of each of its crops; the crops
    of all images, in the order of the places, are ``pixel_values``. Clips and documents are opened into images
    before (:mod:`aria.processor.expand`).

    Attributes:
        tokenizer: :class:`AriaTokenizer`.
        image_processor: :class:`AriaImageProcessor`.
        size_conversion: side of a crop in pixels -> tokens that stand for it.
        media: :class:`~aria.media.open.MediaSettings`, limits on what is read and where from; may be replaced.
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
                f"size_conversion has tokens for the sizes {sorted(self.size_conversion)}, but the image processor "
                f"makes {list(image_processor.sizes)}"
            )

    @property
    def image_token(self) -> str:
        return self.tokenizer.image_token

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.image_token_id

    @property
    def chat_template(self) -> str:
        """The tokenizer's; may be replaced."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.tokenizer.chat_template = template

    @property
    def workers(self) -> Workers | None:
        """The processes that ``media`` asks for, where the model's chat template runs too; None: this one."""
        return shared_workers(self.media)

    @property
    def model_input_names(self) -> list[str]:
        """Names of all that a call may give."""
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
        """Read the processor's files of a folder, a Hub repository, or (None) the packaged nano model.

        Args:
            path_or_repo_id: folder, Hub repository, or None for the packaged nano model.
            revision: branch, tag or commit of a Hub repository.
            chat_template: a Jinja template in place of the files' own.
            trust_remote_code, use_fast: taken for code written for transformers and without effect: no remote code is
                ever run, and there is one tokenizer.

        Raises:
            FileNotFoundError: no such folder or repository, or a file is missing.
            ValueError: a file is damaged or is not Aria's.
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
        """Write tokenizer.model and three JSON files (tokenizer_, preprocessor_, processor_config), as on the Hub."""
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
            text: a prompt or a list of them. In a plain string every ``<|img|>`` is an image's place (a clip's, if
                only videos are given); in a :class:`~aria.processor.chat.Prompt`, as ``apply_chat_template`` gives,
                only those of image, video and document parts are places, each for its kind. The same holds for
                ``<|im_end|>`` and the other markers: control tokens in a plain string, whoever wrote them, and in a
                prompt only where the template did. None: images alone.
            images: one image, a list in the order of the places, or a list of lists, one a prompt. They fill every
                place; where the messages name some images themselves, it is enough to give the others. An array of
                four axes counts as a list.
            videos: the same for clips: paths, bytes, data: URIs or addresses.
            max_image_size: side of all crops; None: what the parts or the preprocessor's settings say, and the
                smallest size for clips alone. All images of one call share one size, because their crops are one
                tensor.
            split_image: the same, for splitting into crops; this may differ between images.
            split_mode: "authors" (overview first) or "pad" (transformers' rule).
            do_convert_rgb: False refuses images in memory that are not RGB.
            padding: True or "longest", "max_length", or False.
            padding_side: "left" or "right"; None: the tokenizer's ``padding_side``, which is left.
            truncation: cut prompts on the right at ``max_length``; never into or before an image.
            max_length: for truncation and padding="max_length".
            add_special_tokens: without effect: Aria's tokenizer puts none before or after a prompt.
            return_tensors: "pt" (also "pd"), "np", or None: ids as lists, pixels as torch tensors.
            text_kwargs, images_kwargs, common_kwargs: the same arguments in groups, as transformers has them;
                ``images_kwargs`` may hold any setting of :meth:`AriaImageProcessor.from_dict`.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, S) int64; with images also ``pixel_values`` (C, 3, S, S) float32
            and ``pixel_mask`` (C, S, S) bool. ``.num_crops`` has one count an image.

        Raises:
            ValueError: counts of places and images differ, sizes differ, truncation would cut an image, or an
                argument is given twice.
            TypeError: a group has an argument that does not exist.
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
            assert text_options.max_length is not None, "check_length lets no other through"
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
        """Messages to a prompt, or to everything the model takes.

        Args:
            conversation: a list of messages (see :func:`aria.processor.chat.render`), or a list of such lists.
            chat_template: a Jinja template in place of Aria's; what stands in messages is text in it too.
            images: images for image parts that name none.
            videos: clips for video parts that name none.
            tools: functions that the model may call, as OpenAI's API has them; Aria's template names them in the system
                message, in the form that training and the server use.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            sanitize_control_tokens: may be True, because markers in messages are always text here; ``str(prompt)`` is
                tokenised as transformers does it without.
            tokenize: False gives the :class:`~aria.processor.chat.Prompt` (a list of them for several conversations).
            return_dict: with ``tokenize``, the whole of what calling the processor gives; False: ``input_ids`` alone.
            processor_kwargs: arguments of calling the processor; each may also be given by its own name.
            more: arguments of calling the processor, and variables that ``chat_template`` reads.

        Raises:
            ValueError: as for a call, or a template that cannot be rendered.
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
        """One conversation to token ids and images, for the engine: no image is resized before it has to be.

        Args:
            conversation: a list of messages, see :func:`aria.processor.chat.render`.
            images: images for image parts that name none.
            videos: clips for video parts that name none.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, to be continued; without ``add_generation_prompt``.
            variables: what else a chat template other than Aria's reads.
            max_image_size: side of the crops of media whose parts do not say; here sizes may differ. None: the
                preprocessor's for images and documents, the smallest for clips.
            split_image: the same, for splitting into crops.
            split_mode: "authors" or "pad".

        Raises:
            ValueError: as for a call, and for several conversations.
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
        """The tokenizer's ``decode``."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **more)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **more: Any) -> list[str]:
        """The tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **more)

    def post_process_image_text_to_text(
        self, generated_outputs: Iterable[Any], skip_special_tokens: bool = True, **more: Any
    ) -> list[str]:
        """Texts of what ``generate`` gives, as transformers names it."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **more)

    def _common_size(self, parts: Sequence[MediaPart], max_image_size: int | None) -> int:
        sizes = {size for part in parts if (size := part.max_image_size or max_image_size) is not None}
        others = [part for part in parts if not isinstance(part, VideoPart)]
        if any(part.max_image_size is None for part in others) or not (sizes or parts):
            sizes.add(max_image_size or self.image_processor.max_image_size)
        if not sizes:  # clips that do not say; among others they go along with those
            sizes.add(self.image_processor.sizes[0])
        if len(sizes) > 1:
            raise ValueError(
                f"images of one call ask for crops of {' and '.join(map(str, sorted(sizes)))} pixels, but share one "
                "tensor; give all parts the same max_image_size"
            )
        return sizes.pop()

    def _expand(self, prompts: Sequence[Prompt], tokens: Sequence[int]) -> list[list[int]]:
        """Ids of each prompt, with as many image ids at each place as its image has tokens."""
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


# Arguments of calling the processor; what else apply_chat_template is given are variables of the template.
_CALL_OPTIONS = frozenset(inspect.signature(AriaProcessor.__call__).parameters) - {"self", "text", "images", "videos"}


def _prompts(text: Any, images: Any, videos: Any) -> list[Prompt]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(one, str) for one in texts):
        raise ValueError(
            f"text should be a prompt or a list of prompts, but is {text!r:.100}; "
            "for images alone call .image_processor"
        )
    if videos is None or all(isinstance(one, Prompt) for one in texts):
        return [Prompt.of(one) for one in texts]
    if images is not None:
        raise ValueError(
            f"a plain string does not tell which {IMAGE_TOKEN} are images and which are clips; pass what "
            "apply_chat_template gives, unchanged"
        )
    prompts = [Prompt.of(one) for one in texts]
    return [
        prompt if isinstance(one, Prompt) else prompt.with_parts([VideoPart()] * len(prompt.slots))
        for one, prompt in zip(texts, prompts, strict=True)
    ]


def _match(prompts: Sequence[Prompt], images: Any, videos: Any) -> list[Prompt]:
    """The prompts with a medium at every place."""
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
        raise ValueError(f"{argument} has {len(given)} lists for {len(prompts)} prompts; give one list a prompt")
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
    # Callers of transformers name media in messages and pass all of them too: then those passed are taken.
    if len(given) == len(parts):
        return given
    bare = sum(part.source is None for part in parts)
    if len(given) == bare:
        rest = iter(given)
        return [next(rest) if part.source is None else part.source for part in parts]
    named = f" ({len(parts) - bare} of them name their own)" if bare < len(parts) else ""
    raise ValueError(
        f"{subject} {len(parts)} {noun} places {IMAGE_TOKEN}{named}, but {len(given)} {noun}s were "
        "given; each place takes one"
    )
