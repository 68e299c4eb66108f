"""Scores rows with a model once, before training: the side files that some pruners need.

    python -m pruners.score_rows FIELD --model DIR [--adapter DIR] --data FILE --scores DIR

writes DIR/FIELD.jsonl, one object per row, for `train.py --scores DIR`:

    base_nll        {"id", "base_nll": [nats of each answer token]}       tokencleaning-row
    reference_nll   the same, from a model tuned on trusted rows          rho1, tokencleaning-row
    rating          {"id", "rating": 0 to 5}, a local model's digits      alpagasus, ds2
    complexity      {"id", "complexity": 1 to 6}, of the request          deita
    quality         {"id", "quality": 1 to 6}, of the answer              deita
    cond_gain       {"id", "cond_gain": nats per token}                   cond-gain
    embedding       {"id", "embedding": base64 of fp16}                   deita, ds2
    less            {"id", "less": -1 to 1}                               less

Rows are read a chunk at a time and each chunk is appended when it is done: an interrupted run continues where it
stopped, and holds no more than a chunk. DIR/FIELD.json records the settings that the file was made with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.sft import Sample, check_token_ids, load_samples, row_place, to_messages
from data.templates import Conversation, Template, resolve_template
from data.tokenizer import TextTokenizer
from model import Transformer, read_config
from pruners.less import adam_direction, count_sketch, influence
from pruners.side_files import decode_vector, encode_vector, open_side_file, rows_by_id
from qtuning import IGNORE_INDEX
from training.checkpoint import read_checkpoint
from training.files import locked, naming, read_object, write_json
from training.head import TokenLoss
from training.lora import load_adapter
from training.packing import check_varlen, end_to_end, pack, packed, packs
from training.ranks import chosen_device, chosen_dtype
from training.run_folder import weights_hash
from training.scoring import mean_nll, score

CHUNK = 256  # rows scored between two writes

# -------------------------------------------------------------------------- passes over a list of samples


@torch.no_grad()
def embed(model: Transformer, samples: list[Sample], pass_tokens: int, autocast) -> Tensor:
    """The mean of a row's last hidden states, prompt and answer: (N, H) float32 on the CPU.

    DEITA uses the last token's state and DS2 a sentence encoder; this mean serves both.
    """
    model.eval()
    means = torch.zeros(len(samples), model.config.hidden_size)
    for group in packs([len(s.input_ids) for s in samples], pass_tokens):
        input_ids, lengths = end_to_end([samples[i].input_ids for i in group], model.lm_head.weight.device)
        with autocast:
            hidden = model.hidden_states(input_ids, *packed(model, lengths))[0]
        means[group] = torch.stack([row.float().mean(dim=0) for row in hidden.split(lengths)]).cpu()
    return means


def without_prompt(sample: Sample) -> Sample:
    """The answer alone, behind the row's first token."""
    pairs = list(zip(sample.input_ids, sample.labels, strict=True))
    pairs = pairs[:1] + [pair for pair in pairs[1:] if pair[1] != IGNORE_INDEX]
    return dataclasses.replace(sample, input_ids=[i for i, _ in pairs], labels=[y for _, y in pairs])


# ------------------------------------------------------------------- ratings: the digits of a local model

SCALES = {  # what is asked -> its digits and the question, in words of our own
    "rating": (
        range(6),
        "Here are a request and an answer to it.\n\nRequest:\n{request}\n\nAnswer:\n{answer}\n\nHow correct and "
        "helpful is this answer? Reply with one digit, from 0 (wrong or useless) to 5 (right and complete).",
    ),
    "complexity": (
        range(1, 7),
        "Here is a request.\n\nRequest:\n{request}\n\nHow demanding is it? Reply with one digit, from 1 (very easy) "
        "to 6 (very demanding).",
    ),
    "quality": (
        range(1, 7),
        "Here are a request and an answer to it.\n\nRequest:\n{request}\n\nAnswer:\n{answer}\n\nHow good is this "
        "answer? Reply with one digit, from 1 (very poor) to 6 (excellent).",
    ),
}


PRIMER = "Rating: "  # the reply begins with this, since a chat model would otherwise begin with a word


