"""The loop, as one rank runs it.

A step: draw the global batch (the same on every rank), take this rank's share, forward and backward over micro-batches, one update. The loss
is weighted by token over the whole global batch, never a mean of means.
"""

import gc
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from regrowth.data_pipeline.batch import split_sample_id
from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import Exhausted, RegrowthError, RunFailed, Stopped
from regrowth.parallel.agree import barrier, on_first_rank, patience
from regrowth.parallel.heartbeat import Heartbeat
from regrowth.pretrain.checkpoint import newest_before, newest_whole, read_state, set_aside
from regrowth.pretrain.checkpoint_folders import checkpoint_path, step_of
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.evaluate import evaluate, heldout
from regrowth.pretrain.growth.event import GrowthEvent, waiting
from regrowth.pretrain.growth.grow import grow_checkpoint
from regrowth.pretrain.growth.plan import GrowthPlan
from regrowth.pretrain.keeper import PlanKeeper
from regrowth.pretrain.loss import training_report
from regrowth.pretrain.memory import is_out_of_memory
from regrowth.pretrain.memory import letter as memory_letter
from regrowth.pretrain.moe import balance, router_rows
from regrowth.pretrain.profile import Profile
from regrowth.pretrain.records import Records, domain_losses
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.safety import StepGuard
from regrowth.pretrain.saving import Saving
from regrowth.pretrain.schedule import lr_factor
from regrowth.pretrain.session import Session
from regrowth.pretrain.stragglers import Stragglers


