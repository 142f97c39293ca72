"""Plans conversations about several images: clips of moving shapes, images side by side, one image among many.

Images are placed in the text as the processor does it: each frame of a clip between its ``[MM:SS]`` and a newline,
other images wherever the user's text has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

from recipes.nano.scenes.builder import SceneBuilder
from recipes.nano.scenes.scene import COLOUR_NAMES, IMAGE, SHAPES, Mark, Scene, Story
from recipes.nano.scenes.shape_questions import Form, describe_shapes
from recipes.nano.text import dialogue

# --- clips -----------------------------------------------------------------------------------------------------------

DIRECTIONS = {  # unit steps, y down
    "to the left": (-1.0, 0.0),
    "to the right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up and to the left": (-0.7071, -0.7071),
    "up and to the right": (0.7071, -0.7071),
    "down and to the left": (-0.7071, 0.7071),
    "down and to the right": (0.7071, 0.7071),
}
WAY = (
    *("Which way does {} move?", "In which direction does {} move?", "Which direction does {} go?"),
    *("Where does {} move?", "Which way is {} going?", "In what direction is {} moving?"),
)
WHAT_MOVES = ("What moves?", "What is moving?", "Which thing moves?", "What moves in this clip?")
DOES_MOVE = ("Does {} move?", "Is {} moving?")
WHAT_STAYS = ("What stays where it is?", "What does not move?", "What stands still?")
HAPPENS = (
    *("What happens?", "What happens in this clip?", "Describe the clip.", "What does the clip show?"),
    *("Describe what happens.", "What happens in the video?", "Describe the video.", "What do you see in this clip?"),
)
STILL = "Nothing moves."
SECONDS = (0.2, 0.5, 1.0, 1.0, 1.0, 2.0, 3.0, 5.0, 10.0)
"""Seconds between two frames of a clip."""


def clip(builder: SceneBuilder, frames: int) -> Story:
    """Plan a clip in which one thing moves straight and evenly, or nothing does, and up to two others stand still."""
    rng = builder.rng
    scene = _stage(builder, "clips")
    moves = rng.random() < 0.9
    others = rng.choices((0, 1, 2), (0.55, 0.3, 0.15))[0] if moves else rng.choice((1, 1, 2))
    things = _things(builder, scene, others + 1, smallest=0.07, largest=0.19 if others < 2 else 0.14)
    way = rng.choice(tuple(DIRECTIONS)[: 4 if rng.random() < 0.75 else 8])
    path = _path(builder, scene, things, way, frames if moves else 1)
    scenes = []
    for n in range(frames):
        frame = copy(scene)
        x, y = path[min(n, len(path) - 1)]
        first = copy(things[0])
        first.x, first.y = x, y
        frame.marks = [*things[1:], first]
        scenes.append(frame)
    forms = clip_questions(things, way if moves else "", builder)
    return Story("clips", scenes, _turns(builder, _frames_text(builder, frames), forms, (1, 2, 3)))


def clip_questions(things: Sequence[Mark], way: str, builder: SceneBuilder) -> list[Form]:
    """Return questions about a clip in which the first of ``things`` moves ``way``; "" means that nothing moves."""
    rng = builder.rng
    names = [thing.title for thing in things]
    first = rng.choice([names[0], things[0].name] if _only(things, things[0].name) else [names[0]])
    forms: list[Form] = [(0.7, (HAPPENS, describe_clip(things, way)))]
    forms.append((0.4, (WHAT_MOVES, dialogue.sentence(dialogue.with_article(names[0])) if way else STILL)))
    asked = [form.format(f"the {first}") for form in WAY]
    if len(things) == 1:
        asked += [form.format("it") for form in WAY]
    forms.append((1.6, (asked, dialogue.sentence(way))) if way else (0.3, (asked, STILL)))
    which = rng.randrange(len(things))
    answer = "Yes." if way and which == 0 else "No."
    forms.append((0.3, ([form.format(f"the {names[which]}") for form in DOES_MOVE], answer)))
    if way and len(things) == 2:
        forms.append((0.3, (WHAT_STAYS, dialogue.sentence(dialogue.with_article(names[1])))))
    if things[0].colour_name and _only(things, things[0].name):
        asked = [form.format(things[0].name) for form in dialogue.COLOUR_OF]
        forms.append((0.3, (asked, dialogue.sentence(things[0].colour_name))))
    return forms


def describe_clip(things: Sequence[Mark], way: str) -> str:
    """Return a sentence such as "A red circle moves to the left.", followed by what stays in place."""
    stay = [dialogue.with_article(thing.title) for thing in (things[1:] if way else things)]
    first = f"{dialogue.with_article(things[0].title)} moves {way}" if way else ""
    second = f"{dialogue.listing(stay)} {'stay' if len(stay) > 1 else 'stays'} in place" if stay else ""
    return " ".join(dialogue.sentence(part) for part in (first, second) if part)


def _only(things: Sequence[Mark], name: str) -> bool:
    return sum(thing.name == name for thing in things) == 1


def _stage(builder: SceneBuilder, task: str) -> Scene:
    """Return an empty scene, roughly square, with the camera effects drawn."""
    scene = builder.empty(task)
    if min(scene.width, scene.height) < 0.55 * scene.size:
        scene.width = scene.height = scene.size
    scene.sensor = builder.sensor()
    return scene


def _things(builder: SceneBuilder, scene: Scene, count: int, smallest: float, largest: float) -> list[Mark]:
    """Draw shapes or, less often, emoji with different titles, not yet placed; sets the background."""
    rng = builder.rng
    marks: list[Mark] = []
    while len(marks) < count:
        # No clouds: they are drawn anew for every image, and a clip's background must not move.
        mark = builder.thing(scene.size * rng.uniform(smallest, largest), sprite=rng.random() < 0.2)
        if all(mark.title != other.title for other in marks):
            marks.append(mark)
    scene.background = builder.background([_fill(mark) for mark in marks if mark.kind == "shape"], 0.22, calm=True)
    return marks


def _fill(mark: Mark) -> tuple[float, float, float]:
    return mark.look[0], mark.look[1], mark.look[2]


def _path(
    builder: SceneBuilder, scene: Scene, things: Sequence[Mark], way: str, frames: int
) -> list[tuple[float, float]]:
    """Return the positions of the first thing, one per frame, and place the others off its path."""
    rng, mover = builder.rng, things[0]
    dx, dy = DIRECTIONS[way]
    for _ in range(200):
        turn = rng.gauss(0, 0.07)
        step_x, step_y = dx * math.cos(turn) - dy * math.sin(turn), dx * math.sin(turn) + dy * math.cos(turn)
        length = min(scene.width, scene.height) * rng.uniform(0.3, 0.75) if frames > 1 else 0.0
        half_x, half_y = abs(step_x) * length / 2 + mover.size * 1.1, abs(step_y) * length / 2 + mover.size * 1.1
        if 2 * half_x > scene.width or 2 * half_y > scene.height:
            continue
        x, y = rng.uniform(half_x, scene.width - half_x), rng.uniform(half_y, scene.height - half_y)
        shares = [
            (n + (rng.uniform(-0.12, 0.12) if 0 < n < frames - 1 else 0)) / max(frames - 1, 1) for n in range(frames)
        ]
        path = [(x + step_x * length * (s - 0.5), y + step_y * length * (s - 0.5)) for s in shares]
        if _settle(builder, scene, things, path):
            return path
    # The others do not fit beside the path.
    return _fallback(scene, things, (dx, dy), frames)


def _settle(builder: SceneBuilder, scene: Scene, things: Sequence[Mark], path: Sequence[tuple[float, float]]) -> bool:
    """Place all things but the first off the path and apart from each other; False if they do not fit."""
    rng = builder.rng
    taken = [(x, y, things[0].size) for x, y in path]
    for thing in things[1:]:
        for _ in range(12):
            x, y = rng.uniform(thing.size, scene.width - thing.size), rng.uniform(thing.size, scene.height - thing.size)
            if all(max(abs(x - a), abs(y - b)) > (thing.size + s) * 1.1 + 2 for a, b, s in taken):
                thing.x, thing.y = x, y
                taken.append((x, y, thing.size))
                break
        else:
            return False
    return True


def _fallback(
    scene: Scene, things: Sequence[Mark], step: tuple[float, float], frames: int
) -> list[tuple[float, float]]:
    """Make everything small: the mover crosses the middle, the others are in corners off its path."""
    for thing in things:
        thing.size = 0.06 * scene.size
    margin = 0.08 * scene.size
    corners = [(margin, margin), (scene.width - margin, scene.height - margin)]
    if step[0] * step[1] > 0:
        corners = [(scene.width - margin, margin), (margin, scene.height - margin)]
    for thing, (x, y) in zip(things[1:], corners, strict=False):
        thing.x, thing.y = x, y
    reach = 0.6 * min(scene.width, scene.height) if frames > 1 else 0.0
    shares = [n / max(frames - 1, 1) - 0.5 for n in range(frames)]
    return [(scene.width / 2 + step[0] * reach * s, scene.height / 2 + step[1] * reach * s) for s in shares]


def stamps(builder: SceneBuilder, frames: int) -> list[str]:
    """Return ``MM:SS`` of evenly spaced frames."""
    gap = builder.rng.choice(SECONDS)
    return [f"{int(n * gap) // 60:02d}:{int(n * gap) % 60:02d}" for n in range(frames)]


def _frames_text(builder: SceneBuilder, frames: int) -> str:
    if builder.rng.random() < 0.15:  # a clip without timestamps
        return IMAGE * frames + "\n"
    return "".join(f"[{stamp}]{IMAGE}\n" for stamp in stamps(builder, frames))


# --- several images --------------------------------------------------------------------------------------------------

WHAT_IS_IN = ("What is in {}?", "What does {} show?", "Describe {}.", "What do you see in {}?", "What is shown in {}?")
READ_IN = ("What does {} say?", "Read the text in {}.", "What is written in {}?", "What word is in {}?")
WHICH_SHOWS = ("Which {noun} shows {what}?", "In which {noun} is {what}?", "Which {noun} has {what}?")
WHICH_SAYS = (
    "Which {noun} says {what}?",
    'In which {noun} is the word "{what}"?',
    'Which {noun} has the text "{what}"?',
)
IS_IN = ("Is there {what} in {where}?", "Does {where} show {what}?")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def several(builder: SceneBuilder, images: int) -> Story:
    """Plan images of different things, numbered in the text or not, and questions about one of them."""
    rng = builder.rng
    scenes, titles = _different(builder, images, ("shapes", "emoji", "words", "pair"), (0.35, 0.25, 0.3, 0.1))
    noun = rng.choice(("image", "picture", "picture", "photo"))
    numbered = images > len(ORDINALS) or rng.random() < 0.6
    where = [f"{noun} {n + 1}" if numbered else f"the {ORDINALS[n]} {noun}" for n in range(images)]
    if numbered:
        form = rng.choice(("{0} {1}: {2}\n", "{0} {1}:\n{2}\n", "{0} {1}: {2} ", "{0} {1}{2}\n"))
        shown = "".join(form.format(noun.capitalize(), n + 1, IMAGE) for n in range(images))
    else:
        shown = IMAGE * images + rng.choice(("", "", "\n"))
    forms = [form for n in range(images) for form in _about(builder, scenes, titles, n, where, noun, 1.0 / images)]
    if images <= 6:
        forms.append(
            (
                0.15,
                (
                    [form.format(dialogue.plural(noun)) for form in dialogue.COUNT[:2]],
                    dialogue.count_answer(images, noun),
                ),
            )
        )
    return Story("several", scenes, _turns(builder, shown, forms, (1, 2, 3)))


def _different(
    builder: SceneBuilder, count: int, kinds: Sequence[str], weights: Sequence[float]
) -> tuple[list[Scene], list[str]]:
    """Plan scenes of one thing each (or of two shapes) with different titles; return them and the titles."""
    rng = builder.rng
    scenes: list[Scene] = []
    titles: list[str] = []
    while len(scenes) < count:
        scene, title = _simple(builder, rng.choices(kinds, weights)[0])
        if title not in titles or len(titles) > 40 + len(set(titles)):
            scenes.append(scene)
            titles.append(title)
    return scenes, titles


def _simple(builder: SceneBuilder, kind: str) -> tuple[Scene, str]:
    """Plan a scene of one thing; return it and its title: "red circle", the emoji's label, the word."""
    rng = builder.rng
    if kind == "words":
        scene = builder.empty("words")
        builder.place_lines(scene, [builder.text(9)], rng.choice(rng.choice(builder.faces)))
        title = scene.lines[0].text
    elif kind == "emoji":
        scene = builder.empty("emoji")
        styles, pool = builder.assets.num_styles, len(builder.assets.emoji)
        builder.place_emoji(scene, [rng.randrange(styles) * pool + rng.choice(builder.things)])
        title = scene.marks[0].name
    else:
        scene = builder.empty("shapes")
        count = 2 if kind == "pair" else 1
        builder.place_shapes(scene, [rng.choice(SHAPES) for _ in range(count)], rng.choices(COLOUR_NAMES, k=count))
        title = scene.marks[0].title if count == 1 else describe_shapes(scene.marks)
    scene.sensor = builder.sensor()
    return scene, title


