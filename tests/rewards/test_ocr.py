"""The OCR rewards, with real recognition: RapidOCR's models are in its wheel."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from fastgrpo.edit_distance import levenshtein
from fastgrpo.rewards import REWARDS, load_reward
from fastgrpo.rewards.ocr import ENGINES, OCR, VideoOCR, similarity, target_text

CPU = torch.device("cpu")
TTF = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONTS = {
    "sans": ImageFont.load_default(36),
    "small": ImageFont.load_default(18),
    "serif": ImageFont.truetype(TTF / "DejaVuSerif-Bold.ttf", 48),
    "mono": ImageFont.truetype(TTF / "DejaVuSansMono.ttf", 30),
}


def drawn(*lines: str, font: str = "sans", ink: str = "black", paper: str = "white") -> torch.Tensor:
    """An image (3, 192, 320) uint8 with lines of text."""
    image = Image.new("RGB", (320, 192), paper)
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((12, 20 + 70 * i), line, fill=ink, font=FONTS[font])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def ocr() -> OCR:
    return OCR(device=CPU)


def score(reward: OCR, images: list[torch.Tensor], *texts: str) -> list[float]:
    prompts = [f'a sign that says "{text}"' for text in texts]
    scores = reward(torch.stack(images), prompts, [{"prompt": p} for p in prompts])
    assert scores.dtype == torch.float32 and scores.shape == (len(images),)
    assert reward.low <= scores.min() and scores.max() <= reward.high
    return scores.tolist()


@pytest.mark.parametrize("font", FONTS)
def test_the_right_text_scores_more_than_parts_more_than_another(ocr: OCR, font: str) -> None:
    images = [drawn(text, font=font) for text in ("Garden", "Gardxx", "Fishing")]
    right, part, wrong = score(ocr, images, *["Garden"] * 3)
    assert right == 1 and part == pytest.approx(4 / 6) and wrong <= 1 / 3


def test_no_text_scores_nothing(ocr: OCR) -> None:
    noise = torch.randint(0, 256, (3, 192, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert score(ocr, [drawn(), noise], "Garden", "Garden") == [0, 0]


def test_case_spaces_lines_and_colors_do_not_matter(ocr: OCR) -> None:
    images = [drawn("FRESH BREAD"), drawn("fresh", "bread"), drawn("Fresh bread", ink="yellow", paper="navy")]
    assert score(ocr, images, "fresh bread", "Fresh Bread", "FRESHBREAD") == [1, 1, 1]


def test_more_text_than_asked_for_is_no_fault(ocr: OCR) -> None:
    both = drawn("OPEN", "Bakery")
    assert score(ocr, [both, both], "Bakery", "open") == [1, 1]


def test_several_words_and_the_order_of_the_batch(ocr: OCR) -> None:
    images = [drawn("Keep it quiet"), drawn("Golden river"), drawn()]
    assert score(ocr, images, "keep it quiet", "golden river", "x") == [1, 1, 0]
    assert score(ocr, images[1::-1], "keep it quiet", "keep it quiet")[1] == 1


def test_gray_images(ocr: OCR) -> None:
    gray = drawn("Museum", ink="#444", paper="#aaa")
    assert (gray[0] == gray[1]).all() and score(ocr, [gray], "museum") == [1]


def test_a_clip_is_the_mean_of_every_fourth_frame() -> None:
    reward = VideoOCR(device=CPU)
    right, wrong = drawn("Museum"), drawn()
    # Frames 0, 4 and 8 are read.
    clips = [torch.stack([right] + [wrong] * 3 + [right] + [wrong] * 4), torch.stack([wrong] + [right] * 3 + [wrong] * 5)]
    assert score(reward, clips, "museum", "museum") == pytest.approx([2 / 3, 0])
    reward.every = 9
    assert score(reward, [clips[0]], "museum") == [1]
    with pytest.raises(ValueError, match=r"video_ocr reads clips \(B, T, 3, H, W\), not \(1, 3, 192, 320\)"):
        score(reward, [right], "museum")
    with pytest.raises(ValueError, match=r"reward\.settings\.video_ocr\.every = 0: must be at least 1"):
        load_reward("video_ocr", settings={"every": 0})


SIMILARITIES = [
    ("hello", "hello", 1),
    ("He l\nlo", "hello", 1),  # what is read is plain before it is compared
    ("say hello there", "hello", 1),  # inside
    ("hxllo", "hello", 0.8),
    ("hello", "helloworld", 0.5),
    ("", "hello", 0),
    ("nothing like it at all", "hello", 0),  # never below 0
]


@pytest.mark.parametrize(("text", "target", "expected"), SIMILARITIES)
def test_similarity(text: str, target: str, expected: float) -> None:
    assert similarity(text, target) == pytest.approx(expected)


def test_levenshtein_counts_edits() -> None:
    for a, b, edits in [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)]:
        assert levenshtein(a, b) == levenshtein(b, a) == edits


def test_the_target_is_the_first_quoted_text() -> None:
    assert target_text('a mug with "Good Day" and "Bye"') == "goodday"
    for prompt in ("a mug", 'a mug with ""', 'a mug with "  "'):
        with pytest.raises(ValueError, match="quotes no text") as error:
            OCR.check(['a "b"', prompt], [{}, {}])
        assert repr(prompt) in str(error.value)


def test_a_prompt_without_text_is_an_error_at_the_call(ocr: OCR) -> None:
    with pytest.raises(ValueError, match="prompt 'a mug' quotes no text"):
        ocr(drawn("a")[None], ["a mug"], [{"prompt": "a mug"}])


def test_engines_that_are_not_there_are_named(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"reward\.settings\.ocr\.engine = 'tesseract': choices: rapid, paddle"):
        load_reward("ocr", settings={"engine": "tesseract"})
    assert tuple(ENGINES) == get_args(get_type_hints(OCR.__init__)["engine"])
    needs = [("rapid", "rapidocr_onnxruntime", "rapidocr-onnxruntime"), ("paddle", "paddleocr", "'paddleocr>=3'")]
    for engine, module, package in needs:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"pip install {package}"):
            OCR(device=CPU, engine=engine)


def test_paddle_is_given_bgr_and_its_lines_are_joined(monkeypatch) -> None:
    """Of PaddleOCR itself only the shape of its answer: its models would have to be fetched."""
    seen = []

    class Engine:
        def __init__(self, **settings) -> None:
            assert settings["lang"] == "en"

        def predict(self, image: np.ndarray) -> list[dict]:
            seen.append(image)
            return [{"rec_texts": ["Mus", "EUM"], "rec_scores": [0.9, 0.9]}]

    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=Engine))
    red = torch.zeros(3, 4, 6, dtype=torch.uint8)
    red[0] = 255
    assert score(OCR(device=CPU, engine="paddle"), [red], "museum") == [1]
    assert seen[0].shape == (4, 6, 3) and seen[0][0, 0].tolist() == [0, 0, 255]


def test_both_are_in_the_table() -> None:
    assert (REWARDS["ocr"], REWARDS["video_ocr"]) == ("fastgrpo.rewards.ocr:OCR", "fastgrpo.rewards.ocr:VideoOCR")
