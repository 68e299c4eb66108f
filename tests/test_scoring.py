"""training/scoring.py: scores against their definition, when Scorer computes and forgets them, the kept batches."""

import copy
import dataclasses
import io
import math
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import VOCAB, samples, small_model

import qtuning
from data.sft import Sample
from training import scoring
from training.head import TokenLoss
from training.ranks import Ranks
from training.scoring import Scorer, kept_batches, mean_nll, pruned_sample, score, trained_lengths

# --------------------------------------------------------------------------------------- scores of samples


@given(samples(), st.integers(1, 40))
@settings(max_examples=30)
def test_scores_are_those_of_the_definition_whatever_the_passes(rows, pass_tokens):
    model = small_model()
    nll, entropy, loss_mask = score(model, rows, pass_tokens, nullcontext())
    for i, row in enumerate(rows):
        labels, T = torch.tensor([row.labels[1:]]), len(row.labels) - 1
        expected = qtuning.token_nll_and_entropy(model(torch.tensor([row.input_ids[:-1]])), labels)
        torch.testing.assert_close((nll[i, None, :T], entropy[i, None, :T]), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(loss_mask[i, :T], labels[0] != -100)
        assert not loss_mask[i, T:].any()
        assert not nll[i][~loss_mask[i]].any()


@given(samples(), st.integers(1, 40))
@settings(max_examples=20)
def test_a_rows_mean_nll_is_that_of_its_answer(rows, pass_tokens):
    model = small_model()
    found = mean_nll(model, rows, pass_tokens, nullcontext())
    for row, value in zip(rows, found.tolist(), strict=True):
        logits = model(torch.tensor([row.input_ids[:-1]]))[0]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]))
        assert value == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


@given(st.lists(st.integers(3, 20), min_size=8, max_size=16), st.integers(0, 999), st.integers(1, 40))
@settings(max_examples=30)
def test_scoring_a_whole_step_at_once_keeps_the_sets_of_scoring_each_mini_batch(lengths, seed, pass_tokens):
    """Of rows that differ: between equal scores the last bit of a product decides, and that depends on its company."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(VOCAB, generator=generator)[:length].tolist() for length in lengths]
    rows = [Sample(str(i), ids, [-100, *ids[1:]]) for i, ids in enumerate(shuffled[: len(shuffled) // 4 * 4])]
    size, model = 4, small_model(seed)
    nll, entropy, loss_mask = score(model, rows, pass_tokens, nullcontext())
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        alone = score(model, rows[part], 1000, nullcontext())
        width = alone[0].shape[1]
        kept = [
            qtuning.prune_batch(*scores, 0.5, 0.5)
            for scores in (alone, (nll[part, :width], entropy[part, :width], loss_mask[part, :width]))
        ]
        assert torch.equal(kept[0].samples.keep, kept[1].samples.keep)
        assert torch.equal(kept[0].token_mask, kept[1].token_mask)


# ----------------------------------------------------------------------------------------------- Scorer


def rows_of(lengths):
    """Rows with a prompt of one token and answers of these lengths."""
    return [Sample(f"r{n}", [1, *[2 + n] * size], [-100, *[2 + n] * size]) for n, size in enumerate(lengths)]


def settings_of(reuse=1, pass_tokens=20, token_pruning="mask"):
    return SimpleNamespace(
        pass_tokens=pass_tokens, reuse_scores=reuse, reuse_forward=False, token_pruning=token_pruning, shard=False
    )


@dataclasses.dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank whose fellows are threads of this process."""

    parts: list = None
    barrier: threading.Barrier = None

    def gather(self, local):
        self.parts[self.rank] = local
        self.barrier.wait()
        joined = [item for part in copy.deepcopy(self.parts) for item in part]
        self.barrier.wait()
        return joined

    def sum(self, values):
        return torch.stack(self.gather([values])).sum(dim=0, dtype=values.dtype)


def on_ranks(world, work):
    """What work(ranks) returns on each of `world` ranks."""
    parts, barrier, found, errors = [None] * world, threading.Barrier(world), [None] * world, []

    def run(rank):
        try:
            found[rank] = work(ThreadRanks(rank, world, parts=parts, barrier=barrier))
        except threading.BrokenBarrierError:
            pass  # another rank has failed
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