def describe(scene: Scene) -> str:
    """Return the description of an image of one thing, the same as for that image alone."""
    if scene.lines:
        return dialogue.describe_lines([line.text for line in scene.lines])
    if scene.marks[0].kind == "sprite":
        return dialogue.describe_emoji([mark.name for mark in scene.marks])
    return describe_shapes(scene.marks)


def _about(
    builder: SceneBuilder,
    scenes: Sequence[Scene],
    titles: Sequence[str],
    n: int,
    where: Sequence[str],
    noun: str,
    weight: float,
) -> list[Form]:
    """Return questions about image ``n`` among others."""
    rng, scene, title = builder.rng, scenes[n], titles[n]
    forms: list[Form] = [(weight, ([form.format(where[n]) for form in WHAT_IS_IN], describe(scene)))]
    answer = dialogue.sentence(where[n])
    if scene.lines:
        forms.append((weight, ([form.format(where[n]) for form in READ_IN], title)))
        if titles.count(title) == 1:
            forms.append((weight, ([form.format(noun=noun, what=title) for form in WHICH_SAYS], answer)))
        return forms
    if len(scene.marks) > 1:
        return forms
    what = dialogue.with_article(title)
    if not any(mark.title == title for other in scenes if other is not scene for mark in other.marks):
        forms.append((1.6 * weight, ([form.format(noun=noun, what=what) for form in WHICH_SHOWS], answer)))
    other = rng.randrange(len(scenes))
    there = any(mark.title == title for mark in scenes[other].marks)
    asked = [form.format(what=what, where=where[other]) for form in IS_IN]
    forms.append((0.3 * weight, (asked, "Yes." if there else "No.")))
    return forms


