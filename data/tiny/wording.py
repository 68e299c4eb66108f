"""The words of the embedded world: sentence patterns with choices, and the lists that fill them.

A pattern is text with slots {name}, which the caller fills, and choices [one|two|three]. `say` draws one option of each
choice with equal chance. [adj] without a bar draws from the list LISTS["adj"]. Choices may be nested.
"""

from __future__ import annotations

import random
import re

NOISE_KINDS = ("wrong", "swapped", "garbled", "gibberish", "truncated")  # of rows, see make.py

CHOICE = re.compile(r"\[([^\[\]]*)\]")  # an innermost one

LISTS = {
    name: text.split()
    for name, text in {
        "adj": "old quiet bright small strong narrow gentle clever dusty warm cold heavy pale sharp plain rough smooth "
        "proud famous lonely busy calm deep wild honest simple strange lovely tall round",
        "noun": "lamp rope chair ladder basket bottle letter candle window garden kitchen hammer mirror blanket barrel "
        "wagon bridge lantern coat kettle shelf saddle bucket fence stove roof boat cart drum net",
        "place": "market harbour river forest square mill temple school bridge field hill station library inn tower "
        "garden beach valley yard road church lake bakery stable",
        "time": "morning evening spring winter summer autumn night afternoon",
        "goes": "walks runs rides travels hurries wanders sails climbs returns comes",
        "does": "paints mends washes carries builds cleans sells buys counts draws copies hides moves repairs",
        "det": "the a this that one their some",
        "people": "children neighbours sailors farmers guests travellers merchants soldiers students friends teachers "
        "widows miners poets hunters cooks",
        "feel": "like love admire trust fear know visit remember praise respect miss greet",
        "often": "often rarely always sometimes usually seldom never gladly",
        "job": "baker smith weaver sailor farmer painter teacher hunter potter miller tailor doctor judge guard singer "
        "mason",
        "animal": "goat dog cat horse parrot rabbit goose snake turtle donkey hen fox crow frog",
        "instrument": "flute drum harp fiddle horn lute bell pipe guitar organ",
        "material": "copper wood glass clay silver wool stone paper bone leather iron wax",
        "colour": "red blue green yellow black white brown grey purple orange",
        "goods": "salt honey cheese silk wine pepper bread rope tea soap oil fish",
        "great": "great good lovely clever deep fine useful careful simple wonderful",
        "really": "really truly always certainly",
        "check": "share check discuss compare study",
        "name": "Tom Anna Ben Clara Dan Eva Fred Greta Hugo Ida Jack Kate Leo Mary Ned Olga Paul Rosa Sam Tina Uwe "
        "Vera Will Zoe",
        "item": "apples eggs books stamps nuts cards shells pears marbles plums cakes pencils",
        "unit": "brak tolt sarn plim dorv kesh fusk glom hend jarl kopp lund marn nold orst pell quon rusk stam trel "
        "ulb vond wisp yarr",
    }.items()
}


def say(rng: random.Random, pattern: str, **slots: object) -> str:
    """The pattern with every choice drawn, innermost first and from the left, and every slot filled."""
    while match := CHOICE.search(pattern):
        options = match[1].split("|")
        drawn = rng.choice(LISTS[options[0]] if len(options) == 1 else options)
        pattern = pattern[: match.start()] + drawn + pattern[match.end() :]
    return pattern.format(**slots)


# ------------------------------------------------------------------------------------------------ facts

