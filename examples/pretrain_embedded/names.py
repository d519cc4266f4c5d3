"""What people call an emoji: noun phrases with the right article and plural, and everyday names.

Unicode's labels are made for catalogues ("automobile", "deciduous tree", "man: red hair"). A caption needs a noun
phrase as a person types it. Each everyday name belongs to one concept only: "a horse" is the horse, and never the horse
face, so that the model is not taught two pictures for one prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

ALIASES = {  # label -> everyday names
    "automobile": "car",
    "sport utility vehicle": "SUV|jeep",
    "delivery truck": "truck|van",
    "articulated lorry": "big truck|lorry",
    "fire engine": "fire truck",
    "bicycle": "bike",
    "motorcycle": "motorbike",
    "airplane": "plane|aeroplane|jet",
    "flying saucer": "ufo",
    "locomotive": "steam train",
    "high-speed train": "fast train",
    "motor boat": "boat",
    "passenger ship": "cruise ship",
    "horizontal traffic light": "traffic light",
    "hot beverage": "cup of coffee|coffee|cup of tea|hot drink",
    "beer mug": "beer|glass of beer",
    "clinking beer mugs": "two beers",
    "wine glass": "glass of wine|red wine",
    "cocktail glass": "cocktail|martini",
    "glass of milk": "milk",
    "cup with straw": "soda|drink",
    "teacup without handle": "green tea|cup of green tea",
    "beverage box": "juice box",
    "tumbler glass": "whisky|glass of whisky",
    "clinking glasses": "two champagne glasses",
    "bottle with popping cork": "bottle of champagne|champagne",
    "pizza": "slice of pizza",
    "hamburger": "burger|cheeseburger",
    "french fries": "fries|chips",
    "poultry leg": "chicken leg|drumstick",
    "meat on bone": "piece of meat",
    "cut of meat": "steak",
    "bread": "loaf of bread",
    "baguette bread": "baguette",
    "stuffed flatbread": "kebab|pita",
    "green salad": "salad",
    "shallow pan of food": "paella",
    "cooking": "fried egg|egg in a pan",
    "bowl with spoon": "bowl of soup|soup",
    "pot of food": "stew|pot of stew",
    "steaming bowl": "bowl of noodles|ramen|noodle soup",
    "cooked rice": "bowl of rice|rice",
    "cheese wedge": "cheese|piece of cheese",
    "canned food": "can of food",
    "soft ice cream": "ice cream cone",
    "ice cream": "bowl of ice cream",
    "doughnut": "donut",
    "chocolate bar": "chocolate|bar of chocolate",
    "shortcake": "cake|piece of cake|slice of cake|strawberry cake",
    "custard": "pudding",
    "honey pot": "honey|pot of honey",
    "cookie": "biscuit",
    "candy": "sweet",
    "fried shrimp": "prawn",
    "ear of corn": "corn",
    "hot pepper": "chili|chili pepper",
    "bell pepper": "pepper|green pepper",
    "eggplant": "aubergine",
    "leafy green": "lettuce",
    "pea pod": "peas",
    "ginger root": "ginger",
    "root vegetable": "beetroot",
    "red apple": "apple",
    "tangerine": "orange|mandarin",
    "kiwi fruit": "kiwi",
    "deciduous tree": "tree",
    "evergreen tree": "pine tree|fir tree|pine",
    "leafless tree": "bare tree",
    "potted plant": "plant|plant in a pot|house plant",
    "sheaf of rice": "wheat",
    "fallen leaf": "autumn leaf",
    "herb": "leaf|green leaf",
    "four leaf clover": "clover",
    "blossom": "flower|yellow flower|daisy",
    "cherry blossom": "pink flower",
    "rose": "red rose",
    "bouquet": "bouquet of flowers|bunch of flowers|flowers",
    "brown mushroom": "champignon",
    "cactus": "saguaro",
    "front-facing baby chick": "chick",
    "hatching chick": "chick in an egg",
    "rooster": "cockerel",
    "chicken": "hen",
    "honeybee": "bee|bumblebee",
    "lady beetle": "ladybug|ladybird",
    "bug": "caterpillar",
    "cricket": "grasshopper",
    "spiral shell": "shell|sea shell",
    "sauropod": "dinosaur|brontosaurus",
    "T-Rex": "tyrannosaurus",
    "ox": "bull",
    "ewe": "sheep|lamb",
    "camel": "dromedary",
    "rabbit": "bunny|hare",
    "rhinoceros": "rhino",
    "hippopotamus": "hippo",
    "chipmunk": "squirrel",
    "panda": "panda bear|panda face",
    "bear": "brown bear|bear face",
    "lion": "lion face",
    "fox": "fox face",
    "wolf": "wolf face",
    "koala": "koala bear",
    "crocodile": "alligator",
    "snake": "green snake",
    "fish": "blue fish",
    "spouting whale": "blue whale",
    "paw prints": "paws|footprints of a dog",
    "grinning face": "smiley|happy face|smiley face",
    "slightly smiling face": "smile|face",
    "frowning face": "sad face",
    "loudly crying face": "sobbing face|weeping face",
    "angry face": "mad face",
    "enraged face": "furious face|red angry face",
    "face with tears of joy": "laughing face",
    "smiling face with heart-eyes": "face in love|love face",
    "smiling face with sunglasses": "cool face|face with sunglasses",
    "nerd face": "face with glasses",
    "face with medical mask": "face with a mask|sick face",
    "face with open mouth": "surprised face",
    "face screaming in fear": "scared face|screaming face",
    "exploding head": "mind blown",
    "sleeping face": "face asleep",
    "face blowing a kiss": "face with a kiss",
    "partying face": "party face|birthday face",
    "hot face": "sweating face",
    "cold face": "freezing face",
    "grinning cat": "happy cat|smiling cat face|smiling cat",
    "crying cat": "sad cat",
    "angry face with horns": "devil|purple devil",
    "smiling face with horns": "happy devil|imp",
    "smiling face with halo": "angel face",
    "pile of poo": "poo|poop",
    "clown face": "clown",
    "alien": "alien face",
    "red heart": "heart|love heart",
    "grey heart": "gray heart",
    "growing heart": "pink heart with lines",
    "star": "yellow star",
    "sun": "bright sun",
    "sun with face": "smiling sun",
    "crescent moon": "moon",
    "cloud with rain": "rain cloud|rain|rainy cloud",
    "cloud with snow": "snow cloud",
    "cloud with lightning": "storm cloud|thunder cloud",
    "sun behind cloud": "sun and cloud",
    "high voltage": "lightning bolt|lightning|bolt",
    "fire": "flame|campfire",
    "droplet": "drop of water|water drop|drop",
    "water wave": "wave|big wave",
    "globe showing Europe-Africa": "earth|planet earth|globe",
    "ringed planet": "planet|saturn",
    "glowing star": "shining star",
    "snow-capped mountain": "mountain with snow",
    "beach with umbrella": "beach",
    "desert island": "island",
    "cityscape": "city|skyline",
    "national park": "park|lake",
    "house": "home|small house",
    "house with garden": "house with a tree",
    "derelict house": "old house|ruined house",
    "classical building": "temple|museum",
    "office building": "building|skyscraper",
    "Tokyo tower": "tower",
    "circus tent": "circus",
    "soccer ball": "football|ball",
    "american football": "rugby ball",
    "pool 8 ball": "billiard ball",
    "ping pong": "table tennis",
    "boxing glove": "red boxing glove",
    "video game": "game controller|gamepad",
    "game die": "die|dice",
    "wrapped gift": "gift|present|box with a ribbon",
    "party popper": "confetti",
    "jack-o-lantern": "halloween pumpkin|pumpkin",
    "Christmas tree": "decorated tree|xmas tree",
    "balloon": "red balloon",
    "birthday cake": "cake with candles",
    "mobile phone": "phone|smartphone|cell phone",
    "telephone": "old phone|red phone",
    "laptop": "computer|notebook computer",
    "desktop computer": "PC|monitor|screen",
    "television": "TV|tv set",
    "light bulb": "bulb|lamp|idea",
    "closed book": "book|red book",
    "books": "stack of books|pile of books",
    "memo": "note|pencil and paper",
    "envelope": "letter",
    "e-mail": "email",
    "wastebasket": "trash can|bin",
    "couch and lamp": "couch|sofa",
    "roll of paper": "toilet paper",
    "shopping cart": "cart",
    "luggage": "suitcase",
    "locked": "lock|padlock",
    "gem stone": "gem|diamond|jewel",
    "crown": "golden crown|gold crown",
    "top hat": "hat|black hat",
    "billed cap": "cap|baseball cap",
    "glasses": "eyeglasses|spectacles",
    "t-shirt": "shirt|tee shirt",
    "running shoe": "sneaker|shoe",
    "high-heeled shoe": "high heel",
    "woman's boot": "boot",
    "woman's sandal": "sandal",
    "woman's hat": "sun hat|hat with a ribbon",
    "jeans": "trousers|pants|blue jeans",
    "necktie": "tie",
    "handbag": "bag",
    "artist palette": "palette|paint palette",
    "framed picture": "painting",
    "performing arts": "theatre masks|masks",
    "musical note": "note of music",
    "drum": "snare drum",
    "musical keyboard": "piano",
    "kitchen knife": "knife",
    "fork and knife": "cutlery",
    "hammer and wrench": "tools",
    "crossed swords": "swords|two swords",
    "dagger": "sword",
    "bow and arrow": "bow",
    "water pistol": "water gun|toy gun",
    "headphone": "headphones",
    "microphone": "mic",
    "magnifying glass tilted left": "magnifying glass",
    "money bag": "bag of money",
    "dollar banknote": "dollar|dollar bill",
    "flexed biceps": "muscle|arm|strong arm",
    "thumbs up": "thumb",
    "waving hand": "hand",
    "skull": "death's head",
    "ghost": "spook|white ghost",
    "person": "human",
    "man police officer": "policeman",
    "woman police officer": "policewoman",
    "police officer": "cop",
    "firefighter": "fireman",
    "health worker": "doctor|nurse",
    "cook": "chef",
    "Santa Claus": "santa|father christmas",
    "mage": "wizard",
    "woman mage": "witch",
    "prince": "king",
    "princess": "queen",
    "baby": "baby face",
    "people with bunny ears": "dancers",
    "woman dancing": "dancer",
}

MASS = {  # said without an article
    *("bread", "bacon", "butter", "salt", "garlic", "broccoli", "falafel", "popcorn", "spaghetti", "sake", "soap"),
    *("coral", "fog", "fire", "ice", "luggage"),
    *("wood", "milk", "coffee", "honey", "cheese", "corn", "lettuce", "ginger", "rice", "ramen", "soup"),
    *("chocolate", "champagne", "whisky", "rain"),
    *("lightning", "wheat", "confetti", "dna", "badminton", "bowling", "lacrosse", "softball", "tennis"),
    *("cooking", "camping", "foggy", "sunset"),
    *(["sunrise", "cutlery", "poo", "poop", "construction", "wedding", "locked", "unlocked"]),
    *("toilet paper", "cooked rice", "curry rice", "green tea", "red wine", "money with wings", "pouring liquid"),
    *("canned food", "nail polish", "table tennis", "ping pong", "field hockey", "ice hockey", "horse racing"),
    *("mind blown", "high voltage", "locked with key", "locked with pen", "ginger root", "building construction"),
    *("performing arts", "sunrise over mountains", "cityscape at dusk", "night with stars"),
    "rolling on the floor laughing",
}

NAMES = {
    *("aries", "taurus", "gemini", "cancer", "leo", "virgo", "libra", "scorpio", "sagittarius", "capricorn"),
    *("aquarius", "pisces", "ophiuchus"),
    *("mount fuji", "tokyo tower", "statue of liberty", "santa claus", "mrs. claus", "santa", "father christmas"),
    *("saturn", "planet earth", "om", "earth"),
}

SINGULAR = {  # these end in s and are one thing
    *("christmas", "gas", "canvas", "lens", "atlas"),
}
IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "tooth": "teeth",
    "foot": "feet",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "wolf": "wolves",
    "die": "dice",
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "fish": "fish",
    "sheep": "sheep",
}
PLURAL = {"people", "dice", "teeth", "sheep herd"}


def _typed(label: str) -> str:
    return label.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def cleaned(label: str) -> str:
    """A label as it stands in a caption: small letters, no punctuation that a person would not type."""
    text = _typed(label).lower().replace("ñ", "n")
    text = re.sub(r"^(man|woman|person): bald$", r"bald \1", text)
    text = re.sub(r"^(man|woman|person): (.+)$", r"\1 with \2", text)
    text = text.replace(": beard", " with beard").replace(": ", " ")
    return re.sub(r"\s+", " ", re.sub(r"[“”():]", "", text)).strip()


def head(phrase: str) -> str:
    """The word that carries a phrase's number: "bowl of noodles" -> "bowl", "face with tears of joy" -> "face"."""
    return _before_preposition(phrase).split()[-1]


