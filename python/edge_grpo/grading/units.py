r"""The units at an answer's end: what they are, and how one converts into another.

``3\text{ km}`` is a number and a unit. A unit of measurement is a factor and powers of base units; any other noun
(``5\text{ apples}``) is only what is counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# One line per quantity: its base unit, then each name with its factor.
_TABLE = """
m: m 1, meter 1, metre 1, km 1000, kilometer 1000, kilometre 1000, dm 1/10, cm 1/100, centimeter 1/100,
   centimetre 1/100, mm 1/1000, millimeter 1/1000, millimetre 1/1000, nm 1/1000000000, nanometer 1/1000000000,
   um 1/1000000, micron 1/1000000, micrometer 1/1000000, in 127/5000, inch 127/5000, inche 127/5000,
   ft 381/1250, foot 381/1250, feet 381/1250, yd 1143/1250, yard 1143/1250, mi 201168/125, mile 201168/125
g: g 1, gram 1, kg 1000, kilogram 1000, mg 1/1000, milligram 1/1000, tonne 1000000, lb 45359237/100000,
   pound-mass 45359237/100000, ounce 45359237/1600000, oz 45359237/1600000
s: s 1, sec 1, second 1, ms 1/1000, millisecond 1/1000, ns 1/1000000000, min 60, minute 60, h 3600, hr 3600, hour 3600,
   day 86400, week 604800, yr 31557600, year 31557600
month: month 1
L: L 1, liter 1, litre 1, mL 1/1000, ml 1/1000, milliliter 1/1000, millilitre 1/1000
gallon: gal 1, gallon 1
cent: cent 1, dollar 100, USD 100, buck 100
euro: euro 1
pound: pound 1
rupee: rupee 1
degree: degree 1, deg 1
radian: radian 1, rad 1
arcsecond: arcsecond 1, arcsec 1
percent: percent 1, percentage 1, pct 1
J: J 1, joule 1, Joule 1, kJ 1000, kilojoule 1000, MJ 1000000
cal: cal 1, calorie 1, kcal 1000
eV: eV 1, keV 1000, MeV 1000000, GeV 1000000000
erg: erg 1
W: W 1, watt 1, Watt 1, kW 1000, kilowatt 1000, MW 1000000
N: N 1, newton 1, Newton 1, kN 1000
Pa: Pa 1, pascal 1, kPa 1000, MPa 1000000, GPa 1000000000
atm: atm 1, atmosphere 1
Hz: Hz 1, hertz 1, kHz 1000, MHz 1000000, GHz 1000000000
A: A 1, amp 1, ampere 1, mA 1/1000
V: V 1, volt 1, Volt 1, mV 1/1000, kV 1000
ohm: ohm 1, Ohm 1, Omega 1
K: K 1, kelvin 1, Kelvin 1
celsius: celsius 1, Celsius 1
fahrenheit: fahrenheit 1, Fahrenheit 1
coulomb: C 1, coulomb 1
tesla: T 1, tesla 1
mol: mol 1, mole 1, mmol 1/1000
mph: mph 1
kmh: kmh 1, kph 1
AU: AU 1
pc: pc 1, parsec 1, kpc 1000, Mpc 1000000
angstrom: angstrom 1, Angstrom 1
unit: unit 1
"""


def _read(table: str) -> dict[str, tuple[Fraction, str]]:
    units: dict[str, tuple[Fraction, str]] = {}
    for line in re.sub(r",\s*\n\s+", ", ", table.strip()).splitlines():
        base, _, names = line.partition(": ")
        for entry in names.split(", "):
            name, _, factor = entry.partition(" ")
            units[name] = (Fraction(factor), base)
    return units


_UNITS = _read(_TABLE)
# Symbols of units in texts without ``\text``: no single letters, which are variables, and nothing that is a word.
_BARE = sorted(
    (name for name in _UNITS if len(name) > 1 and name not in ("in", "unit", "A", "mi")), key=len, reverse=True
)
# A text with one of these is no name of what is counted.
_NO_NOUNS = """
a about also an and any approximately are as at be because but by choice correct cubed cubic divided each either
else equal equals false for from half if in incorrect infinity infinite is it least less maybe minus more most
neither no none nor not of off on only option or other otherwise over pi plus quarter so some squared than that the
then third this to true under until up was when where which with without wrong yes zero
"""
_PREFIXES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}

_POWER = r"(?:\s*\^\s*(?:-?\d|\{\s*-?\d+\s*\}))?"
_TEXT_PIECE = rf"\\text\s*\{{[^{{}}]*\}}{_POWER}"
_AT_END = re.compile(rf"(?P<number>.*?[^\s\\])\s*(?P<unit>{_TEXT_PIECE}(?:\s*(?:/|\\cdot)?\s*{_TEXT_PIECE})*)")
_BARE_NAME = rf"(?:{'|'.join(_BARE)})s?(?![A-Za-z]){_POWER}"
_BARE_AT_END = re.compile(
    rf"(?P<number>.*[\d}})])\s*(?P<unit>(?:(?:square|sq|cubic)\.?\s+)?{_BARE_NAME}(?:\s*/\s*(?:[smh]|{_BARE_NAME}){_POWER})?)"
)
_NOUNS_AT_END = re.compile(r"(?P<number>[+-]?\d[\d.,]*|.*[\d})])\s+(?P<unit>[A-Za-z]{3,}(?:\s+[A-Za-z]{2,}){0,2})")
_LETTER_AT_END = re.compile(r"(?P<number>[^A-Za-z]*\d)\s+(?P<unit>[msgLNJWVK])")
_DEGREES = re.compile(r"(?P<number>.*?\S)\s*\^\\circ\s*(?:\\text\s*\{\s*)?(?P<scale>[CFK]?)\s*\}?")
_PERCENT = re.compile(r"(?P<number>.*?\S)\s*\\?%")
_SECONDS = re.compile(r"(?P<number>.*\d)\s*(?:\^\s*\{\s*\\prime\s*\\prime\s*\}|'')")
_CURRENCY = re.compile(r"(?P<sign>-?)\s*(?P<unit>\\\$|[€£₹])\s*(?P<number>.+)")
_CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "pound", "₹": "rupee"}
_TOKENS = re.compile(r"([A-Za-z][A-Za-z.-]*)|\^\s*\{?\s*(-?\d+)\s*\}?|(/)|(.)")


@dataclass(frozen=True)
class Unit:
    """A unit of measurement: ``factor`` powers of base units. Without powers it is ``noun``: what is counted."""

    factor: Fraction = Fraction(1)
    powers: tuple[tuple[str, int], ...] = ()
    noun: str = ""

    def is_only(self, base: str) -> bool:
        return self.powers == ((base, 1),)


def quantity(text: str) -> tuple[str, Unit] | None:
    """The number and the unit of an answer; None where it ends in no unit."""
    if match := _CURRENCY.fullmatch(text):
        rest = quantity(match["number"])
        return match["sign"] + (rest[0] if rest else match["number"]), _named(_CURRENCIES[match["unit"]])
    if match := _DEGREES.fullmatch(text):
        return match["number"], _named({"C": "celsius", "F": "fahrenheit", "K": "K", "": "degree"}[match["scale"]])
    if match := _PERCENT.fullmatch(text):
        return match["number"], _named("percent")
    if match := _SECONDS.fullmatch(text):
        return match["number"], _named("arcsecond")
    for pattern in (_AT_END, _BARE_AT_END, _NOUNS_AT_END):
        if (match := pattern.fullmatch(text)) and (unit := _unit(match["unit"])) is not None:
            return match["number"].rstrip(), unit
    return None


def bare_letter_quantity(text: str) -> tuple[str, Unit] | None:
    """The number and the unit of ``5 m``, where the letter can be no variable."""
    match = _LETTER_AT_END.fullmatch(text)
    return (match["number"], _named(match["unit"])) if match else None


def _named(name: str) -> Unit:
    factor, base = _UNITS[name]
    return Unit(factor, ((base, 1),))


def _unit(text: str) -> Unit | None:
    """What a unit's text means; None where it is neither a unit nor something that is counted."""
    plain = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace(r"\cdot", " ").replace("~", " ").split())
    return _measured(plain) or _counted(plain)


