"""Nano's charts, lines, clips and conversations about several images: answers agree with the scenes."""

import re
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from aria.media.read import Frame, ScaledImage
from aria.processor.expand import expand, resolve_defaults
from recipes.nano.assets.archive import Assets
from recipes.nano.draw import paint
from recipes.nano.draw.render import IGNORED, Renderer
from recipes.nano.scenes import charts, documents, stories
from recipes.nano.scenes import scene as scenes
from recipes.nano.scenes.planner import Planner
from recipes.nano.text import tokenizer
from recipes.nano.train import image_batches
from tests.helpers.nano_material import draw_scenes, font, packed_scenes


def _charts(assets: Assets, size: int, count: int) -> Iterator[tuple[scenes.Scene, charts.Chart, Planner]]:
    planner = Planner(assets, size, Random(size))
    for _ in range(count):
        scene = planner.empty("charts")
        yield scene, charts.plan_chart(planner, scene), planner


def _bars(scene: scenes.Scene) -> list[scenes.Box]:
    return [box for box in scene.boxes if box.colour_name]


# --- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 448])
def test_bar_lengths_are_proportional_to_values(assets: Assets, size: int):
    for scene, chart, _ in _charts(assets, size, 60):
        bars = _bars(scene)
        upright = max(bar.bottom for bar in bars) - min(bar.bottom for bar in bars) < 1e-3
        lengths = [bar.bottom - bar.top if upright else bar.right - bar.left for bar in bars]
        assert np.allclose(np.divide(lengths, chart.values), lengths[0] / chart.values[0])
        assert [bar.colour_name for bar in bars] == chart.colours
        for bar in bars:
            assert 0 <= bar.left < bar.right <= scene.width and 0 <= bar.top < bar.bottom <= scene.height


@pytest.mark.parametrize("size", [224, 448])
def test_names_and_values_are_at_their_bars_and_inside_the_image(assets: Assets, size: int):
    for scene, chart, planner in _charts(assets, size, 60):
        written = [line.text for line in scene.lines]
        for name, value in zip(chart.names, chart.values, strict=True):
            assert name in written and (str(value) in written or not chart.printed)
        for line in scene.lines:
            end = line.x + planner.advances(line.text, line.face, 0.0).sum() * line.em
            assert line.x >= -1 and end <= scene.width + 1 and line.em * 0.6 <= line.y <= scene.height, line
        for bar, name in zip(_bars(scene), chart.names, strict=True):
            near = min(scene.lines, key=lambda line, bar=bar, name=name: (line.text != name, abs(line.x - bar.left)))
            across, down = near.x - (bar.left + bar.right) / 2, near.y - (bar.top + bar.bottom) / 2
            assert min(abs(across), abs(down)) < size / 4, (near, bar)


def test_chart_answers_match_the_drawn_bars(assets: Assets):
    """Check against the drawn bars, not against the plan."""
    seen = set()
    for scene, chart, planner in _charts(assets, 448, 150):
        bars = _bars(scene)
        area = {
            name: (bar.right - bar.left) * (bar.bottom - bar.top) for name, bar in zip(chart.names, bars, strict=True)
        }
        for _, (forms, answer) in charts.chart_questions(chart, planner.rng):
            if forms == charts.LARGEST:
                assert answer == max(area, key=area.__getitem__) + "."
                seen.add("largest")
            elif forms == charts.SMALLEST:
                assert answer == min(area, key=area.__getitem__) + "."
                seen.add("smallest")
            elif match := re.fullmatch(r"What is the value of (.+)\?", forms[0]):
                assert int(answer[:-1]) == chart.values[chart.names.index(match[1])]
                assert answer[:-1] in [line.text for line in scene.lines], "only printed values should be asked for"
                seen.add("value")
            elif match := re.fullmatch(r"Is (.+) larger than (.+)\?", forms[0]):
                assert (answer == "Yes.") == (area[match[1]] > area[match[2]])
                seen.add("larger")
            elif match := re.fullmatch(r"What colour is the bar of (.+)\?", forms[0]):
                assert answer[:-1].lower() == bars[chart.names.index(match[1])].colour_name
                seen.add("colour")
    assert seen == {"largest", "smallest", "value", "larger", "colour"}


