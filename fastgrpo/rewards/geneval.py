"""GenEval as a reward: does an image show the objects, counts, colours and positions that its prompt asks for?

The checks are `geneval_rules`; here are the models that see, from local folders:

    detector   Mask2Former for COCO instances. The official one is mmdet's Swin-S; facebook/mask2former-swin-small-coco-
               instance is the same network trained elsewhere, so its scores are near the official ones, not equal
    clip       openai/clip-vit-large-patch14, which names the colour of an object cut out along its mask, on grey

    geneval          0 or 1, the official evaluation
    geneval_graded   0 to 1, with credit for parts, as Flow-GRPO trains on
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

from fastgrpo.config.bounds import AtLeast
from fastgrpo.rewards.geneval_rules import CLASSES, COLORS, THRESHOLD, Detection, check_record, judge, whose_colors

GREY = 0x99  # what surrounds an object whose colour is to be named
MAX_DETECTIONS = 100  # an image, as mmdet keeps
# A colour is the mean of its wordings.
WORDINGS = ["a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object"]


class GenEval:
    """Images (B, 3, H, W) uint8 -> (B,), by records of GenEval's format."""

    low, high = 0.0, 1.0
    percent = True
    score = "strict"

    def __init__(
        self,
        device: torch.device,
        *,
        detector: Path,  # folder of the detector
        clip: Path,  # folder of CLIP
        batch_size: Annotated[int, AtLeast(1)] = 8,  # images that the detector sees at once, and objects that CLIP does
    ) -> None:
        self.detector, self.colors, self.batch_size = Detector(detector, device), Colors(clip, device), batch_size

    @staticmethod
    def check(prompts: list[str], metadata: list[dict]) -> None:
        """Refuse records that are not of GenEval's format."""
        for record in metadata:
            check_record(record)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        self.check(prompts, metadata)
        seen = [found for batch in images.split(self.batch_size) for found in self.detector(batch)]
        pairs = list(zip(seen, metadata, strict=True))
        objects = [(image, item) for image, pair in zip(images, pairs, strict=True) for item in whose_colors(*pair)]
        colors: dict[Detection, str] = {}
        for start in range(0, len(objects), self.batch_size):
            colors |= self.colors(objects[start : start + self.batch_size])
        verdicts = [judge(found, record, colors.__getitem__) for found, record in pairs]
        return torch.tensor([graded if self.score == "graded" else float(strict) for strict, graded, _ in verdicts])


class GenEvalGraded(GenEval):
    """Images (B, 3, H, W) uint8 -> (B,), with credit for each part of the prompt that an image shows."""

    score = "graded"


class Detector:
    """Images (b, 3, H, W) uint8 -> for each the detections surer than `THRESHOLD`, as mmdet's Mask2Former gives them.

    A detection is a pair of query and class; its certainty is the class's probability times the mean of the mask's
    within it, and its box the mask's.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.processor = _from_folder(AutoImageProcessor.from_pretrained, folder, "detector")
        self.model = _from_folder(Mask2FormerForUniversalSegmentation.from_pretrained, folder, "detector")
        self.model = self.model.to(device).eval().requires_grad_(False)
        labels = self.model.config.id2label
        if (len(labels), labels.get(0), labels.get(79)) != (80, "person", "toothbrush"):
            raise ValueError(
                f"detector {folder}: its {len(labels)} classes from {labels.get(0)!r} are not COCO's 80 instance classes, "
                "person to toothbrush; facebook/mask2former-swin-small-coco-instance has them"
            )

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        inputs = self.processor([_pil(image) for image in images], return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        # Images of a batch are of one size, so padding is the same for all: at the bottom and on the right.
        shown = inputs["pixel_mask"][0].sum(0).max().item(), inputs["pixel_mask"][0].sum(1).max().item()
        padded, size = tuple(inputs["pixel_values"].shape[-2:]), tuple(images.shape[-2:])
        logits = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        return [detections(classes, masks, padded, shown, size) for classes, masks in logits]


def detections(
    classes: Tensor, masks: Tensor, padded: tuple[int, ...], shown: tuple[int, ...], size: tuple[int, ...]
) -> list[Detection]:
    """From the logits of an image's queries: classes (Q, 81), the last for no object, and masks (Q, h, w).

    padded, shown, size: (H, W) of what the network was given, of the image in it, and of the image itself.
    """
    certain, index = classes.float().softmax(-1)[:, :-1].flatten().topk(min(MAX_DETECTIONS, classes.shape[0] * 80))
    likely = certain > THRESHOLD  # a mask makes it less certain, never more: the others need no mask
    certain, index = certain[likely], index[likely]
    if not len(index):
        return []
    logits = interpolate(masks[index // 80][None].float(), padded, mode="bilinear", align_corners=False)
    logits = interpolate(logits[..., : shown[0], : shown[1]], size, mode="bilinear", align_corners=False)[0]
    inside = logits > 0  # (n, H, W)
    scores = certain * (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    found = []
    for label, score, mask in zip((index % 80).tolist(), scores.tolist(), inside.cpu(), strict=True):
        if score > THRESHOLD:
            rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
            found.append(Detection(CLASSES[label], score, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), mask))
    return found


class Colors:
    """Zero-shot, the one of `COLORS` that CLIP finds nearest to each object."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = _from_folder(CLIPModel.from_pretrained, folder, "clip").to(device).eval().requires_grad_(False)
        self.processor = _from_folder(AutoImageProcessor.from_pretrained, folder, "clip")
        self.tokenizer = _from_folder(AutoTokenizer.from_pretrained, folder, "clip")
        self.classifiers: dict[str, Tensor] = {}

    def __call__(self, items: list[tuple[Tensor, Detection]]) -> dict[Detection, str]:
        """Pairs of an image (3, H, W) uint8 and a detection in it -> the colour of each detection."""
        crops = [cut_out(image, item) for image, item in items]
        inputs = self.processor(crops, return_tensors="pt").to(self.model.device)
        features = self.model.get_image_features(**inputs).pooler_output  # (n, D)
        classifiers = torch.stack([self._classifier(item.name) for _, item in items])  # (n, 10, D)
        best = torch.einsum("nd,ncd->nc", features.float(), classifiers).argmax(1).tolist()
        return {item: COLORS[index] for (_, item), index in zip(items, best, strict=True)}

    def _classifier(self, name: str) -> Tensor:
        """A unit vector for each colour (10, D)."""
        if name not in self.classifiers:
            texts = [wording.format(color=color, name=name) for color in COLORS for wording in WORDINGS]
            inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            features = normalize(self.model.get_text_features(**inputs).pooler_output.float(), dim=-1)
            self.classifiers[name] = normalize(features.view(len(COLORS), len(WORDINGS), -1).mean(1), dim=-1)
        return self.classifiers[name]


def cut_out(image: Tensor, item: Detection) -> Image.Image:
    """The object alone on grey, within its box."""
    left, top, right, bottom = (round(edge) for edge in item.box)
    if item.mask is not None:
        image = torch.where(item.mask.to(image.device), image, GREY)
    return _pil(image[:, top:bottom, left:right])


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _from_folder(load: Callable[..., Any], folder: Path, setting: str) -> Any:
    """What `load` makes of a local folder, or an error that names the setting."""
    if not Path(folder).is_dir():
        raise ValueError(f"{setting} = {folder}: no such folder; download a model into it, see fastgrpo/rewards/geneval.py")
    try:
        return load(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting} = {folder}: cannot be loaded ({error})") from error
