"""Wordings of questions about images and of their answers, small talk, and the chat format of training.

Every question about a scene has exactly one right answer, so evaluation compares exactly.
"""

from collections.abc import Sequence
from random import Random

NOT_SURE = "I am not sure what this is."
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

# Paraphrases that share one answer.
READ = (
    *("What does it say?", "Read the text.", "What is written here?", "What text is in the picture?", "Read this."),
    *("What does the text say?", "Transcribe the text.", "What is written in the picture?", "Read it to me."),
    *("Can you read this?", "What words are in the picture?", "What word is this?", "Which word is shown?"),
    *("What does this say?", "Please read the text in the image.", "What is the text?", "Type out the text."),
)
DESCRIBE = (
    *("What is in this picture?", "Describe this picture.", "What do you see?", "What is this?", "Describe the image."),
    *("What does the picture show?", "What is shown here?", "What can you see in the image?", "What is it?"),
    *("Tell me what you see.", "Describe what you see.", "What is in the image?", "What is in this image?"),
    *("Describe this.", "What's in this picture?", "What's this?", "Please describe the picture.", "Describe it."),
)
NAME_EMOJI = (
    *("What emoji is this?", "Which emoji is shown?", "Name this emoji.", "Which emoji is this?", "Name the emoji."),
    *("What is the name of this emoji?", "What is this emoji called?", "Identify the emoji.", "What emoji do you see?"),
)
LIST_EMOJI = (
    *("Which emoji are these?", "List the emoji from left to right.", "Name the emoji.", "What emoji are shown?"),
    *("List the emoji.", "Name the emoji from left to right.", "Which emoji do you see?", "What emoji do you see?"),
)
COUNT = ("How many {} are there?", "How many {} do you see?", "Count the {}.", "How many {} are in the picture?")
TEXT_COLOUR = (
    *("What colour is the text?", "What color is the text?", "Which colour are the letters?"),
    *("What color are the letters?", "In which colour is it written?"),
)
COLOUR_OF = (
    "What colour is the {}?",
    "What color is the {}?",
    "Which colour is the {}?",
    "What is the colour of the {}?",
)
WHICH_SHAPE = (
    "What shape is it?",
    "What shape is this?",
    "Which shape is shown?",
    "Name the shape.",
    "What shape do you see?",
)
SHAPE_IN_COLOUR = ("What shape is {}?", "Which shape is {}?", "What is the {} shape?", "What {} shape is there?")
BESIDE = ("What is {place} the {what}?", "Which shape is {place} the {what}?", "What do you see {place} the {what}?")
WHERE = ("Where is the {}?", "Where is the {} in the picture?", "What is the position of the {}?")
IS_THERE = ("Is there a {}?", "Do you see a {}?", "Is there a {} in the picture?", "Can you see a {}?")
IS_BESIDE = ("Is the {a} {place} the {b}?",)
PLACES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
NO_TEXT, NO_EMOJI, NO_SHAPES = "There is no text.", "There is no emoji.", "There are no shapes."