class Clock:
    """In place of a model: the NLL and the entropy of every token are the number of the step, in eighths of a nat."""

    def __init__(self):
        self.step, self.scored = 0, []

    def score(self, samples, pass_tokens, autocast, outputs=None, num_passes=0):
        self.scored += [(self.step, sample.id) for sample in samples]
        mask = torch.nn.utils.rnn.pad_sequence([scoring.answer_mask(sample) for sample in samples], batch_first=True)
        nll = torch.full(mask.shape, self.step / 8).masked_fill(~mask, 0.0)
        return nll, nll, mask


needs = st.sampled_from(["ppl", "ent", "nll"])
some_rows = st.lists(st.integers(0, 4), min_size=1, max_size=6)
steps_of_requests = st.lists(st.lists(st.tuples(needs, some_rows), max_size=3), min_size=1, max_size=8)


def ask(scorer, step, requests):
    """The step's answers; each is the number of the step that the row was scored in."""
    scorer.model.step = step
    scorer.new_step()
    found = []
    for need, rows in requests:
        if need == "nll":
            table, mask = scorer.per_token("nll", rows), scorer.loss_mask(rows)
            assert not table[~mask].any()
            values = [row[keep].tolist() for row, keep in zip(table, mask, strict=True)]
        else:
            values = scorer.per_sample(need, rows).double()
            values = [[value] for value in (values.log() if need == "ppl" else values).tolist()]
        found.append([{round(8 * value) for value in row} for row in values])
    return found


@given(st.integers(1, 4), st.integers(1, 3), steps_of_requests)
@example(2, 1, [[("ppl", [0]), ("nll", [0])], [("nll", [0])], [("ent", [0])]])
def test_a_row_is_scored_once_in_k_steps_of_use_on_one_rank_for_all(reuse, world, steps):
    samples = rows_of([3, 1, 2, 5, 1])

    def work(ranks):
        scorer = Scorer(Clock(), samples, ranks, settings_of(reuse), nullcontext(), {})
        return [ask(scorer, step, requests) for step, requests in enumerate(steps)], scorer.model.scored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", Clock.score)
        found, scored = zip(*on_ranks(world, work), strict=True)
    uses, scored_in, expected, scores = [0] * 5, [None] * 5, [], []
    for step, requests in enumerate(steps):
        for row in {row for _, rows in requests for row in rows}:
            if uses[row] % reuse == 0:
                scored_in[row] = step
                scores.append((step, samples[row].id))
            uses[row] += 1
        expected.append([[{scored_in[row]} for row in rows] for _, rows in requests])
    assert list(found) == [expected] * world
    assert sorted(one for of_rank in scored for one in of_rank) == sorted(scores)


@given(st.integers(1, 3), steps_of_requests, steps_of_requests)
@example(2, [[("nll", [0, 3])]], [[("ppl", [3, 1])], [("nll", [3])]])
def test_a_scorer_that_loads_a_checkpoint_continues_as_the_one_that_wrote_it_and_writing_changes_nothing(
    reuse, before, after
):
    def new_scorer():
        return Scorer(Clock(), rows_of([3, 1, 2, 5, 1]), Ranks(), settings_of(reuse), nullcontext(), {})

    def continued(scorer):
        scorer.model.scored = []
        steps = enumerate(after, start=len(before))
        return [ask(scorer, step, requests) for step, requests in steps], scorer.model.scored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", Clock.score)
        scorers = [new_scorer(), new_scorer()]
        for scorer in scorers:
            for step, requests in enumerate(before):
                ask(scorer, step, requests)
        file = io.BytesIO()
        torch.save(scorers[1].state(), file)
        file.seek(0)
        scorers.append(new_scorer())
        scorers[2].load(torch.load(file, weights_only=True))
        never_saved, saved, loaded = map(continued, scorers)
    assert never_saved == saved == loaded