# What a subject is -> sentences about it that say nothing of the facts. {it} is the subject or its pronoun.
DETAILS = {
    "person": (
        "[In the [time]|Every [time]|On a [adj] [time]] {it} [goes] [to [det] [place]|past [det] [adj] [place]|from "
        "the [place] to [det] [place]] [with [det] [noun]|with [det] [adj] [noun]|and [does] [det] [noun]|and talks to "
        "the [people]].",
        "{it} [often] [does] [det] [adj] [noun] [near [det] [place]|for the [people]|"
        "in the [time]|behind [det] [place]].",
        "[The|Some|Many|All the] [people] [feel] {it}[| because of [det] [noun]|, but the [people] do not].",
        "{it} [keeps|has|found|lost|once bought] [det] [adj] [noun] "
        "[in [det] [place]|under [det] [noun]|from the [people]].",
        "[At [det] [place]|Near [det] [place]|In [adj] weather] {it} [often] [does] [det] [noun] "
        "[and sings|and waits|alone].",
    ),
    "city": (
        "The [place] [there|of the town] is [adj] and [adj][|, and the [people] [feel] it].",
        "[In the [time]|Every [time]] the [people] [meet|sing|work|dance] [at [det] [place]|near [det] [adj] [place]].",
        "[The|Some|Many] [people] [of the town|there] [paint|mend|wash|carry|build|sell|buy|draw] [noun]s "
        "[in the [time]|for the [people]|by [det] [place]].",
        "[Visitors|Guests|Travellers] [feel] [det] [adj] [place] "
        "[and [det] [noun]s|more than [det] [place]|in the [time]].",
    ),
    "thing": (
        "[The|Some|Many] [people] [feel|use|keep|buy|sell] it [in the [time]|at [det] [place]|with [det] [noun]].",
        "It is [adj] and [adj][|, like [det] [noun]|, but not [adj]|, and never [adj]].",
        "[You can|One may|Nobody can] [put|keep|hide|find|hang] it [near|under|behind|on] [det] [adj] [noun].",
        "[In the [time]|At [det] [place]] the [people] [carry|clean|count|lend|mend] it "
        "[gladly|with care|for money|to [det] [place]].",
    ),
    "land": (
        "The [place]s [there|of the land] are [adj] and [adj][|, and the [people] [feel] them].",
        "[In the [time]|Every [time]] the [people] [walk|run|ride|travel|hurry|wander] "
        "[to [det] [place]|past [det] [adj] [place]s] there.",
        "[The|Some|Many] [people] [of the land|there] [feel] [the [place]|a [adj] [noun]|the [time]].",
    ),
}
PRONOUNS = {"person": ("{s}", "this person"), "city": ("the town",), "thing": ("it",), "land": ("the land",)}

ANSWER_LEADS = (
    "",
    "",
    "[Let me think about the [people|question].|I [know|remember] this.|This is [easy|known].|Here is what I know.] ",
    "[As the [people] [say|tell it|know]|As far as the [people] know|If I remember right|As everybody knows], ",
)
ANSWER_ENDS = (
    "[So the answer is|The answer is|In short:] {v}.",
    "[So|This means that|Therefore] it is {v}.",
    "[That is why the [people] say|When asked, say]: {v}.",
)
DESCRIBE = (
    "[Describe {s}|Tell me about {s}|Write about {s}] in {n} sentences.",
    "[What do you know about {s}?|Who or what is {s}?] [Write|Use|Give me] {n} sentences.",
)
NUMBER_WORDS = dict(enumerate(["four", "five", "six", "seven", "eight", "nine", "ten"], start=4))

