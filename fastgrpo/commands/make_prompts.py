"""Training prompts for the rewards `geneval` and `ocr`, disjoint from what is evaluated:

    fastgrpo make-prompts geneval --exclude eval.jsonl --count 50000 --output train.jsonl --seed 0
    fastgrpo make-prompts ocr --exclude eval.txt --count 20000 --output train.jsonl --seed 0

geneval   lines of GenEval's format in its wording (djghosh13/geneval create_prompts.py), but with proper plurals where
          that adds an s ("benches", not "benchs"); skis and scissors, which are plurals, are not counted. A line is left
          out if the evaluation has one that means the same: "a bus left of a cow" is "a cow right of a bus". The tags
          come in Flow-GRPO's shares; a tag with fewer prompts than its share (there are 234 to count) repeats them.
ocr       one text of one to four words in double quotes, no prompt twice. A text is left out if the evaluation quotes
          it, as the reward compares: in any case and spacing.

A seed gives the same file anywhere.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice, permutations, product
from typing import Annotated

import numpy as np

from fastgrpo.commands.arguments import check_file, of_type, path
from fastgrpo.config import schema
from fastgrpo.config.bounds import AtLeast, AtMost
from fastgrpo.config.keys import Seed
from fastgrpo.data.prompts import load_prompts, write_prompts
from fastgrpo.rewards.geneval_rules import CLASSES, COLORS, RELATIONS, TAGS, check_record
from fastgrpo.rewards.ocr import target_text

Share = Annotated[float, AtLeast(0), AtMost(1_000_000)]
MIX = "position=7,counting=5,color_attr=3,colors=1,two_object=1,single_object=0"  # Flow-GRPO, arXiv 2505.05470
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "computer mouse": "computer mice"}
UNCOUNTED = ("skis", "scissors")
OPPOSITE = {"right of": "left of", "below": "above"}

CASES = [str.title, str.upper, str.lower]
TEMPLATES = [
    'A storefront with "{text}" painted above the door',
    'A neon sign that reads "{text}" in a dark alley',
    'A wooden signpost on a mountain trail saying "{text}"',
    'A birthday cake with "{text}" written in icing',
    'A white coffee mug printed with "{text}" on a desk',
    'A chalkboard in a café with "{text}" in neat handwriting',
    'A newspaper front page with the headline "{text}"',
    'A t-shirt with the words "{text}" across the chest',
    'A movie poster titled "{text}" in bold letters',
    'A book cover with the title "{text}" in gold',
    'A street at night, a billboard showing "{text}"',
    'A sandy beach with "{text}" drawn in the sand',
    'A cardboard box stamped "{text}" in a warehouse',
    'A train station board that displays "{text}"',
    'A bottle with a vintage label that says "{text}"',
    'A banner over a stadium entrance reading "{text}"',
    'A brick wall with the graffiti "{text}" in bright colors',
    'A robot holding up a card that says "{text}"',
    'A brass plaque engraved with "{text}" on an old building',
    'A smartphone screen with the notification "{text}"',
]
WORDS = (
    "open closed welcome sale fresh bread coffee garden ocean river mountain forest summer winter spring autumn morning "
    "midnight dream hope future music dance jazz piano guitar library museum gallery school science history travel "
    "adventure journey road bridge harbor island castle palace market bakery kitchen dinner lunch pizza lemon cherry "
    "apple honey sugar pepper golden silver red green blue purple bright quiet happy brave gentle royal ancient modern "
    "digital cosmic lunar solar rocket planet galaxy star moon thunder storm rainbow cloud snow fire water stone wild "
    "tiger eagle dolphin rabbit dragon wolf lion butterfly city village street avenue exit danger caution stop slow "
    "please today tomorrow forever never always first last grand little big new old lucky magic secret hidden club "
    "house hotel studio theater radio cinema festival party holiday service repair motors books flowers toys games"
).split()


def geneval_records(excluded: list[dict], count: int, seed: int, mix: dict[str, float]) -> list[dict]:
    """Makes `count` lines in the shares of `mix` by tag, shuffled, none of which means the same as one of `excluded`."""
    for record in excluded:
        check_record(record)
    rng = np.random.default_rng(seed)
    taken = {meaning(record) for record in excluded}
    records: list[dict] = []
    for tag, wanted in lines_per_tag(mix, count).items():
        build, choices = KINDS[tag]
        order: Iterable[int] = rng.permutation(len(choices)) if wanted else []
        fresh = (record for i in order if meaning(record := build(*choices[i])) not in taken)
        distinct = list(islice(fresh, wanted))
        if wanted and not distinct:
            raise ValueError(f"--mix {tag}={mix[tag]:g}: the excluded file has every prompt of this tag; give it 0")
        records += islice(cycle(distinct), wanted)
    return [records[i] for i in rng.permutation(len(records))]


def lines_per_tag(mix: dict[str, float], count: int) -> dict[str, int]:
    """Splits `count` in the ratio of `mix`; what rounding down leaves goes to the largest remainders."""
    exact = {tag: count * weight / sum(mix.values()) for tag, weight in mix.items()}
    whole = {tag: int(value) for tag, value in exact.items()}
    by_remainder = sorted(mix, key=lambda tag: whole[tag] - exact[tag])
    for tag in by_remainder[: count - sum(whole.values())]:
        whole[tag] += 1
    return whole


def meaning(record: dict) -> frozenset:
    """A value that is equal for records that ask for the same picture, however they are worded and ordered."""
    asked = set()
    for clause in record["include"]:
        asked.add((clause["class"], clause["count"], clause.get("color")))
        if "position" in clause:
            relation, target = clause["position"]
            pair = (clause["class"], record["include"][target]["class"])
            asked.add((OPPOSITE[relation], *pair[::-1]) if relation in OPPOSITE else (relation, *pair))
    return frozenset(asked)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return PLURALS.get(name, f"{name}es" if name.endswith(("s", "sh", "ch", "x")) else f"{name}s")


def _record(tag: str, include: list[dict], text: str, **more: list[dict]) -> dict:
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {text}"}


def _single(a: str) -> dict:
    return _record("single_object", [{"class": a, "count": 1}], _a(a))


def _two(a: str, b: str) -> dict:
    return _record("two_object", [{"class": a, "count": 1}, {"class": b, "count": 1}], f"{_a(a)} and {_a(b)}")


def _counting(a: str, n: int) -> dict:
    include, exclude = [{"class": a, "count": n}], [{"class": a, "count": n + 1}]
    return _record("counting", include, f"{NUMBERS[n]} {_plural(a)}", exclude=exclude)


def _colored(a: str, color: str) -> dict:
    return _record("colors", [{"class": a, "count": 1, "color": color}], f"{_a(color)} {a}")


def _position(a: str, b: str, relation: str) -> dict:
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    return _record("position", include, f"{_a(a)} {relation} {_a(b)}")


def _attribution(a: str, b: str, color_a: str, color_b: str) -> dict:
    include = [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}]
    return _record("color_attr", include, f"{_a(color_a)} {a} and {_a(color_b)} {b}")


THINGS = [name for name in CLASSES if name != "person"]  # people are asked for in no colour
PAIRS, COLOR_PAIRS = list(permutations(CLASSES, 2)), list(permutations(COLORS, 2))
# For each tag: how a record is made, and all that it can be made of.
KINDS: dict[str, tuple[Callable[..., dict], Sequence]] = {
    "single_object": (_single, [(a,) for a in CLASSES]),
    "two_object": (_two, PAIRS),
    "counting": (_counting, [(a, n) for a in CLASSES if a not in UNCOUNTED for n in NUMBERS]),
    "colors": (_colored, list(product(THINGS, COLORS))),
    "position": (_position, [(*pair, relation) for pair in PAIRS for relation in RELATIONS]),
    "color_attr": (_attribution, [(*pair, *c) for pair in permutations(THINGS, 2) for c in COLOR_PAIRS]),
}


def ocr_records(excluded: list[dict], count: int, seed: int) -> list[dict]:
    """Makes `count` different prompts that quote no text which one of `excluded` quotes."""
    rng = np.random.default_rng(seed)
    taken = {target_text(record["prompt"]) for record in excluded}
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        words = [WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(1, 4, endpoint=True))]
        text = CASES[rng.integers(len(CASES))](" ".join(words))
        prompt = TEMPLATES[rng.integers(len(TEMPLATES))].format(text=text)
        if target_text(prompt) not in taken:
            prompts[prompt] = None
    return [{"prompt": prompt} for prompt in prompts]


def parse_mix(text: str) -> dict[str, float]:
    """Reads `tag=weight,...`; a tag that is left out weighs nothing."""
    mix, given = dict.fromkeys(TAGS, 0.0), set()
    for item in text.split(","):
        tag, _, weight = item.partition("=")
        if tag not in mix:
            raise ValueError(f"--mix {item!r}: expected tag=weight, with a tag of {', '.join(TAGS)} and a weight from 0")
        if tag in given:
            raise ValueError(f"--mix {text!r}: {tag} stands twice; keep one of them")
        given.add(tag)
        mix[tag] = schema.convert(schema.parse_yaml(weight, f"--mix {item}"), Share, f"--mix {tag}")
    if not any(mix.values()):
        raise ValueError(f"--mix {text!r}: every weight is 0")
    return mix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("kind", choices=["geneval", "ocr"], help="the reward that the prompts are for")
    parser.add_argument("--exclude", type=path, nargs="*", default=[], help="prompt files whose prompts must not come up")
    parser.add_argument(
        "--count",
        type=of_type(Annotated[int, AtLeast(1), AtMost(100_000_000)]),
        required=True,
        help="number of lines to write",
    )
    parser.add_argument("--output", type=path, required=True, help="the .jsonl file to write")
    parser.add_argument("--seed", type=of_type(Seed), default=0, help="seed of the choice (default: %(default)s)")
    parser.add_argument("--mix", default=MIX, help="shares of the tags of geneval (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the prompt file."""
    check_file("--output", arguments.output)
    excluded = [record for path in arguments.exclude for record in load_prompts(path).metadata]
    if arguments.kind == "geneval":
        records = geneval_records(excluded, arguments.count, arguments.seed, parse_mix(arguments.mix))
    else:
        records = ocr_records(excluded, arguments.count, arguments.seed)
    write_prompts(arguments.output, records)
    return 0