def test_scores_come_from_the_weights_of_the_step_and_are_forgotten_after_it():
    rows, model = rows_of([3, 1, 2]), small_model()
    scorer = Scorer(model, rows, Ranks(), settings_of(), nullcontext(), {})
    found = []
    for _ in range(2):
        scorer.new_step()
        nll, entropy, mask = score(model, rows, 20, nullcontext())
        assert torch.equal(scorer.per_sample("ppl", [2, 0]), qtuning.sample_perplexity(nll, mask)[[2, 0]])
        assert torch.equal(scorer.per_sample("ent", [2, 0]), qtuning.sample_entropy(entropy, mask)[[2, 0]])
        assert torch.equal(scorer.per_token("nll", [2, 0]), nll[[2, 0]])
        assert torch.equal(scorer.loss_mask([2, 0]), mask[[2, 0]])
        found.append(nll)
        with torch.no_grad():
            model.model["norm"].weight += 1
    assert not torch.equal(*found)


def test_what_scoring_took_is_counted_in_each_step():
    """Tokens that pass through the model: those in front of a label, of rows that were not scored in this step yet."""
    scorer = Scorer(small_model(), rows_of([3, 1, 2]), Ranks(), settings_of(reuse=2), nullcontext(), {})
    counted = []
    for requests in ([[0, 1], [1, 2]], [[0, 1, 2]], [[2]]):
        scorer.new_step()
        for rows in requests:
            scorer.per_sample("ppl", rows)
        counted.append(scorer.tokens)
        assert (scorer.seconds > 0) == (scorer.tokens > 0)
    assert counted == [6, 0, 2]


