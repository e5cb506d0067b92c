"""The next token: pretraining on text, fine-tuning on chats.

Owns: the loss over tokens (plain, or in chunks that never hold all logits), attention that stays inside documents of a
packed row, bits per byte, continued text.

Does not own: which tokens carry loss (`labels` say so: -100 carries none), tokenizers and templates (`train/data`), the
models (`train/models`).

`labels[t]` is the target of position t already: a row of T tokens has T targets, and no model is called with labels.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train import models
from train.data import DataError, chat
from train.models import ModelError

if TYPE_CHECKING:
    from train.config import Config
    from train.data import Prepared
    from train.data.tokenizer import Tokenizer

    Batch = dict[str, Tensor]

IGNORED = -100
PROMPTS_AT_ONCE = 8
TEMPERATURE = 0.8
"""Of sampled continuations: they show what a model has learned better than the most likely words, which soon repeat."""


class CausalLM:
    """Batches carry `input_ids` and `labels`, int64 [B, T]; packed chats also `position_ids` and `document` [B, T].

    `prepared.info` holds `vocab_size`, `tokenizer` (its directory) and, of text, `val_targets` and `val_bytes`: how
    many targets the whole validation set has, for how many bytes.
    """

    objective = "eval_loss"

    def __init__(self, cfg: Config, prepared: Prepared) -> None:
        self.cfg, self.prepared, self.info = cfg, prepared, prepared.info
        self.directions = {"eval_loss": False, "eval_bpb": False}
        self._additive = False  # the model adds its mask to the scores, so a mask of booleans would hide nothing

    def build_model(self) -> nn.Module:
        """Llama, GPT-2, or what `model.path` is. Raises models.ModelError."""
        model = models.build(self.cfg, self.info)
        self._additive = getattr(model.config, "_attn_implementation", "sdpa") != "sdpa"
        if self.cfg.strategy.chunked_loss:
            _chunk_head(model)
        return model

    # ---- Loss --------------------------------------------------------------------------------------------------------

    def count(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORED).sum()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        head = _chunked_head(model) if self.cfg.strategy.chunked_loss else None
        if head is None:
            logits = model(**_inputs(batch, self._additive)).logits.float()
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        else:
            with head.scoring(labels):
                total = model(**_inputs(batch, self._additive)).logits
        return total, self.count(batch)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """`eval_loss`, nats per token, and `eval_bpb`, bits per byte of the text behind the tokens."""
        totals = torch.zeros(2, dtype=torch.float64)
        with _evaluating(model):
            for batch in batches:
                total, count = self.loss(model, batch)
                totals += torch.stack([total.double(), count.double()]).cpu()
        nats, tokens = reduce(totals).tolist()
        mean = nats / max(tokens, 1)
        metrics = {"eval_loss": mean}
        if self.info.get("val_bytes"):
            metrics["eval_bpb"] = mean / math.log(2) * self.info["val_targets"] / self.info["val_bytes"]
        return metrics

    # ---- Text --------------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str | chat.Messages]) -> Batch:
        """Prompts as a batch for `predict`: `input_ids` int64 [B, T] filled up with 0, `length` int64 [B], `weight` 1.

        A text begins a document; on chats it is what a user says, in the chat template. Raises DataError.
        """
        rows = [self._ids(text)[0] for text in texts]
        longest = max(len(row) for row in rows)
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "length": torch.tensor([len(row) for row in rows]),
            "weight": torch.ones(len(rows)),
        }

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        from train.data.tokenizer import Tokenizer

        return Tokenizer(Path(self.info["tokenizer"]))

    @functools.cached_property
    def _template(self) -> chat.Template:
        return chat.Template(Path(self.info["tokenizer"]))

    def _ids(self, prompt: str | chat.Messages, answer: str | None = None) -> tuple[list[int], list[int]]:
        """Tokens of a prompt with its answer, if any, and for each whether it belongs to the answer. Raises DataError."""
        if self.cfg.data.kind != "chat":
            begin, end = self._tokenizer.encode([str(prompt), answer or ""])
            return [self._tokenizer.separator, *begin.tolist(), *end.tolist()], [0] * (1 + len(begin)) + [1] * len(end)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text, spans = self._template.prompt(turns), list[tuple[int, int]]()
            if answer is not None:
                text, spans = self._template.render([*turns, {"role": "assistant", "content": answer}])
        except ValueError as error:
            raise DataError(f"{str(prompt)[:200]!r} cannot be asked: {error}.") from None
        ids, carry = chat.encode(self._tokenizer, [(text, spans[-1:])])[0]
        return ids.tolist(), carry.tolist()

    @functools.cached_property
    def _ends(self) -> set[int | None]:
        """Tokens with which the model ends what it says: its tokenizer's, and those its generation_config.json names."""
        from train.data.tokenizer import END_OF_TURN
        from train.models import pretrained

        speller = self._tokenizer
        ends = {speller.eos, speller.separator, speller.backend.token_to_id(END_OF_TURN)}
        file = pretrained.locate(self.cfg) / "generation_config.json" if self.cfg.model.path else None
        if file is not None and file.is_file():
            named = json.loads(file.read_text()).get("eos_token_id")
            ends |= set(named if isinstance(named, list) else [named])
        return ends

    def _decode(self, ids: list[int]) -> str:
        """The text of new tokens up to where the model ends it."""
        end = next((at for at, token in enumerate(ids) if token in self._ends), len(ids))
        return self._tokenizer.decode(ids[:end])

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """The most likely continuation of each row of weight 1, as text; see `encode` for the batch."""
        new = self.generate(model, batch, temperature=0.0)
        return [self._decode(row) for row, weight in zip(new.tolist(), batch["weight"].tolist()) if weight > 0]

    def predict_files(
        self, model: nn.Module, source: Path | None, directory: Path, say: Callable[[str], None] = print
    ) -> dict[str, float]:
        """Write `predictions.jsonl`, an object with `prompt` and `continuation` (and `answer`) per prompt, into `directory`.

        The prompts are the lines of a text file, the rows of a .jsonl (`prompt` or `text`; with an answer as training data
        have it), or, without a file, `eval.prompt`. Continues greedily, so the same prompts give the same file. Returns
        `eval_loss`, nats per token of the answers, where there are any. Raises DataError.
        """
        asked = _asked(source, self.cfg.data.kind) if source is not None else [(self.cfg.eval.prompt, None)]
        device = next(model.parameters()).device
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / "predictions.jsonl"
        nats, tokens, too_long = 0.0, 0, 0
        with target.open("w", encoding="utf-8") as file:
            for start in range(0, len(asked), PROMPTS_AT_ONCE):
                part = asked[start : start + PROMPTS_AT_ONCE]
                batch = {key: value.to(device) for key, value in self.encode([prompt for prompt, _ in part]).items()}
                for (prompt, answer), continuation in zip(part, self.predict(model, batch)):
                    row = {"prompt": prompt, "continuation": continuation}
                    if answer is not None:
                        row["answer"] = answer
                        ids, carry = self._ids(prompt, answer)
                        too_long += len(ids) - 1 > self.cfg.data.seq_len
                        if len(ids) - 1 <= self.cfg.data.seq_len:
                            labels = [token if carried else IGNORED for token, carried in zip(ids, carry)]
                            one = {"input_ids": torch.tensor([ids[:-1]]), "labels": torch.tensor([labels[1:]])}
                            with _evaluating(model):
                                total, count = self.loss(model, {key: value.to(device) for key, value in one.items()})
                            nats, tokens = nats + float(total), tokens + int(count)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        say(f"{len(asked):,} prompts continued: {target}")
        if too_long:
            say(f"{too_long:,} answers end after data.seq_len={self.cfg.data.seq_len} tokens and are not judged.")
        return {"eval_loss": nats / tokens} if tokens else {}

    def sample(self, model: nn.Module, step: int, directory: Path | None) -> None:
        """`sample-0.txt` and so on: `eval.prompt` and its continuation, drawn by (seed, step, number)."""
        device = next(model.parameters()).device
        batch = {
            key: value.to(device) for key, value in self.encode([self.cfg.eval.prompt] * self.cfg.eval.samples).items()
        }
        new = self.generate(model, batch, temperature=TEMPERATURE, key=f"{self.cfg.seed}/{step}")
        between = "\n\n" if self.cfg.data.kind == "chat" else ""  # an answer is no continuation of the question
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            for number, row in enumerate(new.tolist()):
                text = self.cfg.eval.prompt + between + self._decode(row)
                (directory / f"sample-{number}.txt").write_text(text + "\n", encoding="utf-8")

    def generate(self, model: nn.Module, batch: Batch, *, temperature: float, key: str = "") -> Tensor:
        """int64 [B, eval.sample_tokens], on the CPU: the tokens after the first `length` of each row of `input_ids`.

        Always `eval.sample_tokens` forwards of one shape, whatever is said, so that ranks stay together and a compiled
        model is compiled once. A row that outgrows the window (`data.seq_len`) is seen from its last tokens on. At
        `temperature` 0 the most likely token; else drawn on the CPU by (`key`, row), the same on every rank.
        """
        count, lengths = self.cfg.eval.sample_tokens, batch["length"].tolist()
        window = min(self.cfg.data.seq_len, max(lengths) + count)
        rows = [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths)]
        generators = [models.generator(f"sample/{key}/{number}") for number in range(len(rows))]
        with _evaluating(model):
            for _ in range(count):
                seen = [row[-window:] for row in rows]
                ids = torch.tensor([row + [0] * (window - len(row)) for row in seen], device=batch["input_ids"].device)
                logits = model(input_ids=ids, use_cache=False).logits
                last = torch.tensor([len(row) - 1 for row in seen], device=ids.device)
                scores = logits[torch.arange(len(rows), device=ids.device), last].float().cpu()
                for row, score, generator in zip(rows, scores[:, : self.info["vocab_size"]], generators):
                    if temperature == 0:
                        row.append(int(score.argmax()))
                    else:
                        odds = F.softmax(score / temperature, dim=0)
                        row.append(int(torch.multinomial(odds, 1, generator=generator)))
        return torch.tensor([row[length:] for row, length in zip(rows, lengths)])


