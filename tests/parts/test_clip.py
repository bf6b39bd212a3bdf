"""The CLIP tower against transformers' own, and its way into files and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel

from mmtune.core.errors import UserError
from mmtune.parts.vision.clip import MEAN, STD, ClipTower
from tests.tiny_models import IMAGE_TOKENS, SIZE, VISION, pictures, save_language, save_tower

FP32 = torch.float32


def expected_features(
    folder: Path | str, layer: int, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> torch.Tensor:
    """Patch features of the whole tower by transformers, from pictures normalised by hand."""
    pixels = pictures(3).double() / 255
    pixels = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1).float()
    whole = CLIPVisionModel.from_pretrained(folder)
    with torch.no_grad():
        return whole(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]


def features(tower: ClipTower) -> torch.Tensor:
    with torch.no_grad():
        return tower(pictures(3))


@pytest.mark.parametrize("layer", [-1, -2, -3, -4])
def test_features_are_those_of_transformers(tmp_path: Path, layer: int) -> None:
    tower = ClipTower.load(save_tower(tmp_path), layer, FP32)
    found = features(tower)
    assert found.shape == (3, IMAGE_TOKENS, VISION["hidden_size"]) == (3, tower.tokens, tower.width)
    torch.testing.assert_close(found, expected_features(tmp_path, layer), rtol=1e-5, atol=1e-5)


def test_neighbouring_layers_differ(tmp_path: Path) -> None:
    """Otherwise the test above could not tell them apart."""
    save_tower(tmp_path)
    assert (expected_features(tmp_path, -2) - expected_features(tmp_path, -1)).abs().max() > 0.1


def test_layers_above_are_neither_held_nor_run(tmp_path: Path) -> None:
    tower = ClipTower.load(save_tower(tmp_path), -2, FP32)
    calls: list[int] = []
    layers = tower.hf.encoder.layers
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    features(tower)
    assert len(layers) == VISION["num_hidden_layers"] - 1
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("layer", [-5, -9])
def test_a_layer_below_the_first_is_refused(tmp_path: Path, layer: int) -> None:
    """-5 of 4 layers would be the embeddings, without any layer."""
    with pytest.raises(UserError, match="4 layers"):
        ClipTower.load(save_tower(tmp_path), layer, FP32)


def test_the_tower_inside_a_whole_clip_checkpoint(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=VISION, text_config={**text, "vocab_size": 20}, projection_dim=8)
    torch.manual_seed(0)
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    pixels = torch.randn(3, 3, SIZE, SIZE)
    tower = ClipTower.load(str(tmp_path), -2, FP32)
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(tower.hf(pixels).last_hidden_state, expected)


def test_tensor_names_of_older_checkpoints(tmp_path: Path) -> None:
    """OpenAI's own checkpoints say vision_model.encoder and so on."""
    save_tower(tmp_path)
    expected = features(ClipTower.load(str(tmp_path), -2, FP32))
    file = tmp_path / "model.safetensors"
    old = {f"vision_model.{k.removeprefix('vision_model.')}": t for k, t in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    assert torch.equal(features(ClipTower.load(str(tmp_path), -2, FP32)), expected)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    save_tower(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing: .*layers\.1\.mlp\.fc1\.weight"):
        ClipTower.load(str(tmp_path), -2, FP32)


def test_a_weight_missing_above_the_used_layer_is_no_fault(tmp_path: Path) -> None:
    save_tower(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "layers.3." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    ClipTower.load(str(tmp_path), -2, FP32)
    with pytest.raises(UserError, match="missing"):
        ClipTower.load(str(tmp_path), -1, FP32)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    save_tower(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 41}))
    with pytest.raises(UserError, match="of another shape than the config says"):
        ClipTower.load(str(tmp_path), -2, FP32)


def test_folders_that_hold_no_tower(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        ClipTower.load(str(tmp_path / "nowhere"), -2, FP32)
    with pytest.raises(UserError, match="this is a llama model, not a clip or clip_vision_model"):
        ClipTower.load(save_language(tmp_path / "lm"), -2, FP32)
    save_tower(tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipTower.load(str(tmp_path / "broken"), -2, FP32)


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    """What is saved ends at the layer that was used, so it is loaded as the last one."""
    tower = ClipTower.load(save_tower(tmp_path / "tower"), -2, FP32)
    tower.save(tmp_path / "saved")
    again = ClipTower.load(str(tmp_path / "saved"), -1, FP32)
    before, after = tower.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(features(tower), features(again))
    assert list((tmp_path / "saved").glob("*.bin")) == []


def test_the_preprocessors_mean_and_std_are_used_and_kept(tmp_path: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    save_tower(tmp_path / "tower")
    said = {"image_mean": mean, "image_std": std, "image_processor_type": "CLIPImageProcessor"}
    (tmp_path / "tower/preprocessor_config.json").write_text(json.dumps(said))
    tower = ClipTower.load(str(tmp_path / "tower"), -2, FP32)
    expected = expected_features(tmp_path / "tower", -2, mean, std)
    torch.testing.assert_close(features(tower), expected, rtol=1e-5, atol=1e-5)
    tower.save(tmp_path / "saved")
    again = ClipTower.load(str(tmp_path / "saved"), -1, FP32)
    assert (again.mean, again.std) == (mean, std)
    assert torch.equal(features(again), features(tower))
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "saved")
    assert list(processor.image_mean) == list(mean) and processor.crop_size["height"] == SIZE


def test_created_from_a_config(tmp_path: Path) -> None:
    tower = ClipTower.create(VISION, -2)
    assert (tower.mean, tower.std) == (MEAN, STD)
    tower.save(tmp_path)
    assert torch.equal(features(ClipTower.load(str(tmp_path), -1, FP32)), features(tower))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patchsize", 16, r"unknown field 'patchsize'\n.*'patch_size'"),
        ("hidden_size", "16", "refused by transformers: .*'hidden_size' expected int"),
        ("num_attention_heads", 5, "refused by transformers"),
        ("hidden_act", "glu", "refused by transformers"),
    ],
)
def test_faulty_configs(field: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"model\.vision\.config: {message}"):
        ClipTower.create({**VISION, field: value}, -2)


def test_bfloat16(tmp_path: Path) -> None:
    tower = ClipTower.load(save_tower(tmp_path), -2, torch.bfloat16)
    assert features(tower).dtype == torch.bfloat16
