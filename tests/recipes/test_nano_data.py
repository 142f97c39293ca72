"""Nano's data: planning, conversations, labels, and equal images from both ways of drawing.

Assets come from Pillow alone, so nothing is downloaded.
"""

import io
import re
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.nano.assets.archive import Assets
from recipes.nano.assets.build import clean_label, fingerprint
from recipes.nano.draw import paint
from recipes.nano.draw.render import IGNORED, Renderer, _patch_points, _query_points
from recipes.nano.scenes import scene as scenes
from recipes.nano.scenes import shape_questions
from recipes.nano.scenes.planner import Planner
from recipes.nano.text import dialogue, tokenizer
from recipes.nano.train import batches, image_batches
from tests.helpers.nano_material import draw_scenes, font, jpeg, packed_scenes
from tests.helpers.plain_drawing import draw


def _neutral(scene: scenes.Scene) -> scenes.Scene:
    """Remove what PIL's painter omits on purpose: changes of style, noise, clouds."""
    scene.sensor = (0.0, 1.0, 0.0, 0.0)
    if scene.background[0] == 3:
        scene.background = (0.0, *scene.background[1:])
    for mark in scene.marks:
        if mark.kind == "sprite":
            mark.look = (0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
        elif mark.look[3]:
            mark.look = (*mark.look[:3], 0.0, 0.0, 0.0, 0.0, 0.0)
    return scene


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_special_tokens_have_arias_ids_and_letters_are_tokens():
    pieces = [tokenizer.processor().id_to_piece(i) for i in range(len(tokenizer.SPECIAL_TOKENS))]
    assert pieces == tokenizer.SPECIAL_TOKENS
    assert tokenizer.processor().piece_to_id("<|img|>") == 9
    ids = tokenizer.encode("<|im_start|>user\n<fim_prefix><|img|><fim_suffix>Hi<|im_end|>")
    assert len(ids) == 1 + 4 + 1 + 3 + 2 + 1
    assert ids.count(9) == 1
    assert tokenizer.vocab_size() % 8 == 0, "the embedding should have no unused rows"


@pytest.mark.parametrize("text", ["  two  spaces ", "line\n\nline\n", "naïve “quotes” – 漢字 🙂", "<|im_end|>\nx", ""])
def test_encoding_is_lossless(text: str):
    assert tokenizer.processor().decode(tokenizer.encode(text)) == text


def test_packaged_tokenizer_files_equal_those_of_the_recipe(tmp_path):
    tokenizer.write_files(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer.NANO_FOLDER / name).read_bytes(), name


# --- planning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", image_batches.KINDS)
def test_same_seed_same_batch(assets: Assets, kind: str):
    first, again, other = (image_batches.make_batch(assets, Random(seed), kind, 32) for seed in (1, 1, 2))
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[key]), key
        else:
            assert value == again[key], key
    assert not torch.equal(first["input_ids"], other["input_ids"])


def test_everything_is_inside_the_image(assets: Assets):
    planner = Planner(assets, 224, Random(3))
    for _ in range(400):
        scene = planner.plan(1.0)
        assert scene.turns and max(scene.height, scene.width) == 224 and min(scene.height, scene.width) >= 56
        for line in scene.lines:
            end = planner.advances(line.text, line.face, line.spacing).sum() * line.em
            for along in (0.0, end):
                x, y = line.x + along * np.cos(line.angle), line.y + along * np.sin(line.angle)
                assert -2 <= x <= scene.width + 2 and 0 <= y <= scene.height + 2, line
        for mark in scene.marks:
            assert mark.size <= mark.x + 1 and mark.x + mark.size <= scene.width + 1, mark
            assert mark.size <= mark.y + 1 and mark.y + mark.size <= scene.height + 1, mark


