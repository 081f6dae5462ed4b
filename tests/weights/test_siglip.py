"""SigLIP folders as transformers writes them: network, tokenizer and images together."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from jaxsynth.core.errors import UserError
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.quality.features import clip_features
from jaxsynth.tasks.clip_predictions import of_pixels, predict
from jaxsynth.weights.hf import describe_clip, load_clip, save_clip
from jaxsynth.weights.image_encoder import encoder_of, load_image_encoder
from jaxsynth.weights.text_tokenizer import TextTokenizer
from tests.models.torch_parity import nchw, randomise, relative_error

PROMPTS = ("a photo of a Cat", "a photo of a dog, seen from afar and from above", "")
LENGTH = 12
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
SETTINGS = {
    "add_bos_token": False,
    "add_eos_token": True,
    "do_lower_case": True,
    "model_input_names": ["input_ids"],
    "model_max_length": 1e30,
    "padding_side": "right",
    "tokenizer_class": "GemmaTokenizer",
} | {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
PROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5] * 3,
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5] * 3,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 16, "width": 16},
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def gemma() -> tokenizers.Tokenizer:
    """Pieces as Gemma's, with the end after a text."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(vocab_size=44, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator([text.lower() for text in PROMPTS] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return backend


def unigram() -> tokenizers.Tokenizer:
    """A sentencepiece model as the first SigLIP's, whose padding is the end."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(tokenizers.Regex(r"[!-/]"), "")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=40, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([text.lower() for text in PROMPTS] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return backend


def write_tokenizer(folder, backend, settings) -> None:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_siglip(folder, length=LENGTH):
    """The folder of a SigLIP 2 of random weights; transformers' network."""
    config = transformers.SiglipConfig(
        text_config={
            **TOWER, "vocab_size": 80, "max_position_embeddings": length,
            "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        },
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
    )  # fmt: skip
    peer = randomise(transformers.SiglipModel(config))
    peer.logit_scale.data.fill_(2.0)
    peer.save_pretrained(folder, max_shard_size="16KB")
    write_tokenizer(folder, gemma(), SETTINGS)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return peer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A SigLIP 2's folder, and transformers' network and tokenizer."""
    folder = tmp_path_factory.mktemp("siglip")
    peer = write_siglip(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    return SimpleNamespace(folder=folder, peer=peer, words=words)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "copy")


def rewrite(path, **changes) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: x for k, x in values.items() if x is not None}))


def pictures(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 20, 31, 3), np.uint8)


def test_the_ids_are_those_of_transformers_in_lower_case(made):
    clip = load_clip(made.folder)
    found = clip.tokenizer(list(PROMPTS))
    expected = made.words(
        [text.lower() for text in PROMPTS], padding="max_length", max_length=LENGTH, truncation=True
    ).input_ids
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32 and (found[:2, 0] != 2).all()
    assert found[1, -1] == 1 and found[2].tolist() == [1] + [0] * (LENGTH - 1)
    assert (clip.tokenizer.max_length, clip.tokenizer.shape) == (LENGTH, (LENGTH,))


def test_start_and_end_are_what_the_settings_say(made, copy):
    """As transformers 4 has it, with which SigLIP 2 was published; Gemma's own file has a start."""
    backend = gemma()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    backend.save(str(copy / "tokenizer.json"))
    expected = load_clip(made.folder).tokenizer(PROMPTS)
    np.testing.assert_array_equal(load_clip(copy).tokenizer(PROMPTS), expected)
    rewrite(copy / "tokenizer_config.json", add_bos_token=True)
    assert (load_clip(copy).tokenizer(PROMPTS)[:, 0] == 2).all()


def test_siglip_2s_own_class_makes_the_same_ids(made):
    """It lowers the case itself."""
    peer = transformers.Siglip2Tokenizer.from_pretrained(made.folder)
    expected = peer(list(PROMPTS), padding="max_length", max_length=LENGTH, truncation=True)
    found = load_clip(made.folder).tokenizer(list(PROMPTS))
    np.testing.assert_array_equal(found, expected.input_ids)


def test_a_sentencepiece_model_is_read_as_it_is(tmp_path):
    """Without settings of start and end the file's own are taken; words are in lower case."""
    settings = {"eos_token": "</s>", "pad_token": {"content": "</s>"}, "model_max_length": 9}
    write_tokenizer(tmp_path, unigram(), settings)
    found = TextTokenizer(tmp_path, positions=64)
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="</s>", eos_token="</s>"
    )
    expected = peer(list(PROMPTS), padding="max_length", max_length=9, truncation=True).input_ids
    np.testing.assert_array_equal(found(PROMPTS), expected)
    assert found.pad_token_id == found.eos_token_id == 1
    rewrite(tmp_path / "tokenizer_config.json", padding_side="left", do_lower_case=False)
    assert TextTokenizer(tmp_path, positions=64)(PROMPTS)[2].tolist() == [1] * 9


