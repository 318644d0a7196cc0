"""Tells what an emoji shows, by the code points of its file's name, and which emoji are variants of
one picture."""

import re
import unicodedata
from collections.abc import Sequence

JOINER, SELECTOR, KEYCAP, HEART = 0x200D, 0xFE0F, 0x20E3, 0x2764
TONES = {
    0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}  # fmt: skip
SEXES = {0x2640: "woman", 0x2642: "man"}
PEOPLE = {
    0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person", 0x1F466: "boy", 0x1F467: "girl",
}  # fmt: skip
# What a person with such a thing is called in Unicode's list of emoji sequences
TRADES = {
    0x2695: "health worker", 0x2696: "judge", 0x2708: "pilot", 0x1F33E: "farmer", 0x1F373: "cook",
    0x1F37C: "feeding a baby", 0x1F393: "student", 0x1F3A4: "singer", 0x1F3A8: "artist",
    0x1F3EB: "teacher", 0x1F3ED: "factory worker", 0x1F4BB: "technologist",
    0x1F4BC: "office worker", 0x1F527: "mechanic", 0x1F52C: "scientist", 0x1F680: "astronaut",
    0x1F692: "firefighter", 0x1F384: "in a Christmas hat", 0x1F9AF: "with a white cane",
    0x1F9BC: "in a motorized wheelchair", 0x1F9BD: "in a manual wheelchair",
    0x1F9B0: "with red hair", 0x1F9B1: "with curly hair", 0x1F9B2: "bald",
    0x1F9B3: "with white hair",
}  # fmt: skip
SEXED = re.compile(
    r"\b(wo)?m[ae]n\b|\b(boy|girl|child|baby|person|adult|mother|father|prince|princess)\b"
)


def codes_of(stem: str) -> list[int]:
    """Reads the codes from a file's name, such as 1f469-1f3fb-200d-1f33e. Raises ValueError for
    another one."""
    return [int(code, 16) for code in re.split("[-_]", stem)]


def described(codes: Sequence[int]) -> str:
    """Describes codes in the words of Unicode, as in "woman farmer, medium skin tone"."""
    shown = [code for code in codes if code not in (SELECTOR, JOINER)]
    if all(0x1F1E6 <= code <= 0x1F1FF for code in shown):
        return "flag with the country code " + "".join(chr(code - 0x1F1A5) for code in shown)
    if shown[-1] >= 0xE0000:
        return "flag with the region code " + "".join(chr(c - 0xE0000) for c in shown[1:]).upper()
    if shown[-1] == KEYCAP:
        return f"keycap {chr(shown[0])}"
    tones = dict.fromkeys(TONES[code] for code in shown if code in TONES)
    words = [word_of(code) for code in shown if code not in TONES and code not in SEXES]
    sex = next((SEXES[code] for code in shown if code in SEXES), "")
    people = [code for code in shown if code in PEOPLE]
    if people and len(words) == 2 and shown[-1] in TRADES:
        text = f"{words[0]} {TRADES[shown[-1]]}"
    else:
        text = " and ".join(words)
    if sex:
        text = " ".join(SEXED.sub("", text).split())
    return " ".join(filter(None, [sex, text])) + (
        f", {' and '.join(tones)} skin tone" if tones else ""
    )


def word_of(code: int) -> str:
    name = ("heart" if code == HEART else PEOPLE.get(code)) or unicodedata.name(
        chr(code), f"U+{code:04X}"
    ).lower()
    return name.removesuffix(" symbol").removesuffix(" sign")


def group_of(codes: Sequence[int]) -> str:
    """Returns one group for all skin tones, sexes and ages of a picture; all flags, all keycaps,
    all dials, all couples and all families are one group each."""
    shown = [code for code in codes if code not in (SELECTOR, JOINER) and code not in TONES]
    text = described([code for code in codes if code not in TONES and code not in SEXES])
    if text.startswith(("flag with", "keycap", "clock face")):
        return text.split(" ")[0]
    if HEART in shown and any(code in PEOPLE for code in shown):
        return "couple"
    if sum(code in PEOPLE for code in shown) > 1 or text == "family":
        return "couple" if 0x1F91D in shown else "family"
    if re.search(r"\bcouple\b|\bholding hands\b|^kiss$", text):
        return "couple"
    return " ".join(SEXED.sub("", text).split()) or "person"
