"""GenEval's rules on detections made by hand, and the whole path with a tiny detector and a tiny CLIP."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from fastgrpo.data.prompts import load_prompts
from fastgrpo.rewards import REWARDS, load_reward
from fastgrpo.rewards.geneval import Colors, Detector, GenEval, GenEvalGraded, cut_out, detections
from fastgrpo.rewards.geneval_rules import CLASSES, COLORS, Detection, check_record, judge, kept, whose_colors
from fastgrpo.testing.tokenizers import clip_tokenizer

CPU = torch.device("cpu")


def clause(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


def record(tag: str, *include: dict, exclude: dict | None = None) -> dict:
    made = {"tag": tag, "include": list(include), "prompt": f"a photo for {tag}"}
    check_record(made)
    return {**made, "exclude": [exclude]} if exclude else made


def seen(name: str, left: float = 0, top: float = 0, score: float = 0.95, size: float = 20) -> Detection:
    return Detection(name, score, (left, top, left + size, top + size))


SINGLE = record("single_object", clause("oven"))
TWO = record("two_object", clause("oven"), clause("bed"))
THREE = record("counting", clause("bird", 3), exclude=clause("bird", 4))
RED = record("colors", clause("kite", color="red"))
ABOVE = record("position", clause("bed"), clause("oven", position=["above", 0]))
BOTH = record("color_attr", clause("kite", color="red"), clause("vase", color="blue"))
OVER_RED = record("position", clause("bed", color="red"), clause("oven", position=["above", 0]))
BIRDS = [seen("bird", 30 * i) for i in range(5)]

# what it is, record, detections, colours by class, strict, graded, part of the reason
CASES = [
    ("there", SINGLE, [seen("oven")], {}, True, 1, ""),
    ("others do not matter", SINGLE, [seen("oven"), seen("bed")], {}, True, 1, ""),
    ("absent", SINGLE, [seen("bed")], {}, False, 0, "expected oven>=1, found 0"),
    ("nothing seen", SINGLE, [], {}, False, 0, "expected oven>=1, found 0"),
    ("too uncertain", SINGLE, [seen("oven", score=0.3)], {}, False, 0, "found 0"),
    ("certain enough", SINGLE, [seen("oven", score=0.31)], {}, True, 1, ""),
    ("strict tolerates a second one", SINGLE, [seen("oven"), seen("oven", 50)], {}, True, 0, ""),
    ("both", TWO, [seen("oven"), seen("bed")], {}, True, 1, ""),
    ("one of two", TWO, [seen("bed")], {}, False, 0.5, "expected oven>=1"),
    ("neither", TWO, [], {}, False, 0, "expected oven>=1, found 0; expected bed>=1, found 0"),
    ("crowds are no worse than nothing", TWO, [seen("bed"), *[seen("oven")] * 9], {}, True, 0.5, ""),
    ("three", THREE, BIRDS[:3], {}, True, 1, ""),
    ("two of three", THREE, BIRDS[:2], {}, False, 2 / 3, "expected bird>=3, found 2"),
    ("four of three", THREE, BIRDS[:4], {}, False, 2 / 3, "expected bird<4, found 4"),
    ("five of three", THREE, BIRDS, {}, False, 1 / 3, "expected bird<4, found 5"),
    ("counting is surer", THREE, [*BIRDS[:3], seen("bird", score=0.9)], {}, True, 1, ""),
    ("the third is unsure", THREE, [*BIRDS[:2], seen("bird", score=0.9)], {}, False, 2 / 3, "found 2"),
    ("right colour", RED, [seen("kite")], {"kite": "red"}, True, 1, ""),
    ("wrong colour", RED, [seen("kite")], {"kite": "pink"}, False, 0.5, "expected red kite>=1, found pink"),
    ("no object to colour", RED, [], {}, False, 0, "expected kite>=1, found 0"),
    ("above", ABOVE, [seen("oven"), seen("bed", 0, 60)], {}, True, 1, ""),
    ("below", ABOVE, [seen("oven", 0, 60), seen("bed")], {}, False, 2 / 3, "expected oven above target, found below"),
    ("right of", ABOVE, [seen("oven", 60), seen("bed")], {}, False, 2 / 3, "found right of"),
    ("left of", ABOVE, [seen("oven"), seen("bed", 60)], {}, False, 2 / 3, "found left of"),
    ("aslant", ABOVE, [seen("oven", 60), seen("bed", 0, 60)], {}, True, 1, ""),
    ("on one another", ABOVE, [seen("oven"), seen("bed", 0, 4)], {}, False, 2 / 3, "found neither"),
    ("nothing to be above", ABOVE, [seen("oven")], {}, False, 1 / 3, "no target for oven to be above"),
    ("nothing that is above", ABOVE, [seen("bed")], {}, False, 1 / 3, "expected oven>=1, found 0"),
    ("the surest is placed", ABOVE, [seen("oven", 0, 90, 0.5), seen("oven"), seen("bed", 0, 60)], {}, True, 1 / 3, ""),
    ("above a wrong one", OVER_RED, [seen("oven"), seen("bed", 0, 60)], {"bed": "blue"}, False, 0.5, "no target for oven"),
    ("both colours", BOTH, [seen("kite"), seen("vase")], {"kite": "red", "vase": "blue"}, True, 1, ""),
    ("swapped", BOTH, [seen("kite"), seen("vase")], {"kite": "blue", "vase": "red"}, False, 0.5, "expected blue vase>=1"),
    ("one colour", BOTH, [seen("kite"), seen("vase")], {"kite": "red", "vase": "red"}, False, 0.75, "found red"),
    ("one object", BOTH, [seen("vase")], {"vase": "blue"}, False, 0.5, "expected kite>=1, found 0"),
]


@pytest.mark.parametrize(("case", "line", "found", "colors", "strict", "graded", "reason"), CASES, ids=[c[0] for c in CASES])
def test_rules(case: str, line: dict, found: list, colors: dict, strict: bool, graded: float, reason: str) -> None:
    ruled, points, why = judge(found, line, lambda item: colors[item.name])
    assert (ruled, points) == (strict, pytest.approx(graded)) and reason in why and bool(why) != strict


def test_colors_are_asked_of_the_surest_and_never_in_vain() -> None:
    sure, unsure = seen("kite", score=0.9), seen("kite", score=0.5)
    assert whose_colors([unsure, sure, seen("bed")], RED) == [sure]
    assert whose_colors([seen("bed")], RED) == [] and whose_colors([sure], SINGLE) == []
    asked = []
    judge([unsure, sure], RED, lambda item: asked.append(item) or "red")
    assert set(asked) == {sure}


def test_at_most_sixteen_of_a_class_are_kept_the_surest() -> None:
    found = [seen("bird", score=0.5 + i / 100) for i in range(20)]
    assert kept(found, "two_object")["bird"] == found[:3:-1]


WRONG = [
    ({"tag": "colour"}, "\"tag\" is 'colour'; GenEval has single_object"),
    ({"include": []}, '"include" is empty'),
    ({"include": [clause("keyboard")]}, "class 'keyboard' is none of COCO's 80"),
    ({"include": [clause("bed", 0)]}, "count 0 of 'bed'"),
    ({"include": [clause("bed", color="teal")]}, "color 'teal'"),
    ({"include": [clause("bed"), clause("cat", position=["near", 0])]}, r"position \['near', 0\]"),
    ({"include": [clause("cat", position=["above", 0])]}, "the index of an earlier clause"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_lines_of_another_format_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"prompt 'a photo for two_object': {message}|{message}"):
        GenEval.check(["", ""], [TWO, {**TWO, **change}])


def test_lines_of_a_file_are_read(tmp_path: Path) -> None:
    lines = [SINGLE, TWO, THREE, RED, ABOVE, BOTH]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = load_prompts(tmp_path / "eval.jsonl")
    GenEval.check(made.prompts, made.metadata)
    assert len(CLASSES) == len(set(CLASSES)) == 80 and len(COLORS) == 10


def test_detections_from_logits() -> None:
    """Two queries with masks of their own at a quarter of the size, one unsure of its class, one sure of nothing."""
    classes, masks = torch.full((4, 81), -10.0), torch.full((4, 8, 8), -20.0)
    classes[0, CLASSES.index("cat")] = classes[1, CLASSES.index("bed")] = classes[3, 80] = 10
    classes[2] = 0
    masks[0, 1:3, 2:6] = masks[1, :, :] = masks[2] = 20
    cat, bed = sorted(detections(classes, masks, (32, 32), (32, 32), (64, 32)), key=lambda d: -CLASSES.index(d.name))[::-1]
    assert (cat.name, bed.name, bed.box) == ("cat", "bed", (0, 0, 32, 64)) and bed.score > 0.99
    assert cat.mask.shape == (64, 32) and cat.mask.dtype == torch.bool
    # Rows 1 and 2 of 8 are 8 to 24 of 64, columns 2 to 5 are 8 to 24 of 32.
    assert torch.tensor(cat.box).sub(torch.tensor([8, 8, 24, 24])).abs().max() <= 1
    # Half of the network's input is padding: what lies in the other half fills the image.
    [cat, _] = sorted(detections(classes, masks, (32, 32), (16, 32), (64, 32)), key=lambda d: CLASSES.index(d.name))
    assert torch.tensor(cat.box).sub(torch.tensor([8, 16, 24, 48])).abs().max() <= 2


def test_an_unsure_mask_makes_a_detection_unsure() -> None:
    classes, masks = torch.full((1, 81), -10.0), torch.full((1, 8, 8), 0.2)
    classes[0, 0] = 10
    [person] = detections(classes, masks, (32, 32), (32, 32), (32, 32))
    assert person.score == pytest.approx(torch.tensor(0.2).sigmoid().item(), abs=1e-4)
    masks[:] = -1
    assert detections(classes, masks, (32, 32), (32, 32), (32, 32)) == []


def test_an_object_is_cut_out_on_gray() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[4:8, 10:20] = True
    crop = cut_out(torch.full((3, 20, 30), 255, dtype=torch.uint8), Detection("cat", 1.0, (9, 4, 20, 8), mask))
    assert crop.size == (11, 4) and crop.getpixel((0, 0)) == (0x99,) * 3 and crop.getpixel((1, 0)) == (255,) * 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny detector and a tiny CLIP with random weights, in folders as the real ones are."""
    detector, clip = tmp_path_factory.mktemp("detector"), tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    names = ["person", *[f"c{i}" for i in range(1, 79)], "toothbrush"]
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=swin,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=32,
            num_queries=6,
            id2label=dict(enumerate(names)),
        )
    )
    with torch.no_grad():  # sure of some class, so that there are detections
        model.class_predictor.weight.mul_(400)
    model.save_pretrained(detector)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(detector)
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    tokenizer = clip_tokenizer()
    text = dict(tower, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = dict(tower, image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    return {"detector": detector, "clip": clip}


def test_the_whole_path(folders: dict[str, Path]) -> None:
    """From folders to scores; what is asked for is what the random detector happens to see."""
    images = torch.randint(0, 256, (3, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = Detector(folders["detector"], CPU)(images)
    assert [len(f) > 0 for f in found] == [True] * 3, "the tiny detector sees nothing: nothing would be tested"
    assert all(d.mask.shape == (48, 64) and d.mask.any() and 0.3 < d.score <= 1 for f in found for d in f)
    surest = max(found[1], key=lambda d: d.score)
    color = Colors(folders["clip"], CPU)([(images[1], surest)])[surest]
    other = COLORS[COLORS.index(color) - 1]
    absent = next(name for name in CLASSES if name not in {d.name for d in found[0]})
    lines = [
        record("single_object", clause(absent)),
        record("colors", clause(surest.name, color=color)),
        record("colors", clause(surest.name, color=other)),
    ]
    prompts = [line["prompt"] for line in lines]
    shown = images[[0, 1, 1]]
    for batch_size in (1, 8):
        scores = GenEval(device=CPU, **folders, batch_size=batch_size)(shown, prompts, lines)
        assert scores.dtype == torch.float32 and scores.tolist() == [0, 1, 0]
    graded = GenEvalGraded(device=CPU, **folders)(shown, prompts, lines)
    number = len(kept(found[1], "colors")[surest.name])
    assert graded.tolist() == [0, 1 if number == 1 else 0, 0.5 if number == 1 else 0]


def test_a_color_is_the_one_whose_wordings_are_nearest(folders: dict[str, Path]) -> None:
    """Against CLIP's vectors one by one, for objects of two classes in a batch."""
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    items = [(image, seen("cat")), (image, seen("bed", 10, 10))]
    clip, tokenizer = CLIPModel.from_pretrained(folders["clip"]), clip_tokenizer()
    for (_, item), color in zip(items, Colors(folders["clip"], CPU)(items).values(), strict=True):
        crop = CLIPImageProcessorPil.from_pretrained(folders["clip"])(cut_out(image, item), return_tensors="pt")
        with torch.no_grad():
            shown, likeness = clip.get_image_features(**crop).pooler_output[0], {}
            for name in COLORS:
                texts = [f"a photo of a {name} {item.name}", f"a photo of a {name}-colored {item.name}"]
                texts = [tokenizer(t, return_tensors="pt") for t in [*texts, f"a photo of a {name} object"]]
                vectors = [clip.get_text_features(**t).pooler_output[0] for t in texts]
                mean = sum(v / v.norm() for v in vectors) / 3
                likeness[name] = float(shown @ mean / mean.norm())
        assert color == max(likeness, key=likeness.get)


def test_padding_of_the_detectors_input_is_not_part_of_the_image(folders: dict[str, Path], tmp_path: Path) -> None:
    """A processor that pads to a square: boxes still lie in the image, and masks have its size."""
    detector = Detector(folders["detector"], CPU)
    detector.processor = Mask2FormerImageProcessorPil(
        size={"shortest_edge": 32, "longest_edge": 64}, pad_size={"height": 64, "width": 64}
    )
    [found] = detector(torch.randint(0, 256, (1, 3, 24, 48), dtype=torch.uint8))
    assert found and all(d.mask.shape == (24, 48) and d.box[2] <= 48 and d.box[3] <= 24 for d in found)


def test_wrong_folders_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"detector = nowhere: no such folder; download a model into it"):
        GenEval(device=CPU, detector=Path("nowhere"), clip=folders["clip"])
    with pytest.raises(ValueError, match=f"clip = {tmp_path}: cannot be loaded"):
        GenEval(device=CPU, detector=folders["detector"], clip=tmp_path)
    with pytest.raises(ValueError, match=r"reward\.settings\.geneval\.batch_size = 0: must be at least 1"):
        load_reward("geneval", settings={**{key: str(path) for key, path in folders.items()}, "batch_size": 0})
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folders["detector"])
    model.config.id2label = {**model.config.id2label, 79: "sky"}
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(folders["detector"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its 80 classes from 'person' are not COCO's 80"):
        Detector(tmp_path, CPU)


def test_both_are_in_the_table() -> None:
    assert REWARDS["geneval"] == "fastgrpo.rewards.geneval:GenEval"
    assert REWARDS["geneval_graded"] == "fastgrpo.rewards.geneval:GenEvalGraded"
    assert (GenEval.low, GenEval.high) == (GenEvalGraded.low, GenEvalGraded.high) == (0, 1)