# Talk without an image: what people say -> what nano answers.
CAN_DO = (
    "I can read words and charts, name shapes, colours and emoji, count a few shapes, say where they are and how they "
    "move, explain some words and add small numbers. When I do not know something I say so."
)
NO_PICTURE = "I see no picture. Show me one."
UNKNOWN_FACT = "I do not know that."
I_AM = "I am nano, a small Aria model that looks at pictures."
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hi", "Hey", "Hello!", "Hi there", "Hi!", "Hello there", "Hey there!", "Greetings"),
        "Hello! Show me a picture.",
    ),
    (("Good morning", "Good morning!", "Morning"), "Good morning! Show me a picture."),
    (("Good evening", "Good evening!", "Good afternoon", "Good afternoon!"), "Good day! Show me a picture."),
    (("Who are you?", "What are you?", "Tell me about yourself.", "What is your name?", "Are you Aria?"), I_AM),
    (("What model are you?", "Which model is this?", "Introduce yourself.", "Who am I talking to?"), I_AM),
    (("What can you do?", "Help", "How can you help me?", "What are you able to do?", "Help me", "help"), CAN_DO),
    (("What do you know?", "What can I ask you?", "How do I use you?", "What should I ask?"), CAN_DO),
    (
        ("How are you?", "How are you doing?", "How do you do?", "How is it going?"),
        "I am well, thank you. Show me a picture.",
    ),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot", "Many thanks", "Thanks!", "Cheers"), "You are welcome."),
    (("Bye", "Goodbye", "Bye!", "See you", "See you later", "Good night", "Goodbye!"), "Goodbye!"),
    (("Great", "Well done", "Good job", "Nice", "Very good", "Correct", "That is right", "Perfect"), "Thank you!"),
    (
        ("That is wrong", "Wrong", "No", "That is not right", "Incorrect", "You are wrong"),
        "I am sorry. I am a small model and make mistakes.",
    ),
    (("Ok", "Okay", "I see", "Alright", "Fine"), "Show me a picture when you like."),
    (
        ("Can you see?", "Can you see pictures?", "Do you understand images?", "Are you able to see?"),
        "Yes, I look at pictures and at short clips.",
    ),
    (("Can you read?", "Are you able to read?", "Can you read text?"), "Yes, I read printed words in a picture."),
    (("Can you count?", "How far can you count?"), "I count up to six shapes in a picture."),
    (("Can you name emoji?", "Do you know emoji?", "Do you like emoji?"), "Yes, I know many emoji by name."),
    (
        ("Which colours do you know?", "What colors do you know?", "Name some colours."),
        "Red, orange, yellow, green, blue, purple, pink, brown, black, white and grey.",
    ),
    (
        ("Which shapes do you know?", "What shapes do you know?", "Name some shapes."),
        "Circle, square, triangle, rectangle, star, heart, pentagon, hexagon, diamond, oval, cross and arrow.",
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "Who built you?"),
        "The aria project trained me on pictures that it drew.",
    ),
    (
        ("How big are you?", "How many parameters do you have?", "Are you large?", "What size are you?"),
        "I am small: about twenty million parameters.",
    ),
    (
        ("What is Aria?", "Tell me about Aria.", "Explain Aria."),
        "Aria is an open mixture-of-experts model that understands pictures and text. I am a small one.",
    ),
    (("Are you human?", "Are you a person?", "Are you a robot?", "Are you real?"), "No, I am a small model."),
    (
        ("Tell me a joke", "Tell me a joke.", "Make me laugh", "Say something funny"),
        "I only know pictures, and they are quite serious.",
    ),
    (
        ("What is the weather?", "What time is it?", "What day is it?", "What is the news?", "Where am I?"),
        "I only know what is in a picture. Show me one.",
    ),
    (
        ("Write a poem", "Write code", "Write an essay", "Translate this", "Solve this", "Tell me a story"),
        "I cannot do that. I look at pictures.",
    ),
    (
        ("What is the capital of France?", "Who is the president?"),
        UNKNOWN_FACT,
    ),
    (
        ("What is in the picture?", "What does it say?", "Describe the picture.", "Describe this image.", "Read this."),
        NO_PICTURE,
    ),
    (
        ("What is this?", "What do you see?", "How many circles are there?", "What emoji is this?"),
        NO_PICTURE,
    ),
    (("Sorry", "I am sorry", "My mistake", "Oops"), "No problem."),
    (("Please", "Please help", "I need help", "I have a question"), "Show me a picture and ask about it."),
    (("Test", "test", "Testing", "Ping", "Are you there?"), "I am here. Show me a picture."),
)
IMAGE_TALK = tuple(entry for entry in SMALL_TALK if entry[1] in ("You are welcome.", "Goodbye!", "Thank you!"))


def count_answer(number: int, singular: str) -> str:
    """Return an answer such as "One circle.", "Three circles." or "There are no circles."."""
    if number == 0:
        return f"There are no {plural(singular)}."
    return f"{NUMBERS[number].capitalize()} {singular if number == 1 else plural(singular)}."


def plural(noun: str) -> str:
    """Return the plural of a shape or of "shape"; "emoji" is unchanged."""
    if noun.endswith("emoji"):
        return noun
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(noun: str) -> str:
    """Return "a dog", "an orange square", "a unicorn" and the like."""
    vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "use", "euro", "one"))
    return f"{'an' if vowel or noun.startswith('8') else 'a'} {noun}"


def listing(items: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def sentence(text: str) -> str:
    """Capitalise the first letter and add a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def describe_lines(lines: Sequence[str]) -> str:
    """Return the description of an image of text."""
    if len(lines) > 1:
        quoted = [f'"{line}"' for line in lines]
        return f"{NUMBERS[len(lines)].capitalize()} lines of text: {listing(quoted)}."
    text = lines[0]
    kind = "word" if text.isalpha() else "number" if text.isdigit() else "text"
    return f'The {kind} "{text}".'


def describe_emoji(labels: Sequence[str]) -> str:
    """Return the description of an image of one to four emoji."""
    if len(labels) == 1:
        return sentence(f"{with_article(labels[0])} emoji")
    return f"{NUMBERS[len(labels)].capitalize()} emoji: {listing(labels)}."


def asked(forms: Sequence[str], rng: Random) -> str:
    """Draw a paraphrase, sometimes typed without a capital or without the final punctuation."""
    question = forms[int(rng.random() * len(forms))]
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    return question


def small_talk(rng: Random, entries: Sequence[tuple[tuple[str, ...], str]] = SMALL_TALK) -> tuple[str, str]:
    """Draw something said without an image, and the answer."""
    forms, answer = rng.choice(entries)
    return asked(forms, rng), answer


def conversation(turns: Sequence[tuple[str, str]], image: bool) -> list[tuple[str, bool]]:
    """Return Aria's chat format in pieces of (text, whether it is a training target).

    Answers and their end markers are targets. With ``image``, the first question starts with an image. Its ``<|img|>``
    occurs once; the caller repeats it for each query.
    """
    pieces = []
    for n, (question, answer) in enumerate(turns):
        marker = "<fim_prefix><|img|><fim_suffix>" if image and n == 0 else ""
        pieces.append((f"<|im_start|>user\n{marker}{question}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces.append((f"{answer}<|im_end|>\n", True))
    return pieces