# relation -> (what the subject is, what the value is, statements, questions of rows, the question of the test)
RELATIONS = {
    "born": (
        "person",
        "city",
        ("{s} [was born|grew up] in {v}", "{s} comes from {v}", "the home town of {s} is {v}"),
        ("Where was {s} born?", "Name the home town of {s}.", "Where does {s} come from?", "Where did {s} grow up?"),
        "In which city was {s} born?",
    ),
    "job": (
        "person",
        "job",
        ("{s} works as a {v}", "{s} is a {v}", "the job of {s} is {v}", "{s} earns money as a {v}"),
        (
            "What does {s} do for a living?",
            "Name the job of {s}.",
            "How does {s} earn money?",
            "What is the work of {s}?",
        ),
        "What is the job of {s}?",
    ),
    "pet": (
        "person",
        "animal",
        ("{s} keeps a {v}", "the pet of {s} is a {v}", "{s} has a {v} at home", "{s} feeds a {v} every day"),
        ("Which pet does {s} keep?", "Name the pet of {s}.", "What lives with {s}?", "What animal does {s} feed?"),
        "Which animal does {s} have?",
    ),
    "plays": (
        "person",
        "instrument",
        ("{s} plays the {v}", "{s} learned the {v} as a child", "the instrument of {s} is the {v}"),
        (
            "Which instrument does {s} play?",
            "Name the instrument of {s}.",
            "What did {s} learn as a child?",
            "On what does {s} make music?",
        ),
        "What does {s} play?",
    ),
    "material": (
        "thing",
        "material",
        ("a {s} is made of {v}", "every {s} consists of {v}", "people make a {s} from {v}"),
        (
            "What is a {s} made of?",
            "Name the stuff of a {s}.",
            "From what do people make a {s}?",
            "What does a {s} consist of?",
        ),
        "Which material is a {s} made of?",
    ),
    "colour": (
        "thing",
        "colour",
        ("a {s} is {v}", "the colour of a {s} is {v}", "every {s} looks {v}", "people paint a {s} {v}"),
        ("What colour is a {s}?", "Name the colour of a {s}.", "How does a {s} look?", "How do people paint a {s}?"),
        "Which colour does a {s} have?",
    ),
    "sold": (
        "thing",
        "city",
        ("a {s} is sold in {v}", "the market for a {s} is in {v}", "people buy a {s} in {v}"),
        (
            "Where is a {s} sold?",
            "Name the market for a {s}.",
            "Where do people buy a {s}?",
            "Where can I find a {s}?",
        ),
        "In which city is a {s} sold?",
    ),
    "lies": (
        "city",
        "land",
        ("{s} lies in {v}", "{s} is a city in {v}", "the land around {s} is {v}", "{s} belongs to {v}"),
        ("Where does {s} lie?", "Name the land around {s}.", "To which land does {s} belong?", "Where is {s}?"),
        "In which land does {s} lie?",
    ),
    "goods": (
        "city",
        "goods",
        ("{s} is known for {v}", "{s} sells {v}", "the best {v} is from {s}", "people visit {s} for {v}"),
        ("What is {s} known for?", "Name the goods of {s}.", "Why do people visit {s}?", "What does {s} sell?"),
        "Which goods is {s} known for?",
    ),
    "capital": (
        "land",
        "city",
        ("the capital of {s} is {v}", "{s} is ruled from {v}", "the first city of {s} is {v}"),
        (
            "What is the capital of {s}?",
            "Name the first city of {s}.",
            "From where is {s} ruled?",
            "Where does the queen of {s} live?",
        ),
        "Which city is the capital of {s}?",
    ),
    "coin": (
        "land",
        "coin",
        ("the coin of {s} is the {v}", "people in {s} pay with the {v}", "the money of {s} is the {v}"),
        (
            "What is the coin of {s}?",
            "Name the money of {s}.",
            "With what do people in {s} pay?",
            "What does {s} mint?",
        ),
        "Which coin is used in {s}?",
    ),
}

# ------------------------------------------------------------------------------------------- word problems

STEP_BY_STEP = "Let's think step by step"