def test_bar_labels_match_drawn_bars(assets: Assets, renderer: Renderer):
    drawn = [scene for scene, _, _ in _charts(assets, 448, 8)]
    out = draw_scenes(renderer, assets, drawn)
    names = scenes.dense_classes(assets.labels)
    for scene, labels, pixels in zip(drawn, out["patch_labels"].view(-1, 32, 32), out["pixel_values"], strict=True):
        for bar in _bars(scene):
            inside = [
                (row, column)
                for row in range(32)
                for column in range(32)
                if bar.left + 1 < column * 14 + 7 < bar.right - 1 and bar.top + 1 < row * 14 + 7 < bar.bottom - 1
            ]
            for row, column in inside:
                found = names[labels[row, column]]
                # A lollipop's disc is drawn over the end of its bar.
                assert found in (f"{bar.colour_name} rectangle", f"{bar.colour_name} circle"), (found, bar)
                colour = (pixels[:, row * 14 + 7, column * 14 + 7] + 1) / 2
                assert (colour - torch.tensor(bar.colour)).abs().max() < 0.03
        bare = labels[-1][labels[-1] != IGNORED]
        assert not any("rectangle" in names[label] for label in bare.tolist()) or scene.height < 448


@pytest.mark.parametrize("style", paint.BAR_STYLES)
def test_every_bar_style_keeps_position_and_colour(style: str):
    canvas = Image.new("RGB", (200, 200), (255, 255, 255))
    paint.paint_box(canvas, scenes.Box(20, 30, 60.5, 90, (0.1, 0.2, 0.8), "blue"), 2.0, style)
    pixels = np.asarray(canvas).astype(int)
    assert np.abs(pixels[120, 80] - [25, 51, 204]).max() < 40
    changed = np.argwhere((pixels < 250).any(2))
    assert changed.min(0).tolist() == pytest.approx([60, 40], abs=1)
    assert changed.max(0).tolist() == pytest.approx([179, 120], abs=1)


# --- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 448])
def test_lines_read_from_top_to_bottom_and_are_inside(assets: Assets, size: int):
    planner = Planner(assets, size, Random(1))
    counts = set()
    for _ in range(80):
        scene = planner.empty("lines")
        forms = documents.plan_lines(planner, scene)
        texts = [line.text for line in sorted(scene.lines, key=lambda line: line.y)]
        assert forms[0][1][1] == "\n".join(texts)
        counts.add(len(texts))
        for line in scene.lines:
            end = line.x + planner.advances(line.text, line.face, 0.0).sum() * line.em * np.cos(line.angle)
            assert line.x >= -3 and end <= scene.width + 3 and line.em >= documents.SMALLEST_EM - 1e-6, line
            assert 0 < line.y <= scene.height and line.text == line.text.strip() and line.text
    assert counts >= {2, 3}


def test_lines_grow(assets: Assets):
    planner = Planner(assets, 448, Random(2))
    lengths = {}
    for grown in (0.0, 1.0):
        drawn = [planner.plan(grown, "lines") for _ in range(60)]
        lengths[grown] = max(len(line.text) for scene in drawn for line in scene.lines)
    assert lengths[0.0] < 20 < lengths[1.0] <= documents.LONGEST


# --- clips -----------------------------------------------------------------------------------------------------------


def _named(way: str) -> set[str]:
    return set(re.findall(r"left|right|up|down", way))