def test_words_grow(assets: Assets):
    planner = Planner(assets, 224, Random(4))
    assert max(len(planner.text(2)) for _ in range(200)) == 2
    early = [line.text for _ in range(100) for line in planner.plan(0.0, "words").lines]
    late = [line.text for _ in range(300) for line in planner.plan(1.0, "words").lines]
    assert max(map(len, early)) <= 2 < 8 < max(map(len, late))


def test_shapes_do_not_overlap_and_pairs_have_a_clear_order(assets: Assets):
    planner = Planner(assets, 224, Random(5))
    for _ in range(300):
        scene = planner.plan(1.0, "shapes")
        for i, a in enumerate(scene.marks):
            for b in scene.marks[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.size + b.size, (a, b)
        if len(scene.marks) == 2:
            places = [(mark.x, mark.y) for mark in scene.marks]
            assert shape_questions.side_of(places[0], places[1])


def _count(answer: str) -> int:
    word = answer.split()[0]
    return 0 if word == "There" else [number.capitalize() for number in dialogue.NUMBERS].index(word)


def test_answers_about_shapes_agree_with_the_scene(assets: Assets):
    """Check the answers independently of the code that made them."""
    rng = Random(6)
    planner = Planner(assets, 224, rng)
    checked = {"colour": 0, "count": 0, "where": 0, "beside": 0, "yes": 0}
    for _ in range(600):
        marks = planner.plan(1.0, "shapes").marks
        for _, (forms, answer) in shape_questions.shape_questions(marks, rng):
            question = rng.choice(list(forms))
            if match := re.match(r"How many (?:(\w+) )?(\w+) (?:are|do)", question):
                colour, name = match[1], "cross" if match[2] == "crosses" else match[2].removesuffix("s")
                fits = [mark for mark in marks if name in ("shape", mark.name) and colour in (None, mark.colour_name)]
                assert _count(answer) == len(fits), (question, answer)
                checked["count"] += 1
            elif match := re.match(r"What colou?r is the (\w+)\?", question):
                assert answer.lower() == next(m.colour_name for m in marks if m.name == match[1]) + "."
                checked["colour"] += 1
            elif len(marks) == 2 and question.startswith(("Where is", "What is to", "What is above", "What is below")):
                checked["where" if question.startswith("Where") else "beside"] += 1
                _check_place(marks, question, answer)
            elif answer in ("Yes.", "No.") and (
                match := re.match(r"(?:Is there|Do you see) an? (\w+) (\w+)", question)
            ):
                there = any((mark.colour_name, mark.name) == match.groups() for mark in marks)
                assert (answer == "Yes.") == there, (question, answer)
                checked["yes"] += 1
    assert min(checked.values()) > 20, checked


def _check_place(marks: list[scenes.Mark], question: str, answer: str) -> None:
    """Find the shape that is named last, and check that the other is where the sentence says."""
    text = answer if question.startswith("Where") else question
    (place,) = re.findall(r"left|right|above|below", text.lower())
    known = text.lower().rstrip("?.").split(" the ")[-1]
    reference = next(mark for mark in marks if known in (mark.name, mark.title))
    other = next(mark for mark in marks if mark is not reference)
    dx, dy = other.x - reference.x, other.y - reference.y
    assert {"left": -dx, "right": dx, "above": -dy, "below": dy}[place] > max(abs(dx), abs(dy)) * 0.99
    if not question.startswith("Where"):
        assert answer.lower() in (f"a {other.title}.", f"an {other.title}.")


def test_only_photographs_are_answered_not_sure(assets: Assets):
    planner = Planner(assets, 224, Random(7))
    for _ in range(500):
        scene = planner.plan(1.0)
        unsure = [answer == dialogue.NOT_SURE for _, answer in scene.turns]
        assert unsure[0] == (scene.task == "not sure")
        assert (scene.photo is not None) == (scene.task == "not sure")


def test_descriptions_read_well():
    assert dialogue.with_article("orange square") == "an orange square"
    assert dialogue.with_article("unicorn") == "a unicorn"
    assert dialogue.count_answer(1, "cross") == "One cross."
    assert dialogue.count_answer(3, "cross") == "Three crosses."
    assert dialogue.count_answer(0, "star") == "There are no stars."
    assert dialogue.describe_lines(["Hello"]) == 'The word "Hello".'
    assert dialogue.describe_lines(["42"]) == 'The number "42".'
    assert dialogue.describe_lines(["a b", "c"]) == 'Two lines of text: "a b" and "c".'
    assert dialogue.describe_emoji(["alien"]) == "An alien emoji."
    assert clean_label("piñata’s") == "pinata's"


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", "large"])
def test_only_answers_are_targets_and_shapes_are_fixed(assets: Assets, kind: str):
    images, queries = 32, tokenizer.QUERIES[image_batches.KINDS[kind].size]
    batch = image_batches.make_batch(assets, Random(8), kind, images)
    ids, labels, starts = batch["input_ids"], batch["labels"], batch["cu_seqlens"].tolist()
    assert len(ids) == len(labels) == len(batch["positions"]) == images * image_batches.KINDS[kind].tokens == starts[-1]
    assert len(starts) == images + 1 + images // 4 + 1
    assert max(np.diff(starts)) <= batch["max_seqlen"]
    for n, (start, end) in enumerate(pairwise(starts)):
        row, wanted = ids[start:end].tolist(), labels[start:end].tolist()
        assert batch["positions"][start:end].tolist() == list(range(end - start))
        if n > images:
            assert set(row) <= {tokenizer.PAD_TOKEN_ID} and set(wanted) <= {-100}
            continue
        assert row.count(9) == (queries if n < images else 0)
        text = tokenizer.processor().decode([token for token in row if token != 9])
        answers = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", text, re.DOTALL)
        learnt = [token for token, label in zip(row, wanted, strict=True) if label != -100]
        assert all(label in (-100, token) for token, label in zip(row, wanted, strict=True))
        assert tokenizer.processor().decode(learnt) == "".join(answers)


@pytest.mark.slow
def test_workers_give_the_same_batches(assets: Assets, tmp_path):
    assets.save(tmp_path / "assets.npz")
    plan = image_batches.Plan(
        seed=3, images={"small": 8, "large": 8}, cycle=("small", "large"), assets=tmp_path / "assets.npz", workers=1
    )
    here = image_batches.Batches(plan, assets)
    for given, wanted, _ in zip(image_batches.loader(plan), here, range(3), strict=False):
        assert torch.equal(given["input_ids"], wanted["input_ids"])
        assert [tuple(group) for group in given["line_groups"]] == wanted["line_groups"]


def test_batch_n_does_not_depend_on_where_a_run_starts(assets: Assets):
    words = {key: {"words": 1.0} for key in ("small", "large")}
    plan = image_batches.Plan(seed=3, images={"small": 8, "large": 8}, cycle=("small", "large"), shares=words, growth=4)
    whole = [batch for batch, _ in zip(image_batches.Batches(plan, assets), range(5), strict=False)]
    later = [batch for batch, _ in zip(image_batches.Batches(replace(plan, first=3), assets), range(2), strict=False)]
    for ours, wanted in zip(later, whole[3:], strict=True):
        assert ours["seed"] == wanted["seed"] and torch.equal(ours["input_ids"], wanted["input_ids"])
        assert torch.equal(ours["line_values"], wanted["line_values"])
    lengths = [int(batch["line_edges"].isfinite().sum(1).max()) - 1 for batch in whole]
    assert lengths[0] <= 2 < max(lengths), "words should grow with the batch number"


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 448])
def test_groups_and_windows_equal_plain_drawing(assets: Assets, renderer: Renderer, size: int):
    planner = Planner(assets, size, Random(size))
    drawn = [planner.plan(1.0, task) for task in scenes.TASKS for _ in range(12 if size == 224 else 6)]
    ours = draw_scenes(renderer, assets, drawn, seed=5)["pixel_values"]
    generator = torch.Generator().manual_seed(5)
    grains = torch.rand((len(drawn), 1, 9, 9), generator=generator)[:, 0]
    noisy = [n for n, scene in enumerate(drawn) if scene.sensor[3]]
    noise = dict(zip(noisy, torch.randn((len(noisy), 3, size, size), generator=generator), strict=True))
    kinds = {scene.background[0] for scene in drawn}
    assert kinds == {0, 1, 2, 3, 4} and 0 < len(noisy) < len(drawn), "too few scenes to have every kind"
    for n, scene in enumerate(drawn):
        plain = draw(scene, renderer, assets, grains[n], noise.get(n, torch.zeros(())))
        torch.testing.assert_close(ours[n], plain, rtol=0, atol=1e-3, msg=lambda text, scene=scene: f"{text}\n{scene}")


