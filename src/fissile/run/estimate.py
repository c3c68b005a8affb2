"""Peak memory, disk and time of every stage, from sizes alone.

Memory is a sum of named terms per stage; each mirrors one allocation of the code that runs it, so a
wrong prediction can be traced to a term. What a stage holds at different moments is not added up:
the largest moment counts. Time is arithmetic over a range of speeds, and no more than a hint.

Shapes: T tokens of the stage, C tokens of one forward pass, D model width, F FFN width, V
vocabulary, S shared neurons, E routed experts, M neurons per expert, L layers, I and O inputs and
outputs of a linear, W widths. All sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fissile.config import Recipe
from fissile.quant.effort import PLANS
from fissile.run.costs import COSTS, Costs, Shape, StageCost

# Of one multiple-choice item in each of four domains: four choices after a question.
_ITEM_TOKENS = 4 * 4 * 110


@dataclass(frozen=True)
class Estimator:
    """Costs of the stages of a recipe on a model.

    Attributes:
        shape: sizes of the model and its artifact.
        recipe: what is done.
        cores: processors that share the work.
        costs: constants.
    """

    shape: Shape
    recipe: Recipe
    cores: int = 1
    costs: Costs = COSTS

    def stage(self, name: str) -> StageCost:
        """Cost of a stage by its name.

        Raises:
            ValueError: no such stage.
        """
        stages = {
            "calibrate": self._calibrate,
            "extract": self._extract,
            "route": self._route,
            "recover": self._recover,
            "quantize": self._quantize,
            "tune": self._tune,
            "export": self._export,
            "verify": self._verify,
            "evaluate": self._evaluate,
            "report": self._report,
        }
        if name not in stages:
            raise ValueError(f"no stage {name!r}")
        return stages[name]()

    # -- parts that several stages share ---------------------------------------------------------

    def _cost(
        self, stage: str, memory: Mapping[str, float], disk: float = 0, flops: float = 0
    ) -> StageCost:
        costs = self.costs
        working = sum(memory.values())
        terms = {"interpreter": costs.interpreter, **memory, "allocator": costs.allocator * working}
        slow, fast = (rate * 1e9 * self.cores for rate in costs.gflops_core)
        seconds = (costs.floor_seconds + flops / fast, costs.floor_seconds + flops / slow)
        return StageCost(stage, {k: int(v) for k, v in terms.items()}, int(disk), seconds)

    def _streamed(self, tokens: int, models: int = 1) -> dict[str, float]:
        """Embeddings and head of the streamed models, the residual stream, one layer of each."""
        shape, size = self.shape, self.costs.float_bytes
        return {
            "embeddings": size * shape.outer_weights * models,
            "stream": size * tokens * shape.dims.hidden,
            "layer": size * shape.layer_weights * models,
        }

    def _forward(self, batch_tokens: int, context: int) -> float:
        """Activations of one layer over one batch: the larger of attention and FFN."""
        costs, dims = self.costs, self.shape.dims
        tokens = max(batch_tokens, context)
        # Without fused attention all scores exist, with their softmax in float32.
        scores = 0 if self.shape.sdpa else 3 * dims.heads * context
        attend = costs.attend_copies * dims.hidden + scores
        ffn = costs.ffn_copies * self.shape.at_once + costs.held_copies * dims.hidden
        return costs.float_bytes * tokens * max(attend, ffn)

    def _pass(self, tokens: int, context: int) -> float:
        """Operations of one forward pass through all layers."""
        dims = self.shape.dims
        return (
            tokens * dims.layers * (2.0 * self.shape.active_weights + 2.0 * context * dims.q_width)
        )

    def _statistics(self) -> float:
        """Sums per neuron and domain, and sketches, of one layer, in float64."""
        dims, sketch = self.shape.dims, self.recipe.calibrate.sketch_dim
        return 8.0 * dims.ffn * (3 * self.shape.domains + 2 * sketch + 2)

    def _dense_held(self) -> dict[str, float]:
        """What the refactoring stages leave in memory for the ones after them."""
        if not self.recipe.extract.enabled:
            return {}
        outer = self.costs.float_bytes * self.shape.outer_weights
        return {"dense embeddings": float(outer)}

    # -- stages ----------------------------------------------------------------------------------

    def _calibrate(self) -> StageCost:
        wanted, dims = self.recipe.calibrate, self.shape.dims
        float64_rows = 3 * 8 * 1024 * dims.ffn
        memory = self._streamed(wanted.tokens) | {
            "activations": self._forward(wanted.batch_tokens, wanted.context) + float64_rows,
            "statistics": self._statistics(),
        }
        sketches = 4.0 * wanted.tokens * dims.layers * dims.ffn * wanted.sketch_dim
        work = self._pass(wanted.tokens, wanted.context) + sketches
        stored = dims.layers * self._statistics()
        return self._cost("calibrate", memory, stored, work)

    def _extract(self) -> StageCost:
        dims, experts = self.shape.dims, max(self.shape.num_experts, 1)
        sketch = 2 * self.recipe.calibrate.sketch_dim
        memory = self._dense_held() | {"clustering": 8.0 * dims.ffn * (3 * sketch + 4 * experts)}
        work = 20.0 * dims.layers * dims.ffn * experts * (2 * sketch + 100)
        wanted = self.recipe.extract
        if wanted.method == "fissile" and wanted.refine_rounds:
            # FFN inputs of all layers in bfloat16; activations of one, and a few copies of them.
            tokens = min(wanted.refine_tokens, self.recipe.calibrate.tokens)
            sample = 2.0 * dims.layers * tokens * dims.hidden + 3 * 4.0 * tokens * dims.ffn
            memory |= self._streamed(tokens) | {"refinement": sample}
            passes = 6.0 * tokens * dims.layers * dims.hidden * dims.ffn
            work += self._pass(tokens, self.recipe.calibrate.context)
            work += (wanted.refine_rounds + 2) * passes
        if wanted.method == "fissile" and wanted.allocation == "kl":
            # A residual stream per pruned layer beside the dense one; on average half the layers.
            tokens = min(wanted.allocation_tokens, self.recipe.calibrate.tokens)
            memory |= {"streams": 4.0 * (dims.layers + 1) * tokens * dims.hidden}
            work += (dims.layers / 2 + 1) * self._pass(tokens, self.recipe.calibrate.context)
        return self._cost("extract", memory, 8 * dims.layers * dims.ffn, work)

    def _route(self) -> StageCost:
        """The oracle's norms (T, E) of all layers and the ridge router's moments (D, D) of one."""
        wanted, dims = self.recipe.calibrate, self.shape.dims
        norms = 4.0 * dims.layers * wanted.tokens * self.shape.num_experts
        moments = 3 * 8.0 * dims.hidden**2
        memory = self._streamed(wanted.tokens) | {
            "activations": self._forward(wanted.batch_tokens, wanted.context),
            "oracle": norms,
            "ridge": moments,
        }
        oracle = 2.0 * wanted.tokens * dims.layers * dims.hidden * (dims.ffn + dims.hidden)
        router = dims.hidden * (2 * dims.q_width + 2 * self.recipe.route.attention_dim)
        training = 6.0 * self.recipe.route.steps * self.recipe.route.batch_tokens * router
        work = self._pass(wanted.tokens, wanted.context) + oracle + training
        return self._cost("route", memory, norms, work)

    def _recover(self) -> StageCost:
        """Re-fit, layer by layer, then training, with student and teacher whole in memory."""
        both = [self._refit(), self._train()]
        largest = max(both, key=lambda cost: cost.peak)
        fast, slow = (sum(cost.seconds[i] for cost in both) for i in (0, 1))
        disk = sum(cost.disk for cost in both)
        return StageCost("recover", largest.memory, disk, (fast, slow))

    def _refit(self) -> StageCost:
        wanted, shape = self.recipe.calibrate, self.shape
        if not self.recipe.recover.refit or not shape.shared:
            return self._cost("refit", {})
        settings, dims = self.recipe.recover, shape.dims
        fitted = shape.shared
        if settings.refit_scope == "all":
            fitted += shape.num_experts * shape.expert
        inputs = fitted + (shape.num_experts if settings.restores else 0)
        # Moments and a solve in float64, a candidate per ridge.
        moments = 8.0 * (3 * inputs**2 + 6 * inputs * dims.hidden)
        tokens = min(wanted.tokens, settings.refit_tokens)
        # Inputs and residuals of the held-out windows; the dense model's stream as a target.
        held = 4.0 * tokens / 8 * 2 * dims.hidden
        beside = 4.0 * tokens * dims.hidden * (settings.refit_target == "stream")
        memory = self._streamed(tokens, models=2) | {
            "dense stream": beside,
            "activations": 2 * self._forward(wanted.batch_tokens, wanted.context)
            + 4.0 * wanted.batch_tokens * inputs,
            "moments": moments + held,
        }
        disk = 4.0 * dims.layers * inputs * dims.hidden
        products = 2.0 * tokens * dims.layers * inputs**2
        work = 3 * self._pass(tokens, wanted.context) + products
        return self._cost("refit", memory, disk, work)

    def _train(self) -> StageCost:
        wanted, shape, costs = self.recipe.recover, self.shape, self.costs
        if not wanted.trains:
            return self._cost("train", {})
        dims, size = shape.dims, costs.float_bytes
        linears = [*shape.attention, *[(dims.hidden, dims.ffn)] * 3]
        adapters = dims.layers * sum(wanted.rank * (o + i) for o, i in linears)
        trained = shape.total_weights if wanted.method == "full" else adapters
        tokens, context = max(wanted.batch_tokens, wanted.context), wanted.context
        copies = costs.train_copies_d * dims.hidden + costs.train_copies_f * dims.ffn
        scores = 2 * dims.heads * context
        memory = self._dense_held() | {
            "student and teacher": 2.0 * size * shape.total_weights,
            "gradients and optimiser": 4.0 * size * trained,
            "activations": size * tokens * dims.layers * (copies + scores),
            "logits": costs.logit_copies * size * tokens * dims.vocab,
        }
        # Values, indices and the rest's mass of every calibration token that is read.
        kept = wanted.teacher_top_k * (4 if dims.vocab <= 1 << 16 else 6) + 4
        targets = float(min(self.recipe.calibrate.tokens, self._read_tokens()) * kept)
        stages = max(1, 2 * wanted.alternate.rounds)
        disk = size * (shape.total_weights + 3 * trained * stages) + targets
        cost = self._cost("train", memory, disk, self._training())
        return replace(cost, seconds=(wanted.seconds,) * 2) if wanted.seconds else cost

    def _read_tokens(self) -> int:
        """Tokens that the training reads; of a budget in seconds no more than all, once."""
        wanted = self.recipe.recover
        step = max(wanted.batch_tokens, wanted.context) * wanted.accumulate
        steps = wanted.steps_of(step)
        return self.recipe.calibrate.tokens if steps is None else steps * step

    def _training(self) -> float:
        """Operations: student forward and backward, teacher forward once a token or every time."""
        wanted, dims, read = self.recipe.recover, self.shape.dims, self._read_tokens()
        weights = dims.layers * self.shape.layer_weights + dims.vocab * dims.hidden
        once = min(self.recipe.calibrate.tokens, read) if wanted.teacher_top_k else read
        # Adapters need no weight gradients.
        per_weight = 8.0 if wanted.method == "full" else 6.0
        return (per_weight * read + 2.0 * once) * weights

    def _quantize(self) -> StageCost:
        """One layer and its stream, and the largest of: forward, Hessian, solve."""
        wanted, context = self.recipe.quantize, self.recipe.calibrate.context
        linears, costs = self.shape.linears(wanted.attention), self.costs
        batch = min(self.recipe.calibrate.batch_tokens, wanted.tokens)
        largest = max(inputs**2 for _, _, inputs in linears)
        held = costs.held_copies * self.shape.dims.hidden + self.shape.at_once
        adding = costs.float_bytes * batch * held + costs.hessian_add * largest
        base = [bits for bits in wanted.widths if bits <= 4]
        beside = bool(wanted.blend or wanted.block.steps)
        # Sums of the drift, and what it was at every width.
        drifted = costs.float_bytes * (1 + len(base)) * largest * bool(wanted.blend)
        forward = self._forward(batch, context) + 8 * largest
        moments = max(forward, adding, *(self._solving(*x) for x in linears)) + drifted
        memory = (
            self._streamed(wanted.all_tokens)
            | self._dense_held()
            | {
                "moments and solver": max(moments, self._training_a_block()),
                "packed layer": 2.0 * self.shape.layer_bytes,
            }
        )
        layers, disk = self.shape.dims.layers, self.shape.artifact_bytes
        tokens = wanted.all_tokens
        if beside:
            # A stream for every width, the float model and its outputs: in files.
            memory["stream"] = 0.0
            memory["float layer"] = float(costs.float_bytes * self.shape.layer_weights)
            streams = len(base) + 1 + bool(wanted.block.steps)
            disk += costs.float_bytes * tokens * self.shape.dims.hidden * streams
        products = sum(2.0 * tokens * inputs**2 for _, _, inputs in linears)
        entries = sum(count * outputs * inputs**2 for count, outputs, inputs in linears)
        paths = 2 * len(base) if beside else 1
        passes = (2 + len(linears)) * paths * self._pass(tokens, context)
        trained = wanted.block.steps * len(linears) * len(base) * 3 * wanted.block.batch_tokens
        passes += self._pass(trained, context)
        work = passes + layers * (products + entries * self._solver_products())
        if wanted.generated:
            work += self._pass(wanted.tokens * wanted.generated, context)
            memory = max(memory, self._writing(), key=lambda terms: sum(terms.values()))
        return self._cost("quantize", memory, disk, work)

    def _writing(self) -> dict[str, float]:
        """The dense model while it writes text, in bfloat16, and what it is read from."""
        shape, size, dims = self.shape, self.costs.float_bytes, self.shape.dims
        tokens = self.costs.written_windows * self.recipe.calibrate.context
        cache = 4.0 * tokens * dims.layers * dims.kv_width
        return {
            "dense model": 2.0 * shape.total_weights + size * shape.outer_weights,
            "layer": float(size * shape.layer_weights),
            "keys and values": min(self.costs.written_cache, cache),
        }

    def _tune(self) -> StageCost:
        """The quantized model, its teacher, and the floats of all widths in training."""
        wanted, shape, costs = self.recipe.quantize, self.shape, self.costs
        dims, size, settings = shape.dims, costs.float_bytes, wanted.tune
        weights = float(dims.layers * shape.layer_weights)
        floats = 2.0 * len(wanted.widths) * weights / wanted.group_size
        context = min(settings.context, self.recipe.calibrate.context)
        tokens = max(settings.batch_tokens, context)
        copies = costs.train_copies_d * dims.hidden + costs.train_copies_f * dims.ffn
        memory = self._dense_held() | {
            "embeddings": 2.0 * size * shape.outer_weights,
            "codes": weights,
            # At one width: decoded, and the gradient towards it.
            "layer": 3.0 * size * shape.layer_weights,
            "floats and optimiser": 6.0 * size * floats,
            "activations": size
            * tokens
            * (dims.layers * dims.hidden + copies + 2.0 * dims.heads * context),
            "logits": costs.logit_copies * size * tokens * dims.vocab,
        }
        seen = wanted.all_tokens
        kept = seen * (settings.teacher_top_k * (4 if dims.vocab <= 1 << 16 else 6) + 4)
        read = settings.steps * tokens * len(wanted.widths)
        # Every layer runs forward twice.
        work = (8.0 * read + 2.0 * seen) * (weights + dims.vocab * dims.hidden)
        return self._cost("tune", memory, kept + 3 * size * floats, work)

    def _training_a_block(self) -> float:
        """A block's weights in training, activations of one step."""
        costs, dims, wanted = self.costs, self.shape.dims, self.recipe.quantize
        if not wanted.block.steps:
            return 0.0
        tokens = max(wanted.block.batch_tokens, self.recipe.calibrate.context)
        computed = self.shape.computed * dims.ffn
        copies = costs.train_copies_d * dims.hidden + costs.train_copies_f * computed
        scores = 2 * dims.heads * self.recipe.calibrate.context
        # Weights of every width; of one at a time gradients, moments and what it may go back to.
        times = sum(bits <= 4 for bits in wanted.widths) + 4
        held = times * self.shape.layer_weights + tokens * (copies + scores)
        return float(costs.float_bytes * held)

    def _solving(self, count: int, outputs: int, inputs: int) -> float:
        """Most that solving `count` linears of one shape holds beside the layer."""
        costs = self.costs
        stack, linears = float(count * outputs * inputs), count
        # Experts are solved in rounds, the stack is whole.
        count = min(count, max(1, int(costs.expert_hessians) // (8 * inputs**2)))
        entries, weights = count * inputs**2, float(count * outputs * inputs)
        errors = costs.float_bytes * weights * len(self.recipe.quantize.widths)
        chunk = costs.solver_buffers * min(costs.solver_chunk, errors)
        prepare = costs.hessian_prepare * entries
        solve = costs.hessian_solve * entries + chunk
        # Losses are measured one linear at a time: half of a gate and up pair, a whole stack.
        store = costs.hessian_solve * entries + costs.store_copies * weights * (
            1.0 if linears > 1 else 0.5
        )
        return costs.float_bytes * stack + max(prepare, solve, store)

    def _solver_products(self) -> float:
        """Operations of one solve per weight and input: O*I*I times this."""
        plan = PLANS[self.recipe.quantize.effort]
        # A greedy start visits half the pairs of columns, a sweep all; a float step costs about 3.
        greedy, sweep, floats = 1.0, 2.0, 3.0
        work = len(plan.multipliers) * (greedy + floats)
        work += plan.proposals * (greedy + sweep + floats) + plan.rounds * (sweep + floats)
        return len(self.recipe.quantize.widths) * work

    def _export(self) -> StageCost:
        outer = 2.0 * self.costs.float_bytes * self.shape.outer_weights
        layer = float(self.costs.float_bytes * self.shape.layer_weights)
        memory = self._dense_held() | {"outer tensors": outer, "layer": layer}
        return self._cost("export", memory, self.shape.artifact_bytes)

    def _verify(self) -> StageCost:
        memory = self._dense_held() | {
            "artifact": float(self.shape.artifact_bytes),
            "decoded layer": float(self.costs.float_bytes * self.shape.layer_weights),
            "logits": self.costs.scoring,
        }
        return self._cost("verify", memory, 0, 2.0 * 2048 * self.shape.total_weights)

    def _evaluate(self) -> StageCost:
        """Whole float models one after the other: dense, controls, widths, baselines."""
        wanted, shape = self.recipe.evaluate, self.shape
        widths = len(self.recipe.quantize.widths) if self.recipe.quantize.enabled else 0
        controls = 2 * len(wanted.shares) * len(wanted.controls) * self.recipe.extract.enabled
        models = 1 + controls + widths * (1 + len(wanted.baselines))
        memory = self._dense_held() | {
            "model": float(self.costs.float_bytes * shape.total_weights),
            "activations": self._forward(wanted.batch_tokens, wanted.context),
            "logits": self.costs.scoring,
        }
        head = 2.0 * wanted.tokens * shape.dims.vocab * shape.dims.hidden
        work = models * (self._pass(wanted.tokens, wanted.context) + head)
        served = 1 + widths + self.recipe.extract.enabled
        work += served * self._pass(wanted.choices * _ITEM_TOKENS, wanted.context)
        cost = self._cost("evaluate", memory, 0, work)
        # Baselines are solved again, width by width; how much dearer than the whole is rounded up.
        shares = {"dedicated": 1.0, "gptq": 0.3, "rtn": 0.1, "gptaq": 0.5, "decoupleq": 1.0}
        again = sum(shares[name] for name in wanted.baselines) if widths else 0.0
        solved = self._quantize().seconds
        seconds = (cost.seconds[0] + again * solved[0], cost.seconds[1] + again * solved[1])
        return StageCost("evaluate", cost.memory, cost.disk, seconds)

    def _report(self) -> StageCost:
        return self._cost("report", {"plots": 200e6}, 5e6)