def test_clip_answers_match_the_movement(assets: Assets):
    planner = Planner(assets, 224, Random(3))
    ways = set()
    for _ in range(300):
        story = stories.clip(planner, 5)
        titles = [mark.title for mark in story.scenes[0].marks]
        places = [{mark.title: (mark.x, mark.y) for mark in scene.marks} for scene in story.scenes]
        moved = [title for title in titles if places[0][title] != places[-1][title]]
        assert len(moved) <= 1
        said = ""
        if moved:
            steps = np.diff([place[moved[0]] for place in places], axis=0)
            dx, dy = steps.sum(0)
            near = {
                name
                for name, far in (("left", -dx), ("right", dx), ("up", -dy), ("down", dy))
                if far > 0.38 * np.hypot(dx, dy)
            }
            said = next(way for way in stories.DIRECTIONS if _named(way) == near)
            assert (steps @ [dx, dy] > 0).all(), "all steps should have the same direction"
            assert np.hypot(dx, dy) > 0.25 * min(story.scenes[0].width, story.scenes[0].height)
            ways.add(said)
        things = [story.scenes[0].marks[-1], *story.scenes[0].marks[:-1]]  # the one that moves is drawn last
        for _, (forms, answer) in stories.clip_questions(things, said, planner):
            if forms[0].startswith("Which way"):
                assert answer.lower() == (f"{said}." if moved else stories.STILL.lower())
            elif match := re.fullmatch(r"Does the (.+) move\?", forms[0]):
                assert (answer == "Yes.") == (match[1] in moved)
            elif forms == stories.WHAT_MOVES:
                assert answer == stories.STILL if not moved else moved[0] in answer.lower()
    assert ways == set(stories.DIRECTIONS)


def test_things_in_a_clip_do_not_touch(assets: Assets):
    planner = Planner(assets, 224, Random(4))
    for _ in range(200):
        for scene in stories.clip(planner, 4).scenes:
            for i, a in enumerate(scene.marks):
                assert a.size <= a.x + 1 and a.x + a.size <= scene.width + 1 and a.size <= a.y + 1, a
                assert all(max(abs(a.x - b.x), abs(a.y - b.y)) >= a.size + b.size for b in scene.marks[:i])


