"""Facts about countries, and which of them a model knows.

A fact counts only where the model answers it itself: what it does not know cannot be read from its
states, and a reading that says it all the same would speak of something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.inspection.readings import Tokens, said_of
from steer.engines.base import Engine
from steer.prompts import inner_tokens, text_tokens

_COUNTRIES = """
France|Paris|French|Marseille
Germany|Berlin|German|Munich
Italy|Rome|Italian|Milan
Spain|Madrid|Spanish|Barcelona
Portugal|Lisbon|Portuguese|Porto
Japan|Tokyo|Japanese|Osaka
China|Beijing|Chinese|Shanghai
Russia|Moscow|Russian|Vladivostok
Greece|Athens|Greek|Thessaloniki
Turkey|Ankara|Turkish|Istanbul
Egypt|Cairo|Arabic|Alexandria
Poland|Warsaw|Polish|Krakow
Sweden|Stockholm|Swedish|Gothenburg
Norway|Oslo|Norwegian|Bergen
Denmark|Copenhagen|Danish|Aarhus
Finland|Helsinki|Finnish|Tampere
Hungary|Budapest|Hungarian|Debrecen
Austria|Vienna|German|Salzburg
Netherlands|Amsterdam|Dutch|Rotterdam
Belgium|Brussels|Dutch|Antwerp
Ireland|Dublin|English|Cork
Iceland|Reykjavik|Icelandic|Akureyri
Romania|Bucharest|Romanian|Timisoara
Bulgaria|Sofia|Bulgarian|Plovdiv
Ukraine|Kyiv|Ukrainian|Odessa
Croatia|Zagreb|Croatian|Dubrovnik
Serbia|Belgrade|Serbian|Novi Sad
Czechia|Prague|Czech|Brno
Slovakia|Bratislava|Slovak|Kosice
Slovenia|Ljubljana|Slovenian|Maribor
Latvia|Riga|Latvian|Daugavpils
Lithuania|Vilnius|Lithuanian|Kaunas
Estonia|Tallinn|Estonian|Tartu
Albania|Tirana|Albanian|Durres
Georgia|Tbilisi|Georgian|Batumi
Armenia|Yerevan|Armenian|Gyumri
Iran|Tehran|Persian|Isfahan
Iraq|Baghdad|Arabic|Mosul
Syria|Damascus|Arabic|Aleppo
Lebanon|Beirut|Arabic|Tripoli
Jordan|Amman|Arabic|Aqaba
Israel|Jerusalem|Hebrew|Haifa
Pakistan|Islamabad|Urdu|Karachi
India|New Delhi|Hindi|Mumbai
Nepal|Kathmandu|Nepali|Pokhara
Bangladesh|Dhaka|Bengali|Chittagong
Thailand|Bangkok|Thai|Phuket
Vietnam|Hanoi|Vietnamese|Da Nang
Indonesia|Jakarta|Indonesian|Surabaya
Malaysia|Kuala Lumpur|Malay|Penang
Philippines|Manila|Filipino|Cebu
South Korea|Seoul|Korean|Busan
North Korea|Pyongyang|Korean|Hamhung
Mongolia|Ulaanbaatar|Mongolian|Erdenet
Australia|Canberra|English|Sydney
New Zealand|Wellington|English|Auckland
Canada|Ottawa|English|Vancouver
Mexico|Mexico City|Spanish|Guadalajara
Cuba|Havana|Spanish|Santiago de Cuba
Brazil|Brasilia|Portuguese|Sao Paulo
Argentina|Buenos Aires|Spanish|Rosario
Chile|Santiago|Spanish|Valparaiso
Peru|Lima|Spanish|Cusco
Colombia|Bogota|Spanish|Medellin
Venezuela|Caracas|Spanish|Maracaibo
Ecuador|Quito|Spanish|Guayaquil
Morocco|Rabat|Arabic|Casablanca
Algeria|Algiers|Arabic|Oran
Tunisia|Tunis|Arabic|Sfax
Kenya|Nairobi|Swahili|Mombasa
Ethiopia|Addis Ababa|Amharic|Gondar
Nigeria|Abuja|English|Lagos
Ghana|Accra|English|Kumasi
Senegal|Dakar|French|Touba
South Africa|Pretoria|English|Durban
"""


@dataclass(frozen=True)
class Country:
    """A country, its capital and language, and a city that is not the capital."""

    name: str
    capital: str
    language: str
    city: str


COUNTRIES = tuple(Country(*line.split("|")) for line in _COUNTRIES.split("\n") if line)

CAPITAL, LANGUAGE = "The capital of {} is", "The language that most people speak in {} is"
HOP = "{} is a large city in the country of"
BOTH_HOPS = "The capital of the country in which {} is a large city is"
SOURCE = "Last year I met somebody from {}"
"""Says nothing of what is asked for; the state is that of its last token."""


def first_token(engine: Engine, answer: str) -> int:
    """The first token of an answer that follows a word."""
    return inner_tokens(engine.tokenizer, f" {answer}")[0]


def prompts(engine: Engine, template: str, names: Sequence[str]) -> list[Tokens]:
    return [tuple(text_tokens(engine.tokenizer, template.format(name))) for name in names]


def answered(
    engine: Engine, template: str, names: Sequence[str], answers: Sequence[str]
) -> list[bool]:
    """Whether the model itself goes on from each prompt with the answer's first token."""
    wanted = [first_token(engine, answer) for answer in answers]
    said = said_of(engine, prompts(engine, template, names), wanted)
    return [one.top[0].id == token for one, token in zip(said, wanted, strict=True)]