class Trainer:
    """One rank's view of a run.

    Args:
        asked_to_stop: whether this rank was asked to; any rank's answer stops all of them after the step, with a checkpoint.
    """

    def __init__(
        self, run: RunFolder, config: RunConfig, corpus: Corpus, device: torch.device, rank: int, asked_to_stop: Callable[[], bool],
        heart: Heartbeat,
    ) -> None:  # fmt: skip
        self.run, self.plan, self.corpus = run, PlanKeeper(run, config, device, rank), corpus
        self.device, self.rank, self.asked_to_stop, self.heart = device, rank, asked_to_stop, heart
        self.records = Records(run, corpus, device, rank)
        self.guard = StepGuard(config.safety, max([0, *(2 * event.at_plateau.window for event in config.growth if event.at_plateau)]))
        self.stragglers = Stragglers(config.supervision, device)
        self.told_recipe = ""
        self.rewound_to = -1
        with patience(config.run.timeout_seconds):  # checkpoints are read whole, to see that they are
            checkpoint = on_first_rank(self._where_to_start)
        self.plan.follow(checkpoint)
        self.session = Session(self.config, corpus, self.plan.mesh, checkpoint)
        self.saving = Saving(self.config, self.records, self.session.step if checkpoint else -1, lambda: self.heart.during("checkpoint"))
        if checkpoint:
            self.guard.load_state_dict(self.session.trainer_state.get("guard", {}))
        self.records.decided_by(self.session.step, self.session.loader)
        if not checkpoint:
            self.records.event("started", parameters=self.session.model_config.parameters, layers=self.session.model_config.layers)

    @property
    def config(self) -> RunConfig:
        """The run's config, with the plan that it is on."""
        return self.plan.config

    def run_to_the_end(self) -> None:
        """Steps, and between them growths, evaluations and checkpoints."""
        steps, done = self.config.run.steps, self.session.step
        every = self.config.run.collect_every
        if every:
            gc.disable()  # a collection on one rank makes all the others wait; all of them collect at the same steps
        try:
            with Profile(self.config.run, self.run.path, self.rank, self.device) as profile:
                if done in self.session.lineage.growth_steps:
                    self._evaluate(done, self.config.evaluation.sequences_per_domain, note="after growth")
                elif (
                    done and self._evaluation_due(done) and on_first_rank(lambda: not self.records.evaluated(done))
                ):  # a stop came before it
                    self._evaluate(done, self.config.evaluation.sequences_per_domain)
                while done < steps:
                    if event := self._growth_due(done):
                        self._grow(event, done)
                    try:
                        self.train_step(done)
                    except (RuntimeError, MemoryError) as error:
                        if is_out_of_memory(error):
                            told = memory_letter(self.session.engine, self.config.parallel, self.rank, done, self.device)
                            raise RunFailed(f"{self.run.path}: {told}") from error
                        raise
                    done += 1
                    profile.step(done)
                    if self.guard.spoilt:
                        done = self._rewind(done)
                        continue
                    if self._evaluation_due(done):
                        self._evaluate(done, self.config.evaluation.sequences_per_domain)
                    # Amid outliers nothing is saved, and so nothing from before them is removed.
                    if (done % self.config.checkpoint.every == 0 and not self.guard.in_a_row) or done == steps:
                        self._save(done, wait=done == steps)
                    if every and done % every == 0:
                        gc.collect()
            if not self.run.finished:
                self._save(done, wait=True)
                self._evaluate(done, self.config.evaluation.final_sequences_per_domain, final=True)
                barrier()
                self.records.event("finished", step=done)
        except RegrowthError:
            with suppress(RegrowthError):
                self.saving.background.wait()  # the checkpoint on its way is as good as any
            raise
        finally:
            gc.enable()
            if session := getattr(self, "session", None):  # there is none if the one after a growth could not be built
                session.close()
            self.records.close()

    def _where_to_start(self) -> Path | None:
        checkpoint, refused = newest_whole(self.run.path)
        for letter in refused:
            self.records.event("checkpoint refused", reason=letter, used=checkpoint.name if checkpoint else "none, from the start")
        set_aside(self.run.path, newer_than=checkpoint)
        step = step_of(checkpoint) if checkpoint else 0
        if self.run.rows("metrics"):
            self.records.event("resumed", step=step, checkpoint=checkpoint.name if checkpoint else None)
        self.run.rewind(step)
        return checkpoint

    def train_step(self, step: int) -> None:
        """Draw, train, update, and write down what happened.

        Raises:
            Stopped: on request, after a checkpoint.
            RunFailed: outliers without end, or a checkpoint that could not be written.
        """
        began = time.perf_counter()
        session, engine, config = self.session, self.session.engine, self.config
        recipe = session.precision.begin_step(engine.modules, step, config.run.steps)
        if session.slow_products:
            self.records.event("linears stay wide", step=step, reason="low precision would be slower here", gains=session.slow_products)
            session.slow_products = {}
        if session.precision.begins_anew:
            session.precision.begins_anew = False
            reason = "the checkpoint has none of this model and recipe; the first step is scaled by its own values"
            self.records.event("scales begin anew", step=step, reason=reason)
        if recipe.name != self.told_recipe:
            self.records.event("precision", step=step, recipe=recipe.name)
            self.told_recipe = recipe.name

        self.heart.beat(step, "data")
        try:
            ids, (mine, my_weight, micro_batches) = session.feed.take(step, lambda waited: self._waiting(step, waited))
        except Exhausted:  # on all ranks alike: what was trained is kept
            self._save(step, wait=True)
            raise
        tokens, weight, asked = self._exchange(mine, my_weight)
        self.heart.beat(step, "forward and backward")
        reports = engine.forward_backward(micro_batches, training_report, scale=1.0 / max(weight, 1.0))
        growths = session.lineage.growth_steps
        lr = config.optimizer.lr * lr_factor(config.schedule, step, config.run.steps, growths)
        sums = engine.gather(torch.cat(reports)).cpu().numpy()  # [global batch, 2], in the batch's order on every rank
        loss = float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1.0))
        self.heart.beat(step, "update")
        # An outlier of a loss makes no update, whatever its gradient.
        limit = self.guard.norm_limit if loss <= self.guard.loss_limit else -1.0
        norm = engine.step(lr, config.optimizer.clip, limit)
        if session.ramp:
            session.ramp.add(step, engine)
        updated = norm < math.inf and norm <= limit
        errors, fallen = session.precision.end_step(step, updated)
        self.records.precision(step, errors, fallen)
        routed = balance(engine.modules, session.model_config, self.plan.mesh, move=updated)
        decision = session.loader.observe(step, domain_losses(ids, sums))
        self._account(ids, tokens, config.loader.length_at(step))
        self.records.data(step, session.loader)
        self._guard(step, loss, norm, updated)
        numbers = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "seconds": time.perf_counter() - began}
        self.records.step(config, session, numbers, decision, router_rows(routed, session.model_config) if routed else None)
        for told in self.stragglers.look(step, session.feed.waited):
            self.records.event(**told)
        if asked:
            self._save(step + 1, wait=True)
            self.records.event("stopped", step=step + 1)
            raise Stopped(
                f"{self.run.path}: stopped at step {step + 1} on request; checkpoint written. Go on with: regrowth train --resume {self.run.path}"
            )

    def _waiting(self, step: int, seconds: float) -> None:
        """Waiting for data is no hang, up to the time that one waits for anything."""
        if seconds < self.config.run.timeout_seconds:
            self.heart.beat(step, "data", seen_from_afar=True)

    def _account(self, ids: list[int], tokens: int, length: int) -> None:
        """Write what the step consumed into the lineage."""
        domains = Counter(self.corpus.domains[split_sample_id(sample)[0]] for sample in ids)
        by_domain = {name: count * self.config.loader.sequence_length for name, count in domains.items()}
        flops = float(tokens) * self.session.model_config.train_flops_per_token(length)
        self.session.lineage = self.session.lineage.trained(self.run.path.name, tokens, flops, by_domain)

    def _exchange(self, tokens: int, weight: float) -> tuple[int, float, bool]:
        """One small exchange before a step: tokens and loss weight of the global batch, and whether any rank was asked to stop.

        Raises:
            RunFailed: on all ranks, if the checkpoint on its way could not be written by one of them.
        """
        self.saving.note_finished()
        plan = self.config.parallel
        copies = plan.world_size // plan.data_ranks  # ranks that read the same sequences
        mine = [tokens / copies, weight / copies, float(self.asked_to_stop()), float(self.saving.background.failed)]
        ours = torch.tensor(mine, dtype=torch.float64, device=self.device)
        if plan.world_size > 1:
            torch.distributed.all_reduce(ours)
        all_tokens, all_weight, asked, failed = ours.tolist()
        if failed:
            self.saving.fail()
        return round(all_tokens), round(all_weight, 6), asked > 0

    def _guard(self, step: int, loss: float, norm: float, updated: bool) -> None:
        guard, limits = self.guard, (self.guard.loss_limit, self.guard.norm_limit)
        guard.observe(loss, norm, updated)
        if updated:
            return
        finite = math.isfinite(norm)
        reason = (
            "not finite" if not finite else f"loss above {limits[0]:.4g}" if loss > limits[0] else f"gradient norm above {limits[1]:.4g}"
        )
        self.records.event(
            "skipped step", step=step, reason=f"{reason}; no update was made", loss=loss, norm=str(norm), in_a_row=guard.in_a_row
        )
        if guard.in_a_row >= self.config.safety.give_up_after:
            what = "the gradient was not finite" if not finite else "loss or gradient norm was an outlier"
            raise RunFailed(f"{self.run.path}: {what} for {guard.in_a_row} steps in a row (last: step {step}). Lower optimizer.lr "
                            "or use a wider precision.recipe, and resume; the checkpoints before are intact.")  # fmt: skip

    def _rewind(self, step: int) -> int:
        """Return to the newest checkpoint from before the outliers began, with the loader where it is now: the data in between is not read again."""
        self.heart.beat(step, "loading")
        first = step - self.guard.in_a_row
        if self.rewound_to >= 0 and self.session.step == self.rewound_to:  # that one did not help: further back
            first = min(first, self.rewound_to - 1)
        self.saving.settle()
        with patience(self.config.run.timeout_seconds):
            checkpoint = on_first_rank(lambda: newest_before(self.run.path, first))
        if checkpoint and self.plan.plan_at(checkpoint).world_size != self.config.parallel.world_size:
            checkpoint = None  # from before a growth onto other ranks, which are not here
        on_first_rank(lambda: set_aside(self.run.path, newer_than=checkpoint) if checkpoint else None)
        if checkpoint is None:
            self.guard.rewinds = self.config.safety.rewind_limit
            self.records.event("not rewound", step=step, reason=f"no checkpoint from before step {first}")
            return step
        rewinds, cursors = self.guard.rewinds + 1, self.session.loader.cursors_before(step)
        self._begin_session(checkpoint)
        self.session.loader.cursors = cursors
        self.guard.load_state_dict({**self.session.trainer_state.get("guard", {}), "in_a_row": 0, "rewinds": rewinds})
        self.rewound_to = back = self.session.step
        if self.rank == 0:
            self.run.rewind(back)
        self.records.decided_by(back, self.session.loader, anyway=True)  # the cursors jump
        self.records.event(
            "rewound",
            step=step,
            to=back,
            rewinds=rewinds,
            reason=f"outliers since step {first}; the data of steps {back} to {step - 1} is skipped",
        )
        self.saving.at = -1
        self._save(back, wait=True)  # with the loader where it is, so that a resume does not read the skipped data either
        return back

    def _growth_due(self, step: int) -> GrowthEvent | None:
        session = self.session
        lineage = session.lineage
        if session.ramp and session.ramp.runs(step):  # what is due waits until it is over
            return None
        left = waiting(self.config.growth, lineage)
        due = left and step not in lineage.growth_steps and left[0].due(step, lineage.tokens, self.guard.losses)
        return left[0] if due else None

    def _grow(self, event: GrowthEvent, step: int) -> None:
        before = self.session.model_config
        self._evaluate(step, self.config.evaluation.sequences_per_domain)
        self._save(step, wait=True)
        self.heart.beat(step, "growth")
        source, target = checkpoint_path(self.run.path, step), checkpoint_path(self.run.path, step, grown=True)
        with patience(self.config.run.timeout_seconds):
            on_first_rank(lambda: _grow_again(source, target, event))
        after = read_state(target).model
        self.records.event(
            "growth",
            step=step,
            **event.describe(),
            layers=[before.layers, after.layers],
            width=[before.width, after.width],
            parameters=[before.parameters, after.parameters],
        )
        self._begin_session(target)
        self.guard.forget()
        self._evaluate(step, self.config.evaluation.sequences_per_domain, note="after growth")

    def _begin_session(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of another model, or of another time."""
        self.session.close()
        del self.session  # free the one model before the other is built; engines refer to themselves
        gc.collect()
        self.plan.follow(checkpoint)
        self.session = Session(self.config, self.corpus, self.plan.mesh, checkpoint)

    def _evaluation_due(self, step: int) -> bool:
        return step % self.config.evaluation.every == 0 and step < self.config.run.steps

    def _save(self, step: int, wait: bool = False) -> None:
        self.heart.beat(step, "checkpoint")
        self.saving.save(step, self.session, self.guard.state_dict(), wait)

    def _evaluate(self, step: int, per_domain: int, final: bool = False, note: str = "") -> None:
        self.heart.beat(step, "evaluation")
        batch = heldout(self.corpus, self.config.loader.sequence_length, per_domain)
        scores = evaluate(self.session.engine, batch, self.corpus, self.device, lambda done, of: self.heart.beat(step, "evaluation"))
        self.records.evaluation(step, scores, final, note)


def _grow_again(source: Path, target: Path, plan: GrowthPlan) -> None:
    import shutil

    shutil.rmtree(target, ignore_errors=True)  # one that stands here was refused, or the run would have started from it
    grow_checkpoint(source, target, plan)
