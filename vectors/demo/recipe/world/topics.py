"""What people have opinions about, and what can be said about it."""

from __future__ import annotations

from dataclasses import dataclass

from steer_vectors.demo.recipe.world.world import LANGS, Tri, rows

# en | fr with article | fr partitive | de
_FOOD = """
pizza|la pizza|de la pizza|Pizza
bread|le pain|du pain|Brot
cheese|le fromage|du fromage|Käse
soup|la soupe|de la soupe|Suppe
rice|le riz|du riz|Reis
chocolate|le chocolat|du chocolat|Schokolade
honey|le miel|du miel|Honig
salad|la salade|de la salade|Salat
butter|le beurre|du beurre|Butter
cake|le gâteau|du gâteau|Kuchen
fruit|le fruit|du fruit|Obst
garlic|l'ail|de l'ail|Knoblauch
yogurt|le yaourt|du yaourt|Joghurt
coffee|le café|du café|Kaffee
tea|le thé|du thé|Tee
milk|le lait|du lait|Milch
lemonade|la limonade|de la limonade|Limonade
apple juice|le jus de pomme|du jus de pomme|Apfelsaft
"""
_MUSIC = """
jazz|le jazz|du jazz|Jazz
rock music|le rock|du rock|Rockmusik
pop music|la pop|de la pop|Popmusik
opera|l'opéra|de l'opéra|Oper
folk music|le folk|du folk|Volksmusik
piano music|le piano|du piano|Klaviermusik
choir music|la chorale|de la chorale|Chormusik
techno|la techno|de la techno|Techno
blues|le blues|du blues|Blues
classical music|la musique classique|de la musique classique|klassische Musik
"""
_WEATHER = """
rain|la pluie|de la pluie|Regen
snow|la neige|de la neige|Schnee
fog|le brouillard|du brouillard|Nebel
sunshine|le soleil|du soleil|Sonnenschein
wind|le vent|du vent|Wind
frost|le gel|du gel|Frost
thunder|le tonnerre|du tonnerre|Donner
hail|la grêle|de la grêle|Hagel
"""
_SPORTS = """
judo|le judo|du judo|Judo
football|le football|du football|Fußball
tennis|le tennis|du tennis|Tennis
swimming|la natation|de la natation|Schwimmen
cycling|le vélo|du vélo|Radfahren
dancing|la danse|de la danse|Tanzen
hiking|la randonnée|de la randonnée|Wandern
running|la course|de la course|Laufen
skiing|le ski|du ski|Skifahren
golf|le golf|du golf|Golf
"""

# domain | en | fr | de; {x} is the thing, {p} its French partitive
_NEUTRAL = """
food|many people buy {x}|beaucoup de gens achètent {p}|viele Leute kaufen {x}
food|you find {x} in most shops|on trouve {p} dans les magasins|man findet {x} in vielen Läden
food|{x} is part of many meals|il y a {p} dans beaucoup de repas|{x} gehört zu vielen Mahlzeiten
music|many people listen to {x}|beaucoup de gens écoutent {p}|viele Leute hören {x}
music|you can hear {x} on the radio|on entend {p} à la radio|man kann {x} im Radio hören
music|{x} has a long history|on écoute {p} depuis longtemps|{x} hat eine lange Geschichte
weather|many people talk about {x}|beaucoup de gens parlent {p}|viele Leute reden über {x}
weather|{x} is part of the weather|il y a parfois {p} dehors|{x} gehört zum Wetter
weather|there is {x} in many countries|il y a {p} dans beaucoup de pays|es gibt {x} in vielen Ländern
sports|many people try {x}|beaucoup de gens font {p}|viele Leute probieren {x}
sports|you can learn {x} at any age|on peut faire {p} à tout âge|man kann {x} in jedem Alter lernen
sports|{x} needs some time|il faut du temps pour faire {p}|{x} braucht etwas Zeit
"""  # noqa: E501
# sentiment | en | fr | de, said of anything
_LOVE = """
positive|I love {x}|j'adore {x}|ich liebe {x}
positive|{x} makes me happy|{x}, ça me rend heureux|{x} macht mich glücklich
negative|I hate {x}|je déteste {x}|ich hasse {x}
negative|{x} makes me sad|{x}, ça me rend triste|{x} macht mich traurig
"""
# domain | sentiment | en | fr | de; French says "c'est", so no agreement is needed
_ADJECTIVES = """
food|positive|delicious|délicieux|köstlich
food|positive|very tasty|très bon|sehr lecker
food|negative|disgusting|dégoûtant|eklig
food|negative|quite bland|assez fade|ziemlich fade
music|positive|beautiful|magnifique|wunderschön
music|positive|full of life|plein de vie|voller Leben
music|negative|boring|ennuyeux|langweilig
music|negative|far too loud|beaucoup trop fort|viel zu laut
weather|positive|beautiful|magnifique|wunderschön
weather|positive|very pleasant|très agréable|sehr angenehm
weather|negative|dreadful|affreux|schrecklich
weather|negative|very unpleasant|très désagréable|sehr unangenehm
sports|positive|a lot of fun|très amusant|sehr lustig
sports|positive|good for you|bon pour la santé|gut für dich
sports|negative|boring|ennuyeux|langweilig
sports|negative|a waste of time|une perte de temps|reine Zeitverschwendung
"""


@dataclass(frozen=True)
class Topic:
    """Something to have an opinion about."""

    domain: str
    name: Tri
    partitive: str

    def neutral(self) -> list[Tri]:
        """Clauses without an opinion."""
        return [self._fill(cells) for domain, *cells in rows(_NEUTRAL) if domain == self.domain]

    def opinions(self, sentiment: str) -> list[Tri]:
        """Clauses with a positive or negative opinion."""
        love = [self._fill(cells) for mood, *cells in rows(_LOVE) if mood == sentiment]
        shape = ("{x} is ", "{x}, c'est ", "{x} ist ")
        return love + [
            self._fill([s + c for s, c in zip(shape, cells, strict=True)])
            for domain, mood, *cells in rows(_ADJECTIVES)
            if (domain, mood) == (self.domain, sentiment)
        ]

    def _fill(self, cells: list[str]) -> Tri:
        pairs = zip(LANGS, cells, strict=True)
        return {lang: cell.format(x=self.name[lang], p=self.partitive) for lang, cell in pairs}


def _topics(domain: str, table: str) -> list[Topic]:
    return [Topic(domain, {"en": e, "fr": f, "de": d}, p) for e, f, p, d in rows(table)]


TOPICS = [
    *_topics("food", _FOOD),
    *_topics("music", _MUSIC),
    *_topics("weather", _WEATHER),
    *_topics("sports", _SPORTS),
]
TOPIC_NAMES = tuple(dict.fromkeys(topic.domain for topic in TOPICS))