@pytest.mark.parametrize("task", scenes.TASKS)
def test_renderer_and_painter_agree(assets: Assets, renderer: Renderer, task: str):
    planner = Planner(assets, 224, Random(9))
    drawn = [_neutral(planner.plan(1.0, task)) for _ in range(8)]
    for scene in drawn:
        if scene.photo:
            scene.photo.hue, scene.photo.mix = 0.0, 0.0
    pixels = (draw_scenes(renderer, assets, drawn)["pixel_values"] + 1) / 2
    painter = paint.Painter([font(20).font_bytes], assets.sprites, assets.photos)
    for scene, image in zip(drawn, pixels, strict=True):
        large = painter.paint(scene, 2.0, _NoJpeg(1))
        small = large.resize((scene.width, scene.height), Image.Resampling.BICUBIC)
        wanted = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
        ours = image[:, : scene.height, : scene.width]
        assert (ours - wanted).abs().mean() < 0.02, scene
        contrast = (wanted - wanted.mean((1, 2), keepdim=True)).square().mean()
        assert (ours - wanted).square().mean() < 0.25 * contrast + 1e-4, scene
        outside = torch.ones(224, 224, dtype=torch.bool)
        outside[: scene.height, : scene.width] = False
        assert (image[:, outside] == 0).all()