def test_the_towers_compute_what_transformers_does(made):
    clip = load_clip(made.folder)
    prompts, images = list(PROMPTS), pictures()
    source = ArraySource(images, np.zeros(3, np.int32), ["a", "b", "c"])
    found = predict(clip, clip.model, prompts, source, batch_size=4)
    processor = transformers.SiglipImageProcessorPil(**PROCESSOR)
    pixels = processor([Image.fromarray(x) for x in images], return_tensors="pt").pixel_values
    ids = torch.tensor(clip.tokenizer(prompts), dtype=torch.long)
    with torch.no_grad():
        out = made.peer(input_ids=ids, pixel_values=pixels)
        logits = out.logits_per_image - made.peer.logit_bias
    assert relative_error(found, logits.numpy()) < 1e-5
    # The bias that is left out changes no probability of a class.
    np.testing.assert_allclose(
        jax.nn.softmax(found), out.logits_per_image.softmax(-1).numpy(), atol=1e-6
    )
    # Images of the right size in [0, 1], as the robustness suite gives them.
    small = np.stack([clip.transform.square(x) for x in images])
    by_pixels = of_pixels(clip, clip.model, prompts)(small.astype(np.float32) / 255)
    assert relative_error(by_pixels, found) < 1e-5
    extractor = clip_features(clip, name="x", batch_size=4)
    assert extractor.preprocessing == "both sides to 16 bilinear"
    features = extractor.of_source(source)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert relative_error(unit, out.image_embeds.numpy()) < 1e-5


def test_what_was_saved_is_read_the_same_here_and_by_transformers(made, tmp_path):
    clip = load_clip(made.folder)
    save_clip(clip, tmp_path)
    again = load_clip(tmp_path)
    assert again.transform == clip.transform and again.model.config == clip.model.config
    np.testing.assert_array_equal(again.tokenizer(PROMPTS), clip.tokenizer(PROMPTS))
    peer, told = transformers.SiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = made.peer.vision_model(nchw(pixels)).pooler_output
        np.testing.assert_array_equal(peer.eval().vision_model(nchw(pixels))[1], expected)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = words(list(PROMPTS), padding="max_length", truncation=True).input_ids
    np.testing.assert_array_equal(clip.tokenizer(PROMPTS), ids)
    processor = transformers.SiglipImageProcessorPil.from_pretrained(tmp_path)
    seen = processor(Image.fromarray(pictures()[0]), return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(clip.transform(pictures()[0]), np.moveaxis(seen, 0, -1), atol=1e-6)


def test_a_plan_reads_no_weights(made, copy):
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    clip = describe_clip(copy, "bfloat16")
    assert clip.image_size == 16 and clip.tokenizer(["a"]).shape == (1, LENGTH)
    shapes = clip.model
    assert shapes.logit_scale.dtype == shapes.logit_bias.dtype == np.float32
    assert shapes.text_model.head.kernel.dtype == "bfloat16"


def test_files_of_half_precision_keep_scalars(made):
    clip = load_clip(made.folder, "bfloat16")
    assert clip.model.logit_scale.dtype == np.float32
    assert clip.model.vision_model.head.probe.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config", {"model_type": "siglip2"}, "config.json: model_type 'siglip2': .*NaFlex"),
        ("config", {"model_type": "siglip_vision_model"}, "takes both towers; give the whole"),
        ("config", {"depth": 3}, "SiglipConfig: unknown field 'depth'"),
        ("preprocessor_config", {"size": {"height": 8, "width": 8}}, "size is 8, but the network"),
        (
            "preprocessor_config",
            {"do_center_crop": True, "crop_size": 16, "size": {"shortest_edge": 18}},
            "the images are cropped, expected size",
        ),
        ("preprocessor_config", {"image_mean": None}, "no image_mean: the file must say it"),
        ("tokenizer_config", {"eos_token": None}, "tokenizer_config.json: eos_token is missing"),
        ("tokenizer_config", {"pad_token": "<x>"}, "pad_token: '<x>' is not in the vocabulary"),
        ("tokenizer_config", {"add_eos_token": False}, "a text ends with '.*', expected '<eos>'"),
        ("tokenizer_config", {"model_max_length": 99}, "99 tokens a text, .*_embeddings is 12"),
        ("tokenizer_config", {"model_max_length": 1}, "model_max_length: 1 leaves no room"),
        ("tokenizer_config", {"padding_side": "up"}, "padding_side: 'up', expected left or right"),
        ("tokenizer_config", {"do_lower_case": "yes"}, "do_lower_case"),
        ("tokenizer", {"model": {"type": "BPE"}}, "tokenizer.json: no tokenizer of the tokenizers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, changes, message, copy):
    rewrite(copy / f"{name}.json", **changes)
    with pytest.raises(UserError, match=message):
        load_clip(copy)


def test_what_is_missing_is_told(copy):
    (copy / "tokenizer.json").rename(copy / "spiece.model")
    with pytest.raises(UserError, match=r"tokenizer.json: missing: .* not from a sentencepiece"):
        load_clip(copy)
    (copy / "spiece.model").rename(copy / "tokenizer.json")
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json: missing"):
        load_clip(copy)


def test_images_as_prompts_are_seen_by_a_clip_alone(made):
    with pytest.raises(UserError, match=r"model_type 'siglip', expected clip .* by a CLIP, here"):
        load_image_encoder(str(made.folder))
    with pytest.raises(UserError, match="a SigLIP, expected a CLIP"):
        encoder_of(load_clip(made.folder))
