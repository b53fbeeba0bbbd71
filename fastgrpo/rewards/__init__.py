"""Rewards by name: a callable `(images, prompts, metadata) -> (B,) float32`, and nothing else.

    images     (B, 3, H, W) uint8, what a viewer would see; of a clip (B, T, 3, H, W)
    prompts    list of B strings
    metadata   list of B dicts: the prompts' lines of the prompt file

A new reward is one file here and one line in `REWARDS`; your own needs neither: name it `package.module:function`.
"""

import importlib
from collections.abc import Callable

from torch import Tensor

Reward = Callable[[Tensor, list[str], list[dict]], Tensor]

REWARDS = {
    "tiny_shapes": "fastgrpo.rewards.tiny_shapes:strict",
    "tiny_shapes_graded": "fastgrpo.rewards.tiny_shapes:graded",
    "jpeg_compressibility": "fastgrpo.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "fastgrpo.rewards.jpeg:incompressibility",
    "clip_score": "fastgrpo.rewards.clip:ClipScore",
    "pickscore": "fastgrpo.rewards.clip:PickScore",
    "hpsv2": "fastgrpo.rewards.hpsv2:HPSv2",
    "aesthetic": "fastgrpo.rewards.aesthetic:Aesthetic",
    "image_reward": "fastgrpo.rewards.image_reward:ImageReward",
    "vlm_judge": "fastgrpo.rewards.judge:VLMJudge",
    "ocr": "fastgrpo.rewards.ocr:OCR",
    "video_ocr": "fastgrpo.rewards.ocr:VideoOCR",
    "geneval": "fastgrpo.rewards.geneval:GenEval",
    "geneval_graded": "fastgrpo.rewards.geneval:GenEvalGraded",
}


def load_reward(name: str, frames: str = "each") -> Reward:
    """The reward of that name from `REWARDS`, or the `module:function` that it spells out.

    frames: of videos (B, T, 3, H, W) it is given each frame, and the mean is the score, or the whole clip.
    """
    module, colon, attribute = REWARDS.get(name, name).partition(":")
    if not colon:
        raise ValueError(f"reward {name!r}: not one of {', '.join(REWARDS)}, and not of the form module:function")
    reward = getattr(importlib.import_module(module), attribute)
    return reward if frames == "clip" else _mean_over_frames(reward)


def _mean_over_frames(reward: Reward) -> Reward:
    def score(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        if images.dim() == 4:
            return reward(images, prompts, metadata)
        count = images.shape[1]
        every = [[item for item in items for _ in range(count)] for items in (prompts, metadata)]
        return reward(images.flatten(0, 1), *every).view(-1, count).float().mean(dim=1)

    return score
