"""How well an image shows the text that its prompt quotes (Flow-GRPO, arXiv 2505.05470).

    reward = 1 - min(distance, N) / N        N: letters of the target; 1 where the target stands inside what was read

The target is the first text in straight double quotes; target and recognised text are compared in the form of
`fastgrpo.normal_form`, without regard to case, spaces and ways to write a character, by their Levenshtein distance. Both
rewards lie in [0, 1], more is better.

Recognition is RapidOCR's (PaddleOCR's PP-OCRv4 models as ONNX, in its wheel: nothing is fetched) or PaddleOCR's own,
both on the CPU. As PaddleOCR 2 does by default, which Flow-GRPO used, images of up to 960 pixels are read at their
size, without turning lines around. The recogniser reads Chinese and English, Flow-GRPO's English alone.
"""

import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config.bounds import AtLeast
from fastgrpo.data.pixels import as_arrays
from fastgrpo.edit_distance import levenshtein
from fastgrpo.normal_form import compared
from fastgrpo.rewards import each_frame

LONGEST_SIDE = 960  # pixels: larger images are made smaller before text is looked for


class OCR:
    """Images (B, 3, H, W) uint8 -> (B,)."""

    low, high = 0.0, 1.0
    percent = True

    def __init__(self, device: torch.device, *, engine: Literal["rapid", "paddle"] = "rapid") -> None:
        self.read = ENGINES[engine]()

    @staticmethod
    def check(prompts: list[str], metadata: list[dict]) -> None:
        """Refuse prompts that do not say which text is meant."""
        for prompt in prompts:
            target_text(prompt)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        targets = [target_text(prompt) for prompt in prompts]
        arrays = as_arrays(images)
        return torch.tensor([similarity(self.read(image), t) for image, t in zip(arrays, targets, strict=True)])


class VideoOCR(OCR):
    """Clips (B, T, 3, H, W) uint8 -> (B,): the mean over every 4th frame, from the first.

    Flow-GRPO's released code leaves frames that score 0 out of the mean, which lets a clip show its text for a moment
    only, and does not look for the target inside longer text; here a frame counts as an image does.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        engine: Literal["rapid", "paddle"] = "rapid",
        every: Annotated[int, AtLeast(1)] = 4,  # of so many frames one is read
    ) -> None:
        super().__init__(device, engine=engine)
        self.every = every

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        if images.dim() != 5:
            raise ValueError(f"video_ocr reads clips (B, T, 3, H, W), not {tuple(images.shape)}; set reward.frames: clip")
        frames = images[:, :: self.every]
        return super().__call__(*each_frame(frames, prompts, metadata)).view(frames.shape[:2]).mean(dim=1)


def target_text(prompt: str) -> str:
    """The first text in straight double quotes, as it is compared.

    Raises ValueError where a quote has no partner. A quote after a digit that closes nothing is the sign for inches.
    """
    marks: list[int] = []
    for place, character in enumerate(prompt):
        inches = len(marks) % 2 == 0 and place > 0 and prompt[place - 1].isdecimal()
        if character == '"' and not inches:
            marks.append(place)
    if len(marks) % 2:
        raise ValueError(f"prompt {prompt!r} has a double quote without its partner: it does not say which text is meant")
    target = compared(prompt[marks[0] + 1 : marks[1]]) if marks else ""
    if not target:
        raise ValueError(f'prompt {prompt!r} quotes no text: put what the image shall show in straight double quotes, "so"')
    return target


def similarity(text: str, target: str) -> float:
    """1 where `target` stands in `text`, less by each letter to change, 0 where all of them are."""
    text = compared(text)
    if target in text:
        return 1.0
    return 1 - min(levenshtein(text, target), len(target)) / len(target)


def _import(module: str, packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this OCR engine needs `pip install {packages}` ({error})") from error


def _rapid() -> Callable[[np.ndarray], str]:
    """RapidOCR: (H, W, 3) uint8 RGB -> text, line after line from the top."""
    package = _import("rapidocr_onnxruntime", "rapidocr-onnxruntime (or fastgrpo[ocr]); engine: paddle is the other")
    # Left alone it takes every core in every rank.
    threads = torch.get_num_threads()
    engine = package.RapidOCR(
        det_limit_side_len=LONGEST_SIDE, det_limit_type="max", use_cls=False, intra_op_num_threads=threads
    )

    def read(image: np.ndarray) -> str:
        lines, _ = engine(np.ascontiguousarray(image[..., ::-1]))  # it expects BGR
        return "".join(text for _, text, _ in lines or [])

    return read


def _paddle() -> Callable[[np.ndarray], str]:
    """PaddleOCR 3: (H, W, 3) uint8 RGB -> text; it fetches its models when first used."""
    package = _import("paddleocr", "'paddleocr>=3' paddlepaddle; engine: rapid is the other")
    engine = package.PaddleOCR(
        lang="en",
        device="cpu",
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
        text_det_limit_side_len=LONGEST_SIDE,
        text_det_limit_type="max",
    )

    def read(image: np.ndarray) -> str:
        return "".join(text for page in engine.predict(np.ascontiguousarray(image[..., ::-1])) for text in page["rec_texts"])

    return read


ENGINES = {"rapid": _rapid, "paddle": _paddle}
