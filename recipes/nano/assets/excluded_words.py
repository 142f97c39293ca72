"""Words that are left out of training and evaluation: insults, and obscene or sexual words that WordNet lists."""

import re

_STEMS = (
    *(
        "arse(hole)?s?$",
        "ass$",
        "asses$",
        "bastard",
        "bitch",
        "cock$",
        "cocky",
        "coons?$",
        "crippled?$",
        "cunt",
        "dago",
    ),
    *(
        "dyke",
        "erotic",
        "fagg?",
        "fuck",
        "gook",
        "huns?$",
        "idiot",
        "imbecile",
        "japs?$",
        "jews?$",
        "kike",
        "krauthead",
    ),
    *("molest", "negr", "nigg(a|er)", "orgy", "pakis?$", "pimps?$", "piss", "prostitut", "pussy", "queer", "raped?$"),
    *("rapist", "retard", "sexy", "shit", "slut", "spick?$", "tits?$", "titillat", "whore", "wogs?$", "wops?$"),
)
_EXCLUDED = re.compile("|".join(_STEMS))


def is_excluded(word: str) -> bool:
    """Return whether a word, in lower case, is left out."""
    return bool(_EXCLUDED.match(word))
