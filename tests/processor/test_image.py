"""The image processor: the same bits as transformers, the authors' splitting, and unusual images."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from aria.config import AriaConfig, ProjectorConfig
from aria.processor import AriaImageProcessor

ORACLE: Any = AriaImageProcessorPil()
RNG = np.random.default_rng(0)


def picture(width: int, height: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, channels), dtype=np.uint8))


def grey_at(values: torch.Tensor) -> int:
    """The grey level of normalized values, which are all equal."""
    levels = torch.unique(((values + 1) * 127.5).round().to(torch.int64))
    assert len(levels) == 1
    return int(levels)


@pytest.mark.parametrize("size", [490, 980])
@pytest.mark.parametrize("shape", [(640, 480), (31, 47), (1003, 977), (490, 490), (1, 1), (1999, 33), (3, 901)])
def test_same_bits_as_transformers_without_splitting(shape: tuple[int, int], size: int) -> None:
    image = picture(*shape)
    ours = AriaImageProcessor()(image, max_image_size=size)
    theirs = ORACLE(image, max_image_size=size, return_tensors="pt")
    assert ours.pixel_values.dtype == torch.float32 and ours.pixel_mask.dtype == torch.bool
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])
    assert torch.equal(ours.pixel_mask, theirs["pixel_mask"])
    assert ours.num_crops == [1]


@pytest.mark.parametrize("size", [490, 980])
@pytest.mark.parametrize("shape", [(640, 480), (1000, 977), (2000, 33), (1, 1)])
def test_pad_mode_is_transformers_splitting(shape: tuple[int, int], size: int) -> None:
    image = picture(*shape)
    ours = AriaImageProcessor()(image, max_image_size=size, split_image=True, split_mode="pad")
    theirs = ORACLE(image, max_image_size=size, split_image=True, return_tensors="pt")
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])
    assert ours.num_crops == [theirs["num_crops"]]


@pytest.mark.parametrize(
    ("shape", "valid"),
    [((640, 480), (735, 980)), ((1920, 1080), (551, 980)), ((3000, 500), (336, 980)), ((400, 1200), (980, 336))],
)
def test_valid_area_is_at_top_left_and_black_is_padded(shape: tuple[int, int], valid: tuple[int, int]) -> None:
    crops = AriaImageProcessor()(Image.new("RGB", shape, (255, 255, 255)))
    mask = crops.pixel_mask[0]
    assert (int(mask[:, 0].sum()), int(mask[0].sum())) == valid
    assert int(mask.sum()) == valid[0] * valid[1]
    assert grey_at(crops.pixel_values[0][:, mask]) == 255
    assert grey_at(crops.pixel_values[0][:, ~mask]) == 0


@pytest.mark.parametrize(
    ("shape", "at_980", "at_490"),
    [
        ((768, 768), 5, 5),
        ((1920, 1080), 3, 9),
        ((3000, 500), 7, 7),
        ((400, 1200), 4, 4),
        ((800, 600), 7, 7),
        ((1224, 1584), 7, 7),
        ((4000, 500), 9, 9),
    ],
)
def test_crop_counts_of_the_authors_splitting(shape: tuple[int, int], at_980: int, at_490: int) -> None:
    image = Image.new("RGB", shape)
    process = AriaImageProcessor(split_image=True)
    assert process(image, max_image_size=490).num_crops == [at_490]
    assert len(process(image, max_image_size=980).pixel_values) == at_980


def test_large_images_get_the_finer_of_two_equal_grids() -> None:
    process = AriaImageProcessor(max_image_size=490, split_image=True)
    # 2:1 fits the grids 2x1 and 4x2; the second needs more than half its 8 crops' pixels.
    assert process([Image.new("RGB", (1384, 692)), Image.new("RGB", (1386, 693))]).num_crops == [3, 9]


def test_overview_comes_first_and_tiles_follow_row_by_row() -> None:
    image = Image.new("RGB", (980, 980))
    for level, corner in enumerate([(0, 0), (490, 0), (0, 490), (490, 490)]):
        image.paste((60 * level + 10,) * 3, (*corner, corner[0] + 490, corner[1] + 490))
    crops = AriaImageProcessor(max_image_size=490)(image, split_image=True)
    whole = AriaImageProcessor(max_image_size=490)(image)
    assert torch.equal(crops.pixel_values[:1], whole.pixel_values)
    assert [grey_at(tile[:, 1:-1, 1:-1]) for tile in crops.pixel_values[1:]] == [10, 70, 130, 190]


def test_counts_are_per_image_and_splitting_can_differ() -> None:
    pictures = [picture(500, 500), picture(3000, 500), picture(40, 30)]
    crops = AriaImageProcessor()(pictures, max_image_size=490, split_image=[True, True, False])
    assert crops.num_crops == [5, 7, 1]
    assert crops.pixel_values.shape == (13, 3, 490, 490) and crops.pixel_mask.shape == (13, 490, 490)
    with pytest.raises(ValueError, match="2 values of split_image for 1 images"):
        AriaImageProcessor()(pictures[:1], split_image=[True, False])


def test_own_size_is_honoured_and_other_sizes_are_refused() -> None:
    process = AriaImageProcessor(max_image_size=490)
    assert process(picture(50, 60)).pixel_values.shape[-1] == 490
    assert process(picture(50, 60), max_image_size=980).pixel_values.shape[-1] == 980
    with pytest.raises(ValueError, match="1000 is not one of this model's sizes: 490, 980"):
        process(picture(50, 60), max_image_size=1000)
    with pytest.raises(ValueError, match="no images"):
        process([])
    with pytest.raises(ValueError, match="split_mode 'best'"):
        process(picture(5, 5), split_mode="best")
    with pytest.raises(ValueError, match="do_pad is False, but Aria has True"):
        process(picture(5, 5), do_pad=False)
    with pytest.raises(TypeError, match="the image processor has no do_crop; it has max_image_size"):
        process(picture(5, 5), do_crop=True)


def test_numpy_output_is_the_same() -> None:
    image = picture(80, 60)
    arrays = AriaImageProcessor()(image, return_tensors="np")
    assert isinstance(arrays.pixel_values, np.ndarray)
    assert np.array_equal(arrays.pixel_values, AriaImageProcessor()(image).pixel_values.numpy())


def test_settings_are_saved_and_sizes_come_from_the_config(tmp_path) -> None:
    process = AriaImageProcessor(sizes=(224, 448), max_image_size=448, min_image_size=96, split_image=True)
    process.save_pretrained(tmp_path)
    config = AriaConfig(projector=ProjectorConfig(patch_to_query={256: 64, 1024: 128}))
    config.save_pretrained(tmp_path)
    loaded = AriaImageProcessor.from_pretrained(tmp_path)
    assert vars(loaded).keys() == vars(process).keys()
    for name in ("sizes", "max_image_size", "min_image_size", "split_image", "split_mode", "split_resolutions"):
        assert getattr(loaded, name) == getattr(process, name)
    assert loaded(picture(100, 10)).pixel_values.shape[2:] == (448, 448)
    assert loaded(picture(100, 10), split_image=False).pixel_mask[0, :, 0].sum() == 96


def test_reads_the_published_settings_and_refuses_other_arithmetic(tmp_path) -> None:
    settings = {"image_processor_type": "AriaVisionProcessor", "max_image_size": 980, "min_image_size": 336,
                "_transform": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    file = tmp_path / "preprocessor_config.json"
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        AriaImageProcessor.from_pretrained(tmp_path)
    file.write_text(json.dumps(settings))
    assert AriaImageProcessor.from_pretrained(tmp_path).sizes == (490, 980)
    file.write_text(json.dumps({**settings, "resample": 2}))
    with pytest.raises(ValueError, match="resample is 2, but Aria has 3"):
        AriaImageProcessor.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        AriaImageProcessor.from_pretrained(tmp_path)


def test_loads_settings_that_transformers_wrote(tmp_path) -> None:
    written = AriaImageProcessorPil(max_image_size=490).to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": written}))
    assert AriaImageProcessor.from_pretrained(tmp_path).max_image_size == 490


def test_transformers_loads_ours(tmp_path) -> None:
    AriaImageProcessor(max_image_size=490).save_pretrained(tmp_path)
    image = picture(70, 90)
    theirs = AriaImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")
    assert torch.equal(theirs["pixel_values"], AriaImageProcessor(max_image_size=490)(image).pixel_values)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="min_image_size 336 should lie between 1 and the smallest crop size, 224"):
        AriaImageProcessor(sizes=(224, 448), max_image_size=448)
    with pytest.raises(ValueError, match="image_std should hold 3 values"):
        AriaImageProcessor(image_std=(0.5,))


def test_extreme_shapes_work() -> None:
    for shape in ((20_000, 1), (1, 20_000)):
        for split in (False, True):
            crops = AriaImageProcessor()(Image.new("RGB", shape), max_image_size=490, split_image=split)
            assert crops.num_crops == [9 if split else 1]


def test_png_bytes_take_the_same_way_as_the_object() -> None:
    image = picture(64, 48)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    process = AriaImageProcessor(max_image_size=490)
    assert torch.equal(process(buffer.getvalue()).pixel_values, process(image).pixel_values)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784.*, but Aria has 1/255"),
        ({"do_resize": False}, "do_resize is False, but Aria has True"),
        ({"do_pad": False}, "do_pad is False, but Aria has True"),
        ({"do_center_crop": True}, "do_center_crop is True, but Aria has False"),
        ({"data_format": "channels_last"}, "data_format is 'channels_last'"),
        ({"size": {"shortest_edge": 224}}, "size is .*, but Aria's sizes are max_image_size and min_image_size"),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "image_processor_type is 'CLIPImageProcessor', which is not Aria's",
        ),
        ({"resample": 2}, "resample is 2, but Aria has 3"),
        ({"image_mean": 0.5}, "image_mean is 0.5; expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is .*; expected three numbers, none of them 0"),
        ({"min_image_size": "a"}, "min_image_size is 'a'; expected a whole number"),
        ({"max_image_size": True}, "max_image_size is True"),
        ({"split_image": "yes"}, "split_image is 'yes'; expected true or false"),
        ({"split_resolutions": 5}, "split_resolutions is 5; expected a list of pairs"),
        ({"split_resolutions": [[490]]}, "split_resolutions is .*; expected a list of pairs"),
    ],
)
def test_unsupported_settings_are_rejected(tmp_path: Any, change: dict[str, Any], complaint: str) -> None:
    AriaImageProcessor().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {complaint}"):
        AriaImageProcessor.from_pretrained(tmp_path)


def test_settings_written_by_transformers_are_supported(tmp_path: Any) -> None:
    AriaImageProcessorPil(max_image_size=490, split_image=True).save_pretrained(tmp_path)
    loaded = AriaImageProcessor.from_pretrained(tmp_path)
    assert (loaded.max_image_size, loaded.split_image) == (490, True)


def test_settings_without_effect_are_accepted(tmp_path: Any) -> None:
    """As in published files and older releases of transformers."""
    AriaImageProcessor(max_image_size=490).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    more: dict[str, Any] = dict.fromkeys(("_transform", "size", "crop_size", "do_pad", "do_center_crop"))
    more |= {"auto_map": {}, "data_format": "channels_first", "rescale_factor": 0.00392156862745098}
    more |= {"image_processor_type": "AriaImageProcessorFast"}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    assert AriaImageProcessor.from_pretrained(tmp_path).max_image_size == 490


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"image_processor": {"image_mean": 0.5}}, "image_mean is 0.5; expected three numbers"),
        ({"image_processor": 5}, "image_processor should be an object, but is 5"),
        ({"image_processor": {}, "size_conversion": [490]}, "size_conversion should map crop sizes to tokens"),
        ({"image_processor": {}, "size_conversion": {"490": "many"}}, "size_conversion should map crop sizes"),
        ({"image_processor": {}, "size_conversion": {"490": 0}}, "size_conversion should map crop sizes"),
    ],
)
def test_errors_in_files_of_transformers_5_name_the_file(tmp_path: Any, data: Any, complaint: str) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"[^e]processor_config\.json: {complaint}"):
        AriaImageProcessor.from_pretrained(tmp_path)