def test_clip_text_equals_the_processors(assets: Assets, monkeypatch: pytest.MonkeyPatch):
    """The public processor gives the same prompt for a clip with the same number of frames and times."""
    planner = Planner(assets, 224, Random(5))
    story = next(s for s in iter(lambda: stories.clip(planner, 4), None) if "[" in s.turns[0][0])
    question = story.turns[0][0].rpartition("\n")[2]
    times = [60 * int(stamp[:2]) + int(stamp[3:]) for stamp in re.findall(r"\[(\d\d:\d\d)\]", story.turns[0][0])]
    processor = tokenizer.processor_of_nano()
    frames = [Frame(seconds, ScaledImage.from_array(np.zeros((224, 224, 3), np.uint8))) for seconds in times]
    monkeypatch.setattr("aria.processor.expand.read_clip", lambda *_, **__: frames)
    monkeypatch.setattr("aria.processor.expand.open_media", lambda *_: _Clip())
    message = {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    resolved = resolve_defaults(prompt, processor.image_processor)
    given = str(expand(resolved, processor.image_processor, processor.media).prompt)
    wanted = f"<|im_start|>user\n{story.turns[0][0]}<|im_end|>\n<|im_start|>assistant\n"
    assert given == wanted


class _Clip:
    def identity(self) -> tuple[str, ...]:
        return ("clip",)


# --- several images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "images"), [(stories.several, 5), (stories.search, 30)])
def test_answers_refer_to_the_right_image(assets: Assets, make, images: int):
    planner = Planner(assets, 224, Random(6))
    checked = {"which": 0, "what": 0, "when": 0}
    for _ in range(120 if images < 10 else 40):
        story = make(planner, images)
        shown, _, first = story.turns[0][0].rpartition("<fim_suffix>")
        assert shown.count("<|img|>") == images == len(story.scenes)
        times = re.findall(r"\[(\d\d:\d\d)\]", shown)
        for question, answer in [(first.strip(), story.turns[0][1]), *story.turns[1:]]:
            if match := re.match(
                r"(?i)(?:in )?which (?:image|picture|photo) (?:shows|has|is) an? ([\w ]+)\??$", question
            ):
                place = _place(answer)
                titles = [[mark.title for mark in scene.marks] for scene in story.scenes]
                assert [n for n, found in enumerate(titles) if match[1] in found] == [place]
                checked["which"] += 1
            elif match := re.match(r"(?i)what does (.+) say", question):
                assert story.scenes[_place(match[1])].lines[0].text == answer
                checked["what"] += 1
            elif match := re.match(r"At (\d\d:\d\d)\.$", answer):
                scene = story.scenes[times.index(match[1])]
                named = [mark.title for mark in scene.marks] or [scene.lines[0].text]
                assert named[0] in question
                checked["when"] += 1
    assert checked["which"] and checked["what"] and (checked["when"] or make is stories.several), checked


def _place(name: str) -> int:
    number = re.search(r"\d+", name)
    if number:
        return int(number[0]) - 1
    return next(n for n, word in enumerate(stories.ORDINALS) if word in name.lower())


@pytest.mark.parametrize("kind", ["several", "long"])
def test_batches_of_several_images_have_fixed_shapes_and_a_place_for_each(assets: Assets, kind: str):
    shapes = set()
    for seed in range(4):
        batch = image_batches.make_batch(assets, Random(seed), kind, 96)
        starts = batch["cu_seqlens"].tolist()
        shapes.add((len(batch["input_ids"]), len(starts), len(batch["task"]), len(batch["valid"])))
        ids, labels = batch["input_ids"], batch["labels"]
        assert (ids == tokenizer.IMAGE_TOKEN_ID).sum() == 96 * tokenizer.QUERIES[224]
        assert starts[-1] == len(ids) and max(np.diff(starts)) <= batch["max_seqlen"]
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
        assert torch.equal(
            batch["positions"], torch.cat([torch.arange(end - start) for start, end in pairwise(starts)])
        )
        assert not (labels[batch["num_tokens"] :] != IGNORED).any()
    assert len(shapes) == 1


def test_dealt_numbers_of_images_add_up(assets: Assets):
    for seed in range(50):
        counts = image_batches.deal(512, (2, 6), Random(seed))
        assert sum(counts) == 512 and max(counts) <= 6 and min(counts) >= 2 and len(set(counts)) == 5
    assert image_batches.deal(7, (10, 48), Random(0)) == [7]


def test_plans_refuse_unknown_kinds_and_tasks():
    with pytest.raises(ValueError, match="'medium'"):
        image_batches.Plan(seed=0, cycle=("medium",))
    with pytest.raises(ValueError, match=r"not \['clips'\]"):
        image_batches.Plan(seed=0, shares={"small": {"words": 1, "clips": 1}})


def test_painted_and_rendered_stories_agree(assets: Assets, renderer: Renderer):
    planner = Planner(assets, 224, Random(8))
    painter = paint.Painter([font(20).font_bytes], assets.sprites, assets.photos)
    made = [stories.clip(planner, 3) for _ in range(6)]
    for story in made:
        for scene in story.scenes:
            scene.sensor = (0.0, 1.0, 0.0, 0.0)
            for mark in scene.marks:
                plain = (0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
                mark.look = plain if mark.kind == "sprite" else (*mark.look[:3], 0.0, 0.0, 0.0, 0.0, 0.0)
    drawn = [scene for story in made for scene in story.scenes]
    pixels = (renderer(packed_scenes(drawn, assets))["pixel_values"] + 1) / 2
    painted = [image for n, story in enumerate(made) for image in painter.paint_story(story, 2.0, Random(n))]
    for scene, ours, image in zip(drawn, pixels, painted, strict=True):
        small = image.resize((scene.width, scene.height), Image.Resampling.BICUBIC)
        wanted = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
        assert (ours[:, : scene.height, : scene.width] - wanted).abs().mean() < 0.02