def _before_preposition(phrase: str) -> str:
    return re.split(r" (?:of|with|in|on|and|for|at|over|behind|without|blowing|showing) ", phrase)[0]


def is_plural(phrase: str) -> bool:
    """Whether the phrase speaks of several things: "cherries", "fork and knife", "two hearts"."""
    if re.match(r"(two|three|\d) ", phrase) or phrase in PLURAL:
        return True
    word = head(phrase)
    return word in PLURAL or (word.endswith("s") and not word.endswith(("ss", "us", "is")) and word not in SINGULAR)


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an" where English has one: "an apple", but "cherries", "bread", "mount fuji"."""
    if is_plural(phrase) or phrase in MASS or phrase in NAMES:
        return phrase
    silent = phrase.startswith(("hour", "honest"))
    said_as_you = re.match(r"(uni|use|ufo|euro|ewe|one)", phrase)
    return ("an " if (phrase[0] in "aeiou" and not said_as_you) or silent else "a ") + phrase


def counted(number: str, phrase: str) -> str:
    """ "two" and "fox" -> "two foxes"; a plural stays as it is."""
    if is_plural(phrase):
        return f"{number} {phrase}"
    word = head(phrase)
    at = len(_before_preposition(phrase)) - len(word)
    return f"{number} {phrase[:at]}{_plural(word)}{phrase[at + len(word) :]}"


