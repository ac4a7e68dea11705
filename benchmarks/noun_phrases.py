"""Compares light ways of finding noun phrases in captions, for K-LITE: which phrases with a definition does each find?

Usage: python benchmarks/noun_phrases.py [--show]

50 captions are labelled by hand: 30 to choose by, 20 after. A phrase counts as WordNet has it, after
its leading words are dropped, since that is what is explained. Ways:

    hanta       what `modeclip curate klite` does: runs of adjectives and nouns by the tags of HanTa
    textblob    the same with the tags of textblob (pip install textblob), if it is there
    longest     no tagger: the longest nouns of WordNet; a single word only where it is most often a noun there
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable

from modeclip.curation.klite import noun_phrases
from modeclip.data.wordnet import WordNet, load_wordnet

SEEN = """\
a man riding a wave on top of a surfboard | man, wave, top, surfboard
two small dogs play with a red ball in the park | small dogs, red ball, park
Vintage postcard of the Eiffel Tower, Paris | vintage postcard, eiffel tower, paris
arrow left circle | arrow left circle
Golden retriever puppy running through tall grass | golden retriever puppy, tall grass
close up of a ripe strawberry on a wooden table | ripe strawberry, wooden table
The cat sits quietly beside an old radiator | cat, old radiator
Men's leather wallet - brown | men's leather wallet
a woman is cooking pasta in a large pot | woman, pasta, large pot
sunset over the Pacific Ocean seen from a cliff | sunset, pacific ocean, cliff
How to bake sourdough bread at home | sourdough bread, home
people waiting at a bus stop in heavy rain | people, bus stop, heavy rain
an illustration of a hot air balloon floating above mountains | illustration, hot air balloon, mountains
he paints the fence with a broad brush | fence, broad brush
shopping cart plus | shopping cart
antique brass candlestick on white marble | antique brass candlestick, white marble
children building a sand castle near the sea | children, sand castle, sea
Blue and white porcelain vase from the Ming dynasty | white porcelain vase, ming dynasty
a very tall giraffe eats leaves from an acacia tree | tall giraffe, leaves, acacia tree
the old fisherman mends his nets | old fisherman, nets
black and white photo of a steam locomotive leaving the station | white photo, steam locomotive, station
Best wireless headphones for running in 2021 | best wireless headphones
a plate of grilled salmon with lemon and asparagus | plate, grilled salmon, lemon, asparagus
Cartoon fox jumps over a lazy dog | cartoon fox, lazy dog
snow covered roofs of a mountain village | roofs, mountain village
young couple walks hand in hand along the beach | young couple, hand, hand, beach
an ox pulling a plow | ox, plow
side view of a vintage red sports car parked outside | side view, vintage red sports car
a knife cuts a loaf of bread into thin slices | knife, loaf, bread, thin slices
Portrait of a smiling girl wearing a straw hat | portrait, smiling girl, straw hat"""
HELD_OUT = """\
a bearded man plays the guitar on a dimly lit stage | bearded man, guitar, lit stage
Two women shake hands across a desk | women, hands, desk
Handmade ceramic mug with blue glaze | handmade ceramic mug, blue glaze
aerial view of rice terraces in Vietnam | aerial view, rice terraces, vietnam
a lighthouse stands on the rocky shore | lighthouse, rocky shore
user check circle outline | user check circle outline
Kids climbing a rope ladder at summer camp | kids, rope ladder, summer camp
She holds an umbrella while crossing the street | umbrella, street
macro photo of a dragonfly resting on a reed | macro photo, dragonfly, reed
Stainless steel kitchen sink - double bowl | stainless steel kitchen sink, double bowl
the train leaves the station at dawn | train, station, dawn
Free printable calendar for teachers | free printable calendar, teachers
a bowl of hot soup and a slice of rye bread | bowl, hot soup, slice, rye bread
crowd cheering at a football match | crowd, football match
A squirrel buries nuts under fallen leaves | squirrel, nuts, fallen leaves
wedding dress with lace sleeves | wedding dress, lace sleeves
Map of the ancient Roman Empire | map, ancient roman empire
we visited the national museum last summer | national museum, last summer
silhouette of palm trees against an orange sky | silhouette, palm trees, orange sky
empty wine bottles lined up along a brick wall | empty wine bottles, brick wall"""
WORD_OR_SIGN = r"\w+(?:['’-]\w+)*|[^\w\s]"
FUNCTION_WORDS = re.findall(
    r"\w+",
    "a an the this that his her its their my of in on at by for with from to into over above beside near under along "
    "around through and or is are was how what he she it we they i as seen best very",
)


def longest(wordnet: WordNet, caption: str) -> list[str]:
    """Return the longest nouns of WordNet in a caption."""
    words, found, place = re.findall(r"\w+(?:['’-]\w+)*", caption.lower()), [], 0
    while place < len(words):
        for length in range(min(4, len(words) - place), 0, -1):
            phrase = " ".join(words[place : place + length])
            if wordnet.senses(phrase, "n") and (length > 1 or is_mostly_noun(wordnet, phrase)):
                found.append(phrase)
                place += length - 1
                break
        place += 1
    return found


def is_mostly_noun(wordnet: WordNet, word: str) -> bool:
    """Return whether a word is tagged as a noun at least as often as anything else."""
    times = {pos: sum(1 + max(sense.counts) for sense in wordnet.senses(word, pos)) for pos in "nvar"}
    return word not in FUNCTION_WORDS and times["n"] == max(times.values())


def textblob_phrases() -> Callable[[str], list[str]] | None:
    """Return what finds phrases by the tags of textblob; None if it is not installed."""
    try:
        from textblob.en import tag
    except ImportError:
        return None

    def phrases(caption: str) -> list[str]:
        text = ""
        for word, kind in tag(" ".join(re.findall(WORD_OR_SIGN, caption.lower())), tokenize=False):
            text += f" {word}" if kind.startswith(("NN", "JJ", "VBN")) else "|"
        return [phrase.strip() for phrase in text.split("|") if phrase.strip()]

    return phrases


def main() -> None:
    """Print precision, recall and microseconds of each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="the captions that a way gets wrong")
    show, wordnet = parser.parse_args().show, load_wordnet()

    def known(phrases: Iterable[str]) -> Counter[str]:
        found = Counter[str]()
        for phrase in phrases:
            words = phrase.split()
            rests = (" ".join(words[start:]) for start in range(len(words)))
            found.update([rest for rest in rests if wordnet.senses(rest)][:1])
        return found

    ways = {
        "hanta": noun_phrases,
        "textblob": textblob_phrases(),
        "longest": lambda caption: longest(wordnet, caption),
    }
    for name, way in ways.items():
        if way is None:
            continue
        way("a word")  # loads what it needs
        for which, labelled in (("seen", SEEN), ("held out", HELD_OUT)):
            right = given = wanted = 0
            seconds = 0.0
            for line in labelled.splitlines():
                caption, _, phrases = line.partition(" | ")
                started = time.process_time()
                found = known(way(caption))
                seconds += time.process_time() - started
                expected = known(phrases.split(", "))
                right += (found & expected).total()
                given, wanted = given + found.total(), wanted + expected.total()
                if show and found != expected:
                    print(f"  {caption}: too many {list(found - expected)}, missing {list(expected - found)}")
            precision, recall = right / given, right / wanted
            f1 = 2 * precision * recall / (precision + recall)
            count = len(labelled.splitlines())
            print(
                f"{name:8} {which:9} precision {precision:.2f} recall {recall:.2f} F1 {f1:.2f},"
                f" {1e6 * seconds / count:.0f} us a caption"
            )


if __name__ == "__main__":
    main()