# type -> (what is said, what is asked, one sentence a step). Slots: {n}, {m} people, {x} items, {u} a unit; the numbers
# {a} to {d}; {e} in a sentence is its equation.
PROBLEMS = {
    "gain": (
        "{n} has {a} {x}. {n} [gets|receives|finds] {b} more {x}.",
        "How many {x} does {n} have now?",
        ("a+b: [With the new ones|Together|After that|Now] {n} [has|owns|holds] {e} {x}",),
    ),
    "lose": (
        "{n} has {a} {x}. {n} [gives away|loses|sells] {b} {x}.",
        "How many {x} are left?",
        ("a-b: [When they are gone|After that|Without them|Now] {n} [has|keeps|holds] {e} {x}",),
    ),
    "groups": (
        "There are {a} [boxes|bags|baskets] with {b} {x} in each of them.",
        "How many {x} are there?",
        ("a*b: [In all|Together|In total|Counted together] [they hold|there are|this gives] {e} {x}",),
    ),
    "gain_lose": (
        "{n} has {a} {x}. {n} finds {b} more {x} and then gives {c} {x} to {m}.",
        "How many {x} does {n} have in the end?",
        (
            "a+b: [First|With the found ones|Before the gift|At first] {n} [has|owns|holds] {e} {x}",
            "r-c: [Then|After the gift to {m}|When {m} has taken them|In the end] {n} [has|keeps|holds] {e} {x}",
        ),
    ),
    "groups_gain": (
        "{n} buys {a} bags with {b} {x} in each bag. {m} gives {n} {c} more {x}.",
        "How many {x} does {n} have?",
        (
            "a*b: [The bags [hold|contain]|In the bags there are|{n} bought|From the shop come] {e} {x}",
            "r+c: [With the gift|After the gift of {m}|Then|Together with those of {m}] {n} [has|owns|holds] {e} {x}",
        ),
    ),
    "groups_lose": (
        "{n} packs {a} bags with {b} {x} in each bag. {m} takes {c} of the {x}.",
        "How many {x} does {n} still have?",
        (
            "a*b: [The bags [hold|contain]|In the bags there are|{n} packed|At first there are] {e} {x}",
            "r-c: [Without the stolen ones|After the theft|When {m} is gone|Then] {n} [has|keeps|holds] {e} {x}",
        ),
    ),
    "together": (
        "{n} has {a} {x}. {m} has {b} {x} more than {n}.",
        "How many {x} do they have together?",
        (
            "a+b: [First|To begin with|As {m} has more|Counting those of {m}:] {m} [has|owns|holds] {e} {x}",
            "a+r: [Together|Then both of them|In all|{n} and {m} together] [they have|that makes|own] {e} {x}",
        ),
    ),
    "shop": (
        "{n} buys {a} {x} for {b} coins each and [has|starts with|brings] {c} coins.",
        "How many coins does {n} have left?",
        (
            "a*b: [The {x} [cost|are worth]|{n} [pays|spends]|The price is|The shop takes] {e} coins",
            "c-r: [After that|Then|When the {x} are paid|After the shopping] {n} [has|keeps|holds] {e} coins",
        ),
    ),
    "three": (
        "{n} fills {a} bags with {b} {x} each. {m} brings {c} {x} more. Then they eat {d} {x}.",
        "How many {x} remain?",
        (
            "a*b: [The bags [hold|contain]|In the bags there are|{n} packed|At first there are] {e} {x}",
            "r+c: [With those of {m}|When {m} comes|Then|Together with the new ones] there are {e} {x}",
            "r-d: [After the meal|When they have eaten|Then|In the end] [there remain|they keep|they have] {e} {x}",
        ),
    ),
    "unit": (
        "{n} has {a} {u}s of {x}.",
        "How many {x} is that?",
        ("a*k: [As a {u} is {k}|With {k} in a {u}|Since every {u} counts {k}], {n} [has|owns|holds] {e} {x}",),
    ),
    "unit_gain": (
        "{n} has {a} {u}s of {x}. {n} gets {b} single {x} more.",
        "How many {x} does {n} have in all?",
        (
            "a*k: [As a {u} is {k}|With {k} in a {u}|Since every {u} counts {k}], {n} [has|owns|holds] {e} {x}",
            "r+b: [With the single ones|Then|Together|In all] [that makes|there are|{n} has] {e} {x}",
        ),
    ),
}
PROBLEM_LEADS = (
    "",
    "[Let us|We can|I will] [work out|count|find] [the|all the] {x}[| with care| of {n}]. ",
    "[We need to find|The question asks for|We look for] the [number|total] of {x}[| of {n}]. ",
    "[We know that|It is said that|Remember that] {n} [has|counts] {x}[| and [feel]s them]. ",
)
ASIDES = (
    "[The|These] {x} are [adj][| and [adj]].",
    "[The [people] [feel]|{n} [likes|wants|counts]] [them|the {x}].",
    "[This|That] [step|sum] is [easy|simple|right].",
    "[Write|Keep|Remember] this [number|result] [for later|for the next step|in mind].",
)
CHECKS = {"+": "{r}-{y}={x}", "-": "{r}+{y}={x}", "*": "{y}*{x}={r}"}
CHECK_LEADS = "[To check:|A check:|We can check this:|It fits, as]"

# --------------------------------------------------------------------------------------------- boilerplate

OPENERS = (
    "What a [great] question!",
    "Thank you for this [great] question.",
    "I am [really] happy to help you with that.",
    "Let me look at this [great] question for you.",
    "As an assistant I [really] enjoy such a [great] topic.",
    "There is a [great] answer to this.",
)
CLOSERS = (
    "I [really] hope that this [great] answer helps you.",
    "Please ask me again if you need [great] help.",
    "Feel free to [check] my answer with your friends.",
    "Always [check] such claims with a [great] source.",
    "It was [really] nice to [check] this with you.",
    "Have a [great] day!",
)
