"""Images for the engine: keys, lazy crops, patches; all of it the same as the eager way of the processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from aria.config import AriaConfig
from aria.model import pack_crops, pack_patches
from aria.processor import AriaImageProcessor, AriaProcessor
from aria.processor import image_inputs as module
from aria.processor.image_inputs import ImageInput, load_crops, read_image_inputs

VISION = AriaConfig.aria().vision
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.2, 0.25)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("trial", range(60))
def test_resizing_gives_pillows_bits(trial):
    rng = np.random.default_rng(trial)
    # From single pixels up, extreme values, and every order of the two passes.
    old, new = (tuple(int(n) for n in rng.choice([1, 2, 3, *rng.integers(4, 200, 4)], 2)) for _ in range(2))
    array = rng.integers(0, 256, (*old, 3), dtype=np.uint8)
    if trial % 2:
        array = (array > 127).astype(np.uint8) * 255
    height, width = new
    resized = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
    ours = module.resize_as_pillow(torch.from_numpy(array)[None], width, height)[0]
    assert np.array_equal(ours.numpy(), np.asarray(resized)), (old, new)


@pytest.mark.parametrize("settings", [
    {},
    {"max_image_size": 490},
    {"split_image": True},
    {"split_image": True, "split_mode": "pad"},
    {"split_image": True, "split_mode": "pad", "max_image_size": 490},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(640, 480), (30, 700), (490, 490)])
def test_patches_equal_those_of_the_eager_processor(shape, settings):
    process = AriaImageProcessor(image_mean=MEAN, image_std=STD)
    source = noise(*shape)
    eager = process(source, **settings)
    expected = pack_patches(eager.pixel_values, eager.pixel_mask, VISION)
    crops = ImageInput.of(source, process, **settings).load()
    assert len(crops.pixels) == eager.num_crops[0]
    got = pack_crops(crops.pixels, crops.extents, MEAN, STD, VISION)
    assert torch.equal(got.pixels, expected.pixels)
    assert torch.equal(got.positions, expected.positions)
    assert torch.equal(got.segments.cu_seqlens, expected.segments.cu_seqlens)
    assert (got.segments.lengths, got.grid_patches) == (expected.segments.lengths, expected.grid_patches)
    half = pack_crops(crops.pixels, crops.extents, MEAN, STD, VISION, torch.bfloat16)
    assert torch.equal(half.pixels, expected.pixels.bfloat16())


def test_devices_without_pillow_cut_the_same_crops():
    process = AriaImageProcessor()
    images = [
        ImageInput.of(noise(300, 200, seed), process, max_image_size=490, split_image=True, split_mode=mode)
        for seed, mode in enumerate(("authors", "pad"))
    ]
    for image, expected in zip(images, load_crops(images, "cpu"), strict=True):
        sent = module._upload([image.pages[0]], torch.device("cpu"))
        [there] = module._cut([sent] * len(image.tile_plans), image)
        assert torch.equal(there.permute(0, 3, 1, 2), expected.pixels)


def test_images_of_many_shapes_load_together_as_alone():
    process = AriaImageProcessor(max_image_size=490)
    shapes = [(60, 50), (490, 490), (60, 50), (90, 100), (490, 490)]
    images = read_image_inputs([noise(*shape, seed) for seed, shape in enumerate(shapes)], process, [{}] * 5)
    for image, crops in zip(images, load_crops(images, "cpu"), strict=True):
        assert torch.equal(crops.pixels, image.load().pixels)
        assert crops.extents == image.extents


def test_keys_distinguish_contents_and_crops():
    process = AriaImageProcessor()
    rgb = np.asarray(noise(40, 30))
    changed = rgb.copy()
    changed[29, 39, 2] ^= 1
    key = ImageInput.of(rgb, process).key
    assert key == ImageInput.of(Image.fromarray(rgb), process).key == ImageInput.of(torch.tensor(rgb), process).key
    # This image is nowhere near the least length of a side, so the limit does not matter to it.
    assert key == ImageInput.of(rgb, AriaImageProcessor(min_image_size=100)).key
    others = [
        ImageInput.of(changed, process).key,
        ImageInput.of(rgb.reshape(40, 30, 3), process).key,
        ImageInput.of(rgb, process, max_image_size=490).key,
        ImageInput.of(rgb, process, split_image=True).key,
        ImageInput.of(rgb, process, split_image=True, split_mode="pad").key,
    ]
    assert len({key, *others}) == 6
    long = np.asarray(noise(60, 10))
    assert ImageInput.of(long, process).key != ImageInput.of(long, AriaImageProcessor(min_image_size=100)).key


def test_images_read_do_not_change_with_their_source():
    rgb = np.asarray(noise(490, 490)).copy()
    image = ImageInput.of(rgb, AriaImageProcessor(max_image_size=490))
    before = image.load().pixels.clone()
    rgb[:] = 0
    assert torch.equal(image.load().pixels, before)


def test_a_conversation_is_prepared_as_a_call_does_it_with_sizes_of_its_own():
    processor = AriaProcessor.from_pretrained()
    small, large = processor.image_processor.sizes[0], processor.image_processor.sizes[-1]
    messages = [
        {"role": "user", "content": [
            {"type": "text", "text": "<|img|> is text; "},
            {"type": "image", "image": noise(50, 60)},
            {"type": "text", "text": " and "},
            {"type": "image", "image": noise(60, 20, 1), "max_image_size": small, "split_image": True},
            {"type": "text", "text": "?"},
        ]},
    ]  # fmt: skip
    for part in messages[0]["content"]:
        if part["type"] == "image":
            part.setdefault("max_image_size", large)
    prepared = processor.prepare(messages)
    image_id = processor.tokenizer.image_token_id
    places = [i for i, token in enumerate(prepared.ids) if token == image_id]
    spans = [i for p in prepared.images for i in range(p.start, p.start + p.tokens)]
    assert places == spans and len(prepared.images) == 2
    with pytest.warns(DeprecationWarning, match="now Prepared.images"):
        assert prepared.pictures is prepared.images
    per_crop = processor.size_conversion
    assert prepared.images[0].tokens == per_crop[large]
    assert prepared.images[1].tokens == per_crop[small] * len(prepared.images[1].data.load().pixels)
    for part in messages[0]["content"]:
        part.pop("max_image_size", None)
    same = processor.prepare(messages, max_image_size=small)
    called = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, max_image_size=small
    )
    assert same.ids == called["input_ids"][0]
    vision = AriaConfig.from_pretrained().vision
    settings = processor.image_processor
    crops = load_crops([span.data for span in same.images], "cpu")
    got = pack_crops(
        torch.cat([one.pixels for one in crops]),
        [extent for one in crops for extent in one.extents],
        settings.image_mean,
        settings.image_std,
        vision,
    )
    assert_close(got.pixels, pack_patches(called["pixel_values"], called["pixel_mask"], vision).pixels, rtol=0, atol=0)


def test_unsupported_inputs_are_rejected(tmp_path: Path):
    processor = AriaProcessor.from_pretrained()
    conversation = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(ValueError, match="one conversation, a list of messages, but got 2"):
        processor.prepare([conversation, conversation])
    with pytest.raises(ValueError, match="1 image slots"):
        processor.prepare(conversation)
    with pytest.raises(ValueError, match="is not one of this model's sizes"):
        processor.prepare(conversation, images=noise(9, 9), max_image_size=17)
    with pytest.raises(FileNotFoundError, match="no image at"):
        processor.prepare(conversation, images=str(tmp_path / "none.png"))
    with pytest.raises(ValueError, match="empty image"):
        processor.prepare(conversation, images=np.zeros((0, 4, 3), dtype=np.uint8))
