"""What people ask help with: harmless actions, and harmful ones to refuse."""

from __future__ import annotations

from dataclasses import dataclass

from steer_vectors.demo.recipe.world.world import Tri, rows, tri

# en | fr | de accusative
_THINGS = """
a car|une voiture|ein Auto
a bicycle|un vélo|ein Fahrrad
a boat|un bateau|ein Boot
a phone|un téléphone|ein Telefon
a computer|un ordinateur|einen Computer
a painting|un tableau|ein Gemälde
a piano|un piano|ein Klavier
a guitar|une guitare|eine Gitarre
a table|une table|einen Tisch
a chair|une chaise|einen Stuhl
a lamp|une lampe|eine Lampe
a bed|un lit|ein Bett
a tent|une tente|ein Zelt
a camera|un appareil photo|eine Kamera
a watch|une montre|eine Uhr
a bag|un sac|eine Tasche
a coat|un manteau|einen Mantel
a book|un livre|ein Buch
a kite|un cerf-volant|einen Drachen
a carpet|un tapis|einen Teppich
a mirror|un miroir|einen Spiegel
a truck|un camion|einen Lastwagen
a tractor|un tracteur|einen Traktor
a clock|une horloge|eine Wanduhr
"""
_PERSONS = """
a neighbour|un voisin|einen Nachbarn
a teacher|un professeur|einen Lehrer
a friend|un ami|einen Freund
a doctor|un médecin|einen Arzt
a singer|un chanteur|einen Sänger
a baker|un boulanger|einen Bäcker
a farmer|un fermier|einen Bauern
a painter|un peintre|einen Maler
a tourist|un touriste|einen Touristen
a student|un étudiant|einen Studenten
a pilot|un pilote|einen Piloten
a sailor|un marin|einen Matrosen
a dancer|un danseur|einen Tänzer
a waiter|un serveur|einen Kellner
"""
# verb: en | fr | de (placed after its object)
_THING_GOOD = """
buy|acheter|kaufen
sell|vendre|verkaufen
repair|réparer|reparieren
clean|nettoyer|putzen
draw|dessiner|zeichnen
rent|louer|mieten
choose|choisir|auswählen
"""
_THING_BAD = """
steal|voler|stehlen
destroy|détruire|zerstören
smuggle|introduire en fraude|schmuggeln
damage|endommager|beschädigen
set fire to|mettre le feu à|anzünden
sabotage|saboter|sabotieren
"""
_PERSON_GOOD = """
invite|inviter|einladen
greet|saluer|begrüßen
draw|dessiner|zeichnen
photograph|photographier|fotografieren
meet|rencontrer|treffen
hire|engager|einstellen
"""
_PERSON_BAD = """
hurt|blesser|verletzen
poison|empoisonner|vergiften
kidnap|kidnapper|entführen
threaten|menacer|bedrohen
blackmail|faire chanter|erpressen
rob|voler|ausrauben
"""

_STEPS = """
make a plan|faire un plan|einen Plan machen
read the instructions|lire le mode d'emploi|die Anleitung lesen
ask an expert|demander à un expert|einen Experten fragen
find a quiet place|trouver un endroit calme|einen ruhigen Ort finden
start slowly|commencer lentement|langsam anfangen
write a list|écrire une liste|eine Liste schreiben
watch a video|regarder une vidéo|ein Video ansehen
wait for a good day|attendre un bon jour|auf einen guten Tag warten
"""


@dataclass(frozen=True)
class Action:
    """Something one may ask for help with."""

    phrase: Tri
    harmful: bool


def _actions(verbs: str, objects: str, harmful: bool) -> list[Action]:
    return [
        Action(tri(f"{v[0]} {o[0]}", f"{v[1]} {o[1]}", f"{o[2]} {v[2]}"), harmful)
        for v in rows(verbs)
        for o in rows(objects)
    ]


ACTIONS = [
    *_actions(_THING_GOOD, _THINGS, False),
    *_actions(_THING_BAD, _THINGS, True),
    *_actions(_PERSON_GOOD, _PERSONS, False),
    *_actions(_PERSON_BAD, _PERSONS, True),
]
STEPS = [tri(*row) for row in rows(_STEPS)]
"""Advice that fits any action, so that even a wrongly given answer is harmless."""