def _asked(source: Path, kind: str) -> list[tuple[str | chat.Messages, str | None]]:
    """The prompts of a file, each with the true answer where the file has it. Raises DataError."""
    found: list[tuple[str | chat.Messages, str | None]] = []
    number = 0
    try:
        for line in source.read_text(encoding="utf-8").split("\n"):
            number += 1
            if line.strip():
                found.append(_of_row(json.loads(line), kind) if source.suffix == ".jsonl" else (line, None))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}{f', line {number}' if number else ''}: {error}. Give a text file with a prompt per line, or a .jsonl "
            "file whose rows have a field prompt, or are chats as they are trained on."
        ) from None
    if not found:
        raise DataError(f"{source} holds no prompt: a text file has one per line, a .jsonl file in the field prompt.")
    return found


def _of_row(row: Any, kind: str) -> tuple[str | chat.Messages, str | None]:
    """Prompt and answer of a row. Raises ValueError."""
    if kind == "chat" and isinstance(row, dict) and {"messages", "conversations", "completion"} & row.keys():
        turns = chat.messages_of(row, answered=False)
        return (turns[:-1], turns[-1]["content"]) if turns[-1]["role"] == "assistant" else (turns, None)
    prompt, answer = (
        (row.get("prompt", row.get("text")), row.get("completion")) if isinstance(row, dict) else (row, None)
    )
    if not isinstance(prompt, str) or not prompt or not isinstance(answer, str | None):
        what = f"the fields {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ValueError(f"{what}, of which none is a prompt in words to a model that learned from {kind}")
    return prompt, answer


