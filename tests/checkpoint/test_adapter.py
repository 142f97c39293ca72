"""Adapter folders: ours in PEFT, PEFT's and the authors' here, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from aria import AriaForConditionalGeneration, AriaProcessor
from aria.checkpoint import adapter as adapter_files
from aria.checkpoint import convert, load_model
from aria.checkpoint.adapter import load_adapter, merged, read_adapter, save_adapter
from aria.model import Aria
from aria.model.lora import LoRASettings, lora_modules
from aria.train.targets import Targets, apply
from tests.helpers.tiny import tiny_config, tiny_model, transformers_twin

IDS = torch.randint(10, 300, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    AriaForConditionalGeneration(tiny_model(tiny_config())).save_pretrained(folder)
    return folder


def logits(model: Aria) -> torch.Tensor:
    with torch.no_grad():
        return AriaForConditionalGeneration(model).eval()(IDS).logits


def trained(folder: Path, **settings: object) -> Aria:
    """A model with adapters that change much."""
    torch.manual_seed(5)
    model = load_model(folder)
    apply(model, Targets(rank=3, alpha=7.0, **settings))
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.b, std=0.1)
    return model.eval()


@pytest.mark.parametrize("settings", [
    {},
    {"rslora": True, "modules": ("experts.fc1", "q_proj")},
    {"modules": ("experts.fc2", "*.layers.1.mlp.shared_experts.*")},
    {"freeze_vit": False, "freeze_projector": False, "freeze_llm_layers": (0,)},
], ids=["all", "fc1", "fc2", "vision too"])  # fmt: skip
def test_peft_computes_the_same_from_our_folder(base: Path, tmp_path: Path, settings: dict) -> None:
    model = trained(base, **settings)
    save_adapter(model, tmp_path / "adapter", base_model="some/base")
    ours, plain = logits(model), logits(load_model(base))
    assert (ours - plain).abs().max() > 0.05
    twin = PeftModel.from_pretrained(transformers_twin(base), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        theirs = twin(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    named = {name for name, _ in twin.named_parameters() if ".lora_A." in name}
    assert len(named) == len(lora_modules(model)), "PEFT adapts what we adapted, and no more"
    # And again here: to the bit.
    again = load_model(base)
    stored = read_adapter(tmp_path / "adapter", again.config)
    load_adapter(again, stored)
    assert torch.equal(logits(again), ours)
    # Written once more it is the same file: no setting drifts on its way.
    save_adapter(again, tmp_path / "again", base_model=stored.base_model)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_what_peft_writes_is_read(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "lm_head", "out_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "experts.down_proj": 3},
        alpha_pattern={r"layers\.[02]\..*.gate_up_proj": 11},
    )  # fmt: skip
    torch.manual_seed(0)
    twin = get_peft_model(transformers_twin(base), config)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name and "multihead_attn" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    twin.save_pretrained(str(tmp_path))
    model = load_model(base)
    stored = read_adapter(tmp_path, model.config)
    layers = "language_model.model.layers"
    assert stored.settings[f"{layers}.2.mlp.experts.fc1"] == LoRASettings(rank=4, alpha=11, dropout=0, rslora=True)
    assert stored.settings[f"{layers}.1.mlp.experts.fc2"] == LoRASettings(rank=3, alpha=6, dropout=0, rslora=True)
    load_adapter(model, stored)
    with torch.no_grad():
        theirs = twin.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"LoRA modules differ \(rank \[2, 3, 4\], alpha \[6.0, 11.0\]\)"):
        save_adapter(model, tmp_path / "again")


def test_the_authors_folder_is_read(base: Path, tmp_path: Path) -> None:
    """Their experts are three-dimensional, and names those of their layout."""
    modules = ("experts.fc1", "experts.fc2", "k_proj", "linear_in")
    model = trained(base, modules=modules, freeze_vit=False, freeze_projector=False)
    tensors = {}
    for name, adapter in lora_modules(model).items():
        name = name.replace("vision_tower.", "vision_tower.vision_model.").replace(".feed_forward.", ".ffn.")
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.a.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.b.detach()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "alpha_pattern": {r"layers\.1\..*experts\.fc1": 5}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    stored = read_adapter(tmp_path, tiny_config()).settings
    assert {settings.alpha for name, settings in stored.items() if "layers.1.mlp.experts.fc1" in name} == {5.0}
    assert {settings.alpha for name, settings in stored.items() if "layers.1.mlp.experts.fc1" not in name} == {7.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": None}))
    again = load_model(base)
    load_adapter(again, read_adapter(tmp_path, again.config))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_merged_weights_compute_the_same_everywhere(base: Path, tmp_path: Path) -> None:
    model = trained(base, freeze_vit=False)
    save_adapter(model, tmp_path / "adapter")
    done = convert(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert done.tensors == len(load_model(base).state_dict())
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4)
    twin = transformers_twin(tmp_path / "merged")
    with torch.no_grad():
        theirs = twin(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(theirs, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", ["mlp.experts.fc1", "self_attn.o_proj"])
def test_a_merged_weight_is_rounded_once(base: Path, module: str) -> None:
    model = trained(base)
    name = f"language_model.model.layers.0.{module}"
    adapter, weight = lora_modules(model)[name], model.get_parameter(f"{name}.weight").detach().bfloat16()
    a, b = adapter.a.detach().double(), adapter.b.detach().double()
    exact = weight.double() + (b @ a if a.ndim == 2 else a @ b) * (7 / 3)
    found = merged(weight, adapter.lora())
    once, twice = (found == exact.bfloat16()), (weight + adapter.change().bfloat16() == exact.bfloat16())
    assert found.dtype == torch.bfloat16 and found.shape == weight.shape
    # What lies between two numbers within float32's own error may go either way.
    assert once.float().mean() > 0.999 > 0.98 > twice.float().mean()


def test_an_adapter_in_bfloat16_keeps_its_bits(base: Path, tmp_path: Path) -> None:
    model = trained(base, dtype="bfloat16")
    save_adapter(model, tmp_path)
    again = load_model(base)
    load_adapter(again, read_adapter(tmp_path, again.config))
    assert {adapter.a.dtype for adapter in lora_modules(again).values()} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(model))


def test_what_the_documentation_shows_runs(base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[-1].split("```")[0].replace("rhymes-ai/Aria", base.as_posix())
    found: dict[str, Aria] = {}
    exec(example, {}, found)
    assert int(capsys.readouterr().out) == sum(p.numel() for p in found["model"].parameters() if p.requires_grad) > 0
    assert torch.equal(logits(found["again"]), logits(found["model"]))


def test_values_kept_elsewhere_are_written(base: Path, tmp_path: Path) -> None:
    """Of a model that several ranks hold, or an average of its weights."""
    model = trained(base)
    state = {name: 2 * p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path, state=state)
    stored = read_adapter(tmp_path, model.config)
    for name, adapter in lora_modules(model).items():
        assert torch.equal(stored.weights[name].a, 2 * adapter.a) and torch.equal(stored.weights[name].b, 2 * adapter.b)


def test_a_save_that_fails_leaves_what_was_there(base: Path, tmp_path: Path, monkeypatch) -> None:
    model = trained(base)
    AriaForConditionalGeneration(load_model(base)).save_pretrained(tmp_path)
    save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert "model.safetensors" in before, "an adapter may lie beside its model"

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_files, "write_safetensors", full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(trained(base, modules=("q_proj",)), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_full_weights_are_not_saved_while_adapters_are_apart(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has adapters beside its weights.*merge"):
        AriaForConditionalGeneration(trained(base)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no LoRA to save"):
        save_adapter(load_model(base), tmp_path)
    assert not list(tmp_path.iterdir())


def spoil(folder: Path, how: str) -> None:
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    first = next(iter(tensors))
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return
    if how == "empty":
        tensors = {}
    elif how == "half":
        del tensors[first]
    elif how == "other rank":
        settings["r"] = 5
    elif how == "other model":
        tensors = {key.replace("layers.0", "layers.40"): tensor for key, tensor in tensors.items()}
    elif how == "no tensor of LoRA":
        tensors["classifier.weight"] = torch.ones(2)
    elif how == "dora":
        settings["use_dora"] = True
    elif how == "pissa":
        settings["init_lora_weights"] = "pissa_niter_4"
    elif how == "trained head":
        settings["modules_to_save"] = ["lm_head"]
    elif how == "more tokens":
        tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(310, 64)
    elif how == "twice":
        other = ".model.model.language_model.", ".model.language_model.model."
        tensors |= {key.replace(*other): tensor.clone() for key, tensor in tensors.items() if "q_proj" in key}
    elif how == "integers":
        tensors[first] = tensors[first].int()
    elif how in ("nan", "inf"):
        tensors[first].view(-1)[3] = float(how)
    elif how == "lora_ga":
        settings["init_lora_weights"] = how
    elif how == "patterns":
        settings["alpha_pattern"] = {"q_proj(": 2}
    elif how == "list of patterns":
        settings["rank_pattern"] = ["q_proj"]
    elif how == "uneven experts":
        name = next(key for key in tensors if "experts.lora_A" in key)
        tensors[name] = tensors[name][1:].clone()
    elif how == "prefix tuning":
        settings["peft_type"] = "PREFIX_TUNING"
    elif how == "no rank":
        del settings["r"]
    save_file(tensors, file)
    config.write_text(json.dumps(settings))


@pytest.mark.parametrize(("how", "message"), [
    ("truncated", "is not a valid safetensors file .*fetch it again"),
    ("empty", "holds no adapter; it was saved empty"),
    ("half", "has lora_. and not the other"),
    ("other rank", "does not fit this model.*another model or rank"),
    ("other model", r"has LoRA for model\.language_model.*layers\.40.*for another model"),
    ("pissa", "init_lora_weights is 'pissa_niter_4', which is not supported here"),
    ("lora_ga", "init_lora_weights is 'lora_ga', which is not supported here"),
    ("nan", "lora_. of .* holds inf or NaN; its training diverged"),
    ("inf", "lora_. of .* holds inf or NaN; its training diverged"),
    ("patterns", "alpha_pattern should map ends of modules' names to numbers"),
    ("list of patterns", "rank_pattern should map ends of modules' names to numbers"),
    ("trained head", "modules_to_save is .'lm_head'., which is not supported"),
    ("more tokens", r"lm_head.base_layer.weight is \[310, 64\], for another vocabulary than \(300, 64\)"),
    ("integers", "torch.int32 .*expected floating-point numbers"),
    ("twice", "has two adapters for "),
    ("uneven experts", "not the same rank for each of 8 experts"),
    ("no tensor of LoRA", "classifier.weight is not a LoRA tensor"),
    ("dora", "use_dora is True, which is not supported here"),
    ("prefix tuning", "is a PREFIX_TUNING adapter; only LORA"),
    ("no rank", "r is None; expected a whole number from 1 to 65,536"),
])  # fmt: skip
def test_folders_that_do_not_fit(base: Path, tmp_path: Path, how: str, message: str) -> None:
    model = trained(base)
    save_adapter(model, tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path, model.config)


@pytest.mark.parametrize(("changed", "message"), [
    ({"r": 10**9}, "r is 1000000000; expected a whole number from 1 to 65,536"),
    ({"r": 4.5}, "r is 4.5; expected a whole number"),
    ({"r": True}, "r is True; expected a whole number"),
    ({"r": 10**400}, "r is 1000"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a finite number"),
    ({"lora_alpha": 1e308}, r"lora_alpha is 1e\+308; expected"),
    ({"lora_alpha": "32"}, "lora_alpha is '32'; expected a number from -1,000,000.0 to 1,000,000.0"),
    ({"lora_dropout": 7}, "lora_dropout is 7; expected a number from 0.0 to 1.0"),
    ({"alpha_pattern": {"q_proj": 1e200}}, r"alpha_pattern of 'q_proj' is 1e\+200; expected"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' is 0; expected a whole number from 1"),
    ({"rank_pattern": {"a" * 1001: 4}}, "a pattern has 1,001 characters; at most 1,000"),
    ({"rank_pattern": {"(" * 500 + ")" * 500: 4}}, "is not a regular expression"),
    ({"rank_pattern": {f"{i}_proj": 4 for i in range(10_001)}}, "at most 10,000 are read"),
    ({"rank_pattern": {"(?R)": 4}}, "is not a regular expression"),
])  # fmt: skip
def test_settings_beyond_all_limits_are_refused_by_name(base: Path, tmp_path: Path, changed, message: str) -> None:
    model = trained(base)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ValueError, match=message) as refused:
        read_adapter(tmp_path, model.config)
    assert str(file) in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("pattern", [
    "(.*){1,1000}[^j]", "(?:(?:.{0,9}){0,1000}){0,1000}[^j]", "([a-z._0-9]{0,1000}){0,1000}[^j]"
])  # fmt: skip
def test_patterns_that_backtrack_without_end_are_stopped(base: Path, tmp_path: Path, monkeypatch, pattern: str) -> None:
    """Python's own ``re`` would take years, and block all other threads."""
    model = trained(base)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": {pattern: 4}}))
    monkeypatch.setattr("aria.checkpoint.adapter._MATCH_SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"patterns of rank_pattern take more than 0\.3 s.*write plain names"):
        read_adapter(tmp_path, model.config)


def test_what_is_no_adapter_folder(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        read_adapter(base, tiny_config())
    save_adapter(trained(base), tmp_path / "one")
    shutil.copyfile(tmp_path / "one/adapter_config.json", tmp_path / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        read_adapter(tmp_path, tiny_config())


def test_an_adapter_is_no_model(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(base), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"it is an adapter: pass it as --adapter"):
        AriaForConditionalGeneration.from_pretrained(tmp_path)


def test_merge_from_the_command_line(command, capsys, model_folder: Path, tmp_path: Path) -> None:
    """The base is the one that the adapter's folder names, unless another is given."""
    model = trained(model_folder)
    save_adapter(model, tmp_path / "adapter")
    assert command("merge", tmp_path / "adapter", tmp_path / "out") == 2, "the adapter is not nano's"
    assert "for another model" in capsys.readouterr().err and not (tmp_path / "out").exists()
    save_adapter(model, tmp_path / "adapter", base_model=str(model_folder))
    assert command("merge", tmp_path / "adapter", tmp_path / "adapter") == 2
    assert "holds an adapter, which would be added once more" in capsys.readouterr().err.replace("\n", " ")
    assert command("merge", tmp_path / "adapter", tmp_path / "out") == 0
    assert f"tensors of {model_folder}" in capsys.readouterr().out.replace("\n", "")
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)
    ours, theirs = (AriaProcessor.from_pretrained(folder) for folder in (tmp_path / "out", model_folder))
    assert ours.tokenizer.encode("a cat") == theirs.tokenizer.encode("a cat")
    assert ours.image_processor.max_image_size == theirs.image_processor.max_image_size == 490