# --- one thing among many --------------------------------------------------------------------------------------------

WHEN = ("When does {} appear?", "At what time do you see {}?", "When is {} shown?", "At which time is there {}?")

AT_TIME = ("What is in the clip at {}?", "What do you see at {}?", "What is shown at {}?")


def search(builder: SceneBuilder, images: int) -> Story:
    """Plan many images, numbered or as frames of a clip, and questions that one of them answers."""
    rng = builder.rng
    scenes, titles = _different(builder, images, ("shapes", "emoji", "words"), (0.5, 0.2, 0.3))
    if rng.random() < 0.3:  # a few repeated, and one that differs
        scenes, titles = _one_among(builder, scenes, titles)
    if rng.random() < 0.4:
        gap = rng.choice((1, 1, 2, 5))
        times = [f"{n * gap // 60:02d}:{n * gap % 60:02d}" for n in range(images)]
        shown = "".join(f"[{time}]{IMAGE}\n" for time in times)
        forms = [form for n in range(images) for form in _at_time(scenes, titles, n, times[n])]
    else:
        noun = rng.choice(("image", "picture", "picture", "photo"))
        where = [f"{noun} {n + 1}" for n in range(images)]
        shown = "".join(f"{noun.capitalize()} {n + 1}: {IMAGE}\n" for n in range(images))
        weights = [1.0 / titles.count(title) for title in titles]
        forms = [form for n in range(images) for form in _about(builder, scenes, titles, n, where, noun, weights[n])]
    return Story("search", scenes, _turns(builder, shown, forms, (3, 4, 5)))


