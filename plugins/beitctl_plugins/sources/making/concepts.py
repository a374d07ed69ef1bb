"""What the embedded pictures show, in words that can be asked about.

The classes are coarse (``people`` holds hats, ``recreation`` all from chess to Christmas), so a concept
follows from the finer name that a picture has. Tags say which concepts may be seen in one picture together:
only of concepts without a common tag is it sure that the one is not there where the other is.
"""

import functools
from collections.abc import Mapping
from typing import Any

FINE = (
    ("animals/birds", "bird"),
    ("animals/bugs", "bug"),
    ("animals/fish", "fish"),
    ("buildings/furniture", "furniture"),
    ("floral", "flower"),
    ("food/beverages", "drink"),
    ("food/desserts", "dessert"),
    ("food/fruit", "fruit"),
    ("people/bodypart", "body part"),
    ("people/clothing", "clothing"),
    ("people/smilies", "smiley"),
    ("plants/flowers", "flower"),
    ("plants/trees", "tree"),
    ("recreation/games", "game"),
    ("recreation/holiday", "holiday"),
    ("recreation/music", "music"),
    ("recreation/party", "holiday"),
    ("recreation/religion", "religion"),
    ("recreation/sports", "sport"),
    ("recreation/toys", "toy"),
    ("solar power", "solar panel"),
    ("windmill", "windmill"),
)
"""Beginning of the finer name, and the concept; of all others the class is the concept."""
CLASSES = {"flower picture": "flower", "people": "person"}
"""Classes under another name than their own."""
CONCEPTS = {
    "animal": ("an animal", "animal"),
    "bird": ("a bird", "animal"),
    "body part": ("a part of the body", "person"),
    "bug": ("a bug", "animal"),
    "building": ("a building", "building person vehicle plant energy religion art"),
    "clothing": ("a piece of clothing", "person"),
    "dessert": ("a dessert", "food"),
    "drink": ("a drink", "food household"),
    "electronics": ("an electronic device", "electronics office household music science tool energy"),
    "energy": ("a source of energy", "energy building"),
    "fish": ("a fish", "animal"),
    "flower": ("a flower", "plant"),
    "food": ("something to eat", "food animal plant"),
    "fruit": ("a fruit", "food plant"),
    "furniture": ("a piece of furniture", "household office building"),
    "game": ("a game", "game sport"),
    "holiday": ("something for a holiday", "holiday person plant religion food game animal"),
    "household": ("a household object", "household tool food sport building electronics office"),
    "landscape": ("a landscape", "art person animal building plant vehicle"),
    "metalwork": ("a piece of metalwork", "art household tool religion person music"),
    "music": ("something to do with music", "music person game"),
    "nebula": ("a nebula", "space"),
    "office": ("something for the office", "office household electronics tool"),
    "painting": ("a painting", "art person animal building plant vehicle religion household"),
    "person": ("a person", "person sport holiday vehicle"),
    "planet": ("a planet", "space science"),
    "plant": ("a plant", "plant"),
    "portrait": ("a portrait", "art person animal household"),
    "pottery": ("a piece of pottery", "art household food"),
    "recreation": ("something for the spare time", "game sport person holiday music vehicle plant food tool"),
    "religion": ("a religious symbol", "religion person holiday building art space"),
    "science": ("something to do with science", "science space tool electronics household"),
    "sculpture": ("a sculpture", "art person religion animal"),
    "seascape": ("the sea", "art person animal building plant vehicle"),
    "smiley": ("a smiley face", "person game"),
    "solar panel": ("a solar panel", "energy building electronics"),
    "spacecraft": ("something from space flight", "space science person vehicle"),
    "sport": ("something to do with sports", "sport person game"),
    "tool": ("a tool", "tool household office science sport electronics"),
    "toy": ("a toy", "game sport animal person holiday vehicle"),
    "tree": ("a tree", "plant building"),
    "vehicle": ("a vehicle", "vehicle person tool"),
    "windmill": ("a windmill", "energy building"),
}
"""Phrase for a concept, and its tags."""
SPACE = ("nebula", "planet", "spacecraft")


def concept(row: Mapping[str, Any]) -> str:
    """What the picture of a row shows."""
    return _concept(row["fine"], row["label"])


@functools.cache
def _concept(fine: str, label: str) -> str:
    return next((name for start, name in FINE if fine.startswith(start)), CLASSES.get(label, label))


def phrase(name: str) -> str:
    """A concept with its article."""
    return CONCEPTS[name][0]


@functools.cache
def _tags(name: str) -> frozenset[str]:
    return frozenset(CONCEPTS[name][1].split())


def shows(name: str, row: Mapping[str, Any]) -> bool | None:
    """Whether a concept is in the picture of a row; None where that is not sure."""
    there = concept(row)
    if there == name:
        return True
    tags = _tags(there) | _tags("painting") if row["label"] == "flower picture" else _tags(there)
    return None if tags & _tags(name) else False


def style(row: Mapping[str, Any]) -> str | None:
    """``photograph``, ``drawing`` or ``work of art``; None of pictures from space, which are in between."""
    if row["kind"] == "museum":
        return None if row["label"] in SPACE else "work of art"
    return "photograph" if row["kind"] == "photo" else "drawing"


def has_style(name: str, row: Mapping[str, Any]) -> bool | None:
    """Whether the picture of a row is of a style; None where that is not sure: a vase can be photographed."""
    there = style(row)
    if there is None or {there, name} == {"photograph", "work of art"}:
        return None
    return there == name
