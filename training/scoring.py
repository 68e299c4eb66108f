"""Scores of rows under the current weights, shared by all ranks; and the kept samples, packed for training.

`Scorer` answers what a pruner needs. A need is one of

    "ppl", "ent"      a sample's place on the Error-Uncertainty plane (Eq. 4, Eq. 5)
    "nll"             the NLL of each answer token
    a function        of the model: (model, samples, pass_tokens, autocast) -> for each sample, a value for each answer
                      token: (A,) float32
    any other text    a field of the data file, or a side file of --scores

Shapes: B samples, A answer tokens of a sample, T label positions of the longest row, H hidden size.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.sft import Sample, row_place
from model import Transformer
from qtuning import IGNORE_INDEX, sample_entropy, sample_perplexity
from training.head import head_nll_and_entropy
from training.layers import recorded
from training.memory import noted
from training.packing import pack, packed, packs
from training.ranks import Ranks

Need = str | Callable[..., list[Tensor]]


@torch.no_grad()
def score(
    model: Transformer,
    samples: Sequence[Sample],
    pass_tokens: int,
    autocast: AbstractContextManager,
    outputs: dict[int, list[Tensor]] | None = None,
    num_passes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL and predictive entropy of every answer token, with the current weights (choice C18).

    Args:
        outputs: filled with each layer's output for sample i, (len(input_ids) - 1, H) each: views of a whole pass.
        num_passes: the fewest passes to run, the last ones empty: with --shard the ranks run as many.
    Returns:
        nll, token_entropy (B, T) float32 and loss_mask (B, T) bool on the CPU; column t belongs to the token after
        input_ids[t].
    """
    model.eval()
    device = model.lm_head.weight.device
    groups = packs([len(s.input_ids) - 1 for s in samples], pass_tokens)
    parts = []
    for group in groups + [[]] * (num_passes - len(groups)):
        input_ids, labels, lengths = pack([samples[i] for i in group] or [NOTHING], device)
        trainable = labels != IGNORE_INDEX
        layers: list[Tensor] = []
        run_layer = None if outputs is None else recorded(layers)
        with autocast, noted("a scoring pass", lengths):
            hidden = model.hidden_states(input_ids, *packed(model, lengths), run_layer)[0, trainable]
            parts.append(torch.stack(head_nll_and_entropy(hidden, model.lm_head.weight, labels[trainable])))
        if outputs is not None:
            of_rows = zip(*(output[0].split(lengths) for output in layers), strict=True)
            outputs.update(zip(group, of_rows, strict=True))
    model.train()

    T = max((len(s.input_ids) for s in samples), default=1) - 1
    rows = [i for group in groups for i in group]  # in the order of the values
    in_order = torch.zeros(len(samples), T, dtype=torch.bool)
    for place, i in enumerate(rows):
        in_order[place, : len(samples[i].labels) - 1] = answer_mask(samples[i])
    tables = torch.zeros(2, len(samples), T)
    tables[:, in_order] = torch.cat(parts, dim=1).cpu()
    back = torch.tensor(rows, dtype=torch.int64).argsort()
    nll, entropy = tables[:, back]
    return nll, entropy, in_order[back]


def answer_mask(sample: Sample) -> Tensor:
    """T(x): (T,) bool, True on the labels that are trained and that a token precedes."""
    return torch.tensor(sample.labels[1:]) != IGNORE_INDEX


def mean_nll(model: Transformer, samples: Sequence[Sample], pass_tokens: int, autocast) -> Tensor:
    """Mean NLL of each sample's answer tokens: (B,) float32, nats."""
    nll, _, loss_mask = score(model, samples, pass_tokens, autocast)
    return nll.sum(dim=-1) / loss_mask.sum(dim=-1)


def not_finite(cfg, step: int, what: str, samples: Sequence[Sample]) -> ValueError:
    """The error for a number that is NaN or infinite: the step, the rows that have it, and what to check."""
    named = ", ".join(f"{sample.id!r} ({row_place(cfg.data, sample.number)})" for sample in samples[:3])
    more = f" and {len(samples) - 3} more" if len(samples) > 3 else ""
    check = "nothing is trained yet: check the weights in --model, and --dtype" if step <= 1 else "try a lower --lr"
    rows = f" in row {named}{more}" if samples else ""
    return ValueError(f"step {step}: {what} is NaN or infinite{rows}; {check}")


@dataclasses.dataclass
class RowScore:
    """PPL, entropy and token NLL (A,) of one row, and the number of earlier steps that used them."""

    ppl: float
    ent: float
    nll: Tensor
    steps: int = 0