def _one_among(builder: SceneBuilder, scenes: list[Scene], titles: list[str]) -> tuple[list[Scene], list[str]]:
    """Repeat a few of the scenes, with one that occurs only once."""
    rng, count = builder.rng, len(scenes)
    common, needle = rng.randint(1, 3), rng.randrange(count)
    chosen = [rng.randrange(1, common + 1) % count for _ in range(count)]
    chosen[needle] = 0
    return [copy(scenes[i]) for i in chosen], [titles[i] for i in chosen]


def _at_time(scenes: Sequence[Scene], titles: Sequence[str], n: int, time: str) -> list[Form]:
    scene, title = scenes[n], titles[n]
    asked = [form.format(time) for form in AT_TIME]
    forms: list[Form] = [(1.0 / titles.count(title), (asked, describe(scene)))]
    if titles.count(title) == 1:
        what = f'the text "{title}"' if scene.lines else dialogue.with_article(title)
        forms.append((1.6, ([form.format(what) for form in WHEN], f"At {time}.")))
    return forms


def _turns(builder: SceneBuilder, shown: str, forms: Sequence[Form], counts: Sequence[int]) -> list[tuple[str, str]]:
    """Choose some of the questions as turns; ``shown`` precedes the first."""
    rng = builder.rng
    count = rng.choice(counts)
    order = sorted(forms, key=lambda form: rng.random() ** (1.0 / form[0]), reverse=True)[:count]
    turns = [(dialogue.asked(questions, rng), answer) for _, (questions, answer) in order]
    question, answer = turns[0]
    return [(shown + question, answer), *turns[1:]]
