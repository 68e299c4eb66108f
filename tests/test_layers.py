"""The `run_layer` of `Transformer.hidden_states`, and training/layers.py: checkpointed, recorded, replayed layers."""

import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import FAMILIES, assert_same_gradients, families, ids, lora_model, samples, small_model, token_ids

from training.head import TokenLoss
from training.layers import checkpointed, recorded, replayed
from training.packing import pack, packed
from training.scoring import score


def layer_outputs(model, forward):
    """What each layer returns while `forward` runs."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for layer in model.model["layers"]
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return outputs


def inputs_of(rows):
    """Rows end to end, (1, N), and their lengths."""
    return torch.tensor([list(itertools.chain(*rows))]), list(map(len, rows))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------- run_layer


@given(families, ids)
def test_run_layer_gets_each_layer_in_order_with_the_inputs_that_it_would_have(family, tokens):
    model, calls, order = small_model(**FAMILIES[family]), [], list(range(2))

    def run(number, layer, x, cos, sin, attend):
        calls.append((number, layer))
        return layer(x, cos, sin, attend)

    hidden = model.hidden_states(torch.tensor([tokens]), run_layer=run)
    assert torch.equal(hidden, model.hidden_states(torch.tensor([tokens])))
    assert calls == list(zip(order, model.model["layers"], strict=True))


@given(families, ids)
def test_what_run_layer_returns_is_the_next_layers_input(family, tokens):
    """Layers that are skipped leave the embeddings for the final norm."""
    model, input_ids = small_model(**FAMILIES[family]), torch.tensor([tokens])
    hidden = model.hidden_states(input_ids, run_layer=lambda number, layer, x, *rest: x)
    assert torch.equal(hidden, model.model["norm"](model.model["embed_tokens"](input_ids)))


@given(families, st.lists(token_ids, min_size=1, max_size=4))
@settings(max_examples=30)
def test_recorded_outputs_are_those_of_the_layers_and_change_nothing(family, rows):
    model, (input_ids, lengths), found = small_model(**FAMILIES[family]), inputs_of(rows), []
    plain = model.hidden_states(input_ids, *packed(model, lengths))
    expected = layer_outputs(model, lambda: model.hidden_states(input_ids, *packed(model, lengths)))
    assert torch.equal(model.hidden_states(input_ids, *packed(model, lengths), recorded(found)), plain)
    assert len(found) == len(expected) == model.config.num_hidden_layers
    for output, of_layer in zip(found, expected, strict=True):
        assert torch.equal(output, of_layer)
    assert torch.equal(model.model["norm"](found[-1]), plain)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_outputs_give_the_same_loss_and_gradients_and_run_no_layer_forwards(family, lora):
    make = lora_model if lora else small_model
    plain, again = make(**FAMILIES[family]), make(**FAMILIES[family])
    input_ids, found = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), []
    with torch.no_grad():
        again.hidden_states(input_ids, run_layer=recorded(found))
    known = [output[0] for output in found]
    calls = layer_outputs(again, lambda: again.hidden_states(input_ids, run_layer=replayed(known)))
    assert not calls
    losses = []
    for model, run_layer in ((plain, None), (again, replayed(known))):
        loss = model.hidden_states(input_ids, run_layer=run_layer).square().sum()
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    expected, actual = gradients(plain), gradients(again)
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6)


def test_replayed_outputs_take_the_place_of_the_layers_own():
    """Any outputs will do: the layers do not run."""
    model, input_ids = small_model(), torch.tensor([[3, 1, 4, 1]])
    known = [torch.full((4, model.config.hidden_size), value) for value in (1.0, 2.0)]
    hidden = model.hidden_states(input_ids, run_layer=replayed(known))
    assert torch.equal(hidden, model.model["norm"](known[-1][None]))


# ---------------------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_no_gradient_and_keeps_less(family, lora):
    input_ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    found, kept = [], []
    for run_layer in (None, checkpointed):
        model = lora_model(**FAMILIES[family]) if lora else small_model(**FAMILIES[family])
        bytes_kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=bytes_kept: seen.append(t.nbytes) or t, lambda t: t
        ):
            hidden = model.hidden_states(input_ids, run_layer=run_layer)
        hidden.square().sum().backward()
        found.append(gradients(model))
        kept.append(sum(bytes_kept))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 10
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    assert kept[1] < kept[0] / 2


def test_without_gradients_checkpointed_layers_run_once_and_without_a_warning():
    model, input_ids = small_model(), torch.tensor([[3, 1, 4, 1]])
    with torch.no_grad(), warnings.catch_warnings(action="error"):
        outputs = layer_outputs(model, lambda: model.hidden_states(input_ids, run_layer=checkpointed))
    assert len(outputs) == model.config.num_hidden_layers


# ----------------------------------------------------------------------- --reuse-forward, from scores to loss


@given(families, samples(), st.booleans(), st.data())
@settings(max_examples=20)
def test_rows_trained_on_the_outputs_of_scoring_have_the_gradients_of_a_forward_of_their_own(family, rows, lora, data):
    make = lora_model if lora else small_model
    reused, plain = make(**FAMILIES[family]), make(**FAMILIES[family])
    outputs = {}
    score(reused, rows, data.draw(st.sampled_from([1, 15, 1000])), nullcontext(), outputs)
    kept = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    known = [torch.cat(parts) for parts in zip(*(outputs[i] for i in kept), strict=True)]
    batch = pack([rows[i] for i in kept], "cpu")
    calls = []
    for layer in reused.model["layers"]:
        layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loss, nll = TokenLoss(reused)(*batch, known=known)
    assert not calls  # the layers' outputs are known
    loss.backward()
    assert calls == [True] * len(known)
    expected, expected_nll = TokenLoss(plain)(*batch)
    expected.backward()
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-5)
    assert_same_gradients(reused, plain)