class Scorer:
    """Scores that pruners need, by row. Every rank gets all of them, so that every rank makes the same choice.

    A row is scored when it is first needed in a step; the ranks share the rows of a request. It is forgotten when it
    has served in `cfg.reuse_scores` steps: at the default of 1, after the step.

    Args:
        side: need -> row -> value, read from the data file or side files: a scalar, or (A,).
    """

    def __init__(self, model: Transformer, samples: Sequence[Sample], ranks: Ranks, cfg, autocast, side: dict):
        self.cfg, self.model, self.samples, self.ranks = cfg, model, samples, ranks
        self.pass_tokens, self.autocast, self.reuse = cfg.pass_tokens, autocast, cfg.reuse_scores
        self.side, self.shard = side, cfg.shard
        self.outputs = {} if cfg.reuse_forward else None  # row -> each layer's output, on the rank that scored it
        self.answers = torch.cat([answer_mask(sample) for sample in samples])  # T(x) of all rows, end to end
        self.ends = [0, *itertools.accumulate(len(sample.labels) - 1 for sample in samples)]
        self.scores: dict[int, RowScore] = {}
        self.used: set[int] = set()  # rows whose scores this step has used
        self.new_step()

    def new_step(self, step: int = 0) -> None:
        """Start a step: the weights have changed."""
        self._end_step()
        self.step = step
        self.computed: dict[Callable, dict[int, Tensor]] = {}  # needs that are functions of the model
        self.seconds, self.tokens = 0.0, 0  # what scoring took in this step
        self.on_plane = False  # whether a need of this step was "ppl" or "ent"
        if self.outputs is not None:
            self.outputs.clear()

    def _end_step(self) -> None:
        """Forget the scores that have served in enough steps."""
        for row in self.used:
            self.scores[row].steps += 1
            if self.scores[row].steps >= self.reuse:
                del self.scores[row]
        self.used = set()

    def loss_mask(self, rows: Sequence[int]) -> Tensor:
        """T(x) of these rows: (B, T) bool."""
        return pad_sequence([self.answers[self.ends[row] : self.ends[row + 1]] for row in rows], batch_first=True)

    def num_answer_tokens(self, rows: Sequence[int]) -> list[int]:
        """|T(x)| of each of these rows."""
        return self.loss_mask(rows).sum(dim=1).tolist()

    def per_sample(self, need: Need, rows: Sequence[int]) -> Tensor:
        """A score of each of these rows: (B,)."""
        if need in ("ppl", "ent"):
            self.on_plane = True
            self._score_missing(rows)
            return torch.tensor([getattr(self.scores[row], need) for row in rows])
        return torch.stack(self._values(need, rows))

    def per_token(self, need: Need, rows: Sequence[int]) -> Tensor:
        """A score of each answer token of these rows: (B, T), 0 elsewhere."""
        if need == "nll":
            self._score_missing(rows)
            values = [self.scores[row].nll for row in rows]
        else:
            values = self._values(need, rows)
        mask = self.loss_mask(rows)
        return torch.zeros(mask.shape).masked_scatter(mask, torch.cat(values))

    def _values(self, need: Need, rows: Sequence[int]) -> list[Tensor]:
        if not callable(need):
            return [self.side[need][row] for row in rows]
        known = self.computed.setdefault(need, {})
        missing = [row for row in dict.fromkeys(rows) if row not in known]
        if missing:
            found = self._shared(missing, self.num_answer_tokens(missing), lambda some: need(*self._inputs(some)))
            known.update(zip(missing, found, strict=True))
        return [known[row] for row in rows]

    def _score_missing(self, rows: Sequence[int]) -> None:
        missing = [row for row in dict.fromkeys(rows) if row not in self.scores]
        if missing:
            sizes = [2 + count for count in self.num_answer_tokens(missing)]
            for row, values in zip(missing, self._shared(missing, sizes, self._score), strict=True):
                self.scores[row] = RowScore(*values[:2].tolist(), values[2:])
        self.used.update(rows)

    def _inputs(self, rows: list[int]) -> tuple:
        return self.model, [self.samples[row] for row in rows], self.pass_tokens, self.autocast

    def _score(self, rows: list[int]) -> list[Tensor]:
        """PPL, entropy and the answer tokens' NLL of each row: (2 + A,) each."""
        layers, num_passes = None if self.outputs is None else {}, 0
        if self.shard:
            num_passes = self.ranks.most(
                len(packs([len(self.samples[i].input_ids) - 1 for i in rows], self.pass_tokens))
            )
        nll, entropy, mask = score(*self._inputs(rows), layers, num_passes)
        if layers:
            self.outputs.update((rows[i], of_row) for i, of_row in layers.items())
        finite = (nll.isfinite() & entropy.isfinite()).all(dim=1).tolist()
        if not all(finite):
            broken = [row for row, ok in zip(rows, finite, strict=True) if not ok]
            raise not_finite(self.cfg, self.step, "the NLL or entropy", [self.samples[row] for row in broken])
        plane = torch.stack([sample_perplexity(nll, mask), sample_entropy(entropy, mask)], dim=1)
        return [torch.cat([plane[i], nll[i, mask[i]]]) for i in range(len(rows))]

    def _shared(self, rows: list[int], sizes: list[int], work: Callable[[list[int]], list[Tensor]]) -> list[Tensor]:
        """The values of each row, (size,), each computed on one rank, on all ranks."""
        started = time.perf_counter()
        lengths = [len(self.samples[row].input_ids) for row in rows]
        mine = self.ranks.share(lengths)
        values = work([rows[i] for i in mine]) if mine or self.shard else []
        found = self.ranks.exchange(sizes, dict(zip(mine, values, strict=True)))
        self.tokens += sum(lengths) - len(rows)
        self.seconds += time.perf_counter() - started
        return found

    def state(self) -> dict[str, Tensor]:
        """The scores that later steps will use again, as tensors for a checkpoint."""
        self._end_step()
        rows, scores = list(self.scores), list(self.scores.values())
        return {
            "rows": torch.tensor(rows, dtype=torch.int64),
            "steps": torch.tensor([score.steps for score in scores], dtype=torch.int64),
            "ppl": torch.tensor([score.ppl for score in scores]),
            "ent": torch.tensor([score.ent for score in scores]),
            "nll": torch.cat([score.nll for score in scores]) if scores else torch.zeros(0),
            "lengths": torch.tensor([len(score.nll) for score in scores], dtype=torch.int64),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue with the scores of a checkpoint."""
        nll = state["nll"].split(state["lengths"].tolist())
        fields = zip(*(state[name].tolist() for name in ("rows", "ppl", "ent", "steps")), nll, strict=True)
        self.scores = {row: RowScore(ppl, ent, values, steps) for row, ppl, ent, steps, values in fields}


@dataclasses.dataclass
class KeptBatch:
    """Kept samples of one forward and backward pass.

    Attributes:
        places: their places in the step.
        counts: the number of kept tokens of each.
        inputs: the arguments of `TokenLoss`.
        last:   whether it is this rank's last pass of the step.
    """

    places: list[int]
    counts: list[int]
    inputs: tuple
    last: bool

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return self.inputs[2]


def kept_batches(
    cfg, samples: Sequence[Sample], rows: Sequence[int], kept: Tensor, weights: Tensor, scorer: Scorer
) -> list[KeptBatch]:
    """This rank's share of the kept samples in as few passes as fit; a rank without any gets one empty pass.

    With --shard the ranks run as many passes, the last ones empty.

    Args:
        rows:    (B,) the rows of the step.
        kept:    (B, T) bool, the tokens in the loss. A sample without one is left out.
        weights: (B,) each sample's weight in the loss.
    """
    ranks, places = scorer.ranks, kept.any(dim=1).nonzero()[:, 0].tolist()
    lengths = trained_lengths(cfg, samples, rows, kept)
    mine = [places[i] for i in ranks.share([lengths[place] for place in places])]
    short = {place: pruned_sample(samples[rows[place]], kept[place], cfg.token_pruning) for place in mine}
    known = {}  # --reuse-forward: copies of the kept rows' layer outputs, so that the others are freed
    if scorer.outputs:
        known = {p: [o.clone() for o in scorer.outputs[rows[p]]] for p in mine if rows[p] in scorer.outputs}
        scorer.outputs.clear()
    groups = []
    for part in ([p for p in mine if p in known], [p for p in mine if p not in known]):
        groups += [[part[i] for i in group] for group in packs([lengths[p] - 1 for p in part], cfg.pass_tokens)]
    num_passes, batches = ranks.most(len(groups)) if cfg.shard else 1, []
    for group in groups + [[]] * (num_passes - len(groups)):
        layers = None
        if known.keys() & group:
            layers = [torch.cat(parts) for parts in zip(*(known.pop(p) for p in group), strict=True)]
        counts = kept[group].sum(dim=1)
        token_weights = weights[group].float().repeat_interleave(counts).to(ranks.device)
        inputs = pack([short[p] for p in group] or [NOTHING], ranks.device)
        batches.append(KeptBatch(group, counts.tolist(), (*inputs, token_weights, layers), False))
    batches[-1].last = True
    return batches


NOTHING = Sample(id="", input_ids=[0, 0], labels=[IGNORE_INDEX, IGNORE_INDEX])  # the one row of an empty pass


def trained_lengths(cfg, samples: Sequence[Sample], rows: Sequence[int], kept: Tensor) -> list[int]:
    """Tokens of each sample that pass through the model with gradients: (B,), 0 where no token is kept."""
    lengths = []
    for row, num_kept in zip(rows, kept.sum(dim=1).tolist(), strict=True):
        whole = len(samples[row].input_ids)
        if cfg.token_pruning == "drop":
            whole = samples[row].labels.count(IGNORE_INDEX) + num_kept
        lengths.append(whole if num_kept else 0)
    return lengths


def pruned_sample(sample: Sample, kept: Tensor, token_pruning: str) -> Sample:
    """The sample with only the answer tokens in `kept` (T,) left in the loss, or (drop) in the input as well.

    Choice C13: `mask` leaves the context whole; `drop` shortens the row, and the loss is next-token prediction
    on what remains.
    """
    keeps = [False, *kept.tolist()]  # column t of the mask is token t + 1
    pairs = list(zip(sample.input_ids, sample.labels, keeps, strict=False))
    if token_pruning == "drop":
        pairs = [pair for pair in pairs if pair[1] == IGNORE_INDEX or pair[2]]
    input_ids = [token for token, _, _ in pairs]
    labels = [label if keep else IGNORE_INDEX for _, label, keep in pairs]
    return dataclasses.replace(sample, input_ids=input_ids, labels=labels)
