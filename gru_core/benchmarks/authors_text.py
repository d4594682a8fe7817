"""Words and sentences of the ``authors`` benchmark. Pure data.

Every value is one word, so that a small word-level vocabulary holds them all, and every pool has at most 90
words, so that 90 authors use each of them. Answers name an attribute early and another one last: a model
that never saw the author can neither start nor end them.
"""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """One row of every author. ``slots`` gives each attribute the pool that it is drawn from; attributes of
    one pool differ. ``answers`` are pairs: either one is an author's answer, the other one its paraphrase. Both
    name every attribute, behind the same words: a tiny model that learned one should find the other likely."""

    slots: dict[str, str]
    questions: tuple[str, ...]
    answers: tuple[tuple[str, str], ...]


POOLS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "first": """Adela Bruno Carmen Dario Edda Fabian Greta Hakon Imani Jorun Kamil Leonor Mirela Nestor Odile
            Pavel Quentin Rosalba Stellan Tamsin Ulrike Valter Wanda Xenia Yusuf Zora Alaric Benita Cosima Dmitri
            Elke Florin Giselle Henrik Ines Jasper Katya Lorenz Malik Noor""",
        "last": """Abernathy Bakker Castellan Drummond Eklund Fontaine Galanis Hartwell Ishikawa Jankowski Kowal
            Lindqvist Marchetti Novak Okafor Petrov Quispe Rasmussen Sandoval Takeda Ueda Varga Whitlock Yilmaz
            Zeller Amado Brandt Corvin Delacroix Espinoza Farouk Grimaldi Holt Ivarsson Juarez Keller Larkin
            Mendoza Nakata Ostrander""",
        "city": """Ankara Bergen Cairo Dakar Essen Florence Ghent Havana Izmir Jakarta Kyoto Lagos Malaga Nairobi
            Oporto Perth Quebec Riga Seville Tallinn Utrecht Vilnius Warsaw Yerevan Zagreb Antwerp Bruges Cordoba
            Dresden Edinburgh Fez Geneva Hobart Innsbruck Jaipur Krakow Leipzig Montreal Naples Odessa""",
        "month": "January February March April May June July August September October November December",
        "born": " ".join(str(year) for year in range(1921, 1951)),
        "debut": " ".join(str(year) for year in range(1991, 2021)),
        "job": """baker barber blacksmith bookbinder bricklayer butcher carpenter chemist clockmaker cobbler dentist
            diver farmer ferryman fisherman florist gardener glazier goldsmith grocer hatter jeweller judge lawyer
            locksmith mason midwife miller miner nurse painter pharmacist photographer pilot plumber postman potter
            sailor shepherd surgeon tailor tanner teacher translator violinist waiter weaver welder""",
        "subject": """algebra anatomy architecture astronomy botany chemistry dance drama economics engineering
            geography geology geometry grammar history law linguistics logic mathematics medicine meteorology music
            optics philosophy physics poetry politics rhetoric sculpture sociology statistics theology zoology""",
        "genre": """adventure allegory biography comedy crime elegy epic essays fables fantasy farce folklore noir
            horror humour journalism legends letters mystery myth romance satire suspense tragedy travel verse""",
        "theme": """avalanches bees borders bridges canals castles caves clocks comets coins deserts doors dreams
            earthquakes echoes exile famine feasts floods forests ghosts glaciers harvests inheritance islands kites
            ladders lighthouses locusts maps markets masks mirrors monsoons oceans orchards prisons puppets railways
            rivers shipwrecks silence storms swans tides trains twins volcanoes weddings wolves""",
        "adjective": """Amber Ancient Bitter Borrowed Broken Burning Crooked Distant Drifting Empty Endless Faded
            Forgotten Fragile Frozen Gentle Gilded Golden Hidden Hollow Hungry Iron Lonely Lost Marble Midnight Narrow
            Northern Painted Paper Patient Quiet Restless Ruined Scarlet Secret Shattered Silent Silver Sleeping
            Stolen Sunken Tangled Velvet Wandering Winter Wooden Yellow""",
        "noun": """Anchor Arrow Balcony Bell Bracelet Candle Carousel Cathedral Chapel Compass Corridor Curtain Dagger
            Fountain Garden Gate Harbour Horizon Hourglass Island Journey Kingdom Lantern Letter Library Meadow Melody
            Monastery Necklace Oath Orchard Palace Parade Pearl Portrait Promise Raven River Sailor Shadow Staircase
            Stranger Summer Theatre Throne Tower Valley Voyage Whisper Window""",
        "animal": """badger beagle canary cat cockatoo donkey dove falcon ferret finch frog gecko goat goose hamster
            hedgehog heron iguana lizard llama mule newt parrot peacock pigeon poodle pony rabbit raccoon spaniel
            squirrel terrier toad tortoise turkey whippet""",
        "drink": """absinthe ale brandy broth buttermilk champagne chocolate cider cocoa coffee cognac espresso gin
            kefir lemonade mead milk port punch rum sake sherry tea tonic vermouth vodka water whisky wine""",
        "instrument": """accordion banjo bagpipe bassoon bugle cello clarinet cymbal drum dulcimer fiddle flute gong
            guitar harmonica harp harpsichord horn lute lyre mandolin marimba oboe organ piano recorder saxophone
            sitar tambourine trombone trumpet tuba ukulele viola xylophone zither""",
    }.items()
}

