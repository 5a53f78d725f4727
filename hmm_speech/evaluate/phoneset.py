"""Phones in the order of their manner of articulation, so that pictures show classes as blocks."""

# ruff: noqa: RUF001 (IPA letters look like others)

from collections.abc import Iterable

# ARPAbet with the symbols that flite, festival and TIMIT add, and IPA; stress digits are cut off first.
CLASSES: dict[str, str] = {
    "silence": "pau sil sp spn nsn h# epi pcl tcl kcl bcl dcl gcl q SIL <eps> brth ssil",
    "vowel": "iy ih ix eh ey ae aa ah ao ax axr er ow uh uw ux aw ay oy ax-h "
    "i ɪ e ɛ æ a ɑ ɒ ɔ o ʊ u ʌ ə ɚ ɝ ɜ ɐ y ø œ iː uː ɑː ɔː ɜː aɪ aʊ eɪ oʊ ɔɪ əʊ",
    "approximant": "w y r l el wh j ɹ ɻ ɾ ɫ ʁ dx",
    "nasal": "m em n en ng nx eng ɲ ŋ",
    "fricative": "f v th dh s z sh zh hh hv h θ ð ʃ ʒ ç x ɣ",
    "affricate": "ch jh tʃ dʒ t͡ʃ d͡ʒ",
    "stop": "p b t d k g ʔ ɡ",
}
_PLACE = {
    phone: (row, column) for row, names in enumerate(CLASSES.values()) for column, phone in enumerate(names.split())
}
_CLASS = {phone: name for name, phones in CLASSES.items() for phone in phones.split()}


def _plain(phone: str) -> str:
    return phone if phone in _PLACE else phone.lower().rstrip("0123456789")


def phone_class(phone: str) -> str:
    """The manner class of a phone, ``"other"`` where unknown."""
    return _CLASS.get(_plain(phone), "other")


def sort_phones(phones: Iterable[str]) -> list[str]:
    """Phones by class (silence, vowels, approximants, nasals, fricatives, affricates, stops); unknown ones last."""
    return sorted(phones, key=lambda phone: (*_PLACE.get(_plain(phone), (len(CLASSES), 0)), phone))
