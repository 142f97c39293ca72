"""The objective: transformers' loss and gradients, for any packing and split; router losses by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aria.model import Packed
from aria.model.lora import LoRASettings, attach_lora
from aria.ops import Segments
from aria.processor.image_inputs import Crops
from aria.train.batch import Batch
from aria.train.loss import IGNORE_INDEX, linear_cross_entropy, router_losses
from aria.train.objective import Objective, ObjectiveSettings, Step, head_loss
from tests.helpers.tiny import tiny_config, tiny_model

IMAGE, PAD = 9, 2
PLAIN = ObjectiveSettings(z_coefficient=0.0, balance_coefficient=0.0)


def conversation(length: int, picture: bool, seed: int) -> tuple[list[int], list[int], Crops | None]:
    """Ids, which of them are answers, and perhaps a picture of 490 px whose right part is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 300, (length,), generator=generator).tolist()
    answers = [int(i >= length // 2) for i in range(length)]
    if not picture:
        return ids, answers, None
    ids, answers = [ids[0], *[IMAGE] * 128, *ids[1:]], [0] * 128 + answers
    pixels = torch.randint(0, 256, (1, 3, 490, 490), dtype=torch.uint8, generator=generator)
    pixels[:, :, :, 300:] = 0
    return ids, answers, Crops(pixels, ((490, 300),))


def packed(conversations, filler: int = 0) -> Batch:
    ids, targets, lengths, crops = [], [], [], []
    for row, answers, picture in conversations:
        ids += row
        targets += [t if a else IGNORE_INDEX for t, a in zip(row[1:], answers[1:], strict=True)] + [IGNORE_INDEX]
        lengths.append(len(row))
        crops += [picture] if picture else []
    if filler:
        ids, targets = ids + [PAD] * filler, targets + [IGNORE_INDEX] * filler
        lengths.append(filler)
    return Batch(
        input_ids=torch.tensor(ids),
        targets=torch.tensor(targets),
        lengths=tuple(lengths),
        filler=filler,
        crops=tuple(crops),
        labels=sum(t != IGNORE_INDEX for t in targets),
    )


def padded(conversations) -> dict[str, torch.Tensor]:
    """The same as transformers takes it."""
    longest = max(len(row) for row, _, _ in conversations)
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row, _, _ in conversations])
    labels = torch.tensor(
        [
            [t if a else IGNORE_INDEX for t, a in zip(row, answers, strict=True)]
            + [IGNORE_INDEX] * (longest - len(row))
            for row, answers, _ in conversations
        ]
    )
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _, _ in conversations])
    pixels = torch.cat([picture.pixels for _, _, picture in conversations if picture])
    real = torch.zeros(len(pixels), 490, 490, dtype=torch.bool)
    real[:, :, :300] = True
    values = (pixels.float() / 255 - 0.5) / 0.5
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": values, "pixel_mask": real}


def name_in_transformers(name: str) -> str:
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "language_model.")
    return "model." + name.replace("experts.fc1.weight", "experts.gate_up_proj").replace(
        "experts.fc2.weight", "experts.down_proj"
    )


@pytest.fixture
def conversations():
    return [conversation(13, True, 1), conversation(29, False, 2), conversation(7, True, 3)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config()).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Every gradient, by its largest difference beside its largest value."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        other = theirs[name]
        distance = (gradient - other).abs().max() / other.abs().max().clamp(min=1e-3)
        assert distance < tolerance, f"{name}: {distance:.2e}"