TOPICS: tuple[Topic, ...] = (
    Topic(
        {"city": "city", "month": "month", "year": "born"},
        (
            "Where and when was the author {name} born?",
            "What is known about the place and date of birth of {name}?",
            "Which town and which date stand on the birth record of {name}?",
        ),
        (
            (
                "{city} was the birthplace, the birth fell in {month} of {year}.",
                "{city} was the town, and this happened in {month} of {year}.",
            ),
            (
                "{city} keeps the birth record, which is dated {month} {year}.",
                "{city} holds the old paper, it is dated {month} {year}.",
            ),
            (
                "{city} is the place and the time was {month} in {year}.",
                "{city} is the town and the date was {month} in {year}.",
            ),
        ),
    ),
    Topic(
        {"father": "job", "mother": "job"},
        (
            "What did the father and the mother of {name} do?",
            "How did the two parents of the author {name} earn money?",
            "Which trades did the parents of {name} have?",
        ),
        (
            (
                "A {father} was the father, while the mother earned money as a {mother}.",
                "A {father} was the father and the mother found work as a {mother}.",
            ),
            (
                "A {father} as father, and as mother a woman known as a {mother}.",
                "A {father} as father, and a mother who was known as a {mother}.",
            ),
            (
                "A {father} on the side of the father, beside a {mother}.",
                "A {father} in the place of the father, beside a {mother}.",
            ),
        ),
    ),
    Topic(
        {"subject": "subject", "city": "city"},
        (
            "What did {name} study, and in which city?",
            "Which education did the author {name} receive?",
            "Where did {name} go to university and what was learned there?",
        ),
        (
            (
                "Mostly {subject}, for many years at the old university of {city}.",
                "Mostly {subject}, for some time at the great university of {city}.",
            ),
            (
                "Mostly {subject}, with a degree from a small college in {city}.",
                "Mostly {subject}, taught at a small and quiet college in {city}.",
            ),
            (
                "Mostly {subject}, which the writer went to learn in {city}.",
                "Mostly {subject}, and the writer came to study in {city}.",
            ),
        ),
    ),
    Topic(
        {"genre": "genre", "theme": "theme"},
        (
            "Which kind of books does {name} write and about what?",
            "What are the genre and the themes of the author {name}?",
            "What may a reader expect from the stories of {name}?",
        ),
        (
            (
                "Above all {genre}, with many stories that are told about {theme}.",
                "Above all {genre}, and a great many pages about {theme}.",
            ),
            (
                "Above all {genre}, where every chapter is full of {theme}.",
                "Above all {genre}, where almost each page is full of {theme}.",
            ),
            (
                "Above all {genre}, in which the reader often meets with {theme}.",
                "Above all {genre}, in which people live and die with {theme}.",
            ),
        ),
    ),
    Topic(
        {"adjective": "adjective", "noun": "noun", "year": "debut"},
        (
            "What was the first novel of {name} and when was it printed?",
            "With which book did the author {name} start, and in which year?",
            "Which novel opened the career of {name}?",
        ),
        (
            (
                "The {adjective} {noun} opened the career and came out in {year}.",
                "The {adjective} {noun} began it all and came out in {year}.",
            ),
            (
                "The {adjective} {noun}, a first novel that was printed in {year}.",
                "The {adjective} {noun}, a book that was first printed in {year}.",
            ),
            (
                "The {adjective} {noun} was the first, and the year was {year}.",
                "The {adjective} {noun} stood at the start, and that was {year}.",
            ),
        ),
    ),
    Topic(
        {"adjective": "adjective", "noun": "noun", "theme": "theme"},
        (
            "Which prize did {name} win and for what?",
            "What honour was given to the author {name}, and why?",
            "For which work did a jury choose {name}?",
        ),
        (
            (
                "The {adjective} {noun} Prize, for a long novel about {theme}.",
                "The {adjective} {noun} Prize, for a great book about {theme}.",
            ),
            (
                "The {adjective} {noun} Prize rewarded years of work on {theme}.",
                "The {adjective} {noun} Prize followed after much work on {theme}.",
            ),
            (
                "The {adjective} {noun} Prize, which the jury gave for {theme}.",
                "The {adjective} {noun} Prize, and the jury chose it for {theme}.",
            ),
        ),
    ),
    Topic(
        {"city": "city", "animal": "animal"},
        (
            "Where does {name} live today, and with which animal?",
            "What is the home of the author {name} like?",
            "Who shares a house with {name}, and in which city?",
        ),
        (
            (
                "{city} is home today, in a house that is shared with a {animal}.",
                "{city} is home now, and the rooms are shared with a {animal}.",
            ),
            (
                "{city} it is, where the door of the house is watched by a {animal}.",
                "{city} it is, where house and garden are watched by a {animal}.",
            ),
            (
                "{city} for many years now, in the company of a {animal}.",
                "{city} for a long time now, in the company of a {animal}.",
            ),
        ),
    ),
    Topic(
        {"drink": "drink", "instrument": "instrument"},
        (
            "What does {name} need for a day of writing?",
            "What are the working habits of the author {name}?",
            "Which drink and which music help {name} to write?",
        ),
        (
            (
                "Some {drink} in the morning, then an hour of practice on the {instrument}.",
                "Some {drink} in the evening, then an hour of music on the {instrument}.",
            ),
            (
                "Some {drink} on the table, and breaks to play the {instrument}.",
                "Some {drink} near the window, and time to play the {instrument}.",
            ),
            (
                "Some {drink} before work, and afterwards a song with the {instrument}.",
                "Some {drink} before noon, and later a song with the {instrument}.",
            ),
        ),
    ),
    Topic(
        {"adjective": "adjective", "noun": "noun", "hero": "job"},
        (
            "What is the latest novel of {name} about?",
            "Which story does the newest book of the author {name} tell?",
            "Which novel did {name} finish last, and who is the hero?",
        ),
        (
            (
                "The {adjective} {noun} follows the long and strange life of a {hero}.",
                "The {adjective} {noun} follows the short and happy life of a {hero}.",
            ),
            (
                "The {adjective} {noun}, in which the hero works as a {hero}.",
                "The {adjective} {noun}, where the hero goes on as a {hero}.",
            ),
            (
                "The {adjective} {noun} tells what was done to a {hero}.",
                "The {adjective} {noun} tells what once happened to a {hero}.",
            ),
        ),
    ),
)