def _plural(word: str) -> str:
    irregular = {"man": "men", "woman": "women", "person": "people", "mouse": "mice", "tooth": "teeth", "foot": "feet"}
    irregular |= {
        "knife": "knives",
        "leaf": "leaves",
        "fish": "fish",
        "sheep": "sheep",
        "wolf": "wolves",
        "die": "dice",
    }
    irregular |= {"loaf": "loaves", "goose": "geese", "child": "children", "ox": "oxen"}
    if word in irregular:
        return irregular[word]
    for ending in ("man", "woman"):
        if word.endswith(ending):
            return word.removesuffix("man") + "men"
    if word.endswith(("s", "x", "ch", "sh", "z")):
        return f"{word}es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


@dataclass(frozen=True)
class Called:
    """The names of one concept."""

    label: str
    aliases: tuple[str, ...]
    """Everyday names that no other concept has."""


def called(concepts: list[dict[str, Any]]) -> list[Called]:
    """The names of every concept; an everyday name goes to its first claimant: label, alias, short name."""
    owner: dict[str, int] = {}
    for index, concept in enumerate(concepts):
        owner.setdefault(cleaned(concept["label"]), index)
    for claims in (_everyday, _faceless, _short):
        for index, concept in enumerate(concepts):
            for name in claims(concept):
                owner.setdefault(name, index)
    aliases: dict[int, list[str]] = {}
    for name, index in owner.items():
        if name != cleaned(concepts[index]["label"]):
            aliases.setdefault(index, []).append(name)
    return [Called(cleaned(c["label"]), tuple(aliases.get(i, ()))) for i, c in enumerate(concepts)]


def _everyday(concept: dict[str, Any]) -> list[str]:
    return [cleaned(name) for name in ALIASES.get(_typed(concept["label"]), "").split("|") if name]


def _faceless(concept: dict[str, Any]) -> list[str]:
    name = cleaned(concept["label"])
    return [name.removesuffix(" face")] if concept["sub"].startswith("animal") and name.endswith(" face") else []


def _short(concept: dict[str, Any]) -> list[str]:
    return [name for name in concept["short"] if re.fullmatch(r"[a-z][a-z '\-]+", name)]
