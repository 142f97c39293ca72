"""Plans bar charts (vertical bars, horizontal bars, lollipops) and questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from recipes.nano.scenes.builder import SceneBuilder
from recipes.nano.scenes.scene import COLOUR_NAMES, SHAPES, Box, Colour, Line, Mark, Scene
from recipes.nano.scenes.shape_questions import Form
from recipes.nano.text import dialogue

LARGEST = (
    *("Which bar is the largest?", "Which bar is the longest?", "Which is the largest?", "What has the most?"),
    *("Which has the highest value?", "Which category is the largest?", "What is the largest bar?"),
)
SMALLEST = (
    *("Which bar is the smallest?", "Which bar is the shortest?", "Which is the smallest?", "What has the least?"),
    *("Which has the lowest value?", "Which category is the smallest?", "What is the smallest bar?"),
)
VALUE = ("What is the value of {}?", "How much is {}?", "What value does {} have?", "How large is {}?", "What is {}?")
LARGEST_VALUE = ("What is the largest value?", "What is the highest value?", "How high is the largest bar?")
WITH_VALUE = ("Which bar has the value {}?", "Which has the value {}?", "What has a value of {}?")
LARGER = ("Is {} larger than {}?", "Is {} higher than {}?", "Does {} have more than {}?")
CATEGORIES = ("List the categories.", "Which categories are there?", "What are the bars called?", "Name the bars.")
TITLE = ("What is the title?", "What is the title of the chart?", "What is the chart about?", "Read the title.")
BAR_COLOUR = ("What colour is the bar of {}?", "What color is {}?", "Which colour has the bar of {}?")
KIND = ("What kind of chart is this?", "What kind of picture is this?")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
CLEAR = 7.0
"""Minimum difference in pixels of two bars that are compared in a question."""
HEAD, WIDEST_HEAD = (
    0.7,
    0.09,
)  # a lollipop's radius: as a share of half a bar's width, and its maximum as a share of the image size
SMALLEST_EM = 19.0  # as in the builder: capitals of about 14 px


@dataclass
class Chart:
    """The content of a chart; ``lengths`` of the bars are in pixels, ``colours`` are names."""

    names: list[str]
    values: list[int]
    lengths: list[float]
    colours: list[str]
    title: str = ""
    printed: bool = True


@dataclass
class Style:
    """The look of a chart: font, ink, grid and axis."""

    face: int
    em: float
    ink: Colour
    ink_name: str
    upright: bool
    heads: bool  # lollipops: thin bars that end in a disc
    grid: Colour | None
    axis: bool
    gap: float  # share of a bar's slot that is empty


def plan_chart(builder: SceneBuilder, scene: Scene, grown: float = 1.0) -> Chart:
    """Lay out a chart in ``scene``, without questions."""
    rng = builder.rng
    if min(scene.width, scene.height) < 0.6 * scene.size:
        scene.width = scene.height = scene.size
    large = scene.size > 224
    count = rng.randint(2, 6 if large else 3)
    colours = _bar_colours(builder, count)
    fills = {name: builder.colour(name) for name in dict.fromkeys(colours)}
    scene.background = builder.background(list(fills.values()), 0.2, calm=True)
    style = _style(builder, scene)
    names = _names(builder, style, count, scene)
    chart = Chart(names, _values(builder, count), [], colours, printed=rng.random() < 0.75)
    left, top, right, bottom = _frame(builder, scene, chart, style)
    (_vertical if style.upright else _horizontal)(builder, scene, chart, style, fills, (left, top, right, bottom))
    return chart


def chart_questions(chart: Chart, rng: Random) -> list[Form]:
    """Return weighted questions about a chart."""
    order = sorted(range(len(chart.names)), key=lambda i: chart.lengths[i])
    forms: list[Form] = [
        (0.3, (dialogue.DESCRIBE, describe_chart(chart))),
        (0.15, (CATEGORIES, f"{', '.join(chart.names)}.")),
    ]
    if chart.lengths[order[-1]] - chart.lengths[order[-2]] >= CLEAR:
        forms.append((1.0, (LARGEST, f"{chart.names[order[-1]]}.")))
    if chart.lengths[order[1]] - chart.lengths[order[0]] >= CLEAR:
        forms.append((0.6, (SMALLEST, f"{chart.names[order[0]]}.")))
    a, b = rng.sample(range(len(chart.names)), 2)
    if abs(chart.lengths[a] - chart.lengths[b]) >= CLEAR:
        answer = "Yes." if chart.lengths[a] > chart.lengths[b] else "No."
        forms.append((0.3, (_fill(LARGER, chart.names[a], chart.names[b]), answer)))
    if chart.printed:
        forms.append((1.2, (_fill(VALUE, chart.names[a]), f"{chart.values[a]}.")))
        forms.append((0.3, (LARGEST_VALUE, f"{max(chart.values)}.")))
        if chart.values.count(chart.values[b]) == 1:
            forms.append((0.3, (_fill(WITH_VALUE, str(chart.values[b])), f"{chart.names[b]}.")))
    forms.append((0.3, (_fill(dialogue.COUNT, "bars"), dialogue.count_answer(len(chart.names), "bar"))))
    forms.append((0.25, (_fill(BAR_COLOUR, chart.names[a]), dialogue.sentence(chart.colours[a]))))
    forms.append((0.05, (KIND, "A bar chart.")))
    if chart.title:
        forms.append((0.25, (TITLE, f"{chart.title}.")))
    return forms


def describe_chart(chart: Chart) -> str:
    """Return 'A bar chart "Sales": Jan 12, Feb 7 and Mar 20.' and the like; without printed values, only names."""
    title = f' "{chart.title}"' if chart.title else ""
    bars = [f"{name} {value}" if chart.printed else name for name, value in zip(chart.names, chart.values, strict=True)]
    return f"A bar chart{title}: {dialogue.listing(bars)}."


def _fill(forms: Sequence[str], *values: str) -> list[str]:
    return [form.format(*values) for form in forms]


# --- content --------------------------------------------------------------------------------------------------------


def _bar_colours(builder: SceneBuilder, count: int) -> list[str]:
    rng = builder.rng
    if rng.random() < 0.45:
        return [rng.choice(COLOUR_NAMES)] * count
    return rng.sample(COLOUR_NAMES, count)


def _values(builder: SceneBuilder, count: int) -> list[int]:
    """Draw whole numbers of similar size; the largest is at most about ten times the smallest."""
    rng = builder.rng
    most = rng.choice((9, 20, 50, 100, 100, 500, 1000))
    unit = 1 if most <= 100 or rng.random() < 0.5 else 10
    return [max(1, rng.randint(most // 10, most) // unit * unit) for _ in range(count)]


def _names(builder: SceneBuilder, style: Style, count: int, scene: Scene) -> list[str]:
    """Draw different names that fit: a slot of a vertical chart, a third of the width of a horizontal one."""
    rng = builder.rng
    max_width = scene.width * 0.86 / count * 0.92 if style.upright else scene.width * 0.34
    kind = rng.random()
    if kind < 0.12:
        start = rng.randrange(12)
        names = [MONTHS[(start + n) % 12] for n in range(count)]
    elif kind < 0.2:
        start = rng.randrange(7)
        names = [DAYS[(start + n) % 7] for n in range(count)]
    elif kind < 0.28:
        start = rng.randint(1980, 2030)
        names = [str(start + n) for n in range(count)]
    elif kind < 0.36:
        start = rng.randrange(20)
        names = [chr(65 + start + n) for n in range(count)]
    else:
        return _words(builder, style, count, max_width)
    if max(builder.advances(name, style.face, 0.0).sum() for name in names) * style.em > max_width:
        names = [chr(65 + n) for n in range(count)]
    return names


def _words(builder: SceneBuilder, style: Style, count: int, max_width: float) -> list[str]:
    rng = builder.rng
    names: list[str] = []
    capital = rng.random() < 0.7
    for tries in range(400):
        word = rng.choice(builder.assets.words)
        word = word.capitalize() if capital else word
        if tries > 200:
            word = word[: max(1, 4 - tries // 120)]
        if word.lower() in (name.lower() for name in names):
            continue
        if builder.advances(word, style.face, 0.0).sum() * style.em <= max_width:
            names.append(word)
            if len(names) == count:
                return names
    return [chr(65 + n) for n in range(count)]


# --- look ------------------------------------------------------------------------------------------------------------


def _style(builder: SceneBuilder, scene: Scene) -> Style:
    rng = builder.rng
    paper = scene.background[1:4]
    light = 0.3 * paper[0] + 0.59 * paper[1] + 0.11 * paper[2]
    name = "black" if light > 0.45 else "white"
    ink = builder.colour(name)
    upright = rng.random() < 0.7
    em = rng.uniform(SMALLEST_EM, SMALLEST_EM * (1.35 if scene.size > 224 else 1.1))
    grey = tuple(0.75 * p + 0.25 * i for p, i in zip(paper, ink, strict=True))
    return Style(
        face=rng.choice(rng.choice(builder.faces)),
        em=em,
        ink=ink,
        ink_name=name,
        upright=upright,
        heads=rng.random() < 0.12,
        grid=(grey[0], grey[1], grey[2]) if rng.random() < 0.45 else None,
        axis=rng.random() < 0.75,
        gap=rng.uniform(0.2, 0.55),
    )


def _frame(builder: SceneBuilder, scene: Scene, chart: Chart, style: Style) -> tuple[float, float, float, float]:
    """Return the area left by margins and title: left, top, right, bottom."""
    rng = builder.rng
    margin = scene.size * rng.uniform(0.025, 0.06)
    left, top, right, bottom = margin, margin, scene.width - margin, scene.height - margin
    if rng.random() < (0.6 if scene.size > 224 else 0.3):
        em = min(style.em * rng.uniform(1.0, 1.4), 0.1 * scene.size)
        chart.title = _title(builder, style.face, (right - left) / em)
        width = builder.advances(chart.title, style.face, 0.0).sum() * em
        x = left + (right - left - width) * rng.choice((0.0, 0.5, 0.5))
        _write(scene, style, chart.title, x, top + em * 0.9, em)
        top += em * 1.45
    return left, top, right, bottom


def _title(builder: SceneBuilder, face: int, max_width: float) -> str:
    rng = builder.rng
    for _ in range(50):
        words = [rng.choice(builder.assets.words) for _ in range(rng.choice((1, 1, 2, 3)))]
        title = " ".join([words[0].capitalize(), *words[1:]])
        if len(title) <= 32 and builder.advances(title, face, 0.0).sum() <= max_width:
            return title
    return "Sum"


def _write(scene: Scene, style: Style, text: str, x: float, y: float, em: float = 0.0) -> None:
    scene.lines.append(Line(text, style.face, em or style.em, x, y, 0.0, 0.0, style.ink, style.ink_name))


def _ticks(chart: Chart, builder: SceneBuilder) -> tuple[float, list[int]]:
    """Return the value at the end of the axis, and the values of the grid lines."""
    most = max(chart.values)
    step = next(s for base in (1, 10, 100, 1000) for s in (base, 2 * base, 5 * base) if most / s <= 6)
    last = -(-most // step)
    return max(last * step, most * builder.rng.uniform(1.0, 1.1)), [n * step for n in range(1, last + 1)]


def _vertical(
    builder: SceneBuilder,
    scene: Scene,
    chart: Chart,
    style: Style,
    fills: dict[str, Colour],
    frame: tuple[float, float, float, float],
) -> None:
    left, top, right, bottom = frame
    em, face = style.em, style.face
    end, ticks = _ticks(chart, builder)
    floor = bottom - em * 1.35
    top += em * 1.25 if chart.printed else 0.0
    if style.heads:  # room for the disc of the longest bar
        top += HEAD * min((right - left) / len(chart.names) * (1 - style.gap) / 2, WIDEST_HEAD * scene.size)
    high = floor - top
    wanted = style.grid and scene.size > 224 and builder.rng.random() < 0.6
    if wanted:  # labels of the axis, few enough not to touch, narrow the area
        ticks = ticks[:: max(1, -(-int(len(ticks) * em * 1.3) // max(int(high), 1)))]
        wide = max(builder.advances(str(tick), face, 0.0).sum() for tick in ticks) * em
        for tick in ticks:
            own = builder.advances(str(tick), face, 0.0).sum() * em
            _write(scene, style, str(tick), left + wide - own, floor - high * tick / end + em * 0.34)
        left += wide + em * 0.4
    slot = (right - left) / len(chart.names)
    if max(builder.advances(name, face, 0.0).sum() for name in chart.names) * em > slot * 0.96:
        chart.names[:] = [chr(65 + n) for n in range(len(chart.names))]
    if style.grid:
        for tick in ticks:
            y = floor - high * tick / end
            scene.boxes.append(Box(left, y - 0.6, right, y + 0.6, style.grid, layer=0))
    if style.axis:
        scene.boxes.append(Box(left, floor, right, floor + builder.rng.uniform(1.0, 2.5), style.ink))
    for n, (name, value, colour) in enumerate(zip(chart.names, chart.values, chart.colours, strict=True)):
        middle, tall = left + slot * (n + 0.5), high * value / end
        chart.lengths.append(tall)
        half = slot * (1 - style.gap) / 2
        _bar(scene, style, fills[colour], colour, middle, floor, half, tall)
        own = builder.advances(name, face, 0.0).sum() * em
        _write(scene, style, name, middle - own / 2, floor + em * 1.05)
        if chart.printed:
            own = builder.advances(str(value), face, 0.0).sum() * em
            lift = HEAD * min(half, WIDEST_HEAD * scene.size) if style.heads else 0.0
            _write(scene, style, str(value), middle - own / 2, floor - tall - lift - em * 0.34)


def _horizontal(
    builder: SceneBuilder,
    scene: Scene,
    chart: Chart,
    style: Style,
    fills: dict[str, Colour],
    frame: tuple[float, float, float, float],
) -> None:
    left, top, right, bottom = frame
    em, face = style.em, style.face
    slot = (bottom - top) / len(chart.names)
    wide = max(builder.advances(name, face, 0.0).sum() for name in chart.names) * em
    start = left + wide + em * 0.45
    widest = max(builder.advances(str(value), face, 0.0).sum() for value in chart.values) * em
    long = right - start - (widest + em * 0.6 if chart.printed else 0.0)
    if style.heads:
        long -= HEAD * min(slot * (1 - style.gap) / 2, WIDEST_HEAD * scene.size)
    end, ticks = _ticks(chart, builder)
    if style.grid:
        for tick in ticks:
            x = start + long * tick / end
            scene.boxes.append(Box(x - 0.6, top, x + 0.6, bottom, style.grid, layer=0))
    if style.axis:
        scene.boxes.append(Box(start - builder.rng.uniform(1.0, 2.5), top, start, bottom, style.ink))
    for n, (name, value, colour) in enumerate(zip(chart.names, chart.values, chart.colours, strict=True)):
        middle, length = top + slot * (n + 0.5), long * value / end
        chart.lengths.append(length)
        half = slot * (1 - style.gap) / 2
        _bar(scene, style, fills[colour], colour, middle, start, half, length)
        own = builder.advances(name, face, 0.0).sum() * em
        _write(scene, style, name, start - em * 0.35 - own, middle + em * 0.34)
        if chart.printed:
            lift = HEAD * min(half, WIDEST_HEAD * scene.size) if style.heads else 0.0
            _write(scene, style, str(value), start + length + lift + em * 0.3, middle + em * 0.34)


def _bar(
    scene: Scene, style: Style, fill: Colour, colour: str, middle: float, foot: float, half: float, length: float
) -> None:
    """Add a bar from ``foot`` upwards or to the right; a lollipop is a thin bar that ends in a disc."""
    half = min(half, WIDEST_HEAD * scene.size) if style.heads else half
    thin = max(1.0, half * 0.18) if style.heads else half
    if style.upright:
        scene.boxes.append(Box(middle - thin, foot - length, middle + thin, foot, fill, colour))
    else:
        scene.boxes.append(Box(foot, middle - thin, foot + length, middle + thin, fill, colour))
    if style.heads:
        x, y = (middle, foot - length) if style.upright else (foot + length, middle)
        look = (*fill, 0.0, 0.0, 0.0, 0.0, 0.0)
        disc = Mark("shape", SHAPES.index("circle"), x, y, half * HEAD, 0.0, 1.0, look, "circle", colour)
        scene.marks.append(disc)