@dataclasses.dataclass(frozen=True)
class DigitQuestion:
    """A question that a model answers with one digit, and the token id of each digit.

    Attributes:
        tail:      tokens that the template puts behind the digit.
        digit_ids: the id of each digit of the scale, in order.
    """

    text: str
    digits: tuple[int, ...]
    tail: int
    digit_ids: tuple[int, ...]
    template: Template

    @classmethod
    def of(cls, what: str, template: str, tokenizer: TextTokenizer) -> DigitQuestion:
        """Find the digit's position in an answer under this template.

        Raises:
            ValueError: the tokenizer does not give each digit one token of its own there.
        """
        digits, text = SCALES[what]
        resolved = resolve_template(template, tokenizer)
        rows = [_conversation_ids(resolved, text, f"{PRIMER}{digit}") for digit in digits]
        differ = {at for row in rows for at in range(len(row)) if len(row) != len(rows[0]) or row[at] != rows[0][at]}
        if len(differ) != 1:
            raise ValueError(
                f"{what}: the tokenizer does not give each of the digits {list(digits)} one token of its own"
            )
        (at,) = differ
        return cls(text, tuple(digits), len(rows[0]) - 1 - at, tuple(row[at] for row in rows), resolved)

    def prompt(self, messages: list[dict], max_length: int) -> list[int]:
        """Token ids in front of the digit; a long row loses its middle. Turns of one side are joined."""
        request, answer = (
            "\n\n".join(m.get("content", "") for m in messages if (m["role"] == "assistant") == side)
            for side in (False, True)
        )
        text = self.text.format(request=request, answer=answer)
        ids = _conversation_ids(self.template, text, f"{PRIMER}{self.digits[0]}")[: -1 - self.tail]
        half = max_length // 2
        return ids if len(ids) <= max_length else ids[:half] + ids[-half:]


def _conversation_ids(template: Template, question: str, answer: str) -> list[int]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    [turns] = template.encode([Conversation(messages)])
    if isinstance(turns, ValueError):
        raise turns
    return [token for turn in turns for side in turn for token in side]


@torch.no_grad()
def rate(
    model: Transformer, prompts: list[list[int]], question: DigitQuestion, pass_tokens: int, autocast
) -> tuple[Tensor, Tensor]:
    """The expected digit, sum_d d * p(d | a digit comes next), and the probability of all digits together.

    Returns: (N,) float32 each, on the CPU.
    """
    model.eval()
    device = model.lm_head.weight.device
    digits, ids = torch.tensor(question.digits, dtype=torch.float32), torch.tensor(question.digit_ids, device=device)
    rating, mass = torch.zeros(len(prompts)), torch.zeros(len(prompts))
    for rows in packs([len(p) for p in prompts], pass_tokens):
        input_ids, lengths = end_to_end([prompts[i] for i in rows], device)
        with autocast:
            hidden = model.hidden_states(input_ids, *packed(model, lengths))[0]
            logits = model.lm_head(hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]).float()
        p = logits.softmax(dim=-1)[:, ids].cpu()
        mass[rows] = p.sum(dim=-1)
        rating[rows] = (p @ digits) / p.sum(dim=-1)
    return rating, mass


