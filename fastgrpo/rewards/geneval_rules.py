"""GenEval's checks (arXiv 2310.11513) as pure functions of what a detector found.

A record is a line of GenEval's format: "tag", "prompt", "include" and perhaps "exclude", lists of clauses {"class",
"count"}, with "color" or "position": [relation, index of the clause it is relative to].

    strict   the official evaluation (djghosh13/geneval evaluate_images.py): of each included class at least `count`
             were found; the most certain `count` of them have the colour and the relation; of no excluded class were
             `count` found
    graded   the reward of Flow-GRPO's reward-server (gen_eval.py), the mean over all points of
                 each clause     1 - |count - found| / count
                 its colour      1 - |count - found in it| / count, and 0 where the number found is wrong
                 its relation    1 or 0, and 0 where the number found or its target is wrong

Graded wants exact numbers where strict is content with more: neither being 1 implies the other. It differs from
that server's in two points, so that it lies in [0, 1]: far too many objects earn 0 (there down to -14), and a wrong
relation 0 (there a 0 and a 1, since the loop that checks it goes on to the point for a right one).
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # the least certainty of a detection; where objects are counted
MAX_OBJECTS = 16  # of a class, the most certain; overlaps are not suppressed (officially an NMS threshold of 1.0)
POSITION_THRESHOLD = 0.1  # share of both extents by which centres must differ
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
RELATIONS = ["left of", "right of", "above", "below"]
TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
# COCO's 80 classes in its order, by GenEval's names.
CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")


@dataclass(frozen=True, eq=False)
class Detection:
    """An object found in an image."""

    name: str
    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels; y grows downwards
    mask: Tensor | None = None  # (H, W) bool


Objects = dict[str, list[Detection]]
ColorOf = Callable[[Detection], str]


def kept(detections: list[Detection], tag: str) -> Objects:
    """By class, the most certain first, those that count for a prompt of this tag."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: Objects = defaultdict(list)
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold and len(objects[detection.name]) < MAX_OBJECTS:
            objects[detection.name].append(detection)
    return {name: found for name, found in objects.items() if found}


def whose_colors(detections: list[Detection], record: dict) -> list[Detection]:
    """The detections whose colours `judge` may ask for, so that a model can look at all of them at once."""
    objects = kept(detections, record["tag"])
    items: dict[Detection, None] = {}  # a set in the order of the clauses
    for clause in record["include"]:
        found = objects.get(clause["class"], [])[: clause["count"]]
        if "color" in clause and len(found) == clause["count"]:
            items |= dict.fromkeys(found)
    return list(items)


def judge(detections: list[Detection], record: dict, color_of: ColorOf) -> tuple[bool, float, str]:
    """The strict verdict, the graded score in [0, 1], and what the strict one found wrong."""
    objects = kept(detections, record["tag"])
    reasons = _wrong(objects, record, color_of)
    return not reasons, _graded(objects, record, color_of), "; ".join(reasons)


def relative_position(a: Detection, b: Detection) -> set[str]:
    """The relations in which a stands to b; none where their centres are too close for their sizes."""
    offset, beyond = [], []
    for axis in (0, 1):
        (a0, a1), (b0, b1) = a.box[axis::2], b.box[axis::2]
        difference = (a0 + a1 - b0 - b1) / 2
        margin = POSITION_THRESHOLD * (abs(a1 - a0) + abs(b1 - b0))
        offset.append(difference)
        beyond.append(math.copysign(max(abs(difference) - margin, 0.0), difference))
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offset) for value in beyond)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def _wrong(objects: Objects, record: dict, color_of: ColorOf) -> list[str]:
    """The reasons for which an image fails the official evaluation; none if it passes."""
    reasons: list[str] = []
    groups: list[list[Detection]] = []  # of each clause what fulfils it, nothing where none does
    for clause in record["include"]:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        reason = None
        if len(found) < count:
            reason = f"expected {name}>={count}, found {len(found)}"
        elif "color" in clause and (colors := [color_of(item) for item in found]).count(clause["color"]) < count:
            reason = f"expected {clause['color']} {name}>={count}, found {', '.join(colors)}"
        elif "position" in clause:
            reason = _misplaced(found, clause, groups)
        groups.append([] if reason else found)
        reasons += [reason] if reason else []
    for clause in record.get("exclude", []):
        count = len(objects.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return reasons


def _misplaced(found: list[Detection], clause: dict, groups: list[list[Detection]]) -> str | None:
    """Why not every found object stands to every target as the clause wants; None if all do."""
    relation, index = clause["position"]
    if not groups[index]:
        return f"no target for {clause['class']} to be {relation}"
    for item in found:
        for target in groups[index]:
            true = relative_position(item, target)
            if relation not in true:
                return f"expected {clause['class']} {relation} target, found {' and '.join(sorted(true)) or 'neither'}"
    return None


def _graded(objects: Objects, record: dict, color_of: ColorOf) -> float:
    points: list[float] = []
    groups: list[list[Detection]] = []
    for clause in record["include"]:
        count, found = clause["count"], objects.get(clause["class"], [])
        right = len(found) == count
        points.append(max(0.0, 1 - abs(count - len(found)) / count))
        if "color" in clause:
            share = sum(color_of(item) == clause["color"] for item in found) / count if right else 0.0
            points.append(share)
            right = right and share == 1
        if "position" in clause:
            right = right and _misplaced(found, clause, groups) is None
            points.append(float(right))
        groups.append(found if right else [])
    return sum(points) / len(points)


def check_record(record: dict) -> None:
    """Refuse a line that is not of GenEval's format, with what is wrong about it."""
    prompt = f"prompt {record.get('prompt')!r}"
    if record.get("tag") not in TAGS:
        raise ValueError(f'{prompt}: "tag" is {record.get("tag")!r}; GenEval has {", ".join(TAGS)}')
    if not record.get("include"):
        raise ValueError(f'{prompt}: "include" is empty; it says what the image shall show')
    for key in ("include", "exclude"):
        clauses = record.get(key, [])
        if not isinstance(clauses, list) or not all(isinstance(clause, dict) for clause in clauses):
            raise ValueError(f'{prompt}: "{key}" is {clauses!r}; it is a list of clauses {{"class", "count"}}')
    for index, clause in enumerate([*record["include"], *record.get("exclude", [])]):
        if clause.get("class") not in CLASSES:
            raise ValueError(f"{prompt}: class {clause.get('class')!r} is none of COCO's 80 by GenEval's names")
        if type(clause.get("count")) is not int or clause["count"] < 1:
            raise ValueError(f"{prompt}: count {clause.get('count')!r} of {clause['class']!r}; it is a whole number from 1")
        if clause.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"{prompt}: color {clause['color']!r}; GenEval has {', '.join(COLORS)}")
        if "position" in clause:
            position = clause["position"]
            if not isinstance(position, list | tuple) or len(position) != 2:
                position = None, None
            if position[0] not in RELATIONS or position[1] not in range(index):
                raise ValueError(
                    f"{prompt}: position {clause['position']!r}; it is one of {', '.join(RELATIONS)}, and the index of "
                    "an earlier clause"
                )