@given(st.integers(1, 4), st.lists(st.lists(some_rows, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_need_of_the_model_is_computed_once_per_row_and_step_on_one_rank_and_given_to_all(world, steps):
    samples, model, computed, step_of_call = rows_of([3, 1, 2, 5, 1]), object(), [], [0]

    def per_token(model_given, some, pass_tokens, autocast):
        assert model_given is model and pass_tokens == 20
        computed.extend((step_of_call[0], sample.id) for sample in some)
        return [torch.arange(len(s.input_ids) - 1) + 10.0 * step_of_call[0] for s in some]

    def work(ranks):
        scorer, found = Scorer(model, samples, ranks, settings_of(), nullcontext(), {}), []
        for step, requests in enumerate(steps):
            if ranks.rank == 0:
                step_of_call[0] = step
            ranks.gather([])  # every rank is in this step
            scorer.new_step()
            found.append([scorer.per_token(per_token, rows).tolist() for rows in requests])
            ranks.gather([])
        return found

    found = on_ranks(world, work)
    assert sorted(computed) == sorted(
        (step, samples[row].id)
        for step, requests in enumerate(steps)
        for row in {row for rows in requests for row in rows}
    )
    assert found == found[:1] * world
    for step, requests in enumerate(steps):
        for rows, table in zip(requests, found[0][step], strict=True):
            for row, values in zip(rows, table, strict=True):
                size = len(samples[row].input_ids) - 1
                assert values == [t + 10.0 * step for t in range(size)] + [0.0] * (len(values) - size)


def test_a_need_of_the_model_may_be_one_value_for_each_sample_and_two_needs_are_kept_apart():
    def length(model, some, pass_tokens, autocast):
        return [torch.tensor(float(len(sample.input_ids))) for sample in some]

    def minus_length(model, some, pass_tokens, autocast):
        return [-value for value in length(model, some, pass_tokens, autocast)]

    scorer = Scorer(None, rows_of([3, 1]), Ranks(), settings_of(), nullcontext(), {})
    assert scorer.per_sample(length, [1, 0, 1]).tolist() == [2, 4, 2]
    assert scorer.per_sample(minus_length, [1, 0, 1]).tolist() == [-2, -4, -2]


def test_side_values_are_given_by_row_and_need_no_model():
    side = {"rating": {0: torch.tensor(4.0), 1: torch.tensor(2.0)}, "nll_then": {1: torch.tensor([0.5])}}
    scorer = Scorer(None, rows_of([3, 1]), Ranks(), settings_of(), nullcontext(), side)
    assert scorer.per_sample("rating", [1, 0]).tolist() == [2, 4]
    assert scorer.per_token("nll_then", [1]).tolist() == [[0.5]]
    assert (scorer.tokens, scorer.on_plane) == (0, False)


# ----------------------------------------------------------------------------------------- kept batches


@given(st.lists(st.booleans(), min_size=2, max_size=12), st.data())
def test_pruned_rows_keep_the_prompt_and_exactly_the_chosen_answer_tokens(is_answer, data):
    is_answer = [False, *is_answer]
    ids = list(range(100, 100 + len(is_answer)))
    sample = Sample("x", ids, [i if answer else -100 for i, answer in zip(ids, is_answer, strict=True)])
    kept = torch.tensor([answer and data.draw(st.booleans()) for answer in is_answer[1:]])
    chosen = [i for i, keep in zip(ids[1:], kept.tolist(), strict=True) if keep]
    masked = pruned_sample(sample, kept, "mask")
    assert masked.input_ids == ids
    assert [label for label in masked.labels if label != -100] == chosen
    dropped = pruned_sample(sample, kept, "drop")
    assert dropped.input_ids == [i for i, answer in zip(ids, is_answer, strict=True) if not answer or i in chosen]
    assert [label for label in dropped.labels if label != -100] == chosen
    assert all(label in (-100, i) for i, label in zip(dropped.input_ids, dropped.labels, strict=True))
    assert sample.input_ids == ids


@st.composite
def kept_tokens(draw, max_size=6):
    """(samples, kept (B, T)): some answer tokens of each row, or none."""
    rows = draw(samples(max_size))
    mask = torch.nn.utils.rnn.pad_sequence([scoring.answer_mask(row) for row in rows], batch_first=True)
    keep = draw(st.lists(st.sampled_from(["none", "some", "all"]), min_size=len(rows), max_size=len(rows)))
    seed = draw(st.integers(0, 99))
    some = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return rows, mask & torch.stack([{"none": some & False, "some": some, "all": some | True}[k][0] for k in keep])


@given(kept_tokens(), st.sampled_from(["mask", "drop"]))
def test_trained_lengths_are_those_of_the_pruned_rows(drawn, token_pruning):
    rows, kept = drawn
    lengths = trained_lengths(settings_of(token_pruning=token_pruning), rows, range(len(rows)), kept)
    for row, keep, length in zip(rows, kept, lengths, strict=True):
        assert length == (len(pruned_sample(row, keep, token_pruning).input_ids) if keep.any() else 0)


@given(kept_tokens(), st.sampled_from(["mask", "drop"]), st.integers(1, 4), st.integers(1, 30))
@settings(max_examples=30)
def test_the_ranks_batches_hold_every_kept_token_once_with_its_weight_and_end_in_one_last_pass(
    drawn, token_pruning, world, pass_tokens
):
    rows, kept = drawn
    model, weights = small_model(), torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    cfg = settings_of(pass_tokens=pass_tokens, token_pruning=token_pruning)
    places, total = [], 0.0
    for rank in range(world):
        scorer = Scorer(model, rows, Ranks(rank, world), cfg, nullcontext(), {})
        batches = kept_batches(cfg, rows, range(len(rows)), kept, weights, scorer)
        assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
        for batch in batches:
            assert batch.counts == kept[batch.places].sum(dim=1).tolist()
            assert sum(batch.inputs[2]) <= max(pass_tokens, 1) or len(batch.places) == 1
            loss, nll = TokenLoss(model)(*batch.inputs)
            assert len(nll) == sum(batch.counts)
            places, total = places + batch.places, total + loss.item()
    assert sorted(places) == kept.any(dim=1).nonzero()[:, 0].tolist()
    expected = 0.0
    for place in places:
        weight, short = weights[place].item(), pruned_sample(rows[place], kept[place], token_pruning)
        logits = model(torch.tensor([short.input_ids[:-1]]))
        nll, _ = qtuning.token_nll_and_entropy(logits, torch.tensor([short.labels[1:]]))
        expected += weight * nll.sum().item()
    assert math.isclose(total, expected, rel_tol=1e-4, abs_tol=1e-4)
