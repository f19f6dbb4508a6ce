"""The words of the tiny stories.

There are few enough for a small network to learn them, and enough for stories not to repeat.
"""

GIRLS = ["Mia", "Lily", "Anna", "Emma", "Zoe", "Ella", "Sara", "Nora", "Ruby", "Lucy"]
GIRLS += ["Amy", "Rosie", "Molly", "Clara", "Hannah", "Ivy", "Kate", "Maya", "Ada", "Jane"]
BOYS = ["Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Finn", "Noah", "Adam"]
BOYS += ["Luke", "Oscar", "Henry", "Joe", "Peter", "Billy", "Theo", "Hugo", "Owen", "Dan"]
ADULTS = {
    "mom": "female",
    "dad": "male",
    "grandma": "female",
    "grandpa": "male",
    "aunt": "female",
    "uncle": "male",
}

# Each place with its preposition, as in "at the park".
PLACES = dict.fromkeys(
    ["park", "beach", "farm", "zoo", "lake", "market", "pond", "castle", "river", "fair"], "at"
)
PLACES |= dict.fromkeys(
    ["garden", "forest", "meadow", "barn", "field", "yard", "village", "orchard", "valley"], "in"
)
PLACES |= dict.fromkeys(["hill", "bridge", "playground"], "on")

_TOYS = """
ball kite doll drum boat train truck robot puzzle book hat scarf bucket bell balloon car
whistle crown ring cup lamp key coin basket blanket shell feather flute mask box umbrella
"""
_LISTS = {
    "food": "cake apple cookie pie banana sandwich pear muffin carrot bun egg peach",
    "treat": "cake cookie pie muffin pizza pancake",
    "animal": (
        "dog cat kitten puppy rabbit duck bird frog mouse fox pony lamb turtle squirrel owl hen"
    ),
    "color": "red blue green yellow pink purple white black brown silver golden orange",
    "size": "big small little tiny new old shiny pretty",
    "trait": "kind brave funny little clever shy happy curious careful friendly",
    "day": "sunny warm bright lovely quiet cool fine windy",
    "time": "morning afternoon evening day",
}
WORDS = {slot: words.split() for slot, words in {"toy": _TOYS, **_LISTS}.items()}
