"""The connectors against formulas written out, and their files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtune.core.errors import UserError
from mmtune.parts.connector.base import Connector
from mmtune.parts.connector.linear import LinearConnector
from mmtune.parts.connector.mlp import MlpConnector
from mmtune.parts.spec import CONNECTORS

KINDS = ["linear", "mlp2x_gelu"]


def made(kind: str, vision: int = 6, language: int = 10) -> Connector:
    torch.manual_seed(0)
    return CONNECTORS.load(kind)(vision, language)


def test_mlp_is_linear_gelu_linear() -> None:
    connector = made("mlp2x_gelu").double()
    assert isinstance(connector, MlpConnector)
    first, second = connector.linear_1, connector.linear_2
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    hidden = x @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # the exact GELU, not its tanh form
    torch.testing.assert_close(connector(x), hidden @ second.weight.T + second.bias)


def test_linear_is_linear() -> None:
    connector = made("linear").double()
    assert isinstance(connector, LinearConnector)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(connector(x), x @ connector.linear.weight.T + connector.linear.bias)


@pytest.mark.parametrize("kind", CONNECTORS.names())
def test_shape_and_token_count(kind: str) -> None:
    connector = made(kind)
    assert connector(torch.randn(3, 9, 6)).shape == (3, connector.tokens(9), 10)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_bit_for_bit(tmp_path: Path, kind: str) -> None:
    connector = made(kind)
    connector.save(tmp_path)
    torch.manual_seed(1)
    again = CONNECTORS.load(kind)(6, 10)
    again.load(tmp_path)
    before, after = connector.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: made("linear"), "kind"),
        (lambda: made("mlp2x_gelu", vision=7), "vision_width"),
        (lambda: made("mlp2x_gelu", language=12), "language_width"),
    ],
)
def test_the_weights_of_another_connector_are_refused(tmp_path: Path, other: object, named: str) -> None:
    made("mlp2x_gelu").save(tmp_path)
    with pytest.raises(UserError, match=f"^.*config.json: {named} is"):
        other().load(tmp_path)  # type: ignore[operator]


def test_broken_folders_are_named(tmp_path: Path) -> None:
    connector = made("linear")
    with pytest.raises(UserError, match="no such file"):
        connector.load(tmp_path)
    connector.save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({"linear.weight": weights["linear.weight"]}, file)
    with pytest.raises(UserError, match=r"missing, unknown or of another shape: linear\.bias"):
        connector.load(tmp_path)
    file.write_bytes(b"half a file")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        connector.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        connector.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == "linear"
