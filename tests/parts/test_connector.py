"""The connectors against formulas written out, and their files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtune.core.errors import UserError
from mmtune.parts.connector.base import Connector, new_connector
from mmtune.parts.connector.linear import LinearConnector
from mmtune.parts.connector.mlp import MlpConnector
from mmtune.parts.outline import outline_of
from mmtune.parts.spec import CONNECTORS, ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from tests.tiny_models import save_language, save_tower

OPTIONS: dict[str, dict[str, int]] = {
    "linear": {},
    "mlp1x_gelu": {},
    "mlp2x_gelu": {},
    "mlp3x_gelu": {},
    "pixel_shuffle": {"scale": 3},
    "resampler": {"queries": 5, "depth": 2, "heads": 2},
}


class Forgetful(Connector):
    """As from outside; it keeps its option to itself, says a wrong number of tokens, and may break."""

    def __init__(self, vision_width: int, language_width: int, gain: float = 1.0) -> None:
        super().__init__(vision_width, language_width)
        self.linear = torch.nn.Linear(vision_width, language_width)
        self.named = self.kind if gain == 0 else None  # known only once it is made

    def tokens(self, features: int) -> int:
        return 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)


FORGETFUL = f"{__name__}:Forgetful"


def made(kind: str, vision: int = 6, language: int = 10, **options: int) -> Connector:
    torch.manual_seed(0)
    given = {**OPTIONS[kind], **options}
    return new_connector(ConnectorOptions(kind, options=given), vision, language)


def double(connector: Connector) -> dict[str, torch.Tensor]:
    """Its tensors in fp64, none of them zero or one."""
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return connector.double().state_dict()


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))  # the exact one, not its tanh form


def norm(x: torch.Tensor, of: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * tensors[f"{of}.weight"] + tensors[f"{of}.bias"]


def test_the_table_is_tested() -> None:
    assert sorted({re.sub(r"mlp[13]x", "mlpNx", kind) for kind in OPTIONS}) == CONNECTORS.names()


def test_mlp_is_linear_gelu_linear() -> None:
    connector = made("mlp2x_gelu")
    assert isinstance(connector, MlpConnector)
    tensors = double(connector)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    hidden = x @ tensors["linear_1.weight"].T + tensors["linear_1.bias"]
    expected = gelu(hidden) @ tensors["linear_2.weight"].T + tensors["linear_2.bias"]
    torch.testing.assert_close(connector(x), expected)


@pytest.mark.parametrize("layers", [1, 3])
def test_mlp_of_other_depths_has_a_gelu_between_each_two(layers: int) -> None:
    connector = made(f"mlp{layers}x_gelu")
    tensors = double(connector)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    hidden = x
    for i in range(1, layers + 1):
        hidden = (gelu(hidden) if i > 1 else hidden) @ tensors[f"linear_{i}.weight"].T
        hidden = hidden + tensors[f"linear_{i}.bias"]
    assert len(tensors) == 2 * layers
    torch.testing.assert_close(connector(x), hidden)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp02x_gelu", "mlp-1x_gelu", "mlp2x_relu", "mlp2xgelu"])
def test_no_other_name_is_an_mlp(kind: str) -> None:
    with pytest.raises(UserError, match=f"unknown connector '{kind}'\n *Did you mean 'mlp"):
        CONNECTORS.load(kind)


def test_pixel_shuffle_joins_blocks_of_neighbours() -> None:
    connector = made("pixel_shuffle", scale=2)
    tensors = double(connector)
    x = torch.randn(2, 16, 6, dtype=torch.float64)
    rows = []
    for row in range(2):
        for column in range(2):
            corner = 4 * 2 * row + 2 * column  # of a grid of 4 x 4
            rows.append(torch.cat([x[:, corner + step] for step in (0, 1, 4, 5)], dim=-1))
    hidden = norm(torch.stack(rows, dim=1), "norm", tensors)
    hidden = gelu(hidden @ tensors["linear_1.weight"].T + tensors["linear_1.bias"])
    torch.testing.assert_close(connector(x), hidden @ tensors["linear_2.weight"].T + tensors["linear_2.bias"])


def test_pixel_shuffle_takes_grids_that_its_scale_divides() -> None:
    connector = made("pixel_shuffle", scale=2)
    assert connector.tokens(576) == 144
    with pytest.raises(UserError, match=r"a scale of 2 does not divide the tower's grid of 27 x 27 features"):
        connector.tokens(27 * 27)
    with pytest.raises(UserError, match="on a square grid, and the tower gives 12 per picture"):
        connector.tokens(12)


def test_resampler_by_its_formulas() -> None:
    """Features and queries together are keys and values; the queries ask, layer by layer."""
    connector = made("resampler")
    tensors = double(connector)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    found = tensors["queries.weight"].expand(2, 5, 6)
    for i in range(2):
        layer = {k.removeprefix(f"layers.{i}."): t for k, t in tensors.items() if f"layers.{i}." in k}
        asking = norm(found, "norm_queries", layer)
        seen = torch.cat([norm(x, "norm_features", layer), asking], dim=1)
        heads = []
        for head in (slice(0, 3), slice(3, 6)):
            q, k, v = (
                inputs @ layer[f"{name}.weight"][head].T
                for name, inputs in (("q", asking), ("k", seen), ("v", seen))
            )
            heads.append(torch.softmax(q @ k.mT / math.sqrt(3), dim=-1) @ v)
        found = found + torch.cat(heads, dim=-1) @ layer["out.weight"].T
        inner = gelu(norm(found, "mlp.0", layer) @ layer["mlp.1.weight"].T)
        found = found + inner @ layer["mlp.3.weight"].T
    expected = norm(found, "norm", tensors) @ tensors["linear.weight"].T + tensors["linear.bias"]
    torch.testing.assert_close(connector(x), expected)


def test_linear_is_linear() -> None:
    connector = made("linear").double()
    assert isinstance(connector, LinearConnector)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(connector(x), x @ connector.linear.weight.T + connector.linear.bias)


@pytest.mark.parametrize("kind", OPTIONS)
def test_shape_and_token_count(kind: str) -> None:
    connector = made(kind)
    expected = {"pixel_shuffle": 1, "resampler": 5}.get(kind, 9)
    assert connector.tokens(9) == expected
    with torch.autocast("cpu", torch.bfloat16):  # as it trains, in fp32 under a tower in bf16
        assert connector(torch.randn(3, 9, 6, dtype=torch.bfloat16)).shape == (3, expected, 10)


@pytest.mark.parametrize("kind", OPTIONS)
def test_saved_and_loaded_bit_for_bit(tmp_path: Path, kind: str) -> None:
    connector = made(kind)
    connector.save(tmp_path)
    torch.manual_seed(1)
    again = new_connector(ConnectorOptions(kind, weights=str(tmp_path)), 6, 10)  # its own options
    again.load(tmp_path)
    before, after = connector.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_connector_without_options_is_saved_as_ever(tmp_path: Path) -> None:
    made("mlp2x_gelu").save(tmp_path)
    described = {"kind": "mlp2x_gelu", "vision_width": 6, "language_width": 10}
    assert json.loads((tmp_path / "config.json").read_text()) == described
    assert sorted(load_file(tmp_path / "model.safetensors")) == [
        *("linear_1.bias", "linear_1.weight", "linear_2.bias", "linear_2.weight")
    ]


def test_every_wrong_option_is_named_at_once() -> None:
    given = {"queries": "many", "dept": 2, "heads": True}
    with pytest.raises(UserError) as raised:
        new_connector(ConnectorOptions("resampler", options=given), 6, 10)
    assert [str(fault) for fault in raised.value.faults] == [
        "model.connector.options.queries: expected a whole number, found 'many'",
        "model.connector.options.dept: unknown option 'dept'\n    Did you mean 'depth'?",
        "model.connector.options.heads: expected a whole number, found True",
    ]
    with pytest.raises(UserError, match=r"unknown option 'scale'\n *It has no options."):
        new_connector(ConnectorOptions("linear", options={"scale": 2}), 6, 10)
    with pytest.raises(UserError) as raised:
        made("resampler", queries=0, depth=-1)
    assert [fault.where.rpartition(".")[2] for fault in raised.value.faults] == ["queries", "depth"]
    with pytest.raises(UserError, match="4 heads don't divide the tower's width of 6"):
        made("resampler", heads=4)


def test_what_a_class_from_outside_may_do_wrong() -> None:
    with pytest.raises(UserError, match=r"does not hand on gain, .*\n *In its __init__: .*, gain=gain\)"):
        new_connector(ConnectorOptions(FORGETFUL, options={"gain": 2.0}), 6, 10)
    with pytest.raises(UserError, match=r"refused by .*Forgetful: AttributeError: .* no attribute 'kind'"):
        new_connector(ConnectorOptions(FORGETFUL, options={"gain": 0.0}), 6, 10)


def test_a_wrong_number_of_tokens_is_known_before_weights(tmp_path: Path) -> None:
    vision, language = save_tower(tmp_path / "tower"), save_language(tmp_path / "lm")
    parts = VisionOptions("clip", vision), ConnectorOptions(FORGETFUL), LanguageOptions(language)
    with pytest.raises(UserError, match=r"Forgetful, the connector, says .* gives 2 features .* gives 4"):
        outline_of(ModelOptions(None, *parts))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: made("linear"), "its kind is 'mlp2x_gelu', here it is 'linear'"),
        (lambda: made("mlp2x_gelu", vision=7), "it takes 6 and gives 10, but the tower is 7 wide"),
        (lambda: made("mlp2x_gelu", language=12), "it takes 6 and gives 10, .* and the language model 12"),
        (lambda: made("mlp3x_gelu"), "its kind is 'mlp2x_gelu', here it is 'mlp3x_gelu'"),
    ],
)
def test_the_weights_of_another_connector_are_refused(tmp_path: Path, other: object, named: str) -> None:
    made("mlp2x_gelu").save(tmp_path)
    with pytest.raises(UserError, match=f"config.json: this connector was made for other parts: {named}"):
        other().load(tmp_path)  # type: ignore[operator]


def test_a_connector_of_other_options_is_refused(tmp_path: Path) -> None:
    made("resampler").save(tmp_path)
    with pytest.raises(UserError, match=r"its options is .*'depth': 2.*, here it is .*'depth': 3"):
        made("resampler", depth=3).load(tmp_path)


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
    for broken in ('{"kind": "linear", "options": [1]}', "[]"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(UserError, match="not the config of a connector that mmtune saved"):
            new_connector(ConnectorOptions("linear", weights=str(tmp_path)), 6, 10)
    connector.save(tmp_path)
    file.write_bytes(b"half a file")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        connector.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        connector.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == "linear"