def _measured(text: str) -> Unit | None:
    factor, powers = Fraction(1), dict[str, int]()
    sign, prefix = 1, 1
    last: tuple[str, int, Fraction] | None = None
    for name, power, slash, other in _TOKENS.findall(text):
        if name in _PREFIXES or name.rstrip(".") in _PREFIXES:
            prefix = _PREFIXES[name.rstrip(".")]
        elif slash or name == "per":
            sign = -1
        elif name:
            found = next((_UNITS[form] for form in _singulars(name) if form in _UNITS), None)
            if found is None:
                return None
            last = (found[1], sign * prefix, found[0])
            powers[last[0]] = powers.get(last[0], 0) + last[1]
            factor *= last[2] ** last[1]
            prefix = 1
        elif power:
            if last is None:
                return None
            more = last[1] * (int(power) - 1)  # one was counted with the name
            powers[last[0]] += more
            factor *= last[2] ** more
        elif other.strip():
            return None
    found_powers = tuple(sorted((base, power) for base, power in powers.items() if power))
    return Unit(factor, found_powers) if found_powers else None


def _counted(text: str) -> Unit | None:
    parts = text.lower().rstrip(".").split()
    if not 1 <= len(parts) <= 3 or not all(part.isalpha() and len(part) > 1 for part in parts):
        return None
    if set(_NO_NOUNS.split()) & set(parts):
        return None
    return Unit(noun=" ".join(_singulars(part)[-1] for part in parts))


def _singulars(name: str) -> tuple[str, ...]:
    """A name, and what it is without the ending of a plural."""
    plain = name.rstrip(".")
    return (plain, plain[:-1]) if plain.endswith("s") and len(plain) > 2 else (plain,)
