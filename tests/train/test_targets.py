"""What trains: adapters and frozen parts."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from aria import AriaConfig
from aria.model import Aria, Packed
from aria.model.lora import LoRALinear, LoRASettings, attach_lora, lora_modules
from aria.ops import Segments
from aria.train.targets import Targets, apply
from tests.helpers.tiny import tiny_config, tiny_model


def whole_aria() -> Aria:
    with torch.device("meta"):
        return Aria(AriaConfig.aria()).to(torch.bfloat16)


def hidden(model: Aria, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, Packed(model.config.text, Segments.of([8, 12]))).hidden


def test_the_authors_recipe_trains_as_many_parameters_as_theirs() -> None:
    found = apply(whole_aria(), Targets())
    assert found.parameters == 154_333_184 and found.whole == 25_307_308_912
    assert {part.name: part.parameters for part in found.parts}["experts, adapters"] == 144_965_632
    assert {part.dtype for part in found.parts} == {torch.float32}


def test_what_the_documentation_shows_trains() -> None:
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    written = tomllib.loads(text.split("```toml\n")[1].split("```")[0])["targets"]
    targets = Targets(**{key: tuple(value) if isinstance(value, list) else value for key, value in written.items()})
    found = apply(whole_aria(), targets)
    assert len(found.adapters) == 3 * 26 + 3 * 8, "three in each of 26 layers, three more in 20 to 27"


def test_full_training_leaves_frozen_layers_alone() -> None:
    model = whole_aria()
    apply(model, Targets(method="full", freeze_llm_layers=(0, 27), freeze_projector=False, freeze=("*.router.weight",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "language_model.model.layers.1.mlp.experts.fc1.weight" in trained
    assert "multi_modal_projector.query" in trained and "language_model.lm_head.weight" in trained
    assert not any(".layers.0." in name or ".layers.27." in name for name in trained)
    assert not any("router" in name or "vision_tower" in name for name in trained)


def test_adapters_change_nothing_until_trained_and_then_what_merged_weights_would() -> None:
    torch.manual_seed(3)
    model, ids = tiny_model(tiny_config()), torch.randint(10, 300, (20,))
    before = hidden(model, ids)
    names = set(model.state_dict())
    found = apply(model, Targets(freeze_vit=False, freeze_projector=False, rslora=True))
    assert names < set(model.state_dict()), "what is adapted keeps its name"
    assert torch.equal(before, hidden(model, ids))
    attached = lora_modules(model)
    assert set(attached) == set(found.adapters) and "language_model.lm_head" in attached
    for adapter in attached.values():
        torch.nn.init.normal_(adapter.b, std=0.05)
    changed = hidden(model, ids)
    assert (changed - before).abs().max() > 0.1
    for name, adapter in attached.items():
        model.get_submodule(name).weight.data += adapter.change()
        torch.nn.init.zeros_(adapter.b)
    torch.testing.assert_close(hidden(model, ids), changed, rtol=1e-4, atol=1e-4)


def test_gradients_reach_adapters_alone_and_dropout_is_for_training() -> None:
    model, ids = tiny_model(tiny_config()).train(), torch.randint(10, 300, (20,))
    apply(model, Targets(dropout=0.5))
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.b, std=0.05)
    assert not torch.equal(hidden(model, ids), hidden(model, ids))
    model.logits(hidden(model, ids)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".adapter." in name), name
    model.eval()
    assert torch.equal(hidden(model, ids), hidden(model, ids))


def test_modules_by_end_of_name_and_by_pattern() -> None:
    model = tiny_model(tiny_config())
    found = apply(model, Targets(modules=("experts.fc2", "q_proj", "*.layers.1.mlp.shared_experts.*")))
    prefix = "language_model.model.layers"
    assert set(found.adapters) == (
        {f"{prefix}.{i}.mlp.experts.fc2" for i in range(3)}
        | {f"{prefix}.{i}.self_attn.q_proj" for i in range(3)}
        | {f"{prefix}.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    )
    linear = model.get_submodule(f"{prefix}.0.self_attn.q_proj")
    assert isinstance(linear, LoRALinear) and linear.adapter.a.shape == (8, 64)
    with pytest.raises(ValueError, match="has an adapter already"):
        attach_lora(model, f"{prefix}.0.self_attn.q_proj", LoRASettings())
    with pytest.raises(ValueError, match="only linear layers and grouped experts"):
        attach_lora(model, f"{prefix}.0.input_layernorm", LoRASettings())


@pytest.mark.parametrize(("settings", "message"), [
    ({"modules": ("qproj",)}, r"nothing that can have an adapter is called 'qproj'; similar names are q_proj"),
    ({"modules": ("experts",)}, r"is called 'experts'; similar names are experts\.fc"),
    ({"modules": ("router",)}, r"nothing that can have an adapter is called 'router'"),
    ({"modules": ("q_proj", "linear_in")}, r"all that is called 'linear_in' is frozen"),
    ({"freeze_llm": True}, r"everything that could have an adapter is frozen"),
    ({"method": "full", "freeze_llm": True}, r"everything is frozen, and nothing is left to train"),
    ({"freeze": ("*.routr.weight",)}, r"freeze: no parameter is called '\*\.routr\.weight'"),
    ({"freeze_llm_layers": (0, 3)}, r"freeze_llm_layers names 3, but the decoder's layers are 0 to 2"),
])  # fmt: skip
def test_names_that_fit_nothing_are_refused(settings: dict, message: str) -> None:
    model = tiny_model(tiny_config())
    with pytest.raises(ValueError, match=message):
        apply(model, Targets(**settings))
    assert not lora_modules(model), "nothing half-done is left behind"


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 0}, "rank should be 1 or above, but is 0"),
    ({"alpha": 0}, "alpha should be above 0"),
    ({"dropout": 1.0}, "dropout should be at least 0 and below 1"),
    ({"modules": ()}, "modules is empty"),
    ({"method": "full", "modules": ("q_proj",)}, 'method = "full" has none'),
])  # fmt: skip
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Targets(**settings)