def swap_test(model, question: DigitQuestion, rows: list[list[dict]], max_length: int, pass_tokens, autocast) -> dict:
    """How often the model rates a row's own answer above its neighbour's (a tie is half), and the digits' probability.

    A rater that cannot tell them apart gives noise.
    """
    swapped = [[*row[:-1], other[-1]] for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    (own, mass), (other, _) = (
        rate(model, [question.prompt(row, max_length) for row in part], question, pass_tokens, autocast)
        for part in (rows, swapped)
    )
    wins = (own > other).float() + 0.5 * (own == other).float()
    return {"swap_test_rows": len(rows), "swap_test_wins": wins.mean().item(), "digit_mass": mass.mean().item()}


# --------------------------------------------------------------------------------------------- LESS


@dataclasses.dataclass(frozen=True)
class Sketch:
    """LESS's features at one checkpoint of a LoRA run: whose gradients, Adam's moments, and the projection."""

    parameters: list[torch.nn.Parameter]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    buckets: Tensor
    signs: Tensor
    size: int

    @classmethod
    def of(cls, model: Transformer, run: Path, size: int) -> Sketch:
        """Load the adapter of the LoRA run in the folder `run` into `model`, and the moments of its checkpoint.

        Raises:
            FileNotFoundError: no adapter or no checkpoint there.
            ValueError: the checkpoint is damaged, or not of this adapter.
        """
        load_adapter(model, run / "adapter")
        model.eval()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        file = run / "checkpoint" / "state.pt"
        if not file.exists():
            raise FileNotFoundError(f"{file}: not found; --warmup must be the folder of a train.py LoRA run")
        try:
            state = read_checkpoint(file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if list(state["trainable"]) != list(named):
            raise ValueError(f"{file}: its trained parameters are not those of {run / 'adapter'}")
        device = model.lm_head.weight.device
        moments = state["optimizer"]["state"]  # keyed by place in the list of trained parameters
        exp_avg, exp_avg_sq = (
            torch.cat([moments[i][name].flatten() for i in range(len(named))]).to(device)
            for name in ("exp_avg", "exp_avg_sq")
        )
        generator = torch.Generator().manual_seed(0)  # rows and targets must be projected alike
        buckets = torch.randint(size, (len(exp_avg),), generator=generator).to(device)
        signs = (torch.randint(2, (len(exp_avg),), generator=generator) * 2 - 1).to(device)
        return cls(list(named.values()), exp_avg, exp_avg_sq, buckets, signs, size)

    def feature(self, model: Transformer, sample: Sample, autocast, *, adam: bool) -> Tensor:
        """The projected gradient (size,) of a row's mean answer NLL; with `adam`, of the step that Adam makes it."""
        with autocast:
            loss, nll = TokenLoss(model)(*pack([sample], model.lm_head.weight.device))
        loss = loss / len(nll)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)]).float()
        if adam:
            gradient = adam_direction(gradient, self.exp_avg, self.exp_avg_sq)
        return count_sketch(gradient, self.buckets, self.signs, self.size).cpu()


# ---------------------------------------------------------------------------------------------- command


def values_of(args, model: Transformer, tokenizer: TextTokenizer, autocast) -> tuple[Callable, dict]:
    """The function from a list of samples to their JSON values, and facts about it for FIELD.json."""
    what, tokens = args.what, args.pass_tokens
    if what in ("base_nll", "reference_nll"):

        def nll(samples):
            values, _, mask = score(model, samples, tokens, autocast)
            # float32's shortest text, so that what is read is what was written
            return [[float(str(v)) for v in row[kept].numpy()] for row, kept in zip(values, mask, strict=True)]

        return nll, {}
    if what == "cond_gain":

        def gain(samples):
            alone = mean_nll(model, [without_prompt(s) for s in samples], tokens, autocast)
            return (alone - mean_nll(model, samples, tokens, autocast)).tolist()

        return gain, {}
    if what == "embedding":
        return lambda samples: [encode_vector(v) for v in embed(model, samples, tokens, autocast)], {}
    if what == "less":
        sketch = Sketch.of(model, Path(args.warmup), args.sketch_size)
        targets = []
        for path in args.targets:
            rows = load_samples(path, tokenizer, args.template, args.max_length)[0]
            check_token_ids(path, (row.input_ids for row in rows), tokenizer, model.config.vocab_size)
            targets.append(torch.stack([sketch.feature(model, row, autocast, adam=False) for row in rows]))

        def less(samples):
            rows = torch.stack([sketch.feature(model, s, autocast, adam=True) for s in samples])
            return influence(rows, targets).tolist()

        return less, {"targets": [len(rows) for rows in targets]}

    question, rows = DigitQuestion.of(what, args.template, tokenizer), rows_by_id(args.data)

    def digits(samples):
        prompts = [question.prompt(to_messages(rows[s.id]), args.max_length) for s in samples]
        return rate(model, prompts, question, tokens, autocast)[0].tolist()

    told = {}
    if what != "complexity":  # which looks at no answer
        some = []
        for row in itertools.islice(rows.values(), 64):
            with contextlib.suppress(ValueError):  # a bad row, which --skip-bad-rows leaves out
                some.append(to_messages(row))
        told = swap_test(model, question, some, args.max_length, tokens, autocast)
        print(f"{what}: own answers beat swapped ones in {told['swap_test_wins']:.0%} of {len(some)} rows; ", end="")
        print(f"digits hold {told['digit_mass']:.0%} of the probability")
        if told["swap_test_wins"] < 0.6 or told["digit_mass"] < 0.5:
            print(f"warning: this model is no rater; what it writes as {what} is close to noise", file=sys.stderr)
    return digits, told


