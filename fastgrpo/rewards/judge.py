"""A vision-language model as the judge, behind any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, ...).

    score = (what the judge answered - low) / (high - low)          its own scale, low to high, onto 0 to 1

    reward:
      settings:
        vlm_judge: {url: "http://localhost:8000/v1", model: Qwen/Qwen2.5-VL-7B-Instruct, preset: general}

Each image travels as a PNG with its own question, many at once, and the scores come back in order. An endpoint that is
busy, broken or silent is asked again, after 1, 2, 4, ... seconds give or take a half; so is a judge that gave no score on
its scale, now at a temperature, since at 0 it would say the same. After the last try it is an error: a score is never
made up. (Flow-GRPO takes 0 for such an answer, and score / 5 for the rest.)

Of the judges of Flow-GRPO, DeQA is not here: its score is the mean of five words' probabilities, not a text.
"""

import base64
import io
import math
import re
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor

from fastgrpo.config.bounds import Above, AtLeast
from fastgrpo.daemon_pool import DaemonPool
from fastgrpo.data.pixels import as_arrays
from fastgrpo.rewards.calling import RewardUnavailable
from fastgrpo.rewards.client import Client, NoAnswer, checked_url, token_from
from fastgrpo.rewards.retry import Tries

RETRY_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class Question:
    """The question to a judge, and how its answer is read."""

    prompt: str
    """The text beside the image; `{prompt}` in it becomes the image's prompt."""
    score: str
    """Regular expression whose first group is the score; of several matches the last counts."""
    low: float
    """The judge's worst score."""
    high: float
    """The judge's best score."""


GENERAL = """\
This image was generated for the prompt: {prompt}
How well does it show what the prompt asks for, and how good is it as an image? Consider every object, attribute, number \
and relation of the prompt; then the sharpness, the anatomy and the composition. Reason in a few sentences. End with one \
line "Final Score: X", where X is from 0 (nothing fits, or unrecognisable) to 10 (everything fits, and flawless)."""

# Flow-GRPO's question to CodeGoat24/UnifiedReward-7b-v1.5 (flow_grpo/rewards.py), which was trained on these words.
UNIFIED_REWARD = """\
<image>
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on \
two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of \
depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color \
accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""

# Flow-GRPO's question to Qwen2.5-VL (flow_grpo/qwenvl.py): of the image alone.
QWEN_VL_QUALITY = """\

Your role is to evaluate the aesthetic quality score of given images.
1. Bad: Extremely blurry, underexposed with significant noise, indiscernible
subjects, and chaotic composition.
2. Poor: Noticeable blur, poor lighting, washed-out colors, and awkward
composition with cut-off subjects.
3. Fair: In focus with adequate lighting, dull colors, decent composition but
lacks creativity.
4. Good: Sharp, good exposure, vibrant colors, thoughtful composition with
a clear focal point.
5. Excellent: Exceptional clarity, perfect exposure, rich colors, masterful
composition with emotional impact.

Please first provide a detailed analysis of the evaluation process, including the criteria for judging aesthetic \
quality, within the <Thought> tag. Then, give a final score from 1 to 5 within the <Score> tag.
<Thought>
[Analyze the evaluation process in detail here]
</Thought>
<Score>X</Score>
"""

FINAL_SCORE = r"Final Score:\**\s*(\d+(?:\.\d+)?)"
PRESETS = {
    "general": Question(prompt=GENERAL, score=FINAL_SCORE, low=0, high=10),
    "unified_reward": Question(prompt=UNIFIED_REWARD, score=FINAL_SCORE, low=1, high=5),
    "qwen_vl_quality": Question(prompt=QWEN_VL_QUALITY, score=r"<Score>\s*(\d+(?:\.\d+)?)\s*</Score>", low=1, high=5),
}


class Unanswered(Exception):
    """A try that gave no score, with the reason; another try may give one, `after` that many seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class NoScore(Unanswered):
    """The judge answered, but without a score on its scale."""