def _inputs(batch: Batch, additive: bool) -> dict[str, Any]:
    """The model's arguments. Where rows are packed, a token sees the earlier ones of its own document only.

    The mask is of booleans, true where a token sees another, or `additive`: 0 there and -inf elsewhere.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if "document" in batch:
        document = batch["document"]
        same = document[:, :, None] == document[:, None, :]
        mask = same.tril()[:, None]
        inputs["attention_mask"] = (
            torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf) if additive else mask
        )
        inputs["position_ids"] = batch["position_ids"]
    return inputs


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode and no gradients; after it, the mode that `model` was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


# ---- The output layer and the loss in chunks -------------------------------------------------------------------------


class ChunkedHead(nn.Linear):
    """An output layer that, while it is `scoring` labels, returns their loss in the place of the logits.

    The loss is computed inside this module's forward, because that is where FSDP2 and ZeRO-3 have its weight whole.
    """

    labels: Tensor | None = None

    @contextmanager
    def scoring(self, labels: Tensor) -> Iterator[None]:
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None

    def forward(self, input: Tensor) -> Tensor:
        if self.labels is None:
            return super().forward(input)
        return chunked_cross_entropy(input, self.weight, self.labels)


def _chunk_head(model: nn.Module) -> None:
    """Turn the output layer into a `ChunkedHead`, in place. Raises ModelError where more than a matrix makes logits."""
    head, config = model.get_output_embeddings(), model.config  # type: ignore[operator]
    scaled = [f for f in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, f, None)]
    if type(head) is not nn.Linear or head.bias is not None or scaled:
        why = f"it applies {scaled[0]} to them" if scaled else f"its output layer is a {type(head).__name__}"
        raise ModelError(
            f"strategy.chunked_loss=true needs a model whose logits are one matrix product without bias; {why}. "
            "Set strategy.chunked_loss=false."
        )
    head.__class__ = ChunkedHead  # parameters, hooks and names stay what they are


def _chunked_head(model: nn.Module) -> ChunkedHead:
    return next(module for module in model.modules() if isinstance(module, ChunkedHead))


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int | None = None) -> Tensor:
    """The summed cross-entropy of `hidden` [..., H] @ `weight` [V, H].T against `labels` [...], fp32 scalar.

    At most `rows` rows of logits exist at a time (by default an eighth of them, 2^25 numbers at most): both gradients
    are computed in the forward pass, chunk by chunk, summed in fp32, and only scaled in the backward pass, which can
    run once. Products are in the dtype of autocast where it is on, else of `hidden`; the softmax is in fp32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # or their gradients would be computed for nothing
    rows = rows or max(1, min(-(-len(labels) // 8), 2**25 // len(weight)))
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, rows, dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        matrix = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            chunk, kept = hidden[part].to(dtype), (labels[part] != IGNORED)[:, None]
            target = labels[part, None].where(kept, 0)
            scores = (chunk @ matrix.T).float()
            scores -= scores.amax(dim=1, keepdim=True)
            wanted = scores.gather(1, target)
            mass = scores.exp_().sum(dim=1, keepdim=True)
            total += (mass.log() - wanted).where(kept, 0.0).sum()
            if not (needs_hidden or needs_weight):
                continue
            # From here on `scores` is the gradient of the logits: probability, less 1 at the target, 0 where ignored.
            scores *= mass.reciprocal().where(kept, 0.0)
            scores.scatter_(1, target, (wanted.exp() / mass - 1.0).where(kept, 0.0))
            gradient = scores.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ matrix
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(gradient.T, chunk)
            elif grad_weight is not None:
                grad_weight += gradient.T @ chunk
        ctx.gradients, ctx.dtypes = (grad_hidden, grad_weight), (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(scale[0]).to(t) for g, t in zip(gradients, ctx.dtypes)]
        return *scaled, None, None, None