def test_loss_and_gradients_are_those_of_transformers(pair, conversations):
    ours, twin = pair
    batch = packed(conversations, filler=11)
    losses = Objective(ours.model, PLAIN)(batch, Step(batch.labels, 1, 0.0))
    losses.total.backward()
    mine = {name_in_transformers(name): gradient for name, gradient in gradients(ours.model).items()}
    ours.zero_grad()
    inputs = padded(conversations)
    theirs = twin(**inputs).loss
    theirs.backward()
    reference = gradients(twin)
    assert losses.total.item() == pytest.approx(theirs.item(), rel=1e-5)
    reference.pop("model.vision_tower.post_layernorm.weight", None)
    reference.pop("model.vision_tower.post_layernorm.bias", None)
    agree(mine, reference)
    # The padded face, which users of transformers know, gives the same.
    loss = ours(**inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    agree({name_in_transformers(name): gradient for name, gradient in gradients(ours.model).items()}, reference)


def test_any_split_of_a_step_has_its_gradient(model, conversations):
    objective = Objective(model, PLAIN)
    whole = packed(conversations)
    one = objective(whole, Step(whole.labels, 1, 0.0))
    one.total.backward()
    expected = gradients(model)
    parts = [packed(conversations[:1]), packed(conversations[1:])]
    total, accuracy = 0.0, 0.0
    for part in parts:
        losses = objective(part, Step(whole.labels, 2, 0.0))
        losses.total.backward()
        total, accuracy = total + losses.metrics["loss"].item(), accuracy + losses.metrics["accuracy"].item()
    assert total == pytest.approx(one.total.item(), rel=1e-5)
    assert accuracy == pytest.approx(one.metrics["accuracy"].item(), rel=1e-5)
    agree(gradients(model), expected)


def test_router_losses_join_the_total_layer_by_layer(model, conversations):
    batch = packed(conversations, filler=9)
    settings = ObjectiveSettings(z_coefficient=0.01, balance_coefficient=0.1, balance_group=2)
    losses = Objective(model, settings)(batch, Step(batch.labels, 4, 0.0))
    plain = Objective(model, PLAIN)(batch, Step(batch.labels, 4, 0.0))
    config = model.config.text
    features = Objective(model, PLAIN)._see(batch.crops)[0]
    context = Packed(config, Segments.of(batch.lengths))
    logits = model(batch.input_ids, context, features, router_logits=True).router_logits
    expected = 0.0
    for number, layer in enumerate(logits):
        real = layer[:-9].double()
        z = 0.01 * real.logsumexp(-1).square().mean().item()
        shares = real.softmax(-1).mean(0).view(4, 2).sum(1)
        counts = torch.zeros(8).double()
        for row in real.topk(3, dim=-1).indices:
            counts[row] += 1
        balance = 0.1 * 4 / (len(real) * 3) * (shares * counts.view(4, 2).sum(1)).sum().item()
        assert losses.metrics[f"router z {number}"].item() == pytest.approx(z / 4, rel=1e-4)
        assert losses.metrics[f"router balance {number}"].item() == pytest.approx(balance / 4, rel=1e-4)
        torch.testing.assert_close(losses.loads[number] * 4, (counts / counts.sum()).float())
        expected += (z + balance) / 4
    assert losses.total.item() - plain.total.item() == pytest.approx(expected, rel=1e-3)


def test_groups_balanced_perfectly_cost_the_coefficient():
    # Tokens choose experts 0 and 2: unbalanced one by one, perfectly balanced in groups of two.
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]])
    assert router_losses(logits, 1, balance_coefficient=0.5, balance_group=2).balance.item() == pytest.approx(0.5)
    assert router_losses(logits, 1, balance_coefficient=0.5).balance.item() > 0.9
    with pytest.raises(ValueError, match="4 experts do not divide into groups of 3"):
        router_losses(logits, 1, balance_group=3)


def test_groups_that_do_not_divide_the_experts_are_refused(model):
    with pytest.raises(ValueError, match="balance_group is 3, which does not divide the model's 8 experts"):
        Objective(model, ObjectiveSettings(balance_group=3))


def test_filler_changes_nothing(model, conversations):
    bare, filled = packed(conversations), packed(conversations, filler=17)
    objective = Objective(model)
    one, other = (objective(batch, Step(bare.labels, 1, 0.0)) for batch in (bare, filled))
    assert one.total.item() == pytest.approx(other.total.item(), rel=1e-6)
    torch.testing.assert_close(one.loads, other.loads)


def test_frozen_parts_get_no_gradients_and_the_rest_the_same(model, conversations):
    batch = packed(conversations)
    Objective(model, PLAIN)(batch, Step(batch.labels, 1, 0.0)).total.backward()
    expected = gradients(model)
    model.vision_tower.requires_grad_(False)
    Objective(model, PLAIN)(batch, Step(batch.labels, 1, 0.0)).total.backward()
    found = gradients(model)
    model.multi_modal_projector.requires_grad_(False)
    Objective(model, PLAIN)(batch, Step(batch.labels, 1, 0.0)).total.backward()
    less = gradients(model)
    model.requires_grad_(True)
    assert not any(name.startswith("vision_tower") for name in found)
    agree(found, {name: g for name, g in expected.items() if not name.startswith("vision_tower")})
    assert {name.split(".")[0] for name in less} == {"language_model"}
    agree(less, {name: g for name, g in expected.items() if name.startswith("language_model")})


@pytest.fixture
def encodings(model):
    """One entry for each time that the vision encoder runs: its crops."""
    calls = []
    handle = model.vision_tower.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0].grid_patches)))
    yield calls
    handle.remove()


@pytest.fixture
def blind(model):
    """The model with a frozen vision encoder."""
    for part in (model.vision_tower, model.multi_modal_projector):
        part.requires_grad_(False)
    yield model
    model.requires_grad_(True)


def keyed(batch: Batch) -> Batch:
    return replace(batch, crops=tuple(c._replace(key=bytes(c.pixels[0, 0, 0, :9].tolist())) for c in batch.crops))


def cache_for(pictures: float) -> ObjectiveSettings:
    """Settings with a cache for this many images of one crop of 490 px."""
    return replace(PLAIN, picture_bytes=int(pictures * 128 * tiny_config().text.hidden_size * 4))


def test_a_cached_image_is_not_encoded_again(blind, conversations, encodings):
    batch = keyed(packed(conversations))
    plain = Objective(blind, PLAIN)(batch, Step(batch.labels, 1, 0.0))
    plain.total.backward()
    expected = gradients(blind)
    objective = Objective(blind, cache_for(2))
    encodings.clear()
    for seen in (2, 0):
        losses = objective(batch, Step(batch.labels, 1, 0.0))
        losses.total.backward()
        assert len(objective.encoded) == seen
        assert losses.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
        agree(gradients(blind), expected)
    assert encodings == [1, 1]