def score_file(args) -> None:
    """Score what is not scored yet, chunk by chunk."""
    if args.what == "less" and not (args.warmup and args.targets):
        raise ValueError("less needs --warmup RUN and --targets FILE ...")
    device = chosen_device(args.device)
    bf16 = args.what != "less" and chosen_dtype("auto", device) == "bf16"
    if bf16:
        check_varlen()
    tokenizer = TextTokenizer.from_pretrained(args.model)
    samples, _ = load_samples(args.data, tokenizer, args.template, args.max_length, args.skip_bad_rows)
    check_token_ids(args.data, (s.input_ids for s in samples), tokenizer, read_config(args.model).vocab_size)
    rows_by_id(args.data)
    folder = Path(args.scores)
    keys = ("model", "adapter", "data", "template", "max_length")
    keys += ("warmup", "targets", "sketch_size") if args.what == "less" else ()
    settings = {key: getattr(args, key) for key in keys} | {"base_weights": weights_hash(args.model)}
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{args.what}.lock", f"{folder / args.what}.jsonl"):
        score_missing(args, samples, tokenizer, settings, device, bf16)


def score_missing(
    args, samples: list[Sample], tokenizer: TextTokenizer, settings: dict, device: str, bf16: bool
) -> None:
    """Append the values of the rows that the side file lacks.

    Raises:
        ValueError: the file was made with other settings, or a value is NaN or infinite; it is not written.
    """
    folder = Path(args.scores)
    done = open_side_file(folder, args.what, settings)
    todo = [sample for sample in samples if sample.id not in done]
    print(f"{args.what}: {len(samples)} rows, {len(samples) - len(todo)} of them scored already")
    if not todo:
        return
    model = Transformer.from_pretrained(args.model, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
    if args.adapter:
        load_adapter(model, args.adapter)
    autocast = torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False) if bf16 else contextlib.nullcontext()
    values, facts = values_of(args, model, tokenizer, autocast)
    if facts:
        about = folder / f"{args.what}.json"
        write_json(about, read_object(about) | facts)
    bar = tqdm(total=len(todo), desc=args.what, unit="row", delay=2, mininterval=0.1 if sys.stderr.isatty() else 30)
    path = folder / f"{args.what}.jsonl"
    with bar, naming(path), path.open("a", encoding="utf-8") as file:
        for chunk in chunks_of(todo, CHUNK):
            lines = []
            for sample, value in zip(chunk, values(chunk), strict=True):
                if not numbers_of(args.what, value).isfinite().all():
                    place = row_place(args.data, sample.number)
                    raise ValueError(f"{args.what} of row {sample.id!r} ({place}) is NaN or infinite: check --model")
                lines.append(json.dumps({"id": sample.id, args.what: value}) + "\n")
            file.writelines(lines)
            file.flush()
            bar.update(len(chunk))


def numbers_of(what: str, value: object) -> Tensor:
    """The numbers in a value of a side file."""
    return decode_vector(value) if what == "embedding" else torch.tensor(value)


def chunks_of(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pruners.score_rows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whats = ("base_nll", "reference_nll", *SCALES, "cond_gain", "embedding", "less")
    parser.add_argument("what", choices=whats, metavar="FIELD", help=", ".join(whats))
    parser.add_argument("--model", required=True, help="checkpoint folder in Hugging Face layout")
    parser.add_argument("--adapter", help="LoRA adapter on that model, in PEFT's layout")
    parser.add_argument("--data", required=True, help="rows to score, .json or .jsonl")
    parser.add_argument("--scores", required=True, help="folder of side files")
    parser.add_argument("--template", default="auto", help="chat template, as in train.py [auto]")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row at most, as in train.py [2048]")
    parser.add_argument("--warmup", help="less: folder of a train.py LoRA run, for its adapter and Adam's moments")
    parser.add_argument("--targets", nargs="+", help="less: rows of training splits, one file for each target task")
    parser.add_argument("--sketch-size", type=int, default=8192, help="less: numbers that a gradient becomes [8192]")
    parser.add_argument("--pass-tokens", type=int, default=4096, help="padded tokens of one forward pass [4096]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave unusable rows out")
    try:
        score_file(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"pruners.score_rows: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
