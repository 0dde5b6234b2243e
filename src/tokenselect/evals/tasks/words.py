"""Words that generated tasks are made of."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

_ADJECTIVES = """
able ancient angry awful brave bright brisk broken calm careful cheap clean clever cloudy clumsy cold crisp curious
curly damp dark deep distant dull dusty eager early easy elegant empty fair famous fancy fierce flat foggy fond formal
fragile fresh friendly frozen gentle giant gifted glad golden grand grateful grim handy happy harsh hasty heavy hollow
honest hungry icy idle jolly keen kind lame large lazy light little lively lonely loud loyal lucky mellow merry mild
modern muddy narrow neat nervous noble noisy odd old pale patient plain polite proud quaint quick quiet rapid rare
ready rich rough round royal rusty sad safe salty shallow sharp shiny short shy silent silver simple sleepy slim slow
small smooth soft solid sour spicy steady steep stern stiff strange strict strong sturdy sunny sweet swift tall tame
tender thick thin tidy tiny tired tough true ugly urban vague vast vivid warm weak wicked wide wild wise witty wooden
worried young zealous
"""
_NOUNS = """
acorn anchor apple apron arrow badge bakery balloon bamboo banner barrel basket beacon beaver bell bench blanket
bottle bridge broom bucket button cabin cactus camel candle canoe carpet castle cave cellar chalk cherry chimney
circle cliff clock cloud coat comet copper coral cradle crane crayon curtain daisy desert diamond donkey drawer drum
eagle easel engine falcon feather fence ferry fiddle flute forest fountain fox garden garlic ginger glacier glove goat
granite hammer harbor hazel hedge helmet heron hill honey hotel island ivory jacket jar jewel jungle kettle kite
ladder lagoon lamp lantern lemon lever lily lion lizard locket lumber magnet maple marble market meadow melon mill
mirror mitten monkey mountain museum needle nest oak oasis onion orchard otter oyster paddle panther parcel parrot
pebble pencil pepper piano pillow pine pirate planet plum pocket pond poplar prism pumpkin puppet quarry quilt rabbit
raft rain raven ribbon river robin rocket saddle sail salmon sandal scarf shovel spider spoon squirrel statue stove
tailor temple thistle ticket tiger timber torch tower trumpet tulip tunnel turtle valley velvet violin wagon walnut
whistle willow window wolf
"""
_FIRST_NAMES = """
Ada Alma Amir Anton Astrid Basil Bela Bruno Carla Cedric Clara Cyrus Dalia Dario Della Edgar Elena Elias Emil Esther
Fabio Felix Fiona Flora Gustav Hanna Hector Helga Hugo Ida Igor Ines Iris Ivan Jasper Jonas Judith Karim Kasper Laila
Lars Leon Lydia Magnus Malik Marta Milan Mina Nadia Nils Nora Odile Olaf Olga Omar Oskar Pablo Paula Petra Quentin
Ramona Rafael Rita Rosa Samir Selma Sofia Stefan Tamara Tilda Tomas Ulla Uma Valentin Vera Viktor Wanda Xenia Yara Zora
"""
_LAST_NAMES = """
Abel Adler Aubert Bauer Becker Blum Bosch Brandt Carlsen Castell Conti Dahl Dekker Dietz Duval Eklund Engel Farkas
Fischer Fontaine Gallo Garber Greco Hahn Hansen Heller Horvat Ibsen Jansen Jensen Kaplan Keller Kovac Kramer Lang
Larsen Lindgren Lorenz Maier Marchetti Meyer Moreau Nagy Nilsson Novak Olsen Orlov Palmer Pavlov Petit Quist Rask
Ricci Rossi Rubin Sauer Schmitz Silva Sorel Steiner Svensson Tanner Thorne Toth Urban Valdez Verne Vogel Voss Wagner
Weiss Winter Wolff Yilmaz Zander Zeller
"""
_JOBS = """
architect baker barber beekeeper blacksmith bookbinder botanist brewer butcher carpenter cartographer chemist clerk
conductor cook cooper dentist dyer engraver farmer ferryman fisherman florist gardener glazier goldsmith historian
hunter judge juggler knitter lawyer librarian locksmith mason midwife miller miner musician nurse optician painter
pharmacist pilot plumber potter printer sailor sculptor shepherd shoemaker surgeon surveyor tailor tanner teacher
translator veterinarian watchmaker weaver
"""

ADJECTIVES, NOUNS, JOBS = _ADJECTIVES.split(), _NOUNS.split(), _JOBS.split()
FIRST_NAMES, LAST_NAMES = _FIRST_NAMES.split(), _LAST_NAMES.split()


def adjective_noun(random: Random) -> str:
    """Two words joined by a hyphen: about 34,000 are possible."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def distinct(random: Random, make: Callable[[Random], str], count: int) -> list[str]:
    """So many different strings of a kind, in the order in which they came up."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(random)] = None
    return list(found)


@cache
def vocabulary(text: str) -> tuple[str, ...]:
    """The lower-case words of five letters or more that a text has at least twice, in alphabetical order."""
    counts = Counter(re.findall(r"\b[a-z]{5,}\b", text))
    return tuple(sorted(word for word, count in counts.items() if count > 1))
