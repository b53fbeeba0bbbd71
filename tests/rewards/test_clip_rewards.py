"""The published scores by CLIP and BLIP, on tiny networks of random weights, against their formulas written once more.

A folder is as the user has it: the published file names, the published names of the weights.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
)

from fastgrpo.quiet import quiet
from fastgrpo.rewards import REWARDS
from fastgrpo.rewards.networks.aesthetic import HEAD, Aesthetic
from fastgrpo.rewards.networks.clip import ClipScore, PickScore
from fastgrpo.rewards.networks.hpsv2 import HPSv2, from_open_clip
from fastgrpo.rewards.networks.image_reward import ImageReward
from fastgrpo.testing.tokenizers import LETTERS, clip_tokenizer

CPU = torch.device("cpu")
SIDE = 32  # of what the tiny networks see
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
PROMPTS = ["a red circle", "two blue squares left of a very long green line that goes on and on and on", ""]
RECORDS = [{}] * len(PROMPTS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(3, 3, 45, 60) uint8: not square, and what it is resized to is cropped."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (3, 3, 9, 12), generator=generator).float()
    return F.interpolate(coarse, (45, 60), mode="bilinear").to(torch.uint8)


def spread(network: torch.nn.Module) -> torch.nn.Module:
    """Weights that are all felt: at the usual start biases are 0, norms 1 and layers hardly move what they add to."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name.lower() or "layrnorm" in name:
                weight.copy_(name.endswith("weight") + 0.2 * torch.randn(weight.shape, generator=generator))
            elif weight.dim():
                weight.copy_(torch.randn(weight.shape, generator=generator) * max(weight[0].numel(), 4) ** -0.5)
    return network.eval()