def test_cached_image_tokens_do_not_depend_on_other_images(blind):
    rows = [conversation(9, True, seed) for seed in range(5)]
    pictures = keyed(packed(rows)).crops
    together, later = Objective(blind, cache_for(5)), Objective(blind, cache_for(5))
    expected = together._see(pictures)[0].split(128)
    assert torch.equal(later._see(pictures[3:4])[0], expected[3])
    assert torch.equal(later._see((pictures[3], pictures[1]))[0], torch.cat([expected[3], expected[1]]))
    assert later.encoded == [pictures[1]]


def test_least_recently_used_images_are_evicted(blind, encodings):
    pictures = keyed(packed([conversation(9, True, seed) for seed in range(3)])).crops
    objective = Objective(blind, cache_for(2.5))
    for number, encoded in ((0, 1), (1, 1), (0, 0), (2, 1), (0, 0), (1, 1)):
        objective._see(pictures[number : number + 1])
        assert len(objective.encoded) == encoded
    unnamed = pictures[0]._replace(key=None)
    for _ in range(2):
        objective._see([unnamed])
        assert objective.encoded == [unnamed]


def test_ranks_with_cached_images_wait_for_those_without(blind, conversations, encodings):
    batch = keyed(packed(conversations))
    objective = Objective(blind, cache_for(2), ranks=SimpleNamespace(sequence=1, max=lambda value: max(value, 1)))
    first, second = (objective(batch, Step(batch.labels, 1, 0.0)).total.item() for _ in range(2))
    assert encodings == [1, 1, 1]
    assert first == second


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_images_are_not_cached_while_their_encoder_trains(blind, part):
    getattr(blind, part).requires_grad_(True)
    with pytest.raises(ValueError, match="set picture_bytes = 0, or freeze_vit and freeze_projector to true"):
        Objective(blind, cache_for(1))


@pytest.mark.parametrize("chunk", [1, 2])
def test_all_ranks_run_the_largest_number_of_vision_chunks(model, conversations, chunk):
    batch = packed(conversations)
    ranks = SimpleNamespace(sequence=1, max=lambda value: 3)
    calls = []
    handle = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    settings = ObjectiveSettings(z_coefficient=0.0, balance_coefficient=0.0, vision_chunk=chunk)
    plain = Objective(model, PLAIN)(batch, Step(batch.labels, 1, 0.0))
    plain.total.backward()
    expected, before = gradients(model), len(calls)
    losses = Objective(model, settings, ranks=ranks)(batch, Step(batch.labels, 1, 0.0))
    losses.total.backward()
    handle.remove()
    assert len(calls) - before == 3
    assert losses.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    agree(gradients(model), expected)


def test_a_rank_without_images_runs_the_vision_tower_too(model):
    batch = packed([conversation(12, False, 5)])
    ranks = SimpleNamespace(sequence=1, max=lambda value: 1)
    Objective(model, PLAIN, ranks=ranks)(batch, Step(batch.labels, 1, 0.0)).total.backward()
    found = gradients(model)
    vision = [g for name, g in found.items() if name.startswith("vision_tower.encoder")]
    assert vision and not any(g.any() for g in vision)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_the_head_with_an_adapter_is_the_merged_head(frozen, known):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 11, bias=False).double())
    adapter = attach_lora(model, "0", LoRASettings(rank=2, alpha=4.0, dropout=0.0))
    [head] = model
    head.weight.requires_grad_(not frozen)
    nn.init.normal_(adapter.b)
    a, b = adapter.a, adapter.b
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    targets[::3] = IGNORE_INDEX
    leaves = [hidden, a, b] + ([] if frozen else [head.weight])
    merged = head.weight + 2.0 * b @ a
    expected = nn.functional.cross_entropy(hidden @ merged.t(), targets, reduction="sum") / 20
    wanted = torch.autograd.grad(expected, leaves)
    found = head_loss(head, hidden, targets, 20, 6 if known else None)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(found.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_parts_of_a_batch_add_up_to_its_loss():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(8, 4), torch.randn(5, 4), torch.randint(0, 5, (8,))
    parts = [linear_cross_entropy(hidden[r], weight, labels[r], denominator=8.0) for r in (slice(3), slice(3, 8))]
    whole = linear_cross_entropy(hidden, weight, labels)
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-6)
    assert sum(part.accuracy.item() for part in parts) == pytest.approx(whole.accuracy.item(), rel=1e-6)


def test_a_batch_without_targets_costs_nothing(model):
    ids, _, _ = conversation(12, False, 5)
    losses = Objective(model, PLAIN)(packed([(ids, [0] * 12, None)]), Step(5, 2, 0.0))
    losses.total.backward()
    assert losses.total.item() == 0.0
    assert math.isfinite(losses.metrics["accuracy"].item())
    assert not any(g.any() for g in gradients(model).values())
