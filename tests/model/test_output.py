"""`AriaOutput` as a mapping, a tuple and an object."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.utils._pytree as pytree

from aria.model.output import AriaOutput

LOGITS, LOSS = torch.zeros(1, 2, 3), torch.ones(())


def test_it_can_be_rebuilt_from_its_items() -> None:
    output = AriaOutput(logits=LOGITS, loss=LOSS, hidden_states=None)
    assert list(output) == ["loss", "logits"] and output.to_tuple() == output[:] == (LOSS, LOGITS)
    pairs = ((key, output[key]) for key in output)
    for again in (AriaOutput(output), AriaOutput(dict(output)), AriaOutput(pairs), copy.copy(output)):
        assert type(again) is AriaOutput and again.loss is LOSS and again[1] is LOGITS and again.hidden_states is None
    again = pickle.loads(pickle.dumps(output))
    assert type(again) is AriaOutput and torch.equal(again.logits, LOGITS) and list(again) == list(output)
    values, spec = pytree.tree_flatten({"a": output})
    assert values[0] is LOSS and values[1] is LOGITS
    assert type(pytree.tree_unflatten(values, spec)["a"]) is AriaOutput


def test_assignments_are_visible_everywhere_and_in_order() -> None:
    output = AriaOutput(logits=LOGITS)
    output.loss = LOSS
    assert output[0] is output["loss"] is LOSS and list(output.items()) == [("loss", LOSS), ("logits", LOGITS)]
    output["hidden_states"] = (LOGITS,)
    assert output.hidden_states == output[2] == (LOGITS,)
    output.loss = None
    assert "loss" not in output and output[0] is LOGITS


def test_unknown_fields_are_rejected_by_name() -> None:
    for wrong in (lambda: AriaOutput({"attentions": LOGITS}), lambda: AriaOutput(logits=LOGITS, scores=LOGITS)):
        with pytest.raises(TypeError, match=r"AriaOutput has no field (attentions|scores); there are loss, logits"):
            wrong()
    output = AriaOutput(logits=LOGITS)
    with pytest.raises(TypeError, match="no field attentions"):
        output.attentions = LOGITS
    with pytest.raises(AttributeError, match="no field attentions"):
        _ = output.attentions
    with pytest.raises(IndexError):
        output[1]
    with pytest.raises(KeyError):
        output["loss"]
