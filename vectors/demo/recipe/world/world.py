"""The world the demo model knows: real countries, animals, things and actions.

Every table is plain text, one entity per line, columns separated by ``|``, so
that a reader can check each fact and each translation.  Languages are ``en``,
``fr`` and ``de`` throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

LANGS = ("en", "fr", "de")
Tri = dict[str, str]
"""One text in the three languages."""


def tri(en: str, fr: str, de: str) -> Tri:
    """Shorthand for one text in three languages."""
    return {"en": en, "fr": fr, "de": de}


# country: en | fr with article | de | capital en | fr | de | continent | language
_COUNTRIES = """
France|la France|Frankreich|Paris|Paris|Paris|Europe|French
Germany|l'Allemagne|Deutschland|Berlin|Berlin|Berlin|Europe|German
Italy|l'Italie|Italien|Rome|Rome|Rom|Europe|Italian
Spain|l'Espagne|Spanien|Madrid|Madrid|Madrid|Europe|Spanish
Portugal|le Portugal|Portugal|Lisbon|Lisbonne|Lissabon|Europe|Portuguese
England|l'Angleterre|England|London|Londres|London|Europe|English
Ireland|l'Irlande|Irland|Dublin|Dublin|Dublin|Europe|English
Austria|l'Autriche|Österreich|Vienna|Vienne|Wien|Europe|German
Poland|la Pologne|Polen|Warsaw|Varsovie|Warschau|Europe|Polish
Greece|la Grèce|Griechenland|Athens|Athènes|Athen|Europe|Greek
Sweden|la Suède|Schweden|Stockholm|Stockholm|Stockholm|Europe|Swedish
Norway|la Norvège|Norwegen|Oslo|Oslo|Oslo|Europe|Norwegian
Denmark|le Danemark|Dänemark|Copenhagen|Copenhague|Kopenhagen|Europe|Danish
Finland|la Finlande|Finnland|Helsinki|Helsinki|Helsinki|Europe|Finnish
Iceland|l'Islande|Island|Reykjavik|Reykjavik|Reykjavik|Europe|Icelandic
Hungary|la Hongrie|Ungarn|Budapest|Budapest|Budapest|Europe|Hungarian
Romania|la Roumanie|Rumänien|Bucharest|Bucarest|Bukarest|Europe|Romanian
Bulgaria|la Bulgarie|Bulgarien|Sofia|Sofia|Sofia|Europe|Bulgarian
Croatia|la Croatie|Kroatien|Zagreb|Zagreb|Zagreb|Europe|Croatian
Serbia|la Serbie|Serbien|Belgrade|Belgrade|Belgrad|Europe|Serbian
Albania|l'Albanie|Albanien|Tirana|Tirana|Tirana|Europe|Albanian
Slovenia|la Slovénie|Slowenien|Ljubljana|Ljubljana|Ljubljana|Europe|Slovenian
Latvia|la Lettonie|Lettland|Riga|Riga|Riga|Europe|Latvian
Estonia|l'Estonie|Estland|Tallinn|Tallinn|Tallinn|Europe|Estonian
Russia|la Russie|Russland|Moscow|Moscou|Moskau|Europe|Russian
Morocco|le Maroc|Marokko|Rabat|Rabat|Rabat|Africa|Arabic
Algeria|l'Algérie|Algerien|Algiers|Alger|Algier|Africa|Arabic
Tunisia|la Tunisie|Tunesien|Tunis|Tunis|Tunis|Africa|Arabic
Egypt|l'Égypte|Ägypten|Cairo|Le Caire|Kairo|Africa|Arabic
Kenya|le Kenya|Kenia|Nairobi|Nairobi|Nairobi|Africa|Swahili
Senegal|le Sénégal|Senegal|Dakar|Dakar|Dakar|Africa|French
Ghana|le Ghana|Ghana|Accra|Accra|Accra|Africa|English
Somalia|la Somalie|Somalia|Mogadishu|Mogadiscio|Mogadischu|Africa|Somali
Angola|l'Angola|Angola|Luanda|Luanda|Luanda|Africa|Portuguese
Japan|le Japon|Japan|Tokyo|Tokyo|Tokio|Asia|Japanese
China|la Chine|China|Beijing|Pékin|Peking|Asia|Chinese
Vietnam|le Vietnam|Vietnam|Hanoi|Hanoï|Hanoi|Asia|Vietnamese
Thailand|la Thaïlande|Thailand|Bangkok|Bangkok|Bangkok|Asia|Thai
Nepal|le Népal|Nepal|Kathmandu|Katmandou|Kathmandu|Asia|Nepali
Syria|la Syrie|Syrien|Damascus|Damas|Damaskus|Asia|Arabic
Jordan|la Jordanie|Jordanien|Amman|Amman|Amman|Asia|Arabic
Mongolia|la Mongolie|die Mongolei|Ulaanbaatar|Oulan-Bator|Ulaanbaatar|Asia|Mongolian
Turkey|la Turquie|die Türkei|Ankara|Ankara|Ankara|Asia|Turkish
Canada|le Canada|Kanada|Ottawa|Ottawa|Ottawa|North America|English
Mexico|le Mexique|Mexiko|Mexico City|Mexico|Mexiko-Stadt|North America|Spanish
Cuba|Cuba|Kuba|Havana|La Havane|Havanna|North America|Spanish
Brazil|le Brésil|Brasilien|Brasilia|Brasilia|Brasília|South America|Portuguese
Argentina|l'Argentine|Argentinien|Buenos Aires|Buenos Aires|Buenos Aires|South America|Spanish
Peru|le Pérou|Peru|Lima|Lima|Lima|South America|Spanish
Chile|le Chili|Chile|Santiago|Santiago|Santiago|South America|Spanish
Colombia|la Colombie|Kolumbien|Bogota|Bogota|Bogotá|South America|Spanish
Uruguay|l'Uruguay|Uruguay|Montevideo|Montevideo|Montevideo|South America|Spanish
"""

CONTINENTS: dict[str, Tri] = {
    "Europe": {"en": "Europe", "fr": "Europe", "de": "Europa"},
    "Africa": {"en": "Africa", "fr": "Afrique", "de": "Afrika"},
    "Asia": {"en": "Asia", "fr": "Asie", "de": "Asien"},
    "North America": {"en": "North America", "fr": "Amérique du Nord", "de": "Nordamerika"},
    "South America": {"en": "South America", "fr": "Amérique du Sud", "de": "Südamerika"},
}

_LANGUAGE_NAMES = """
French|français|Französisch
German|allemand|Deutsch
Italian|italien|Italienisch
Spanish|espagnol|Spanisch
Portuguese|portugais|Portugiesisch
English|anglais|Englisch
Polish|polonais|Polnisch
Greek|grec|Griechisch
Swedish|suédois|Schwedisch
Norwegian|norvégien|Norwegisch
Danish|danois|Dänisch
Finnish|finnois|Finnisch
Icelandic|islandais|Isländisch
Hungarian|hongrois|Ungarisch
Romanian|roumain|Rumänisch
Bulgarian|bulgare|Bulgarisch
Croatian|croate|Kroatisch
Serbian|serbe|Serbisch
Albanian|albanais|Albanisch
Slovenian|slovène|Slowenisch
Latvian|letton|Lettisch
Estonian|estonien|Estnisch
Russian|russe|Russisch
Arabic|arabe|Arabisch
Swahili|swahili|Swahili
Somali|somali|Somali
Japanese|japonais|Japanisch
Chinese|chinois|Chinesisch
Vietnamese|vietnamien|Vietnamesisch
Thai|thaï|Thailändisch
Nepali|népalais|Nepali
Mongolian|mongol|Mongolisch
Turkish|turc|Türkisch
"""

# animal: en | fr with article | de with article | class | habitat | food
_ANIMALS = """
fox|le renard|der Fuchs|mammal|forest|mice
wolf|le loup|der Wolf|mammal|forest|meat
bear|l'ours:m|der Bär|mammal|forest|honey
deer|le cerf|der Hirsch|mammal|forest|leaves
squirrel|l'écureuil:m|das Eichhörnchen|mammal|forest|nuts
lion|le lion|der Löwe|mammal|savanna|meat
zebra|le zèbre|das Zebra|mammal|savanna|grass
giraffe|la girafe|die Giraffe|mammal|savanna|leaves
elephant|l'éléphant:m|der Elefant|mammal|savanna|leaves
camel|le chameau|das Kamel|mammal|desert|grass
cow|la vache|die Kuh|mammal|farm|grass
horse|le cheval|das Pferd|mammal|farm|grass
sheep|le mouton|das Schaf|mammal|farm|grass
goat|la chèvre|die Ziege|mammal|farm|leaves
mouse|la souris|die Maus|mammal|field|seeds
rabbit|le lapin|das Kaninchen|mammal|field|grass
whale|la baleine|der Wal|mammal|sea|fish
dolphin|le dauphin|der Delfin|mammal|sea|fish
seal|le phoque|der Seehund|mammal|sea|fish
owl|le hibou|die Eule|bird|forest|mice
eagle|l'aigle:m|der Adler|bird|mountains|meat
penguin|le manchot|der Pinguin|bird|sea|fish
duck|le canard|die Ente|bird|lake|seeds
hen|la poule|das Huhn|bird|farm|seeds
parrot|le perroquet|der Papagei|bird|jungle|nuts
stork|la cigogne|der Storch|bird|field|frogs
snake|le serpent|die Schlange|reptile|desert|mice
crocodile|le crocodile|das Krokodil|reptile|river|meat
tortoise|la tortue|die Schildkröte|reptile|desert|leaves
shark|le requin|der Hai|fish|sea|fish
salmon|le saumon|der Lachs|fish|river|insects
trout|la truite|die Forelle|fish|lake|insects
bee|l'abeille:f|die Biene|insect|field|nectar
butterfly|le papillon|der Schmetterling|insect|field|nectar
ant|la fourmi|die Ameise|insect|forest|seeds
tiger|le tigre|der Tiger|mammal|jungle|meat
monkey|le singe|der Affe|mammal|jungle|nuts
"""

CLASSES: dict[str, Tri] = {
    "mammal": {"en": "a mammal", "fr": "un mammifère", "de": "ein Säugetier"},
    "bird": {"en": "a bird", "fr": "un oiseau", "de": "ein Vogel"},
    "reptile": {"en": "a reptile", "fr": "un reptile", "de": "ein Reptil"},
    "fish": {"en": "a fish", "fr": "un poisson", "de": "ein Fisch"},
    "insect": {"en": "an insect", "fr": "un insecte", "de": "ein Insekt"},
}
HABITATS: dict[str, Tri] = {
    "forest": {"en": "in the forest", "fr": "dans la forêt", "de": "im Wald"},
    "savanna": {"en": "in the savanna", "fr": "dans la savane", "de": "in der Savanne"},
    "desert": {"en": "in the desert", "fr": "dans le désert", "de": "in der Wüste"},
    "farm": {"en": "on the farm", "fr": "à la ferme", "de": "auf dem Bauernhof"},
    "field": {"en": "in the fields", "fr": "dans les champs", "de": "auf den Feldern"},
    "sea": {"en": "in the sea", "fr": "dans la mer", "de": "im Meer"},
    "mountains": {"en": "in the mountains", "fr": "dans les montagnes", "de": "in den Bergen"},
    "lake": {"en": "by the lake", "fr": "près du lac", "de": "am See"},
    "jungle": {"en": "in the jungle", "fr": "dans la jungle", "de": "im Dschungel"},
    "river": {"en": "in the river", "fr": "dans la rivière", "de": "im Fluss"},
}
FOODS: dict[str, Tri] = {
    "mice": {"en": "mice", "fr": "des souris", "de": "Mäuse"},
    "meat": {"en": "meat", "fr": "de la viande", "de": "Fleisch"},
    "honey": {"en": "honey", "fr": "du miel", "de": "Honig"},
    "leaves": {"en": "leaves", "fr": "des feuilles", "de": "Blätter"},
    "nuts": {"en": "nuts", "fr": "des noix", "de": "Nüsse"},
    "grass": {"en": "grass", "fr": "de l'herbe", "de": "Gras"},
    "seeds": {"en": "seeds", "fr": "des graines", "de": "Samen"},
    "fish": {"en": "fish", "fr": "du poisson", "de": "Fisch"},
    "frogs": {"en": "frogs", "fr": "des grenouilles", "de": "Frösche"},
    "insects": {"en": "insects", "fr": "des insectes", "de": "Insekten"},
    "nectar": {"en": "nectar", "fr": "du nectar", "de": "Nektar"},
}


@dataclass(frozen=True)
class Country:
    """A country, its capital, its continent and its (main) language."""

    name: Tri
    of: Tri
    inside: Tri
    capital: Tri
    continent: str
    language: str


@dataclass(frozen=True)
class Animal:
    """An animal with a definite article, its pronoun, class, habitat and food."""

    bare: str
    name: Tri
    pronoun: Tri
    kind: str
    habitat: str
    food: str


def rows(table: str) -> list[list[str]]:
    """Split a table into stripped cells."""
    return [[c.strip() for c in line.split("|")] for line in table.strip().splitlines()]


def french_de(noun: str) -> str:
    """``de`` + a French noun with its article, contracted (``le Japon`` -> ``du Japon``)."""
    if noun.startswith("le "):
        return "du " + noun[3:]
    if noun.startswith("les "):
        return "des " + noun[4:]
    return "de " + noun


def german_of(noun: str) -> str:
    """``von`` + a German country; feminine names keep their article in the genitive."""
    return "der " + noun[4:] if noun.startswith("die ") else "von " + noun


def french_in(noun: str) -> str:
    """``en``, ``au`` or ``à`` + a French country name."""
    if noun.startswith("le "):
        return "au " + noun[3:]
    if noun.startswith("la "):
        return "en " + noun[3:]
    return "en " + noun[2:] if noun.startswith("l'") else "à " + noun


def german_in(noun: str) -> str:
    """``in`` + a German country name in the dative."""
    return "in der " + noun[4:] if noun.startswith("die ") else "in " + noun


def german_accusative(noun: str) -> str:
    """Accusative of a German noun with its definite article."""
    return "den " + noun[4:] if noun.startswith("der ") else noun


def _country(row: list[str]) -> Country:
    en, fr, de, cap_en, cap_fr, cap_de, continent, language = row
    return Country(
        name={"en": en, "fr": fr, "de": de},
        of={"en": "of " + en, "fr": french_de(fr), "de": german_of(de)},
        inside={"en": "in " + en, "fr": french_in(fr), "de": german_in(de)},
        capital={"en": cap_en, "fr": cap_fr, "de": cap_de},
        continent=continent,
        language=language,
    )


def _animal(row: list[str]) -> Animal:
    en, fr, de, kind, habitat, food = row
    fr, _, mark = fr.partition(":")
    feminine = mark == "f" or fr.startswith("la ")
    german = {"der": "er", "die": "sie", "das": "es"}[de.split()[0]]
    pronoun = {"en": "it", "fr": "elle" if feminine else "il", "de": german}
    return Animal(en, {"en": "the " + en, "fr": fr, "de": de}, pronoun, kind, habitat, food)


COUNTRIES = [_country(r) for r in rows(_COUNTRIES)]
ANIMALS = [_animal(r) for r in rows(_ANIMALS)]
LANGUAGES: dict[str, Tri] = {r[0]: dict(zip(LANGS, r, strict=True)) for r in rows(_LANGUAGE_NAMES)}