class _NoJpeg(Random):
    """Random numbers with which the painter does not use JPEG."""

    def random(self) -> float:
        return 0.9


def test_labels_match_letters(assets: Assets, renderer: Renderer):
    scene = scenes.Scene("words", 224, 224, 224, background=(0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0))
    scene.lines = [scenes.Line("HIM", 0, 90.0, 10.0, 150.0, 0.0, 0.0, (0.0, 0.0, 0.0), "black")]
    out = draw_scenes(renderer, assets, [scene])
    labels = out["patch_labels"].view(16, 16)
    dark = (out["pixel_values"][0].mean(0) < 0).view(16, 14, 16, 14)[:, 7, :, 7]  # patch centres in ink
    names = scenes.dense_classes(assets.labels)
    assert dark.sum() > 10
    assert (labels[dark] >= scenes.FIRST_CHARACTER).all()
    assert (labels[:5] == scenes.BACKGROUND).all() and (labels[12:] == scenes.BACKGROUND).all()
    row = [names[label] for label in labels[8].tolist() if label]
    assert list(dict.fromkeys(row)) == ["H", "I", "M"] and row == sorted(row, key="HIM".index)


def test_labels_of_shapes_and_sprites_agree_with_the_pixels(assets: Assets, renderer: Renderer):
    planner = Planner(assets, 224, Random(11))
    names = scenes.dense_classes(assets.labels)
    for task in ("shapes", "emoji"):
        drawn = [_neutral(planner.plan(1.0, task)) for _ in range(12)]
        for scene in drawn:
            scene.background = (0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.0)
        out = draw_scenes(renderer, assets, drawn)
        centres = out["pixel_values"][:, :, 7::14, 7::14].flatten(2)
        coloured = (centres.abs() > 0.25).any(1)
        for scene, labels, seen in zip(drawn, out["patch_labels"], coloured, strict=True):
            inside = labels != IGNORED
            grey = any(mark.colour_name == "grey" for mark in scene.marks)
            if not grey:
                assert ((labels > 0) == seen)[inside].float().mean() > 0.97
            found = {names[label] for label in labels[inside].tolist()} - {"background"}
            assert found <= {mark.title for mark in scene.marks}


