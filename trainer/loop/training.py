"""The one training loop: QAT with distillation, and the full-precision control, on every engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import TokenizedData
from qatapult.trainer.distill.cache import CachedTeacher
from qatapult.trainer.distill.student import LossParts, Student
from qatapult.trainer.distill.teacher import Teacher
from qatapult.trainer.evaluate.perplexity import Perplexity, perplexity
from qatapult.trainer.loop.batches import BatchPlan
from qatapult.trainer.loop.checkpoint import Checkpointer, TrainerState
from qatapult.trainer.loop.engine import (
    backward,
    configure_forward,
    gradient_norm,
    local_tensors,
    prepare_student,
)
from qatapult.trainer.loop.interrupt import Interrupted, InterruptFlag
from qatapult.trainer.loop.loader import Batch, Loader
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.optimizer import build_optimizer, grid_scales, select_trainable
from qatapult.trainer.loop.out_of_memory import explained_out_of_memory
from qatapult.trainer.loop.quantization_schedule import apply_schedule, on_deployed_grid
from qatapult.trainer.loop.schedules import rate_factor
from qatapult.trainer.loop.watchdog import Watchdog, process_store
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.recipe.steps import blocks_per_step, optimizer_steps, tokens_per_step

_EVALUATION_BATCH = 4


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, over all processes."""

    loss: float
    kl: float
    grad_norm: float
    loader_seconds: float
    hidden: float | None = None
    attention: float | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Trainer:
    """Trains one model against its teacher, evaluates, checkpoints and resumes.

    Args:
        accelerator: the engine.
        recipe: what to do.
        model: prepared for quantization, or plain for the full-precision control.
        teacher: None to train on the text alone.
        data: token blocks.
        checkpoints: folder of this training's checkpoints.
        log: where metrics go.
        console: where progress goes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        model: PreTrainedModel,
        teacher: Teacher | None,
        data: TokenizedData,
        checkpoints: Path,
        log: MetricsLog,
        console: Console,
    ) -> None:
        self.accelerator = accelerator
        self.recipe = recipe
        self.qat = recipe.qat
        self.model = model
        self.teacher = teacher
        self.data = data
        self.checkpoints = checkpoints
        self.log = log
        self.console = console
        self.plan = BatchPlan(
            blocks=len(data.train),
            blocks_per_step=blocks_per_step(recipe),
            batch_size=self.qat.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=recipe.seed,
            shuffle=recipe.data.shuffle,
        )
        cached = teacher.signal if isinstance(teacher, CachedTeacher) else None
        self.loader = Loader(self.plan, data.train, accelerator.device, cached)
        self.tokens_per_step = tokens_per_step(recipe)
        self.steps = optimizer_steps(recipe)
        select_trainable(model, self.qat.trainable)
        configure_forward(model, self.qat)
        optimizer = build_optimizer(model, recipe, self.steps)
        self.state = TrainerState(peak_rates=[group["lr"] for group in optimizer.param_groups])
        student = Student(model, self.qat.distillation)
        self.student, self.optimizer = prepare_student(accelerator, recipe, student, optimizer)
        self.saver = Checkpointer(
            accelerator, model, self.optimizer, checkpoints, self.qat.checkpoints, log.owner
        )
        self._at: Callable[[str], None] = lambda place: None  # tells the watchdog, while there is one
        self._skipped_in_a_row = 0
        self._last_checkpoint = time.monotonic()

    def train(self) -> TrainerState:
        """Train to the end, or from the newest whole checkpoint on.

        Raises:
            Interrupted: after a signal, with a checkpoint written.
            UserError: if the run diverges more often than the recipe allows.
        """
        self._resume()
        plan, timeout = self.plan, self.qat.guards.hang_timeout
        with (
            explained_out_of_memory(self.accelerator, self.recipe),
            InterruptFlag() as flag,
            Watchdog(timeout, plan.rank, plan.world_size, process_store()) as watchdog,
            self.console.progress(self.steps * self.tokens_per_step, "qat") as meter,
            closing(self.loader),
        ):
            self._at = watchdog.beat
            while self.state.step < self.steps and not self._stop_early():
                started = time.perf_counter()
                result = self._step()
                seconds = time.perf_counter() - started
                self.state.loader_seconds += result.loader_seconds
                self.state.step_seconds += seconds
                if not self._accept(result):
                    continue
                self._log_step(result, seconds)
                meter.update(
                    self.state.tokens, loss=result.loss, tokens_per_second=self.tokens_per_step / seconds
                )
                evaluated = self._evaluate_if_due()
                if self._interrupted(flag):
                    self._save()
                    self.saver.finish()
                    raise Interrupted
                if evaluated or self._checkpoint_is_due():
                    self._save()
            self.saver.finish()
        return self.state

    def step(self) -> StepResult:
        """One optimizer step alone, without evaluation, checkpoint or log: for measurements."""
        result = self._step()
        self._accept(result)
        return result

    def evaluate(self) -> Perplexity:
        """Held-out perplexity of the model as it is now, computed by all processes together."""
        self.student.eval()
        measured = perplexity(
            self.model,
            self.data.held_out,
            self.data.held_out_documents,
            batch_size=_EVALUATION_BATCH * self.plan.world_size,
            losses_of=self._shared_losses,
        )
        self.student.train()
        return measured

    def load_best(self) -> None:
        """Put the best checkpoint's weights into the model."""
        best = self.checkpoints / f"step-{self.state.best_step}"
        if self.state.best_step not in (None, self.state.step) and best.exists():
            self.saver.load_weights(best)

    def _step(self) -> StepResult:
        """One optimizer step; the losses and gradients are averages over all tokens of all processes."""
        self.student.train()
        self._apply_schedules()
        sums = torch.zeros(5, dtype=torch.float64, device=self.accelerator.device)
        started = time.perf_counter()
        self._at("the data")
        batches = self.loader.step(self.state.step)
        loader_seconds = time.perf_counter() - started
        positions = self._positions_per_block() * self.plan.blocks_per_step
        # DDP averages over processes and `backward` over micro-batches: undo both, so that the sum over all tokens is
        # divided by their number and by nothing else.
        share = self.plan.world_size * self.plan.micro_batches / positions
        for batch in batches:
            with self.accelerator.accumulate(self.student):
                sums += self._train_on(batch, share)
        self._at("the gradient's norm")
        norm = gradient_norm(self.accelerator, self.student, self.qat.optimizer.gradient_clip)
        loss, kl, tokens, hidden, attention = self.accelerator.reduce(sums, "sum").tolist()
        distillation = self.qat.distillation
        return StepResult(
            loss / tokens,
            kl / tokens,
            norm,
            loader_seconds,
            hidden=None if distillation.hidden is None else hidden / tokens,
            attention=None if distillation.attention is None else attention / tokens,
        )

    def _train_on(self, batch: Batch, share: float) -> Tensor:
        """Gradients of a micro-batch, and its sums, `[5]`."""
        self._at("the teacher's forward pass")
        signal = batch.signal
        if signal is None and self.teacher is not None:
            signal = self.teacher.signal(batch.ids, batch.indices)
        self._at("the student's forward pass")
        parts: LossParts = self.student(batch.ids, batch.present, signal)
        del signal  # the teacher's head and states need not outlive the forward pass
        self._at("the backward pass")
        backward(self.accelerator, parts.loss, share)
        return self._sums(parts)

    @staticmethod
    def _sums(parts: LossParts) -> Tensor:
        """The sums of a micro-batch in one tensor, `[5]`: what processes exchange."""
        none = parts.kl.new_zeros(())
        layers = [none if term is None else term for term in (parts.hidden, parts.attention)]
        return torch.stack([parts.loss.detach(), parts.kl, parts.loss.new_tensor(parts.tokens), *layers])

    def _positions_per_block(self) -> int:
        """Tokens of a block that have a loss: the last has no next token to predict."""
        distillation = self.qat.distillation
        predicts_text = self.teacher is None or distillation.cross_entropy > 0
        return self.recipe.data.block_size - (1 if predicts_text else 0)

    def _accept(self, result: StepResult) -> bool:
        """Apply the step, or leave it out where it is not finite."""
        if result.finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.tokens += self.tokens_per_step
        if not result.finite:
            self._skip()
            return False
        self._skipped_in_a_row = 0
        if self._scales_are_sound():
            return True
        self.log.event("scale_collapsed", self.state.step, self.state.tokens)
        self._roll_back("a scale collapsed")
        return False

    def _skip(self) -> None:
        """Count a step that was left out, and go back if there are too many of them."""
        self.state.skipped_steps += 1
        self._skipped_in_a_row += 1
        self.log.event("skip", self.state.step, self.state.tokens)
        if self._skipped_in_a_row >= self.qat.guards.max_skipped_steps:
            self._roll_back(f"{self._skipped_in_a_row} steps in a row had NaN or inf")

    def _scales_are_sound(self) -> bool:
        """Whether no learned scale is NaN, inf or collapsed to nothing, on any process."""
        faults = [~(torch.isfinite(p) & (p != 0)).all() for p in local_tensors(grid_scales(self.model))]
        mine = torch.stack(faults).any() if faults else torch.tensor(False)
        return not self._anywhere(bool(mine))

    def _anywhere(self, mine: bool) -> bool:
        """Whether something holds on any process."""
        flag = torch.tensor(float(mine), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _roll_back(self, reason: str) -> None:
        """Back to the newest checkpoint with a lower learning rate; all processes come here together."""
        guards = self.qat.guards
        newest = self.saver.newest()
        rollbacks, factor = self.state.rollbacks + 1, self.state.rate_factor * guards.rollback_learning_rate
        if rollbacks > guards.max_rollbacks or newest is None:
            raise UserError(
                f"training diverged at step {self.state.step}: {reason}, after {self.state.rollbacks} rollbacks; "
                "lower qat.optimizer.learning_rate or raise the bits"
            )
        skipped = self.state.skipped_steps
        self.state = self.saver.load(newest)
        self.state.rollbacks, self.state.rate_factor, self.state.skipped_steps = rollbacks, factor, skipped
        self._skipped_in_a_row = 0
        self.log.event("rollback", self.state.step, self.state.tokens)
        self.log.alert("rollback", f"{reason}: back to step {self.state.step}, learning rate × {factor:g}")
        self.console.warn(f"{reason}: back to step {self.state.step}, learning rate × {factor:g}")

    def _apply_schedules(self) -> None:
        factor = rate_factor(self.qat.optimizer, self.state.step, self.steps) * self.state.rate_factor
        for group, peak in zip(self.optimizer.param_groups, self.state.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.state.phase = apply_schedule(
            self.model, self.qat, self.state.step / self.steps, self.state.phase
        )

    def _log_step(self, result: StepResult, seconds: float) -> None:
        layers = {"train/hidden_loss": result.hidden, "train/attention_loss": result.attention}
        self.log.write(
            {
                "train/loss": result.loss,
                "train/kl": result.kl,
                **{name: value for name, value in layers.items() if value is not None},
                "train/learning_rate": self.optimizer.param_groups[0]["lr"],
                "train/grad_norm": result.grad_norm,
                "train/tokens_per_second": self.tokens_per_step / seconds,
                "train/loader_share": result.loader_seconds / seconds,
            },
            self.state.step,
            self.state.tokens,
        )

    def _evaluate_if_due(self) -> bool:
        every = self.qat.evaluate_every_tokens or -(-self.steps // 6) * self.tokens_per_step
        crossed = self.state.tokens // every > (self.state.tokens - self.tokens_per_step) // every
        if not crossed and self.state.step < self.steps:
            return False
        self._at("an evaluation")
        value = self.evaluate().value
        state = self.state
        state.curve.append({"tokens": state.tokens, "step": state.step, "perplexity": value})
        # The model was measured on the grids of its last step.
        if on_deployed_grid(self.qat, (state.step - 1) / self.steps):
            if state.best_perplexity is None or value < state.best_perplexity:
                state.best_perplexity, state.best_step, state.evaluations_since_best = value, state.step, 0
            else:
                state.evaluations_since_best += 1
        self.log.evaluation(value, state.step, state.tokens)
        return True

    def _stop_early(self) -> bool:
        patience = self.qat.early_stopping
        return patience is not None and self.state.evaluations_since_best >= patience

    def _interrupted(self, flag: InterruptFlag) -> bool:
        """Whether any process received a signal: all of them must stop at the same step."""
        return self._anywhere(flag.received is not None)

    def _checkpoint_is_due(self) -> bool:
        policy = self.qat.checkpoints
        every = policy.every_tokens
        if every and self.state.tokens // every > (self.state.tokens - self.tokens_per_step) // every:
            return True
        # The clocks of the processes differ, so the main process decides for all.
        due = torch.tensor(float(time.monotonic() - self._last_checkpoint > policy.every_seconds))
        if not self.accelerator.is_main_process:
            due.zero_()
        return bool(self.accelerator.reduce(due.to(self.accelerator.device), "sum") > 0)

    def _save(self) -> None:
        self._at("a checkpoint")
        self.saver.save(self.state)
        self._last_checkpoint = time.monotonic()

    def _resume(self) -> None:
        self.saver.clean()
        newest = self.saver.newest()
        if newest is not None:
            self.state = self.saver.load(newest)
            self.log.truncate(self.state.step)
            self.console.say(f"resuming from step {self.state.step} of {self.steps}")
        else:
            # An attempt that died before its first checkpoint left lines that are about to be written again.
            self.log.truncate(0)

    def _shared_losses(self, ids: Tensor) -> Tensor:
        """Token losses of a batch, each process computing its share of the blocks."""
        rank, world = self.plan.rank, self.plan.world_size
        rows = -(-len(ids) // world)
        padded = torch.cat([ids, ids[:1].expand(rows * world - len(ids), -1)])
        with torch.no_grad():
            own = self.student(padded[rank * rows : (rank + 1) * rows])
        return self.accelerator.gather(own)[: len(ids)]