def tiny_clip() -> CLIPModel:
    """Like CLIP-H: another width in each tower, gelu."""
    tokenizer = clip_tokenizer()
    common = {"intermediate_size": 48, "num_hidden_layers": 2, "hidden_act": "gelu"}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = common | ids | {"hidden_size": 24, "num_attention_heads": 3, "vocab_size": len(tokenizer)}
    vision = common | {"hidden_size": 32, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    return spread(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    """A folder like openai/clip-vit-large-patch14, with the aesthetic predictor's head and HPS v2.1's checkpoint in it."""
    folder, network = tmp_path_factory.mktemp("clip"), tiny_clip()
    network.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    torch.save(head(16), folder / HEAD)  # the tiny CLIP's embeddings are shorter
    torch.save({"epoch": 1, "state_dict": to_open_clip(network.state_dict())}, folder / "HPS_v2.1_compressed.pt")
    return folder, network


# Names and shapes in sac+logos+ava1-l14-linearMSE.pth, and with `mlp.` in front in ImageReward.pt.
PUBLISHED_HEAD = {
    "layers.0.weight": (1024, 768), "layers.0.bias": (1024,), "layers.2.weight": (128, 1024), "layers.2.bias": (128,),
    "layers.4.weight": (64, 128), "layers.4.bias": (64,), "layers.6.weight": (16, 64), "layers.6.bias": (16,),
    "layers.7.weight": (1, 16), "layers.7.bias": (1,),
}  # fmt: skip


def head(width: int) -> dict[str, Tensor]:
    """Weights under which a head of that width keeps the size of what goes in."""
    generator, weights = torch.Generator().manual_seed(3), {}
    for name, shape in PUBLISHED_HEAD.items():
        shape = (1024, width) if name == "layers.0.weight" else shape
        weights[name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    return weights


def head_ref(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """(B, E) -> (B,): five linear maps by their published numbers."""
    for number in (0, 2, 4, 6, 7):
        x = F.linear(x, weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"])
    return x[:, 0]


def cosines_ref(network: CLIPModel, inputs: dict[str, Tensor]) -> Tensor:
    """(B,): of the features, each divided by its norm."""
    image = network.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    text = network.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
    return (image / image.norm(dim=-1, keepdim=True) * (text / text.norm(dim=-1, keepdim=True))).sum(dim=-1)


def published_inputs(images: Tensor) -> dict[str, Tensor]:
    """What CLIPProcessor makes of PIL images and prompts."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    tokens = clip_tokenizer()(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return {**processor(pictures, return_tensors="pt"), **tokens}


@torch.no_grad()
def test_clip_score_is_the_cosine_of_the_published_embeddings(clip: tuple[Path, CLIPModel], images: Tensor) -> None:
    folder, network = clip
    inputs = published_inputs(images)
    reward = ClipScore(CPU, path=str(folder))
    scores = reward(images, PROMPTS, RECORDS)
    assert scores.dtype == torch.float32 and scores.std() > 0.01
    assert torch.equal(scores, cosines_ref(network, inputs))
    # The network's own logits, which Flow-GRPO divides by 30.
    expected = network(**inputs).logits_per_image.diagonal() / network.logit_scale.exp()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert reward.low == -1 and reward.high == 1


@torch.no_grad()
def test_pickscore_is_published(clip: tuple[Path, CLIPModel], images: Tensor) -> None:
    """PickScore's readme, word by word: prompts padded to the longest, norms by torch.norm."""
    folder, network = clip
    inputs = published_inputs(images)
    tokens = clip_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    image = network.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    text = network.get_text_features(**tokens).pooler_output
    image = image / torch.norm(image, dim=-1, keepdim=True)
    text = text / torch.norm(text, dim=-1, keepdim=True)
    expected = (network.logit_scale.exp() * (text @ image.T)).diag()
    torch.testing.assert_close(PickScore(CPU, path=str(folder))(images, PROMPTS, RECORDS), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_aesthetic_is_the_head_on_the_unit_embedding(clip: tuple[Path, CLIPModel], images: Tensor) -> None:
    folder, network = clip
    image = network.get_image_features(pixel_values=published_inputs(images)["pixel_values"]).pooler_output
    image = image / image.norm(dim=-1, keepdim=True)
    reward = Aesthetic(CPU, path=str(folder))
    scores = reward(images, PROMPTS, RECORDS)
    assert torch.equal(scores, head_ref(torch.load(folder / HEAD), image)) and scores.std() > 0
    assert torch.equal(scores, reward(images, ["other"] * 3, RECORDS))
    assert torch.equal(scores, Aesthetic(CPU, path=str(folder), head=str(folder / HEAD))(images, PROMPTS, RECORDS))


def test_the_head_is_the_published_one() -> None:
    from fastgrpo.rewards.networks.network import mlp_head

    assert {name: tuple(tensor.shape) for name, tensor in mlp_head(768).state_dict().items()} == PUBLISHED_HEAD


def to_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`, name by name: transformers' CLIP as open_clip would have saved it."""
    new = {"logit_scale": weights["logit_scale"]}
    for tower, there in (("text_model.", ""), ("vision_model.", "visual.")):
        embeddings = f"{tower}embeddings."
        new[f"{there}positional_embedding"] = weights[f"{embeddings}position_embedding.weight"]
        count = 1 + max(int(name.split(".")[3]) for name in weights if name.startswith(f"{tower}encoder."))
        for i in range(count):
            old, block = f"{tower}encoder.layers.{i}.", f"{there}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                new[f"{block}attn.in_proj_{kind}"] = torch.cat([weights[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
                new[f"{block}attn.out_proj.{kind}"] = weights[f"{old}self_attn.out_proj.{kind}"]
                new[f"{block}ln_1.{kind}"] = weights[f"{old}layer_norm1.{kind}"]
                new[f"{block}ln_2.{kind}"] = weights[f"{old}layer_norm2.{kind}"]
                new[f"{block}mlp.c_fc.{kind}"] = weights[f"{old}mlp.fc1.{kind}"]
                new[f"{block}mlp.c_proj.{kind}"] = weights[f"{old}mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        new[f"ln_final.{kind}"] = weights[f"text_model.final_layer_norm.{kind}"]
        new[f"visual.ln_pre.{kind}"] = weights[f"vision_model.pre_layrnorm.{kind}"]
        new[f"visual.ln_post.{kind}"] = weights[f"vision_model.post_layernorm.{kind}"]
    new["token_embedding.weight"] = weights["text_model.embeddings.token_embedding.weight"]
    new["visual.class_embedding"] = weights["vision_model.embeddings.class_embedding"]
    new["visual.conv1.weight"] = weights["vision_model.embeddings.patch_embedding.weight"]
    new["visual.proj"] = weights["visual_projection.weight"].T.contiguous()
    new["text_projection"] = weights["text_projection.weight"].T.contiguous()
    return new


def norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    """(B, N, D), (B, M, D), (B, M, D) -> (B, N, D); the mask is added before the softmax."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def open_clip_ref(w: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
    """open_clip's equations by open_clip's names, with the tiny network's heads -> the cosines (B,)."""

    def tower(x: Tensor, at: str, heads: int, mask: Tensor | float) -> Tensor:
        for i in range(2):
            b = f"{at}transformer.resblocks.{i}."
            qkv = F.linear(norm(w, f"{b}ln_1", x), w[f"{b}attn.in_proj_weight"], w[f"{b}attn.in_proj_bias"])
            x = x + linear(w, f"{b}attn.out_proj", attention(*qkv.chunk(3, dim=-1), heads, mask))
            x = x + linear(w, f"{b}mlp.c_proj", F.gelu(linear(w, f"{b}mlp.c_fc", norm(w, f"{b}ln_2", x))))
        return x

    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1) + w["visual.positional_embedding"]
    x = tower(norm(w, "visual.ln_pre", x), "visual.", 2, 0.0)
    image = norm(w, "visual.ln_post", x[:, 0]) @ w["visual.proj"]
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    x = norm(w, "ln_final", tower(x, "", 3, torch.full((77, 77), -torch.inf).triu(1)))
    text = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ w["text_projection"]
    return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)


def test_open_clips_weights_come_back_as_they_were(clip: tuple[Path, CLIPModel]) -> None:
    network = clip[1].state_dict()
    back = from_open_clip(to_open_clip(network))
    assert back.keys() == network.keys()
    assert all(torch.equal(tensor, network[name]) for name, tensor in back.items())


@torch.no_grad()
def test_hpsv2_is_open_clip(clip: tuple[Path, CLIPModel], images: Tensor) -> None:
    folder, network = clip
    reward = HPSv2(CPU, path=str(folder))
    # 45 x 60 becomes 32 x 42, of which torchvision keeps the columns 5 to 36.
    resized = F.interpolate(images.float() / 255, (32, 42), mode="bicubic", antialias=True)
    pixels = (resized[..., 5:37] - MEAN) / STD
    assert torch.equal(reward.pixels(images), pixels)
    scores = reward(images, PROMPTS, RECORDS)
    inputs = published_inputs(images)
    assert torch.equal(scores, cosines_ref(network, inputs | {"pixel_values": pixels}))
    # open_clip pads with zeros, and reads at the largest token.
    tokens = inputs["input_ids"] * inputs["attention_mask"]
    weights = torch.load(folder / "HPS_v2.1_compressed.pt")["state_dict"]
    torch.testing.assert_close(scores, open_clip_ref(weights, pixels, tokens), rtol=0, atol=1e-6)


MED = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64, "model_type": "bert", "num_attention_heads": 4, "num_hidden_layers": 2,
    "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 0, "encoder_width": 32, "add_cross_attention": True,
}  # fmt: skip


def salesforce_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A BlipVisionModel's weights as Salesforce's BLIP has them."""
    pairs = (
        ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers", "blocks"), ("post_layernorm", "norm"),
        ("layer_norm", "norm"), ("self_attn.projection", "attn.proj"), ("self_attn", "attn"),
    )  # fmt: skip
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        renamed[f"blip.visual_encoder.{name}"] = tensor
    return renamed


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like THUDM/ImageReward, with bert-base-uncased's tokenizer."""
    folder = tmp_path_factory.mktemp("blip")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    med = MED | {"vocab_size": len(words)}
    (folder / "med_config.json").write_text(json.dumps(med))
    vision = BlipVisionConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    sizes = {key: value for key, value in med.items() if key not in ("architectures", "model_type")}
    text = BlipTextConfig(**sizes, encoder_hidden_size=128, is_decoder=True)
    weights = salesforce_names(spread(BlipVisionModel(vision)).state_dict())
    read = spread(BlipTextModel(text, add_pooling_layer=False)).state_dict()
    weights |= {f"blip.text_encoder.{name}": tensor for name, tensor in read.items()}
    weights |= {f"mlp.{name}": tensor for name, tensor in head(32).items()}
    # Published too, and of no use here.
    weights |= {"blip.vision_proj.weight": torch.zeros(2, 2), "blip.text_proj.weight": torch.zeros(2, 2)}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(weights, folder / "ImageReward.pt")
    return folder


def image_reward_ref(w: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Salesforce's BLIP by its published names, ImageReward's head and standardisation -> (B,)."""
    seen, read = ({name.removeprefix(p): t for name, t in w.items()} for p in ("blip.visual_encoder.", "blip.text_encoder."))
    x = F.conv2d(pixels, seen["patch_embed.proj.weight"], seen["patch_embed.proj.bias"], stride=8)
    x = torch.cat([seen["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1) + seen["pos_embed"]
    for i in range(2):
        b = f"blocks.{i}."
        qkv = linear(seen, f"{b}attn.qkv", norm(seen, f"{b}norm1", x, 1e-6))
        x = x + linear(seen, f"{b}attn.proj", attention(*qkv.chunk(3, dim=-1), 2))
        x = x + linear(seen, f"{b}mlp.fc2", F.gelu(linear(seen, f"{b}mlp.fc1", norm(seen, f"{b}norm2", x, 1e-6))))
    patches = norm(seen, "norm", x, 1e-6)

    def attend(at: str, x: Tensor, to: Tensor, mask: Tensor | float) -> Tensor:
        q, k, v = (linear(read, f"{at}.self.{n}", y) for n, y in (("query", x), ("key", to), ("value", to)))
        mixed = linear(read, f"{at}.output.dense", attention(q, k, v, 4, mask))
        return norm(read, f"{at}.output.LayerNorm", mixed + x, 1e-12)

    x = read["embeddings.word_embeddings.weight"][tokens] + read["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x, hidden = norm(read, "embeddings.LayerNorm", x, 1e-12), (1.0 - mask[:, None, None].float()) * -10000.0
    for i in range(2):
        b = f"encoder.layer.{i}."
        x = attend(f"{b}attention", x, x, hidden)
        x = attend(f"{b}crossattention", x, patches, 0.0)
        out = linear(read, f"{b}output.dense", F.gelu(linear(read, f"{b}intermediate.dense", x)))
        x = norm(read, f"{b}output.LayerNorm", out + x, 1e-12)
    mlp = {name.removeprefix("mlp."): tensor for name, tensor in w.items() if name.startswith("mlp.")}
    return (head_ref(mlp, x[:, 0]) - 0.16717362830052426) / 1.0333394966054072


@torch.no_grad()
def test_image_reward_is_salesforces_blip(blip: Path, images: Tensor) -> None:
    reward = ImageReward(CPU, path=str(blip))
    # 45 x 60 becomes 32 x 42, of which torchvision keeps the columns 5 to 36.
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((42, 32), Image.BICUBIC) for image in images]
    resized = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(32, 42, 3) for p in pictures])
    pixels = (resized.permute(0, 3, 1, 2)[..., 5:37].float().div(255) - MEAN) / STD
    assert torch.equal(reward.pixels(images), pixels)
    tokenizer = BertTokenizer.from_pretrained(blip)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    expected = image_reward_ref(torch.load(blip / "ImageReward.pt"), pixels, tokens.input_ids, tokens.attention_mask)
    scores = reward(images, PROMPTS, RECORDS)
    assert scores.dtype == torch.float32 and scores.std() > 0.01
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


ALL = {"clip_score": ClipScore, "pickscore": PickScore, "hpsv2": HPSv2, "aesthetic": Aesthetic, "image_reward": ImageReward}


@pytest.fixture(params=ALL)
def reward(request: pytest.FixtureRequest, clip: tuple[Path, CLIPModel], blip: Path) -> Callable:
    return ALL[request.param](CPU, path=str(blip if request.param == "image_reward" else clip[0]), batch_size=2)


def test_a_score_does_not_hang_on_the_rest_of_the_batch(reward: Callable, images: Tensor) -> None:
    together = reward(images, PROMPTS, RECORDS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1], RECORDS[:1]) for i in range(3)])
    backwards = reward(images.flip(0), PROMPTS[::-1], RECORDS).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together, backwards, rtol=1e-6, atol=1e-6)
    assert torch.equal(together, reward(images, PROMPTS, RECORDS))


def test_images_and_prompts_are_felt(reward: Callable, images: Tensor) -> None:
    scores = reward(images, PROMPTS, RECORDS)
    assert ((reward(images.roll(1, 0), PROMPTS, RECORDS) - scores).abs() > 1e-3).all()
    felt = (reward(images, PROMPTS[1:] + PROMPTS[:1], RECORDS) - scores).abs() > 1e-3
    assert felt.all() if reward.name != "aesthetic" else not felt.any()


@pytest.mark.parametrize("height,width", [(32, 32), (31, 64), (65, 40)])
def test_every_shape_of_image_is_cropped_to_the_networks(reward: Callable, height: int, width: int) -> None:
    images = torch.full((1, 3, height, width), 128, dtype=torch.uint8)
    assert torch.isfinite(reward(images, ["a"], [{}])).all()


@pytest.mark.parametrize("name", ALL)
def test_a_folder_that_will_not_do_is_refused(name: str, tmp_path: Path) -> None:
    kind, key = ALL[name], f"reward.settings.{name}.path"
    assert REWARDS[name] == f"{kind.__module__}:{kind.__name__}" and kind.name == name
    with pytest.raises(ValueError, match=f"{key} is not set"):
        kind(CPU)
    with pytest.raises(ValueError, match=f"{key} = {tmp_path}/none: no such folder; get {next(iter(kind.needs.values()))}"):
        kind(CPU, path=f"{tmp_path}/none")
    for file, repository in kind.needs.items():
        with pytest.raises(ValueError, match=f"{key} = {tmp_path}: {file} is missing; get it from {repository}"):
            kind(CPU, path=str(tmp_path))
        (tmp_path / file.split(" or ")[-1]).touch()


def test_a_head_that_is_not_there_is_refused(clip: tuple[Path, CLIPModel]) -> None:
    with pytest.raises(ValueError, match=r"aesthetic.head = /none.pth: no such file; get sac\+logos"):
        Aesthetic(CPU, path=str(clip[0]), head="/none.pth")


def test_weights_that_are_not_there_are_not_made_up(clip: tuple[Path, CLIPModel], tmp_path: Path) -> None:
    folder, network = clip
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").unlink()
    with quiet():
        network.vision_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(ValueError, match=f"{tmp_path}: no CLIPModel: logit_scale is missing, and"):
        ClipScore(CPU, path=str(tmp_path))