class VLMJudge:
    """Asks the model at an endpoint for the score of each image."""

    low, high = 0.0, 1.0

    def __init__(
        self,
        device: torch.device,
        *,
        url: str,  # of the endpoint, up to and with /v1
        model: str,  # its name at the endpoint
        preset: str = "general",  # one of `PRESETS`
        prompt: str | None = None,  # these four replace a part of the preset's `Question`
        score: str | None = None,
        low: float | None = None,
        high: float | None = None,
        timeout: Annotated[float, Above(0)] = 120.0,  # seconds for an answer; by default an image has 16 minutes
        retries: Annotated[int, AtLeast(0)] = 5,  # further tries of an image
        backoff: Annotated[float, AtLeast(0)] = 1.0,  # seconds before the first of them, then twice as long each
        concurrency: Annotated[int, AtLeast(1)] = 32,  # images that are judged at the same time
        max_tokens: Annotated[int, AtLeast(1)] = 1024,  # of an answer
        temperature: Annotated[float, AtLeast(0)] = 0.0,  # of the first try
        api_key_env: str = "",  # the environment variable with the key, which does not belong into a configuration
    ) -> None:
        self.question = checked_question(preset, {"prompt": prompt, "score": score, "low": low, "high": high})
        self.url = checked_url(url, "reward.settings.vlm_judge.url") + "/chat/completions"
        self.retries, self.backoff = retries, backoff
        self.request: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        token = token_from(api_key_env, "reward.settings.vlm_judge.api_key_env") if api_key_env else None
        self.client = Client(self.url, token=token, timeout=timeout, connections=concurrency)
        self._threads = DaemonPool(concurrency, "judge")

    @staticmethod
    def check(prompts: list[str], metadata: list[dict]) -> None:
        """Refuse prompts that no request can carry."""
        for prompt in prompts:
            prompt.encode()

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """images (B, 3, H, W) uint8 -> (B,) float32, 0 to 1."""
        scores = self._threads.map(self.judge, zip(as_arrays(images), prompts, strict=True))
        return torch.tensor(list(scores), dtype=torch.float32)

    def judge(self, judged: tuple[Any, str]) -> float:
        """The score of one image (H, W, 3) uint8 and its prompt, for which the judge is asked until there is one."""
        array, prompt = judged
        content = [
            {"type": "image_url", "image_url": {"url": data_url(array)}},
            {"type": "text", "text": self.question.prompt.replace("{prompt}", prompt)},
        ]
        request = self.request | {"messages": [{"role": "user", "content": content}]}
        for _ in (tries := Tries(self.retries, self.backoff)):
            try:
                return self.read(self.answer(request))
            except Unanswered as failure:
                reason, tries.after = failure, failure.after
                if isinstance(failure, NoScore):
                    request["temperature"] = max(request["temperature"], RETRY_TEMPERATURE)
        count = f"no score in {self.retries + 1} tries"
        kind = RuntimeError if isinstance(reason, NoScore) else RewardUnavailable
        raise kind(f"vlm_judge at {self.url}: {count} for the prompt {prompt!r}; the last: {reason}")

    def answer(self, request: dict) -> str:
        """The judge's text. Raises `Unanswered` where another try may help, RuntimeError where none can."""
        try:
            answer = self.client.request("POST", self.url, json=request)
        except NoAnswer as failure:
            raise Unanswered(str(failure)) from failure
        if answer.status == 429 or answer.status >= 500:
            raise Unanswered(f"status {answer.status}: {answer.text!r}", answer.after)
        if answer.status != 200:
            place = f"vlm_judge at {self.url}"
            raise RuntimeError(f"{place} answered {answer.status}: {answer.text!r}; see reward.settings.vlm_judge")
        try:
            text = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as failure:
            raise Unanswered(f"no chat completion: {answer.text!r}") from failure
        # null where a reasoning model ran out of tokens before it spoke
        return text if isinstance(text, str) else ""

    def read(self, answer: str) -> float:
        """The score in an answer, 0 to 1. Raises `NoScore` where it has none, or one beyond the scale."""
        low, high = self.question.low, self.question.high
        found = [match[1] for match in re.finditer(self.question.score, answer)]
        try:
            value = float(found[-1])
        except (IndexError, TypeError, ValueError):
            value = math.nan
        if not low <= value <= high:
            raise NoScore(f"an answer without a score from {low:g} to {high:g}: {answer[-500:]!r}")
        return (value - low) / (high - low)


def checked_question(preset: str, changes: dict[str, Any]) -> Question:
    """The preset with the changes that are not None, or an error that names the setting."""
    where = "reward.settings.vlm_judge"
    if preset not in PRESETS:
        raise ValueError(f"{where}.preset = {preset!r}: not one of {', '.join(PRESETS)}")
    question = replace(PRESETS[preset], **{key: value for key, value in changes.items() if value is not None})
    try:
        groups = re.compile(question.score).groups
    except re.error as failure:
        raise ValueError(f"{where}.score = {question.score!r}: no regular expression: {failure}") from failure
    if groups < 1:
        raise ValueError(f"{where}.score = {question.score!r}: has no group (...) around the number")
    if question.low >= question.high:
        raise ValueError(f"{where}.low = {question.low} is not below high = {question.high}")
    return question


def data_url(array: Any) -> str:
    """An image (H, W, 3) uint8 as a PNG, so that the judge sees every pixel as it is."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