def test_photographs_are_labelled_other_everywhere(assets: Assets, renderer: Renderer):
    planner = Planner(assets, 224, Random(12))
    drawn = [planner.plan(1.0, "not sure") for _ in range(3)]
    labels = draw_scenes(renderer, assets, drawn)["patch_labels"]
    assert set(labels.unique().tolist()) <= {scenes.OTHER, IGNORED}


@pytest.mark.parametrize("size", [224, 448])
def test_queries_cover_the_patches_of_a_square_picture_once(assets: Assets, renderer: Renderer, size: int):
    patches = _patch_points(size, 1, torch.device("cpu"))[0]
    queries = _query_points(size, torch.tensor([[size, size]]))[0]
    assert sorted(map(tuple, patches.round().tolist())) == sorted(map(tuple, queries.round().tolist()))
    per_query = queries.view(tokenizer.QUERIES[size], -1, 2)
    cell = per_query[9].mean(0)  # row 1, column 1 of the 8 x 8 grid
    middle = size / 8 * 1.5
    assert cell[0] == middle and cell[1] == (middle if size == 224 else middle - size / 32)


def test_renderer_repeats_itself(assets: Assets, renderer: Renderer):
    batch = image_batches.make_batch(assets, Random(13), "small", 8)
    first, again = renderer(batch), renderer(batch)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
    assert first["pixel_values"].abs().max() <= 1 and first["pixel_values"].isfinite().all()


class _Waits(TorchDispatchMode):
    """Notes operations that, on a GPU, wait for the host: values read back, constants made there, boolean masks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if masked or name in ("_local_scalar_dense", "lift_fresh", "nonzero"):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [224, 448])
def test_drawing_never_waits_for_the_host(assets: Assets, renderer: Renderer, size: int):
    planner = Planner(assets, size, Random(14))
    batch = packed_scenes(
        [planner.plan(1.0, task) for task in scenes.TASKS for _ in range(16 if size == 224 else 10)], assets
    )
    for key in (
        "photo_mixed",
        "sprite_outlined",
        "mark_groups",
        "line_groups",
        "noisy",
        "blurred",
        "background_groups",
    ):
        assert len(batch[key]), key
    with _Waits() as waits:
        renderer(batch)
    assert not waits.found
    with waits:
        torch.ones(3)[torch.tensor([True, False, True])].sum().item()
    assert waits.found == {"lift_fresh", "index", "_local_scalar_dense"}, "the check itself"


def test_fingerprints_distinguish_duplicates_from_other_images():
    one, other = (Image.open(io.BytesIO(jpeg(seed))) for seed in (1, 2))
    copy = one.resize((128, 96))
    assert (fingerprint(one) ^ fingerprint(copy)).bit_count() <= 6
    assert (fingerprint(one) ^ fingerprint(other)).bit_count() > 6


def test_batches_always_fit_whatever_is_drawn(assets: Assets):
    for seed in range(16):
        for kind in image_batches.KINDS:
            batch = image_batches.make_batch(assets, Random(seed), kind, 48, grown=seed / 16)
            assert torch.diff(batch["cu_seqlens"]).max() <= batch["max_seqlen"]
            assert batch["num_tokens"] <= len(batch["input_ids"])


def test_label_weights_are_one_over_the_root_of_the_answer_length() -> None:
    labels = np.array([-100, 5, -100, -100, 5, 6, 7, 8, -100, 3, 4])
    weights = batches.answer_weights(labels)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [0, 1, 0, 0, 0.5, 0.5, 0.5, 0.5, 0, 2**-0.5, 2**-0.5], rtol=1e-6)
